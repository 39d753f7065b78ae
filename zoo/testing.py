"""The conformance kit for authors of components: one call in a test checks what every component promises.

    from zoo.testing import check_component

    def test_my_ffn() -> None:
        check_component("ffn", {"kind": "relu_squared", "hidden_dim": 48})

The component is put into a small decoder with random weights, in float32 on the CPU.
"""

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Barrier
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.assemble import assemble
from zoo.components.cache.store import fresh_step, make_store
from zoo.components.decoder.model import Decoder
from zoo.components.step import Step
from zoo.devices.mesh import Mesh
from zoo.devices.shares import Part, join
from zoo.engine.media import place, rows_of_media
from zoo.engine.memory import Kept, Memory
from zoo.engine.request import Media
from zoo.loading.files import WeightSet, locate
from zoo.loading.load import load_weights, random_weights
from zoo.registry.card import Card
from zoo.registry.errors import CardError
from zoo.registry.manager import manager
from zoo.registry.resolve import Plan, resolve
from zoo.registry.spec import IndivisibleError, Inherited, Slot, Spec

TOLERANCE = 1e-4
"""Relative error allowed between two ways to the same float32 logits."""

LENGTH = 23
"""Tokens of the test sequence: longer than the small windows, and no multiple of them."""

Node = dict[str, Any]


def check_component(
    slot: str,
    node: Mapping[str, Any],
    *,
    card: Mapping[str, Any] | None = None,
    variants: Mapping[str, Any] | None = None,
) -> None:
    """Check the component that `node` (its kind and fields) names in `slot`. Raises AssertionError with what failed.

    card: a small card to put it in, with the text "HERE" where the node goes; needed for slots other than mixer,
        ffn, norm, rope, cache, router and block.
    variants: for fields whose other values cannot be guessed, a value that must have an effect.

    Checked: the module holds the parameters that the Spec declares; a full prefill, chunks and single tokens give
    the same logits; a sequence alone and in a batch too; both cache storages agree; saved weights load back; two
    ranks, or three, that share it out give the logits of one, unless its sizes do not divide; and every field of the
    Spec changes parameters, state or logits, or is refused.
    """
    hosted = _host(slot, dict(node), card)
    plan, module = _built(hosted)
    _check_steps(module)
    _check_batch(module)
    _check_saved(plan, module)
    _check_shares(plan, module)
    _check_fields(slot, dict(node), card, variants or {})


def step_through(
    module: Decoder,
    sequences: Sequence[Sequence[int]],
    chunk: int,
    storage: str = "slab",
    media: Sequence[Sequence[Media]] | None = None,
) -> list[Tensor]:
    """Float32 logits (T, V) of each sequence, fed `chunk` tokens of every sequence at a time through the cache.

    media: of each sequence, its images and sounds.
    """
    placed = [
        place(module.spec.encoders(), *both) for both in zip(sequences, media or [()] * len(sequences), strict=True)
    ]
    states = module.spec.states()
    memory = Memory(
        Kept(
            states, lambda spec, layers, budget: make_store(spec, layers, torch.float32, "cpu", storage, budget), None
        ),
        batch=len(sequences),
        context=max(map(len, sequences)),
        pooled=storage == "pages",
    )
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        live = [i for i, tokens in enumerate(sequences) if len(tokens) > start]
        rows = [len(sequences[i][start : start + chunk]) for i in live]
        for i, count in zip(live, rows, strict=True):
            memory.reserve(i, start + count)
        positions_T = torch.cat([torch.arange(start, start + count) for count in rows])
        tokens_T = torch.tensor([t for i in live for t in sequences[i][start : start + chunk]])
        with torch.inference_mode():
            spans = [(placed[i], start, start + count) for i, count in zip(live, rows, strict=True)]
            filled = rows_of_media(module, spans, torch.device("cpu"))
            kept = memory.states(live, rows, [start] * len(live))
            step = Step(positions_T, rows, [start] * len(live), kept, filled)
            for i, logits in zip(live, module(tokens_T, step).split(rows), strict=True):
                outputs[i].append(logits)
    return [torch.cat(parts) for parts in outputs]


def prefill(module: Decoder, tokens: Sequence[int]) -> Tensor:
    """Float32 logits (T, V) of one full prefill without a cache."""
    with torch.inference_mode():
        logits: Tensor = module(torch.tensor([*tokens]), fresh_step(module.spec, [len(tokens)]))
    return logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())


