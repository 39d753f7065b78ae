"""The generation loop: requests in, chunks out, every sequence through one step function."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, repeat
from time import perf_counter
from typing import Literal, Self, cast

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.cache.kv import UnpreparedError
from zoo.components.decoder.model import Decoder
from zoo.components.decoder.spec import DecoderSpec
from zoo.costs.work import chunk_tokens as usual_chunk
from zoo.engine.adapters import Adapters
from zoo.engine.admission import Admission, Sizes
from zoo.engine.ahead import Steps, goes_ahead
from zoo.engine.capture import Captured, captures
from zoo.engine.draft_model import DraftModel
from zoo.engine.drafting import Drafting, Source
from zoo.engine.interrupts import interruptible, uninterrupted
from zoo.engine.leading import Leading, Others
from zoo.engine.lookup import Lookup
from zoo.engine.media import Placed, place
from zoo.engine.memory import Kept, Memory, shares, stores
from zoo.engine.outcome import Outcome
from zoo.engine.prefixes import Prefixes
from zoo.engine.request import Chunk, Completion, Media, Request, token_ids
from zoo.engine.runner import Runner, memory_is_full, no_memory
from zoo.engine.scheduler import Scheduler, Work
from zoo.engine.sequence import Sequence as Running
from zoo.engine.stream import Stream
from zoo.engine.turns import Order, Turns
from zoo.registry.errors import RequestError, ZooError, each, within
from zoo.registry.plan import Plan

DRAFT_ROWS = {"cpu": native.FEW}
OTHER_DRAFT_ROWS = 128
"""Rows of sequences that decode, drafts included, up to which a step has drafts: reading the weights takes longer.

