"""Plan -> modules on the meta device: shapes and names, no memory."""

import torch

from zoo.components.build import build
from zoo.components.decoder.model import Decoder
from zoo.registry.errors import CardError
from zoo.registry.resolve import Plan


def assemble(plan: Plan, dtype: torch.dtype) -> Decoder:
    """The plan's model with every parameter on the meta device, in `dtype` unless its Param says float32.

    Raises CardError when a component's module does not hold the parameters that its Spec declares.
    """
    with torch.device("meta"):
        module = build(plan.model).to(dtype)
    declared = plan.model.all_parameters()
    found = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name in declared.keys() | found.keys():
        if name not in declared or found.get(name) != declared[name].shape:
            raise CardError(
                "a component's module and its Spec disagree",
                where=name,
                found=found.get(name, "no such parameter in the module"),
                expected=str(declared[name].shape) if name in declared else "no such parameter",
                hint="correct `parameters()` of the component's Spec or its module",
            )
    for name, param in declared.items():
        if param.dtype == "float32":
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            setattr(holder, leaf, torch.nn.Parameter(getattr(holder, leaf).float(), requires_grad=False))
    assert isinstance(module, Decoder)
    return module.requires_grad_(False).eval()
