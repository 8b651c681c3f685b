"""The Gated DeltaNet layer against transformers' Qwen3.5 module with random weights: whole layers and final states."""

import random

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

EPSILON = 1e-6
# (key heads, value heads, key dim, value dim)
SHAPES = [(2, 4, 32, 48), (3, 3, 128, 128), (1, 3, 64, 32)]


@pytest.fixture(scope="module", autouse=True)
def library(request):
    folder = request.getfixturevalue("build_folder")
    path = folder / "libspot_ops.so"
    assert path.is_file(), f"{path} does not exist: build the target spot_ops_library"
    torch.ops.load_library(str(path))


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)


class Layer:
    """transformers' module and ours on the same weights; ours with pools of states, slots in random order."""

    def __init__(self, shape, hidden_size=40, num_slots=7):
        num_key_heads, num_value_heads, key_dim, value_dim = shape
        config = Qwen3_5TextConfig(
            hidden_size=hidden_size,
            linear_num_key_heads=num_key_heads,
            linear_num_value_heads=num_value_heads,
            linear_key_head_dim=key_dim,
            linear_value_head_dim=value_dim,
            linear_conv_kernel_dim=4,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rms_norm_eps=EPSILON,
        )
        self.config = config
        module = Qwen3_5GatedDeltaNet(config, layer_idx=0).float().eval()
        with torch.no_grad():
            for projection in (
                module.in_proj_qkv,
                module.in_proj_z,
                module.in_proj_b,
                module.in_proj_a,
                module.out_proj,
            ):
                projection.weight.normal_(0, projection.in_features**-0.5)
            module.conv1d.weight.normal_(0, 0.5)
            # From heads that forget within a token to heads that remember thousands.
            module.A_log.copy_(torch.empty(num_value_heads).uniform_(-7, 3))
            module.dt_bias.normal_()
            module.norm.weight.normal_(1, 0.3)
        self.module = module
        self.conv = module.conv1d.weight.detach().squeeze(1).t().contiguous()
        self.decay_rate = module.A_log.detach().exp()
        channels = self.conv.shape[1]
        self.conv_states = torch.randn(num_slots, 3, channels)
        self.recurrent_states = torch.randn(num_slots, num_value_heads, key_dim, value_dim)
        self.slots = torch.randperm(num_slots)

    def open(self, count):
        """Slots of `count` new sequences."""
        slots = self.slots[:count]
        self.conv_states[slots] = 0
        self.recurrent_states[slots] = 0
        return slots

    @torch.no_grad()
    def ours(self, x, slots, query_lengths):
        """x [T, hidden] -> [T, hidden]."""
        m = self.module
        arguments = [
            m.in_proj_qkv(x),
            m.in_proj_z(x),
            m.in_proj_b(x),
            m.in_proj_a(x),
            self.conv,
            self.decay_rate,
            m.dt_bias.detach(),
            m.norm.weight.detach(),
            EPSILON,
            self.conv_states,
            self.recurrent_states,
            slots,
        ]
        if all(n == 1 for n in query_lengths):
            y = torch.ops.spot.gated_delta_decode(*arguments)
        else:
            y = torch.ops.spot.gated_delta_prefill(*arguments, query_lengths)
        return m.out_proj(y)

    @torch.no_grad()
    def theirs(self, x):
        """One sequence x [L, hidden] from an empty past: output, conv state [3, channels], recurrent state."""
        cache = DynamicCache(config=self.config)
        y = self.module(x[None], cache_params=cache)[0]
        state = cache.layers[0]
        return y, state.conv_states[0][0, :, -3:].t(), state.recurrent_states[0][0]

    @torch.no_grad()
    def exact(self, x):
        """The output for one sequence [L, hidden] by the layer's equations in float64, token by token."""
        m, config = self.module, self.config
        matrix = lambda projection: x.double() @ projection.weight.double().t()  # noqa: E731
        heads, key_dim, value_dim = (
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        mixed = torch.nn.functional.conv1d(
            torch.nn.functional.pad(matrix(m.in_proj_qkv).t()[None], (3, 0)),
            m.conv1d.weight.double(),
            groups=self.conv.shape[1],
        )[0].t()
        keys = config.linear_num_key_heads * key_dim
        q, k, v = torch.nn.functional.silu(mixed).split([keys, keys, heads * value_dim], dim=-1)
        q, k = (t.view(len(x), -1, key_dim).repeat_interleave(heads // config.linear_num_key_heads, 1) for t in (q, k))
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        v = v.view(len(x), heads, value_dim)
        beta = torch.sigmoid(matrix(m.in_proj_b))
        decay = torch.exp(
            -m.A_log.double().exp() * torch.nn.functional.softplus(matrix(m.in_proj_a) + m.dt_bias.double())
        )
        state, outputs = torch.zeros(heads, key_dim, value_dim, dtype=torch.float64), []
        for t in range(len(x)):
            state = state * decay[t, :, None, None]
            delta = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t, :, :, None] * delta[:, None]
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]) * key_dim**-0.5)
        out = torch.stack(outputs)
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPSILON) * m.norm.weight.double()
        out = out * torch.nn.functional.silu(matrix(m.in_proj_z).view_as(out))
        return out.flatten(1) @ m.out_proj.weight.double().t()


