"""zoo run and zoo chat, with the embedded card's shape and random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import save_file

import zoo
from zoo.components.fused import wanted

RANDOM = ("--weights", "random", "--device", "cpu", "--dtype", "float32", "--max-tokens", "12")

Command = Callable[..., Any]


def test_the_answer_goes_to_stdout_and_all_else_to_stderr(zoo_command: Command) -> None:
    plain = zoo_command("run", "tiny", "--prompt", "Hello", *RANDOM)
    whole = json.loads(zoo_command("run", "tiny", "--prompt", "Hello", "--json", *RANDOM).out)
    assert plain.code == 0
    assert plain.out == whole["text"] + "\n"
    assert "random weights" in plain.err
    assert "new tokens" in plain.err
    assert "\x1b" not in plain.out + plain.err


def test_json_holds_what_programs_need(zoo_command: Command) -> None:
    found = json.loads(zoo_command("run", "tiny", "--prompt", "Hello", "--json", *RANDOM).out)
    assert len(found["tokens"]) == found["usage"]["completion_tokens"] <= 12
    assert found["finish_reason"] in ("stop", "length")
    assert {"text", "prompt_tokens", "timings", "seed"} <= found.keys()


def test_a_coded_cache_says_what_it_changes(zoo_command: Command) -> None:
    plain = json.loads(zoo_command("run", "tiny", "--prompt", "Hello", "--json", *RANDOM).out)
    coded = zoo_command("run", "tiny", "--prompt", "Hello", "--json", "--cache-dtype", "fp8", *RANDOM)
    assert "cache in fp8: 27% of the bytes of float32, logits of 64 random tokens change by" in coded.err
    assert any(note.startswith("cache in fp8:") for note in json.loads(coded.out)["notes"])
    assert not any(note.startswith("cache in") for note in plain["notes"])


def test_seed_repeats_and_differs(zoo_command: Command) -> None:
    def answer(seed: int) -> Any:
        flags = ("--temperature", "1", "--seed", str(seed), "--json", *RANDOM)
        return json.loads(zoo_command("run", "tiny", "--prompt", "Hello", *flags).out)["tokens"]

    assert answer(1) == answer(1) != answer(2)


@pytest.mark.parametrize("arguments", [(), ("--prompt", "-")])
def test_the_prompt_may_be_piped(zoo_command: Command, arguments: tuple[str, ...]) -> None:
    piped = zoo_command("run", "tiny", "--json", *arguments, *RANDOM, stdin="Hello")
    typed = zoo_command("run", "tiny", "--json", "--prompt", "Hello", *RANDOM)
    assert json.loads(piped.out)["prompt_ids"] == json.loads(typed.out)["prompt_ids"]


def test_raw_and_system_change_the_prompt(zoo_command: Command) -> None:
    def ids(*flags: str) -> Any:
        return json.loads(zoo_command("run", "tiny", "--prompt", "Hello", "--json", *flags, *RANDOM).out)["prompt_ids"]

    turn, raw, system = ids(), ids("--raw"), ids("--system", "Be short.")
    assert len(raw) < len(turn) < len(system)


def test_an_override_is_honoured(zoo_command: Command) -> None:
    found = zoo_command("run", "tiny", "--prompt", "Hello", "--set", "context_length=3", *RANDOM)
    assert found.code == 2
    assert "3" in found.err
    assert "context" in found.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--set", "context_length"), ["--set", "FIELD=VALUE"]),
        (("--set", "model.dims=3"), ["dims", "Did you mean", "dim"]),
        (("--device", "cuda:7"), ["cuda:7", "not there"]),
        (("--device", "gpu"), ["unknown device", "'gpu'", "cuda"]),
        (("--dtype", "bf16"), ["unknown dtype", "'bf16'", "bfloat16"]),
        (("--temperature", "-1"), ["temperature", "-1"]),
        (("--top-p", "0"), ["top_p", "0"]),
        (("--min-p", "2"), ["min_p", "2"]),
        (("--stop", ""), ["stop", "empty"]),
        (("--max-context", "99999"), ["max_context", "99999", "2048"]),
        (("--cache-dtype", "int4"), ["unknown cache_dtype", "'int4'", "int8"]),
        (("--quantize", "int3"), ["quantize", "'int3'", "int8, int4"]),
        (("--devices", "two"), ["not a number of devices", "'two'", "tp=2,pp=2"]),
        (("--devices", "7"), ["among 7 ranks", "Devices that would do: 2 (tp=2), 3 (pp=3), 4 (tp=2,pp=2)"]),
        (("--adapter", "a.safetensors"), ["no such folder or file", "a.safetensors"]),
        (("--image", "a.png"), ["does not read images"]),
        (("--raw", "--system", "x"), ["--system: --system needs the chat format; found --raw as well"]),
        (("--system", ""), ["message 1 (system): the content is empty"]),
        (("--draft", "looku"), ["draft: unknown card 'looku'"]),
    ],
)
def test_a_faulty_flag_is_one_message(zoo_command: Command, flags: tuple[str, ...], words: list[str]) -> None:
    given = [f for i, f in enumerate(RANDOM) if f.startswith("--") and f not in flags for f in RANDOM[i : i + 2]]
    found = zoo_command("run", "tiny", "--prompt", "Hello", *given, *flags)
    assert found.code == 2
    assert found.out == ""
    assert "Traceback" not in found.err
    assert [word for word in words if word not in found.err] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("runn",), ["'runn'", "did you mean 'run'"]),
        (("serve", "tiny"), ["there is no command 'serve'; this version has no server"]),
        (("run",), ["Missing argument 'REF'"]),
        (("run", "tinny", "--prompt", "x"), ["unknown card 'tinny'", "Did you mean 'tiny'"]),
        (("run", "./nowhere", "--prompt", "x"), ["nowhere"]),
        (("run", "tiny", "--prompt", "x", "--promt", "y"), ["--promt", "--prompt"]),
        (("run", "tiny", "--prompt", "x", "--max-tokens", "many"), ["--max-tokens", "'many'"]),
        (("run", "tiny", "--prompt", "x", "--weights", "./nowhere"), ["nowhere"]),
    ],
)
def test_a_faulty_command_is_one_message(zoo_command: Command, arguments: tuple[str, ...], words: list[str]) -> None:
    found = zoo_command(*arguments)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert [word for word in words if word not in found.err] == []


def test_debug_shows_where(zoo_command: Command) -> None:
    assert "Traceback" in zoo_command("run", "nonesuch", "--prompt", "x", "--debug").err


def test_a_base_model_refuses_to_chat(zoo_command: Command) -> None:
    found = zoo_command("chat", "tiny", "--set", "text.features=[]", *RANDOM)
    assert found.code == 2
    assert "not trained to chat" in found.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prompt", "Hello", "--max-context", "2"), "the prompt is longer than the context; found 4 tokens"),
        (("--prompt", "Hello", "--max-batch-size", "0"), "max_batch_size: out of range; found 0"),
        (("--prompt", "Hello", "--set", "text.tokenizer=null", "--set", "text.chat=null"), "there is no tokenizer"),
    ],
)
def test_what_cannot_be_asked_is_told_before_weights_are_read(
    zoo_command: Command, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], words: str
) -> None:
    monkeypatch.delattr("zoo.loading.fill.load_weights")
    found = zoo_command("run", "tiny", *flags)
    assert found.code == 2
    assert words in found.err


@pytest.mark.parametrize("name", ["ZOO_ATTENTION", "ZOO_CAPTURE", "ZOO_FUSED"])
def test_a_variable_that_means_nothing_is_told_before_weights_are_read(
    zoo_command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr("zoo.loading.fill.load_weights")
    monkeypatch.setattr("zoo.components.fused.wanted", wanted.__wrapped__)
    monkeypatch.setenv(name, "maybe")
    found = zoo_command("run", "tiny", "--prompt", "Hello")
    assert found.code == 2
    assert f"{name}: unknown" in found.err
    assert "found 'maybe'" in found.err


@pytest.mark.parametrize("devices", ["1", "2"])
def test_what_does_not_fit_is_told_before_anything_is_measured(
    zoo_command: Command, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    monkeypatch.setattr("zoo.bench.limits.machine_limits", None)
    flags = ("--weights", "random", "--device", "cpu", "--devices", devices)
    found = zoo_command("bench", "mistral-large-3-2512", *flags)
    assert found.code == 2
    assert "does not fit" in found.err


def test_a_deadline_that_is_no_number_is_told_without_ranks_too(
    zoo_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_DEADLINE", "soon")
    found = zoo_command("run", "tiny", "--prompt", "Hello")
    assert found.code == 2
    assert "zoo: ZOO_DEADLINE: not a number of seconds; found 'soon'" in found.err


def test_a_conversation(zoo_command: Command, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = [
        "Hello",
        "/system Be short.",
        "And now?",
        f"/save {saved}",
        "/undo",
        "/info",
        "/set temperature=1",
        "/retry",
    ]
    faults = ["/set temperature", "/set temperature=-1", "/sett x=1", "/load /nowhere.json", "/set colour=red"]
    found = zoo_command("chat", "tiny", *RANDOM, stdin="\n".join([*lines, *faults, "/help", "/quit", "unseen"]))
    assert found.code == 0
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk["messages"]] == ["user", "assistant", "user", "assistant"]
    assert talk["system"] == "Be short."
    assert found.out.count("\n") >= 3
    for words in (
        "2 messages",
        "/set: an override needs a name and a value; found 'temperature'; expected NAME=VALUE, such as temperature",
        "temperature: out of range",
        "no command /sett",
        "Did you mean 'set'",
        "colour",
        "/undo",
    ):
        assert words in found.err


def zoo_process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from zoo.cli import main; main()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


def test_interrupted_by_the_user() -> None:
    flags = ("--weights", "random", "--dtype", "float32", "--raw", "--max-tokens", "2000")
    with zoo_process("run", "tiny", "--prompt", "Hello", *flags) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        code = process.wait(timeout=20)
        message = process.stderr.read().decode()
    assert (code, time.monotonic() - start < 10) in [(130, True), (0, True)]
    assert "Traceback" not in message


def test_interrupted_while_python_imports() -> None:
    program = """
