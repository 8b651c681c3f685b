"""spotattention.Engine: the C++ engine's answers are those of transformers, alone and together, whatever the method."""

import json
import math
import shutil
import subprocess

import pytest
import torch


@pytest.fixture(scope="module")
def engine(spotattention, tiny_qwen3):
    return spotattention.Engine(
        tiny_qwen3,
        "spot",
        ["spot:k=512,sinks=64,recency=64,floor=0", "dense"],
        cache_tokens=8192,
        max_sequences=4,
        self_check=3,
    )


def words(prose, start, count):
    return " ".join(prose.split()[start : start + count])


@pytest.fixture()
def prompts(engine, prose, seed):
    starts = torch.randint(0, 4000, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [engine.encode(words(prose, start, count)) for start, count in zip(starts, (310, 97, 203), strict=True)]


def test_dense_answers_are_transformers(engine, prompts, tiny_qwen3):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32).eval()
    answers = engine.generate(prompts, method="dense", max_new_tokens=9, stop_ids=[], logprobs=2)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == 9 and answer.finish == "length"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        own = torch.tensor(answer.logprobs)
        torch.testing.assert_close(
            own, logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0], rtol=0, atol=1e-3
        )
        assert ((logprobs.amax(1) - own) < 1e-3).all()


def test_answers_do_not_depend_on_company(engine, prompts):
    options = dict(max_new_tokens=7, temperature=0.9, top_k=40, seed=5)
    alone = [engine.generate([prompt], **options)[0][0].tokens for prompt in prompts]
    together = engine.generate(prompts, **options)
    assert [answer.tokens for (answer,) in together] == alone
    attended = together[0][0].attended
    assert len(attended) == 8 and all(0 < layer.attended < layer.visible for layer in attended)


def test_events_come_step_by_step(engine, prompts):
    want = [engine.generate([p], max_new_tokens=5, stop_ids=[])[0][0] for p in prompts[:2]]
    numbers = [engine.add(p, max_new_tokens=5, stop_ids=[]) for p in prompts[:2]]
    cancelled = engine.add(prompts[2], max_new_tokens=500)
    streamed = list(engine.stream(prompts[0], max_new_tokens=5, stop_ids=[]))  # the others go on beside it
    engine.cancel(cancelled)
    texts = {number: "" for number in numbers}
    ended = {}
    while not engine.idle:
        for event in engine.step():
            if event.request in texts:
                texts[event.request] += event.text
                if event.finish:
                    ended[event.request] = event.finish
    assert [texts[n] for n in numbers] == [answer.text for answer in want]
    assert ended == {n: "length" for n in numbers}
    assert [event.token for event in streamed] == want[0].tokens and streamed[-1].finish == "length"
    statistics = engine.statistics
    assert statistics["running"] == statistics["waiting"] == 0 and statistics["cached_tokens"] > 0


@pytest.fixture()
def answers(engine, prompts):
    """(prompt, its tokens alone)."""
    return [(p, engine.generate([p], max_new_tokens=5, stop_ids=[])[0][0].tokens) for p in prompts]


def test_streams_in_turn(engine, answers):
    streams = [engine.stream(prompt, max_new_tokens=5, stop_ids=[]) for prompt, _ in answers]
    rounds = list(zip(*streams, strict=True))
    for stream, (_, want) in zip(zip(*rounds, strict=True), answers, strict=True):
        assert [event.token for event in stream] == want
    assert engine.idle


@pytest.mark.parametrize("other", ["generate", "step", "stream"])
def test_a_stream_with_others_inside(engine, answers, other):
    """Whoever drives the engine meanwhile, each event reaches the one that waits for it."""
    (prompt, want), (inner, inner_want), (loose, loose_want) = answers
    number = engine.add(loose, max_new_tokens=5, stop_ids=[])
    tokens, met = [], []
    for event in engine.stream(prompt, max_new_tokens=5, stop_ids=[]):
        tokens.append(event.token)
        if other == "generate":
            assert engine.generate([inner], max_new_tokens=5, stop_ids=[])[0][0].tokens == inner_want
        elif other == "stream":
            assert [e.token for e in engine.stream(inner, max_new_tokens=5, stop_ids=[])] == inner_want
        else:
            met += engine.step()
    assert tokens == want
    while not engine.idle:
        met += engine.step()
    assert [(event.request, event.token) for event in met] == [(number, token) for token in loose_want]


