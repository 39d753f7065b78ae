"""Settings of the feed-forward layers: gated, mixture of experts, and the routers of mixtures."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count
from zoo.registry.spec import Inherited, Param, Part, Slot, Spec

Activation = Literal["silu", "gelu", "gelu_tanh"]


class GatedSpec(Spec):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu (Shazeer, arXiv 2002.05202)."""

    module: ClassVar[str] = "zoo.components.ffn.gated:Gated"

    kind: Literal["gated"] = "gated"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    hidden_dim: Count = Field(description="Size between the projections.")
    activation: Activation = Field(
        default="silu", description="Function of the gate; gelu_tanh is the tanh approximation of gelu."
    )

    def parameters(self) -> dict[str, Param]:
        rows = self.hidden_dim
        parts = {"gate.weight": Part(((0, rows),)), "up.weight": Part(((rows, 2 * rows),))}
        return {
            "gate_up.weight": Param((2 * rows, self.dim), shard=0, parts=parts),
            "down.weight": Param((self.dim, rows), shard=1),
        }


class SoftmaxTopkSpec(Spec):
    """Mixtral's router: the best `experts_per_token` logits, softmax over these (Jiang et al., arXiv 2401.04088)."""

    module: ClassVar[str] = "zoo.components.ffn.router:SoftmaxTopk"

    kind: Literal["softmax_topk"] = "softmax_topk"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_experts: Annotated[Count, Inherited()] = Field(description="Experts to choose from.")
    experts_per_token: Annotated[Count, Inherited()] = Field(description="Experts chosen for each token.")

    def parameters(self) -> dict[str, Param]:
        return {"weight": Param((self.num_experts, self.dim))}


class MoESpec(Spec):
    """A mixture of gated experts of which each token uses a few (Shazeer et al., arXiv 1701.06538)."""

    module: ClassVar[str] = "zoo.components.ffn.moe:MoE"

    kind: Literal["moe"] = "moe"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_experts: Count = Field(description="Experts of the layer.")
    experts_per_token: Count = Field(description="Experts used by one token.")
    router: Annotated[Spec, Slot("router", default="softmax_topk", absent="build")] = Field(
        description="Chooses experts and their weights for each token."
    )
    expert: Annotated[Spec, Slot("ffn")] = Field(description="One expert: a gated feed-forward.")

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                "experts_per_token must not exceed num_experts; "
                f"found experts_per_token {self.experts_per_token} and num_experts {self.num_experts}"
            )
        if not isinstance(self.expert, GatedSpec):
            raise ValueError(f"the experts of a mixture must be of kind 'gated'; found kind '{self.expert.kind}'")
        return self

    @property
    def gated(self) -> GatedSpec:
        """The expert, by its own type."""
        assert isinstance(self.expert, GatedSpec)
        return self.expert

    def parameters(self) -> dict[str, Param]:
        experts, rows, share = self.num_experts, self.gated.hidden_dim, self.experts_per_token / self.num_experts
        gate_up: dict[str, Part] = {}
        for e in range(experts):
            gate_up[f"experts.{e}.gate.weight"] = Part((e, (0, rows)))
            gate_up[f"experts.{e}.up.weight"] = Part((e, (rows, 2 * rows)))
        down = {f"experts.{e}.down.weight": Part((e,)) for e in range(experts)}
        return {
            "experts_gate_up": Param((experts, 2 * rows, self.dim), shard=1, parts=gate_up, active=share),
            "experts_down": Param((experts, self.dim, rows), shard=2, parts=down, active=share),
        }

    def children(self) -> dict[str, Spec]:
        """The router alone: experts are stacked in this component's own parameters."""
        return {"router": self.router}
