"""What callers send to the engine and what they get back."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from zoo.asking import whole
from zoo.registry.errors import RequestError, ZooError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.text.answer import AnswerForm
    from zoo.text.calls import ToolCall
    from zoo.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _all(values: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, list | tuple | set | frozenset) and all(map(holds, values))


# Option -> what it may hold, as a test and in words.
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda v: v is None or (whole(v) and v >= 0), "a whole number, 0 or more, or None"),
    "temperature": (lambda v: _real(v) and v >= 0, "a finite number, 0 or more"),
    "top_p": (lambda v: _real(v) and 0 < v <= 1, "a number above 0, at most 1"),
    "top_k": (lambda v: whole(v) and v >= 0, "a whole number, 0 (off) or more"),
    "min_p": (lambda v: _real(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "seed": (lambda v: v is None or (whole(v) and -(2**63) <= v < 2**64), "a whole number of 64 bits, or None"),
    "stop": (lambda v: _all([v] if isinstance(v, str) else v, _text), "texts, none of them empty"),
    "stop_ids": (lambda v: _all(v, lambda i: whole(i) and i >= 0), "token ids"),
    "ignore_eos": (lambda v: isinstance(v, bool), "True or False"),
    "logprobs": (lambda v: v is None or (whole(v) and v >= 0), "a whole number, 0 or more, or None"),
    "prompt_logprobs": (lambda v: isinstance(v, bool), "True or False"),
    "adapter": (lambda v: v is None or _text(v), "the name of a loaded adapter, auto, or None"),
    "drafts": (lambda v: v is None or (whole(v) and v >= 0), "a whole number, 0 (off) or more, or None"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. A value out of range raises RequestError.

    max_tokens: at most so many new tokens; None: as many as context and cache memory allow; 0 makes none (with
        `prompt_logprobs`, the prompt is only scored). temperature: 0 (the default, or None) takes the likeliest token.
    top_k: sample among the k likeliest, 0 or None for all. top_p: the smallest set of likeliest tokens whose share
        reaches top_p (after top_k). min_p: drop tokens less likely than min_p times the likeliest.
    seed: same seed and prompt, same tokens, in whatever batch; None draws one, which the Completion tells.
    stop: texts that end the answer; they and what follows are not in its text.
    stop_ids: token ids that end it, beside the tokenizer's own; `ignore_eos` ignores the tokenizer's own only.
    logprobs: k >= 0 reports each new token's log-probability under the raw model (before temperature and filters)
        and the k best alternatives. prompt_logprobs: the same for the prompt's tokens.
    adapter: the name of a loaded adapter, None for the plain model; "auto": the one that `zoo.load` was given, if any.
    drafts: at most so many tokens are guessed ahead and checked at once; 0 turns that off; None leaves it to a model
        that was loaded with `draft`. The tokens are the same.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    adapter: str | None = "auto"
    drafts: int | None = None

    def __post_init__(self) -> None:
        for name, plain in (("temperature", 0.0), ("top_k", 0), ("stop", ()), ("stop_ids", ())):
            if getattr(self, name) is None:
                object.__setattr__(self, name, plain)
        for name, (holds, expected) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise RequestError("out of range", where=name, found=repr(value), expected=expected)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Params from keyword options; RequestError names an unknown one and those like it."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(
                    "unknown option", where=name, expected=f"one of {', '.join(known)}", hint=nearest(name, known)
                )
        return cls(**options)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken whatever the seed."""
        return self.temperature == 0 or self.top_k == 1


