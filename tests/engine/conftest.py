"""A model that can be followed by hand: it keeps whole histories as its state and checks that they are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Protocol

import pytest
import torch
from torch import Tensor, nn

import zoo.engine.memory as memory_module
from zoo.components.step import Step
from zoo.engine.engine import Engine
from zoo.engine.request import Completion, Request, SamplingParams
from zoo.registry.spec import StateSpec

VOCABULARY = 61


class FakeStateSpec(StateSpec):
    """One element per token."""

    module: ClassVar[str] = "none:none"
    kind: Literal["fake"] = "fake"

    def elements(self, tokens: int) -> int:
        return tokens


class FakeStore:
    """Histories of tokens; one byte per token, rounded up to 16."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.histories: dict[int, list[int]] = {}
        self.rooms: dict[int, int] = {}
        self.marks: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(self.cost, self.rooms.values()))

    def cost(self, tokens: int) -> int:
        return self.num_layers * -(-tokens // 16) * 16

    def grow(self, seq: int, tokens: int) -> None:
        self.rooms[seq] = max(self.rooms.get(seq, 0), tokens)
        self.histories.setdefault(seq, [])

    def free(self, seq: int) -> None:
        self.rooms.pop(seq, None)
        self.histories.pop(seq, None)
        self.marks.pop(seq, None)

    back = None

    def mark(self, seq: int, past: int, rows: int) -> None:
        assert len(self.histories[seq]) == past
        assert past + rows <= self.rooms[seq], "no room for rows that may be taken back"
        assert self.marks.setdefault(seq, past) == past, "marked twice"

    def rewind(self, seq: int, tokens: int) -> None:
        assert self.marks.pop(seq) <= tokens <= len(self.histories[seq])
        del self.histories[seq][tokens:]

    def views(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[FakeState]:
        return [FakeState(self, list(seqs)) for _ in range(self.num_layers)]


@dataclass
class FakeState:
    store: FakeStore
    seqs: list[int]

    def extend(self, place: int, past: int, tokens: list[int]) -> list[int]:
        """Append the tokens of the step's `place`-th sequence; returns all of its tokens."""
        history = self.store.histories[self.seqs[place]]
        assert len(history) == past, "the step's past is not what is cached"
        history += tokens
        assert len(history) <= self.store.rooms[self.seqs[place]], "more tokens than room"
        return history


class FakeDecoder(nn.Module):
    """Logits of a row from a hash of all tokens up to it, or as `script` says.

    script: first prompt token -> what follows a prompt of that one token. faults: called before each step.
    """

    def __init__(self, script: Mapping[int, Sequence[int]] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))
        self.stages = 1
        self.script = script
        self.steps: list[list[int]] = []
        self.logit_rows: list[int] = []
        self.fault: Callable[[Step], None] | None = None

    def pieces(self, rows: int, device: torch.device) -> int:
        """As `Decoder.pieces`."""
        return 1

    def forward(self, tokens_T: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
        hidden_TV = self.hidden(tokens_T, step)
        return self.logits(hidden_TV if rows is None else hidden_TV[rows])

    def hidden(self, tokens_T: Tensor, step: Step) -> Tensor:
        """The logits already."""
        tokens, start, found = tokens_T.tolist(), 0, []
        positions = step.positions_T.tolist()
        for place, (count, past) in enumerate(zip(step.rows, step.past, strict=True)):
            assert positions[start : start + count] == list(range(past, past + count))
            history = step.states[0].extend(place, past, tokens[start : start + count])
            found += [self._row(history[: past + i + 1]) for i in range(count)]
            start += count
        assert start == len(tokens)
        self.steps.append(list(step.rows))
        if self.fault is not None:
            self.fault(step)
        return torch.stack(found)

    def logits(self, hidden_RV: Tensor) -> Tensor:
        self.logit_rows.append(len(hidden_RV))
        return hidden_RV

    def _row(self, history: list[int]) -> Tensor:
        if self.script is not None:
            answer = self.script[history[0]]
            logits_V = torch.zeros(VOCABULARY)
            logits_V[answer[min(len(history), len(answer)) - 1]] = 50.0
            return logits_V
        value = 0
        for token in history:
            value = (value * 31 + token + 7) % 1_000_003
        return 4 * torch.sin(value * torch.arange(1, VOCABULARY + 1, dtype=torch.float64)).float()


class Pieces:
    """A vocabulary of the given pieces; id 0 is a control id."""

    control_ends_run = True
    each_byte = True

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self.pieces, self.size = pieces, VOCABULARY

    def control(self, token: int) -> str | None:
        return "</s>" if token == 0 else None

    def surface(self, token: int, first: bool) -> bytes:
        return self.pieces.get(token, b"<%d>" % token)


class MakeEngine(Protocol):
    def __call__(
        self, decoder: nn.Module | None = None, *, context: int = 100, layers: int = 1, **sizes: Any
    ) -> Engine: ...


@pytest.fixture
def stores() -> list[FakeStore]:
    """The stores that the test's engines made."""
    return []


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch, stores: list[FakeStore]) -> Iterator[MakeEngine]:
    """Makes engines around fake decoders; after the test nothing may be left in them."""
    engines: list[Engine] = []

    def make_store(spec: StateSpec, num_layers: int, *rest: object) -> FakeStore:
        stores.append(FakeStore(num_layers))
        return stores[-1]

    def make(decoder: nn.Module | None = None, *, context: int = 100, layers: int = 1, **sizes: Any) -> Engine:
        states = tuple(FakeStateSpec() for _ in range(layers))
        shape = SimpleNamespace(vocab_size=VOCABULARY, context_length=context, states=lambda: states, encoders=dict)
        plan: Any = SimpleNamespace(model=shape)
        model: Any = FakeDecoder() if decoder is None else decoder
        engines.append(Engine(model, plan, **sizes))
        return engines[-1]

    monkeypatch.setattr(memory_module, "make_store", make_store)
    yield make
    for engine in engines:
        assert not engine.busy
        assert engine.memory["cache_used"] == 0
    assert all(not store.rooms and not store.histories and not store.marks for store in stores)


@pytest.fixture
def fake_decoder() -> Callable[..., FakeDecoder]:
    """FakeDecoder, for tests that look inside it."""
    return FakeDecoder


@pytest.fixture
def fake_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer of the given pieces; id 0 is its stop id unless `stop_ids` says otherwise."""

    def make(pieces: Mapping[int, bytes] | None = None, stop_ids: Sequence[int] = (0,)) -> Any:
        return SimpleNamespace(vocabulary=Pieces(pieces or {}), stop_ids=frozenset(stop_ids))

    return make


@pytest.fixture
def ask() -> Callable[..., Request]:
    """A request of a prompt and options."""

    def make(prompt: Sequence[int], *, tokenizer: Any = None, request_id: str | None = None, **options: Any) -> Request:
        return Request(prompt, SamplingParams(**options), tokenizer, request_id=request_id)

    return make


@pytest.fixture
def joined() -> Callable[..., None]:
    """Asserts that a completion's chunks, joined, are the completion."""

    def check(chunks: list[Any], completion: Completion) -> None:
        assert "".join(c.text for c in chunks) == completion.text
        assert [t for c in chunks for t in c.tokens] == completion.tokens
        if completion.logprobs is not None:
            assert [x for c in chunks for x in c.logprobs] == completion.logprobs
            assert [x for c in chunks for x in c.top_logprobs] == completion.top_logprobs
        assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
        assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [completion.finish_reason]

    return check
