"""An open-arrival load on an OpenAI completions server: Poisson arrivals, prompts of random tokens, every answer streamed and
timed token by token. Nothing but Python's own library."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
import urllib.parse
import urllib.request


@dataclasses.dataclass
class Load:
    """What is asked of a server: `requests` prompts of `prompt_tokens` random ids each, answers of `answer_tokens` (end tokens
    ignored), arriving at `rate` a second (None: all at once), the gaps exponential. Ids come from [first_id, end_id); equal seeds
    give equal loads. `fields` are added to every body, such as {"attention": "dense"}."""

    requests: int
    prompt_tokens: int
    answer_tokens: int
    rate: float | None = None
    first_id: int = 300
    end_id: int = 4000
    seed: int = 1
    fields: dict = dataclasses.field(default_factory=dict)

    def arrivals(self) -> list[float]:
        """Seconds from the start, ascending; the first request comes at once."""
        generator = random.Random(self.seed)
        times, now = [], 0.0
        for _ in range(self.requests):
            times.append(now)
            now += generator.expovariate(self.rate) if self.rate else 0.0
        return times

    def bodies(self, model: str) -> list[bytes]:
        generator = random.Random(self.seed ^ 0x5EED)
        bodies = []
        for number in range(self.requests):
            body = {
                "model": model,
                "prompt": [generator.randrange(self.first_id, self.end_id) for _ in range(self.prompt_tokens)],
                "max_tokens": self.answer_tokens,
                "temperature": 0,
                "seed": number,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                **self.fields,
            }
            bodies.append(json.dumps(body).encode())
        return bodies


@dataclasses.dataclass
class Answer:
    """One request's times, in seconds of one clock. `events` are the arrivals of pieces with new tokens."""

    sent: float = 0.0
    events: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    finish: str | None = None
    done: bool = False  # the stream ended with [DONE]
    error: str = ""

    @property
    def whole(self) -> bool:
        return self.done and self.finish is not None and not self.error


