"""Text: tokenizers, chat formats, streaming decoding. This module is the plugin that registers the built-in kinds."""

from __future__ import annotations

from collections.abc import Callable

from zoo.registry.hooks import hookimpl


@hookimpl
def register_tokenizers(register: Callable[[str, str, str], None]) -> None:
    """One line per kind: its slot ("tokenizer" or "chat"), its kind, the dotted path of its Spec."""
    register("tokenizer", "mistral", "zoo.text.spec:MistralTokenizerSpec")
    register("tokenizer", "huggingface", "zoo.text.spec:HuggingFaceTokenizerSpec")
    register("chat", "mistral", "zoo.text.spec:MistralChatSpec")
    register("chat", "template", "zoo.text.spec:TemplateChatSpec")
    register("chat", "none", "zoo.text.spec:NoChatSpec")
