"""The package in docs/examples, installed beside zoo as a user would, used, and broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs/examples/zoo-primer"
ZOO = ("zoo", "registry", "components", "cards", "pyproject.toml", "README.md", "LICENSE")
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


class Environment:
    """A virtual environment in which zoo and the example were installed by pip."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.folder = folder / "bin", folder
        site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        self.package = Path(site) / "zoo_primer"

    def run(self, *command: str, **variables: str) -> Done:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("ZOO_", "PYTHON", "PIP_"))
        }
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **variables}
        arguments = [str(self.bin / command[0]), *command[1:]]
        return subprocess.run(arguments, capture_output=True, text=True, cwd=self.folder, env=environment)

    def zoo(self, *arguments: str, **variables: str) -> str:
        """Standard output of a zoo command that succeeds without a word on stderr."""
        done = self.run("zoo", *arguments, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def python(self, code: str) -> str:
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Both packages built from copies and installed; torch and the rest are borrowed from this environment."""
    folder = tmp_path_factory.mktemp("plugin")
    for name in ZOO:
        source = ROOT / name
        (folder / "zoo").mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / "zoo" / name, ignore=LEFT_BEHIND)
        else:
            shutil.copy(source, folder / "zoo" / name)
    shutil.copytree(EXAMPLE, folder / "zoo-primer", ignore=LEFT_BEHIND)
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    environment = Environment(venv)
    borrowed = environment.package.parent / "borrowed.pth"
    borrowed.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment.bin / "python"), "install", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    packages = [str(folder / "zoo"), str(folder / "zoo-primer")]
    done = subprocess.run([*pip, *options, *packages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return environment


@pytest.fixture
def broken(installed: Environment) -> Callable[[str], AbstractContextManager[None]]:
    """Makes a file of the installed package raise when it is imported."""

    @contextmanager
    def broken(name: str, line: str = "raise RuntimeError('broken on purpose')") -> Iterator[None]:
        file = installed.package / name
        text = file.read_text()
        file.write_text(line + "\n")
        try:
            yield
        finally:
            file.write_text(text)

    return broken


def test_the_plugin_is_listed_with_what_it_provides(installed: Environment) -> None:
    [plugin] = [p for p in json.loads(installed.zoo("plugins", "--json")) if p["name"] == "primer"]
    assert plugin == {
        "name": "primer",
        "version": "0.1.0",
        "status": "active",
        "provides": ["ffn relu_squared", "card primer-nano", "layout primer"],
    }
    assert installed.python("import zoo; print(zoo.__file__)").startswith(str(installed.folder))


def test_its_card_is_known_checked_and_part_of_the_schema(installed: Environment) -> None:
    assert "primer-nano" in installed.zoo("list")
    assert installed.zoo("card", "check", "primer-nano").startswith("primer-nano: ok")
    schema = json.loads(installed.zoo("schema"))
    assert schema["$defs"]["ffn.relu_squared"]["required"] == ["hidden_dim"]
    card = json.loads(
        installed.python("import json, zoo; print(json.dumps(zoo.inspect('primer-nano').card.to_dict()))")
    )
    Draft202012Validator(schema).validate(card)
    card["model"]["layers"][0]["ffn"]["hidden"] = 3
    assert not Draft202012Validator(schema).is_valid(card)


def test_a_card_of_the_user_may_use_it(installed: Environment) -> None:
    card = installed.folder / "mine.yaml"
    card.write_text("name: mine\nextends: primer-nano\ncontext_length: 32\n")
    found = json.loads(installed.zoo("inspect", str(card), "--json"))
    assert found["context_length"] == 32 and found["owners"]["ffn relu_squared"] == "primer"
    card.write_text(installed.zoo("inspect", str(card), "--resolved").replace("hidden_dim", "hiden_dim"))
    done = installed.run("zoo", "card", "check", str(card))
    assert (
        done.returncode == 2
        and "unknown key 'hiden_dim'" in done.stderr
        and "Did you mean 'hidden_dim'?" in done.stderr
    )


def test_it_runs_on_random_weights(installed: Environment) -> None:
    tokens = installed.python(
        "import zoo\n"
        "with zoo.load('primer-nano', weights='random', device='cpu') as model:\n"
        "    [answer] = model.generate([[1, 2, 3]], max_tokens=5, temperature=0, ignore_eos=True)\n"
        "print(len(answer.tokens), answer.finish_reason)"
    )
    assert tokens == "5 length\n"


def test_its_checkpoints_load_by_its_own_table_of_names(installed: Environment) -> None:
    """A folder written with the plugin's names gives the logits of the weights it was written from."""
    differences = installed.python(
        "import zoo, torch\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "first = zoo.load('primer-nano', weights='random', device='cpu')\n"
        "state = dict(first.module.state_dict())\n"
        "names = {'embed.weight': 'model.embed_tokens.weight', 'norm.weight': 'model.norm.weight'}\n"
        "out = {names[n]: state[n] for n in names}\n"
        "for i in range(3):\n"
        "    old, new = f'layers.{i}', f'model.layers.{i}'\n"
        "    qkv = state[f'{old}.mixer.qkv.weight'].chunk(3)\n"
        "    out |= {f'{new}.self_attn.{n}_proj.weight': w.clone() for n, w in zip('qkv', qkv)}\n"
        "    out[f'{new}.self_attn.o_proj.weight'] = state[f'{old}.mixer.o.weight']\n"
        "    out[f'{new}.input_layernorm.weight'] = state[f'{old}.mixer_norm.weight']\n"
        "    out[f'{new}.post_attention_layernorm.weight'] = state[f'{old}.ffn_norm.weight']\n"
        "    out[f'{new}.mlp.wi.kernel'] = state[f'{old}.ffn.up.weight'].T.contiguous()\n"
        "    out[f'{new}.mlp.wo.kernel'] = state[f'{old}.ffn.down.weight'].T.contiguous()\n"
        "Path('checkpoint').mkdir()\n"
        "save_file(out, 'checkpoint/model.safetensors')\n"
        "second = zoo.load('primer-nano', weights='checkpoint', device='cpu')\n"
        "a, b = (model.logits([1, 2, 3, 4]) for model in (first, second))\n"
        "print(tuple(a.shape), torch.equal(a, b), any('layout primer' in note for note in second.notes))"
    )
    assert differences == "(4, 300) True True\n"


def test_its_own_tests_pass(installed: Environment) -> None:
    tests = str(installed.folder.parent / "zoo-primer")
    bare = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = installed.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, **bare)
    assert done.returncode == 0, done.stdout


