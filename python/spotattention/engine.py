"""The C++ engine: many requests through one model by continuous batching over a paged cache, with a prefix cache."""

import json
import os
import pathlib
import re
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from spotattention import _library, arguments  # the operators, which the engine's library needs
from spotattention.self_check import Judge

_MOST = 2**40  # of an engine's sizes

Prompt = str | Sequence[int] | torch.Tensor


class AttendedTokens(NamedTuple):
    """Tokens that sparse queries attended to in one layer, summed over an answer's queries."""

    layer: int
    queries: float
    attended: float
    visible: float


@dataclass
class Event:
    """One token of an answer, its end, or both."""

    request: int
    completion: int  # which answer of the request
    token: int | None = None
    logprob: float | None = None  # with logprobs
    top: list[tuple[int, float]] = field(default_factory=list)  # the likeliest tokens and their log-probabilities
    text: str = ""  # what the token completes; never part of a stop string
    finish: str | None = None  # "stop", "length", "cancelled" or "error"
    error: str = ""
    attended: list[AttendedTokens] = field(default_factory=list)  # with `finish`, by layer where the method is sparse


@dataclass
class Answer:
    """One answer of a request, whole."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # with logprobs
    text: str = ""
    finish: str = ""
    attended: list[AttendedTokens] = field(default_factory=list)


def _load() -> None:
    path = pathlib.Path(
        os.environ.get("SPOT_ENGINE_LIBRARY", pathlib.Path(__file__).parent / "lib" / "libspot_engine.so")
    )
    if not path.is_file():
        raise ImportError(f"{path} does not exist; install spotattention, or name the library in SPOT_ENGINE_LIBRARY")
    try:
        torch.classes.load_library(str(path))
    except OSError as error:
        raise ImportError(_library.mismatch() or f"{path} could not be loaded: {error}") from error


class Engine:
    """A model of the families that `spot` runs, its selector, and the methods that requests may name.

    model: a Hugging Face folder, or ORG/NAME that the local hub cache holds. selector: a folder, or the NAME of one in
    MODEL/selectors. methods: as `spot eval --methods` takes them ("dense", "spot:p=0.9", "quest:k=10%"); the first one
    is a request's unless it says otherwise; by default spot with a selector, else dense. cache_tokens: room for keys and
    values, over all sequences. device and dtype "auto": CUDA where there is one, the checkpoint's dtype there and float32
    on the CPU. kv_cache_dtype: "auto", keys and values in the model's dtype, or "fp8", a byte a number (E4M3, a scale a
    layer and KV head), which serves every method but quest and twilight.

    Self-check: of every answer one decode step in self_check (0: none) runs eagerly and is compared with exact attention;
    `captured_mass` keeps the means by layer, and a layer whose mean falls below least_captured is warned about once. A
    selector that was distilled on other weights of the same architecture is warned of and checked every 16 steps.

    Not thread-safe. Text of float32 models does not depend on what shares the engine. Raises RuntimeError in one
    sentence on a folder, selector or method that does not fit, TypeError or ValueError on an argument of another type.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        selector: str | os.PathLike | None = None,
        methods: Sequence[str] = (),
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        cache_tokens: int = 32768,
        max_sequences: int = 16,
        max_step_tokens: int = 2048,
        prefix_cache: bool = True,
        graphs: bool = True,
        self_check: int = 256,
        least_captured: float = 0.5,
    ) -> None:
        model = arguments.path("model", model)
        selector = "" if selector is None else arguments.path("selector", selector)
        self.methods = arguments.texts("methods", methods) or ["spot" if selector else "dense"]
        self_check = arguments.whole("self_check", self_check)
        least_captured = arguments.number("least_captured", least_captured)
        if self_check < 0 or not 0 <= least_captured <= 1:
            raise ValueError("self_check must be 0 or more, and least_captured 0 to 1")
        options = {
            "device": arguments.text("device", device, "the text auto, cpu, cuda or cuda:N"),
            "dtype": arguments.text("dtype", dtype, "the text auto, float32, bfloat16 or float16"),
            "kv_cache_dtype": arguments.text("kv_cache_dtype", kv_cache_dtype, "the text auto or fp8"),
            "cache_tokens": arguments.whole("cache_tokens", cache_tokens, 1, _MOST),
            "max_sequences": arguments.whole("max_sequences", max_sequences, 1, _MOST),
            "max_step_tokens": arguments.whole("max_step_tokens", max_step_tokens, 1, _MOST),
            "prefix_cache": arguments.flag("prefix_cache", prefix_cache),
            "graphs": arguments.flag("graphs", graphs),
            "self_check": self_check,
        }
        _load()
        self._judge = Judge(least_captured)
        self._kept: list[Event] = []  # not yet handed out
        self._awaited: set[int] = set()  # requests whose events are for stream or generate, not for step
        try:
            self._engine = torch.classes.spot.Engine(model, selector, self.methods, json.dumps(options))
        except RuntimeError as error:  # which may advise an option of the command line
            raise RuntimeError(
                re.sub(
                    r"(?<= )--(selector|dtype|kv-cache-dtype)\b",
                    lambda flag: f"the argument {flag[1].replace('-', '_')}",
                    str(error),
                )
            ) from None
        if foreign := self._engine.foreign():
            warnings.warn(foreign, RuntimeWarning, stacklevel=2)

    def add(
        self,
        prompt: Prompt,
        *,
        method: str | None = None,
        max_new_tokens: int = 256,
        completions: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int = 42,
        logprobs: int = -1,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
    ) -> int:
        """Queues a request and returns its number; its events come from `step`.

        prompt: token ids, or a text that the model's tokenizer encodes. method: one of `methods`. temperature 0 is
        greedy; the sampler's settings are applied in the order of transformers' generate. Answer i of `completions`
        draws with seed + i. logprobs: of the token and of so many likeliest ones (-1: none). stop: texts that end an
        answer and are no part of it; stop_ids: likewise tokens, by default the model's own (an empty list: none).

        Raises ValueError for a method that the engine has not, TypeError or ValueError for an argument that is of another
        type or not finite, RuntimeError when the request is out of range or longer than model or cache can hold; then
        nothing has changed.
        """
        if method is not None and method not in self.methods:
            raise ValueError(f"the engine has no method '{method}'; it was made with {', '.join(self.methods)}")
        if logit_bias is not None and not isinstance(logit_bias, Mapping):
            raise arguments.wrong_type("logit_bias", logit_bias, "a dict of token ids and numbers")
        whole, number = arguments.whole, arguments.number
        request = {
            "max_new_tokens": whole("max_new_tokens", max_new_tokens),
            "completions": whole("completions", completions),
            "temperature": number("temperature", temperature),
            "top_k": whole("top_k", top_k),
            "top_p": number("top_p", top_p),
            "min_p": number("min_p", min_p),
            "repetition_penalty": number("repetition_penalty", repetition_penalty),
            "presence_penalty": number("presence_penalty", presence_penalty),
            "frequency_penalty": number("frequency_penalty", frequency_penalty),
            "logit_bias": [
                [whole("a token of logit_bias", token, 0, arguments.MOST_TOKEN), number(f"logit_bias[{token}]", bias)]
                for token, bias in (logit_bias or {}).items()
            ],
            "seed": whole("seed", seed, most=2**64 - 1),
            "logprobs": whole("logprobs", logprobs),
            "stop": arguments.texts("stop", [stop] if isinstance(stop, str) else stop),
            "stop_ids": None if stop_ids is None else arguments.token_ids("stop_ids", stop_ids),
        }
        chosen = 0 if method is None else self.methods.index(method)
        return self._engine.add(self.encode(prompt), chosen, json.dumps(request))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; a text gets the special tokens that its tokenizer adds."""
        if isinstance(prompt, str):
            return self._engine.encode(arguments.text("prompt", prompt))
        return arguments.token_ids("prompt", prompt, "a text or a list of token ids")

    def step(self) -> list[Event]:
        """One forward pass and what it brought; nothing when idle. What a `stream` waits for is left to it."""
        self._kept += self._advance()
        events = [event for event in self._kept if event.request not in self._awaited]
        self._kept = [event for event in self._kept if event.request in self._awaited]
        return events

    def _advance(self) -> list[Event]:
        events = []
        for made in json.loads(self._engine.step()):
            attended = [AttendedTokens(*layer) for layer in made.pop("attended", [])]
            top = [(token, logprob) for token, logprob in made.pop("top", [])]
            events.append(Event(**made, top=top, attended=attended))
        if any(event.finish for event in events):
            for layer, samples, mean in json.loads(self._engine.captured()):
                self._judge(layer, samples, mean)
        return events

    @property
    def captured_mass(self) -> dict[int, float]:
        """By layer, the mean over the sampled steps of all sparse methods."""
        return {layer: mean for layer, _, mean in json.loads(self._engine.captured())}

    def cancel(self, request: int) -> None:
        """Ends a request; its pages are free at once, and a `stream` of it ends. Unknown and finished ones are let pass."""
        request = arguments.whole("request", request)
        self._engine.cancel(request)
        self._awaited.discard(request)
        self._kept = [event for event in self._kept if event.request != request]

    @property
    def idle(self) -> bool:
        """Whether no request is in progress and `step` has no more events."""
        return self._engine.idle() and all(event.request in self._awaited for event in self._kept)

    @property
    def statistics(self) -> dict[str, Any]:
        """Tokens read, cached and decoded, steps, preemptions, seconds in prefill and decode, running and waiting."""
        return json.loads(self._engine.statistics())

    def stream(self, prompt: Prompt, **request: Any) -> Iterator[Event]:
        """The events of one request of `add`'s arguments, as they come; others go on beside it, streams too, their events
        wait for `step` or their stream. Leaving early cancels the request.
        """
        number = self.add(prompt, **request)
        self._awaited.add(number)
        left = request.get("completions", 1)
        try:
            while left and number in self._awaited:  # until it is cancelled
                for event in self._take({number}):
                    left -= event.finish is not None
                    yield event
                    if number not in self._awaited:
                        break
        finally:
            self.cancel(number)

    def generate(self, prompts: Sequence[Prompt], **request: Any) -> list[list[Answer]]:
        """Adds all prompts and steps until they are answered: a list of `completions` answers for each.

        Raises RuntimeError when a request is refused (then none runs) or ends with an error. After any exception, that of
        an interruption too, none of the prompts is in progress any more.
        """
        prompts = arguments.items("prompts", prompts, "a list of prompts")
        answers: dict[int, list[Answer]] = {}
        left = 0
        try:
            for prompt in prompts:
                number = self.add(prompt, **request)
                answers[number] = [Answer() for _ in range(request.get("completions", 1))]
                self._awaited.add(number)
                left += len(answers[number])
            while left:
                for event in self._take(answers):
                    left -= event.finish is not None
                    self._accept(answers[event.request][event.completion], event, request.get("logprobs", -1))
        finally:
            for number in answers:
                self.cancel(number)
        return list(answers.values())

    def _take(self, numbers: Container[int]) -> list[Event]:
        """What is there of some requests, or what the next step brings of them; the events of others are kept."""
        if not any(event.request in numbers for event in self._kept):
            self._kept += self._advance()
        mine = [event for event in self._kept if event.request in numbers]
        self._kept = [event for event in self._kept if event.request not in numbers]
        return mine

    @staticmethod
    def _accept(answer: Answer, event: Event, logprobs: int) -> None:
        if event.finish == "error":
            raise RuntimeError(event.error)
        if event.token is not None:
            answer.tokens.append(event.token)
            if logprobs >= 0:
                answer.logprobs.append(event.logprob)
        answer.text += event.text
        if event.finish is not None:
            answer.finish, answer.attended = event.finish, event.attended
