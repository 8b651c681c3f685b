"""tools/pretrain_tiny.py: its models against transformers, its rows against an independent solver, one whole run."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from pretrain import binding, corpus, evaluate, gated_delta, models, pieces, rows, train, wordings  # noqa: E402

transformers = pytest.importorskip("transformers")
TOKENIZER = ROOT / "models" / "tiny-qwen3" / "tokenizer.json"


def relative_error(ours, reference):
    return ((ours - reference).norm() / reference.norm().clamp(min=1e-12)).item()


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)


# --- models


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_logits_and_gradients_are_those_of_transformers(name, seed):
    config = models.published_config(name, hidden_size=48, num_layers=4, intermediate_size=64)
    ours = models.TinyModel(config, torch.device("cpu"), seed=seed)
    with torch.no_grad():
        for key, weight in ours.weights.items():
            if weight.ndim == 1 and not key.endswith(("A_log", "dt_bias")):
                weight.add_(torch.randn_like(weight) * 0.3)
            if key.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                weight.mul_(10)
            if "embed" in key:
                weight.mul_(20)
    fields = {key: value for key, value in config.items() if key not in ("dtype", "pad_token_id")}
    kind = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    theirs = transformers.AutoModelForCausalLM.from_config(kind).float()
    missing = theirs.load_state_dict(
        {key: weight.detach().clone() for key, weight in ours.weights.items()}, strict=False
    )
    assert missing.unexpected_keys == [] and missing.missing_keys in ([], ["lm_head.weight"])
    theirs.tie_weights()
    tokens, targets = torch.randint(0, models.VOCABULARY, (2, 320)), torch.randint(0, models.VOCABULARY, (640,))
    reference = theirs(tokens).logits.flatten(0, 1)
    assert relative_error(ours.logits(tokens), reference) < 1e-4
    torch.nn.functional.cross_entropy(reference, targets).backward()
    ours.losses(tokens, targets)[0].mean().backward()
    gradients = {key: weight.grad for key, weight in theirs.named_parameters()}
    for key, weight in ours.weights.items():
        assert relative_error(weight.grad, gradients[key]) < 1e-3, key


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("case", ["random", "long memory", "forgetful", "equal keys"])
def test_chunked_rule(case, chunks):
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    rows_, length, key_heads, heads, key_dim, value_dim = 2, chunks * 64, 1, 2, 16, 24
    q, k = torch.randn(2, rows_, length, key_heads, key_dim)
    v, beta = torch.randn(rows_, length, heads, value_dim), torch.rand(rows_, length, heads)
    decay = (
        -torch.rand(rows_, length, heads)
        * {"random": 1.0, "long memory": 1e-3, "forgetful": 200.0, "equal keys": 1e-4}[case]
    )
    if case == "equal keys":
        k = k[:, :1].expand(-1, length, -1, -1)
        beta = beta * 0.01 + 0.99
    parts = [x.clone().requires_grad_() for x in (q, k, v, beta, decay)]
    flat = [x.reshape(-1, 64, *x.shape[2:]) for x in parts]
    transition, addend, *terms = gated_delta.chunk_terms(*flat)
    states = gated_delta.chunk_states(transition, addend, rows_)
    out = gated_delta.chunk_outputs(states, *terms).reshape(rows_, length, heads, value_dim)
    theirs = [x.clone().requires_grad_() for x in (q, k, v, beta, decay)]
    grouped = [x.repeat_interleave(heads // key_heads, 2) for x in theirs[:2]]
    expected, _ = torch_recurrent_gated_delta_rule(
        *grouped, theirs[2], g=theirs[4], beta=theirs[3], use_qk_l2norm_in_kernel=True
    )
    assert relative_error(out, expected) < 1e-4
    if chunks > 3:
        return  # autograd through one token after another is slow
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, other in zip(parts, theirs):
        # Where keys repeat, the decays' gradients are small differences of large terms: hence the absolute part.
        assert (ours.grad - other.grad).norm() <= 1e-3 * other.grad.norm() + 5e-4


def test_a_row_sees_nothing_of_its_neighbours():
    model = models.TinyModel(models.published_config("qwen3_5", 32, 4, 48), torch.device("cpu"))
    tokens = torch.randint(0, models.VOCABULARY, (3, 128))
    alone = torch.cat([model.logits(row[None]) for row in tokens])
    assert relative_error(model.logits(tokens), alone) < 1e-5


# --- rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A text of invented sentences, prepared."""
    folder = tmp_path_factory.mktemp("pretrain")
    rng = random.Random(5)
    words = sorted({pieces.pseudo_word(rng) for _ in range(600)})
    documents = []
    for _ in range(60):
        sentences = [
            " ".join(rng.choice(words) for _ in range(rng.randint(4, 14))).capitalize() + "." for _ in range(300)
        ]
        documents.append("\n".join(" ".join(sentences[at : at + 3]) for at in range(0, 300, 3)))
    (folder / "text").write_text("\x00".join(documents))
    corpus.prepare(folder / "text", TOKENIZER, folder)
    return folder


