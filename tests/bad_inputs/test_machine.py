"""Devices, memory, consoles and interruptions as users meet them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.registry.errors import CapacityError, CardError, RequestError, TextError, WeightsError, ZooError

if TYPE_CHECKING:
    from tests.bad_inputs.conftest import Desk

SAID = "🦒 한漢é."
CPU = ("--device", "cpu", "--dtype", "float32")
FAILED = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.\nfurther lines"

Act = Callable[["Desk"], dict[str, Any]]


def gpus(count: int, free: int = 1 << 40) -> Callable[[Desk], None]:
    """A machine with so many GPUs, of which each has so many bytes free."""

    def act(desk: Desk) -> None:
        desk.patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        desk.patch.setattr(torch.cuda, "device_count", lambda: count)
        desk.patch.setattr(torch.cuda, "current_device", lambda: 0)
        desk.patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        desk.patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 80 << 30))

    return act


def on(device: str, count: int, free: int = 1 << 40) -> Act:
    def act(desk: Desk) -> dict[str, Any]:
        gpus(count, free)(desk)
        return {"device": device}

    return act


def memory(free: int, **options: Any) -> Act:
    """A machine with so many bytes of memory free, whose processor does not pack weights."""

    def act(desk: Desk) -> dict[str, Any]:
        desk.patch.setattr("zoo.costs.memory.packs", lambda: False)
        desk.patch.setattr("zoo.device.free_memory", lambda: free)
        return options

    return act


def full_at(share: float) -> Act:
    """Memory ends when so much of the weights is there."""

    def act(desk: Desk) -> dict[str, Any]:
        usual, made, whole = torch.empty, 0, zoo.inspect(desk.folder, dtype="float32").weight_bytes

        def empty(*shape: Any, **options: Any) -> torch.Tensor:
            nonlocal made
            tensor = usual(*shape, **options)
            made += tensor.nbytes if options.get("dtype") is torch.float32 else 0
            if made > share * whole:
                raise RuntimeError(FAILED)
            return tensor

        desk.patch.setattr(torch, "empty", empty)
        return {}

    return act


NOT_THERE = "`zoo doctor` lists what was found; `--device cpu` always works"
NO_ROOM = "the model does not fit in memory; found"

FAULTS: dict[str, tuple[Act, type[ZooError], list[str]]] = {
    "no GPU": (on("cuda", 0), RequestError, ["found 'cuda' with 0 cuda device(s) on this machine", NOT_THERE]),
    "device 7 of 1": (
        on("cuda:7", 1),
        RequestError,
        ["found 'cuda:7' with 1 cuda device(s) on this machine", NOT_THERE],
    ),
    "an Apple GPU elsewhere": (
        lambda desk: desk.patch.setattr(torch.backends.mps, "is_available", lambda: False) or {"device": "mps"},
        RequestError,
        ["found 'mps' with 0 mps device(s)", NOT_THERE],
    ),
    "a second CPU": (lambda desk: {"device": "cpu:1"}, RequestError, ["found 'cpu:1' with 1 cpu device(s)", NOT_THERE]),
    "a device of another maker": (lambda desk: {"device": "xpu"}, RequestError, ["found 'xpu' with 0 xpu device(s)"]),
    "a word for a device": (
        lambda desk: {"device": "gpu"},
        RequestError,
        ["device: unknown device; found 'gpu'; expected one of auto, cpu, cuda, cuda:N, mps"],
    ),
    "no word for a device": (lambda desk: {"device": None}, RequestError, ["device: unknown device; found None"]),
    "a type of torch's": (
        lambda desk: {"dtype": torch.float32},
        RequestError,
        ["dtype: unknown dtype; found torch.float32", "Did you mean 'float32'?"],
    ),
    "half a sequence": (
        lambda desk: {"max_batch_size": 2.5},
        RequestError,
        ["max_batch_size: out of range; found 2.5; expected a whole number, at least 1"],
    ),
    "no place of weights": (lambda desk: {"weights": None}, WeightsError, ["not a path; found None; expected the"]),
    "an empty place of weights": (lambda desk: {"weights": ""}, WeightsError, ["not a path; found ''"]),
    "no adapters": (lambda desk: {"adapters": None}, RequestError, ["adapters: not adapters; found None"]),
    "an adapter that is none": (lambda desk: {"adapters": [None]}, WeightsError, ["not a path; found None"]),
    "bits for a kind": (
        lambda desk: {"quantize": 8},
        RequestError,
        ["quantize: unknown kind of quantised weights; found 8; expected one of int8, int4"],
    ),
    "a switch in words": (
        lambda desk: {"prefix_cache": "no"},
        RequestError,
        ["prefix_cache: out of range; found 'no'; expected True or False"],
    ),
    "overrides as they are typed": (
        lambda desk: {"overrides": ["context_length=8"]},
        CardError,
        ["overrides: not overrides; found a list of 1; expected fields and their values"],
    ),
    "an override without a name": (
        lambda desk: {"overrides": {5: 1}},
        CardError,
        ["overrides: not overrides; found a mapping with 5"],
    ),
    "half a device": (lambda desk: {"devices": 1.5}, RequestError, ["devices: not a number of devices; found 1.5"]),
    "yes for devices": (lambda desk: {"devices": True}, RequestError, ["devices: not a number of devices; found True"]),
    "one device by its name": (
        lambda desk: gpus(1)(desk) or {"device": "auto", "devices": ["cuda:7"]},
        RequestError,
        ["found 'cuda:7' with 1 cuda device(s) on this machine", NOT_THERE],
    ),
    "devices and a device": (
        lambda desk: gpus(2)(desk) or {"device": "cpu", "devices": ["cuda:0", "cuda:1"]},
        RequestError,
        ["device: devices that have names stand beside another device; found device 'cpu' and devices ['cuda:0', "],
    ),
    "a busy GPU": (
        on("cuda:0", 1, free=300_000),
        CapacityError,
        [f"cuda:0: {NO_ROOM} 293.0 KiB free", "(weights 435.8 KiB, cache for 512 tokens 192.0 KiB, work in between"],
    ),
    "no memory": (
        memory(300_000),
        CapacityError,
        [f"cpu: {NO_ROOM} 293.0 KiB free", "(weights 435.8 KiB, cache for 512 tokens 192.0 KiB, work in between"],
    ),
    "no memory, in the smallest type": (
        memory(100_000, dtype="bfloat16"),
        CapacityError,
        [f"cpu: {NO_ROOM} 97.7 KiB free", "(weights 217.9 KiB", "Use another device or a smaller model"],
    ),
    "memory that is full at 95 % of the weights": (
        full_at(0.95),
        CapacityError,
        ["memory is full while loading the weights; found [enforce fail]", "bytes more on cpu", "Use a smaller type"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused(name: str, desk: Desk) -> None:
    act, error, words = FAULTS[name]
    with desk.patch.context() as changed:
        desk.patch, usual = changed, desk.patch
        options = act(desk)
        with pytest.raises(error) as caught:
            desk.load(**options)
        assert [word for word in words if word not in str(caught.value)] == [], caught.value
        desk.patch = usual
    with desk.load() as model:
        assert len(model.generate([[1]], max_tokens=1, ignore_eos=True)[0].tokens) == 1, (
            "the next run is as if nothing was"
        )


@pytest.mark.parametrize("name", ["no GPU", "no memory", "a word for a device"])
def test_refused_on_the_command_line(name: str, desk: Desk) -> None:
    act, error, words = FAULTS[name]
    desk.refuses(error, words, **act(desk))


def test_a_large_model_on_a_small_machine(desk: Desk) -> None:
    """Told by the card, before a byte is fetched or taken."""
    memory(20 << 30)(desk)
    words = [f"cpu: {NO_ROOM} 20.0 GiB free; expected 87.", "(weights 87.0 GiB, cache for 512 tokens", "`zoo inspect`"]
    desk.refused(CapacityError, words, lambda: zoo.load("mixtral-8x7b", device="cpu"))
    shown = desk.command("inspect", "mixtral-8x7b").out
    assert "weights     87.0 GiB in bfloat16" in shown


def test_memory_that_is_full_while_computing(desk: Desk) -> None:
    """The message is one for the user; the model, its weights and its cache are as before."""
    with desk.load() as model:
        before = model.generate([[5, 6]], max_tokens=4, ignore_eos=True)[0].tokens
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr("zoo.components.ffn.gated.Gated.forward", lambda *_, **__: fail(RuntimeError(FAILED)))
            words = [
                "cpu: memory is full while computing; found [enforce fail]",
                "smaller max_batch_size or max_context",
            ]
            desk.refused(CapacityError, words, lambda: model.generate([[5, 6]], max_tokens=4))
        assert model.memory.cache_used == 0
        assert model.generate([[5, 6]], max_tokens=4, ignore_eos=True)[0].tokens == before


def fail(error: BaseException) -> Any:
    raise error


INTERRUPTED: dict[str, str] = {
    "while weights are read": "zoo.loading.load._fill",
    "while computing": "zoo.engine.runner.Runner.run",
    "while the prompt is read": "zoo.text.mistral.MistralCodec.encode",
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted(name: str, desk: Desk, parrot: Callable[[str], Path]) -> None:
    """Ctrl-C ends the command at once, with its own status and one word."""
    folder = str(parrot(SAID))
    desk.patch.setattr(INTERRUPTED[name], lambda *_, **__: fail(KeyboardInterrupt()))
    found = desk.command("run", folder, "--raw", "--prompt", "x", *CPU)
    assert found.code == 130
    assert found.err.endswith("\nzoo: interrupted\n")
    assert "Traceback" not in found.err


def test_an_interrupted_request_leaves_the_model_whole(desk: Desk) -> None:
    with desk.load() as model:
        before = model.generate([[5, 6]], max_tokens=4, ignore_eos=True)[0].tokens
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr("zoo.engine.runner.Runner.run", lambda *_: fail(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                model.generate([[5, 6]])
        assert (model.engine.busy, model.memory.cache_used) == (False, 0)
        assert model.generate([[5, 6]], max_tokens=4, ignore_eos=True)[0].tokens == before


# --- standard input and output ----------------------------------------------------------------------------------------


def run(desk: Desk, *arguments: str, stdin: bytes = b"", encoding: str = "utf-8") -> tuple[int, bytes, bytes]:
    """The command with byte streams of one encoding: status, output, errors."""
    out, err = io.BytesIO(), io.BytesIO()
    for name, stream in (("stdin", io.BytesIO(stdin)), ("stdout", out), ("stderr", err)):
        desk.patch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", SAID.encode()), ("latin-1", b"? ??\xe9."), ("cp1252", b"? ??\xe9.")],
)
def test_consoles_of_all_kinds(desk: Desk, parrot: Callable[[str], Path], encoding: str, shown: bytes) -> None:
    """What a console cannot show becomes a question mark, and nothing fails."""
    code, out, _ = run(desk, "run", str(parrot(SAID)), "--raw", "--prompt", "", *CPU, encoding=encoding)
    assert (code, out) == (0, shown + b"\n")


def test_the_answer_alone_goes_to_a_file(desk: Desk, parrot: Callable[[str], Path]) -> None:
    code, out, err = run(desk, "run", str(parrot(SAID)), "--raw", "--prompt", "", *CPU)
    assert (code, out) == (0, SAID.encode() + b"\n")
    assert b"\x1b" not in err
    assert b"\r" not in err


STDIN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "zoo: standard input: there is no prompt; found nothing; expected the prompt's text"),
    "bytes that are no text": (
        b"abc\xff",
        "zoo: standard input: this is not text; found the byte 0xff at 3; expected text in U",
    ),
}


@pytest.mark.parametrize("name", STDIN)
def test_standard_input_refused(name: str, desk: Desk, parrot: Callable[[str], Path]) -> None:
    given, said = STDIN[name]
    code, out, err = run(desk, "run", str(parrot(SAID)), *CPU, stdin=given)
    assert (code, out) == (2, b"")
    assert said in err.decode()
    assert b"Traceback" not in err


def test_standard_input_is_the_prompt(desk: Desk, parrot: Callable[[str], Path]) -> None:
    text, flags = "Zürich 🦒", ("--json", *CPU, "--max-tokens", "1")
    _, piped, _ = run(desk, "run", str(parrot(SAID)), *flags, stdin=text.encode())
    _, typed, _ = run(desk, "run", str(parrot(SAID)), *flags, "--prompt", text)
    assert json.loads(piped)["prompt_ids"] == json.loads(typed)["prompt_ids"]


def test_half_a_character_on_the_command_line(desk: Desk, parrot: Callable[[str], Path]) -> None:
    """Arguments that are not UTF-8 reach Python with half characters in place of their bytes."""
    said = "the text holds half a character; found '\\udcff' at character 1; expected Unicode"
    with desk.load(parrot(SAID)) as model:
        for call in (lambda: model.generate("a\udcff"), lambda: model.generate("a\udcff", raw=True)):
            desk.refused(TextError, [said], call)
    found = desk.command("run", str(parrot(SAID)), *CPU, "--prompt", "a\udcff")
    assert (found.code, found.out) == (2, "")
    assert said in found.err


def test_a_name_that_is_no_text(desk: Desk) -> None:
    desk.refused(CardError, ["there is no such card, folder or file"], lambda: desk.load("./a\udcff"))
    assert desk.command("run", "./a\udcff", "--prompt", "x").code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a shell")
def test_a_reader_that_leaves() -> None:
    """`zoo schema | head -1`: no message, no traceback."""
    code = "from zoo.cli import main; main(['schema'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(timeout=20), process.stderr.read()) == (0, b"")


def test_a_conversation_of_nothing(desk: Desk, parrot: Callable[[str], Path]) -> None:
    found = desk.command("chat", str(parrot(SAID)), *CPU, stdin="")
    assert (found.code, found.out) == (0, "")


def test_a_conversation_of_faults(desk: Desk, parrot: Callable[[str], Path], tmp_path: Path) -> None:
    """Each faulty line costs one message; the conversation goes on."""
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"system": None, "messages": [{"role": "user", "content": "hi"}]}))
    lines = [
        "",
        "/nope",
        "hi\udcff",
        "/load nope.json",
        f"/load {odd}",
        "/undo",
        "/retry",
        "/save nowhere/x",
        "/set",
        "/set heat=1",
        "/quit",
    ]
    found = desk.command("chat", str(parrot(SAID)), *CPU, stdin="\n".join(lines))
    assert (found.code, found.out) == (0, "")
    said = [line for line in found.err.splitlines() if line.startswith("zoo: ")]
    words = [
        "no command /nope",
        "half a character",
        "no saved conversation",
        "other than questions and answers in turn",
        "no question to take back",
        "no question to ask again",
        "cannot be saved",
    ]
    for line, word in zip(said, [*words, "needs a name and a value", "heat: unknown option"], strict=True):
        assert word in line
