"""Memory that the native kernel of few rows keeps for its sums, reckoned as attention.c does. Imports no torch."""

from __future__ import annotations

SPLIT = 256
"""Slots that are worked on at once; of latents, so many for every BLOCK heads, up to eight times."""

BLOCK, MANY = 32, 512
"""Query heads that a block of latents' heads has at least half of, and queries that one is to have at most."""

MOST_SUMS = 9 << 19
"""Numbers of sums up to which sequences are worked on together; one block of heads of a sequence may have more."""

FEW = 16
"""New rows of a sequence up to which the kernel is the way."""


def room_bytes(
    sequences: int, seen: int, shape: tuple[int, int], widths: tuple[int, int], threads: int, *, latents: bool = False
) -> int:
    """Bytes for FEW rows of each of so many sequences that see up to `seen` slots.

    shape: query heads, and key heads (of latents one). widths: of keys in words of 32 bits, and of values in numbers.
    """
    (heads, groups), (words, values) = shape, widths
    length, shared = SPLIT * (max(1, min(8, heads // BLOCK)) if latents else 1), heads // groups
    splits = -(-seen // length)
    while latents and shared % 2 == 0 and shared > BLOCK:
        if sequences * splits * groups >= 4 * threads and FEW * shared <= MANY:
            break
        groups, shared = 2 * groups, shared // 2
    block = splits * FEW * shared * (values + 2)
    sums = min(sequences * groups * block, max(block, MOST_SUMS))
    return 4 * (heads + sums + threads * FEW * shared * (2 * words + SPLIT))
