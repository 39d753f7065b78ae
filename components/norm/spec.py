"""Settings of the norms."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from zoo.components.fields import Count, Positive
from zoo.registry.spec import Inherited, Param, Spec


class RMSSpec(Spec):
    """Divides by the root mean square and multiplies with a weight (Zhang and Sennrich, arXiv 1910.07467)."""

    module: ClassVar[str] = "zoo.components.norm.rms:RMS"

    kind: Literal["rms"] = "rms"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the vectors that are normalised.")
    eps: Positive = Field(description="Added to the mean square before the root.")

    def parameters(self) -> dict[str, Param]:
        return {"weight": Param((self.dim,), init="ones", product=False)}


class RMSPlusOneSpec(Spec):
    """Divides by the root mean square and multiplies with one plus a weight, all in float32 (Gemma)."""

    module: ClassVar[str] = "zoo.components.norm.rms_plus_one:RMSPlusOne"

    kind: Literal["rms_plus_one"] = "rms_plus_one"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the vectors that are normalised.")
    eps: Positive = Field(description="Added to the mean square before the root.")

    def parameters(self) -> dict[str, Param]:
        return {"weight": Param((self.dim,), init="zeros", product=False)}


class LayerNormSpec(Spec):
    """Takes the mean away, divides by the standard deviation, multiplies with a weight and adds a bias (Ba et al.,
    arXiv 1607.06450)."""

    module: ClassVar[str] = "zoo.components.norm.layer:LayerNorm"

    kind: Literal["layer"] = "layer"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the vectors that are normalised.")
    eps: Positive = Field(description="Added to the variance before the root.")

    def parameters(self) -> dict[str, Param]:
        weight, bias = Param((self.dim,), init="ones", product=False), Param((self.dim,), init="zeros", product=False)
        return {"weight": weight, "bias": bias}
