"""A step cut into pieces, so that all stages work at a time, gives what it gives in one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.devices.likes import EVERYTHING, filled, make_plan
from zoo.components.cache.store import Store, make_store
from zoo.components.decoder.model import Decoder
from zoo.components.step import Rows
from zoo.devices import stage
from zoo.devices.mesh import Mesh
from zoo.devices.shares import Chain
from zoo.engine.memory import Kept, Memory
from zoo.engine.pack import Batch, split
from zoo.engine.runner import Runner
from zoo.registry.spec import StateSpec
from zoo.testing import TOLERANCE, relative_error, share_out

CPU = torch.device("cpu")


def batch_of(rows: list[int], past: list[int], picks: list[int] | None) -> Batch:
    """Rows of sequences 0, 1, ... after cached ones."""
    positions = [p + i for p, count in zip(past, rows, strict=True) for i in range(count)]
    tokens = [(7 * position + 11 * i) % 67 for i, position in enumerate(positions)]
    return Batch(
        tokens_T=torch.tensor(tokens),
        positions_T=torch.tensor(positions),
        rows_R=None if picks is None else torch.tensor(picks),
        seqs=[*range(len(rows))],
        rows=rows,
        past=past,
        wanted=[],
        adapters=["auto"] * len(rows),
        media=[()] * len(rows),
    )


STEPS = [
    batch_of([7, 1, 12], [0, 0, 0], [6, 7, 19]),
    batch_of([1, 8, 5], [7, 1, 12], None),
    batch_of([1, 1, 1], [8, 9, 17], None),
]


def runner_of(module: Decoder) -> Runner:
    def make(spec: StateSpec, layers: int, budget: int | None) -> Store:
        return make_store(spec, layers, torch.float32, CPU, "slab", budget)

    memory = Memory(Kept(module.spec.states(), make, None), batch=3, context=32, pooled=False)
    return Runner(module, memory, CPU)


def stepped(module: Decoder) -> Tensor:
    runner = runner_of(module)
    for seq in range(3):
        runner.memory.reserve(seq, 20)
    return torch.cat([runner.run(batch) for batch in STEPS])


@pytest.mark.parametrize("mesh", [Mesh(1, 2), Mesh(1, 3), Mesh(2, 2)], ids=str)
def test_pieces_give_what_the_whole_gives(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PIECE", {"cpu": 2})
    plan = make_plan(layers=EVERYTHING)
    module = filled(plan)
    expected = stepped(module)
    given: list[int] = []
    give = Chain.give

    def noted(self: Chain, x_TD: Tensor, others: Sequence[Tensor]) -> None:
        given.append(len(x_TD))
        give(self, x_TD, others)

    monkeypatch.setattr(Chain, "give", noted)
    found = share_out(plan, module, mesh, stepped)
    assert relative_error(found, expected) < TOLERANCE
    assert {*given} == ({3, 4, 5} if mesh.pp == 2 else {2, 3, 4})


def test_steps_with_images_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What encoders made has its rows in the whole step."""
    module = filled(make_plan())
    monkeypatch.setattr(module, "pieces", lambda *_: 3)
    runner = runner_of(module)
    rows = Rows(torch.arange(2), torch.zeros(2, module.spec.dim))
    assert (runner.pieces(STEPS[0], None), runner.pieces(STEPS[0], rows)) == (3, 1)


def test_pieces_are_of_like_size_and_cut_chunks() -> None:
    first, second = split(STEPS[0], 2)
    assert (first.seqs, first.rows, first.past) == ([0, 1, 2], [7, 1, 2], [0, 0, 0])
    assert (second.seqs, second.rows, second.past) == ([2], [10], [2])
    assert torch.equal(torch.cat((first.tokens_T, second.tokens_T)), STEPS[0].tokens_T)
    assert second.positions_T.tolist() == [*range(2, 12)]
    assert split(STEPS[0], 1) == [STEPS[0]]