def relative_error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def assert_close(ours, theirs, what, bound=2e-5):
    assert ours.shape == theirs.shape
    error = relative_error(ours, theirs)
    assert error <= bound, f"{what}: norm-wise relative error {error:.2e} above {bound:.0e}"


def assert_output(layer, x, ours, theirs, what):
    """Near float64. Where a head's query and key are nearly orthogonal, its norm divides by almost nothing and float32 itself
    is far from float64 (a sequence of one token has nothing to average that away): then as near as transformers is."""
    assert ours.shape == theirs.shape
    reference = layer.exact(x)
    error, limit = relative_error(ours, reference), 2 * relative_error(theirs, reference)
    assert error <= max(2e-5, limit), f"{what}: {error:.2e} from float64; twice that of transformers is {limit:.2e}"


def assert_same_states(layer, slot, conv, recurrent, what):
    assert_close(layer.conv_states[slot], conv, f"{what}, convolution state")
    assert_close(layer.recurrent_states[slot], recurrent, f"{what}, recurrent state")


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(shape, length):
    layer = Layer(shape)
    x = torch.randn(length, layer.config.hidden_size)
    others = layer.slots[1:]
    before = layer.recurrent_states[others].clone(), layer.conv_states[others].clone()
    slots = layer.open(1)
    y, conv, recurrent = layer.theirs(x)
    assert_output(layer, x, layer.ours(x, slots, [length]), y, f"{length} tokens")
    assert_same_states(layer, slots[0], conv, recurrent, f"{length} tokens")
    assert torch.equal(layer.recurrent_states[others], before[0]) and torch.equal(layer.conv_states[others], before[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_prefill(shape):
    layer = Layer(shape)
    pieces = [1, 2, 64, 63, 5, random.randint(2, 150), 128]
    x = torch.randn(sum(pieces), layer.config.hidden_size)
    y, conv, recurrent = layer.theirs(x)
    slots = layer.open(1)
    parts = [layer.ours(part, slots, [len(part)]) for part in x.split(pieces)]
    assert_output(layer, x, torch.cat(parts), y, f"pieces {pieces}")
    assert_same_states(layer, slots[0], conv, recurrent, f"pieces {pieces}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [1, 2, 70])
def test_prefill_then_decode(shape, prompt):
    layer = Layer(shape)
    x = torch.randn(prompt + 67, layer.config.hidden_size)
    y, conv, recurrent = layer.theirs(x)
    slots = layer.open(1)
    parts = [layer.ours(x[:prompt], slots, [prompt])]
    parts += [layer.ours(x[t : t + 1], slots, [1]) for t in range(prompt, len(x))]
    assert_output(layer, x, torch.cat(parts), y, f"prompt of {prompt}")
    assert_same_states(layer, slots[0], conv, recurrent, f"prompt of {prompt}")


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_batch(shape):
    """Prefill of several lengths at once, another such call, then decode steps of all."""
    layer = Layer(shape)
    calls = [[65, 1, 200, 3, 64], [7, 130, 1, 0, 65]] + [[1] * 5] * 3
    random.shuffle(calls[0])
    random.shuffle(calls[1])
    sequences = [torch.randn(sum(call[i] for call in calls), layer.config.hidden_size) for i in range(5)]
    slots = layer.open(5)
    outputs, done = [[] for _ in sequences], [0] * 5
    for call in calls:
        flat = torch.cat([x[n : n + count] for x, n, count in zip(sequences, done, call)])
        for i, part in enumerate(layer.ours(flat, slots, call).split(call)):
            outputs[i].append(part)
            done[i] += call[i]
    for i, x in enumerate(sequences):
        what = f"sequence {i} of calls {calls}"
        y, conv, recurrent = layer.theirs(x)
        assert_output(layer, x, torch.cat(outputs[i]), y, what)
        assert_same_states(layer, slots[i], conv, recurrent, what)


def test_long_sequences_run_in_pieces():
    layer = Layer((1, 2, 16, 16))
    lengths = [2500, 70, 4097, 1]
    sequences = [torch.randn(n, layer.config.hidden_size) for n in lengths]
    slots = layer.open(4)
    outputs = layer.ours(torch.cat(sequences), slots, lengths).split(lengths)
    for i, x in enumerate(sequences):
        y, conv, recurrent = layer.theirs(x)
        assert_output(layer, x, outputs[i], y, f"sequence of {lengths[i]}")
        assert_same_states(layer, slots[i], conv, recurrent, f"sequence of {lengths[i]}")


def test_repeated_tokens_stay_stable():
    """Equal keys make the triangular system as ill-conditioned as it gets; powers of it would overflow float32."""
    layer = Layer((2, 2, 64, 64))
    with torch.no_grad():
        layer.module.A_log.fill_(-12)
    layer.decay_rate = layer.module.A_log.detach().exp()
    x = torch.randn(1, layer.config.hidden_size).expand(190, -1) * 2
    y, conv, recurrent = layer.theirs(x)
    slots = layer.open(1)
    assert_close(layer.ours(x, slots, [190]), y, "190 equal tokens", bound=1e-4)
    assert_same_states(layer, slots[0], conv, recurrent, "190 equal tokens")


def test_bfloat16_matches_float32_within_its_rounding():
    layer = Layer((2, 4, 32, 32))
    x = torch.randn(150, layer.config.hidden_size)
    m = layer.module
    with torch.no_grad():
        inputs = [p(x).bfloat16() for p in (m.in_proj_qkv, m.in_proj_z, m.in_proj_b, m.in_proj_a)]
        results = []
        for cast in (torch.bfloat16, torch.float32):
            slots = layer.open(1)
            y = torch.ops.spot.gated_delta_prefill(
                *[t.to(cast) for t in inputs],
                layer.conv,
                layer.decay_rate,
                m.dt_bias.detach(),
                m.norm.weight.detach(),
                EPSILON,
                layer.conv_states,
                layer.recurrent_states,
                slots,
                [150],
            )
            assert y.dtype == cast
            results.append((y, layer.recurrent_states[slots].clone()))
    assert_close(results[0][0], results[1][0], "output", bound=4e-3)  # only the result was rounded
    assert torch.equal(results[0][1], results[1][1])


def test_wrong_arguments_are_refused():
    layer = Layer(SHAPES[0])
    slots = layer.open(1)
    x = torch.randn(5, layer.config.hidden_size)
    with pytest.raises(RuntimeError, match="query_lengths sum to 6"):
        layer.ours(x, slots, [6])
    with pytest.raises(RuntimeError, match="state_slots"):
        layer.ours(x, slots.int(), [5])
    layer.recurrent_states = layer.recurrent_states.double()
    with pytest.raises(RuntimeError, match="recurrent_states is .* Double; it must be .* Float"):
        layer.ours(x, slots, [5])
