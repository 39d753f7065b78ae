"""zoo plugins and doctor: what is installed here."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import click

from zoo.components.compiled import unbuilt
from zoo.units import human_bytes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def plugins(as_json: bool) -> None:
    """Show the plugins, what they provide, and those that failed."""
    from zoo.cli.console import columns, emit
    from zoo.registry.manager import manager

    rows = manager().plugins()
    if as_json:
        emit([{"name": p.name, "version": p.version, "status": p.status, "provides": [*p.provides]} for p in rows])
        return
    table = [[p.name, p.version or "-", p.status, ", ".join(p.provides) or "-"] for p in rows]
    click.echo(columns([["NAME", "VERSION", "STATUS", "PROVIDES"], *table]))


@click.command()
def doctor() -> None:
    """Show what this machine and installation have, what is missing, and what that costs."""
    from zoo.cli.console import columns
    from zoo.machine import free_memory, total_memory

    facts = [
        ["zoo", importlib.metadata.version("zoo-inference")],
        ["python", f"{platform.python_version()} at {sys.executable}"],
        ["system", f"{platform.platform()}, {os.cpu_count()} processors"],
        ["memory", f"{human_bytes(free_memory())} free of {human_bytes(total_memory())}"],
        ["disk", f"{human_bytes(shutil.disk_usage(_cache()).free)} free for {_cache()}"],
        *_torch(),
        ["native kernels", _native()],
        ["--quantize", _quantised()],
        *([name, _optional(name, cost)] for name, cost in _OPTIONAL.items()),
    ]
    click.echo(columns(facts, heading=False))


_OPTIONAL = {
    "triton": "on a GPU, zoo's own kernels are left out and PyTorch's operations run",
    "xformers": "ZOO_ATTENTION=xformers is not available; torch's own attention is the default everywhere",
}


def _optional(name: str, cost: str) -> str:
    found = importlib.util.find_spec(name) is not None
    return importlib.metadata.version(name) if found else f"not installed: {cost}"


def _torch() -> list[list[str]]:
    import torch

    devices = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        devices.append("mps")
    cpu = torch.backends.cpu.get_cpu_capability()
    return [
        ["torch", f"{torch.__version__}, {torch.get_num_threads()} threads, CPU kernels {cpu}"],
        ["devices", "; ".join(devices) or "no GPU: the model runs on the CPU"],
    ]


_WAYS = {1: "multiply-adds of AVX-512", 2: "AVX512-BF16", 3: "AMX tiles"}


def _native() -> str:
    """What is used, and what that gives or what its absence costs: a short race on this machine."""
    from zoo.components import native
    from zoo.components.native.measure import plain_read_rate, product_rates

    rates = {name: f"{rate / 1e9:.0f}" for name, rate in product_rates().items()}
    reason = native.missing()
    if reason is None:
        few = native.library().single if native.library().level == native.TILES else 0
        way = f"by {_WAYS[native.library().level]}" + (f", up to {few} rows by multiply-adds" if few else "")
        return f"{way}: one token reads weights at {rates['native']} GB/s, by torch's kernels at {rates['torch']}"
    reason = f"not built: {unbuilt()}" if reason == native.NOT_BUILT else reason
    limit = f"{plain_read_rate() / 1e9:.0f}"
    return f"{reason}; one token reads weights at {rates['torch']} GB/s, where memory gives {limit} or more"


def _quantised() -> str:
    from zoo.components.native.quantised import by_tiles
    from zoo.components.quantised import is_native

    if is_native():
        return "products in eight bits by AVX-512 VNNI" + (", of prompts by AMX tiles" if by_tiles() else "")
    return "no native kernels, or no AVX-512 VNNI: quantised weights save memory, but are slower than bfloat16"


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    return next(folder for folder in (home, *home.parents) if folder.exists())