On a CPU, as many as are multiplied exactly as one is."""

KEPT = 4
"""What is kept for later requests where memory is no pool: a quarter of the budget, or one whole context."""


class Engine:
    """Runs requests of any lengths together: continuous batching with chunked prefill.

    decoder: the model with its weights on `device`. dtype: of the cache. memory_bytes: the cache's budget; it never
    takes more than `max_batch_size` sequences of `max_context` tokens need, which is also the default.
    max_batch_size: sequences that may run together. max_context: prompt and answer together, by default the card's
    context length. chunk_tokens: rows of one step, by default 512 on the CPU and 2048 elsewhere.
    storage: how the cache is laid out (see zoo.components.cache.store).
    draft: what guesses tokens ahead (see zoo.engine.drafting): "lookup", a sequence's own tokens; or another model on
        the same device, whose cache takes a part of the budget.
    prefix_cache: whether a prompt that begins as an earlier one goes on from what is cached of that.
    others: the model's other devices, which repeat what this engine does. follows: this one is among those.
    Calls from several threads are safe; they wait for each other's steps. A context manager.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_bytes: int | None = None,
        max_batch_size: int = 64,
        max_context: int | None = None,
        chunk_tokens: int | None = None,
        storage: Literal["auto", "slab", "pages"] = "auto",
        draft: Literal["lookup"] | tuple[Decoder, Plan] | None = None,
        prefix_cache: bool = True,
        others: Others | None = None,
        follows: bool = False,
    ) -> None:
        model, device = cast(DecoderSpec, plan.model), torch.device(device)
        context = model.context_length if max_context is None else max_context
        chunk = usual_chunk(device.type) if chunk_tokens is None else chunk_tokens
        self.sizes = Sizes(max_batch_size, context, chunk)
        self.sizes.check(model.context_length)

        pooled = storage == "pages" or (storage == "auto" and device.type != "cpu")
        stored, counted = (stores(dtype, place, pooled) for place in (device, torch.device("meta")))
        elsewhere = [] if others is None else [Kept(states, counted, room) for states, room in others.elsewhere]

        def memory(spec: DecoderSpec, budget: int | None, pooled: bool, elsewhere: Sequence[Kept] = ()) -> Memory:
            here, length = Kept(spec.states(), stored, budget), min(context, spec.context_length)
            return Memory(here, batch=max_batch_size, context=length, pooled=pooled, elsewhere=elsewhere)

        def runner(decoder: Decoder, memory: Memory, spread: bool = False) -> Runner:
            way = captures(device, spread) if decoder.stages == 1 else None
            return Runner(decoder, memory, device, Captured(decoder, memory, device, way) if way else None)

        source: Source | None = Lookup() if draft == "lookup" else None
        if isinstance(draft, tuple):
            other = cast(DecoderSpec, draft[1].model)
            memory_bytes, rest = shares(memory_bytes, *(memory(spec, None, False).budget for spec in (model, other)))
            own = memory(other, rest, pooled)
            source = DraftModel(runner(draft[0], own), own, context=min(context, other.context_length), rows=chunk)
        self._memory = memory(model, memory_bytes, pooled, elsewhere)
        # A pool's memory is taken anyway; where each sequence takes its own, the rest is for others to use.
        limit = None if pooled else max(self._memory.cost(context), self._memory.budget // KEPT)
        prefixes = Prefixes(self._memory, on=prefix_cache, limit=limit)
        self._admission = Admission(model.vocab_size, context, self._memory, drafts=draft is not None)
        self._encoders = model.encoders()
        rows = DRAFT_ROWS.get(device.type, OTHER_DRAFT_ROWS)
        drafting = None if source is None else Drafting(source, self._memory, prefixes, rows)
        self._scheduler = Scheduler(
            self._memory, prefixes, chunk_tokens=chunk, max_batch_size=max_batch_size, drafting=drafting
        )
        self._others = others
        plain = runner(decoder, self._memory, others is not None or follows)
        self._runner: Runner | None = plain if others is None else Leading(others, plain)
        ahead = others is None and drafting is None and goes_ahead(plain, self._memory)
        self._steps: Order = Turns(prefixes) if others and not drafting else Steps(prefixes, ahead=ahead)
        self._lock = threading.Lock()
        self._numbers = count()
        self._live: dict[str, Running] = {}
        self._mail: dict[str, deque[Chunk]] = {}
        self._loose: list[Chunk] = []
        self._doomed: deque[tuple[str, bool]] = deque()

    # --- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> str:
        """Queue a request and return its id. Raises RequestError or CapacityError for one that could never run."""
        [request_id] = self._entered([request], mailed=False)
        return request_id

    def stream(self, request: Request) -> Stream:
        """Queue a request and iterate over its chunks. Errors as `submit`."""
        with self._locked():
            return Stream(self, self._enter(request, mailed=True))

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run all requests together; their completions in order. One that is refused or fails ends them all."""
        entered = self._entered([*requests], mailed=True)
        try:
            return [self._completion(request_id) for request_id in entered]
        finally:
            self.discard(*entered)

    def cancel(self, request_id: str) -> bool:
        """End a request with finish reason "cancelled", at once or after the running step; False if it has ended."""
        known = request_id in self._live
        self._doomed.append((request_id, False))
        self._reap()
        return known

    # --- running ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._live)

    def step(self) -> list[Chunk]:
        """Run one step. The chunks made since the last call for submitted requests; streams keep their own."""
        with self._locked():
            self._advance()
        # Behind the block, whose end may be Ctrl-C's: the next call has them then.
        chunks, self._loose = self._loose, []
        return chunks

    def run(self) -> list[Completion]:
        """Step until every request has ended; completions of submitted ones as they ended, or the first error.

        Where it is interrupted, a later call has what has ended until then.
        """
        while self.busy:
            with self._locked():
                self._advance()
        chunks, self._loose = self._loose, []
        if error := next((chunk.error for chunk in chunks if chunk.error is not None), None):
            raise error
        return [chunk.completion for chunk in chunks if chunk.completion is not None]

    def receive(self, request_id: str) -> Chunk | None:
        """A stream's next chunk, made by further steps if none lies ready; None when the stream was closed."""
        while True:
            with self._locked():
                mail = self._mail.get(request_id)
                if mail:
                    return mail.popleft()
                if request_id not in self._live:
                    return None
                self._advance()

    def discard(self, *request_ids: str) -> None:
        """Cancel requests without a last chunk, and forget their mail."""
        self._doomed.extend(zip(request_ids, repeat(True)))
        self._reap()

    # --- without the cache --------------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int], adapter: str | None = "auto", media: Sequence[Media] = ()) -> Tensor:
        """Logits (T, V) float32 of one full prefill. Raises RequestError as `submit`."""
        with self._locked():
            return self._open(adapter).logits(*self._checked(tokens, media), adapter)

    def hidden(self, tokens: Sequence[int], adapter: str | None = "auto", media: Sequence[Media] = ()) -> Tensor:
        """The last hidden states (T, D), after the final norm, of one full prefill. Raises RequestError as `submit`."""
        with self._locked():
            return self._open(adapter).hidden(*self._checked(tokens, media), adapter)

    @contextmanager
    def between_steps(self) -> Iterator[tuple[Adapters, list[str | None]]]:
        """A block in which no step runs: the adapters, and what each unfinished request chose of them."""
        with self._locked():
            runner = self._open()
            self._steps.pause()
            with interruptible():
                yield runner.adapters, [seq.params.adapter for seq in self._live.values()]
            self._scheduler.prefixes.retain(runner.adapters.keys)
            if runner.captured is not None:
                runner.captured.clear()

    def reset_prefix_cache(self) -> None:
        """Forgets what is kept for later requests. For callers who change weights by hand, or who measure."""
        with self._locked():
            self._steps.pause()
            self._scheduler.prefixes.clear()

    @property
    def guesses(self) -> bool:
        """Whether tokens are guessed ahead."""
        return self._scheduler.drafting is not None

    @property
    def parts(self) -> tuple[Memory, Runner]:
        """The cache and what runs steps, for a rank that follows another's engine."""
        return self._memory, self._open()

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: weights; the cache's that unfinished requests use now, that are kept for later ones, that were taken
        at most so far, and that may be."""
        weights = 0 if self._runner is None else self._runner.weight_bytes
        source = None if self._scheduler.drafting is None else self._scheduler.drafting.source
        caches, kept = [self._memory, *(source.caches if source else [])], self._scheduler.prefixes.kept
        return {
            "weights": weights + (source.weight_bytes if source else 0),
            "cache_used": sum(cache.used for cache in caches) - kept,
            "cache_kept": kept,
            "cache_peak": sum(cache.peak for cache in caches),
            "cache_budget": sum(cache.budget for cache in caches),
        }

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel all requests and let go of weights and cache. Later requests raise ZooError."""
        with self._locked():
            self._doomed.extend((request_id, False) for request_id in self._live)
        with self._locked():
            self._runner = None
            self._scheduler.prefixes.clear()
            self._memory.close()
            self._scheduler.drafting = None
            if self._others is not None:
                self._others.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside: the lock is held from here on ------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._lock, uninterrupted():
                yield
        finally:
            self._reap()

    def _reap(self) -> None:
        """End the doomed requests, unless a step is running: then its end does."""
        if not self._doomed:
            return
        with uninterrupted():
            while self._doomed and self._lock.acquire(blocking=False):
                try:
                    while self._doomed:
                        self._end(*self._doomed.popleft())
                finally:
                    self._lock.release()

    def _end(self, request_id: str, silent: bool) -> None:
        seq = self._live.pop(request_id, None)
        if seq is not None:
            self._scheduler.drop(seq)
            if not silent:
                self._post(seq.finish("cancelled"))
        if silent:
            self._mail.pop(request_id, None)

    def _open(self, adapter: str | None = None) -> Runner:
        """The runner of a model that is not closed and has that adapter."""
        if self._runner is None:
            raise ZooError("the model was closed", hint="load it again")
        self._runner.adapters.check(adapter)
        return self._runner

    def _checked(self, tokens: Sequence[int], media: Sequence[Media]) -> tuple[tuple[int, ...], list[Placed]]:
        ids = token_ids(tokens)
        self._admission.check_prompt(ids)
        return ids, place(self._encoders, ids, media)

    def _entered(self, requests: Sequence[Request], *, mailed: bool) -> list[str]:
        """Enters all of them, or none where one is refused or Ctrl-C comes. The lock is not held yet."""
        entered: list[str] = []
        try:
            with self._locked():
                for where, request in each("prompts", requests):
                    with within(where):
                        entered.append(self._enter(request, mailed=mailed))
            return entered
        except BaseException:
            self.discard(*entered)
            raise

    def _enter(self, request: Request, *, mailed: bool) -> str:
        runner = self._open(request.params.adapter)
        number = next(self._numbers)
        request_id = request.request_id or f"request-{number}"
        if request_id in self._live or request_id in self._mail:
            raise RequestError("a request of this id is unfinished", where="request_id", found=repr(request_id))
        media = place(self._encoders, request.prompt, request.media)
        allowed, key = self._admission.allowed(request), runner.adapters.key(request.params.adapter)
        seq = Running(number, request_id, request, allowed, media, key)
        if mailed:
            self._mail[request_id] = deque()
        if seq.idle:
            self._post(seq.finish("length"))
        else:
            self._scheduler.add(seq)
            self._live[request_id] = seq
        return request_id

    def _post(self, chunk: Chunk) -> None:
        mail = self._mail.get(chunk.request_id)
        (self._loose if mail is None else mail).append(chunk)

    def _completion(self, request_id: str) -> Completion:
        while (chunk := self.receive(request_id)) is not None:
            if chunk.error is not None:
                raise chunk.error
            if chunk.completion is not None:
                return chunk.completion
        raise ZooError("the request was ended by another call", where=request_id)

    def _advance(self) -> None:
        """One step of all running sequences."""
        runner = self._open()
        try:
            work = self._scheduler.plan()
            if not work:
                return
            now = perf_counter()
            for item in work:
                item.sequence.started = item.sequence.started or now
            for done in self._steps.run(runner, work):
                self._scheduler.ran([item for item, _ in done])
                for item, outcome in done:
                    self._apply(item, outcome)
        except BaseException as error:
            # Interrupted anywhere, also by Ctrl-C: what the step writes may be half written, tokens are not.
            self._steps.clear()
            self._scheduler.restart(self._live.values(), forget=memory_is_full(error))
            if memory_is_full(error):
                raise no_memory(runner.device, error) from error
            # Without preparation the next step is computed another way.
            if not isinstance(error, UnpreparedError):
                raise

    def _apply(self, item: Work, outcome: Outcome) -> None:
        """Move the sequence on by its work, and post what came of it."""
        seq = item.sequence
        chunk = seq.advance(item.rows, outcome, len(item.drafts))
        sound = chunk is None or chunk.error is None
        if item.drafts and sound:
            self._scheduler.settle(item, len(outcome.tokens) - 1)
        if chunk is None or not chunk.last:
            self._scheduler.prefixes.advanced(seq)
        else:
            self._live.pop(seq.request_id, None)
            self._scheduler.drop(seq, sound=sound)
        if chunk is not None:
            self._post(chunk)
