"""What a component's author tests: zoo's conformance kit, and the formula itself."""

import torch
from zoo_primer.spec import ReluSquaredSpec

from zoo.components.build import build
from zoo.testing import check_component


def test_conformance() -> None:
    check_component("ffn", {"kind": "relu_squared", "hidden_dim": 48})


def test_formula() -> None:
    module = build(ReluSquaredSpec(dim=8, hidden_dim=12), device="cpu")
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    up_FD, down_DF = (parameter.detach() for parameter in module.parameters())
    x_TD = torch.randn(5, 8)
    expected_TD = torch.clamp(x_TD @ up_FD.T, min=0) ** 2 @ down_DF.T
    torch.testing.assert_close(module(x_TD), expected_TD)
