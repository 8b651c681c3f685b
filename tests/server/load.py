"""Open load with clients that go away or send nonsense: every answer is the one that the request gets alone, and nothing is left
behind.

As a script, the long form: python tests/server/load.py --clients 64 --seconds 600
"""

import argparse
import contextlib
import json
import pathlib
import random
import socket
import struct
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


def nonsense(rng, book):
    """What no request should be, as bytes: broken HTTP, broken JSON, or a whole request with some bytes changed."""
    body = json.dumps(random_request(rng, book)).encode()
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 300))) + b"\r\n\r\n"
    if kind == 1:
        body = body[: rng.randrange(len(body))]
    if kind == 2:
        body = body.replace(
            b'"max_tokens": ',
            rng.choice([b'"max_tokens": -', b'"max_tokens": "', b'"max_tokens": [[', b'"n": 1e9, "x": ']),
        )
    if kind == 3:
        body = rng.choice(
            [
                b"[" * 4000,
                b"{}",
                b"null",
                b'{"prompt": [1e400]}',
                b'{"prompt": "\xff"}',
                b'{"prompt": "a", "seed": 1e30}',
            ]
        )
    length = len(body) if kind != 4 else rng.choice([-1, 10**15, len(body) + 50])
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    data = bytearray(head.encode() + body)
    if kind == 5:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(head) + 20)] = rng.randrange(256)
    return bytes(data)


def send_nonsense(server, rng, book):
    """The status of the reply; 0 where there is none, as when the connection is cut by a reset in the middle."""
    with server.socket() as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(300)  # what is a request after all waits for its turn
        connection.sendall(nonsense(rng, book))
        if rng.randrange(4) == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return 0
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while more := connection.recv(65536):
            data += more
        if not data:
            return 0
        assert data.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), data[:100]
        return int(data.split()[1])
    return 0


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


def run_load(server, book, clients, rng, requests=None, seconds=None, make=random_request, vandals=0):
    """[(body, cancel_after, choices)] of all clients; each sends `requests`, or goes on for `seconds`. So long, `vandals` more
    send nonsense."""
    results, failures, lock = [], [], threading.Lock()
    over = threading.Event()
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

    def vandal(rng):
        while not over.is_set() and not failures:
            try:
                status = send_nonsense(server, rng, book)
                assert status in (0, 200, 400, 404, 405, 408, 411, 413, 415, 429, 431, 501, 503, 505), status
            except Exception as error:
                failures.append(f"nonsense: {error!r}")
            time.sleep(rng.random() / 10)

    others = [threading.Thread(target=vandal, args=(random.Random(rng.random()),)) for _ in range(vandals)]
    threads = [threading.Thread(target=client, args=(random.Random(rng.random()),)) for _ in range(clients)]
    for thread in others + threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    for thread in others:
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


def kill_in_the_middle(server, book, clients, rng):
    """SIGKILL while all clients are answered: how many of their streams had begun. None may look finished."""
    begun, looks_finished, lock = [], [], threading.Lock()
    streaming = threading.Semaphore(0)

    def client(rng):
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        body = {**long_answer(rng, book), "max_tokens": 1000, "stream": rng.randrange(4) > 0}
        lines, ended = [], "nothing"
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            for line in reply:
                lines.append(line)
                if len(lines) == 1:
                    streaming.release()
            ended = "whole" if not body["stream"] else "closed"
        except (OSError, http.client.HTTPException):
            ended = "cut"
        with lock:
            begun.append(bool(lines))
            text = b"".join(lines)
            if (
                ended == "whole"
                or b"[DONE]" in text
                or any(word in text for word in (b'"finish_reason":"', b'"finish_reason": "'))
            ):
                looks_finished.append(text[-300:])

    threads = [threading.Thread(target=client, args=(random.Random(rng.random()),)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        streaming.acquire()
    server.process.kill()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a client still waits for a server that was killed"
    server.process.wait()
    assert not looks_finished, looks_finished[0]
    return sum(begun)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/cpu"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--compare", type=int, default=200, help="answers that are compared with those alone")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from served import ROOT, Server

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
        part = min(left, options.seconds / 4)
        results += run_load(server, book, options.clients, rng, seconds=part, vandals=4)
        results += run_load(server, book, options.clients, rng, requests=1, make=long_answer)
        server.wait_until_idle()
        print(f"{time.monotonic() - begin:.0f} s: {len(results)} requests, {resident():.0f} MiB resident", flush=True)
    metrics = server.metrics()
    print(
        f"{metrics['vllm:generation_tokens_total']:.0f} tokens written, {metrics['vllm:num_preemptions_total']:.0f} preemptions"
    )
    refused = {
        k.split("=")[1].rstrip("}"): v for k, v in metrics.items() if k.startswith("spot:refused_requests_total{")
    }
    print(f"refused by status: {refused}; dropped connections: {metrics['spot:dropped_connections_total']:.0f}")
    assert server.stop()[0] == 0
    begin = time.monotonic()
    start = lambda: Server(
        options.build, model, *COMMON, "--cache-gib", "0.02", "--max-sequences", "32", "--max-queue", "256"
    )
    killed = start()
    load_seconds = time.monotonic() - begin
    begun = kill_in_the_middle(killed, book, options.clients, rng)
    begin = time.monotonic()
    again = start()
    ask(again, {**random_request(rng, book), "max_tokens": 1})
    print(
        f"kill -9 with {options.clients} clients, {begun} streams begun: none looks finished; the next server answered after "
        f"{time.monotonic() - begin:.1f} s, of which the start took {load_seconds:.1f} s before"
    )
    assert again.stop()[0] == 0
    reference = Server(options.build, model, *COMMON, "--max-sequences", "1", "--no-prefix-cache")
    chosen = rng.sample(results, min(options.compare, len(results)))
    print(f"{check(chosen, reference)} tokens of {len(chosen)} requests are as alone")
    reference.stop()


if __name__ == "__main__":
    main()
