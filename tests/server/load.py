"""Open load with clients that go away: every answer is the one that the request gets alone, and nothing is left behind.

As a script, the long form: python tests/server/load.py --clients 64 --seconds 600
"""

import argparse
import json
import pathlib
import random
import sys
import threading
import time

MODEL = "tiny-qwen3"
# Full-precision selector keys: four bits would turn rounding into another code.
COMMON = ["--selector", "spot", "--attention", "dense", "--cache-format", "f32", "--max-tokens", "1472"]
METHODS = [
    "dense",
    "spot:k=640",
    "spot:p=0.8,floor=64,sinks=16,recency=32",
    "spot:k=256,prefill=sparse,sinks=16,recency=32",
]


def random_request(rng, book):
    start = rng.choice([0, 0, rng.randrange(len(book) - 5000)])  # many share a beginning
    body = {
        "model": MODEL,
        "prompt": book[start : start + rng.choice([20, 150, 700, rng.randrange(1, 2600)])],
        "max_tokens": rng.randrange(1, rng.choice([8, 24, 150])),
        "attention": rng.choice(METHODS),
        "n": rng.choice([1, 1, 1, 2]),
        "seed": rng.randrange(2**31),
        "temperature": rng.choice([0, 0, 0.8]),
        "logprobs": 2,
        "ignore_eos": True,
    }
    if body["temperature"]:
        body["top_k"] = 3
    if rng.randrange(4) == 0:
        body["repetition_penalty"] = 1.3
    return body


def long_answer(rng, book):
    """Many of these at once need more pages than there are."""
    start = rng.randrange(len(book) - 5000)
    more = {"prompt": book[start : start + 300], "max_tokens": 120, "n": 1}
    return {**random_request(rng, book), **more}


def ask(server, body, cancel_after=None):
    """The choices, by index: tokens and whether they ended; of a stream, whose client may go after some chunks."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    stream = cancel_after is not None or body["seed"] % 2 == 0
    sent = json.dumps({**body, "stream": stream})
    connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
    choices = [{"tokens": [], "top": [], "text": "", "finish": None} for _ in range(body["n"])]

    def take(choice):
        mine = choices[choice["index"]]
        mine["text"] += choice["text"]
        mine["finish"] = choice["finish_reason"]
        if choice["logprobs"]:
            mine["tokens"] += choice["logprobs"]["tokens"]
            mine["top"] += choice["logprobs"]["top_logprobs"]

    if cancel_after == 0:
        connection.close()
        return choices
    reply = connection.getresponse()
    if reply.status != 200:
        raise AssertionError(f"{reply.status}: {reply.read()}")
    if not stream:
        for choice in json.loads(reply.read())["choices"]:
            take(choice)
        return choices
    chunks, done = 0, False
    for line in reply:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            done = True
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise AssertionError(chunk)
        for choice in chunk["choices"]:
            take(choice)
        chunks += 1
        if chunks == cancel_after:
            connection.close()
            return choices
    assert done, "the stream was cut off"
    connection.close()
    return choices


def near_tie(top):
    """Whether rounding may have chosen: the two likeliest are next to each other."""
    values = sorted(top.values(), reverse=True)
    return len(values) > 1 and values[0] - values[1] < 1e-3


def differs(alone, got, whole):
    """What is wrong with an answer; None when it is right."""
    for i, token in enumerate(got["tokens"]):
        if i >= len(alone["tokens"]):
            return "goes on past the end"
        if token != alone["tokens"][i]:
            return None if near_tie(alone["top"][i]) else f"differs at token {i}"
    if whole and (got["text"], got["finish"]) != (alone["text"], alone["finish"]):
        return "ends otherwise"
    if not whole and not alone["text"].startswith(got["text"]):
        return "has other text"
    return None


def run_load(server, book, clients, rng, requests=None, seconds=None, make=random_request):
    """[(body, cancel_after, choices)] of all clients; each sends `requests`, or goes on for `seconds`."""
    results, failures, lock = [], [], threading.Lock()
    end = time.monotonic() + (seconds or 1e9)

    def client(rng):
        for _ in range(requests or 10**9):
            if time.monotonic() > end or failures:
                return
            body = make(rng, book)
            cancel = rng.choice([None, None, None, None, None, 0, 1, 5]) if make is random_request else None
            try:
                choices = ask(server, body, cancel)
            except Exception as error:
                failures.append(f"{body}: {error!r}")
                return
            with lock:
                results.append((body, cancel, choices))

    threads = [threading.Thread(target=client, args=(random.Random(rng.random()),)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    return results


def check(results, reference):
    """Against a server that runs one answer at a time, without a prefix cache; how many tokens were compared."""
    compared = 0
    for body, cancel, choices in results:
        alone = ask(reference, body)
        for i, (expected, got) in enumerate(zip(alone, choices)):
            wrong = differs(expected, got, cancel is None)
            assert wrong is None, f"choice {i} of {body} {wrong}:\n{got}\nalone:\n{expected}"
            compared += len(got["tokens"])
    return compared


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/cpu"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--compare", type=int, default=200, help="answers that are compared with those alone")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from conftest import ROOT, Server

    print(f"seed {options.seed}")
    rng = random.Random(options.seed)
    book = (ROOT / "docs" / "method.md").read_text() + (ROOT / "docs" / "distillation.md").read_text()
    model = ROOT / "models" / MODEL
    server = Server(options.build, model, *COMMON, "--cache-gib", "0.02", "--max-sequences", "32", "--max-queue", "256")

    def resident():
        fields = pathlib.Path(f"/proc/{server.process.pid}/status").read_text().split("\n")
        return int(next(f for f in fields if f.startswith("VmRSS")).split()[1]) / 1024

    results, begin = [], time.monotonic()
    while (left := options.seconds - (time.monotonic() - begin)) > 0:
        results += run_load(server, book, options.clients, rng, seconds=min(left, options.seconds / 4))
        results += run_load(server, book, options.clients, rng, requests=1, make=long_answer)
        server.wait_until_idle()
        print(f"{time.monotonic() - begin:.0f} s: {len(results)} requests, {resident():.0f} MiB resident", flush=True)
    metrics = server.metrics()
    print(
        f"{metrics['vllm:generation_tokens_total']:.0f} tokens written, {metrics['vllm:num_preemptions_total']:.0f} preemptions"
    )
    assert server.stop()[0] == 0
    reference = Server(options.build, model, *COMMON, "--max-sequences", "1", "--no-prefix-cache")
    chosen = rng.sample(results, min(options.compare, len(results)))
    print(f"{check(chosen, reference)} tokens of {len(chosen)} requests are as alone")
    reference.stop()


if __name__ == "__main__":
    main()
