"""The end of a loaded model."""

from __future__ import annotations

import gc
import weakref

import pytest

import zoo
from zoo.components import native
from zoo.components.native import panels

HAS_PANELS = native.missing() is None


@pytest.mark.parametrize(
    "packing",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not HAS_PANELS, reason="no native kernels")),
    ],
)
def test_close_lets_go_of_the_weights(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packing:
        monkeypatch.setattr(panels, "pays", lambda _: False)
    model = zoo.load("tiny", weights="random", device="cpu")
    assert model.module.norm.weight.device.type == "cpu"
    assert any(weight.is_meta for weight in model.module.parameters()) == packing
    held = [weakref.ref(part) for part in model.module.modules()]
    model.close()
    gc.collect()
    assert not [part for part in held if part() is not None]
    assert all(weight.is_meta for weight in model.module.parameters())
    with pytest.raises(zoo.ZooError, match="the model was closed"):
        model.generate("Hello")
