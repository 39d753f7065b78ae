"""Settings of the feed-forward layers: gated, mixture of experts, and the routers of mixtures."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count, Flag, Positive
from zoo.registry.spec import Inherited, Param, Part, Slot, Spec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]


class GatedSpec(Spec):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu (Shazeer, arXiv 2002.05202)."""

    module: ClassVar[str] = "zoo.components.ffn.gated:Gated"

    kind: Literal["gated"] = "gated"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    hidden_dim: Count = Field(description="Size between the projections.")
    activation: Activation = Field(
        default="silu",
        description="Function of the gate; gelu_tanh is the tanh approximation of gelu, relu2 the square of relu.",
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections of the input, in the order in which they are stored, `hidden_dim` rows each."""
        return ("gate", "up")

    def parameters(self) -> dict[str, Param]:
        rows = self.hidden_dim
        parts = {"gate.weight": Part(((0, rows),)), "up.weight": Part(((rows, 2 * rows),))}
        return {
            "gate_up.weight": Param((2 * rows, self.dim), shard=0, parts=parts),
            "down.weight": Param((self.dim, rows), shard=1),
        }


class MLPSpec(Spec):
    """down(activation(up(x))), without a gate: Nemotron-H's with relu2 (So et al., arXiv 2109.08668)."""

    module: ClassVar[str] = "zoo.components.ffn.mlp:MLP"

    kind: Literal["mlp"] = "mlp"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    hidden_dim: Count = Field(description="Size between the projections.")
    activation: Activation = Field(
        description="Function between the projections; gelu_tanh is the tanh approximation of gelu, relu2 the square "
        "of relu."
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections of the input, `hidden_dim` rows each."""
        return ("up",)

    def parameters(self) -> dict[str, Param]:
        return {
            "up.weight": Param((self.hidden_dim, self.dim), shard=0),
            "down.weight": Param((self.dim, self.hidden_dim), shard=1),
        }


EXPERTS = (GatedSpec, MLPSpec)
"""What an expert of a mixture may be: kinds that name their `inputs`, and whose modules have `between`."""

Expert = GatedSpec | MLPSpec


class SoftmaxTopkSpec(Spec):
    """Mixtral's router: the best `experts_per_token` logits, softmax over these (Jiang et al., arXiv 2401.04088)."""

    module: ClassVar[str] = "zoo.components.ffn.router:SoftmaxTopk"

    kind: Literal["softmax_topk"] = "softmax_topk"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_experts: Annotated[Count, Inherited()] = Field(description="Experts to choose from.")
    experts_per_token: Annotated[Count, Inherited()] = Field(description="Experts chosen for each token.")

    def parameters(self) -> dict[str, Param]:
        return {"weight": Param((self.num_experts, self.dim))}


class _Grouped(Spec):
    """Settings of routers that score all experts and may first choose among groups of them."""

    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_experts: Annotated[Count, Inherited()] = Field(description="Experts to choose from.")
    experts_per_token: Annotated[Count, Inherited()] = Field(description="Experts chosen for each token.")
    groups: Count = Field(default=1, description="Groups of neighbouring experts; a divisor of num_experts.")
    groups_per_token: Count = Field(default=1, description="Groups whose experts a token may choose from.")
    scale: Positive = Field(default=1.0, description="What the weights are multiplied with at last.")

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_experts % self.groups:
            raise ValueError(
                f"groups must divide num_experts; found groups {self.groups} and num_experts {self.num_experts}"
            )
        if self.groups_per_token > self.groups:
            raise ValueError(
                "groups_per_token must not exceed groups; "
                f"found groups_per_token {self.groups_per_token} and groups {self.groups}"
            )
        if self.groups_per_token * self.num_experts // self.groups < self.experts_per_token:
            raise ValueError(
                "the groups of a token must hold experts_per_token experts; "
                f"found {self.groups_per_token} groups of {self.num_experts // self.groups}"
            )
        return self


class SoftmaxSpec(_Grouped):
    """The best of the softmax over all experts, as DeepSeek-V2's router (arXiv 2405.04434); computed in float32.

    A group counts as much as its best expert.
    """

    module: ClassVar[str] = "zoo.components.ffn.router:Softmax"

    kind: Literal["softmax"] = "softmax"
    normalize: Flag = Field(default=False, description="Whether the weights of a token are divided by their sum.")

    def parameters(self) -> dict[str, Param]:
        return {"weight": Param((self.num_experts, self.dim))}


class SigmoidSpec(_Grouped):
    """Experts chosen by sigmoid and a learned bias, weighted by the sigmoid alone: DeepSeek-V3's (arXiv 2412.19437).

    Computed in float32. A group counts as much as its best two experts together.
    """

    module: ClassVar[str] = "zoo.components.ffn.router:Sigmoid"

    kind: Literal["sigmoid"] = "sigmoid"
    normalize: Flag = Field(default=True, description="Whether the weights of a token are divided by their sum.")

    @model_validator(mode="after")
    def _check_group_size(self) -> Self:
        if self.groups > 1 and self.num_experts // self.groups < 2:
            raise ValueError("a group must hold two experts or more; found groups of one")
        return self

    def parameters(self) -> dict[str, Param]:
        bias = Param((self.num_experts,), init="zeros", product=False, dtype="float32")
        return {"weight": Param((self.num_experts, self.dim)), "bias": bias}


class MoESpec(Spec):
    """A mixture of experts of which each token uses a few (Shazeer et al., arXiv 1701.06538)."""

    module: ClassVar[str] = "zoo.components.ffn.moe:MoE"

    kind: Literal["moe"] = "moe"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_experts: Count = Field(description="Experts of the layer.")
    experts_per_token: Count = Field(description="Experts used by one token.")
    router: Annotated[Spec, Slot("router", default="softmax_topk", absent="build")] = Field(
        description="Chooses experts and their weights for each token."
    )
    expert: Annotated[Spec, Slot("ffn")] = Field(description="One expert: a feed-forward, gated or not.")
    shared: Annotated[Spec | None, Slot("ffn")] = Field(
        default=None, description="A feed-forward that every token uses beside its experts; null for none."
    )

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                "experts_per_token must not exceed num_experts; "
                f"found experts_per_token {self.experts_per_token} and num_experts {self.num_experts}"
            )
        if not isinstance(self.expert, EXPERTS):
            kinds = " or ".join(repr(kind.model_fields["kind"].default) for kind in EXPERTS)
            raise ValueError(f"the experts of a mixture must be of kind {kinds}; found kind '{self.expert.kind}'")
        return self

    @property
    def form(self) -> Expert:
        """The expert, by its own type."""
        assert isinstance(self.expert, EXPERTS)
        return self.expert

    def parameters(self) -> dict[str, Param]:
        experts, rows, share = self.num_experts, self.form.hidden_dim, self.experts_per_token / self.num_experts
        inputs: dict[str, Part] = {}
        for e in range(experts):
            for i, name in enumerate(self.form.inputs):
                inputs[f"experts.{e}.{name}.weight"] = Part((e, (i * rows, (i + 1) * rows)))
        down = {f"experts.{e}.down.weight": Part((e,)) for e in range(experts)}
        width = len(self.form.inputs) * rows
        return {
            "experts_in": Param((experts, width, self.dim), shard=1, parts=inputs, active=share),
            "experts_down": Param((experts, self.dim, rows), shard=2, parts=down, active=share),
        }

    def children(self) -> dict[str, Spec]:
        """The router and what is shared: experts are stacked in this component's own parameters."""
        return {"router": self.router} | ({} if self.shared is None else {"shared": self.shared})
