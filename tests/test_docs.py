"""What the documentation says is run: commands, Python, cards, links and tables."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import pytest
import yaml

import zoo
from zoo.cli import cli
from zoo.registry.card import list_cards, load_card
from zoo.registry.resolve import resolve

ROOT = Path(__file__).parent.parent
GENERATED = {"cards.md", "components.md", "cli.md"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name not in GENERATED]
RUNNING, FORMATS = ROOT / "docs/running.md", ROOT / "docs/formats.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"[A-Z]+(\.\.\.)?")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str


@cache
def source(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[Block]:
    text = source(page)
    found = [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", source(page))


def section(page: Path, title: str) -> str:
    """The text below a heading, up to the next one."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", source(page), re.MULTILINE | re.DOTALL)
    assert match is not None, f"{page.name} has no section {title!r}"
    return match[1]


def first_cells(text: str) -> list[str]:
    """The names in code spans that begin the rows of a table."""
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return [name for cell in cells for name in SPAN.findall(cell)]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- pages and links ------------------------------------------------------------------------------------------------


def test_generated_pages_are_up_to_date(generator: ModuleType) -> None:
    stale = [page_id(page) for page, text in generator.pages().items() if page.read_text(encoding="utf-8") != text]
    assert not stale, "run `make docs`"


def anchors(page: Path) -> set[str]:
    """The names by which headings are linked, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"{target}: there is no {file}"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    assert not [*broken_links(page)]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#b-title) [c](other.md) [d](https://example.org)\n")
    assert [link.split(":")[0] for link in broken_links(page)] == ["#b-title", "other.md"]


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/index.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(source(index))}
    assert set((ROOT / "docs").glob("*.md")) - {index} <= linked


# --- commands -------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Every `zoo` command line of a page, and whether it stands whole in a block."""
    for block in blocks(page, "", "sh", "console"):
        for line in block.text.splitlines():
            if re.match(r"(\$ )?(\w+=\S+ )*zoo |.*\| zoo ", line):
                yield line.removeprefix("$ "), True
    for span in SPAN.findall(prose(page)):
        if span.startswith("zoo "):
            yield span.replace("\\|", "|"), False


def arguments(line: str) -> list[str]:
    """The arguments of the `zoo` in a line of shell: without comment, variables, pipes and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>")
    lexer.commenters = "#"
    lexer.wordchars += ":@[]{}*=,+"
    words = [*lexer]
    words = words[words.index("zoo") + 1 :]
    end = next((i for i, word in enumerate(words) if set(word) <= set("|<>")), len(words))
    return words[:end]


def command_of(words: list[str]) -> tuple[click.Context, list[str]]:
    """The innermost command that the words name, and the words left for it."""
    context = click.Context(cli, info_name="zoo")
    while isinstance(context.command, click.Group) and words and not words[0].startswith("-"):
        name, command, words = context.command.resolve_command(context, words)
        assert command is not None
        context = click.Context(command, parent=context, info_name=name)
    return context, words


@cache
def card_names() -> set[str]:
    return {card.name for card in list_cards()}


def faults(line: str, *, whole: bool) -> Iterator[str]:
    """What is wrong with a command line: its command, flags, number of arguments, or a card's name."""
    try:
        context, words = command_of(arguments(line))
        if whole:
            values = context.command.make_context(str(context.info_name), [*words], parent=context.parent).params
        else:
            values, left, _ = context.command.make_parser(context).parse_args([*words])
            if left and not isinstance(context.command, click.Group):
                yield f"{left} too many"
    except click.ClickException as error:
        yield error.format_message()
        return
    for name in ("ref", "refs", "first", "second"):
        given = values.get(name)
        for ref in given if isinstance(given, tuple | list) else [given]:
            if isinstance(ref, str) and not (
                ref in card_names() or PLACEHOLDER.fullmatch(ref) or re.search(r"[/~]", ref)
            ):
                yield f"{ref!r} is no card"


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_commands_parse(page: Path) -> None:
    found = {line: [*faults(line, whole=whole)] for line, whole in commands(page)}
    assert not {line: wrong for line, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("zoo ruin tiny", "no command 'ruin'"),
        ("zoo run tiny --promt x", "--promt"),
        ("zoo run", "REF"),
        ("zoo run tiny --max-tokens few", "few"),
        ("zoo inspect tinny", "tinny"),
        ("zoo inspect tiny tiny", "tiny"),
        ("echo hi | zoo run tinny", "tinny"),
        ("HF_HUB_OFFLINE=1 zoo card check tiny tinny > out  # a comment", "tinny"),
    ],
)
def test_a_wrong_command_is_found(line: str, fault: str) -> None:
    assert fault in " ".join(faults(line, whole=True))


