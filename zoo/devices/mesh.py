"""How a model is laid out over ranks: tensor, expert and pipeline parallelism, from what a user asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zoo.components.decoder.spec import DecoderSpec
from zoo.devices.cut import Load, cut
from zoo.registry.errors import RequestError
from zoo.registry.spec import IndivisibleError, Share, Spec

Wanted = int | str | Sequence[str] | None
"""A number of devices, their names, or a layout such as "tp=2,pp=2"."""

SIZES = {"tp": "tensor parallelism", "pp": "pipeline parallelism", "ep": "expert parallelism"}


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks as `pp` stages, one after the other, of `tp` ranks that share out each layer.

    ep: tp where ranks share out a mixture's experts whole, 1 where each holds a part of every expert.
    borders: the layers at which stages begin, and the end; without, stages are cut by weights alone.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    borders: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.tp * self.pp

    def share(self, rank: int) -> Share:
        """What a rank holds of its stage's layers."""
        return Share(rank % self.tp, self.tp, self.ep > 1)

    def stage(self, rank: int) -> int:
        """The stage that a rank belongs to."""
        return rank // self.tp

    def layers(self, model: Spec, rank: int) -> tuple[int, int]:
        """The first layer of a rank's stage, and the one behind its last. Raises IndivisibleError."""
        assert isinstance(model, DecoderSpec)
        borders, stage = self.borders or cut(model, self.pp, Load()), self.stage(rank)
        return borders[stage], borders[stage + 1]

    def near(self, rank: int) -> list[int]:
        """The ranks of its stage, itself among them."""
        first = self.stage(rank) * self.tp
        return [*range(first, first + self.tp)]

    @property
    def brief(self) -> str:
        """As `devices` takes it, without what is 1."""
        return ",".join(f"{name}={size}" for name in SIZES if (size := getattr(self, name)) > 1)

    def __str__(self) -> str:
        return f"tp={self.tp},pp={self.pp},ep={self.ep}"


def device_of(kind: str, rank: int) -> str:
    """Where a rank computes on this kind of device: on CUDA, each on a device of its own machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', rank)}" if kind == "cuda" else kind


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for: how many devices, their names where they matter, and sizes that are fixed."""

    count: int
    names: tuple[str, ...] = ()
    fixed: tuple[tuple[str, int], ...] = ()

    def device(self, name: str, rank: int = 0) -> str:
        """The device of a rank: what it is called where devices are named, else `name`. Raises RequestError for
        both."""
        if not self.names:
            return name
        if name not in ("auto", self.names[rank]):
            raise RequestError(
                "devices that have names stand beside another device",
                where="device",
                found=f"device {name!r} and devices {[*self.names]}",
                expected="one of the two",
            )
        return self.names[rank]


def wish(wanted: Wanted) -> Wish:
    """The value of `devices` in order. Raises RequestError for one that means nothing."""
    if isinstance(wanted, str) and wanted.isdecimal():
        wanted = int(wanted)
    if wanted is None:
        return Wish(1)
    if isinstance(wanted, bool) or (isinstance(wanted, int) and wanted < 1):
        raise _meaningless(wanted)
    if isinstance(wanted, int):
        return Wish(wanted)
    if isinstance(wanted, str):
        return _laid_out(wanted)
    names = tuple(wanted) if isinstance(wanted, list | tuple) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise _meaningless(wanted)
    return Wish(len(names), names)


def _laid_out(text: str) -> Wish:
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        if name not in SIZES or name in sizes or not number.isdecimal() or int(number) < 1:
            raise _meaningless(text)
        sizes[name] = int(number)
    ep = sizes.get("ep", 1)
    sizes.setdefault("tp", ep)
    if ep not in (1, sizes["tp"]):
        raise RequestError(
            "experts are shared out among all ranks of a stage or not at all",
            where="devices",
            found=repr(text),
            expected=f"ep=1 or ep={sizes['tp']}, as tp",
        )
    return Wish(sizes["tp"] * sizes.get("pp", 1), fixed=tuple(sizes.items()))


def _meaningless(wanted: object) -> RequestError:
    return RequestError(
        "not a number of devices",
        where="devices",
        found=repr(wanted),
        expected="a number, a list of devices, or sizes such as tp=2,pp=2 (tp: tensor, pp: pipeline, ep: expert)",
    )


def lay_out(model: Spec, wanted: Wish, most_tp: int | None = None) -> Mesh:
    """The layout for a model: what is fixed, else as much tensor parallelism as the sizes allow.

    most_tp: ranks that are near each other, on one machine; layers are shared out among these only.
    Raises RequestError naming the size that does not divide, and what would do.
    """
    fixed = dict(wanted.fixed)
    if fixed:
        mesh = Mesh(fixed["tp"], fixed.get("pp", 1), fixed.get("ep", 1))
        fault = _fault(model, mesh)
        if fault is not None:
            raise _refused(model, mesh, fault)
        return mesh
    faults = []
    for mesh in _layouts(wanted.count, most_tp or wanted.count):
        fault = _fault(model, mesh)
        if fault is None:
            return mesh
        faults.append((mesh, fault))
    raise _refused(model, *faults[0])


def _layouts(count: int, most_tp: int) -> Iterator[Mesh]:
    """Layouts of so many ranks, the best first: layers shared out among as many as possible, parts of experts before
    whole ones."""
    for tp in range(min(count, most_tp), 0, -1):
        if count % tp == 0:
            yield Mesh(tp, count // tp)
            if tp > 1:
                yield Mesh(tp, count // tp, tp)


def check(model: Spec, share: Share) -> None:
    """Raises IndivisibleError for norms that cannot span the ranks."""
    for path, spec in model.walk("model"):
        try:
            spec.means(share)
        except IndivisibleError as error:
            raise IndivisibleError(f"{path}.{error.where}", error.why, error.divisor) from None


def _fault(model: Spec, mesh: Mesh) -> IndivisibleError | None:
    """Why the model cannot be laid out so."""
    try:
        if mesh.pp > 1:
            assert isinstance(model, DecoderSpec)
            cut(model, mesh.pp, Load())
        if mesh.ep > 1 and not any("num_experts" in type(spec).model_fields for _, spec in model.walk()):
            raise IndivisibleError("ep", "a model without experts")
        check(model, mesh.share(0))
        model.divided(mesh.share(0))
    except IndivisibleError as error:
        return error
    return None


def _refused(model: Spec, mesh: Mesh, fault: IndivisibleError) -> RequestError:
    ranks = mesh.size
    found = [next((m for m in _layouts(n, n) if not _fault(model, m)), None) for n in range(2, 2 * ranks + 1)]
    would = [f"{other.size} ({other.brief})" for other in found if other is not None]
    hint = f"devices that would do: {', '.join(would)}" if would else "run it on one device"
    return RequestError(
        f"the model cannot be shared out among {ranks} ranks" + ("" if mesh.pp == 1 else f" as {mesh}"),
        where=fault.where,
        found=fault.why,
        hint=hint,
    )
