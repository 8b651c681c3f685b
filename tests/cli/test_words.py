"""Command lines that are wrong: the status, what is named, and that no weights were read for it."""

import random
import string

import pytest
from program import Watch

SAMPLED = 16  # runs of each kind, drawn anew each time: a run costs a third of a second


def misspelt(word: str, known: set[str], dice: random.Random) -> str:
    """A word with one letter wrong that is not another known one."""
    while True:
        at = dice.randrange(2 if word.startswith("--") else 0, len(word))
        letter = dice.choice(string.ascii_lowercase)
        wrong = dice.choice(
            [word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :]]
        )
        if len(wrong.strip("-")) > 1 and wrong not in known:
            return wrong


def test_every_command_is_found_and_helps(spot, commands, basics):
    assert set(basics("M")) <= set(commands), "a command is gone, or its help is laid out otherwise"
    for name, options in commands.items():
        assert spot(*name.split(), "--help").returncode == 0
        assert options, name


def test_misspelt_words_are_named(spot, commands, place, seed):
    dice = random.Random(seed)
    words = {word for name in commands for word in name.split()}
    for name in dice.sample(sorted(commands), 4):
        right = name.split()[-1]
        wrong = misspelt(right, words, dice)
        done = spot(*name.split()[:-1], wrong, "--model", place / "model")
        assert done.returncode == 2 and wrong in done.stderr, (name, wrong, done.stderr)
        if len(right) > 4:
            assert f"is {right} meant" in done.stderr, (name, wrong, done.stderr)
    pairs = [(name, option.name) for name, options in commands.items() for option in options]
    for name, option in dice.sample(pairs, SAMPLED):
        wrong = misspelt(option, {other for command, other in pairs if command == name} | {"--config", "--help"}, dice)
        done = spot(*name.split(), wrong, "3", "--model", place / "model")
        assert done.returncode == 2 and wrong in done.stderr, (name, wrong, done.stderr)
        # Another option may be as near; one is named.
        near = [other for command, other in pairs if command == name and f"is {other} meant" in done.stderr]
        assert near or len(option) < 7, (name, option, wrong, done.stderr)


NUMBERS = [
    "0",
    "-1",
    "1e300",
    "nan",
    "2147483648",
    "9223372036854775807",
    "99999999999999999999",
    "-9223372036854775808",
    "x",
]


def test_no_number_ends_in_a_crash(spot, commands, basics, unreadable, seed):
    """Whatever is given, the program ends by itself, with an error where the weights cannot be read."""
    dice = random.Random(seed)
    known = basics(unreadable)
    pairs = [
        (name, option.name) for name in known for option in commands[name] if option.kind in ("INT", "UINT", "FLOAT")
    ]
    for name, option in dice.sample(pairs, SAMPLED + 8):
        if name == "bench decode":
            continue  # reads no weights: long runs would be begun
        words, value = list(map(str, known[name])), dice.choice(NUMBERS)
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
        done = spot(*name.split(), *words)
        expected = (0, 1, 2) if name == "inspect" or "--write-prompts" in words else (1, 2)
        assert done.returncode in expected, (name, option, value, done)
        assert done.stderr.count("error:") == (done.returncode != 0), (name, option, value, done.stderr)


def test_what_is_no_number_is_called_so(spot, commands, seed):
    """Not one out of a range."""
    dice = random.Random(seed)
    pairs = [
        (name, option)
        for name, options in commands.items()
        for option in options
        if option.kind in ("INT", "UINT", "FLOAT")
    ]
    for name, option in dice.sample(pairs, SAMPLED):
        kind = "number" if option.kind == "FLOAT" else "whole number"
        sentences = {
            "abc": f"no {kind}",
            "1e400": "a number out of range",
            "nan": f"no {kind}",
            "12 apples": f"no {kind}",
        }
        if option.kind != "FLOAT":
            sentences |= {"1.5": "no whole number", "99999999999999999999": "a number out of range"}
        value = dice.choice(sorted(sentences))
        done = spot(*name.split(), option.name, value)
        assert done.returncode == 2, (name, option, done)
        assert f"{option.name}: {value} is {sentences[value]}" in done.stderr, (name, option, value, done.stderr)


def test_an_option_without_a_value_is_named(spot, commands, seed):
    """An empty one (a prompt may be, for all that the command line knows), and `--out=` alone."""
    dice = random.Random(seed)
    pairs = [(name, option.name) for name, options in commands.items() for option in options if option.kind == "TEXT"]
    assert len(pairs) > 20
    for name, option in dice.sample([pair for pair in pairs if pair[1] not in ("--prompt", "--system")], SAMPLED):
        done = spot(*name.split(), option, "")
        assert done.returncode == 2 and f"{option}: the value is empty" in done.stderr, (name, option, done.stderr)
    for name, option in dice.sample(pairs, 4):
        done = spot(*name.split(), f"{option}=", "--device", "cpu")
        assert done.returncode == 2 and f"{option}= has no value" in done.stderr, (name, option, done.stderr)


