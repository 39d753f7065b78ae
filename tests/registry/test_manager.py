"""Plugins, good and broken, defined here and registered as installed ones are."""

import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar

import pytest

from zoo.registry import manager as manager_module
from zoo.registry.catalog import Catalog, Entry
from zoo.registry.errors import CardError, PluginError
from zoo.registry.hooks import hookimpl
from zoo.registry.manager import Manager, PluginInfo, manager
from zoo.registry.spec import Spec


class Small(Spec):
    module: ClassVar[str] = "tests:Small"
    kind: str = "small"


SPEC = f"{__name__}:Small"


class Good:
    """Brings one thing through every hook."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @hookimpl
    def register_components(self, register: Callable[..., None]) -> None:
        register("ffn", "small", SPEC)

    @hookimpl
    def register_tokenizers(self, register: Callable[..., None]) -> None:
        register("chat", "plain", SPEC)

    @hookimpl
    def register_cards(self, register: Callable[..., None]) -> None:
        register(self.folder / "cards")

    @hookimpl
    def register_layouts(self, register: Callable[..., None]) -> None:
        register(self.folder / "other.yaml")

    @hookimpl
    def register_commands(self, register: Callable[..., None]) -> None:
        register("hello", "package.module:hello")


class Half:
    """Registers something, then fails."""

    @hookimpl
    def register_components(self, register: Callable[..., None]) -> None:
        register("ffn", "half", SPEC)

    @hookimpl
    def register_cards(self, register: Callable[..., None]) -> None:
        raise RuntimeError("no cards\nat all")


class Misspelt:
    @hookimpl
    def register_component(self, register: Callable[..., None]) -> None:
        register("ffn", "small", SPEC)


class WrongArgument:
    @hookimpl
    def register_components(self, registry: Callable[..., None]) -> None:
        registry("ffn", "small", SPEC)


def components(*entries: tuple[str, str, str]) -> object:
    """A plugin that registers these components."""

    class Components:
        @hookimpl
        def register_components(self, register: Callable[..., None]) -> None:
            for entry in entries:
                register(*entry)

    return Components()


def offers(hook: str, *arguments: object) -> object:
    """A plugin that calls `register` of one hook once."""

    def function(self: object, register: Callable[..., None]) -> None:
        register(*arguments)

    return type("Offers", (), {hook: hookimpl(function)})()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cards/deep").mkdir(parents=True)
    (tmp_path / "cards/one.yaml").write_text("name: one\n")
    (tmp_path / "cards/deep/two.v1.yml").write_text("name: two.v1\n")
    (tmp_path / "cards/readme.md").write_text("not a card\n")
    (tmp_path / "other.yaml").write_text("{}\n")
    return tmp_path


@pytest.fixture
def host() -> Manager:
    return Manager(installed=False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes modules look installed, with an entry point each: name -> module, or the exception of its import."""

    def install(**plugins: Any) -> None:
        entries = []
        for name, plugin in plugins.items():
            module = f"zoo_test_{name}"
            if isinstance(plugin, BaseException):
                monkeypatch.setattr(sys, "meta_path", [_Raising(module, plugin), *sys.meta_path])
            else:
                monkeypatch.setitem(sys.modules, module, plugin)
            entries.append(EntryPoint(name, module, "zoo"))
        monkeypatch.setattr(manager_module, "entry_points", lambda group: EntryPoints(entries))
        manager.cache_clear()

    yield install
    manager.cache_clear()


class _Raising:
    def __init__(self, name: str, error: BaseException) -> None:
        self.name, self.error = name, error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.name:
            raise self.error


def module_of(plugin: object) -> types.ModuleType:
    module = types.ModuleType("plugin")
    for name in dir(plugin):
        if name.startswith("register_"):
            setattr(module, name, getattr(plugin, name))
    return module


def info(host: Manager, name: str) -> PluginInfo:
    return next(plugin for plugin in host.plugins() if plugin.name == name)


def test_the_built_ins_come_through_the_same_door(host: Manager) -> None:
    names = ["zoo.components", "zoo.text", "zoo.loading", "zoo.cards", "zoo.cli"]
    assert [plugin.name for plugin in host.plugins()] == names
    assert all(plugin.status == "active" and plugin.provides and plugin.version for plugin in host.plugins())
    assert host.components()["mixer", "attention"].owner == "zoo.components"
    assert host.cards()["mixtral-8x7b-instruct"].owner == "zoo.cards"
    assert {"mistral", "huggingface"} <= set(host.layouts())
    assert ("chat", "mistral") in host.components()
    assert not Manager(builtins=False, installed=False).components()


def test_a_plugin_brings_something_through_every_hook(host: Manager, folder: Path) -> None:
    host.register(Good(folder), "good", "1.2", "here")
    assert info(host, "good") == PluginInfo(
        *("good", "1.2", "here", "active"),
        ("ffn small", "chat plain", "card two.v1", "card one", "layout other", "command hello"),
    )
    assert host.catalog.find("ffn", "small") == Entry("ffn", "small", SPEC, "good")
    assert host.catalog.spec(host.catalog.find("chat", "plain")) is Small
    assert host.catalog.find_card("two.v1").file == folder / "cards/deep/two.v1.yml"
    assert host.layouts()["other"].owner == "good" and host.commands()["hello"].path == "package.module:hello"


