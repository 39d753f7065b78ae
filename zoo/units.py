"""Bytes and counts as people read them."""


def human_bytes(count: float) -> str:
    """Bytes in binary units: "13.5 GiB"."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def human_count(count: float) -> str:
    """A count in thousands, millions, billions and trillions: "7.248 B"."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:.4g}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.4g} T"