LENGTHS = {
    "generate": ["--max-new-tokens"],
    "distill": ["--length", "--calibration-length"],
    "eval text": ["--length"],
    "eval needle": ["--length"],
    "eval ruler": ["--lengths"],
    "bench": ["--context", "--steps"],
    "bench distill": ["--length"],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_past_the_positions_are_refused_before_the_weights(spot, place, basics, name):
    for option in LENGTHS[name]:
        for value in ("2049", "2147483648", "9223372036854775807"):
            words = list(map(str, basics(place / "model")[name]))
            if option in words:
                words[words.index(option) + 1] = value
            else:
                words += [option, value]
            with Watch(place / "model" / "model.safetensors") as watch:
                done = spot(*name.split(), *words)
                assert done.returncode in (1, 2) and not watch.opened(), (option, value, done)


MISTAKES = {
    "every": [["--device", "cuda:99"], ["--device", "nonsense"], ["--dtype", "int3"], ["--threads", "100000"], ["--threads", "-1"]],
    "selecting": [["--selector", "nope"], ["--selector", "spot", "--top-p", "2"], ["--selector", "spot", "--cache-format", "int5"],
                  ["--selector", "spot", "--sinks", "-1"], ["--selector", "spot", "--top-k-tokens", "0"]],
    "generate": [["--prompt-file", "/nope"], ["--prompt", ""], ["--temperature", "-1"], ["--sampling-top-p", "2", "--temperature", "1"],
                 ["--logit-bias", "x"], ["--logit-bias", "99999=1"],
                 ["--logit-bias", "5=1,7=2,5=1"], ["--logprobs", "5000"], ["--attention", "spto"], ["--attention", "spot"],
                 ["--chat", "--chat-template", "/nope"], ["--repetition-penalty", "0"]],
    "distill": [["--data", "/nope"], ["--length-mix", "x"], ["--loss", "none"], ["--preset", "none"], ["--lr", "-1"], ["--key-heads", "3"],
                ["--dense-layers", "0,1,2,3,4,5,6,7"], ["--out", "/proc/nope"], ["--sequences-per-step", "0"], ["--store", "int3"],
                ["--cache-format", "int5"], ["--num-heads", "-1"], ["--rope-dims", "3"]],
    "eval": [["--text", "/nope"], ["--methods", "spot"], ["--methods", "quest:p=2"], ["--methods", "quest:q=1"], ["--methods", "spto"],
             ["--out", "/proc/nope"]],
    "eval ruler": [["--tasks", "nope"], ["--depths", "2"], ["--lengths", "10"]],
    "bench": [["--attention", "spto"], ["--preset", "none"], ["--top-p", "2"]],
    "bench distill": [["--preset", "none"], ["--documents", "999999"]],
}  # fmt: skip


def cases():
    for name in ("generate", "distill", "eval text", "eval needle", "eval ruler", "bench", "bench distill"):
        groups = ["every", name, *([name.split()[0]] if " " in name and name.split()[0] == "eval" else [])]
        if name == "generate" or name.startswith("eval"):
            groups.append("selecting")
        for group in groups:
            for words in MISTAKES.get(group, []):
                yield name, words


def test_mistakes_are_found_before_the_weights_are_read(spot, unreadable, basics, seed):
    all_cases = list(cases())
    for name, mistake in random.Random(seed).sample(all_cases, SAMPLED):
        words = list(map(str, basics(unreadable)[name]))
        for word in mistake:  # in place of what the small run says
            if word.startswith("--") and word in words:
                at = words.index(word)
                del words[at : at + 2]
            if word == "--prompt-file":
                at = words.index("--prompt")
                del words[at : at + 2]
        with Watch(unreadable / "model.safetensors") as watch:
            done = spot(*name.split(), *words, *mistake)
            assert done.returncode in (1, 2) and done.stderr.count("error:") == 1, (name, mistake, done)
            assert not watch.opened(), (name, mistake, done.stderr)


def test_unknown_words_of_a_config_file(spot, place, tmp_path):
    for text, sentence in (
        ("[distill]\nlenght=448\n", "`spot distill` has no option lenght; is length meant?"),
        ("[distil]\nlength=448\n", "the section [distil] is no command; is distill meant?"),
        ("[eval.rulr]\nsamples=1\n", "the section [rulr] is no command; is ruler meant?"),
        ("[distill]\nlength=\n", ""),
        ("\x01\x02 = 3\n", "is not TOML"),
    ):
        (tmp_path / "run.toml").write_text(text)
        done = spot("--config", tmp_path / "run.toml", "distill", "--model", place / "model", "--data", place / "text.jsonl",
                    "--out", tmp_path / "out")  # fmt: skip
        assert done.returncode in (1, 2) and not (tmp_path / "out").exists(), (text, done)
        assert not sentence or f"run.toml: {sentence}" in done.stderr, (text, done.stderr)
    done = spot("generate", "--config", tmp_path / "run.toml", "--model", place / "model")
    assert done.returncode == 2 and "spot --config FILE generate" in done.stderr, done
