"""Weights in archives of torch.save (.pth, .pt, .bin), opened only through torch's own loader of plain weights.

The archive is mapped, so its tensors cost memory only while they are copied: the mapped pages count as resident but
are the page cache's own, and go with the file.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from zoo.loading.reader import TensorInfo
from zoo.registry.errors import WeightsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_archive(path: Path) -> dict[str, torch.Tensor]:
    """The archive's tensors by name, mapped from the file. Raises WeightsError; runs no code from the file."""
    if not zipfile.is_zipfile(path):
        raise WeightsError(
            "the archive is cut off or damaged",
            where=str(path),
            found=f"{path.stat().st_size} bytes without an archive's end",
            hint="fetch the file again",
        )
    try:
        data = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise _refused(path) from None
    except (RuntimeError, EOFError, KeyError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError("not a whole archive of torch.save", where=str(path), found=found) from None
    if not isinstance(data, dict):
        raise WeightsError("not a table of tensors", where=str(path), found=f"a {type(data).__name__}")
    for name, value in data.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise WeightsError(
                "not a table of tensors",
                where=str(path),
                found=f"{name!r} is a {type(value).__name__}",
                expected="names and tensors only",
                hint="save the model's state_dict alone",
            )
    return data


def read_archive_headers(path: Path) -> dict[str, TensorInfo]:
    """The archive's tensors as `reader.read_headers` gives them, in the order of their data."""
    tensors = open_archive(path)
    lowest = min((tensor.data_ptr() for tensor in tensors.values()), default=0)
    found = {}
    for name, tensor in tensors.items():
        start = tensor.data_ptr() - lowest
        stop = start + tensor.numel() * tensor.element_size()
        dtype = NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        found[name] = TensorInfo(name, tuple(tensor.shape), dtype, path, start, stop, pickled=True)
    return found


def _refused(path: Path) -> WeightsError:
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a pickle that even the lister of its globals refuses
        named = []
    return WeightsError(
        "refused: the archive holds more than tensors and could run code",
        where=str(path),
        found=", ".join(named) or "an instruction that plain weights do not need",
        expected="a dictionary of tensors",
        hint="load it with torch where you trust it and save the tensors as safetensors",
    )
