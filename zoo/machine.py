"""Facts of this machine that need no torch."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux tells of the processors."""


def processor() -> str:
    """The processor's name, as the system tells it, and the numbers that tell one generation from the next: virtual
    machines often name no more than the maker."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    numbers = [f"{name.removeprefix('cpu ')} {told[name]}" for name in ("cpu family", "model") if name in told]
    return " ".join((told["model name"], *numbers))


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_folder() -> Path:
    """Where zoo keeps what it has measured of this machine: `$XDG_CACHE_HOME/zoo`, else `~/.cache/zoo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo"


def free_memory() -> int:
    """Bytes of main memory that can be taken without swapping, within this process's control group."""
    free = _system_free()
    limit = _read_number(Path("/sys/fs/cgroup/memory.max"))
    used = _read_number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return max(free, 0)


def total_memory() -> int:
    """Bytes of main memory in the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpus_free() -> list[int]:
    """Bytes free on each GPU, as NVIDIA's driver tells them; none where it is not installed or does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = [command, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return [int(line) << 20 for line in told.splitlines()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def resident_memory() -> int:
    """Bytes of main memory that this process holds; 0 where the system does not tell."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def _system_free() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # macOS has no figure for memory that could be reclaimed: half of the memory is a cautious stand-in.
    return total_memory() // 2


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
