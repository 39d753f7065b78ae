"""A request on its way through the engine."""

from __future__ import annotations

import secrets
from time import perf_counter
from typing import TYPE_CHECKING

from zoo.engine.media import Placed, identity
from zoo.engine.output import Output
from zoo.engine.request import Chunk, Completion, FinishReason, Request, Timings, Usage
from zoo.registry.errors import ZooError
from zoo.text.answer import Answer

if TYPE_CHECKING:
    from zoo.engine.outcome import Outcome


NOWHERE = -1
"""The number of what has no room in the cache."""


class Sequence:
    """The tokens, progress and results of one request.

    number: order of arrival. tokens: prompt and generated ids. past: how many of them are cached. cache: its name there
    while it runs. cached_tokens: how many of the prompt's came from there. allowed: how many may be generated.
    media: images and sounds at their places. key: what its states depend on beside tokens and media.
    cuts: where its chunks are to end. begun: a step of it is under way, so that one row more than `past` may be cached.
    """

    def __init__(
        self,
        number: int,
        request_id: str,
        request: Request,
        allowed: int,
        media: list[Placed] | None = None,
        key: str = "",
    ) -> None:
        params, self.media = request.params, media or []
        self.number, self.request_id, self.params, self.allowed = number, request_id, params, allowed
        self.tokens = list(request.prompt)
        self.prompt_length = len(self.tokens)
        self.past = 0
        self.cache, self.key = NOWHERE, key
        self.cached_tokens: int | None = None
        self.cuts: set[int] = set()
        self.begun = False
        self._identity = identity(request.prompt, self.media)
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        own = () if request.tokenizer is None or params.ignore_eos else request.tokenizer.stop_ids
        self.stop_ids = frozenset(params.stop_ids).union(own)
        self.output = Output(request)
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.prompt_logprobs: list[float | None] = [None]
        self.submitted = perf_counter()
        self.started: float | None = None
        self.first: float | None = None
        self.drafted = self.accepted = 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def todo(self) -> int:
        """Tokens that are not cached yet: 1 while decoding."""
        return len(self.tokens) - self.past

    @property
    def rows(self) -> int:
        """How many of them a step may compute: up to the next cut."""
        return min((cut for cut in self.cuts if cut > self.past), default=len(self.tokens)) - self.past

    @property
    def reusable(self) -> int:
        """How many first tokens need not be computed: all but the last, and none whose logits are asked for."""
        last = len(self.tokens) - 1
        return min(last, len(self.prompt_logprobs) - 1) if self.scores else last

    @property
    def content(self) -> tuple[int, ...]:
        """Its tokens, those of images and sounds as what they show."""
        return (*self._identity, *self.tokens[self.prompt_length :]) if self.generated else self._identity

    @property
    def idle(self) -> bool:
        """Whether nothing needs to be computed for it: no token is allowed and none is to be scored."""
        return self.allowed == 0 and not self.scores

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        return self.params.prompt_logprobs and len(self.prompt_logprobs) < self.prompt_length

    def advance(self, rows: int, outcome: Outcome, drafted: int = 0) -> Chunk | None:
        """Move on by a step that computed `rows` of its tokens, the last `drafted` of them guesses; what came of it,
        None inside a prompt. Guesses that were wrong are not cached."""
        self.past += rows - drafted
        if outcome.broken is not None:
            return Chunk(self.request_id, error=self._not_finite(outcome.broken))
        self.prompt_logprobs += outcome.scores
        if not outcome.tokens:
            return None if self.todo else self.finish("length")
        right = len(outcome.tokens) - 1
        self.past += right
        self.drafted += drafted
        chunk = self._take(outcome)
        # Tokens behind one that ended the answer are dropped, cached or not.
        self.past = min(self.past, len(self.tokens))
        return chunk

    def _take(self, outcome: Outcome) -> Chunk:
        """Append the sampled tokens up to one that ends the answer; those behind it are dropped."""
        if self.first is None:
            self.first = perf_counter()
        start, new = len(self.tokens), Answer()
        reason: FinishReason | None = None
        for place, token in enumerate(outcome.tokens, 1):
            if token in self.stop_ids:
                reason = "stop"
                break
            self.tokens.append(token)
            self.accepted += place < len(outcome.tokens)
            new = new + self.output.push(token)
            if self.output.stopped or self.generated == self.allowed:
                reason = "length"
                break
        tokens = self.tokens[start:]
        logprobs = tops = None
        if outcome.logprobs is not None and outcome.tops is not None:
            logprobs, tops = outcome.logprobs[: len(tokens)], outcome.tops[: len(tokens)]
            self.logprobs += logprobs
            self.top_logprobs += tops
        if reason is None:
            return self._chunk(new, tokens, logprobs, tops)
        return self.finish(reason, new, tokens, logprobs, tops)

    def finish(
        self,
        reason: FinishReason,
        new: Answer | None = None,
        tokens: list[int] | None = None,
        logprobs: list[float] | None = None,
        tops: list[dict[int, float]] | None = None,
    ) -> Chunk:
        """The last chunk, with text that was held back. A stop text met turns the reason into "stop"."""
        rest = self.output.finish()
        reason = "stop" if self.output.stopped else reason
        completion = self._completion(reason)
        if self.params.logprobs is not None and logprobs is None:
            logprobs, tops = [], []
        return self._chunk(new + rest if new else rest, tokens or [], logprobs, tops, reason, completion)

    def _chunk(
        self,
        new: Answer,
        tokens: list[int],
        logprobs: list[float] | None,
        tops: list[dict[int, float]] | None,
        reason: FinishReason | None = None,
        completion: Completion | None = None,
    ) -> Chunk:
        return Chunk(
            self.request_id,
            new.text,
            tokens,
            logprobs,
            tops,
            reason,
            completion,
            thinking=new.thinking,
            tool_calls=new.tool_calls,
            call_error=new.call_error,
        )

    def _not_finite(self, position: int) -> ZooError:
        return ZooError(
            "the model computed logits that are not finite",
            where=f"{self.request_id}, position {position}",
            found="inf or nan",
            hint="the weights may be damaged, or the dtype too narrow: try dtype float32",
        )

    def _completion(self, reason: FinishReason) -> Completion:
        asked = self.params.logprobs is not None
        return Completion(
            request_id=self.request_id,
            text=self.output.text,
            thinking=self.output.thinking,
            tool_calls=self.output.tool_calls,
            call_error=self.output.call_error,
            tokens=self.tokens[self.prompt_length :],
            prompt_ids=self.tokens[: self.prompt_length],
            finish_reason=reason,
            seed=self.seed,
            usage=Usage(self.prompt_length, self.generated, self.cached_tokens or 0, self.drafted, self.accepted),
            timings=self._timings(),
            logprobs=self.logprobs if asked else None,
            top_logprobs=self.top_logprobs if asked else None,
            prompt_logprobs=self.prompt_logprobs if self.params.prompt_logprobs else None,
        )

    def _timings(self) -> Timings:
        end = perf_counter()
        started = end if self.started is None else self.started
        first = end if self.first is None else self.first
        later = max(self.generated - 1, 0)
        return Timings(
            queue_s=started - self.submitted,
            prefill_s=first - started,
            decode_s=end - first,
            tokens_per_second=later / (end - first) if later and end > first else 0.0,
        )
