"""The load generator of bench/serve.py: what it sends, how it counts, and that it works on the server."""

import asyncio
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys

import pytest

BENCH = pathlib.Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import serve  # noqa: E402
from serve_load import Answer, Load, percentile, send, summary, take  # noqa: E402


def test_arrivals_are_poisson_and_repeat(seed):
    load = Load(requests=20_000, prompt_tokens=1, answer_tokens=1, rate=8.0, seed=7)
    times = load.arrivals()
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert times[0] == 0 and min(gaps) >= 0
    # Exponential gaps: mean and deviation are 1 / rate, within five standard errors; one in e is longer than the mean.
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=5 / len(gaps) ** 0.5)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 8, rel=10 / len(gaps) ** 0.5)
    assert sum(gap > 1 / 8 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)
    assert load.arrivals() == times
    assert Load(5, 1, 1, rate=None).arrivals() == [0.0] * 5
    assert Load(5, 1, 1, rate=8.0, seed=seed + 8).arrivals() != times[:5]


def test_bodies_share_no_beginning():
    load = Load(40, 64, 9, first_id=300, end_id=4000, seed=3, fields={"attention": "dense"})
    bodies = [json.loads(body) for body in load.bodies("m")]
    assert len({tuple(body["prompt"][:16]) for body in bodies}) == 40
    assert {len(body["prompt"]) for body in bodies} == {64}
    assert all(300 <= token < 4000 for body in bodies for token in body["prompt"])
    assert all(body["max_tokens"] == 9 and body["ignore_eos"] and body["attention"] == "dense" for body in bodies)
    other = Load(40, 64, 9, seed=4).bodies("m")
    assert not {tuple(json.loads(body)["prompt"][:16]) for body in other} & {tuple(b["prompt"][:16]) for b in bodies}


def answer_of(sent, events, tokens, **more):
    return Answer(sent=sent, events=events, tokens=tokens, **{"finish": "length", "done": True, **more})


def test_summary_of_known_times():
    answers = [
        answer_of(10.0, [10.5, 10.6, 10.8], 3),
        answer_of(11.0, [11.2, 11.3, 14.0], 3),
        answer_of(11.0, [11.1, 99.0], 2, done=False),  # was cut: counts for nothing but itself
        answer_of(12.0, [], 0, error="status 429: full", done=False, finish=None),
    ]
    found = summary(answers)
    assert (found["requests"], found["whole"], found["tokens"]) == (4, 2, 6)
    assert found["seconds"] == pytest.approx(4.0)
    assert found["requests_per_second"] == pytest.approx(0.5) and found["tokens_per_second"] == pytest.approx(1.5)
    assert found["first_token_ms"]["p50"] == pytest.approx(200) and found["first_token_ms"]["p99"] == pytest.approx(500)
    assert found["between_tokens_ms"]["p50"] == pytest.approx(100) and found["between_tokens_ms"][
        "p99"
    ] == pytest.approx(2700)
    assert found["errors"] == ["status 429: full"]


def test_percentiles():
    values = random.Random(1).sample(range(1, 201), 200)
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0, 0.001)] == [100, 198, 200, 1]
    assert percentile([5.0], 0.99) == 5.0 and percentile([], 0.5) != percentile([], 0.5)


def test_pieces_without_tokens_are_no_events():
    answer = Answer()
    piece = lambda count, text="a", finish=None: json.dumps(
        {"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": count}}
    ).encode()
    for now, event in enumerate(
        [piece(1), piece(3), piece(3, "", "length"), b'{"choices": [], "usage": {"completion_tokens": 3}}']
    ):
        take(answer, event, float(now))
    assert answer.events == [0.0, 1.0] and answer.tokens == 3 and not answer.whole
    take(answer, b"[DONE]", 9.0)
    assert answer.whole
    plain = Answer()  # of a server that counts at the end alone
    for now in range(3):
        take(plain, b'{"choices": [{"text": "b", "finish_reason": null}]}', float(now))
    assert plain.events == [0.0, 1.0, 2.0]


