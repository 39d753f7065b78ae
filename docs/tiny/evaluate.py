"""Asks the embedded model questions that training never showed and counts the right answers.

    python docs/tiny/evaluate.py [--ref tiny] [--wrong]

An answer is right when it holds every piece of the fact that was asked for. Questions are drawn from the held-out
ways to ask (typed as carelessly as in training), answers are greedy and made by zoo as for any other model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from facts import Facts, read_cards
from text import Author, Turn

import zoo

FOLLOW_UPS = 4
GENERAL = 3
COMPARISONS = 60
UNKNOWN = 200
NO_CARD = 100


@dataclass(frozen=True)
class Question:
    """The last turn is asked; those before it are the conversation so far."""

    group: str
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        said: list[dict[str, str]] = []
        for turn in self.turns[:-1]:
            said += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return [*said, {"role": "user", "content": self.turns[-1].question}]

    def right(self, answer: str) -> bool:
        return all(piece in answer for piece in self.turns[-1].pieces)


def examination(cards: Sequence[Facts], seed: int = 7) -> list[Question]:
    """Every topic of every card, every held-out way to ask about zoo, and samples of the rest."""
    author = Author(cards, seed, held_out=True)
    draw, topics = author.random, author.questions.topics
    asked = [Question("one card", (author.ask(card, topic),)) for card in cards for topic in topics]
    for card in cards:
        for first, second in (draw.sample(topics, 2) for _ in range(FOLLOW_UPS)):
            asked.append(Question("follow-up", (author.ask(card, first), author.follow_up(card, second))))
            other = draw.choice(cards)
            asked.append(Question("the same for another card", (author.ask(other, first), author.again(card, first))))
    for entry in author.entries:
        asked += [Question("zoo and itself", (author.general(entry),)) for _ in range(GENERAL)]
    for _ in range(COMPARISONS):
        asked.append(Question("two cards", (author.compare(*draw.sample(list(cards), 2)),)))
    asked += [Question("outside its knowledge", (author.nothing(),)) for _ in range(UNKNOWN)]
    asked += [Question("a model without a card", (author.no_card(),)) for _ in range(NO_CARD)]
    return asked


def ask(model: Any, questions: Sequence[Question], max_tokens: int = 128) -> list[str]:
    """The model's greedy answers."""
    done = model.generate([question.messages for question in questions], max_tokens=max_tokens, temperature=0)
    return [completion.text for completion in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ref", default="tiny", help="a card, or a folder with the files")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers too")
    options = parser.parse_args()
    questions = examination(read_cards())
    with zoo.load(options.ref) as model:
        answers = ask(model, questions)
    counts: dict[str, list[int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        good, count = counts.setdefault(question.group, [0, 0])
        right = question.right(answer)
        counts[question.group] = [good + right, count + 1]
        if options.wrong and not right:
            _say(f"{question.group}: {' | '.join(t.question for t in question.turns)}\n    {answer}")
    for group, (good, count) in counts.items():
        _say(f"{group:28} {good:4} of {count:4}  {good / count:6.1%}")
    good, count = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    _say(f"{'all':28} {good:4} of {count:4}  {good / count:6.1%}")


def _say(line: str) -> None:
    print(line)  # noqa: T201


if __name__ == "__main__":
    main()
