"""The house rules that a program can check. CONTRIBUTING.md gives their reasons.

Each rule is a function from a source file to its faults, tried on a sample that breaks it before it is trusted.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("zoo", "registry", "components", "cards")
FILE_CAP, FUNCTION_CAP, FUNCTION_P90, DEPTH_CAP = 300, 60, 20, 2
TORCH_FREE = {"torch", "numpy", "safetensors", "transformers", "tokenizers", "sentencepiece", "mistral_common"}
TORCH_FREE |= {"huggingface_hub", "jinja2", "xformers"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source:
    """A Python file, by its path from the root of the repository."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def docstrings(self) -> set[ast.Constant]:
        owners = (ast.Module, ast.ClassDef, *FUNCTIONS)
        bodies = [node.body for node in ast.walk(self.tree) if isinstance(node, owners)]
        texts = [
            statement.value
            for body in bodies
            for statement in body
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        ]
        return {text for text in texts if isinstance(text.value, str)}

    @cached_property
    def code_lines(self) -> set[int]:
        """Lines that hold code: neither blank, nor comment, nor docstring."""
        blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        lines = {n for t in tokens if t.type not in blank for n in range(t.start[0], t.end[0] + 1)}
        return lines - {n for text in self.docstrings for n in range(text.lineno, (text.end_lineno or 0) + 1)}

    @cached_property
    def functions(self) -> dict[str, int]:
        """Code lines of every function, nested ones included in their owner's."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS)]
        return {
            f"{self.path}:{node.lineno} {node.name}": len(
                self.code_lines & set(range(node.lineno, (node.end_lineno or 0) + 1))
            )
            for node in nodes
        }

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Line and full name of everything imported, also inside functions."""
        found: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found


