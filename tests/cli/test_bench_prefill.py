"""`spot bench prefill`: its table, JSON and page hold every row, its figures agree with each other, and what it refuses."""

import json
import random

import pytest


def total(stages: dict[str, float]) -> float:
    return sum(stages.values())


def test_figures_agree(spot, place, tmp_path, seed):
    draw = random.Random(seed)
    chunk, lengths = 64 * draw.randint(1, 3), sorted({64 * draw.randint(4, 12) for _ in range(2)})
    methods = ["spot:k=64,sinks=16,recency=32,floor=64", "spot:k=100%,tile=64"]
    done = spot(
        "bench", "prefill", "--model", place / "model", "--random", "--device", "cpu", "--rounds", 1,
        "--lengths", ",".join(map(str, lengths)), "--chunk", chunk, "--attention", ",".join(methods),
        "--out", tmp_path / "out.json", "--page", tmp_path / "page.html",
    )  # fmt: skip
    assert done.returncode == 0, done
    report = json.loads((tmp_path / "out.json").read_text())
    config = json.loads((place / "model" / "config.json").read_text())
    heads, dim = config["num_attention_heads"], config["head_dim"]
    kv, hidden, inner = config["num_key_value_heads"], config["hidden_size"], config["intermediate_size"]
    products = 2 * config["num_hidden_layers"] * hidden * (2 * dim * (heads + kv) + 3 * inner)
    assert [row["tokens"] for row in report["lengths"]] == lengths and report["matmul_tflops"] > 0
    for row in report["lengths"]:
        length = row["tokens"]
        pairs = length * (length + 1) / 2
        names = [(one["name"], one["tile"]) for one in row["layer"]]
        assert names == [("dense", 0), (methods[0], 16), (methods[1], 64)]
        for one in row["layer"]:
            stages = one["seconds"]
            assert set(stages) == ({"stage_keys", "score", "select", "attend"} if one["tile"] else {"attend"})
            assert one["together_seconds"] == pytest.approx(total(stages))
            flop = 4 * heads * dim * pairs * one["density"]
            assert one["attend_tflops"] * stages["attend"] * 1e12 == pytest.approx(flop)
            assert one["over_dense"] * one["together_seconds"] == pytest.approx(row["layer"][0]["together_seconds"])
            assert one["density"] == 1 if one["name"] != methods[0] else 0 < one["density"] < 1
            if one["tile"]:
                assert one["score_tflops"] * stages["score"] * 1e12 == pytest.approx(2 * 4 * 128 * pairs)
        assert [(one["name"], one["sparse_prefill"]) for one in row["model"]] == [
            ("dense", False),
            *((name, True) for name in methods),
        ]
        for one in row["model"]:
            assert one["first_token_seconds"] == pytest.approx(one["attention_seconds"] + one["rest_seconds"])
            assert one["rest_tflops"] * one["rest_seconds"] * 1e12 == pytest.approx(products * length)
            assert one["over_dense"] * one["first_token_seconds"] == pytest.approx(
                row["model"][0]["first_token_seconds"]
            )
    tables = [line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert len(tables) == 2 * len(lengths) * (1 + len(methods))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and page.count("<table") == 2 and all(name in page for name in methods)


def test_some_chunks_stand_for_all(spot, place, tmp_path):
    words = ["--model", place / "model", "--lengths", "640", "--chunk", 64, "--chunks", 3, "--rounds", 1]
    for more, empty in ((["--no-model"], "model"), (["--no-layer"], "layer")):
        done = spot("bench", "prefill", *words, *more, "--out", tmp_path / "out.json")
        assert done.returncode == 0 and "640 (3 of 10 chunks)" in done.stdout, done
        row = json.loads((tmp_path / "out.json").read_text())["lengths"][0]
        assert (row["chunks"], row["chunks_run"], row[empty]) == (10, 3, [])


@pytest.mark.parametrize(
    "words, status, named",
    [
        (["--lengths", "100"], 1, "multiple of 64"),
        (["--lengths", "128", "--chunk", "100"], 1, "multiple of 64"),
        (["--lengths", "640", "--chunk", "64", "--chunks", "1"], 1, "at least 2"),
        (["--lengths", "320", "--chunk", "128", "--chunks", "2"], 1, "no whole number"),
        (["--lengths", "1048576"], 1, "limit of"),
        (["--lengths", "128", "--attention", "quest"], 2, "only spot"),
        (["--lengths", "128", "--attention", "spot:prefill=auto"], 2, "only spot"),
        (["--lengths", "128", "--attention", "spot:tile=8"], 1, "16, 32 or 64"),
        (["--lengths", "128", "--no-model", "--no-layer"], 2, "excludes"),
        (["--lengths", "128", "--preset", "none"], 1, "preset"),
    ],
)
def test_refusals(spot, unreadable, words, status, named):
    done = spot("bench", "prefill", "--model", unreadable, *words)
    assert done.returncode == status and named in done.stderr, done
