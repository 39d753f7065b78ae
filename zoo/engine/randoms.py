"""Random numbers by counter: each depends on a seed and a position only, so never on the batch or on history."""

from __future__ import annotations

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) for the token at `position` (prompt included) of a sequence with `seed`.

    Output `position` of the generator SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014) started at the mixed seed, so that neighbouring seeds do not give shifted copies.
    """
    return (_mix((_mix(seed & _MASK) + (position + 1) * _STEP) & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