@pytest.fixture()
def made(work, seed):
    return rows.Rows(pieces.Pieces(work, TOKENIZER, seed, pool=300))


def text_of(made, ids):
    return made.pieces.tokenizer.decode(list(ids), skip_special_tokens=False)


def test_needle_answers_follow_from_the_statements(made, monkeypatch):
    monkeypatch.setattr(rows.Rows, "draw_wording", lambda self: wordings.SUITE[0])
    questions = 0
    for _ in range(60):
        try:
            text = text_of(made, made.needles(1025).ids)
        except rows.TooLong:
            continue
        stated = {}
        for key, value in re.findall(r"One of the special magic \w+s for (\S+) is: ([^\s.]+)\.", text):
            stated.setdefault(key, []).append(value)
        for keys, answer in re.findall(
            r"The special magic \w+ for ([^?\n]+) mentioned in the provided text (?:is|are) (.+)\.\n",
            text.replace("s for", " for"),
        ):
            keys, answer = (re.split(r", and | and |, ", part) for part in (keys, answer))
            assert [value for key in keys for value in stated[key]] == answer
            questions += 1
    assert questions > 60


def test_chains_lead_to_the_answers(made, monkeypatch):
    monkeypatch.setattr(wordings, "draw_tracking", lambda rng: (wordings.TRACK_INTRO, *wordings.TRACK_SUITE))
    hops = set()
    for _ in range(60):
        try:
            text = text_of(made, made.track(1025).ids)
        except rows.TooLong:
            continue
        root = {}
        for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
            root[name] = root.get(source, source)
        for count, value, names in re.findall(
            r"text above, (\d+) variables are assigned the value (\d+), they are: ([A-Z ]+)\n", text
        ):
            assert names.split() == [name for name in root if root[name] == value] and len(names.split()) == int(count)
            hops.add(len(names.split()) - 1)
    assert hops >= {1, 2, 3, 4}


def test_rows_are_tokenised_as_their_text_is(made, monkeypatch):
    """Where nothing was cut out of a text, the tokenizer gives the same tokens for the whole."""
    for _ in range(40):
        wording = made.draw_wording()
        statement = made.statement(wording, "number", made.pieces.item("pair"), made.pieces.item("uuid"), "", "\n")
        ask = made.question(
            wording, "number", [made.pieces.item("code")], [made.pieces.item("number"), made.pieces.item("word")]
        )
        for row in (statement, ask, made.track_question(*wordings.TRACK_SUITE, *made.chain(3, set())[:2])):
            assert made.pieces.tokenizer.encode(text_of(made, row.ids)).ids == row.ids, text_of(made, row.ids)


