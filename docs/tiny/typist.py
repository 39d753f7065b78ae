"""How people type: other words, lower case, no full stop, a polite word, a slip of the finger."""

from __future__ import annotations

import random
import re
from itertools import product

SYNONYMS = (
    ("How do I", "How can I"),
    ("How can I", "How do I"),
    ("How do I", "How to"),
    ("How do I", "How would I"),
    ("How do I", "How should I"),
    ("How do I", "Can you tell me how to"),
    ("Can I", "Could I"),
    ("Can I", "May I"),
    ("large", "big"),
    ("big", "large"),
    ("Tell me", "Give me"),
    ("Tell me", "Show me"),
    ("Give me", "Show me"),
    ("Give me", "Tell me"),
    ("What is", "What would be"),
    ("Which", "What"),
    ("What", "Which"),
    ("models", "cards"),
    ("need", "require"),
    ("command", "zoo command"),
    ("a model", "a card"),
    ("Is there", "Do you have"),
    ("Are there", "Do you know"),
    ("run", "start"),
    ("run", "use"),
    ("number", "count"),
    ("made", "created"),
)
GREETING = (
    "Please: ",
    "Hi, ",
    "Hello! ",
    "Hey, ",
    "Ok, ",
    "So, ",
    "Well, ",
    "Quick question: ",
    "Now, ",
    "And ",
    "Tiny, ",
)
LEADING = ("Can you tell me ", "Do you know ", "I would like to know ", "I wonder ", "Could you say ", "Tell me, ")
ASKING = ("what", "which", "who", "how", "where", "when", "is", "does", "can", "may")
AFTER = (" please", " pls", " exactly?", " Thanks!", ", please", " Thank you.", " please?", " (short answer)")
INDIRECT = (
    (r"How (.+?) does (.+) have\?", r"how \1 \2 has"),
    (r"How (.+?) does (.+) (need|take|use)\?", r"how \1 \2 \3s"),
    (r"How (\w+) is (.+)\?", r"how \1 \2 is"),
    (r"(What|Who|Where) is (.+)\?", r"\1 \2 is"),
    (r"(What|Which) (\w+) does (.+) have\?", r"\1 \2 \3 has"),
)
INDIRECT_BEFORE = ("Tell me ", "I'd like to know ", "I would like to know ", "Do you know ", "I wonder ", "Please say ")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
EITHER = re.compile(r"\(([^()]*\|[^()]*)\)")


def every(way: str) -> set[str]:
    """All questions that a way with (a|b) stands for, as `plain` text."""
    parts = EITHER.split(way)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return {plain("".join(chosen)) for chosen in product(*choices)}


def plain(question: str) -> str:
    """For comparing: lower case, no punctuation at the end, single spaces."""
    return " ".join(question.lower().rstrip("?.! ").split())


class Typist:
    """Changes how a question is written and not what it asks."""

    def __init__(self, draw: random.Random) -> None:
        self.random = draw

    def choose(self, way: str) -> str:
        """One of the questions that a way with (a|b) stands for."""
        return " ".join(EITHER.sub(lambda found: self.random.choice(found[1].split("|")), way).split())

    def reword(self, way: str) -> str:
        """The question with one word exchanged."""
        found = [(old, new) for old, new in SYNONYMS if re.search(rf"\b{old}\b", way)]
        if not found:
            return way
        old, new = self.random.choice(found)
        return re.sub(rf"\b{old}\b", new, way, count=1)

    def type(self, question: str) -> str:
        """The question as people type: lower case, no full stop, a polite word, a slip of the finger."""
        draw = self.random.random
        if draw() < 0.15:
            question = self._indirect(question)
        if draw() < 0.15:
            question = re.sub(r"^(What|Who|Where) is ", self.random.choice((r"\1's ", r"\1s ")), question)
        if draw() < 0.06:
            question = question.rstrip("?.!") + self.random.choice(AFTER)
        elif draw() < 0.25:
            question = question.rstrip("?.!") or question
        if draw() < 0.08:
            asking = question.split(" ")[0].lower() in ASKING and draw() < 0.5
            before = self.random.choice(LEADING if asking else GREETING)
            question = before + question[:1].lower() + question[1:]
        if draw() < 0.3:
            question = question.lower()
        elif draw() < 0.02:
            question = question.upper()
        return self._slip(question) if draw() < 0.06 else question

    def _indirect(self, question: str) -> str:
        """The question in the order of words that follows "tell me"; other questions as they are."""
        for pattern, order in INDIRECT:
            if re.fullmatch(pattern, question):
                clause = re.sub(pattern, order, question)
                return self.random.choice(INDIRECT_BEFORE) + clause[0].lower() + clause[1:]
        return question

    def _slip(self, text: str) -> str:
        places = [i for i in range(1, len(text) - 1) if text[i : i + 2].isalpha()]
        if not places:
            return text
        i = self.random.choice(places)
        middle = self.random.choice(
            (text[i + 1] + text[i], text[i], text[i] + self.random.choice(LETTERS) + text[i + 1])
        )
        return text[:i] + middle + text[i + 2 :]
