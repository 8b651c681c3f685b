"""spot calibrate: the mass that --mass asks for is captured on other text, the weights stay, and what cannot be is said."""

import json
import shutil
import statistics

import pytest
from program import ROOT, SHIPPED, leftovers

LENGTH = 2048


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts of one kind and no page of one in the other."""
    folder = tmp_path_factory.mktemp("texts")
    pages = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"])
    for half, name in enumerate(("fit.txt", "fresh.txt")):
        (folder / name).write_text("\n".join(page.read_text() for page in pages[half::2]))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The shipped selector as one that was distilled before thresholds were fitted, with small reserves and floor, so that
    they alone do not hold most of the attention of short contexts."""
    folder = tmp_path_factory.mktemp("bare") / "selector"
    shutil.copytree(SHIPPED / "selectors" / "spot", folder)
    document = json.loads((folder / "selector.json").read_text())
    for name in ("residual_mass", "mass_table"):
        document["config"]["selection"].pop(name, None)
    document["config"]["selection"].update({"sinks": 16, "recency": 32, "floor": 64})
    document["notes"].pop("mass_calibration", None)
    del document["checksum"]
    (folder / "selector.json").write_text(json.dumps(document))
    (folder / "README.md").write_text("# Mine\n")
    return folder


def calibrate(spot, selector, text, *more):
    length = [] if "--length" in more else ["--length", LENGTH]
    return spot("calibrate", "--model", SHIPPED, "--selector", selector, "--data", text, *length, *more)


def captured(spot, selector, text, methods, out):
    """Captured mass by method, mean over layers, of queries in contexts as long as the fit's: measured by `spot eval text` on decode's own path: stored 4-bit keys, one query at a time."""
    words = [
        "--length",
        LENGTH,
        "--sequences",
        6,
        "--skip",
        LENGTH * 3 // 4,
        "--measured-queries",
        8,
        "--methods",
        methods,
    ]
    done = spot("eval", "text", "--model", SHIPPED, "--selector", selector, "--text", text, "--out", out, *words)
    assert done.returncode == 0, done
    report = json.loads((out / "report.json").read_text())
    return {
        method["name"]: statistics.mean(layer["captured_mass"] for layer in method["layers"])
        for method in report["methods"]
    }


def test_a_mass_is_captured_on_fresh_text(spot, bare, texts, tmp_path):
    selector = shutil.copytree(bare, tmp_path / "selector")
    before = json.loads((selector / "selector.json").read_text())
    done = calibrate(spot, selector, texts / "fit.txt", "--contexts", 8)
    assert done.returncode == 0 and "--mass takes 0." in done.stdout, done
    after = json.loads((selector / "selector.json").read_text())
    fitted = after["config"]["selection"]
    assert (selector / "selector.safetensors").read_bytes() == (bare / "selector.safetensors").read_bytes()
    assert len(fitted["residual_mass"]) == 8 and len(fitted["mass_table"]) == 21
    notes = after["notes"].pop("mass_calibration")
    firsts = [304 + run * (LENGTH - 16 - 304) // 15 for run in range(16)]  # of runs of 16 queries
    late = sum(query + 1 > LENGTH * 3 // 4 for first in firsts for query in range(first, first + 16))
    assert (notes["contexts"], notes["length"], notes["queries"]) == (8, LENGTH, 8 * late) and 40 < late < 100
    assert after.pop("checksum") and not leftovers(selector)
    for name in ("residual_mass", "mass_table"):
        del fitted[name]
    assert after == before  # nothing else was touched
    card = (selector / "README.md").read_text()
    assert card.startswith("# Mine\n\n## What a captured mass reads\n")
    # The fit reads densely; here every token of the text is read sparsely, from hidden states that differ for it, which costs
    # later layers some mass (0.03 at 0.8 on the very contexts of the fit). A text has its own mass, too.
    masses = captured(spot, selector, texts / "fresh.txt", "spot:m=0.8,spot:m=0.9", tmp_path / "report")
    assert 0.8 - 0.06 < masses["spot:m=0.8"] < 0.8 + 0.03, masses
    assert 0.9 - 0.03 < masses["spot:m=0.9"] < 0.9 + 0.03, masses
    # Fitted anew, the section is replaced.
    assert calibrate(spot, selector, texts / "fresh.txt", "--contexts", 1).returncode == 0
    again = (selector / "README.md").read_text()
    assert again != card and again.count("## What a captured mass reads") == 1


def test_what_cannot_be_done_is_said(spot, bare, texts, tmp_path):
    prompt = ["generate", "--model", SHIPPED, "--prompt", "a", "--max-new-tokens", 1]
    done = spot(*prompt, "--selector", bare, "--mass", 0.8)
    assert done.returncode == 1 and "fit that with `spot calibrate`" in done.stderr, done
    done = spot(*prompt, "--selector", "spot", "--mass", 0.999999)
    assert done.returncode == 1 and "is outside what was fitted for the selector, 0." in done.stderr, done
    document = (bare / "selector.json").read_bytes()
    refused = [
        (bare, ["--contexts", 1000], "of 1000 contexts of 2048 tokens; give more text"),
        (bare, ["--held-out-every", 1], "held_out_every is 1"),
        (bare, ["--length", 200000], "the model reaches 131072 positions"),
        (bare, ["--length", 300], "leave too few blocks outside sinks and recency"),
        ("nope", [], 'no selector "nope"'),
    ]
    for selector, more, sentence in refused:
        done = calibrate(spot, selector, texts / "fit.txt", *more)
        assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("error:") == 1, done
    assert (bare / "selector.json").read_bytes() == document and not leftovers(bare)


def test_reserves_of_a_new_selector(spot, place, basics, tmp_path):
    words = ["--sinks", 32, "--recency", 48, "--floor", 128]
    done = spot("distill", *basics(place / "model")["distill"], *words)
    assert done.returncode == 0, done
    chosen = json.loads((tmp_path / "out" / "selector.json").read_text())["config"]["selection"]
    assert (chosen["sinks"], chosen["recency"], chosen["floor"]) == (32, 48, 128)
    done = spot("distill", *basics(place / "model")["distill"], "--sinks", -1)
    assert done.returncode == 1 and "selection.sinks is -1" in done.stderr, done