import sys
class Interrupts:
    def find_spec(self, name, *others):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from zoo.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nzoo: interrupted\n")


def test_interrupted_while_the_machine_is_measured() -> None:
    with zoo_process("bench", "--machine") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"the machine's limits: reading, multiplying, calling\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == b"\nzoo: interrupted\n"


@pytest.mark.parametrize(("flags", "end"), [((), "left"), (("--debug",), "left, taken apart")])
def test_the_process_ends_without_taking_everything_apart(flags: tuple[str, ...], end: str) -> None:
    """What others want done at the end is done; `--debug` ends as any program does."""
    program = """
import atexit, os, sys
from zoo.cli import main
class Kept:
    def __del__(self, write=os.write):
        write(1, b", taken apart")
sys.kept = Kept()
def leave():
    print("left", end="")
    sys.stdout.flush()
sys.argv[0] = "zoo"
real = sys.exit
def exit(status):
    atexit.register(leave)
    real(status)
sys.exit = exit
main()
"""
    command = [sys.executable, "-c", program, *flags, "no-such-command"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (2, end)


def test_a_reader_that_leaves_is_no_error() -> None:
    with zoo_process("list") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_is_told() -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run([sys.executable, "-m", "zoo", "list"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (run.returncode, run.stderr) == (2, b"zoo: nothing more can be written: No space left on device\n")


def test_an_adapter_is_used_and_told(zoo_command: Command, tmp_path: Path) -> None:
    outputs, inputs = zoo.inspect("tiny").plan.model.all_parameters()["layers.0.mixer.o.weight"].shape
    factors = {"A": torch.randn(2, inputs), "B": torch.randn(outputs, 2)}
    wo = {f"layers.0.attention.wo.lora_{factor}.weight": value for factor, value in factors.items()}
    save_file(wo, tmp_path / "lora.safetensors")
    plain = zoo_command("run", "tiny", "--prompt", "Hello", *RANDOM)
    found = zoo_command("run", "tiny", "--prompt", "Hello", "--adapter", str(tmp_path), *RANDOM)
    assert "adapter lora: matched 1/1, rank 2, scale 2 (Mistral's default)" in found.err
    assert (found.code, plain.code) == (0, 0)
    assert found.out != plain.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "mistral-large-2411", "--image", "a.png", "--prompt", "x"), "this model does not read images"),
        (("run", "mistral-large-2411", "--audio", "SOUND", "--prompt", "x"), "this model does not hear"),
        (("transcribe", "mistral-large-2411", "SOUND"), "this model does not hear"),
    ],
)
def test_media_are_refused_before_the_model_is_loaded(
    arguments: tuple[str, ...], words: str, zoo_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.api.load", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    sound = tmp_path / "a.wav"
    soundfile.write(sound, [0.0, 0.1, 0.2], 16000)
    done = zoo_command(*(str(sound) if a == "SOUND" else a for a in arguments), "--weights", "random")
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "1", "--seed", "2"), "--seed is given twice"),
        (("-p", "hi", "--prompt", "ho"), "--prompt / -p is given twice"),
        (("--set", "context_length=5", "--set", "context_length=6"), "the field is set twice; found 5 and 6"),
    ],
)
def test_what_can_be_said_once_is_not_said_twice(
    arguments: tuple[str, ...], message: str, zoo_command: Command
) -> None:
    done = zoo_command("run", "tiny", *arguments, stdin="hi")
    assert done.code == 2
    assert message in done.err


def test_a_misspelt_variable_is_told(zoo_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_NATVE", "off")
    assert "zoo: nothing reads the variable ZOO_NATVE; did you mean 'ZOO_NATIVE'?" in zoo_command("list").err


@pytest.mark.parametrize("size", ["nan", "0", "inf", "-1"])
def test_sizes_of_files_are_numbers(size: str, zoo_command: Command, tmp_path: Path) -> None:
    done = zoo_command("save", "tiny", str(tmp_path / "it"), "--max-file-size", size)
    assert done.code == 2
    assert "is not a number above 0" in done.err