BROKEN = {
    "half": (Half(), "RuntimeError: no cards at all"),
    "misspelt": (Misspelt(), "unknown hook 'register_component'"),
    "wrong argument": (
        WrongArgument(),
        "{'registry'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "duplicate kind": (
        components(("mixer", "attention", SPEC)),
        "the component 'mixer attention' is registered twice; found zoo.components (zoo.components.attention.spec:"
        f"AttentionSpec) and bad ({SPEC})",
    ),
    "a command of zoo": (
        offers("register_commands", "run", "package.module:run"),
        "the command 'run' is registered twice; found zoo.cli (zoo.cli.run:run) and bad (package.module:run)",
    ),
    "its own duplicate": (
        components(("ffn", "a", SPEC), ("ffn", "a", SPEC)),
        f"the component 'ffn a' is registered twice; found bad ({SPEC}) and bad ({SPEC})",
    ),
    "path without a colon": (components(("ffn", "a", "package.module.Spec")), "plugin bad: not a dotted path"),
    "a class for a path": (offers("register_components", "ffn", "a", Small), "plugin bad: not a dotted path"),
    "a card folder that is none": (
        offers("register_cards", Path("/no/where")),
        "plugin bad: there is no folder of cards at /no/where",
    ),
    "a layout that is none": (
        offers("register_layouts", Path("/no/where.yaml")),
        "plugin bad: there is no weight layout at /no/where.yaml",
    ),
    "a mixer as tokenizer": (
        offers("register_tokenizers", "mixer", "a", SPEC),
        "plugin bad: register_tokenizers; found slot 'mixer'; expected 'tokenizer' or 'chat'",
    ),
    "too few arguments": (offers("register_components", "ffn", "a"), "TypeError: "),
}