def _host(slot: str, node: Node, card: Mapping[str, Any] | None) -> Node:
    if card is not None:
        hosted = _replaced(copy.deepcopy(dict(card)), node)
        assert isinstance(hosted, dict)
        return hosted
    attention: Node = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": {"theta": 100.0}}
    layer: Node = {"mixer": attention, "ffn": {"kind": "gated", "hidden_dim": 40}}
    layers = [{"repeat": 2, **layer}]
    model: Node = {"dim": 24, "vocab_size": 61, "norm": {"kind": "rms", "eps": 1e-5}, "layers": layers}
    places: dict[str, Callable[[], None]] = {
        "mixer": lambda: layers[0].update(mixer=node),
        "ffn": lambda: layers[0].update(ffn=node),
        "norm": lambda: model.update(norm=node),
        "rope": lambda: attention.update(rope=node),
        "cache": lambda: attention.update(cache=node, window=7),
        "router": lambda: layers[0].update(
            ffn={"kind": "moe", "num_experts": 5, "experts_per_token": 2, "router": node, "expert": layer["ffn"]}
        ),
        "block": lambda: model.update(layers=[{"repeat": 2, **layer, **node}]),
    }
    assert slot in places, f"slot {slot!r} needs card=: a small card with the text HERE where the node goes"
    places[slot]()
    return {"name": "conformance", "context_length": 64, "model": model}


def _replaced(value: Any, node: Node) -> Any:
    if value == "HERE":
        return node
    if isinstance(value, dict):
        return {key: _replaced(item, node) for key, item in value.items()}
    return [_replaced(item, node) for item in value] if isinstance(value, list) else value


def _built(card: Node) -> tuple[Plan, Decoder]:
    plan = resolve(Card.from_dict(card))
    module = assemble(plan, torch.float32)
    random_weights(module, plan, seed=0, device=torch.device("cpu"))
    return plan, module


def _tokens(module: Decoder, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(t) for t in torch.randint(module.spec.vocab_size, (length,), generator=generator)]


def _check_steps(module: Decoder) -> None:
    tokens = _tokens(module, LENGTH)
    expected = prefill(module, tokens)
    assert torch.isfinite(expected).all(), "the logits of random weights are not finite"
    for storage in ("slab", "pages"):
        for chunk in (LENGTH, 5, 1):
            [found] = step_through(module, [tokens], chunk, storage)
            error = relative_error(found, expected)
            assert error < TOLERANCE, f"chunks of {chunk} over {storage} differ from one prefill by {error:.1e}"


def _check_batch(module: Decoder) -> None:
    sequences = [_tokens(module, length, seed) for seed, length in enumerate((LENGTH, 1, 9))]
    for chunk in (4, 1):
        for tokens, found in zip(sequences, step_through(module, sequences, chunk, "slab"), strict=True):
            error = relative_error(found, prefill(module, tokens))
            assert error < TOLERANCE, f"a sequence of {len(tokens)} differs in a batch from alone by {error:.1e}"


def _check_saved(plan: Plan, module: Decoder) -> None:
    again, parameters = assemble(plan, torch.float32), dict(module.named_parameters())
    with _saved(plan, module) as files:
        load_weights(again, plan, files)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, parameters[name]), f"{name} is not the same after saving and loading"