@cache
def sources() -> list[Source]:
    files = [file for folder in PRODUCT for file in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


@cache
def card_names() -> frozenset[str]:
    return frozenset(file.stem for file in (ROOT / "cards").rglob("*.yaml"))


@cache
def shape_letters() -> dict[str, str]:
    """Letter -> meaning, from the table of docs/shapes.md."""
    text = (ROOT / "docs/shapes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| *`?([A-Za-z])`? *\| *(.+?) *(?:\||$)", text, re.MULTILINE)
    return dict(rows)


def long_file(source: Source) -> Iterator[str]:
    if len(source.code_lines) > FILE_CAP:
        yield f"{len(source.code_lines)} code lines; the cap is {FILE_CAP}"


def long_function(source: Source) -> Iterator[str]:
    for name, lines in source.functions.items():
        if lines > FUNCTION_CAP:
            yield f"{name}: {lines} code lines; the cap is {FUNCTION_CAP}"


def no_docstring(source: Source) -> Iterator[str]:
    if source.tree.body and ast.get_docstring(source.tree) is None:
        yield "the file does not say what it is for"


def card_name(source: Source) -> Iterator[str]:
    """A model's name in code is a branch on it, or goes stale: a checkpoint is data."""
    known = card_names()
    pattern = re.compile(r"(?<![\w.-])(?:" + "|".join(re.escape(n) for n in known if "-" in n) + r")(?![\w.-])")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in source.docstrings:
            if node.value in known or pattern.search(node.value):
                yield f"line {node.lineno}: {node.value!r} names a card"
        elif isinstance(node, ast.Name | ast.FunctionDef | ast.ClassDef | ast.arg):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else node.name
            if name.lower().replace("_", "-") in known - {"tiny"}:
                yield f"line {node.lineno}: {name} names a card"


def defaulted_getattr(source: Source) -> Iterator[str]:
    """A setting read with a default is a setting that can be missing without anybody noticing."""
    if not source.path.startswith("components/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
            yield f"line {node.lineno}: getattr with a default"


def heavy_import(source: Source) -> Iterator[str]:
    """The registry and the Specs answer on a machine without torch."""
    if source.path.startswith("registry/") or source.path.endswith("/spec.py"):
        for line, name in source.imports:
            if name.split(".")[0] in TORCH_FREE:
                yield f"line {line}: imports {name}"


IMPORTS = {"registry": {"registry"}, "components": {"components", "registry"}, "cards": {"registry"}}


def wrong_way_import(source: Source) -> Iterator[str]:
    """Imports go zoo -> zoo.components -> zoo.registry, by the package's own name."""
    here = source.path.split("/")[0]
    for line, name in source.imports:
        first, second = [*name.split("."), ""][:2]
        if first == "zoo" and here in IMPORTS and second not in IMPORTS[here]:
            yield f"line {line}: {here} imports {name}"
        if first in ("registry", "components", "cards", "tests", "docs"):
            yield f"line {line}: imports {name}; the package is zoo.{name}"


def printing(source: Source) -> Iterator[str]:
    if not source.path.startswith("zoo/cli/"):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo", "click.secho"):
                yield f"line {node.lineno}: {ast.unparse(node.func)}; only the command line prints"


def unknown_letter(source: Source) -> Iterator[str]:
    """A suffix such as x_TD names axes; every letter of it stands in docs/shapes.md."""
    for name, line in _identifiers(source.tree):
        suffix = re.fullmatch(r"_?[a-z][a-z0-9]*(?:_[a-z0-9]+)*_([A-Z][A-Za-z0-9]*)", name)
        if suffix and set(re.sub(r"\d", "", suffix[1])) - set(shape_letters()):
            yield f"line {line}: {name} has a letter that docs/shapes.md does not know"


def wrong_legend(source: Source) -> Iterator[str]:
    """A file's own legend says what docs/shapes.md says."""
    for text in source.docstrings:
        legend = re.search(r"docs/shapes\.md:(.*?)\.(?:\s|$)", str(text.value), re.DOTALL)
        for entry in re.split(r"[,;]", legend[1]) if legend else ():
            letter, _, meaning = " ".join(entry.split()).removeprefix("and ").partition(" ")
            known = shape_letters().get(letter, "a letter that is not there")
            if meaning and meaning.lower() not in known.lower():
                yield f"line {text.lineno}: {letter} is {meaning!r} here and {known!r} in docs/shapes.md"


def _identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno


RULES: dict[Callable[[Source], Iterator[str]], tuple[str, str]] = {
    long_file: ("zoo/a.py", "x = 1\n" * (FILE_CAP + 1)),
    long_function: ("zoo/a.py", "def f():\n" + "    x = 1\n" * FUNCTION_CAP),
    no_docstring: ("zoo/a.py", "x = 1\n"),
    card_name: ("zoo/a.py", 'if name.startswith("mixtral-8x7b"):\n    pass\n'),
    defaulted_getattr: ("components/a.py", 'x = getattr(config, "window", None)\n'),
    heavy_import: ("components/ffn/spec.py", "def f():\n    from torch import nn\n"),
    wrong_way_import: ("components/a.py", "from zoo.engine.request import Request\n"),
    printing: ("zoo/engine/a.py", 'print("loaded")\n'),
    unknown_letter: ("components/a.py", "x_TQ = 1\n"),
    wrong_legend: ("components/a.py", '"""Letters as in docs/shapes.md: T tensors, D model."""\n'),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_finds_its_sample(rule: Callable[[Source], Iterator[str]]) -> None:
    assert list(rule(Source(*RULES[rule])))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[Source], Iterator[str]]) -> None:
    faults = [f"{source.path}: {fault}" for source in sources() for fault in rule(source)]
    assert not faults, "\n" + "\n".join(faults)


def test_code_lines_leave_out_what_is_not_code() -> None:
    head = '"""What it is.\n\nAnd why."""\n\n# a reason\nx = [\n    1,  # one\n]\n\n\n'
    source = Source("a.py", head + 'def f():\n    """Says."""\n    return """a\nb"""\n')
    assert source.code_lines == {6, 7, 8, 11, 13, 14}
    assert source.functions == {"a.py:11 f": 3}


def test_most_functions_are_short() -> None:
    lengths = sorted(lines for source in sources() for lines in source.functions.values())
    assert lengths[len(lengths) * 9 // 10] <= FUNCTION_P90


def depths(files: list[Source]) -> dict[str, int]:
    """How many of the repository's classes stand above each class, itself included.

    Spec is not counted: it is to settings what nn.Module is to modules, and a slot may have a contract under it.
    """
    bases: dict[str, list[str]] = {}
    for source in files:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]

    def depth(name: str) -> int:
        above = max((depth(base) for base in bases[name] if base in bases and base != name), default=0)
        return above + (name != "Spec")

    return {name: depth(name) for name in bases}


def test_classes_are_composed_not_inherited() -> None:
    sample = Source("a.py", "class A: ...\nclass B(A): ...\nclass C(x.B[int]): ...\n")
    assert depths([sample]) == {"A": 1, "B": 2, "C": 3}
    assert {name: depth for name, depth in depths(sources()).items() if depth > DEPTH_CAP} == {}


def test_no_path_of_one_machine_in_the_repository() -> None:
    machine = re.compile(r"(?<![\w.~/-])/(?:work|home|root|Users|mnt)/\w")
    folders = [*PRODUCT, "tests", "docs", ".ci"]
    files = [
        f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".md", ".yaml", ".toml")
    ]
    files += [f for f in ROOT.iterdir() if f.is_file() and f.suffix not in (".safetensors", ".bin")]
    assert machine.search("see /home/" + "me/models")
    assert [str(f) for f in files if machine.search(f.read_text(encoding="utf-8"))] == []