class Stream:
    """Reads the server-sent events of one HTTP/1.1 reply, chunked or not, however its bytes are cut."""

    def __init__(self, reader: asyncio.StreamReader):
        self.reader = reader

    async def status(self) -> tuple[int, dict[str, str]]:
        line = (await self.reader.readline()).split()
        if len(line) < 2 or not line[1].isdigit():
            raise ConnectionError("the server ended the connection before it answered")
        headers = {}
        while (line_ := (await self.reader.readline()).strip()) != b"":
            name, _, value = line_.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(line[1]), headers

    async def pieces(self, headers: dict[str, str]):
        """The body as it comes. Raises ConnectionError where it is cut."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                line = await self.reader.readline()
                if not line.strip():
                    raise ConnectionError("the reply was cut")
                size = int(line.split(b";")[0], 16)
                data = await self._exactly(size + 2)
                if size == 0:
                    return
                yield data[:size]
        left = int(headers.get("content-length", -1))
        while left != 0:
            data = await self.reader.read(65536 if left < 0 else min(left, 65536))
            if not data:
                if left > 0:
                    raise ConnectionError("the reply was cut")
                return
            left -= len(data) if left > 0 else 0
            yield data

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self.reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the reply was cut") from error

    async def events(self, headers: dict[str, str]):
        """The `data:` of each event, comments left out."""
        held = b""
        async for piece in self.pieces(headers):
            held += piece.replace(b"\r\n", b"\n")
            while b"\n\n" in held:
                event, held = held.split(b"\n\n", 1)
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        yield line[5:].strip()


def take(answer: Answer, event: bytes, now: float) -> None:
    """One event of a stream into `answer`."""
    if event == b"[DONE]":
        answer.done = True
        return
    chunk = json.loads(event)
    if "error" in chunk:
        answer.error = str(chunk["error"].get("message", chunk["error"]))
        return
    before = answer.tokens
    if chunk.get("usage"):
        answer.tokens = chunk["usage"]["completion_tokens"]
    elif any(choice.get("text") for choice in chunk.get("choices", [])):
        answer.tokens += 1
    # The last piece repeats the count and brings no token.
    if answer.tokens > before and chunk.get("choices"):
        answer.events.append(now)
    for choice in chunk.get("choices", []):
        answer.finish = choice.get("finish_reason") or answer.finish


async def ask(address: tuple[str, int], head: bytes, body: bytes, clock=time.perf_counter) -> Answer:
    answer = Answer(sent=clock())
    writer = None
    try:
        reader, writer = await asyncio.open_connection(*address, limit=1 << 24)
        writer.write(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        stream = Stream(reader)
        status, headers = await stream.status()
        if status != 200:
            text = b"".join([piece async for piece in stream.pieces(headers)])
            answer.error = f"status {status}: {text.decode(errors='replace')[:200]}"
            return answer
        async for event in stream.events(headers):
            take(answer, event, clock())
        if not answer.done and not answer.error:
            answer.error = "the stream ended without [DONE]"
    except (OSError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        if writer:
            writer.close()
    return answer


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all do not pass; nan of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1e6) * len(ordered) // 1_000_000) - 1)]


def summary(answers: list[Answer]) -> dict:
    """requests and tokens a second from the first request sent to the last token; times to the first token and between tokens in
    milliseconds, of whole answers alone."""
    whole = [answer for answer in answers if answer.whole]
    firsts = [1e3 * (answer.events[0] - answer.sent) for answer in whole if answer.events]
    gaps = [1e3 * (b - a) for answer in whole for a, b in zip(answer.events, answer.events[1:])]
    ends = [answer.events[-1] for answer in whole if answer.events]
    seconds = max(ends) - min(answer.sent for answer in answers) if ends else float("nan")
    return {
        "requests": len(answers),
        "whole": len(whole),
        "errors": sorted({answer.error for answer in answers if answer.error})[:3],
        "tokens": sum(answer.tokens for answer in whole),
        "seconds": seconds,
        "requests_per_second": len(whole) / seconds,
        "tokens_per_second": sum(answer.tokens for answer in whole) / seconds,
        "first_token_ms": {"p50": percentile(firsts, 0.5), "p99": percentile(firsts, 0.99)},
        "between_tokens_ms": {"p50": percentile(gaps, 0.5), "p99": percentile(gaps, 0.99)},
    }


async def send(url: str, model: str, load: Load, api_key: str = "", timeout: float | None = None) -> list[Answer]:
    """All of a load; answers in the order of sending. Those that are not there after `timeout` seconds are given up."""
    parts = urllib.parse.urlsplit(url)
    address = (parts.hostname, parts.port or 80)
    head = f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    arrivals, bodies = load.arrivals(), load.bodies(model)
    start = time.perf_counter()

    async def one(number: int) -> Answer:
        await asyncio.sleep(max(0.0, start + arrivals[number] - time.perf_counter()))
        work = ask(address, head.encode(), bodies[number])
        try:
            left = None if timeout is None else max(0.01, start + timeout - time.perf_counter())
            return await asyncio.wait_for(work, left)
        except asyncio.TimeoutError:
            return Answer(sent=start + arrivals[number], error="no answer in time")

    return await asyncio.gather(*(one(number) for number in range(load.requests)))


def served_model(url: str, api_key: str = "") -> dict:
    """The first entry of /v1/models."""
    request = urllib.request.Request(url.rstrip("/") + "/v1/models")
    if api_key:
        request.add_header("Authorization", "Bearer " + api_key)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["data"][0]


def metric(url: str, name: str) -> float | None:
    """The sum of a counter of /metrics over its labels; None where the server has no such."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        return None
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
    return sum(values) if values else None


def measure(url: str, model: str, load: Load, api_key: str = "", timeout: float | None = None) -> dict:
    """summary() of a load, and how many prompt tokens the server took from its prefix cache on the way (None: unknown)."""
    hits = "vllm:prefix_cache_hits_total"
    before = metric(url, hits)
    result = summary(asyncio.run(send(url, model, load, api_key, timeout)))
    after = metric(url, hits)
    result["prefix_hits"] = None if before is None or after is None else after - before
    return result