def test_numbers_strewn_over_a_haystack_leave_its_text_as_it_was(made):
    source = made.pieces
    encode, decode = source.tokenizer.encode, lambda ids: source.tokenizer.decode(ids.tolist())
    # Streams are tokenised in parts and cut anywhere, which leaves other tokens than the text has on its own; so does a cut last word.
    ids = np.array(encode(decode(source.slice("essay", 6000))).ids)
    strewn = source.strewn(ids)
    assert len(strewn) == len(ids)
    strewn = strewn[: np.flatnonzero(source.starts_word[strewn])[-1]]
    text = decode(strewn)
    assert encode(text).ids == strewn.tolist()
    assert len(re.findall(r"\b\d{1,8}\b", text)) >= 5
    assert re.sub(r" \d+", "", decode(ids)).startswith(re.sub(r" \d+", "", text).rstrip("0123456789 "))


def test_what_is_held_out_is_not_in_the_rows(made, work):
    held_out = pieces.Pieces(work, TOKENIZER, 1, held_out=True, pool=300)
    assert not set(held_out.words) & set(made.pieces.words)
    assert not {item for pool in ("code", "name") for item in held_out.pools[pool]} & {
        item for pool in ("code", "name") for item in made.pieces.pools[pool]
    }
    for wording in evaluate.HELD_OUT + wordings.FRESH_HELD_OUT + wordings.LATER_HELD_OUT:
        assert any(mark in wording.needle for mark in wordings.HELD_OUT_MARKS)
        assert any(mark in wording.question[0] + wording.prefix[0] for mark in wordings.HELD_OUT_MARKS)
    kinds = set()
    for length in [256] * 60 + [1024] * 120 + [4096] * 10:
        ids, labels, _ = made.row(length)
        assert len(ids) == len(labels) == length + 1 and labels.max() < pieces.NUM_LABELS
        kinds |= set(labels.tolist())
        text = text_of(made, ids)
        assert not [mark for mark in wordings.HELD_OUT_MARKS if mark in text]
    assert len(kinds) > 20


def test_bindings_tell_of_values_before_their_keys_and_where_they_are_asked_for(made):
    decode, bound, asked = made.pieces.tokenizer.decode, 0, 0
    for length in [512] * 40 + [2048] * 30:
        ids, labels, bindings = made.row(length)
        for key, query, *value in bindings.tolist():
            assert 0 < key < length and len(value) == binding.FIRST_TOKENS and value[0] >= 0
            value = [token for token in value if token >= 0]
            before = decode(ids[: key + 1].tolist())
            assert decode(value).strip() in before[-1000:]
            bound += 1
            if query >= 0:
                assert (
                    query > key and labels[query + 1] >= 2 and labels[query + 1] % 2 == 1 and ids[query + 1] == value[0]
                )
                assert before.split()[-1] in decode(ids[key + 1 : query + 1].tolist())
                asked += 1
    assert bound > 10 and asked > 3