def test_a_stream_that_is_cancelled_ends(engine, answers):
    prompt, want = answers[0]
    seen = []
    for event in engine.stream(prompt, max_new_tokens=500, stop_ids=[]):
        seen.append(event.token)
        if len(seen) == 3:
            engine.cancel(event.request)
    assert seen == want[:3] and engine.idle and engine.step() == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_generate_leaves_nothing(engine, answers, failure, monkeypatch):
    advance, steps = engine._advance, []

    def failing():
        steps.append(advance())
        if len(steps) == 3:
            raise failure
        return steps[-1]

    monkeypatch.setattr(engine, "_advance", failing)
    with pytest.raises(failure):
        engine.generate([prompt for prompt, _ in answers], max_new_tokens=100, stop_ids=[])
    monkeypatch.undo()
    assert engine.idle and engine.step() == []
    assert engine.statistics["running"] == engine.statistics["waiting"] == 0
    prompt, want = answers[0]
    assert engine.generate([prompt], max_new_tokens=5, stop_ids=[])[0][0].tokens == want


def test_the_text_is_the_programs(engine, build_folder, tiny_qwen3, prose):
    text = words(prose, 500, 300)
    command = ["generate", "--model", tiny_qwen3, "--selector", "spot", "--prompt", text, "--max-new-tokens", 12]
    command += ["--attention", engine.methods[0], "--temperature", 0]
    done = subprocess.run([str(c) for c in [build_folder / "spot", *command]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((answer,),) = engine.generate([text], max_new_tokens=12)
    assert answer.text + "\n" == done.stdout


def test_the_self_check_reports_captured_mass(spotattention, engine, prompts, tiny_qwen3):
    engine.generate(prompts, max_new_tokens=7)
    masses = engine.captured_mass
    assert sorted(masses) == list(range(8)) and all(0.3 < mass < 1 for mass in masses.values())
    blind = spotattention.Engine(
        tiny_qwen3, "spot", ["spot:k=16,sinks=0,recency=1,floor=0"], cache_tokens=2048, self_check=1, least_captured=0.9
    )
    with pytest.warns(
        RuntimeWarning, match=r"layer \d: the attended tokens held 0\.\d\d of the exact attention in"
    ) as caught:
        blind.generate(prompts[:1], max_new_tokens=12, stop_ids=[])
        blind.generate(prompts[:1], max_new_tokens=12, stop_ids=[])
    assert len(caught) == len({str(w.message).split(":")[0] for w in caught}) >= 4
    with pytest.raises(ValueError, match="self_check must be 0 or more"):
        spotattention.Engine(tiny_qwen3, self_check=-1)


def test_other_weights_are_warned_of(spotattention, tiny_qwen3, prompts, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_qwen3, tmp_path / "tuned")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.5.mlp.up_proj.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(RuntimeWarning, match="distilled on other weights of this architecture"):
        engine = spotattention.Engine(folder, "spot", ["spot:k=512,sinks=64,recency=64,floor=0"], cache_tokens=2048)
    engine.generate(prompts[:1], max_new_tokens=3, stop_ids=[])
    assert all(0.3 < mass < 1 for mass in engine.captured_mass.values())  # of the first decode step
    other = tiny_qwen3.parent / "tiny-qwen3.5" / "selectors" / "spot"
    with pytest.raises(RuntimeError, match="distilled for another backbone: its architecture is"):
        spotattention.Engine(tiny_qwen3, other)


def test_stops_and_completions(engine, prompts):
    ((whole,),) = engine.generate(prompts[:1], max_new_tokens=12, stop_ids=[])
    stop = whole.text[3:6]
    ((short,),) = engine.generate(prompts[:1], max_new_tokens=12, stop_ids=[], stop=stop)
    assert short.finish == "stop" and short.text == whole.text[: whole.text.index(stop)]
    (answers,) = engine.generate(prompts[:1], completions=3, max_new_tokens=4, temperature=1.2, seed=9)
    again = [engine.generate(prompts[:1], max_new_tokens=4, temperature=1.2, seed=9 + i)[0][0] for i in range(3)]
    assert [a.tokens for a in answers] == [a.tokens for a in again]


def test_what_does_not_fit_is_refused(engine, spotattention, tiny_qwen3):
    with pytest.raises(RuntimeError, match="the prompt holds token 99999999"):
        engine.add([1, 99999999])
    with pytest.raises(RuntimeError, match="prompt"):
        engine.add([])
    with pytest.raises(ValueError, match="has no method 'quest:k=10%'; it was made with spot:k=512"):
        engine.add([1], method="quest:k=10%")
    with pytest.raises(RuntimeError, match="temperature"):
        engine.add([1], temperature=-1)
    with pytest.raises(RuntimeError):
        engine.generate([[1], list(range(100)) * 400])
    assert engine.idle
    with pytest.raises(RuntimeError, match="'spot' needs a selector; name one with the argument selector, or distil"):
        spotattention.Engine(tiny_qwen3, None, ["spot"])
    with pytest.raises(RuntimeError, match="no such folder"):
        spotattention.Engine("/nowhere")
    with pytest.raises(RuntimeError, match="dtype 'int8' is unknown"):
        spotattention.Engine(tiny_qwen3, dtype="int8")
    with pytest.raises(RuntimeError, match="kv_cache_dtype 'int8' is unknown; give auto or fp8"):
        spotattention.Engine(tiny_qwen3, kv_cache_dtype="int8")
    with pytest.raises(TypeError, match="kv_cache_dtype is None; it must be the text auto or fp8"):
        spotattention.Engine(tiny_qwen3, kv_cache_dtype=None)
    with pytest.raises(RuntimeError, match="attention 'quest' reads keys.*; leave out the argument kv_cache_dtype fp8"):
        spotattention.Engine(tiny_qwen3, None, ["dense", "quest"], kv_cache_dtype="fp8")


def test_an_fp8_cache_writes_nearly_the_same(spotattention, engine, prompts, tiny_qwen3):
    """Nearly the log-probabilities that numbers give, and the same text alone and among others."""
    options = dict(method="dense", max_new_tokens=9, stop_ids=[], logprobs=2)
    codes = spotattention.Engine(tiny_qwen3, None, ["dense"], cache_tokens=4096, max_sequences=3, kv_cache_dtype="fp8")
    together = codes.generate(prompts, **options)
    apart = []
    for prompt, (answer,), (exact,) in zip(prompts, together, engine.generate(prompts, **options), strict=True):
        events = [event for event in codes.stream(prompt, **options) if event.token is not None]
        for event, token in zip(events, answer.tokens, strict=True):
            if event.token != token:  # after a near tie, which a code's other neighbour may have turned
                assert event.top[0][1] - event.top[1][1] < 0.05
                break
        apart.append(abs(answer.logprobs[0] - exact.logprobs[0]))
        assert answer.logprobs != exact.logprobs
    assert sum(apart) / len(apart) < 0.5  # a wrong scale gives several nats


WRONG = [
    (dict(temperature=math.nan), ValueError, "temperature is nan; it must be a finite number"),
    (dict(temperature=math.inf), ValueError, "temperature is inf; it must be a finite number"),
    (dict(temperature="1"), TypeError, "temperature is '1'; it must be a number"),
    (
        dict(top_p=10**400),
        ValueError,
        "top_p is 1000000000000000000000000000000000000000...; it must be a finite number",
    ),
    (dict(top_p=None), TypeError, "top_p is None; it must be a number"),
    (dict(min_p=True), TypeError, "min_p is True; it must be a number"),
    (dict(repetition_penalty=[1]), TypeError, "repetition_penalty is of type list; it must be a number"),
    (dict(presence_penalty=-math.inf), ValueError, "presence_penalty is -inf; it must be a finite number"),
    (dict(frequency_penalty=1j), TypeError, "frequency_penalty is of type complex; it must be a number"),
    (dict(max_new_tokens="3"), TypeError, "max_new_tokens is '3'; it must be a whole number"),
    (dict(max_new_tokens=1.5), TypeError, "max_new_tokens is 1.5; it must be a whole number"),
    (dict(max_new_tokens=True), TypeError, "max_new_tokens is True; it must be a whole number"),
    (dict(max_new_tokens=2**63), ValueError, "max_new_tokens is 9223372036854775808; it must be a whole number from"),
    (dict(max_new_tokens=10**5000), ValueError, "max_new_tokens is a number of thousands of digits; it must be"),
    (dict(completions=None), TypeError, "completions is None; it must be a whole number"),
    (dict(top_k=2.0), TypeError, "top_k is 2.0; it must be a whole number"),
    (dict(top_k=torch.tensor([1, 2])), TypeError, "top_k is of type Tensor; it must be a whole number"),
    (dict(logprobs=torch.tensor(True)), TypeError, "logprobs is of type Tensor; it must be a whole number"),
    (dict(seed=2**64), ValueError, "seed is 18446744073709551616; it must be a whole number from"),
    (dict(logit_bias=[(1, 2)]), TypeError, "logit_bias is of type list; it must be a dict of token ids and numbers"),
    (dict(logit_bias={1.5: 1}), TypeError, "a token of logit_bias is 1.5; it must be a whole number"),
    (dict(logit_bias={5: math.nan}), ValueError, "logit_bias[5] is nan; it must be a finite number"),
    (dict(stop=None), TypeError, "stop is None; it must be a list of texts"),
    (dict(stop=["a", 5]), TypeError, "stop[1] is 5; it must be a text"),
    (dict(stop="\udfff"), ValueError, "stop[0] holds a lone surrogate at character 0; it must be text that UTF-8"),
    (dict(stop_ids="12"), TypeError, "stop_ids is '12'; it must be a list of token ids"),
    (dict(stop_ids=[1.5]), TypeError, "stop_ids[0] is 1.5; it must be a whole number"),
    (dict(prompt="a\ud800"), ValueError, "prompt holds a lone surrogate at character 1; it must be text that UTF-8"),
    (dict(prompt=None), TypeError, "prompt is None; it must be a text or a list of token ids"),
    (dict(prompt=b"abc"), TypeError, "prompt is of type bytes; it must be a text or a list of token ids"),
    (dict(prompt=[1, 2**70]), ValueError, "prompt[1] is 1180591620717411303424; it must be a whole number from 0 to"),
    (dict(prompt=[2**31]), ValueError, "prompt[0] is 2147483648; it must be a whole number from 0 to 2147483647"),
    (dict(prompt=[-1]), ValueError, "prompt[0] is -1; it must be a whole number from 0 to 2147483647"),
    (dict(prompt=[1.5]), TypeError, "prompt[0] is 1.5; it must be a whole number"),
    (dict(prompt=[True]), TypeError, "prompt[0] is True; it must be a whole number"),
    (dict(prompt=torch.ones(2)), TypeError, "prompt is a tensor [2] of float32; it must be one row of whole numbers"),
    (dict(prompt=torch.ones(1, 2).long()), TypeError, "prompt is a tensor [1, 2] of int64; it must be one row of"),
    (dict(prompt=torch.tensor([True])), TypeError, "prompt[0] is True; it must be a whole number"),
]


@pytest.mark.parametrize(("request_", "kind", "sentence"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_requests_of_other_types_are_refused(engine, request_, kind, sentence):
    with pytest.raises(kind) as caught:
        engine.add(**({"prompt": [1]} | request_))
    assert str(caught.value).startswith(sentence) and engine.idle


def test_numbers_of_numpy_and_torch_are_taken(engine):
    import numpy as np

    ((plain,),) = engine.generate([[5, 6, 7]], max_new_tokens=3, temperature=0.5, stop_ids=[], seed=9)
    options = dict(max_new_tokens=np.int64(3), temperature=np.float32(0.5), stop_ids=[], seed=torch.tensor(9))
    for prompt in (np.array([5, 6, 7]), torch.tensor([5, 6, 7]), (5, 6, 7)):
        assert engine.generate([prompt], **options)[0][0].tokens == plain.tokens


def test_a_text_is_no_list(engine):
    with pytest.raises(TypeError, match="prompts is 'hello'; it must be a list of prompts"):
        engine.generate("hello")
    with pytest.raises(TypeError, match="request is None; it must be a whole number"):
        engine.cancel(None)


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        (dict(model=""), ValueError, "model is empty; it must name a folder"),
        (dict(model=None), TypeError, "model is None; it must be a path"),
        (dict(model="a\ud800"), ValueError, "model holds a lone surrogate at character 1"),
        (dict(selector=""), ValueError, "selector is empty; it must name a folder"),
        (dict(selector=5), TypeError, "selector is 5; it must be a path"),
        (dict(methods="spott"), TypeError, "methods is 'spott'; it must be a list of texts"),
        (dict(methods=["spot", 5]), TypeError, "methods[1] is 5; it must be a text"),
        (dict(methods=None), TypeError, "methods is None; it must be a list of texts"),
        (dict(dtype=torch.float32), TypeError, "dtype is torch.float32; it must be the text auto, float32, bfloat16"),
        (dict(device=torch.device("cpu")), TypeError, "device is device(type='cpu'); it must be the text auto, cpu"),
        (dict(cache_tokens=1.5), TypeError, "cache_tokens is 1.5; it must be a whole number"),
        (dict(cache_tokens=2**62), ValueError, "cache_tokens is 4611686018427387904; it must be a whole number from 1"),
        (dict(max_sequences=True), TypeError, "max_sequences is True; it must be a whole number"),
        (dict(max_step_tokens="9"), TypeError, "max_step_tokens is '9'; it must be a whole number"),
        (dict(prefix_cache=1), TypeError, "prefix_cache is 1; it must be True or False"),
        (dict(graphs="no"), TypeError, "graphs is 'no'; it must be True or False"),
        (dict(self_check=None), TypeError, "self_check is None; it must be a whole number"),
        (dict(least_captured=math.nan), ValueError, "least_captured is nan; it must be a finite number"),
    ],
)
def test_engines_of_other_types_are_refused(spotattention, tiny_qwen3, options, kind, sentence):
    with pytest.raises(kind) as caught:
        spotattention.Engine(**({"model": tiny_qwen3} | options))
    assert str(caught.value).startswith(sentence)


def test_numbers_cross_whole(engine):
    """What the engine gets is what add() was given: large seeds and biases too."""
    tokens = engine.generate([[5, 6, 7]], max_new_tokens=3, logit_bias={11: 1e4}, stop_ids=[], seed=2**63 + 11)[0][
        0
    ].tokens
    assert tokens == [11, 11, 11]
    assert json.dumps(2**63 + 11) == "9223372036854775819"
