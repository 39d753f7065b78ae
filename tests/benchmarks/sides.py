"""Those that are compared: each runs equal prompts greedily and says when its tokens came."""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, Protocol
from unittest.mock import patch

import torch

import zoo
from zoo.bench.limits import PRODUCT, READ_BYTES, multiply_ways, read_ways
from zoo.bench.measure import answer_tokens
from zoo.bench.timing import fastest, seconds
from zoo.engine.request import Request, SamplingParams

Prompts = Sequence[Sequence[int]]


@dataclass
class Timed:
    """Seconds until every prompt had its first new token, and of each step after that.

    meanwhile: new tokens beyond the first ones that sequences got while others' prompts were read.
    """

    prefill: float
    steps: list[float] = field(default_factory=list)
    meanwhile: int = 0


class Turn(Protocol):
    """What takes part in turns."""

    name: str

    def run(self, prompts: Prompts, steps: int) -> Timed:
        """Reads the prompts, of equal lengths, and makes `steps` further tokens for each."""
        ...

    def close(self) -> None: ...


class Side(Turn, Protocol):
    """One program with the model loaded."""

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of the token after these, (V,) float32."""
        ...


def turns(sides: Sequence[Turn], prompts: Prompts, steps: int, rounds: int) -> dict[str, list[Timed]]:
    """Runs of every side, by turns, so that a drifting machine moves all; a first short one of each is left out."""
    for side in sides:
        side.run(prompts[:1], min(steps, 2))
    times: dict[str, list[Timed]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            gc.collect()
            times[side.name].append(side.run(prompts, steps))
    return times


class Machine:
    """The machine alone, by turns with the others: `prefill` is a large product, `steps` are reads of memory."""

    name = "machine"

    def __init__(self, size: int = PRODUCT["cpu"], read: int = READ_BYTES) -> None:
        self.bytes, self.multiply_adds = read, size**3
        self._read = _fastest_of([*read_ways(torch.ones(read // 4)).values()])
        self._multiply = _fastest_of(multiply_ways(*(torch.randn(size, size).bfloat16() for _ in range(2))))

    def run(self, prompts: Prompts, steps: int) -> Timed:
        return Timed(fastest(self._multiply, 3), [seconds(self._read) for _ in range(steps)])

    def limits(self, times: Sequence[Timed]) -> tuple[float, float]:
        """Bytes read and multiply-adds, per second: medians, as the sides' figures are."""
        steps = [step for timed in times for step in timed.steps]
        return self.bytes / median(steps or [inf]), self.multiply_adds / median(timed.prefill for timed in times)

    def close(self) -> None:
        del self._read, self._multiply


