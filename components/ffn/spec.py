"""Settings of the feed-forward layers: gated, mixture of experts, and the routers of mixtures."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count, Flag, Positive
from zoo.registry.spec import IndivisibleError, Inherited, Param, Part, Share, Slot, Spec, Split

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]


class GatedSpec(Spec):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu (Shazeer, arXiv 2002.05202)."""

    module: ClassVar[str] = "zoo.components.ffn.gated:Gated"

    kind: Literal["gated"] = "gated"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    hidden_dim: Annotated[Count, Split()] = Field(description="Size between the projections.")
    activation: Activation = Field(
        default="silu",
        description="Function of the gate; gelu_tanh is the tanh approximation of gelu, relu2 the square of relu.",
    )

    @property
    def inputs(self) -> dict[str, int]:
        """The projections of the input and their rows, in the order in which they are stored."""
        return {"gate": self.hidden_dim, "up": self.hidden_dim}

    def pace(self) -> str:
        return self.kind

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
    hidden_dim: Annotated[Count, Split()] = Field(description="Size between the projections.")
    activation: Activation = Field(
        description="Function between the projections; gelu_tanh is the tanh approximation of gelu, relu2 the square "
        "of relu."
    )

    @property
    def inputs(self) -> dict[str, int]:
        """The projections of the input and their rows."""
        return {"up": self.hidden_dim}

    def pace(self) -> str:
        return self.kind

    def parameters(self) -> dict[str, Param]:
        return {
            "up.weight": Param((self.hidden_dim, self.dim), shard=0),
            "down.weight": Param((self.dim, self.hidden_dim), shard=1),
        }


class ClampedSpec(Spec):
    """gpt-oss's feed-forward: down(g sigmoid(gain g) (u + 1)), with g and u limited and a bias for each projection.

    Gate and up are one projection, whose rows alternate: gate 0, up 0, gate 1, ... Source: gpt_oss/torch/model.py of
    openai/gpt-oss.
    """

    module: ClassVar[str] = "zoo.components.ffn.clamped:Clamped"

    kind: Literal["clamped"] = "clamped"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    hidden_dim: Annotated[Count, Split()] = Field(description="Size between the projections.")
    gain: Positive = Field(description="What the gate is multiplied with within its sigmoid.")
    limit: Positive = Field(description="The largest gate, and the largest size of up.")

    @property
    def inputs(self) -> dict[str, int]:
        """The projection of the input and its rows."""
        return {"gate_up": 2 * self.hidden_dim}

    def pace(self) -> str:
        return self.kind

    def parameters(self) -> dict[str, Param]:
        rows = 2 * self.hidden_dim
        return {
            "gate_up.weight": Param((rows, self.dim), shard=0),
            "gate_up.bias": Param((rows,), shard=0, init="zeros", product=False),
            "down.weight": Param((self.dim, self.hidden_dim), shard=1),
            "down.bias": Param((self.dim,), once=True, init="zeros", product=False),
        }


EXPERTS = (GatedSpec, MLPSpec, ClampedSpec)
"""What an expert of a mixture may be: kinds that name their `inputs`, and whose modules have `between`."""

Expert = GatedSpec | MLPSpec | ClampedSpec


class SoftmaxTopkSpec(Spec):
    """Mixtral's router: the best `experts_per_token` logits, softmax over these (Jiang et al., arXiv 2401.04088)."""

    module: ClassVar[str] = "zoo.components.ffn.router:SoftmaxTopk"

    kind: Literal["softmax_topk"] = "softmax_topk"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_experts: Annotated[Count, Inherited()] = Field(description="Experts to choose from.")
    experts_per_token: Annotated[Count, Inherited()] = Field(description="Experts chosen for each token.")
    bias: Flag = Field(default=False, description="Whether each logit has a learned bias.")

    def parameters(self) -> dict[str, Param]:
        found = {"weight": Param((self.num_experts, self.dim), exact=True)}
        return found | ({"bias": Param((self.num_experts,), init="zeros", product=False)} if self.bias else {})


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
        return {"weight": Param((self.num_experts, self.dim), exact=True)}


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
        return {"weight": Param((self.num_experts, self.dim), exact=True), "bias": bias}


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
    held: Annotated[tuple[int, int] | None, Inherited()] = Field(
        default=None, description="Where a device holds only some experts: the first, and the one behind the last."
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
    def biased(self) -> bool:
        """Whether the experts' projections add biases."""
        return "down.bias" in self.form.parameters()

    @property
    def form(self) -> Expert:
        """The expert, by its own type."""
        assert isinstance(self.expert, EXPERTS)
        return self.expert

    def pace(self) -> str:
        return self.kind

    @property
    def experts(self) -> tuple[int, int]:
        """The first expert that is held, and the one behind the last."""
        return (0, self.num_experts) if self.held is None else self.held

    def divided(self, share: Share, where: str = "model") -> Self:
        if not share.whole_experts:
            return super().divided(share, where)
        if self.num_experts % share.ranks:
            why = f"{self.num_experts}, which {share.ranks} does not divide"
            raise IndivisibleError(f"{where}.num_experts", why, self.num_experts)
        each = self.num_experts // share.ranks
        shared = None if self.shared is None else self.shared.divided(share, f"{where}.shared")
        return self.model_copy(update={"held": (share.rank * each, (share.rank + 1) * each), "shared": shared})

    def parameters(self) -> dict[str, Param]:
        first, end = self.experts
        experts, share = end - first, self.experts_per_token / self.num_experts
        into, down = self._parts("weight")
        width, hidden = sum(self.form.inputs.values()), self.form.hidden_dim
        found = {
            "experts_in": Param((experts, width, self.dim), shard=1, parts=into, active=share),
            "experts_down": Param((experts, self.dim, hidden), shard=2, parts=down, active=share),
        }
        if self.biased:
            into, down = self._parts("bias")
            found["experts_in_bias"] = Param(
                (experts, width), shard=1, parts=into, init="zeros", active=share, product=False
            )
            found["experts_down_bias"] = Param(
                (experts, self.dim), once=self.held is None, parts=down, init="zeros", active=share, product=False
            )
        return found

    def _parts(self, leaf: str) -> tuple[dict[str, Part], dict[str, Part]]:
        """Where the checkpoint's experts stand among the stacked ones: their first projections, and their last."""
        into: dict[str, Part] = {}
        held = [*enumerate(range(*self.experts))]
        for place, e in held:
            at = 0
            for name, rows in self.form.inputs.items():
                into[f"experts.{e}.{name}.{leaf}"] = Part((place, (at, at + rows)))
                at += rows
        return into, {f"experts.{e}.down.{leaf}": Part((place,)) for place, e in held}

    def children(self) -> dict[str, Spec]:
        """The router and what is shared: experts are stacked in this component's own parameters."""
        return {"router": self.router} | ({} if self.shared is None else {"shared": self.shared})
