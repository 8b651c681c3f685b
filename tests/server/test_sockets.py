"""What no well-behaved client sends: malformed HTTP, bodies past the limits, clients that vanish or do not read."""

import contextlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

import openai
import pytest
from patience import SLOWER

MODEL = "tiny-qwen3"


def request(body, path="/v1/completions", version="1.1", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": len(data)}
    lines.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = f"POST {path} HTTP/{version}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    return head.encode() + b"\r\n" + data


def read_reply(connection, held=b""):
    """Status, headers, body, and what came after it."""
    while b"\r\n\r\n" not in held:
        data = connection.recv(65536)
        assert data, f"the connection was closed after {held!r}"
        held += data
    head, _, held = held.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:])}
    length = int(headers["content-length"])
    while len(held) < length:
        data = connection.recv(65536)
        assert data
        held += data
    return int(lines[0].split()[1]), headers, held[:length], held[length:]


def read_all(connection):
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def read_to_the_end(connection):
    with contextlib.suppress(ConnectionError):  # a reset is an end too
        while connection.recv(65536):
            pass


@pytest.mark.parametrize(
    "sent, status",
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400),  # as TLS begins
        (b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 40000 + b"\r\n\r\n", 431),
        (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (request(b"{"), 400),
        (request(b"[1]"), 400),
        (request(b'{"prompt": "\xff"}'), 400),
        (request(b"[" * 5000), 400),
        (request({"prompt": "a"}, Content_Type="text/plain"), 415),
        (request({"prompt": "a"}, Content_Type="application/json; charset=latin1"), 415),
        (request({"prompt": "a"}, Content_Encoding="gzip"), 415),
        (request({"prompt": "a"}, Expect="200-ok"), 417),
        (request(b'{"prompt": "a", "n": 1, "n": 2}'), 400),
        (request({"tokens": [1, 1 << 20]}, "/detokenize"), 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET http://x/nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (request(b"", Content_Length=1 << 40), 413),
        (request(b"x" * 100, Content_Length=(1 << 20) + 1), 413),
        (request(b"5\r\nhello\r\nzz\r\n", Transfer_Encoding="chunked").replace(b"Content-Length: 14\r\n", b""), 400),
    ],
)
def test_bad_requests_are_told_so(server, sent, status):
    with server.socket() as connection:
        connection.sendall(sent)
        got, headers, body, _ = read_reply(connection)
        assert got == status
        assert json.loads(body)["error"]["message"] and headers["content-type"] == "application/json"
    assert json.loads(server.get("/health")) == {"status": "ok"}


