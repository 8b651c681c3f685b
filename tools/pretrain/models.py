"""Qwen3 and the Qwen3.5 hybrid for training: parameters named and shaped as in transformers' checkpoints.

Everything but attention and the scan over chunks works on flattened tokens [rows * length, ...], so that what is compiled once
serves every length. float32 weights and residual stream, bfloat16 products on a GPU; the gated delta rule is float32 (TF32).
"""

import math

import torch
import torch.nn.functional as F

from . import gated_delta

VOCABULARY = 4096
MAX_POSITIONS = 131072


def published_config(
    model_type: str, hidden_size: int = 256, num_layers: int = 0, intermediate_size: int = 768
) -> dict:
    """config.json of a model; 0 layers: 8 for qwen3, 12 for qwen3_5."""
    hybrid = model_type == "qwen3_5"
    num_layers = num_layers or (12 if hybrid else 8)
    config = dict(
        architectures=["Qwen3_5ForCausalLM" if hybrid else "Qwen3ForCausalLM"],
        model_type="qwen3_5_text" if hybrid else "qwen3",
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=intermediate_size,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        dtype="bfloat16",
        use_cache=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=3,
        initializer_range=0.02,
    )
    if not hybrid:
        return config | dict(
            rope_theta=1e6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
            use_sliding_window=False,
            sliding_window=None,
            max_window_layers=num_layers,
        )
    kinds = ["full_attention" if (at + 1) % 4 == 0 else "linear_attention" for at in range(num_layers)]
    rope = dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.25)
    return config | dict(
        rope_parameters=rope,
        layer_types=kinds,
        full_attention_interval=4,
        attn_output_gate=True,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
    )


# --- pieces over flattened tokens; `low` is the dtype of products


def rms(x, weight, zero_centred: bool):
    return F.rms_norm(x, (x.shape[-1],), (1 + weight if zero_centred else weight).to(x.dtype), 1e-6)


def product(x, weight, low):
    return x.to(low) @ weight.to(low).t()


def rotated(x, cos, sin):
    """Rotates the first 2 * cos.shape[-1] dims of each head; x [tokens, heads, dim], cos and sin [tokens, 1, rotary / 2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), -1)


def attention_inputs(x, norm, q, k, v, q_norm, k_norm, cos, sin, head_dim: int, hybrid: bool, low):
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim], output gate or an empty tensor."""
    x = rms(x, norm, hybrid)
    queries = product(x, q, low)
    gate = queries.new_zeros(0)
    if hybrid:  # each head's query and gate lie side by side
        queries, gate = queries.view(len(x), -1, 2 * head_dim).chunk(2, -1)
        gate = gate.reshape(len(x), -1)
    queries = rms(queries.reshape(len(x), -1, head_dim), q_norm, hybrid)
    keys = rms(product(x, k, low).view(len(x), -1, head_dim), k_norm, hybrid)
    return rotated(queries, cos, sin), rotated(keys, cos, sin), product(x, v, low).view(len(x), -1, head_dim), gate


def feed_forward(x, norm, gate, up, down, hybrid: bool, low):
    h = rms(x, norm, hybrid)
    return x + product(F.silu(product(h, gate, low)) * product(h, up, low), down, low)


def attention_result(x, attended, gate, out, norm, mlp_gate, mlp_up, mlp_down, hybrid: bool, low):
    if hybrid:
        attended = attended * torch.sigmoid(gate)
    return feed_forward(x + product(attended, out, low), norm, mlp_gate, mlp_up, mlp_down, hybrid, low)


