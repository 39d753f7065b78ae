"""Settings of tokenizers and chat formats: the `text.tokenizer` and `text.chat` nodes of a card."""

from typing import ClassVar, Literal

from pydantic import Field

from zoo.registry.spec import Spec

MistralVersion = Literal["v1", "v2", "v3", "v7", "v11", "v13", "v15"]


class MistralTokenizerSpec(Spec):
    """A Mistral tokenizer (SentencePiece or tekken), read and applied by mistral-common."""

    module: ClassVar[str] = "zoo.text.mistral:MistralCodec"

    kind: Literal["mistral"] = "mistral"
    version: MistralVersion | None = Field(
        default=None,
        description="Version of the tokenizer; a file of another version is refused. Unset: the version of the file.",
    )


class HuggingFaceTokenizerSpec(Spec):
    """A `tokenizer.json`, applied by the tokenizers library."""

    module: ClassVar[str] = "zoo.text.huggingface:HuggingFaceCodec"

    kind: Literal["huggingface"] = "huggingface"


class MistralChatSpec(Spec):
    """Mistral's own chat format, rendered to ids by mistral-common for the tokenizer's version."""

    module: ClassVar[str] = "zoo.text.mistral_chat:MistralChat"

    kind: Literal["mistral"] = "mistral"


class TemplateChatSpec(Spec):
    """The checkpoint's Jinja template (`chat_template.jinja` or `tokenizer_config.json`), run in a sandbox."""

    module: ClassVar[str] = "zoo.text.template:TemplateChat"

    kind: Literal["template"] = "template"


class NoChatSpec(Spec):
    """A base model: it continues text and knows no turns."""

    module: ClassVar[str] = "zoo.text.tokenizer:NoChat"

    kind: Literal["none"] = "none"
