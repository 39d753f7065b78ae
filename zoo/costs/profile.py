"""What was measured of this machine once, kept in the user's cache folder: limits, and how near zoo comes to them."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from zoo.components import compiled
from zoo.machine import cache_folder, cores, processor
from zoo.registry.errors import ZooError

RENEW = "`zoo bench --machine` measures this machine and stores what it finds"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Key(_Data):
    """What the figures depend on. A profile whose key is not that of the running installation is refused.

    threads: OMP_NUM_THREADS, where it is set. torch, zoo: versions. native: what ZOO_NATIVE asks of the
    kernels in C, or "none" where they are not built or left out. packed: whether weights are packed for them.
    accelerator: a GPU's name, or None for the CPU.
    """

    processor: str
    cores: PositiveInt
    threads: str | None
    torch: str
    zoo: str
    native: str
    packed: bool
    accelerator: str | None = None

    @classmethod
    def here(cls, accelerator: str | None = None) -> Self:
        """The key of this process, found without importing torch."""
        return cls(
            processor=processor(),
            cores=cores(),
            threads=os.environ.get("OMP_NUM_THREADS"),
            torch=importlib.metadata.version("torch"),
            zoo=importlib.metadata.version("zoo-inference"),
            native=os.environ.get("ZOO_NATIVE", "auto") if kernels_file() else "none",
            packed=compiled.packs(),
            accelerator=accelerator,
        )


class Limits(_Data):
    """What the machine can do at most, whatever the program.

    read: bytes per second from main memory (a GPU's: of a copy, read and written), by every way that was tried; the
    limit is the fastest. multiply: multiply-adds per second of large products, by number format. call_s: seconds that
    the smallest operation takes to call.
    """

    read: dict[str, PositiveFloat] = Field(min_length=1)
    multiply: dict[str, PositiveFloat]
    call_s: PositiveFloat

    @property
    def read_way(self) -> str:
        """The way that reads fastest."""
        return max(self.read, key=self.read.__getitem__)

    @property
    def bytes_per_second(self) -> float:
        """The fastest that memory was read."""
        return self.read[self.read_way]


class Product(_Data):
    """Seconds for each element of a matrix of `elements` elements that is multiplied with `rows` rows."""

    elements: PositiveInt
    rows: PositiveInt
    seconds: PositiveFloat


class Pace(_Data):
    """What a part takes beside its products.

    call_s: seconds in each step. item_s: and for each sequence in it, or each expert that it touches. read: bytes per
    second of what single rows read of their cache. multiply: multiply-adds per second of what tokens do with earlier
    ones, where a sequence has many rows. channel_s: seconds for each channel of a state, whatever its size, and each
    of these rows.
    """

    call_s: NonNegativeFloat
    item_s: NonNegativeFloat
    read: PositiveFloat | None = None
    multiply: PositiveFloat | None = None
    channel_s: NonNegativeFloat = 0.0


class Speed(_Data):
    """How fast zoo's own parts run in one number format.

    products: times of products by kind of weights ("plain", or a quantised one). memory: bytes per second at which main
    memory was read meanwhile, as it changes where others share it; nothing of a GPU. elements: activations per second
    that small operations take in and give, between products. step_s, sequence_s: seconds that the engine takes for a
    step, and for each sequence. paces: by what components say of themselves.
    """

    products: dict[str, tuple[Product, ...]] = Field(min_length=1)
    memory: dict[str, PositiveFloat] = {}
    elements: PositiveFloat
    step_s: NonNegativeFloat
    sequence_s: NonNegativeFloat
    paces: dict[str, Pace]


class Profile(_Data):
    """One device of this machine. measured: when, in UTC. seconds: how long that took. speeds: by number format."""

    key: Key
    measured: str
    seconds: PositiveFloat
    limits: Limits
    speeds: dict[str, Speed]

    @property
    def device(self) -> str:
        """The device's name for people."""
        if self.key.accelerator:
            return self.key.accelerator
        return f"{self.key.processor}, {self.key.threads or self.key.cores} threads"


def profile_file(device: str) -> Path:
    """Where the profile of a kind of device, cpu or cuda, is kept."""
    return cache_folder() / f"machine-{device}.json"


def place(device: str) -> Path:
    """Where the profile is to be stored: a file's name in a folder that is there and lets files be written.

    Raises ZooError where it does not.
    """
    file = profile_file(device)
    with _storing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    return file


def store(profile: Profile, device: str) -> Path:
    """Writes the profile in one go, so that no reader sees half of it, and returns where."""
    file = place(device)
    with _storing(file):
        half = file.with_suffix(f".{os.getpid()}")
        half.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
        half.replace(file)
    return file


@contextmanager
def _storing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ZooError(
            "the machine's profile cannot be stored",
            where=str(file),
            found=error.strerror,
            hint="XDG_CACHE_HOME names another folder for it",
        ) from None


def stored(device: str, accelerator: str | None = None) -> Profile:
    """The profile of this machine. Raises ZooError when there is none, a broken one, or one of other circumstances.

    accelerator: the GPU's name where it is known.
    """
    file = profile_file(device)
    try:
        profile = Profile.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ZooError("this machine has not been measured", where=str(file), hint=RENEW) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError("the machine's profile cannot be read", where=str(file), found=str(error), hint=RENEW) from None
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{first['msg']} at {'.'.join(map(str, first['loc'])) or 'the beginning'}"
        raise ZooError("the machine's profile is broken", where=str(file), found=found, hint=RENEW) from None
    here = Key.here(accelerator or profile.key.accelerator)
    for name, value in here.model_dump().items():
        was = getattr(profile.key, name)
        if was != value:
            raise ZooError(
                "the machine's profile is of other circumstances",
                where=str(file),
                found=f"{name} {was}",
                expected=str(value),
                hint=RENEW,
            )
    return profile


def kernels_file() -> Path | None:
    """Zoo's kernels in C, found without importing them; None where they are not built or left out by ZOO_NATIVE."""
    return None if os.environ.get("ZOO_NATIVE") == "off" else compiled.kernels_file()