def nothing_guesses(drafts: int) -> RequestError:
    """The error for a request with drafts to a model for which nothing guesses."""
    return RequestError(
        "nothing guesses tokens for this model",
        where="drafts",
        found=str(drafts),
        expected="0 or None",
        hint="load it with draft='lookup' (`--draft lookup`), or with a smaller model of the same vocabulary",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """A prepared image or sound. encoder: the node of the model that reads it, such as vision. data: as it takes it."""

    encoder: str
    data: Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of token ids, with a tokenizer when text is wanted; without one, `Completion.text` is empty.

    continues: the answer goes on from the prompt's last word (see zoo.text.detokenize).
    form: how to take the answer apart into text, thinking and tool calls; None leaves all of it as text.
    media: images and sounds, in the order of the prompt's tokens for them.
    request_id: a name of the caller's choice, unique among unfinished requests; None lets the engine number it.
    Raises RequestError for an empty prompt, for what is not token ids, and for stop texts without a tokenizer.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    tokenizer: Tokenizer | None = None
    continues: bool = False
    request_id: str | None = None
    form: AnswerForm | None = None
    media: Sequence[Media] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", token_ids(self.prompt))
        if self.params.stop and self.tokenizer is None:
            raise RequestError(
                "stop texts need a tokenizer",
                where="stop",
                found=repr(list(self.params.stop)),
                expected="stop_ids, which work on token ids",
            )


def token_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    """The prompt as a tuple of ints; RequestError when it is empty or holds anything else."""
    try:
        ids = tuple(map(operator.index, prompt))
    except TypeError:
        raise _no_ids(prompt) from None
    if not ids:
        raise RequestError(
            "the prompt is empty",
            where="prompt",
            found="no tokens",
            expected="at least one token",
            hint="an empty text needs its beginning-of-sequence token",
        )
    return ids


def _no_ids(prompt: object) -> RequestError:
    """The error for a prompt of other things than whole numbers, which names the first of them."""
    where, found = "prompt", type(prompt).__name__
    for place, item in enumerate(prompt if isinstance(prompt, list | tuple) else ()):
        if not hasattr(item, "__index__"):
            where, found = f"prompt[{place}]", repr(item)[:80]
            break
    return RequestError("the prompt is not a sequence of token ids", where=where, found=found, expected="whole numbers")


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. completion_tokens is the length of `Completion.tokens`; cached_tokens were not computed again.

    drafted_tokens: guessed ahead and checked; accepted_tokens: those of them that were right.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the wall clock, and tokens after the first per second of `decode_s` (0.0 when there was none).

    queue_s: from submission to the first computed row. prefill_s: from there to the first token.
    decode_s: from the first token to the end.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    tokens: the generated ids. A stop id is in neither `tokens` nor `text`; ids that spelled a stop text are in
    `tokens` while `text` ends before it. prompt_ids: the prompt as it was sent. seed: the one that was used.
    logprobs, top_logprobs (best first): one entry per token of `tokens` when asked for, else None.
    prompt_logprobs: one entry per prompt token when asked for, the first None because nothing precedes it.
    thinking: what a reasoning model wrote before its answer; not part of `text`.
    tool_calls: the calls that the model asks for. call_error: why a call that was cut or is faulty stands in `text`.
    """

    request_id: str
    text: str
    tokens: list[int]
    prompt_ids: list[int]
    finish_reason: FinishReason
    seed: int
    usage: Usage
    timings: Timings
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    call_error: str | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The answer as an assistant's message, to be appended to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = _calls(self.tool_calls)
        return message

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; prompt_tokens as a count, top_logprobs as lists of {id, logprob}, tool_calls in
        OpenAI's form."""
        return {
            **asdict(self),
            "prompt_tokens": self.usage.prompt_tokens,
            "top_logprobs": _listed(self.top_logprobs),
            "tool_calls": _calls(self.tool_calls),
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. Joined, the texts, tokens, logprobs and calls of all chunks are those of the Completion.

    text may lag behind tokens: it holds back split characters and what may become a stop text. thinking and
    tool_calls are increments too; a call is given when it is whole.
    finish_reason and completion stand in the last chunk only. error: why the engine gave the request up; such a
    chunk is the last one and has neither.
    """

    request_id: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    error: ZooError | None = None
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    call_error: str | None = None

    @property
    def last(self) -> bool:
        """Whether no chunk of this request follows."""
        return self.completion is not None or self.error is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "request_id": self.request_id,
            "text": self.text,
            "tokens": self.tokens,
            "logprobs": self.logprobs,
            "top_logprobs": _listed(self.top_logprobs),
            "finish_reason": self.finish_reason,
            "completion": self.completion.to_dict() if self.completion else None,
            "error": str(self.error) if self.error else None,
            "thinking": self.thinking,
            "tool_calls": _calls(self.tool_calls),
            "call_error": self.call_error,
        }


def _calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [call.to_dict() for call in calls]


def _listed(tops: list[dict[int, float]] | None) -> list[list[dict[str, float]]] | None:
    if tops is None:
        return None
    return [[{"id": token, "logprob": logprob} for token, logprob in top.items()] for top in tops]