def linear_inputs(
    x, norm, qkv, z, b, a, conv, a_log, dt_bias, row_position, key_heads: int, key_dim: int, value_dim: int, low
):
    """What gated_delta.chunk_terms gives, and the output gate z [tokens, channels].

    row_position [tokens]: place in the row; the convolution sees nothing before the row's beginning."""
    x = rms(x, norm, True)
    mixed = product(x, qkv, low).float()
    kernel = conv.squeeze(1)  # [channels, 4]
    summed = mixed * kernel[:, -1]
    for back in range(1, kernel.shape[1]):
        shifted = F.pad(mixed[:-back], (0, 0, back, 0))
        summed = summed + torch.where((row_position >= back)[:, None], shifted, 0.0) * kernel[:, -1 - back]
    summed = F.silu(summed)
    keys = key_heads * key_dim
    queries, k, v = summed.split([keys, keys, summed.shape[1] - 2 * keys], -1)
    beta = torch.sigmoid(product(x, b, low).float())
    decay = -a_log.exp() * F.softplus(product(x, a, low).float() + dt_bias)
    chunk = gated_delta.CHUNK
    terms = gated_delta.chunk_terms(
        queries.reshape(-1, chunk, key_heads, key_dim),
        k.reshape(-1, chunk, key_heads, key_dim),
        v.reshape(-1, chunk, v.shape[1] // value_dim, value_dim),
        beta.view(-1, chunk, beta.shape[1]),
        decay.view(-1, chunk, decay.shape[1]),
    )
    return (*terms, product(x, z, low))


def linear_result(
    x, states, queries, read, update, attention, z, head_norm, out, norm, mlp_gate, mlp_up, mlp_down, low
):
    y = gated_delta.chunk_outputs(states, queries, read, update, attention)
    y = rms(y.reshape(len(x), -1, y.shape[-1]), head_norm, False)
    y = y.flatten(1) * F.silu(z.float())
    return feed_forward(x + product(y, out, low), norm, mlp_gate, mlp_up, mlp_down, True, low)


def token_losses(x, norm, embedding, targets, hybrid: bool, low):
    """Cross entropy [tokens] in nats and whether the likeliest token is right."""
    logits = product(rms(x, norm, hybrid), embedding, low).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


class TinyModel:
    """Weights as a dict of float32 parameters under their published names."""

    def __init__(self, config: dict, device: torch.device, compiled: bool = False, seed: int = 0):
        self.config, self.device = config, device
        self.hybrid = config["model_type"] == "qwen3_5_text"
        self.kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
        attention_layers = [at for at, kind in enumerate(self.kinds) if kind == "full_attention"]
        self.middle = attention_layers[len(attention_layers) // 2]
        self.low = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(seed)
        self.weights = {name: value.to(device).requires_grad_() for name, value in self._initial(generator).items()}
        rope = config["rope_parameters"]
        rotary = int(config["head_dim"] * rope.get("partial_rotary_factor", 1.0))
        self.frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, rotary, 2, device=device).float() / rotary))
        self.eager = dict(
            attention_inputs=attention_inputs,
            attention_result=attention_result,
            linear_inputs=linear_inputs,
            linear_result=linear_result,
            token_losses=token_losses,
        )
        self.pieces = (
            {name: torch.compile(f, dynamic=False) for name, f in self.eager.items()} if compiled else self.eager
        )

    def _initial(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        c, weights = self.config, {}
        hidden, dim, inner = c["hidden_size"], c["head_dim"], c["intermediate_size"]
        centre = torch.zeros if self.hybrid else torch.ones

        def matrix(name: str, rows: int, columns: int, scale: float = 1.0):
            weights[name] = torch.randn(rows, columns, generator=generator) * (scale * columns**-0.5)

        weights["model.embed_tokens.weight"] = torch.randn(c["vocab_size"], hidden, generator=generator) * 0.02
        for at, kind in enumerate(self.kinds):
            p = f"model.layers.{at}."
            if kind == "full_attention":
                heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
                matrix(p + "self_attn.q_proj.weight", heads * dim * (2 if self.hybrid else 1), hidden)
                matrix(p + "self_attn.k_proj.weight", kv_heads * dim, hidden)
                matrix(p + "self_attn.v_proj.weight", kv_heads * dim, hidden)
                matrix(p + "self_attn.o_proj.weight", hidden, heads * dim, 0.1)
                weights[p + "self_attn.q_norm.weight"], weights[p + "self_attn.k_norm.weight"] = (
                    centre(dim),
                    centre(dim),
                )
            else:
                value_heads = c["linear_num_value_heads"]
                keys, values = (
                    c["linear_num_key_heads"] * c["linear_key_head_dim"],
                    value_heads * c["linear_value_head_dim"],
                )
                matrix(p + "linear_attn.in_proj_qkv.weight", 2 * keys + values, hidden)
                matrix(p + "linear_attn.in_proj_z.weight", values, hidden)
                matrix(p + "linear_attn.in_proj_b.weight", value_heads, hidden, 0.5)
                matrix(p + "linear_attn.in_proj_a.weight", value_heads, hidden, 0.5)
                matrix(p + "linear_attn.out_proj.weight", hidden, values, 0.1)
                conv = torch.randn(2 * keys + values, 1, c["linear_conv_kernel_dim"], generator=generator) * 0.3
                conv[:, :, -1] += 0.7
                weights[p + "linear_attn.conv1d.weight"] = conv
                # Memories of about 10 to 1000 tokens to begin with: A in 1 .. 16, steps in 0.001 .. 0.1, softplus(dt_bias) = step.
                weights[p + "linear_attn.A_log"] = torch.empty(value_heads).uniform_(1, 16, generator=generator).log()
                step = torch.exp(torch.empty(value_heads).uniform_(math.log(1e-3), math.log(0.1), generator=generator))
                weights[p + "linear_attn.dt_bias"] = step + torch.log(-torch.expm1(-step))
                weights[p + "linear_attn.norm.weight"] = torch.ones(c["linear_value_head_dim"])
            matrix(p + "mlp.gate_proj.weight", inner, hidden)
            matrix(p + "mlp.up_proj.weight", inner, hidden)
            matrix(p + "mlp.down_proj.weight", hidden, inner, 0.1)
            weights[p + "input_layernorm.weight"], weights[p + "post_attention_layernorm.weight"] = (
                centre(hidden),
                centre(hidden),
            )
        weights["model.norm.weight"] = centre(hidden)
        return weights

    def hidden_states(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, eager: bool = False, watch=None
    ) -> torch.Tensor:
        """tokens [rows, length], positions [rows * length] for RoPE -> [rows * length, hidden] before the last norm.

        The hybrid wants the length to be a multiple of 64. watch(x, q, k): called with the input of the middle attention layer and with the
        queries and keys it attends by."""
        rows, length = tokens.shape
        c, f, w, low = self.config, self.eager if eager else self.pieces, self.weights, self.low
        dim = c["head_dim"]
        row_position = torch.arange(length, device=self.device).repeat(rows)
        angles = (row_position if positions is None else positions).float()[:, None] * self.frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = F.embedding(tokens.reshape(-1), w["model.embed_tokens.weight"])
        for at, kind in enumerate(self.kinds):
            of = lambda *names: [w[f"model.layers.{at}.{name}"] for name in names]  # noqa: E731, B023
            mlp = of(
                "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
            )
            if kind == "full_attention":
                names = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
                q, k, v, gate = f["attention_inputs"](
                    x,
                    *of("input_layernorm.weight", *(f"self_attn.{n}.weight" for n in names)),
                    cos,
                    sin,
                    dim,
                    self.hybrid,
                    low,
                )
                q, k, v = (t.view(rows, length, -1, dim).transpose(1, 2) for t in (q, k, v))
                if watch and at == self.middle:
                    watch(x, q, k)
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                x = f["attention_result"](
                    x,
                    attended.transpose(1, 2).reshape(rows * length, -1),
                    gate,
                    *of("self_attn.o_proj.weight"),
                    *mlp,
                    self.hybrid,
                    low,
                )
            else:
                names = (
                    "in_proj_qkv.weight",
                    "in_proj_z.weight",
                    "in_proj_b.weight",
                    "in_proj_a.weight",
                    "conv1d.weight",
                    "A_log",
                    "dt_bias",
                )
                transition, addend, *terms, z = f["linear_inputs"](
                    x,
                    *of("input_layernorm.weight", *(f"linear_attn.{n}" for n in names)),
                    row_position,
                    c["linear_num_key_heads"],
                    c["linear_key_head_dim"],
                    c["linear_value_head_dim"],
                    low,
                )
                states = gated_delta.chunk_states(transition, addend, rows)
                x = f["linear_result"](
                    x, states, *terms, z, *of("linear_attn.norm.weight", "linear_attn.out_proj.weight"), *mlp, low
                )
        return x

    def losses(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None = None,
        eager: bool = False,
        watch=None,
    ):
        """Cross entropies and hits, both [rows * length], of targets [rows * length]."""
        f = self.eager if eager else self.pieces
        return f["token_losses"](
            self.hidden_states(tokens, positions, eager, watch),
            self.weights["model.norm.weight"],
            self.weights["model.embed_tokens.weight"],
            targets,
            self.hybrid,
            self.low,
        )

    def logits(self, tokens: torch.Tensor, at: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Logits [len(at), vocabulary] at places of the flattened tokens [rows, length], without compiled pieces."""
        x = self.hidden_states(tokens, eager=True)[at]
        return product(
            rms(x, self.weights["model.norm.weight"], self.hybrid), self.weights["model.embed_tokens.weight"], self.low
        ).float()

    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())
