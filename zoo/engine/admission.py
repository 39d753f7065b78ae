"""What the engine can take: prompts within the vocabulary, the context and the cache's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from zoo.asking import check_count
from zoo.engine.memory import Memory
from zoo.engine.request import Request, nothing_guesses
from zoo.registry.errors import CapacityError, RequestError


class Admission:
    """The limits of every request: prompt and generated tokens together are at most `max_context`."""

    def __init__(self, vocab_size: int, max_context: int, memory: Memory, *, drafts: bool = False) -> None:
        self.vocab_size, self.max_context, self.memory, self.drafts = vocab_size, max_context, memory, drafts
        self.cacheable = memory.longest(max_context)

    def allowed(self, request: Request) -> int:
        """How many tokens the request may generate.

        Raises RequestError for ids outside the vocabulary and for a prompt longer than the context, CapacityError
        for what could never fit in the cache, even alone. An open `max_tokens` is bounded by context and cache.
        """
        length, params = len(request.prompt), request.params
        self.check_prompt(request.prompt)
        self._check_ids("stop_ids", params.stop_ids)
        if params.drafts and not self.drafts:
            raise nothing_guesses(params.drafts)
        if params.logprobs is not None and params.logprobs > self.vocab_size:
            raise RequestError(
                "out of range",
                where="logprobs",
                found=str(params.logprobs),
                expected=f"at most {self.vocab_size}, the size of the vocabulary",
            )
        room = self.max_context - length
        # The last generated token is never fed back, so it needs no cache.
        if params.max_tokens is None:
            self._check_room(length)
            return min(room, self.cacheable + 1 - length)
        allowed = min(room, params.max_tokens)
        if allowed or params.prompt_logprobs:
            self._check_room(length + max(allowed - 1, 0))
        return allowed

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Refuse ids outside the vocabulary and more tokens than the context."""
        self._check_ids("prompt", prompt)
        check_length(prompt, self.max_context)

    def _check_room(self, tokens: int) -> None:
        if tokens > self.cacheable:
            raise CapacityError(
                "the request does not fit in the cache's memory",
                where="memory",
                found=f"{self.memory.budget} bytes, room for {self.cacheable} tokens",
                expected=f"{self.memory.cost(tokens)} bytes for {tokens} tokens",
                hint="lower max_tokens, shorten the prompt, or give the cache more memory",
            )

    def _check_ids(self, where: str, ids: Sequence[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            place, wrong = next((i, t) for i, t in enumerate(ids) if not 0 <= t < self.vocab_size)
            raise RequestError(
                "a token id is not in the vocabulary",
                where=f"{where}[{place}]",
                found=str(wrong),
                expected=f"0 to {self.vocab_size - 1}",
            )


def check_length(prompt: Sequence[int], max_context: int) -> None:
    """Refuse more tokens than the context."""
    if len(prompt) > max_context:
        raise RequestError(
            "the prompt is longer than the context",
            where="prompt",
            found=f"{len(prompt)} tokens",
            expected=f"at most {max_context}, prompt and answer together",
            hint="shorten the prompt, or load with a larger max_context where the model has one",
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an engine takes at most: sequences that run together, tokens of one of them, rows of a step."""

    max_batch_size: int
    max_context: int
    chunk_tokens: int

    def check(self, context_length: int) -> None:
        """Refuse sizes below 1 and a max_context beyond the model's. Raises RequestError naming the size."""
        for name, size in asdict(self).items():
            check_count(name, size)
        if self.max_context > context_length:
            raise RequestError(
                "out of range",
                where="max_context",
                found=str(self.max_context),
                expected=f"at most {context_length}, the model's context_length",
            )
