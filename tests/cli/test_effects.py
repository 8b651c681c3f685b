"""An option that cannot matter is an error; the same option where it matters is none."""

import itertools
import os
import random
import tempfile

import pytest
from program import Watch

PROMPTS = os.path.join(tempfile.gettempdir(), "never-written.jsonl")
# By command: words of the run, and which options have no effect in it. A value stands behind the option where it takes one.
METHOD = [["--top-p", "0.5"], ["--threshold", "0.01"], ["--mass", "0.8"], ["--top-k-tokens", "64"], ["--top-k-share", "0.2"], ["--sinks", "16"],
          ["--recency", "32"], ["--floor", "64"], ["--cap", "9999"], ["--selection-temperature", "2"], ["--cache-format", "int8"],
          ["--dense-layers", "1"]]  # fmt: skip


def flags(*names):
    return [words for words in METHOD if words[0] in names]


SILENT = {
    "generate": [
        ([], METHOD + [["--system", "x"], ["--thinking"], ["--by-layer"], ["--prefill", "auto"], ["--seed", "5"],
                       ["--sampling-top-p", "0.5"], ["--sampling-top-k", "5"], ["--sampling-min-p", "0.1"], ["--chat-template", "/nope"]]),
        (["--attention", "dense", "--selector", "spot"], [[]]),
        (["--attention", "streaming"], [words for words in METHOD if words[0] not in ("--top-k-tokens", "--sinks", "--dense-layers")]),
        (["--attention", "quest", "--top-k-tokens", "512"], flags("--cap", "--selection-temperature", "--cache-format")),
        (["--attention", "oracle"], flags("--cache-format", "--mass")),
        (["--attention", "twilight"], flags("--threshold", "--mass", "--cap", "--selection-temperature", "--cache-format")),
        (["--selector", "spot", "--attention", "spot:k=512"], flags("--top-p", "--top-k-share", "--threshold", "--mass", "--cap")),
    ],
    "distill": [
        (["--loss", "dense"], [["--k-train", "64"], ["--rest-bucket"]]),
        (["--held-out-every", "0"], [["--held-out-sequences", "2"], ["--held-out-interval", "5"], ["--calibration-length", "500"]]),
        (["--held-out-sequences", "0"], [["--held-out-interval", "5"], ["--calibration-length", "500"]]),
        (["--no-calibrate"], [["--calibration-length", "500"]]),
        (["--constant-share", "1"], [["--final-lr", "0.00001"]]),
    ],
    "eval text": [(["--methods", "dense"], [["--selector", "spot"], ["--measured-queries", "3"], ["--prefill", "sparse"], *METHOD])],
    "eval needle": [(["--methods", "dense"], [["--selector", "spot"], *METHOD]),
                    (["--methods", "streaming:k=512,quest:k=512"], flags("--top-p", "--cache-format", "--cap"))],
    "eval ruler": [(["--methods", "dense"], [["--selector", "spot"], ["--mass-every", "3"], *METHOD]),
                   ([], [["--wording", "1"]]),
                   (["--write-prompts", PROMPTS], [["--selector", "spot"], ["--batch", "2"], ["--whole-answers"], ["--out", "x"],
                                                       ["--stop-at-newline"], ["--prefill-chunk", "64"], ["--methods", "quest"],
                                                       ["--device", "cpu"], ["--dtype", "float32"], ["--threads", "1"], ["--prefill", "dense"],
                                                       ["--kv-cache-dtype", "fp8"], *METHOD])],
    "bench": [(["--attention", "dense"], [["--preset", "spot"], *METHOD])],
    "inspect": [(["--selector", "spot"], [["--preset", "paper"]])],
}  # fmt: skip
# Options of a command that stand before a subcommand, which does not read them.
BEFORE = [
    (["bench", "--context", "64"], "decode"),
    (["bench", "--prefill", "dense"], "decode"),
    (["bench", "--steps", "1"], "distill"),
]


def small_run(basics, model, name, without):
    words = list(map(str, basics(model)[name]))
    if "--held-out-every" in without:  # the small run's own option would be the first without effect
        without = without | {"--held-out-sequences"}
    for option in without:
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return words


def cases():
    for name, contexts in SILENT.items():
        for context, options in contexts:
            for option in options:
                yield name, context, option


@pytest.mark.parametrize("part", range(4))
def test_options_without_effect_are_errors(spot, unreadable, basics, part, seed):
    """A third of all cases each run; the weights are not read for them."""
    mine = list(itertools.islice(cases(), part, None, 4))
    for name, context, option in random.Random(seed).sample(mine, len(mine) // 3):
        given = {word for word in [*context, *option] if word.startswith("--")}
        without = given | ({"--out"} if "--write-prompts" in given else set())
        words = small_run(basics, unreadable, name, without)
        with Watch(unreadable / "model.safetensors") as watch:
            done = spot(*name.split(), *words, *context, *option)
            assert done.returncode in (1, 2) and not watch.opened(), (name, context, option, done)
        named = option[0] if option else "--selector"
        assert named in done.stderr or named.split("-")[-1] in done.stderr, (name, context, option, done.stderr)


def test_options_before_a_subcommand(spot, place):
    for words, sub in BEFORE:
        done = spot(*words, sub, *(["--model", place / "model"] if sub == "distill" else ["--device", "cpu"]))
        assert done.returncode == 2 and words[1] in done.stderr, (words, done)


MATTERS = {
    "generate": [["--attention", "quest", "--top-p", "0.5", "--cap", "900"], ["--attention", "streaming", "--top-k-tokens", "300"],
                 ["--attention", "twilight", "--top-p", "0.8", "--top-k-share", "0.5", "--by-layer"], ["--ignore-eos", "--eager"],
                 ["--temperature", "0.7", "--seed", "5", "--sampling-top-p", "0.5"], ["--attention", "oracle:t=0.01,temperature=2"],
                 ["--attention", "quest:k=512,tile=64", "--prefill", "sparse"], ["--attention", "streaming", "--prefill", "auto"]],
    "eval text": [["--methods", "streaming:k=512,oracle", "--top-p", "0.7"], ["--methods", "oracle:k=64,tile=32", "--prefill", "sparse"]],
    "eval needle": [["--methods", "quest:k=512", "--prefill", "sparse"], ["--methods", "oracle:k=64,per=kv_group,oracle:k=64"]],
    "bench": [["--attention", "dense,spot", "--top-k-tokens", "64", "--preset", "paper"], ["--eager", "--random"],
              ["--attention", "dense", "--prefill", "dense"], ["--attention", "dense,spot", "--prefill", "sparse"]],
}  # fmt: skip


@pytest.mark.parametrize("name", MATTERS)
def test_options_that_matter_are_taken(spot, place, basics, name):
    for words in MATTERS[name]:
        done = spot(*name.split(), *basics(place / "model")[name], "--threads", 1, *words)
        assert done.returncode == 0, (name, words, done)
