"""Whether one model can draft tokens for another: their token ids must mean the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from zoo.components.decoder.spec import DecoderSpec
from zoo.locating import Ref, locate
from zoo.registry.errors import RequestError, within
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

if TYPE_CHECKING:
    from zoo.text.tokenizer import Tokenizer


def draft_named(draft: Ref | None, plan: Plan) -> Literal["lookup"] | Plan | None:
    """What guesses tokens for a model: its own text, another model, or nothing. RequestError for one of another
    vocabulary: known before anything is loaded."""
    if draft is None or draft == "none":
        return None
    if draft == "lookup":
        return "lookup"
    with within("draft"):
        other = resolve(locate(draft).card)
    check_sizes(plan, other)
    return other


def check_sizes(plan: Plan, draft: Plan) -> None:
    """RequestError unless both models have vocabularies of one size."""
    size, other = (cast(DecoderSpec, each.model).vocab_size for each in (plan, draft))
    if size != other:
        raise _refused(plan, draft, f"{other} token ids", f"{size}, as {plan.card.name} has")


def check_tokenizers(plan: Plan, tokenizer: Tokenizer | None, draft: Plan, other: Tokenizer | None) -> str:
    """RequestError unless every id stands for the same text or control token; a sentence on what could not be checked.

    Text of ids is the same if their bytes are, at the beginning of a word and within it.
    """
    if tokenizer is None or other is None:
        lacking = plan if tokenizer is None else draft
        return f"{lacking.card.name} has no tokenizer: ids of {draft.card.name} are taken for the same"
    mine, others = tokenizer.vocabulary, other.vocabulary
    if mine.size != others.size:
        raise _refused(plan, draft, f"a tokenizer of {others.size} ids", f"{mine.size}, as {plan.card.name} has")
    for token in range(mine.size):
        if mine.control(token) != others.control(token) or mine.surface(token, False) != others.surface(token, False):
            found, expected = other.piece(token), tokenizer.piece(token)
            raise _refused(plan, draft, f"{found!r} for id {token}", f"{expected!r}, as {plan.card.name} has")
    return ""


def _refused(plan: Plan, draft: Plan, found: str, expected: str) -> RequestError:
    return RequestError(
        f"{draft.card.name} cannot guess for {plan.card.name}: their vocabularies differ",
        where="draft",
        found=found,
        expected=expected,
        hint="take a model with the same tokenizer, or draft='lookup', which needs none",
    )
