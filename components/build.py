"""From Specs to modules: each Spec names the class that is built from it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from zoo.registry.catalog import load_path
from zoo.registry.errors import PluginError
from zoo.registry.spec import Param, Spec


def build(spec: Spec, *, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module of `spec` and of all below it, with uninitialised parameters on `device`.

    Parameters take `dtype`, except those that their Spec keeps in float32. Raises PluginError when the module's
    parameters are not the ones that the Spec announces.
    """
    with torch.device(device):
        module = make(spec)
    declared = spec.all_parameters()
    _check_parameters(spec, module, declared)
    for name, parameter in module.named_parameters():
        if declared[name].dtype == "model":
            parameter.data = parameter.data.to(dtype)
    return module


def make(spec: Spec) -> nn.Module:
    """The module of `spec` on the current default device: what modules build their children with."""
    module = load(spec.module)(spec)
    assert isinstance(module, nn.Module), spec.module
    return module


@cache
def load(path: str) -> Any:
    """The object that a dotted path such as `zoo.components.norm.rms:RMS` names. Raises PluginError."""
    return load_path(path, path.partition(".")[0], "the module")


def _check_parameters(spec: Spec, module: nn.Module, declared: dict[str, Param]) -> None:
    found = {name: tuple(p.shape) for name, p in module.named_parameters()}
    expected = {name: p.shape for name, p in declared.items()}
    if found == expected:
        return
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    raise PluginError(
        f"the module's parameters differ from its Spec's, first {names[0]!r}",
        where=spec.module,
        found=found.get(names[0], "none"),
        expected=str(expected.get(names[0], "none")),
        hint=f"{len(names)} of {len(expected)} parameters differ",
    )
