"""Standard streams that are closed, full or read by nobody: work goes on, and nothing is lost."""

import os
import subprocess

import pytest
from program import ENVIRONMENT, PATIENCE, distillation, leftovers, run_of

REDIRECTIONS = {"full": "2>/dev/full", "closed": "2>&-", "all closed": "<&- 2>&-"}
SMALL = ["generate", "eval text", "eval needle", "eval ruler", "bench", "inspect"]


def words_of(basics, model, name):
    return [*name.split(), *basics(model)[name], *([] if name == "inspect" else ["--threads", 1])]


@pytest.mark.parametrize("name", SMALL)
def test_standard_error_is_no_condition(spot, place, basics, tmp_path, name, seed):
    """One way of the three, drawn anew; the error of a wrong command line keeps its status as well."""
    redirection = list(REDIRECTIONS.values())[seed % 3]
    done = spot.shell(words_of(basics, place / "model", name), redirection)
    assert done.returncode == 0 and done.stdout, (redirection, done)
    if (tmp_path / "e").exists():
        assert (tmp_path / "e" / "report.json").stat().st_size > 100 and not leftovers(tmp_path)
    assert spot.shell(words_of(basics, tmp_path / "nope", name), redirection).returncode == 1
    assert spot.shell([*words_of(basics, place / "model", name), "--no-such"], redirection).returncode == 2


@pytest.mark.parametrize("name", SMALL)
def test_standard_output_that_fails_is_an_error_after_the_work(spot, place, basics, tmp_path, name, seed):
    redirection = [">/dev/full", ">&-"][seed % 2]
    done = spot.shell(words_of(basics, place / "model", name), redirection)
    assert done.returncode == 1 and "error:" in done.stderr, (redirection, done)
    if "--out" in basics(place / "model")[name]:
        assert (tmp_path / "e" / "report.json").stat().st_size > 100 and not leftovers(tmp_path)
    # A closed stream's number must not be given to a file, which would then hold what is printed.
    assert spot.shell(["--help"], redirection).returncode == 1


@pytest.fixture(scope="module")
def reference(spot, place, tmp_path_factory):
    out = tmp_path_factory.mktemp("streams") / "out"
    done = spot(*distillation(place / "model", place / "text.jsonl", out, "--steps", 6, "--checkpoint-interval", 2))
    assert done.returncode == 0, done.stderr
    assert not leftovers(out)
    return out


@pytest.mark.parametrize(
    "redirection, status", [("2>/dev/full", 0), ("2>&-", 0), (">&- 2>&- <&-", 1), (">/dev/full", 1)]
)
def test_a_distillation_is_kept(spot, place, tmp_path, reference, redirection, status):
    words = distillation(
        place / "model", place / "text.jsonl", tmp_path / "out", "--steps", 6, "--checkpoint-interval", 2
    )
    assert spot.shell(words, redirection).returncode == status
    assert run_of(tmp_path / "out") == run_of(reference) and not leftovers(tmp_path / "out")


def test_a_reader_that_goes_away(spot, place, tmp_path, reference):
    """`spot distill 2>&1 | head -1`: the pipe breaks at the first line after it."""
    read, write = os.pipe()
    os.close(read)
    words = distillation(
        place / "model", place / "text.jsonl", tmp_path / "out", "--steps", 6, "--checkpoint-interval", 2
    )
    done = subprocess.run(
        [str(spot.path), *words], stdout=subprocess.DEVNULL, stderr=write, env=ENVIRONMENT, timeout=PATIENCE
    )
    os.close(write)
    assert done.returncode == 0 and run_of(tmp_path / "out") == run_of(reference)
