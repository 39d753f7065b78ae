"""Plan -> modules on the meta device: shapes and names, no memory."""

import torch

from zoo.components.build import build
from zoo.components.decoder.model import Decoder
from zoo.registry.resolve import Plan


def assemble(plan: Plan, dtype: torch.dtype) -> Decoder:
    """The plan's model with every parameter on the meta device, in `dtype` unless its Param says float32.

    Raises PluginError when a component's module does not hold the parameters that its Spec declares.
    """
    module = build(plan.model, device="meta", dtype=dtype)
    assert isinstance(module, Decoder)
    return module.requires_grad_(False).eval()
