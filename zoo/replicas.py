"""Replicas of one model behind one front, each in a process of Ray's (the optional extra `ray`).

    from zoo.replicas import start

    with start("mistral-7b-instruct-v0.3", 4, gpus=1) as front:
        answers = front.generate(["Hello", "Who are you?"], max_tokens=50)

A request is a prompt and options, an answer is what `zoo run --json` prints: plain data. Ray moves it between its own
processes, which trust each other; nothing that a stranger sends is unpickled by zoo.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

from zoo.registry.errors import RankError, ZooError, error_of, fields_of

Answer = dict[str, Any]

CONCURRENT = 64
"""Requests that a replica works on at a time: they are batched there."""


class EndedError(Exception):
    """A replica's process has ended; the message says how."""


class Replica(Protocol):
    """A model in another process. What it raises is EndedError where the process has ended."""

    def generate(self, prompt: Any, options: Mapping[str, Any]) -> Answer:
        """A completion as plain data, or {"error": ...} with the fields of a ZooError."""
        ...

    def stream(self, prompt: Any, options: Mapping[str, Any]) -> Iterator[Answer]:
        """Chunks as plain data; an error as in `generate`."""
        ...

    def close(self) -> None:
        """Ends its process."""
        ...


class Front:
    """Sends each request to the replica that has the fewest unfinished ones. A context manager.

    A replica whose process ends is left out from then on, and told by `ended`. Its requests run again elsewhere, unless
    a part of the answer was given away already. pids: of replicas' processes, on their own machines.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = dict(enumerate(replicas))
        self._busy = dict.fromkeys(self._replicas, 0)
        self._lock = threading.Lock()
        self._count = len(replicas)
        self.ended: dict[int, str] = {}
        self.pids: dict[int, int] = {}

    @property
    def alive(self) -> list[int]:
        """Numbers of the replicas that answer."""
        return sorted(set(self._replicas) - set(self.ended))

    def generate(self, prompts: Sequence[Any] | str, **options: Any) -> list[Answer]:
        """One completion for each prompt, in order; prompts and options as of `Model.generate`.

        Raises what a replica raises, and RankError when none is left.
        """
        several = [prompts] if isinstance(prompts, str) else [*prompts]
        with ThreadPoolExecutor(max(1, min(len(several), CONCURRENT * self._count))) as pool:
            return [*pool.map(lambda prompt: self._answered(prompt, options), several)]

    def stream(self, prompt: Any, **options: Any) -> Iterator[Answer]:
        """Chunks of one answer. Raises RankError when its replica ends in the middle of it, else as `generate`."""
        while True:
            with self._chosen() as number:
                begun = False
                try:
                    for chunk in self._replicas[number].stream(prompt, options):
                        yield _checked(number, chunk)
                        begun = True
                    return
                except EndedError as error:
                    self._lost(number, error)
                    if begun:
                        raise RankError(
                            f"replica {number} has ended in the middle of an answer", found=str(error)
                        ) from error

    def close(self) -> None:
        """Ends all replicas."""
        for number in self.alive:
            self.ended[number] = "closed"
            self._replicas[number].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answered(self, prompt: Any, options: Mapping[str, Any]) -> Answer:
        while True:
            with self._chosen() as number:
                try:
                    return _checked(number, self._replicas[number].generate(prompt, options))
                except EndedError as error:
                    self._lost(number, error)

    @contextmanager
    def _chosen(self) -> Iterator[int]:
        with self._lock:
            if not self.alive:
                told = "; ".join(f"replica {number}: {how}" for number, how in sorted(self.ended.items()))
                raise RankError("no replica is left", where="replicas", found=told)
            number = min(self.alive, key=lambda candidate: (self._busy[candidate], candidate))
            self._busy[number] += 1
        try:
            yield number
        finally:
            with self._lock:
                self._busy[number] -= 1

    def _lost(self, number: int, error: EndedError) -> None:
        with self._lock:
            self.ended.setdefault(number, str(error))


def start(
    ref: str | Mapping[str, Any], count: int, *, address: str | None = None, gpus: float = 0, **options: Any
) -> Front:
    """Starts `count` replicas on Ray's machines; returns when all have loaded.

    address: of a running cluster, as `ray.init` takes it; None uses or starts one on this machine. gpus: for each
    replica. options: as of `zoo.load`. The model's files must be where each machine finds them.
    Raises ZooError where Ray is not installed, and what loading raises.
    """
    try:
        import ray
    except ImportError:
        raise ZooError(
            "replicas need Ray", where="zoo.replicas", found="no module ray", hint="pip install 'zoo-inference[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    threads = max(1, (os.cpu_count() or 1) // count)
    remote = ray.remote(num_cpus=0 if gpus else threads, num_gpus=gpus, max_concurrency=CONCURRENT)(Actor)
    found = [RayReplica(remote.remote(ref, options, threads)) for _ in range(count)]
    front = Front(found)
    try:
        for number, replica in enumerate(found):
            front.pids[number] = _checked(number, replica.call("load"))["pid"]
    except BaseException as error:
        front.close()
        if isinstance(error, EndedError):
            raise RankError("a replica has ended while it loaded", where="replicas", found=str(error)) from None
        raise
    return front


class Actor:
    """What runs in a replica's process: a model, and plain data in and out."""

    def __init__(self, ref: Any, options: Mapping[str, Any], threads: int) -> None:
        self._ref, self._options, self._threads = ref, options, threads
        self._model: Any = None

    def load(self) -> Answer:
        """Loads the model."""
        import torch

        from zoo.api import load

        torch.set_num_threads(self._threads)

        def loaded() -> Answer:
            self._model = load(self._ref, **self._options)
            return {"notes": self._model.notes, "pid": os.getpid()}

        return _told(loaded)

    def generate(self, prompt: Any, options: Mapping[str, Any]) -> Answer:
        """One completion; concurrent calls are batched by the engine."""
        prompts = prompt if isinstance(prompt, str) else [prompt]
        return _told(lambda: self._model.generate(prompts, **options)[0].to_dict())

    def stream(self, prompt: Any, options: Mapping[str, Any]) -> Iterator[Answer]:
        """Chunks of one answer."""
        try:
            for chunk in self._model.stream(prompt, **options):
                yield chunk.to_dict()
        except ZooError as error:
            yield {"error": fields_of(error)}


