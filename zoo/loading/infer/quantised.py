"""What a settings file says of quantised weights: methods that are read, by name, and the others refused."""

from __future__ import annotations

from zoo.loading.infer.families import families
from zoo.loading.infer.settings import Settings
from zoo.registry.errors import CardError


def check_quantised(settings: Settings) -> None:
    """Raises CardError for a method that is not read, or a setting of one that the reader does not follow.

    Nothing follows for the card: the files' tensors tell how they are read.
    """
    known = families()["quantised"]
    for place in (key for key in known["keys"] if settings.has(key)):
        method = settings.one_of([f"{place}.{key}" for key in known["method"]])
        if method not in known["methods"]:
            raise CardError(
                f"weights quantised by {'an unnamed method' if method is None else repr(method)} are not read yet",
                where=settings.where,
                found=f"the key {place!r}",
                expected=f"one of {', '.join(known['methods'])}",
                hint="use the checkpoint's bfloat16 edition",
            )
        row = known["methods"][method]
        settings.check_only({f"{place}.{key}": allowed for key, allowed in row.get("only", {}).items()})
        settings.pass_over(f"{place}.{key}" for key in row.get("inert", ()))