def test_no_test_expects_to_fail() -> None:
    """A test that may fail tells nothing; what does not work yet is not claimed."""
    marks = re.compile(r"mark\." + "xfail|pytest" + r"\.xfail")
    assert [f.name for f in (ROOT / "tests").rglob("*.py") if marks.search(f.read_text(encoding="utf-8"))] == []


def imported(files: list[Source]) -> set[str]:
    """Distributions of other projects that the files import."""
    own = {"zoo", "registry", "components", "cards", "tests", "__future__"}
    names = {name.split(".")[0] for source in files for _, name in source.imports} - own - sys.stdlib_module_names
    known = {
        "yaml": "pyyaml",
        "PIL": "pillow",
        "pydantic_core": "pydantic",
    }  # pydantic documents its core as part of itself
    return {known.get(name, name) for name in names}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in requirements}


CV2 = "opencv_python_headless"
"""mistral-common imports it."""


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed, extras = declared(project["dependencies"]), project["optional-dependencies"]
    used = imported(sources())
    assert used - needed - {"xformers", "triton", "soundfile", "ray"} == set(), "imported and not declared"
    assert needed - used == set(), "declared and not imported"
    files = [Source(str(f), f.read_text(encoding="utf-8")) for f in (ROOT / "tests").rglob("*.py")]
    # The last two are for benchmarks, which do without them.
    used = imported(files) - needed - {"mistral_inference", "xformers", "llama_cpp", "gguf"}
    assert used == declared(extras["test"]) - {"pytest_timeout", "setuptools", "simple_parsing", "soxr", CV2}


def test_every_dependency_is_justified() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies")[2]
    words = {word.lower().replace("-", "_") for word in re.findall(r"[\w-]+", guide)}
    assert declared([*project["dependencies"], *extras]) - words == set()


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter that ran `code`."""
    report = "\nimport sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, cwd="/", timeout=60)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


def test_importing_zoo_is_free() -> None:
    assert modules_after("import zoo") & (TORCH_FREE | {"pydantic", "pluggy", "click", "yaml", "rich"}) == set()


def test_registry_and_specs_need_no_torch() -> None:
    dotted = [source.path.removesuffix(".py").replace("/", ".") for source in sources()]
    light = [f"zoo.{name}" for name in dotted if name.startswith("registry.") or name.endswith(".spec")]
    assert len(light) > 10
    code = "\n".join(f"import {name.removesuffix('.__init__').replace('zoo.zoo.', 'zoo.')}" for name in light)
    assert modules_after(code) & TORCH_FREE == set()


LIBRARIES = "import click, importlib.metadata, pluggy, pydantic, pydantic.fields, yaml"
IDLE_SECONDS = 0.13  # what importing them takes on an idle machine of 2023


@pytest.mark.parametrize("arguments", [["list"], ["inspect", "mixtral-8x7b"], ["schema"], ["--help"]], ids="-".join)
def test_quick_commands_answer_at_once(arguments: list[str]) -> None:
    """Half a second of processor time, more where the same libraries take longer to import; and nothing heavy. Without
    the kernels that read memory for a tenth of a second, to tell the speed of a machine that was not measured."""
    code = "import os; os.environ['ZOO_NATIVE'] = 'off'\n"
    code += f"import sys; sys.argv = ['zoo', *{arguments}]\nfrom zoo.cli import main\ntry: main()\nexcept SystemExit: 0"
    libraries, command = [], []
    for _ in range(3):
        libraries.append(processor_seconds(LIBRARIES)[0])
        seconds, modules = processor_seconds(code)
        command.append(seconds)
        assert modules & TORCH_FREE == set()
    assert median(command) < 0.5 * max(1.0, median(libraries) / IDLE_SECONDS)


def processor_seconds(code: str) -> tuple[float, set[str]]:
    """What a fresh interpreter that runs `code` takes, and the modules that it loads."""
    before = os.times()
    modules = modules_after(code)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, modules