def test_names_in_any_case_and_absolute_targets(server):
    body = {"prompt": "a"}
    with server.socket() as connection:
        for kind in ("APPLICATION/JSON", 'application/json; Charset="UTF-8"'):
            connection.sendall(request(body, "/tokenize", Content_Type=kind, Content_Encoding="identity"))
            assert read_reply(connection)[0] == 200
        connection.sendall(request(body, "http://elsewhere:80/tokenize?a=b"))
        assert read_reply(connection)[0] == 200
        connection.sendall(b"GET HTTP://x/health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection)[0] == 200


@pytest.mark.parametrize("coding, status", [("gzip, chunked", 501), ("gzip", 400)])
def test_bodies_of_unknown_length_end_the_connection(server, coding, status):
    """What follows the header might be taken for a request of its own."""
    sent = request({"prompt": "a"}, Transfer_Encoding=coding).replace(b"Content-Length: 15\r\n", b"")
    assert b"Content-Length" not in sent
    with server.socket() as connection:
        connection.sendall(sent + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        got, headers, body, rest = read_reply(connection)
        assert (got, headers["connection"]) == (status, "close") and json.loads(body)["error"]["message"]
        assert rest + read_all(connection) == b""


def test_random_bytes_do_no_harm(server, seed):
    rng = random.Random(seed)
    whole = request({"model": MODEL, "prompt": "a", "max_tokens": 2})
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with server.socket() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            read_to_the_end(connection)
    server.wait_until_idle()


def test_pipelined_and_slow_requests(server):
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "temperature": 0}
    with server.socket() as connection:
        connection.sendall(request(body) + request(body) + b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
        first = read_reply(connection)
        second = read_reply(connection, first[3])
        assert first[0] == second[0] == 200
        assert json.loads(first[2])["choices"] == json.loads(second[2])["choices"]
    with server.socket() as connection:
        data = request(body)
        for i in range(0, len(data), 37):
            connection.sendall(data[i : i + 37])
            time.sleep(0.002)
        assert read_reply(connection)[0] == 200
    with server.socket() as connection:  # in chunks, after the server's word
        data = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\nExpect: 100-Continue\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"".join(b"1\r\n%c\r\n" % c for c in data) + b"0\r\n\r\n")
        assert read_reply(connection)[0] == 200
    with server.socket() as connection:  # HTTP/1.0: the end of the connection is the stream's
        connection.sendall(request({**body, "stream": True}, version="1.0"))
        data = read_all(connection)
        assert b"chunked" not in data and data.endswith(b"data: [DONE]\n\n")


def long_request(book, **more):
    return request({"model": MODEL, "prompt": book[:1500], "max_tokens": 3000, "ignore_eos": True, **more})


@pytest.mark.parametrize("kind", ["queued", "prefill", "decode", "whole"])
def test_who_vanishes_is_forgotten_at_once(server, book, kind, seed):
    before = server.wait_until_idle()
    occupied = []
    with server.socket() as connection:
        if kind == "queued":  # eight answers run, these wait
            connection.sendall(long_request(book, stream=True, n=8))
            occupied.append(connection)
            assert connection.recv(5)
            server.wait_for(lambda m: m["vllm:num_requests_running"] == 8)
            gone = server.socket()
            gone.sendall(long_request(book, n=3))
            server.wait_for(lambda m: m["vllm:num_requests_waiting"] == 3)
            gone.close()
            server.wait_for(lambda m: m["vllm:num_requests_waiting"] == 0)
            after = server.metrics()
            assert after["vllm:num_requests_running"] == 8
            assert after["vllm:request_success_total{finished_reason=abort}"] == (
                before["vllm:request_success_total{finished_reason=abort}"] + 3
            )
            return
        if kind == "prefill":  # random tokens: nothing of them is cached
            rng = random.Random(seed)
            prompt = [rng.randrange(4, 4096) for _ in range(3500)]
            connection.sendall(request({"model": MODEL, "prompt": prompt, "max_tokens": 100}))
            server.wait_for(lambda m: m["vllm:num_requests_running"] == 1)
        else:
            connection.sendall(long_request(book, stream=kind == "decode", temperature=1))
            written = before["vllm:generation_tokens_total"]
            server.wait_for(lambda m: m["vllm:generation_tokens_total"] > written + 3)
    after = server.wait_until_idle()
    aborted = "vllm:request_success_total{finished_reason=abort}"
    assert after[aborted] == before[aborted] + 1
    dropped = "spot:dropped_connections_total{reason=gone}"
    assert after[dropped] == before[dropped] + 1


def test_who_does_not_read_is_dropped(start, book):
    slow = start("--cache-gib", "0.2", "--max-tokens", "1024", "--max-buffered-kib", "256", "--max-sequences", "32")
    body = {
        "model": MODEL,
        "prompt": book[:50],
        "ignore_eos": True,
        "stream": True,
        "n": 32,
        "logprobs": 20,
        "temperature": 1,
    }
    with slow.socket() as connection:  # who reads gets everything
        connection.sendall(request({**body, "max_tokens": 12}, Connection="close"))
        data = read_all(connection)
        assert len(data) > 200_000 and events_of(data)[-1] == "[DONE]"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", slow.port))
        connection.sendall(request({**body, "max_tokens": 900}))
        after = slow.wait_for(lambda m: m["spot:dropped_connections_total{reason=slow}"] == 1, seconds=120)
        assert after["vllm:generation_tokens_total"] < 32 * 900
    slow.wait_until_idle()
    assert slow.stop()[0] == 0


def test_full_queue_says_when_to_come_back(server, book):
    with server.socket() as first, server.socket() as second:
        first.sendall(long_request(book, n=16))
        server.wait_for(lambda m: m["vllm:num_requests_running"] == 8 and m["vllm:num_requests_waiting"] == 8)
        second.sendall(long_request(book))
        status, headers, body, _ = read_reply(second)
        assert status == 429 and 0 < int(headers["retry-after"]) < 120
        assert json.loads(body)["error"]["code"] == "queue_full"
        start = time.monotonic()  # while the engine works
        assert server.get("/health") and server.metrics()["vllm:num_requests_waiting"] == 8
        assert time.monotonic() - start < 30
    server.wait_until_idle()


def test_too_many_connections(start):
    small = start("--cache-gib", "0.05", "--max-tokens", "256", "--max-connections", "3")
    held = [small.socket() for _ in range(3)]
    for connection in held:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection)[0] == 200
    with small.socket() as connection:
        status, headers, _, _ = read_reply(connection)
        assert status == 503 and 0 < int(headers["retry-after"]) < 120
    held.pop().close()
    for _ in range(100):
        with small.socket() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            if read_reply(connection)[0] == 200:
                break
        time.sleep(0.05)
    else:
        pytest.fail("a place that became free was not given away")
    assert small.stop()[0] == 0  # idle connections do not hold it up