def reply_of(kind):
    """What a server says, in bytes."""
    events = [
        {
            "choices": [{"text": "x", "finish_reason": None if i < 2 else "length"}],
            "usage": {"completion_tokens": i + 1},
        }
        for i in range(3)
    ]
    body = b": ping\n\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    if kind == "error within":
        body += b'data: {"error": {"message": "no more"}}\n\n'
    elif kind != "no end":
        body += b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if kind == "full":
        return b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 6\r\n\r\nfull!\n"
    if kind == "whole body":
        return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    if kind == "until closed":
        return head + b"\r\n" + body
    cuts = [body[i : i + 7] for i in range(0, len(body), 7)]  # chunks that end within events
    chunked = b"".join(f"{len(cut):x}\r\n".encode() + cut + b"\r\n" for cut in cuts)
    return (
        head
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (chunked[: len(chunked) // 2] if kind == "cut" else chunked + b"0\r\n\r\n")
    )


@pytest.mark.parametrize(
    "kind, error",
    [
        ("chunked", ""), ("whole body", ""), ("until closed", ""), ("cut", "cut"), ("no end", "without [DONE]"),
        ("error within", "no more"), ("full", "status 429: full!"), ("nothing", "before it answered"),
    ],
)  # fmt: skip
def test_replies_of_every_kind(kind, error):
    seen = []

    async def client(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(
            next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1]
        )
        seen.append(json.loads(await reader.readexactly(size)))
        if kind != "nothing":
            for i in range(0, len(reply := reply_of(kind)), 11):  # and packets that end anywhere
                writer.write(reply[i : i + 11])
                await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(client, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await send(f"http://127.0.0.1:{port}", "m", Load(5, 8, 3))

    answers = asyncio.run(run())
    assert len(seen) == 5
    for answer in answers:
        if error:
            assert error in answer.error and not answer.whole
        else:
            assert answer.whole and answer.tokens == 3 and len(answer.events) == 3


def row(side, chunk, rate, p99, whole=4):
    return {
        "side": side,
        "chunk": chunk,
        "requests": 4,
        "whole": whole,
        "requests_per_second": rate,
        "between_tokens_ms": {"p99": p99},
    }


def test_each_side_has_its_own_best_chunk_under_one_bound():
    rows = [
        row("d", 256, 1.0, 90),
        row("d", 512, 1.5, 130),
        row("s", 256, 2.0, 50),
        row("s", 512, 3.0, 99),
        row("s", 1024, 9.0, 101),
    ]
    found = serve.compare(rows, ["d", "s"], 100, 200)
    assert found["bound_ms"] == 100 and found["ratio"] == 3.0 and found["best"]["s"]["chunk"] == 512
    # Where the first side cannot hold the bound, the loose one holds for both.
    found = serve.compare(rows[1:], ["d", "s"], 100, 200)
    assert found["bound_ms"] == 200 and found["ratio"] == 6.0 and found["best"]["s"]["chunk"] == 1024
    # Measurements with answers that are missing do not count.
    found = serve.compare([row("d", 256, 1.0, 90), row("s", 256, 2.0, 50, whole=3)], ["d", "s"], 100, 200)
    assert found["best"]["s"] is None and found["ratio"] is None


def test_search_on_the_server(build_folder, tiny_qwen3, tmp_path):
    out = tmp_path / "serve.json"
    command = [sys.executable, BENCH / "serve.py", "search", "--spot", build_folder / "spot", "--model", tiny_qwen3]
    command += [
        "--serve=--selector=spot",
        "--serve=--cache-gib=0.05",
        "--shape",
        "200/6x5",
        "--shape",
        "40/4x3",
        "--bound",
        "60000",
    ]
    command += ["--chunks", "dense=96", "--chunks", "spot:k=640=96,160", "--rate", "200", "--out", out]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [(r["shape"], r["side"], r["chunk"]) for r in result["rows"]] == [
        (shape, side, chunk)
        for chunk, sides in ((96, ["dense", "spot:k=640"]), (160, ["spot:k=640"]))
        for shape in ("200/6", "40/4")
        for side in sides
    ]
    for r in result["rows"]:
        requests, answer = (5, 6) if r["shape"] == "200/6" else (3, 4)
        assert r["whole"] == r["requests"] == requests and r["tokens"] == requests * answer and r["errors"] == []
        assert r["prefix_hits"] == 0 and r["requests_per_second"] > 0
    assert result["results"]["200/6"]["ratio"] > 0 and result["skipped"] == []
    assert "5/5" in done.stdout and "over dense" in done.stdout