class RayReplica:
    """A Replica that is an actor of Ray's."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def generate(self, prompt: Any, options: Mapping[str, Any]) -> Answer:
        return self.call("generate", prompt, dict(options))

    def stream(self, prompt: Any, options: Mapping[str, Any]) -> Iterator[Answer]:
        references = self._actor.stream.options(num_returns="streaming").remote(prompt, dict(options))
        while True:
            try:
                reference = next(references)
            except StopIteration:
                return
            except Exception as error:
                raise _ended(error) from error
            yield self._got(reference)

    def call(self, method: str, *arguments: Any) -> Answer:
        """What a method returns. Raises EndedError."""
        return self._got(getattr(self._actor, method).remote(*arguments))

    def close(self) -> None:
        import ray

        ray.kill(self._actor)

    def _got(self, reference: Any) -> Answer:
        import ray

        try:
            found: Answer = ray.get(reference)
        except Exception as error:
            raise _ended(error) from error
        return found


def _ended(error: Exception) -> Exception:
    """EndedError for an actor that is gone; other errors are Ray's own."""
    import ray

    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.NodeDiedError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return EndedError(" ".join(lines)[:300])
    return error


def _told(make: Callable[[], Answer]) -> Answer:
    try:
        return make()
    except ZooError as error:
        return {"error": fields_of(error)}


def _checked(number: int, answer: Answer) -> Answer:
    """The answer. Raises the error that stands in its place."""
    fields = answer.get("error")
    if not isinstance(fields, dict):
        return answer
    raise error_of(f"replica {number}", fields)