def processor_seconds(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_descriptors_that_end_cost_no_time_and_come_back(start):
    server = start("--max-connections", "4096")
    limit = 20 + len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    held = [server.socket() for _ in range(60)]  # the system takes them; the server can accept 20
    time.sleep(1)
    before = processor_seconds(server.process)
    time.sleep(3)
    assert processor_seconds(server.process) - before < 1.5
    for connection in held:
        connection.close()
    assert json.loads(server.get("/health")) == {"status": "ok"}


def test_bodies_that_never_end_leave_the_memory_alone(server):
    """At most 16 of the largest at once (here 1 MiB): the others are told to come back."""
    part = (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1048576\r\n\r\n"
        + b" " * 1000000
    )
    with contextlib.ExitStack() as all_of_them:
        held = [all_of_them.enter_context(contextlib.closing(server.socket())) for _ in range(24)]
        refused = 0
        for connection in held:
            with contextlib.suppress(ConnectionError):
                connection.sendall(part)
        time.sleep(2)
        for connection in select.select(held, [], [], 10)[0]:
            with contextlib.suppress(ConnectionError):
                status, headers, _, _ = read_reply(connection)
                refused += status == 503 and 0 < int(headers["retry-after"]) < 120
        assert 5 <= refused <= 10
    for _ in range(100):  # they have gone
        with contextlib.closing(server.socket()) as connection:
            connection.sendall(request({"prompt": "a"}, "/tokenize"))
            if read_reply(connection)[0] == 200:
                break
        time.sleep(0.05)
    else:
        pytest.fail("room that became free was not given away")


def test_depth_within_a_text_does_no_harm(server):
    """Arguments of a tool call are JSON in a text: a level of nesting costs one byte, and a stack."""
    for depth in (100, 400_000):
        call = {"function": {"name": "f", "arguments": '{"a":' + "[" * depth + "]" * depth + "}"}}
        messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "a"}]
        with contextlib.closing(server.socket()) as connection:
            connection.sendall(request({"messages": messages}, "/tokenize"))
            assert read_reply(connection)[0] == 200
    assert json.loads(server.get("/health")) == {"status": "ok"}


def events_of(data):
    return [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]


def test_sigterm_lets_answers_end(start, book):
    ending = start("--cache-gib", "0.05", "--max-tokens", "1024")
    with ending.socket() as connection, ending.socket() as late:
        connection.sendall(
            request({"model": MODEL, "prompt": book[:60], "max_tokens": 60, "stream": True, "ignore_eos": True})
        )
        assert connection.recv(8) == b"HTTP/1.1"
        late.sendall(request({"model": MODEL, "prompt": "a"})[:-5])  # a request that is not there yet
        ending.process.send_signal(signal.SIGTERM)
        data = read_all(connection)
        assert events_of(data)[-1] == "[DONE]"
        assert json.loads(events_of(data)[-2])["choices"][0]["finish_reason"] == "length"
        with pytest.raises(OSError):  # a second later nothing listens
            for _ in range(100):
                ending.socket().close()
                time.sleep(0.05 * SLOWER)
    assert ending.process.wait(30) == 0


