"""Settings of the blocks that norm or scale otherwise than the plain one, `prenorm`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from zoo.components.fields import Positive
from zoo.registry.spec import Slot, Spec, StateSpec


class PostnormSpec(Spec):
    """x + norm(mixer(x)), then x + norm(ffn(x)) (OLMo 2, arXiv 2501.00656, section 3.1)."""

    module: ClassVar[str] = "zoo.components.block.postnorm:Postnorm"

    kind: Literal["postnorm"] = "postnorm"
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm after the mixer and after the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(description="What moves information between tokens.")
    ffn: Annotated[Spec, Slot("ffn")] = Field(description="What works on each token alone.")

    def children(self) -> dict[str, Spec]:
        return {"mixer": self.mixer, "mixer_post_norm": self.norm, "ffn": self.ffn, "ffn_post_norm": self.norm}

    def state(self) -> StateSpec | None:
        return self.mixer.state()


class SandwichSpec(Spec):
    """x + norm(mixer(norm(x))), then x + norm(ffn(norm(x))) (Gemma 2, arXiv 2408.00118, section 2)."""

    module: ClassVar[str] = "zoo.components.block.sandwich:Sandwich"

    kind: Literal["sandwich"] = "sandwich"
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm before and after the mixer and the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(description="What moves information between tokens.")
    ffn: Annotated[Spec, Slot("ffn")] = Field(description="What works on each token alone.")

    def children(self) -> dict[str, Spec]:
        mixing = {"mixer_norm": self.norm, "mixer": self.mixer, "mixer_post_norm": self.norm}
        return mixing | {"ffn_norm": self.norm, "ffn": self.ffn, "ffn_post_norm": self.norm}

    def state(self) -> StateSpec | None:
        return self.mixer.state()


class ScaledSpec(Spec):
    """x + scale mixer(norm(x)), then x + scale ffn(norm(x)) (Granite; transformers: models/granite)."""

    module: ClassVar[str] = "zoo.components.block.scaled:Scaled"

    kind: Literal["scaled"] = "scaled"
    residual_scale: Positive = Field(description="Multiplies what the mixer and the feed-forward add.")
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm before the mixer and before the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(description="What moves information between tokens.")
    ffn: Annotated[Spec, Slot("ffn")] = Field(description="What works on each token alone.")

    def children(self) -> dict[str, Spec]:
        return {"mixer_norm": self.norm, "mixer": self.mixer, "ffn_norm": self.norm, "ffn": self.ffn}

    def state(self) -> StateSpec | None:
        return self.mixer.state()