def test_commands_are_looked_for() -> None:
    assert len([line for page in WRITTEN for line, whole in commands(page) if whole]) > 30
    assert len([line for page in WRITTEN for line, whole in commands(page) if not whole]) > 30


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/running.md", "docs/memory.md"])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in their order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / page, "python")
    assert found
    names: dict[str, Any] = {}
    for block in found:
        # Lines are counted as on the page, so that a traceback leads to it.
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)


def test_each_example_cleans_up() -> None:
    text = "".join(block.text for block in blocks(RUNNING, "python"))
    assert text.count("zoo.load(") == text.count("model.close()") == 1


# --- cards ----------------------------------------------------------------------------------------------------------


def complete_cards() -> list[Block]:
    """YAML blocks that are whole cards: with a name, and a model of their own or a parent's."""
    found = [block for page in WRITTEN for block in blocks(page, "yaml") if "..." not in block.text]
    texts = [(block, yaml.safe_load(block.text)) for block in found]
    return [block for block, card in texts if "name" in card and ("model" in card or "extends" in card)]


@pytest.mark.parametrize("block", complete_cards(), ids=lambda block: f"{page_id(block.page)}:{block.line}")
def test_cards_resolve(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "card.yaml"
    file.write_text(block.text, encoding="utf-8")
    assert resolve(load_card(file)).model.all_parameters()


def test_the_guide_shows_whole_cards() -> None:
    assert {"README.md", "docs/writing-cards.md"} <= {page_id(block.page) for block in complete_cards()}


# --- tables ---------------------------------------------------------------------------------------------------------


def test_options_are_those_of_the_engine_and_the_command_line() -> None:
    from zoo.cli.options import SAMPLE_NAMES
    from zoo.engine.request import SamplingParams

    text = section(RUNNING, "Options of an answer")
    rows = re.findall(r"^\| `(\w+)` \| (?:`--([\w-]+)`)? *\| (.*?) \|", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == {field.name for field in dataclasses.fields(SamplingParams)}
    assert {name: flag.replace("-", "_") for name, flag, _ in rows if flag} == {name: name for name in SAMPLE_NAMES}
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    stated = {name: json.loads(value.strip("`")) for name, _, value in rows if value.startswith("`")}
    assert stated == {name: defaults[name] for name in ("temperature", "top_k", "top_p", "min_p")}


def test_fields_of_the_answer_are_documented() -> None:
    from zoo.engine.request import Completion, Timings, Usage

    text = section(RUNNING, "Output for programs")
    assert set(first_cells(text)) == {field.name for field in dataclasses.fields(Completion)} | {"prompt_tokens"}
    for kind in (Usage, Timings):
        assert all(f"`{field.name}`" in text for field in dataclasses.fields(kind))


def test_chat_commands_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli.chat import Conversation

    no_model: Any = None
    Conversation(no_model, {}).command("/help")
    table = " ".join(first_cells(section(RUNNING, "Talk")))
    assert set(re.findall(r"/\w+", table)) - {"/help"} == set(re.findall(r"/\w+", capsys.readouterr().err))


def test_errors_and_variables_are_those_of_the_code() -> None:
    from zoo.registry import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, zoo.ZooError)}
    named = set(re.findall(r"`(\w+Error)`", section(RUNNING, "From Python")))
    assert kinds - {"ZooError"} == named
    written = code("zoo", "registry", "components")
    assert set(re.findall(r"\bZOO_[A-Z_]+\b", written)) == set(re.findall(r"\bZOO_[A-Z_]+\b", source(RUNNING)))


def code(*folders: str) -> str:
    """All Python of these folders."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def test_formats_are_those_of_the_code() -> None:
    from zoo.loading.files import KNOWN
    from zoo.loading.infer.families import families
    from zoo.text.mistral_files import VERSIONS

    assert str(families()["assumed_context"]) in section(FORMATS, "Settings")
    sets = section(FORMATS, "Which set of weights")
    rows = re.findall(r"^\| \d \| (`.*?`) \|", sets, re.MULTILINE)
    assert [name for row in rows for name in SPAN.findall(row)] == [*KNOWN]
    versions = re.search(r"Versions of Mistral's tokenizer: (.*)\.", section(FORMATS, "Tokenizers and chat formats"))
    assert versions is not None
    assert versions[1].split(", ") == [*VERSIONS]


def test_messages_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| ([^|`]+?) \| ", section(FORMATS, "Errors and what to do"), re.MULTILINE)
    written = code("zoo")
    assert len(rows) > 20
    parts = [part.strip() for row in rows if row != "the message says" for part in row.split("…")]
    assert not [part for part in parts if part not in written]
