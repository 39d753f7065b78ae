"""Plugins, names of parts and names of models as users and authors get them wrong."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zoo
from zoo.registry import manager as registry
from zoo.registry.errors import CardError, PluginError

if TYPE_CHECKING:
    from tests.bad_inputs.conftest import Desk

HOOK = "from pathlib import Path\nfrom zoo.registry.hooks import hookimpl\n\n@hookimpl\n"
SPEC = """\
from typing import ClassVar
from zoo.components.ffn.spec import GatedSpec

class ThirdSpec(GatedSpec):
    module: ClassVar[str] = "{module}:Third"
    kind: str = "third"
"""
MODULE = "from zoo.components.ffn.gated import Gated as Third\n"


def component(kind: str = "third", spec: str = "{plugin}.spec:ThirdSpec", slot: str = "ffn") -> str:
    return f"{HOOK}def register_components(register):\n    register({slot!r}, {kind!r}, {spec!r})\n"


def hook(name: str, call: str, argument: str = "register") -> str:
    return f"{HOOK}def {name}({argument}):\n    {call}\n"


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(first="source of __init__.py", ...): packages that look installed, with an entry point each."""

    def make(*, spec: str = SPEC, module: str = MODULE, **sources: str) -> None:
        for name, source in sources.items():
            package = tmp_path / "site" / name
            (package / "cards").mkdir(parents=True)
            (package / "__init__.py").write_text(source.replace("{plugin}", name))
            (package / "spec.py").write_text(spec.replace("{module}", f"{name}.module"))
            (package / "module.py").write_text(module)
            (package / "cards/mixtral-8x7b.yaml").write_text("name: mixtral-8x7b\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        found = EntryPoints(EntryPoint(name, name, "zoo") for name in sources)
        monkeypatch.setattr(registry, "entry_points", lambda group: found)
        registry.manager.cache_clear()

    before = {*sys.modules}
    monkeypatch.setenv("ZOO_STRICT_PLUGINS", "")
    yield make
    registry.manager.cache_clear()
    for name in {*sys.modules} - before:
        if name.partition(".")[0] in ("first", "second"):
            del sys.modules[name]


# What a package does -> what is said of it. It is left out; everything else goes on.
LEFT_OUT: dict[str, tuple[dict[str, str], str, str]] = {
    "raises when imported": (
        {"first": "raise RuntimeError('no luck\\ntoday')\n"},
        "first",
        "RuntimeError: no luck today",
    ),
    "ends the program when imported": ({"first": "import sys\nsys.exit(3)\n"}, "first", "SystemExit: 3"),
    "lacks a dependency": (
        {"first": "import einops_of_nobody\n"},
        "first",
        "ModuleNotFoundError: No module named 'einops_of_nobody'",
    ),
    "was written for another Python": (
        {"first": "def f(:\n"},
        "first",
        "SyntaxError: invalid syntax (__init__.py, line 1)",
    ),
    "needs what a later Python has": (
        {"first": "from typing import TypeOfPython4\n"},
        "first",
        "ImportError: cannot import name 'TypeOfPython4' from 'typing'",
    ),
    "raises when asked to register": (
        {"first": hook("register_components", "raise ValueError('not today')")},
        "first",
        "ValueError: not today",
    ),
    "misspells a hook": (
        {"first": component().replace("ponents(", "ponent(")},
        "first",
        "unknown hook 'register_component'",
    ),
    "misspells the hook's argument": (
        {"first": hook("register_components", "pass", "registry")},
        "first",
        "'registry'",
    ),
    "gives a class for its path": (
        {"first": component(spec="ThirdSpec")},
        "first",
        "plugin first: not a dotted path; found 'ThirdSpec'; expected 'package.module:Name'",
    ),
    "names a folder that is not there": (
        {"first": hook("register_cards", "register(Path('nowhere'))")},
        "first",
        "plugin first: there is no folder of cards at nowhere",
    ),
    "takes the name of a part of zoo's": (
        {"first": component(kind="gated")},
        "first",
        "the component 'ffn gated' is registered twice; found zoo.components (zoo.components.ffn.spec:GatedSpec) and",
    ),
    "takes the name of a part of another's": (
        {"first": component(), "second": component()},
        "second",
        "the component 'ffn third' is registered twice; found first (first.spec:ThirdSpec) and second (second.spec:",
    ),
    "takes the name of a model": (
        {"first": hook("register_cards", "register(Path(__file__).parent / 'cards')")},
        "first",
        "the card 'mixtral-8x7b' is registered twice; found zoo.cards (",
    ),
    "takes the name of a command": (
        {"first": hook("register_commands", "register('run', 'first:run')")},
        "first",
        "the command 'run' is registered twice; found zoo.cli (zoo.cli.run:run) and first (first:run)",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_package_is_left_out(name: str, install: Install, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """It costs one warning with its name and the cure; commands answer as if it were not there."""
    sources, culprit, why = LEFT_OUT[name]
    install(**sources)
    listed = desk.command("list")
    assert (listed.code, "mixtral-8x7b" in listed.out) == (0, True)
    [warning] = [record.getMessage() for record in caplog.records if record.name == "zoo.plugins"]
    assert warning.startswith(f"zoo: plugin '{culprit}' of {culprit} is left out: ")
    assert why in warning
    assert warning.endswith(f"Silence this with ZOO_DISABLE_PLUGINS={culprit}.")
    assert "\n" not in warning
    row = next(line for line in desk.command("plugins").out.splitlines() if line.startswith(culprit))
    assert "failed: " in row
    assert why[:40] in row


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_package_may_be_demanded(name: str, install: Install, desk: Desk) -> None:
    sources, culprit, why = LEFT_OUT[name]
    install(**sources)
    strict = desk.command("--strict-plugins", "list")
    assert (strict.code, strict.out) == (2, "")
    assert strict.err.startswith(f"zoo: plugin '{culprit}' of {culprit} failed; found ")
    assert why in strict.err


def test_a_package_may_be_silenced(install: Install, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    install(first="raise RuntimeError\n")
    desk.patch.setenv("ZOO_DISABLE_PLUGINS", "first")
    assert desk.command("list").code == 0
    assert caplog.records == []
    assert "disabled" in desk.command("plugins").out


def third(desk: Desk) -> Path:
    """A card with the package's part."""
    with desk.load() as model:
        text = model.card.to_yaml()
    assert "kind: gated" in text
    return desk.put("third.yaml", text.replace("kind: gated", "kind: third"))


# What breaks -> what using the part says; models without it go on.
ON_USE: dict[str, tuple[dict[str, str], str]] = {
    "a Spec that raises": (
        {"spec": "raise RuntimeError('no luck')\n"},
        "plugin first: importing the ffn 'third' (first.spec:ThirdSpec) failed; found RuntimeError: no luck",
    ),
    "a Spec whose dependency is missing": (
        {"spec": "import einops_of_nobody\n"},
        "plugin first: the ffn 'third' needs 'einops_of_nobody', which is not installed. Install the package",
    ),
    "a Spec of another name": (
        {"spec": SPEC.replace("ThirdSpec", "ThirstSpec")},
        "plugin first: the ffn 'third' is registered as first.spec:ThirdSpec",
    ),
    "a Spec that is none": (
        {"spec": "class ThirdSpec:\n    pass\n"},
        "plugin first: first.spec:ThirdSpec is not a component's Spec",
    ),
}


@pytest.mark.parametrize("name", ON_USE)
def test_a_part_that_breaks_on_use(name: str, install: Install, desk: Desk) -> None:
    files, said = ON_USE[name]
    card = third(desk)
    install(first=component(), **files)
    desk.refused(PluginError, [said], lambda: zoo.inspect(card), "inspect", str(card))
    assert desk.command("inspect", str(desk.folder)).code == 0


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise RuntimeError('no luck')\n", "(first.module:Third) failed; found RuntimeError: no luck"),
        ("import einops_of_nobody\n", "plugin first: the module needs 'einops_of_nobody', which is not installed"),
    ],
)
def test_a_module_that_breaks_on_use(install: Install, desk: Desk, module: str, said: str) -> None:
    """A card is inspected without its modules; loading says which one fails."""
    card = third(desk)
    install(first=component(), module=module)
    assert zoo.inspect(card).parameters > 0
    desk.refused(PluginError, [said], lambda: desk.load(card, weights="random"))


def test_a_command_that_breaks_on_use(install: Install, desk: Desk) -> None:
    install(first=hook("register_commands", "register('hello', 'first.nothing:hello')"))
    assert "hello" in desk.command("--help").out
    found = desk.command("hello")
    said = "zoo: plugin first: there is no module 'first.nothing' for the command 'hello' (first.nothing:hello)"
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(said)


def test_a_part_that_works(install: Install, desk: Desk) -> None:
    card = third(desk)
    install(first=component())
    with desk.load(card, weights="random") as model:
        assert "ffn third" in zoo.inspect(card).owners
        assert len(model.generate([[1]], max_tokens=3, ignore_eos=True)[0].tokens) == 3


def test_a_part_defined_in_a_notebook(install: Install, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of the running program are parts like others, registered by hand."""
    notebook = types.ModuleType("notebook_of_ann")
    monkeypatch.setitem(sys.modules, "notebook_of_ann", notebook)
    exec(SPEC.replace("{module}", "notebook_of_ann") + MODULE, vars(notebook))
    card = third(desk)
    install()
    desk.refused(CardError, ["unknown kind of ffn; found 'third'"], lambda: zoo.inspect(card))
    plugin = types.ModuleType("plugin")
    exec(component(spec="notebook_of_ann:ThirdSpec"), vars(plugin))
    registry.manager().register(plugin, "notebook")
    assert zoo.inspect(card).owners["ffn third"] == "notebook"
    with desk.load(card, weights="random") as model:
        assert len(model.generate([[1]], max_tokens=3, ignore_eos=True)[0].tokens) == 3


# --- names of parts and models --------------------------------------------------------------------------------------

PARTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a near miss": (
        {"model.layers.0.ffn.kind": "gatted"},
        [
            "model.layers.0.ffn.kind: unknown kind of ffn; found 'gatted'",
            "expected one of gated,",
            "Did you mean 'gated'?",
        ],
    ),
    "a part of another slot": (
        {"model.layers.0.ffn.kind": "attention"},
        ["unknown kind of ffn; found 'attention'", "'attention' is a kind of mixer"],
    ),
    "a part that nobody brings": (
        {"model.layers.0.mixer.kind": "retention"},
        ["model.layers.0.mixer.kind: unknown kind of mixer; found 'retention'; expected one of attention"],
    ),
    "a part in the wrong case": (
        {"model.layers.0.mixer.rope.kind": "YaRN"},
        ["unknown kind of rope; found 'YaRN'; expected one of default, linear, llama3, yarn"],
    ),
    "a number for a part": ({"model.layers.0.ffn.kind": 3}, ["model.layers.0.ffn.kind: wrong value; found 3"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_an_unknown_part(name: str, desk: Desk) -> None:
    overrides, words = PARTS[name]
    flags = [part for field, value in overrides.items() for part in ("--set", f"{field}={value}")]
    call = lambda: zoo.inspect(desk.folder, overrides=overrides)  # noqa: E731
    desk.refused(CardError, words, call, "inspect", str(desk.folder), *flags)


MODELS: dict[str, tuple[Any, str]] = {
    "a near miss": ("mixtral-8x7", "unknown card 'mixtral-8x7'. Did you mean 'mixtral-8x7b'?"),
    "another case": ("Mixtral-8x7B", "unknown card 'Mixtral-8x7B'. Did you mean 'mixtral-8x7b'?"),
    "shouted": ("MIXTRAL-8X7B", "unknown card 'MIXTRAL-8X7B'. Did you mean 'mixtral-8x7b'?"),
    "its address": (
        "https://huggingface.co/mistralai/Mixtral-8x7B-v0.1",
        "there is no such card, folder or file. The card of that repository is 'mixtral-8x7b'.",
    ),
    "an address": ("https://huggingface.co/a/b", "Addresses are not read: fetch the repository to a folder"),
    "a file of weights": ("mixtral.gguf", "mixtral.gguf: there is no such card, folder or file"),
    "nothing like it": ("zzzzzz", "unknown card 'zzzzzz'. See `zoo list`."),
    "the hub's name of it": (
        "mistralai/Mixtral-8x7B-v0.1",
        "there is no such card, folder or file. The card of that repository is 'mixtral-8x7b'.",
    ),
    "nearly the hub's name of it": (
        "mistralai/Mixtral-8x7B",
        "mistralai/Mixtral-8x7B: there is no such card, folder or file. Did you mean 'mixtral-8x7b'",
    ),
    "no name": ("", "not a model; found ''; expected a card's name, a path, a Card or a mapping"),
    "None": (None, "not a model; found None; expected a card's name, a path, a Card or a mapping"),
    "an empty mapping": ({}, "card: the key 'name' is missing"),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_model(name: str, desk: Desk) -> None:
    ref, said = MODELS[name]
    command = ("inspect", ref) if isinstance(ref, str) else ()
    desk.refused(CardError, [said], lambda: zoo.inspect(ref), *command)


def test_a_folder_and_a_model_of_one_name(desk: Desk) -> None:
    """The card is meant by its name, the folder by a path."""
    desk.folder.rename("mixtral-8x7b")
    assert zoo.inspect("mixtral-8x7b").card.model["dim"] == 4096
    assert zoo.inspect("./mixtral-8x7b").card.model["dim"] == 64


def test_a_card_file_named_like_a_model(desk: Desk) -> None:
    """A file on its own may have any name; it stands beside the built-in one and does not hide it."""
    card = desk.put(
        "mixtral-8x7b.yaml", zoo.inspect(desk.folder).card.with_overrides({"name": "mixtral-8x7b"}).to_yaml()
    )
    assert zoo.inspect(card).card.model["dim"] == 64
    assert zoo.inspect("mixtral-8x7b").card.model["dim"] == 4096


def test_unknown_commands_and_flags(desk: Desk) -> None:
    for arguments, said in (
        (("lst",), "there is no command 'lst'; did you mean 'list'?"),
        (("inspect", "mixtral-8x7b", "--contxt", "8"), "--context"),
        (("inspect", "mixtral-8x7b", "--context", "0"), "0 is not in the range x>=1"),
        (("bench", "mixtral-8x7b", "--batch", "0"), "0 is not in the range x>=1"),
        (
            ("inspect", "mixtral-8x7b", "--dtype", "int8"),
            "unknown dtype; found 'int8'; expected auto or one of float32",
        ),
        (
            ("card", "new", str(desk.folder), "-o", "nowhere/a.yaml"),
            "nowhere/a.yaml: the card cannot be written; found No such",
        ),
    ):
        found = desk.command(*arguments)
        assert (found.code, found.out) == (2, ""), arguments
        assert said in found.err
        assert "Traceback" not in found.err


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "zoo.plugins")