def test_sigterm_twice_ends_at_once(start, book):
    ending = start("--cache-gib", "0.1", "--max-tokens", "4096")
    body = {"model": MODEL, "prompt": book[:60], "max_tokens": 3900, "ignore_eos": True}
    with ending.socket() as stream, ending.socket() as whole:
        stream.sendall(request({**body, "stream": True}))
        assert stream.recv(8) == b"HTTP/1.1"
        whole.sendall(request(body))
        ending.wait_for(lambda m: m["vllm:num_requests_running"] == 2)
        ending.process.send_signal(signal.SIGTERM)
        # Who connects meanwhile is told, by which a load balancer knows.
        end = time.monotonic() + 30 * SLOWER
        while True:
            assert time.monotonic() < end
            with ending.socket() as new:
                new.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                status, headers, _, _ = read_reply(new)
                if status == 503:
                    assert headers["connection"] == "close" and read_all(new) == b""
                    break
        with ending.socket() as new:
            new.sendall(request(body))
            status, headers, _, _ = read_reply(new)
            assert status == 503 and int(headers["retry-after"]) == 10
        ending.process.send_signal(signal.SIGTERM)
        events = events_of(read_all(stream))
        assert "error" in json.loads(events[-1]) and "[DONE]" not in events
        assert all(json.loads(e)["choices"][0]["finish_reason"] is None for e in events[:-1])
        status, headers, _, _ = read_reply(whole)
        assert status == 503 and 0 < int(headers["retry-after"]) < 120
    assert ending.process.wait(30) == 0


def test_kill_marks_nothing_finished(start, book):
    killed = start("--cache-gib", "0.1", "--max-tokens", "4096")
    finished, chunks, whole = [], 0, None
    stream = killed.client().completions.create(
        model=MODEL, prompt=book[:60], max_tokens=3900, stream=True, extra_body={"ignore_eos": True}
    )
    with killed.socket() as other:
        other.sendall(request({"model": MODEL, "prompt": "a", "max_tokens": 3900, "ignore_eos": True}))
        with pytest.raises((openai.OpenAIError, Exception)) as caught:
            for chunk in stream:
                chunks += 1
                finished.append(chunk.choices[0].finish_reason)
                if chunks == 5:
                    killed.process.kill()
        assert not isinstance(caught.value, AssertionError)
        try:
            whole = read_all(other)
        except ConnectionError:
            whole = b""
    assert chunks >= 5 and not any(finished) and whole == b""
    again = start("--cache-gib", "0.1", "--max-tokens", "4096")
    assert again.client().completions.create(model=MODEL, prompt="a", max_tokens=2).usage.completion_tokens <= 2
    assert again.stop()[0] == 0


def test_a_taken_port_and_bad_options_are_told(server, build_folder, tiny_qwen3, tmp_path):
    def said(*options):
        command = [build_folder / "spot", "serve", "--max-tokens", "64", *options]
        if "--model" not in options:
            command.insert(2, tiny_qwen3)
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120 * SLOWER)
        lines = [
            line for line in done.stderr.splitlines() if not line.startswith("Loading ")
        ]  # shown where it takes long
        assert done.returncode == 1 and len(lines) == 1
        return done.stderr

    assert "cannot be listened on" in said("--port", str(server.port))
    # Known before the weights are read: these cannot be.
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_qwen3.iterdir():
        if path.is_file():
            (model / path.name).write_bytes(b"" if path.suffix == ".safetensors" else path.read_bytes())
    assert "cannot be listened on" in said("--model", str(model), "--port", str(server.port))
    assert "--selector" in said("--attention", "spot")
    assert "room for" in said("--cache-gib", "0.0001")
    empty = tmp_path / "key"
    empty.write_text("\n")
    assert "no API key" in said("--api-key-file", str(empty))
    for several in ("one\ntwo\n", "one\ttwo", "\nkey\n", "one\0"):
        empty.write_text(several)
        assert "on one line" in said("--api-key-file", str(empty))
