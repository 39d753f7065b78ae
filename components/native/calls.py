"""Calls of the C sources, which can be recorded: a decode step makes the same ones again and again.

Between two calls Python looks up modules, asks tensors for their addresses and makes new ones, which takes longer than
many a kernel. A record has the calls with their addresses, and runs them without all that. What PyTorch computes in
between is recorded too, and computed again into the same tensors.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SMALLEST = 1 << 12
"""Bytes of the smallest piece of an arena; others are larger by powers of two."""

ASKED = {
    "tolist",
    "numpy",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "tensor",
    "as_tensor",
    "from_numpy",
}
"""What brings numbers from tensors to the host, or new ones from there: no record could do it again."""


class Library:
    """A library loaded by ctypes, whose functions are recorded where a record is made in the calling thread."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Function:
        function = Function(getattr(self._library, name))
        setattr(self, name, function)
        return function


class Function:
    """A function of a library. checked: whether it returns a number that is 0 where all went well."""

    def __init__(self, function: Any) -> None:
        self._function, self.checked = function, False

    def declare(self, arguments: Sequence[Any], *, checked: bool = False) -> None:
        """Says what it takes."""
        self._function.argtypes, self.checked = list(arguments), checked

    def __call__(self, *arguments: Any) -> int:
        record = _current.record
        if record is not None:
            record.add(partial(self._again if self.checked else self._function, *arguments))
        found: int = self._function(*arguments)
        return found

    def _again(self, *arguments: Any) -> None:
        if self._function(*arguments):
            raise MemoryError("no memory for what a kernel holds in between")


class _Current(threading.local):
    record: Record | None = None


_current = _Current()


def keep(value: Any) -> None:
    """Says that a record that this thread makes needs this, of which calls know the address alone."""
    if _current.record is not None:
        _current.record.keep(value)


class Arena:
    """Memory for what kernels hand to each other. A piece is taken again once no tensor uses it any more, and stays
    where it is for as long as the arena is there: records know it by its address."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[torch.UntypedStorage]] = {}
        self._places: set[int] = set()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is of this arena."""
        return tensor.untyped_storage().data_ptr() in self._places

    @property
    def nbytes(self) -> int:
        return sum(size * len(pieces) for size, pieces in self._pieces.items())

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An empty tensor."""
        count = 1
        for length in shape:
            count *= length
        size = max(SMALLEST, 1 << (count * dtype.itemsize - 1).bit_length())
        pieces = self._pieces.setdefault(size, [])
        piece = next((known for known in pieces if _users(known) == 1), None)
        if piece is None:
            piece = torch.UntypedStorage(size)
            pieces.append(piece)
            self._places.add(piece.data_ptr())
        raw = torch.empty(0, dtype=torch.uint8).set_(piece)
        return raw.narrow(0, 0, count * dtype.itemsize).view(dtype).view(tuple(shape))


def _users(storage: torch.UntypedStorage) -> int:
    """How many tensors and others use a piece of memory."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


class Record:
    """What a function did: the calls of C sources and of PyTorch, in their order.

    refused: why it cannot be done again, None where it can. `make` runs the function once, truly, and records it;
    `run` does the same again, with what the same tensors hold then.
    """

    def __init__(self, arena: Arena) -> None:
        self.refused: str | None = None
        self._arena = arena
        self._steps: list[Callable[[], object]] = []
        self._kept: list[Any] = []

    def make(self, function: Callable[[], Tensor]) -> Tensor:
        """Its result, which `run` writes anew."""
        assert _current.record is None, "records are not made within one another"
        _current.record = self
        try:
            with _Operations(self, self._arena), _Asked(self, self._arena):
                found = function()
        finally:
            _current.record = None
        self._kept.append(found)
        return found

    def run(self) -> None:
        for step in self._steps:
            step()

    def add(self, step: Callable[[], object]) -> None:
        """One more step."""
        self._steps.append(step)

    def keep(self, value: Any) -> None:
        """What must stay where it is."""
        self._kept.append(value)

    def refuse(self, reason: str) -> None:
        """Says that this cannot be recorded."""
        self.refused = self.refused or reason


class _Asked(TorchFunctionMode):
    """Finds what a record cannot do: to ask for numbers on the host. Keeps tensors whose addresses were asked for."""

    def __init__(self, record: Record, arena: Arena) -> None:
        super().__init__()
        self._record, self._arena = record, arena

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__ if hasattr(function, "__name__") else ""
        if name in ASKED:
            self._record.refuse(name)
        elif name == "data_ptr" and not self._arena.holds(args[0]):
            self._record.keep(args[0])
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Records PyTorch's operations: views need none, empty tensors get memory of the arena, and all else is done again
    into the tensors that it made."""

    def __init__(self, record: Record, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record, self._arena = record, arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What PyTorch asks of its modes: whether to load its compiler, half a second, to keep it away from here."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.empty.memory_format and _is_plain(kwargs):
            return self._arena.take(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        found = function(*args, **kwargs)
        made = [*_tensors(found)]
        lost = not made and not function._schema.is_mutable
        if lost or not function.name().startswith("aten::") or _sizes_depend(function, args):
            self._record.refuse(function.name())
        elif torch.Tag.inplace_view in function.tags:
            pass
        elif function._schema.is_mutable:
            self._record.add(partial(function, *args, **kwargs))
        elif "empty" in function.name():
            self._record.keep(made)
        else:
            given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            new = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in given]
            if new and len(new) < len(made):
                self._record.refuse(f"{function.name()} of results and views")
            elif new and function is torch.ops.aten.to.dtype:
                self._record.add(partial(new[0].copy_, args[0]))
            elif new:
                self._record.add(partial(_again, function, args, kwargs, new))
        return found


def _again(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    for old, new in zip(made, _tensors(function(*args, **kwargs)), strict=True):
        old.copy_(new)


def _sizes_depend(function: Any, args: Any) -> bool:
    """Whether the sizes of results depend on numbers: of an index, only where it is a mask."""
    if torch.Tag.dynamic_output_shape not in function.tags:
        return False
    is_index = function is torch.ops.aten.index.Tensor
    return not is_index or any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))


def _is_plain(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return not kwargs.get("pin_memory") and kwargs.get("memory_format") is None and str(device or "cpu") == "cpu"


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [*value.values()]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []
