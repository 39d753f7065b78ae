"""Settings of the squared-ReLU feed-forward."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from zoo.registry.spec import Inherited, Param, Spec, Split


class ReluSquaredSpec(Spec):
    """down(relu(up(x))^2), without a gate (So et al., arXiv 2109.08668)."""

    module: ClassVar[str] = "zoo_primer.squared_relu:ReluSquared"

    kind: Literal["relu_squared"] = "relu_squared"
    dim: Annotated[int, Inherited()] = Field(gt=0, description="Size of the residual stream.")
    hidden_dim: Annotated[int, Split()] = Field(gt=0, description="Size between the projections.")

    def parameters(self) -> dict[str, Param]:
        return {
            "up.weight": Param((self.hidden_dim, self.dim), shard=0),
            "down.weight": Param((self.dim, self.hidden_dim), shard=1),
        }