@pytest.mark.parametrize(("plugin", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_costs_one_line_and_leaves_nothing(
    plugin: object, why: str, host: Manager, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = Manager(installed=False).catalog
    host.register(plugin, "bad", "0.1", "bad-package")
    assert host.catalog == before
    assert info(host, "bad").status.startswith("failed: ") and why in info(host, "bad").status
    [line] = caplog.messages
    assert line.startswith("zoo: plugin 'bad' of bad-package is left out: ") and why in line and "\n" not in line
    assert line.endswith(". Silence this with ZOO_DISABLE_PLUGINS=bad.")
    host.register(Good(folder), "good")
    assert info(host, "good").status == "active"


@pytest.mark.parametrize(("plugin", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_an_error_when_strict(plugin: object, why: str) -> None:
    with pytest.raises(PluginError) as caught:
        Manager(installed=False, strict=True).register(plugin, "bad", "0.1", "bad-package")
    assert str(caught.value).startswith("plugin 'bad' of bad-package failed; found ") and why in str(caught.value)


def test_a_card_that_another_plugin_has_names_both(host: Manager, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/one.yaml").write_text("name: one\n")
    host.register(Good(folder), "good")
    host.register(offers("register_cards", tmp_path / "more"), "second")
    assert info(host, "second").status == (
        f"failed: the card 'one' is registered twice; found good ({folder}/cards/one.yaml) and second "
        f"({tmp_path}/more/one.yaml)"
    )


def test_two_files_of_one_card_name_in_one_folder(host: Manager, folder: Path) -> None:
    (folder / "cards/deep/one.yaml").write_text("name: one\n")
    host.register(offers("register_cards", folder / "cards"), "bad")
    assert "the card 'one' is registered twice" in info(host, "bad").status


def test_two_plugins_of_one_name(host: Manager, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    host.register(Good(folder), "good", "1", "first-package")
    host.register(components(("ffn", "b", SPEC)), "good", "2", "second-package")
    assert [plugin.origin for plugin in host.plugins() if plugin.name == "good"] == ["first-package", "second-package"]
    assert "two plugins are named 'good'; found first-package and second-package" in caplog.text
    assert ("ffn", "b") not in host.components()


# -- discovery


def test_installed_plugins_are_found(install: Callable[..., None], folder: Path) -> None:
    install(good=module_of(Good(folder)))
    assert info(manager(), "good").status == "active"
    assert manager().catalog.find("ffn", "small").owner == "good" and manager() is manager()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("broken"), "RuntimeError: broken"),
        (SystemExit(3), "SystemExit: 3"),
        (SyntaxError("bad"), "SyntaxError: bad"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "No module named 'einops'"),
    ],
)
def test_a_plugin_that_cannot_be_imported_costs_one_line(
    error: BaseException, why: str, install: Callable[..., None], caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    install(bad=error, good=module_of(Good(folder)))
    assert why in info(manager(), "bad").status and info(manager(), "good").status == "active"
    assert len(caplog.messages) == 1 and why in caplog.text


def test_a_broken_plugin_is_fatal_under_the_strict_switch(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(bad=RuntimeError("broken"))
    monkeypatch.setenv("ZOO_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="plugin 'bad' of zoo_test_bad failed; found RuntimeError: broken"):
        manager()
    monkeypatch.setenv("ZOO_STRICT_PLUGINS", "0")
    assert manager().plugins()


def test_a_disabled_plugin_is_not_even_imported(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(bad=RuntimeError("broken"), worse=RuntimeError("broken too"))
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "bad, worse")
    assert [info(manager(), name).status for name in ("bad", "worse")] == ["disabled", "disabled"]
    assert not caplog.messages


def test_a_plugin_to_leave_out_that_is_not_there_is_told(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(bad=RuntimeError("broken"))
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "bat,bad")
    assert info(manager(), "bad").status == "disabled"
    assert caplog.messages == [
        "zoo: there is no plugin 'bat' to leave out, as ZOO_DISABLE_PLUGINS says; did you mean 'bad'?"
    ]


def test_the_warning_goes_to_stderr_as_one_line(
    install: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Without any set-up of logging, as in the command line."""
    import logging

    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        install(bad=RuntimeError("two\nlines"))
        manager()
    finally:
        root.handlers = handlers
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "RuntimeError: two lines" in captured.err


# -- use


def test_the_nearest_kinds_are_offered(host: Manager) -> None:
    with pytest.raises(CardError) as caught:
        host.catalog.find("rope", "yarm", "c.yaml:3")
    assert str(caught.value) == (
        "c.yaml:3: unknown kind of rope; found 'yarm'; expected one of default, linear, llama3, yarn, longrope. "
        "Did you mean 'yarn'?"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("zoo_test_none:Spec", "there is no module 'zoo_test_none' for the ffn 'a' (zoo_test_none:Spec)."),
        ("zoo.none.spec:Spec", "there is no module 'zoo.none' for the ffn 'a' (zoo.none.spec:Spec)."),
        (
            "zoo_test_needs:Spec",
            "the ffn 'a' needs 'einops.layers', which is not installed. "
            "Install the package that brings it, for example `pip install einops`.",
        ),
        ("zoo_test_raises:Spec", "importing the ffn 'a' (zoo_test_raises:Spec) failed; found OSError: disk."),
        (
            f"{__name__}:Nope",
            f"the ffn 'a' is registered as {__name__}:Nope; found AttributeError: module '{__name__}' "
            "has no attribute 'Nope'.",
        ),
        (
            f"{__name__}:Good",
            f"{__name__}:Good is not a component's Spec; expected a subclass of zoo.registry.spec.Spec with `module`.",
        ),
    ],
)
def test_a_component_that_fails_on_use_names_its_plugin(
    path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = _Raising("zoo_test_needs", ModuleNotFoundError("No module named 'einops'", name="einops.layers"))
    raises = _Raising("zoo_test_raises", OSError("disk"))
    monkeypatch.setattr(sys, "meta_path", [needs, raises, *sys.meta_path])
    entry = Entry("ffn", "a", path, "someone")
    with pytest.raises(PluginError) as caught:
        Catalog({("ffn", "a"): entry}).spec(entry)
    assert str(caught.value) == f"plugin someone: {message}"


def test_a_plugins_command_is_called_and_a_broken_one_only_fails_itself(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import click

    from zoo.cli import main

    monkeypatch.setattr(
        sys.modules[__name__], "hello", click.Command("hello", callback=lambda: click.echo("hi")), False
    )
    install(
        good=module_of(offers("register_commands", "hello", f"{__name__}:hello")),
        bad=module_of(offers("register_commands", "bye", "zoo_test_none:bye")),
        odd=module_of(offers("register_commands", "odd", f"{__name__}:Good")),
    )
    outcomes = {}
    for command in ("hello", "bye", "odd", "--help"):
        with pytest.raises(SystemExit) as caught:
            main([command])
        outcomes[command] = (caught.value.code, *capsys.readouterr())
    assert outcomes["hello"] == (0, "hi\n", "")
    assert outcomes["bye"] == (
        *(2, ""),
        "zoo: plugin bad: there is no module 'zoo_test_none' for the command 'bye' (zoo_test_none:bye).\n",
    )
    assert outcomes["odd"][0] == 2 and "is not a click command" in outcomes["odd"][2]
    code, out, err = outcomes["--help"]
    assert (code, err) == (0, "") and re.search("  bye +Unavailable: its plugin fails.\n", out) and "  hello" in out


def test_finding_plugins_and_cards_imports_no_torch() -> None:
    import subprocess

    code = (
        "import sys\nfrom zoo.registry.card import list_cards\nfrom zoo.registry.resolve import resolve\n"
        "from zoo.registry.schema import schema\nschema()\n"
        "[resolve(card) for card in list_cards() if not card.unsupported]\n"
        "print(sorted({'torch', 'transformers', 'mistral_common', 'numpy', 'registry'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