def _fastest_of(ways: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    return min(ways, key=lambda way: fastest(way, 2))


class Zoo:
    """zoo's engine, step by step."""

    def __init__(self, ref: Any, name: str = "zoo", **options: Any) -> None:
        # Rounds repeat their prompts, and are to read them anew.
        self.name, self.model = name, zoo.load(ref, device="cpu", prefix_cache=False, **options)

    def run(self, prompts: Prompts, steps: int) -> Timed:
        """Steps count once every sequence has its first token; those that had it before go on meanwhile."""
        engine, batch = self.model.engine, len(prompts)
        most = answer_tokens(self.model, batch, max(map(len, prompts)), steps)
        params = SamplingParams(max_tokens=most, ignore_eos=True)
        start = time.perf_counter()
        names = [engine.submit(Request(prompt, params)) for prompt in prompts]
        made = dict.fromkeys(names, 0)
        while not all(made.values()):
            for chunk in engine.step():
                made[chunk.request_id] += len(chunk.tokens)
        timed = Timed(time.perf_counter() - start, meanwhile=sum(made.values()) - batch)
        for _ in range(steps):
            start = time.perf_counter()
            rows = len(engine.step())
            timed.steps.append(time.perf_counter() - start)
            assert rows == batch, "a step had other rows than one of each sequence"
        for name in names:
            engine.cancel(name)
        engine.run()
        return timed

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.model.logits(tokens)[-1]

    def close(self) -> None:
        self.model.close()


class Threads(Zoo):
    """zoo's engine in this process with so many threads, whatever other ranks have."""

    def __init__(self, ref: Any, name: str, threads: int, **options: Any) -> None:
        self.threads = threads
        # Ranks share this process's threads out among them.
        torch.set_num_threads(2)
        super().__init__(ref, name, **options)

    def run(self, prompts: Prompts, steps: int) -> Timed:
        torch.set_num_threads(self.threads)
        return super().run(prompts, steps)


class Cut:
    """Stages on several ranks, with each step cut in so many pieces, and so many groups that take turns."""

    def __init__(self, side: Zoo, name: str, pieces: int, groups: int = 1) -> None:
        self.side, self.name, self.counts = side, name, {"pieces": pieces, "turns": groups}

    def run(self, prompts: Prompts, steps: int) -> Timed:
        with ExitStack() as stack:
            for method, count in self.counts.items():

                def fixed(rows: int, device: torch.device, count: int = count) -> int:
                    return min(rows, count)

                stack.enter_context(patch.object(self.side.model.engine.parts[1].decoder, method, fixed))
            return self.side.run(prompts, steps)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.side.logits(tokens)

    def close(self) -> None: ...


class Transformers:
    """transformers' `generate` with a static batch of equal prompts, its best case."""

    name = "transformers"

    def __init__(self, folder: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(self, prompts: Prompts, steps: int) -> Timed:
        ids, times = torch.tensor([list(prompt) for prompt in prompts]), []

        def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        start = time.perf_counter()
        self.generate(ids, torch.ones_like(ids), steps + 1, stopping_criteria=[clock])
        return Timed(times[0] - start, [later - earlier for earlier, later in pairwise(times)])

    def generate(self, ids: torch.Tensor, mask: torch.Tensor, count: int, **more: Any) -> None:
        options = {"do_sample": False, "pad_token_id": 0, "attention_mask": mask} | more
        with torch.inference_mode():
            self.model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self.model(torch.tensor([list(tokens)])).logits[0, -1].float()
        return found

    def close(self) -> None:
        del self.model


class LlamaCpp:
    """llama.cpp through llama-cpp-python's own bindings of its C functions.

    Of several prompts only the first is read, and its cache copied to the other sequences, since reading them all would
    take minutes: `prefill` of more than one prompt means nothing.
    """

    def __init__(self, file: Path) -> None:
        import llama_cpp

        self.name, self.api = f"llama.cpp {file.stem}", llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, prompts: Prompts, steps: int) -> Timed:
        api, batch, length = self.api, len(prompts), len(prompts[0])
        context = self._context(batch, length + steps + 1)
        try:
            start = time.perf_counter()
            tokens = [self._read(context, prompts[0])] * batch
            timed = Timed(time.perf_counter() - start)
            memory = api.llama_get_memory(context)
            for seq in range(1, batch):
                api.llama_memory_seq_cp(memory, 0, seq, -1, -1)
            for step in range(steps):
                start = time.perf_counter()
                rows = [(token, length + step, seq) for seq, token in enumerate(tokens)]
                self._decode(context, rows, every=True)
                tokens = [self._best(context, row) for row in range(batch)]
                timed.steps.append(time.perf_counter() - start)
        finally:
            api.llama_free(context)
        return timed

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        context = self._context(1, len(tokens))
        self._read(context, tokens)
        found = torch.tensor(self._row(context, -1)[: self.vocab])
        self.api.llama_free(context)
        return found

    def close(self) -> None:
        self.api.llama_model_free(self.model)

    def _context(self, batch: int, tokens: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = batch * (-(-tokens // 256) * 256)
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        return self.api.llama_init_from_model(self.model, params)

    def _read(self, context: Any, prompt: Sequence[int]) -> int:
        rows = [(token, place, 0) for place, token in enumerate(prompt)]
        for first in range(0, len(rows), 512):
            self._decode(context, rows[first : first + 512])
        return self._best(context, -1)

    def _decode(self, context: Any, rows: list[tuple[int, int, int]], *, every: bool = False) -> None:
        """rows: token, position, sequence. Logits of every row, or of the last one."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for place, (token, position, seq) in enumerate(rows):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, seq
            batch.logits[place] = every or place == len(rows) - 1
        failed = self.api.llama_decode(context, batch)
        self.api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode answered {failed}")

    def _row(self, context: Any, row: int) -> Any:
        import numpy

        return numpy.ctypeslib.as_array(self.api.llama_get_logits_ith(context, row), shape=(self.vocab,))

    def _best(self, context: Any, row: int) -> int:
        return int(self._row(context, row).argmax())