def test_a_plugin_broken_at_import_costs_one_line_and_nothing_else(
    installed: Environment, broken: Callable[..., AbstractContextManager[None]]
) -> None:
    before = installed.zoo("list", ZOO_DISABLE_PLUGINS="primer")
    assert "primer-nano" not in before
    with broken("__init__.py"):
        done = installed.run("zoo", "list")
        assert (done.returncode, done.stdout) == (0, before)
        assert done.stderr == (
            "zoo: plugin 'primer' of zoo-primer (zoo_primer) is left out: RuntimeError: broken on purpose. "
            "Silence this with ZOO_DISABLE_PLUGINS=primer.\n"
        )
        assert installed.zoo("list", ZOO_DISABLE_PLUGINS="primer") == before
        [plugin] = [p for p in json.loads(installed.run("zoo", "plugins", "--json").stdout) if p["name"] == "primer"]
        assert plugin["status"] == "failed: RuntimeError: broken on purpose" and plugin["provides"] == []
        strict = installed.run("zoo", "--strict-plugins", "list")
        assert (strict.returncode, strict.stdout) == (2, "")
        assert (
            "plugin 'primer' of zoo-primer (zoo_primer) failed; found RuntimeError: broken on purpose" in strict.stderr
        )
        assert strict.stderr.count("\n") == 1
        unknown = installed.run("zoo", "inspect", "primer-nano")
        assert unknown.returncode == 2 and "unknown card 'primer-nano'" in unknown.stderr
        assert installed.run("zoo", "--help").returncode == 0


BROKEN_ON_USE = {
    "spec.py": (
        "raise RuntimeError('broken on purpose')",
        ("inspect", "primer-nano"),
        "plugin primer: importing the ffn 'relu_squared' (zoo_primer.spec:ReluSquaredSpec) failed; "
        "found RuntimeError: broken on purpose.",
    ),
    "missing dependency": (
        "import einops_that_nobody_has",
        ("inspect", "primer-nano"),
        "plugin primer: the ffn 'relu_squared' needs 'einops_that_nobody_has', which is not installed. "
        "Install the package that brings it, for example `pip install einops_that_nobody_has`.",
    ),
    "squared_relu.py": (
        "raise RuntimeError('broken on purpose')",
        ("bench", "primer-nano", "--weights", "random", "--device", "cpu"),
        "plugin zoo_primer: importing the module (zoo_primer.squared_relu:ReluSquared) failed; "
        "found RuntimeError: broken on purpose.",
    ),
    "cards/primer-nano.yaml": (
        "name: primer-nano\ncontext_length: many",
        ("inspect", "primer-nano"),
        "primer-nano.yaml:2: context_length: wrong value; found the text 'many'; expected an integer.",
    ),
}


@pytest.mark.parametrize("name", BROKEN_ON_USE)
def test_a_plugin_broken_on_use_fails_its_own_cards_only(
    name: str, installed: Environment, broken: Callable[..., AbstractContextManager[None]]
) -> None:
    line, command, message = BROKEN_ON_USE[name]
    with broken("spec.py" if name == "missing dependency" else name, line):
        done = installed.run("zoo", *command)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        others = installed.run("zoo", "list")
        assert others.returncode == 0 and "mixtral-8x7b" in others.stdout and others.stderr.count("\n") <= 1
        assert installed.run("zoo", "inspect", "mixtral-8x7b").returncode == 0
        assert installed.run("zoo", "schema").returncode == 0
