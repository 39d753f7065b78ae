"""What drafts cost and what they save, as measured. The unit is the time of a step without drafts.

What further rows cost depends on the model, its number format, the context and the machine, so every step is timed.
Drafts that have not paid lately are made only within a small share of all steps, and what earlier drafts have saved.
"""

from __future__ import annotations

from collections import deque
from statistics import median_low

SHARE, READING = 0.015, 0.01
"""Of every step: what guesses may cost beyond what they give, and what reading prompts for them may."""

FIRST, MOST, LEAST = 1.0, 4.0, -1.0
"""The balance at first, and between what it stays: luck and bad luck are not remembered for ever."""

DEEPEST = 8.0
"""The most that reading is remembered for."""

RECENT = 5
"""Steps of a kind whose median says what one takes: one that was held up decides nothing."""

STALE = 64
"""Steps with guesses after which one without them is taken, to compare with."""


class Ledger:
    """balance: steps that guesses have gained or may cost. debt: those that were spent on reading prompts. price: of
    the last step, in steps without guesses; None where it cannot be told."""

    def __init__(self) -> None:
        self.balance, self.debt = FIRST, 0.0
        self.price: float | None = None
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._ages: dict[int, int] = {}

    def knows(self, rows: int) -> bool:
        """Whether a step of so many rows without guesses was timed lately."""
        return self._ages.get(rows, STALE) < STALE

    @property
    def may_lose(self) -> bool:
        """Whether guesses may be made that have not paid lately."""
        return self.balance > 0

    @property
    def may_begin(self) -> bool:
        """Whether they may for a sequence that had none, whose prompt must be read first."""
        return self.may_lose and self.debt <= 0

    def step(self, rows: int, drafts: int, seconds: float, spent: float) -> None:
        """A step of `rows` rows and `drafts` more took `seconds`, and what guesses `spent` before."""
        known = self._seconds.setdefault((rows, drafts), deque(maxlen=RECENT))
        known.append(seconds)
        self._ages[rows] = self._ages.get(rows, STALE) + 1 if drafts else 0
        self.price = None
        self._add(SHARE)
        plain = self._seconds.get((rows, 0))
        if plain is None:
            return
        if drafts:
            self.price = (median_low(known) + spent) / median_low(plain)
            self._add(1 - self.price)
        elif spent > SHARE * median_low(plain):
            # Looking and finding nothing takes far less.
            self.debt = min(DEEPEST, self.debt + spent / median_low(plain))
        self.debt = max(0.0, self.debt - READING)

    def gain(self, steps: float) -> None:
        """Guesses were right that saved so many steps."""
        self._add(steps)
        self.debt = max(0.0, self.debt - steps)

    def _add(self, steps: float) -> None:
        self.balance = max(LEAST, min(MOST, self.balance + steps))