@contextmanager
def _saved(plan: Plan, module: Decoder) -> Iterator[WeightSet]:
    """The module's weights in a file, under zoo's own names."""
    parameters = dict(module.named_parameters())
    tensors = {t.name: parameters[t.param][t.index].clone().contiguous() for t in plan.model.tensors()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        yield locate(Path(folder), "zoo")


def _check_shares(plan: Plan, module: Decoder) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    tokens = _tokens(module, LENGTH)
    expected = prefill(module, tokens)
    for ranks in (2, 3):
        try:
            found = share_out(plan, module, Mesh(ranks), lambda rank: prefill(rank, tokens))
        except IndivisibleError:
            continue
        error = relative_error(found, expected)
        assert error < TOLERANCE, f"{ranks} ranks differ from one by {error:.1e}: see Split, Param.shard, Spec.sums"


@dataclass
class Rank:
    """One of several ranks that share a module out, each to run in a thread of this process."""

    part: Part
    module: Decoder
    world: "Threads"
    near: "Threads"

    def abort(self) -> None:
        """Lets nobody wait for this rank any more."""
        self.world.table.barrier.abort()
        self.near.table.barrier.abort()


def ranks_of(plan: Plan, module: Decoder, mesh: Mesh) -> list[Rank]:
    """The ranks, each with its pieces of the module's weights, read from a file. Raises IndivisibleError."""
    parts = [Part.of(plan, mesh, rank) for rank in range(mesh.size)]
    world, stages = Table(mesh.size), [Table(mesh.tp) for _ in range(mesh.pp)]
    found = []
    with _saved(plan, module) as files:
        for part in parts:
            own = assemble(part.local, torch.float32)
            load_weights(own, plan, files, pieces=part.pieces)
            near = Threads(part.share.rank, stages[mesh.stage(part.rank)])
            found.append(Rank(part, own, Threads(part.rank, world), near))
            join(own, part, found[-1].world, near, torch.float32)
    return found


def share_out(plan: Plan, module: Decoder, mesh: Mesh, run: Callable[[Decoder], Tensor]) -> Tensor:
    """What `run` returns for the first of several ranks that share the module out. Raises IndivisibleError."""

    def of_rank(rank: Rank) -> Tensor:
        try:
            return run(rank.module)
        except BaseException:
            rank.abort()
            raise

    with ThreadPoolExecutor(mesh.size) as pool:
        first, *_ = pool.map(of_rank, ranks_of(plan, module, mesh))
    return first


class Table:
    """Where threads lay what the others shall see."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, Barrier(size)
        self.places = [torch.empty(0)] * size
        self.mail: dict[tuple[int, int], Queue[Tensor]] = defaultdict(Queue)


@dataclass
class Threads:
    """A Group of threads of one process."""

    rank: int
    table: Table

    @property
    def size(self) -> int:
        return self.table.size

    def sum(self, x: Tensor) -> Tensor:
        """In the order of the ranks."""
        return torch.stack(self._all(x)).sum(0)

    def join(self, x: Tensor, widths: list[int]) -> Tensor:
        """On every rank."""
        return torch.cat(self._all(x), dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """The same tensor on all."""
        return self._all(x)[0]

    def send(self, x: Tensor, rank: int) -> Callable[[], None]:
        """By a queue."""
        self.table.mail[self.rank, rank].put(x.clone())
        return lambda: None

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """Another tensor than `x`."""
        return self.table.mail[rank, self.rank].get(timeout=60)

    def _all(self, x: Tensor) -> list[Tensor]:
        self.table.places[self.rank] = x
        self.table.barrier.wait()
        found = [*self.table.places]
        self.table.barrier.wait()
        return found


def _check_fields(slot: str, node: Node, card: Mapping[str, Any] | None, variants: Mapping[str, Any]) -> None:
    spec = manager().catalog.spec(manager().catalog.find(slot, node["kind"]))
    before = _trace(_host(slot, node, card))
    for name, values in _other_values(spec, node, variants):
        assert values, f"pass variants={{{name!r}: ...}}: no other value of this field can be guessed"
        assert any(_differs(_host(slot, {**node, name: value}, card), before) for value in values), (
            f"the field {name!r} of {slot} {node['kind']!r} has no effect: tried {values}"
        )


def _other_values(spec: type[Spec], node: Node, variants: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Each field that a card's author writes, with values that differ from the present one."""
    for name, field in spec.model_fields.items():
        if name == "kind" or any(isinstance(mark, Inherited | Slot) for mark in field.metadata):
            continue
        present = node.get(name, None if field.is_required() else field.default)
        yield name, [variants[name]] if name in variants else _guesses(present, field.annotation)


def _guesses(present: Any, annotation: Any) -> list[Any]:
    if isinstance(present, bool):
        return [not present]
    if isinstance(present, int):
        return [2 * present, present + 2, max(1, present // 2)]
    if isinstance(present, float):
        return [3 * present]
    return [value for value in get_args(annotation) if isinstance(value, str) and value != present]


def _trace(card: Node) -> tuple[Any, ...]:
    """What a setting can change: parameters, state and logits."""
    plan, module = _built(card)
    shapes = {name: param.shape for name, param in plan.model.all_parameters().items()}
    state = [(spec.kind, spec.nbytes(LENGTH, 4)) for spec in module.spec.states() if spec]
    return shapes, state, prefill(module, _tokens(module, LENGTH))


def _differs(card: Node, before: tuple[Any, ...]) -> bool:
    try:
        after = _trace(card)
    except CardError:
        return True
    if after[:2] != before[:2]:
        return True
    return not torch.equal(after[2], before[2])
