"""Where a model runs and in which number format: what the machine really has, said in one line."""

from dataclasses import dataclass

import torch

from zoo.components import native
from zoo.costs.work import usual_dtype
from zoo.machine import free_memory, processor
from zoo.registry.errors import RequestError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, a dtype, and the sentence that says why."""

    device: torch.device
    dtype: torch.dtype
    note: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose(device: str, dtype: str, card_dtype: str) -> Placement:
    """The placement for `--device` and `--dtype`; "auto" picks the best that the machine has.

    Raises RequestError for an unknown or absent device or dtype, naming what there is.
    """
    chosen = _device(device)
    if dtype != "auto":
        if dtype not in DTYPES:
            raise RequestError(
                "unknown dtype",
                where="dtype",
                found=repr(dtype),
                expected=f"auto or one of {', '.join(DTYPES)}",
                hint=nearest(str(dtype).removeprefix("torch."), DTYPES),
            )
        _refuse_missing(chosen, DTYPES[dtype])
        return Placement(chosen, DTYPES[dtype], f"{chosen}, {dtype} as asked{_without_kernels(chosen)}")
    best = _best_dtype(chosen, card_dtype)
    name = str(best).removeprefix("torch.")
    why = "" if name == card_dtype else f" (the weights are {card_dtype}, which this device does not compute well)"
    return Placement(chosen, best, f"{chosen}, {name}{why}{_without_kernels(chosen)}")


def _without_kernels(device: torch.device) -> str:
    """What a CPU is slowed by that an installation could mend; what the kernels' check finds is told by itself."""
    reason = native.unusable() if device.type == "cpu" else None
    return f" (without the native kernels: {reason})" if reason in (native.NOT_BUILT, native.OLDER) else ""


def memory_free(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, before the operating system would have to swap.

    On a GPU what torch keeps of freed memory is given back first: another size may need it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    known = ["auto", "cpu", "cuda", "cuda:N", "mps"]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise RequestError(
            "unknown device",
            where="device",
            found=repr(name),
            expected=f"one of {', '.join(known)}",
            hint=nearest(str(name), known),
        ) from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise RequestError(
            "the device is not there",
            where="device",
            found=f"{name!r} with {count.get(device.type, 0)} {device.type} device(s) on this machine",
            expected="a device that this installation of torch sees",
            hint="`zoo doctor` lists what was found; `--device cpu` always works",
        )
    return device


def _lacks_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def _best_dtype(device: torch.device, card_dtype: str) -> torch.dtype:
    if card_dtype == "bfloat16" and _lacks_bfloat16(device):
        return torch.float16
    return DTYPES.get(usual_dtype(card_dtype, device.type), torch.bfloat16)


def _refuse_missing(device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and _lacks_bfloat16(device):
        raise RequestError(
            "this GPU does not compute in bfloat16",
            where="dtype",
            found=torch.cuda.get_device_name(device),
            expected="compute capability 8.0 or later",
            hint="use --dtype float16 or --dtype auto",
        )


def describe(device: torch.device) -> str:
    """The device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
