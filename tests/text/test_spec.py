"""Tokenizers and chat formats in cards, found through the registry, and opened only when used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest
from pydantic import ValidationError

from zoo.registry.manager import manager
from zoo.registry.spec import Spec
from zoo.text.spec import MistralTokenizerSpec
from zoo.text.tokenizer import readable

KINDS = {"tokenizer": ["mistral", "huggingface"], "chat": ["mistral", "template", "none"]}
HEAVY = ("torch", "transformers", "mistral_common", "tokenizers", "sentencepiece", "jinja2", "numpy")


@pytest.mark.parametrize(("slot", "kind"), [(slot, kind) for slot, kinds in KINDS.items() for kind in kinds])
def test_kinds_are_registered_and_complete(slot: str, kind: str) -> None:
    catalog = manager().catalog
    spec = catalog.spec(catalog.find(slot, kind))
    assert issubclass(spec, Spec)
    assert spec(kind=kind).kind == kind
    target = pkgutil.resolve_name(spec.module)
    assert callable(target.open)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValidationError, match="'v1', 'v2', 'v3', 'v7', 'v11', 'v13' or 'v15'"):
        MistralTokenizerSpec.model_validate({"version": "v4"})


def test_importing_text_imports_nothing_heavy() -> None:
    modules = "zoo.text, zoo.text.spec, zoo.text.tokenizer, zoo.text.mistral_chat, zoo.text.template"
    code = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" world", "▁world"),
        ("é🦒".encode(), "é🦒"),
        (b"\n\t", "\\n\\t"),
        (b"a\xe4\xbd", "a<0xE4><0xBD>"),
        ("\u200b\x00".encode(), "\\u200b\\x00"),
        (b"", ""),
    ],
)
def test_readable_pieces(data: bytes, shown: str) -> None:
    assert readable(data) == shown
