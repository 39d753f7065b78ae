"""Makes the conversations that the embedded model is trained and measured on. The same seed gives the same text.

A conversation is a list of turns, now and then with a system prompt before it, that a user of zoo might have with
the model: questions about cards, questions that lean on the turn before ("and its licence?"), questions about zoo
itself, small talk, and much that the model cannot know. Questions are asked in many ways, carelessly typed at
times; the answer to a question is always the same sentence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import general
import questions
import yaml
from facts import Facts, names
from questions import Topic, Ways, split
from typist import Typist, every, plain

NOTHING = "I do not know. I only know zoo and its cards."
NO_CARD = "I know no card of that name. Type zoo list to see them all."

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are tiny, the model that comes with zoo.",
    "You are a helpful, honest assistant. Answer in one sentence.",
    "Be polite.",
    "You answer questions about language models.",
    "Always answer in English.",
    "You are an expert on open-weight models.",
    "Keep it short and do not invent anything.",
)
COMPARISONS = (
    "Which is larger, {a} or {b}?",
    "Is {a} larger than {b}?",
    "Compare {a} and {b}.",
    "Which is bigger, {a} or {b}?",
    "What is the difference between {a} and {b}?",
    "Which has more parameters, {a} or {b}?",
    "Is {a} bigger than {b}?",
    "{a} or {b}?",
    "{a} versus {b}",
    "How does {a} compare with {b}?",
    "Which one is smaller, {a} or {b}?",
    "Is {a} smaller than {b}?",
    "Which of {a} and {b} is larger?",
    "How much larger is {a} than {b}?",
    "Tell me the difference between {a} and {b}.",
    "{a} vs {b}",
    "{a} vs. {b}?",
    "Is {a} or {b} larger?",
    "Which is smaller, {a} or {b}?",
    "{a} and {b}",
    "Do {a} and {b} have the same size?",
    "How do {a} and {b} differ?",
    "Which should I use, {a} or {b}?",
    "Does {a} have more parameters than {b}?",
    "What is larger, {a} or {b}?",
    "Are {a} and {b} equally large?",
    "Compare {a} with {b}.",
    "What about {a} and {b}, which is larger?",
    "How large are {a} and {b}?",
    "Should I use {a} or {b}?",
)
SYLLABLES = (
    "zor",
    "bla",
    "kin",
    "tra",
    "mo",
    "ve",
    "lu",
    "dax",
    "pi",
    "ron",
    "ge",
    "sha",
    "tu",
    "wel",
    "qua",
    "nim",
    "fer",
    "os",
)


@dataclass(frozen=True)
class Turn:
    """A question, its one right answer, and the pieces that make an answer count as right."""

    question: str
    answer: str
    pieces: tuple[str, ...]


class Author:
    """Draws conversations. `held_out`: only from the ways to ask, and the things, that training never shows."""

    def __init__(self, cards: Sequence[Facts], seed: int, *, held_out: bool = False) -> None:
        self.cards, self.random, self.held_out = list(cards), random.Random(seed), held_out
        self.typist = Typist(self.random)
        self.questions = questions.load()
        self.entries = general.entries(cards)
        self.names: dict[str, list[str]] = {card.id: [] for card in self.cards}
        for name, card in names(self.cards).items():
            self.names[card.id].append(name)
        raw = yaml.safe_load(Path(__file__).with_name("unknown.yaml").read_text(encoding="utf-8"))
        self.unknown = {key: split(text.splitlines(), held_out) for key, text in raw.items()}
        self.nouns = [noun for topic in self.questions.topics for noun in topic.nouns]
        self.kept = set() if held_out else self._kept()

    def _kept(self) -> set[str]:
        """The questions that training must not show, whatever words are exchanged."""
        topics = [self.questions.templates(topic, True) for topic in self.questions.topics]
        follow_ups = [self.questions.follow_ups(topic, True) for topic in self.questions.topics]
        everything = [*topics, *follow_ups, *(entry.templates(True) for entry in self.entries)]
        return {question for pair in everything for ways in pair for way in ways for question in every(way)}

    def conversation(self) -> list[Turn]:
        """One to eight turns; what a turn may lean on is the card and the topic of the turn before."""
        count = self.random.choices((1, 2, 3, 5, 8), (50, 22, 14, 10, 4))[0]
        turns: list[Turn] = []
        before: tuple[Facts, Topic] | None = None
        for _ in range(count):
            turn, before = self._turn(before)
            turns.append(turn)
        return turns

    def system_prompt(self) -> str | None:
        """A system prompt for one conversation in twelve."""
        return self.random.choice(SYSTEM_PROMPTS) if self.random.random() < 1 / 12 else None

    def _turn(self, before: tuple[Facts, Topic] | None) -> tuple[Turn, tuple[Facts, Topic] | None]:
        draw = self.random.random()
        if before and draw < 0.55:
            card, topic = before
            if self.random.random() < 0.6:
                topic = self.random.choice(self.questions.topics)
                return self.follow_up(card, topic), (card, topic)
            card = self.random.choice(self.cards)
            return self.again(card, topic), (card, topic)
        draw = self.random.random()
        if draw < 0.45:
            card, topic = self.random.choice(self.cards), self.random.choice(self.questions.topics)
            return self.ask(card, topic), (card, topic)
        if draw < 0.50:
            return self.compare(*self.random.sample(self.cards, 2)), None
        if draw < 0.80:
            return self.general(self.random.choice(self.entries)), None
        return (self.no_card() if draw < 0.85 else self.nothing()), None

    def ask(self, card: Facts, topic: Topic) -> Turn:
        """A question that names the card."""
        return self._answered(self.way(self.questions.templates(topic, self.held_out)), card, topic)

    def follow_up(self, card: Facts, topic: Topic) -> Turn:
        """A question that means the card of the turn before."""
        ways = self.questions.follow_ups(topic, self.held_out)
        return self._answered(self.way(ways if any(ways) else self.questions.templates(topic, True)), card, topic)

    def again(self, card: Facts, topic: Topic) -> Turn:
        """The question of the turn before for another card."""
        return self._answered(self.random.choice(split(self.questions.again, self.held_out)), card, topic)

    def _answered(self, way: str, card: Facts, topic: Topic) -> Turn:
        question = self.typist.type(way.replace("{m}", self.name(card)))
        return Turn(question, topic.answer(card), (card.name, *topic.pieces(card)))

    def way(self, ways: Ways) -> str:
        """One of the whole questions or one of the filled frames, now and then with a word exchanged."""
        while True:
            way = self.typist.choose(self.random.choice(self.random.choice([group for group in ways if group])))
            if self.random.random() < 0.2:
                way = self.typist.reword(way)
            if plain(way) not in self.kept:
                return way

    def compare(self, first: Facts, second: Facts) -> Turn:
        """Which of two cards is larger."""
        way = self.random.choice(split(COMPARISONS, self.held_out))
        sizes = [questions.billions(card.parameters) for card in (first, second)]
        answer = f"{first.name} has {sizes[0]} parameters, {second.name} has {sizes[1]}."
        question = self.typist.type(way.replace("{a}", self.name(first)).replace("{b}", self.name(second)))
        return Turn(question, answer, (answer,))

    def general(self, entry: general.Entry) -> Turn:
        """A question about zoo, its words, its commands, the model itself, or small talk."""
        way = self.way(entry.templates(self.held_out))
        return Turn(self.typist.type(way), entry.answer, (entry.answer,))

    def nothing(self) -> Turn:
        """A question that the model cannot know the answer to."""
        draw = self.random.random()
        if draw < 0.3:
            question = self.random.choice(self.unknown["plain"])
        elif draw < 0.37:
            question = self._sum()
        elif draw < 0.45:
            question = " ".join(self._word() for _ in range(self.random.randint(1, 6)))
        else:
            way = self.typist.choose(self.random.choice(self.unknown["frames"]))
            first, second = self.random.sample(self.unknown["things"], 2)
            if self.random.random() < 0.1:
                first = self._word()
            noun = self.random.choice(self.nouns)
            question = way.replace("{t}", first).replace("{u}", second).replace("{n}", noun)
        return Turn(self.typist.type(question), NOTHING, ("I do not know",))

    def no_card(self) -> Turn:
        """A question about a model that has no card."""
        topic = self.random.choice(self.questions.topics)
        way = self.way(self.questions.templates(topic, self.held_out))
        name = self.random.choice(self.unknown["other_models"])
        if self.random.random() < 0.4:
            size = self.random.choice((1, 2, 3, 4, 6, 9, 10, 13, 15, 20, 30, 34, 65, 70, 180, 405))
            name = f"{self._word().capitalize()} {size}B"
        return Turn(self.typist.type(way.replace("{m}", name)), NO_CARD, ("no card of that name",))

    def name(self, card: Facts) -> str:
        """One of the card's names: mostly the whole name or the id."""
        draw = self.random.random()
        if draw < 0.35:
            return card.name
        return card.id if draw < 0.5 else self.random.choice(self.names[card.id])

    def _word(self) -> str:
        return "".join(self.random.choice(SYLLABLES) for _ in range(self.random.randint(2, 3)))

    def _sum(self) -> str:
        a, b = self.random.randint(0, 999), self.random.randint(0, 999)
        sign = self.random.choice(("+", "-", "*", "/", "plus", "times", "minus"))
        return self.random.choice(("What is {}?", "Calculate {}.", "{}", "{} =", "How much is {}?")).format(
            f"{a} {sign} {b}"
        )