def test_binding_losses_are_their_definitions(seed):
    rows, heads, kv_heads, length, dim, hidden = 3, 4, 2, 40, 8, 16
    found = [
        np.array([[9, 30, 5, 6, 7], [12, -1, 8, -1, -1]]),
        np.zeros((0, binding.COLUMNS), int),
        np.array([[20, 39, 1, 2, -1]]),
    ]
    told, seen = map(torch.from_numpy, binding.choose(random.Random(seed), found))
    assert sorted(told.tolist()) == [[0, 9, 5, 6, 7], [0, 12, 8, -1, -1], [2, 20, 1, 2, -1]]
    assert seen.tolist() == [[0, 0, 9, 30], [2, 0, 20, 39]]
    ours = binding.Binding(hidden, torch.device("cpu"))
    with torch.no_grad():
        ours.matrices.add_(torch.randn_like(ours.matrices))
    x, embedding = torch.randn(rows * length, hidden), torch.randn(50, hidden)
    losses = []
    for row, place, *value in told.tolist():
        state = x[row * length + place].double()
        state = state / (state.square().mean() + torch.finfo(torch.float32).eps).sqrt()
        losses += [
            -(embedding.double() @ (state @ matrix.double())).log_softmax(0)[token]
            for matrix, token in zip(ours.matrices, value)
            if token >= 0
        ]
    assert relative_error(ours.told(told, x, length, embedding).double(), sum(losses) / len(losses)) < 1e-5
    q, k = torch.randn(rows, heads, length, dim) * 3, torch.randn(rows, kv_heads, length, dim)
    losses = []
    for row, _, key, query in seen.tolist():
        missed = 1.0
        for head in range(heads):
            scores = k[row, head // (heads // kv_heads), : query + 1].double() @ q[row, head, query].double() / dim**0.5
            missed *= 1 - scores.softmax(0)[key]
        losses.append(-torch.log(1 - missed))
    assert relative_error(ours.seen(seen, q, k).double(), sum(losses) / len(losses)) < 1e-4
    none = [torch.from_numpy(array) for array in binding.choose(random.Random(seed), found[1:2] * rows)]
    assert ours.told(none[0], x, length, embedding).item() == 0 and ours.seen(none[1], q, k).item() == 0


@pytest.mark.parametrize("name, middle", [("qwen3", 4), ("qwen3_5", 7)])
def test_the_middle_attention_layer_is_watched(name, middle, seed):
    model, calls = (
        models.TinyModel(
            models.published_config(name, hidden_size=48, intermediate_size=64), torch.device("cpu"), seed=seed
        ),
        [],
    )
    layers = dict(model.eager)
    inputs = []  # of every layer, in turn
    for part in ("attention_inputs", "linear_inputs"):
        model.eager[part] = lambda x, *rest, part=part: (inputs.append(x), layers[part](x, *rest))[1]
    tokens = torch.randint(0, models.VOCABULARY, (2, 64))
    model.hidden_states(tokens, eager=True, watch=lambda *watched: calls.append(watched))
    ((x, q, k),) = calls
    assert torch.equal(x, inputs[middle]) and len(inputs) == len(model.kinds)
    names = ("input_layernorm", *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")))
    weights = [model.weights[f"model.layers.{middle}.{part}.weight"] for part in names]
    angles = torch.arange(64).repeat(2)[:, None] * model.frequencies
    wanted = layers["attention_inputs"](
        x, *weights, angles.cos()[:, None], angles.sin()[:, None], 64, model.hybrid, model.low
    )
    for ours, theirs in zip((q, k), wanted):
        assert relative_error(ours.transpose(1, 2).reshape(theirs.shape), theirs) < 1e-6


@pytest.mark.parametrize(
    "task",
    [
        "multikey_held_out",
        "multikey_fresh",
        "multikey_later",
        "multikey_value_first",
        "multikey_key_first",
        "multikey_known",
        "uuid_held_out",
        "multivalue_held_out",
        "multiquery_held_out",
        "vt",
    ],
)
def test_prompts_end_with_their_answer(work, task, seed):
    prompts = evaluate.Prompts(pieces.Pieces(work, TOKENIZER, seed, held_out=True, pool=300))
    for index in range(12):
        row = prompts.make(task, 1024, index)
        first = next(at for at, label in enumerate(row.labels) if label >= 2)
        assert len(row) == 1024 and all(label >= 2 for label in row.labels[first:])
        before, answer = text_of(prompts, row.ids[:first]), text_of(prompts, row.ids[first:])
        for value in re.split(r", and | and |, | ", answer.strip()):
            assert value in before
        if "_first" in task:
            key = next(key for key in re.findall(r"[a-z]+-[a-z]+", before) if before.count(key) > 1)
            assert (before.index(answer.strip()) < before.index(key)) == (task == "multikey_value_first")


# --- the whole


@pytest.mark.timeout(300)
def test_a_run_writes_a_checkpoint_that_transformers_loads(work, tmp_path):
    command = [
        sys.executable,
        ROOT / "tools" / "pretrain_tiny.py",
        "--data",
        work / "text",
        "--work",
        work,
        "--out",
        tmp_path,
        "--models",
        "qwen3_5",
        "--seconds",
        "4",
        "--hidden",
        "32",
        "--layers",
        "4",
        "--mlp",
        "48",
        "--phases",
        "256:1",
        "--tokens",
        "512",
        "--workers",
        "0",
        "--eval-lengths",
        "512",
        "--eval-seconds",
        "3",
        "--log-every",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny-qwen3_5"
    log = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert log and all(line["answer"] > 0 for line in log)
    assert all(any(line.get(loss, 0) > 0 for line in log) for loss in ("told", "seen"))
    results = json.loads((folder / "results.json").read_text())
    assert results["text"]["nats_per_token"] > 0
    cell, table = results["multikey_held_out@512"], (folder / "results.md").read_text()
    assert f"| multikey_held_out | {cell['exact']:.2f}" in table
    for wording, exact in zip(evaluate.HELD_OUT, cell["by_wording"]):
        assert f"| {wording.needle} | {exact:.2f} |" in table
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3_5ForCausalLM" and len(tokenizer) == models.VOCABULARY
    assert model(**tokenizer("VAR ABCDE = 12345", return_tensors="pt")).logits.isfinite().all()


def average_gradients_in_a_group(rank, size, file, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size, init_method=f"file://{file}")
    model = models.TinyModel(models.published_config("qwen3", 32, 2, 48), torch.device("cpu"))
    tokens = torch.arange(size * 4 * 65).reshape(size, 4, 65)[rank] * 7919 % models.VOCABULARY
    model.losses(tokens[:, :-1], tokens[:, 1:].reshape(-1))[0].mean().backward()
    group = train.Group()
    group.average_gradients(list(model.weights.values()))
    told = group.from_first(10.0 + rank, 0.5)
    torch.save(({name: weight.grad for name, weight in model.weights.items()}, told), f"{out}-{rank}")
    torch.distributed.destroy_process_group()


def test_processes_together_have_the_gradients_of_one_with_all_rows(tmp_path):
    size = 3
    torch.multiprocessing.spawn(average_gradients_in_a_group, (size, tmp_path / "group", tmp_path / "out"), nprocs=size)
    model = models.TinyModel(models.published_config("qwen3", 32, 2, 48), torch.device("cpu"))
    tokens = torch.arange(size * 4 * 65).reshape(size * 4, 65) * 7919 % models.VOCABULARY
    model.losses(tokens[:, :-1], tokens[:, 1:].reshape(-1))[0].mean().backward()
    for rank in range(size):
        gradients, told = torch.load(tmp_path / f"out-{rank}")
        assert told == [10.0, 0.5]
        for name, weight in model.weights.items():
            assert relative_error(gradients[name], weight.grad) < 1e-5, name


@pytest.mark.timeout(300)
def test_two_processes_train_one_model(work, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        ROOT / "tools" / "pretrain_tiny.py",
        "--data",
        work / "text",
        "--work",
        work,
        "--out",
        tmp_path,
        "--models",
        "qwen3",
        "--seconds",
        "3",
        "--hidden",
        "32",
        "--layers",
        "2",
        "--mlp",
        "48",
        "--phases",
        "256:1",
        "--tokens",
        "512",
        "--workers",
        "1",
        "--eval-lengths",
        "512",
        "--eval-seconds",
        "2",
        "--log-every",
        "1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "tiny-qwen3" / "train.jsonl").read_text().splitlines()]
    steps, millions = re.search(r"(\d+) steps, ([\d.]+)M tokens", done.stdout).groups()
    assert log and float(millions) == round(int(steps) * 1024 / 1e6, 1)
    assert "2 processes" in done.stdout and (tmp_path / "tiny-qwen3" / "results.json").is_file()
