"""Conversations as packed token ids, the form that training and measuring read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from facts import Facts
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from text import Author, Turn
from torch import Tensor

IGNORED = -100


class Ids:
    """Renders a conversation as mistral-common does for version v7, and marks which ids the model is to write."""

    def __init__(self, tekken: Path) -> None:
        raw = Tekkenizer.from_file(tekken)
        self.encode: Callable[[str], list[int]] = lambda text: raw.encode(text, bos=False, eos=False)
        special: Callable[[str], int] = raw.get_special_token
        self.bos, self.eos = special("<s>"), special("</s>")
        self.ask, self.reply = special("[INST]"), special("[/INST]")
        self.system, self.system_end = special("[SYSTEM_PROMPT]"), special("[/SYSTEM_PROMPT]")

    def conversation(self, system: str | None, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Ids, and for each id whether it belongs to an answer (its end included)."""
        ids = [self.bos]
        if system is not None:
            ids += [self.system, *self.encode(system), self.system_end]
        written = [False] * len(ids)
        for turn in turns:
            question = [self.ask, *self.encode(turn.question), self.reply]
            answer = [*self.encode(turn.answer), self.eos]
            ids += question + answer
            written += [False] * len(question) + [True] * len(answer)
        return ids, written


@dataclass(frozen=True)
class Batch:
    """Packed conversations. targets_T holds IGNORED where the next id is none of the model's answers."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    segments_T: Tensor


def pack(conversations: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    """One batch of whole conversations, each a segment with positions from 0."""
    tokens: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    for segment, (ids, written) in enumerate(conversations):
        tokens += ids
        following = zip(ids[1:], written[1:], strict=True)
        targets += [*(i if mine else IGNORED for i, mine in following), IGNORED]
        positions += range(len(ids))
        segments += [segment] * len(ids)
    return Batch(*(torch.tensor(column) for column in (tokens, targets, positions, segments)))


def batches(cards: Sequence[Facts], ids: Ids, *, tokens: int, seed: int, held_out: bool = False) -> Iterator[Batch]:
    """Endless batches of whole conversations, together about `tokens` ids."""
    author = Author(cards, seed, held_out=held_out)
    while True:
        taken: list[tuple[list[int], list[bool]]] = []
        while sum(len(row) for row, _ in taken) < tokens:
            taken.append(ids.conversation(author.system_prompt(), author.conversation()))
        yield pack(taken)
