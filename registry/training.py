"""What a model was trained for, as its card lists it under `text.features`."""

from zoo.registry.card import Card
from zoo.registry.errors import RequestError

_USES = {
    "chat": ("chat", "use `zoo run` for raw text, or an instruct card"),
    "fim": ("fill in the middle", "codestral models have it; `zoo list` shows which others do"),
}


def check_trained(card: Card, feature: str) -> None:
    """RequestError when the card does not list the feature, chat or fim."""
    use, hint = _USES[feature]
    if feature not in card.text.features:
        raise RequestError(
            f"this model was not trained to {use}",
            where=card.name,
            found=f"features {', '.join(card.text.features) or 'none'}",
            expected=f"the feature {feature}",
            hint=hint,
        )
