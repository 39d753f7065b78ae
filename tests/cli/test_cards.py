"""The commands that need no weights: list, inspect, diff, schema, card, verify, plugins, doctor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint as transformers saves it, without a tokenizer."""
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        sliding_window=None,
    )
    path = tmp_path_factory.mktemp("my checkpoint ü")
    transformers.MistralForCausalLM(config).save_pretrained(path)
    return path


def test_list_shows_every_card_and_filters(zoo_command: Command) -> None:
    every = json.loads(zoo_command("list", "--json").out)
    assert {"tiny", "mixtral-8x7b-instruct", "mistral-7b-v0.1"} <= {row["name"] for row in every}
    some = json.loads(zoo_command("list", "--json", "mixtral", "chat").out)
    assert {row["name"] for row in some} == {"mixtral-8x7b-instruct", "mixtral-8x22b-instruct"}
    assert zoo_command("list", "mixtral").out.split()[:3] == ["NAME", "FAMILY", "CONTEXT"]
    none = zoo_command("list", "mixtral", "zebra")
    assert (none.code, none.out, none.err) == (0, "", "no card has all of these words: mixtral, zebra\n")


def test_cards_of_unsupported_models_say_so(zoo_command: Command) -> None:
    name, reason = "voxtral-4b-tts-2603", "text-to-speech: its acoustic decoder is not implemented"
    (row,) = json.loads(zoo_command("list", name, "--json").out)
    assert row["unsupported"] == reason
    assert f"Not supported: {reason}" in zoo_command("list", name).out
    assert f"unsupported  {reason}" in zoo_command("inspect", name).out
    found = json.loads(zoo_command("inspect", name, "--json").out)
    assert found["unsupported"] == reason and "parameters" not in found
    assert zoo_command("card", "check", name).out == f"{name}: ok, not supported: {reason}\n"
    for arguments in ("run {} -p x", "diff {} tiny", "verify {}", "inspect {} --prompt x"):
        done = zoo_command(*arguments.format(name).split())
        assert done.code == 2 and f"zoo cannot run {name} yet: {reason}" in done.err


def test_inspect_reckons_from_the_card(zoo_command: Command) -> None:
    found = json.loads(zoo_command("inspect", "mixtral-8x7b-instruct", "--json", "--context", "1000").out)
    assert found["parameters"] == 46_702_792_704
    assert found["active_parameters"] == 12_879_925_248
    assert found["weight_bytes"] == 2 * found["parameters"]
    assert found["cache_bytes_per_token"] == 128 * 1024
    assert found["memory"]["cache_bytes"] == 1024 * 128 * 1024
    assert found["owners"]["mixer attention"] == "zoo.components"
    shown = zoo_command("inspect", "mixtral-8x7b-instruct").out
    assert "46.7 B (12.88 B active for each token)" in shown
    assert "moe(num_experts=8" in shown


def test_inspect_tells_of_encoders_apart(zoo_command: Command) -> None:
    found = json.loads(zoo_command("inspect", "voxtral-mini-3b-2507", "--json").out)
    deaf = json.loads(zoo_command("inspect", "voxtral-mini-3b-2507", "--json", "--set", "model.audio=null").out)
    assert found["encoders"]["audio"].startswith("whisper(token=24, dim=1280, num_layers=32")
    assert deaf["encoders"] == {}
    assert found["flops_per_token"] == deaf["flops_per_token"]
    assert found["parameters"] - deaf["parameters"] == 660_214_784
    assert "audio       whisper(" in zoo_command("inspect", "voxtral-mini-3b-2507").out


def test_inspect_reckons_states_of_constant_size(zoo_command: Command) -> None:
    found = json.loads(zoo_command("inspect", "mamba-codestral-7b", "--json", "--context", "1000").out)
    state, convolution = 64 * 4 * 8192 * 128, 64 * 2 * 3 * (8192 + 2 * 8 * 128)
    assert found["memory"]["cache_bytes"] == found["cache_bytes_per_sequence"] == state + convolution
    assert found["cache_bytes_per_token"] == 0
    cache = next(line for line in zoo_command("inspect", "mamba-codestral-7b").out.splitlines() if "cache" in line)
    assert cache.split() == ["cache", "259.8", "MiB", "per", "sequence"]
    assert "cache       128.0 KiB per token\n" in zoo_command("inspect", "mixtral-8x7b-instruct").out


def test_inspect_reckons_coded_caches(zoo_command: Command) -> None:
    found = [
        json.loads(zoo_command("inspect", "mixtral-8x7b", "--json", "--cache-dtype", kind).out)
        for kind in ("auto", "int8", "none")
    ]
    assert [data["cache_dtype"] for data in found] == [None, "int8", None]
    assert [data["cache_bytes_per_token"] for data in found] == [131072, 2 * 8 * 130 * 32, 131072]
    assert "65.0 KiB per token in int8" in zoo_command("inspect", "mixtral-8x7b", "--cache-dtype", "int8").out
    plain = zoo_command("inspect", "mixtral-8x7b", "--set", "model.cache_dtype=int8", "--cache-dtype", "none", "--json")
    assert json.loads(plain.out)["cache_dtype"] is None
    refused = zoo_command("inspect", "mamba-codestral-7b", "--cache-dtype", "int8")
    assert refused.code == 2
    assert "cache_dtype needs layers that cache keys, values or latents" in refused.err


def test_inspect_reckons_windows(zoo_command: Command) -> None:
    def cache(context: int) -> int:
        found = zoo_command("inspect", "mistral-7b-v0.1", "--json", "--context", str(context))
        return int(json.loads(found.out)["memory"]["cache_bytes"])

    assert cache(2000) == 2 * cache(1000)
    assert cache(8000) == cache(4096) == 4096 * 128 * 1024


def test_inspect_shows_ids_and_pieces(zoo_command: Command) -> None:
    shown = json.loads(zoo_command("inspect", "tiny", "--prompt", "What is a card?", "--json").out)["prompt"]
    pieces = [row["piece"] for row in shown]
    assert pieces[:2] == ["<s>", "[INST]"]
    assert pieces[-1] == "[/INST]"
    raw = json.loads(zoo_command("inspect", "tiny", "--prompt", "What is a card?", "--raw", "--json").out)["prompt"]
    assert [row["id"] for row in raw] == [shown[0]["id"], *[row["id"] for row in shown[2:-1]]]


def test_inspect_resolved_reads_back(zoo_command: Command, tmp_path: Path) -> None:
    flat = zoo_command("inspect", "mixtral-8x7b-instruct", "--resolved").out
    assert "extends" not in flat
    (tmp_path / "flat.yaml").write_text(flat)
    found = zoo_command("diff", "mixtral-8x7b-instruct", str(tmp_path / "flat.yaml"))
    assert found.out == "no difference\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--raw"], "--raw: there is no prompt; expected --prompt TEXT"),
        (["--prompt", "hi", "--prompt-tokens", "5"], "--prompt-tokens: the prompt has its own number of tokens"),
        (["--prompt-tokens", "2049"], "longer than the context; found 2049; expected at most 2048"),
        (["--context", "2049"], "tiny: context is out of range; found 2049; expected 1 to 2048, the card's"),
        (["--resolved", "--json"], "--json: the flat card is all that is printed; found --resolved as well"),
        (["--resolved", "--files"], "--files: the flat card is all"),
        (["--resolved", "--dtype", "float16"], "--dtype: the flat card is all"),
        (["--resolved", "--prompt", ""], "--prompt: the flat card is all"),
    ],
)
def test_inspect_ignores_no_flag(flags: list[str], words: str, zoo_command: Command) -> None:
    found = zoo_command("inspect", "tiny", *flags)
    assert (found.code, found.out) == (2, "")
    assert words in found.err


def test_diff_names_the_changed_fields(zoo_command: Command) -> None:
    changed = json.loads(zoo_command("diff", "mistral-7b-v0.1", "mistral-7b-v0.2", "--json").out)
    assert changed["model.layers.0.mixer.window"] == {"mistral-7b-v0.1": 4096, "mistral-7b-v0.2": None}
    assert changed["model.layers.0.mixer.rope.theta"] == {"mistral-7b-v0.1": 1e4, "mistral-7b-v0.2": 1e6}
    assert "model.dim" not in changed
    assert changed["source.hub"]["mistral-7b-v0.1"] == "mistralai/Mistral-7B-v0.1"


def test_a_card_is_inferred_written_and_checked(zoo_command: Command, folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "mine.yaml"
    assert zoo_command("card", "new", str(folder), "-o", str(card)).code == 0
    assert zoo_command("card", "check", str(card)).out.startswith(f"{card}: ok")
    again = zoo_command("card", "new", str(folder), "-o", str(card))
    assert (again.code, "exists already" in again.err) == (2, True)
    assert zoo_command("verify", str(card), "--weights", str(folder)).code == 0


def test_card_check_reports_every_card(zoo_command: Command, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nextends: mistral-7b-v0.1\nmodel: {dims: 3}\n")
    found = zoo_command("card", "check", "tiny", str(bad))
    assert found.code == 2
    assert "tiny: ok" in found.out
    assert f"{bad}:3" in found.err
    assert "Did you mean 'dim'?" in found.err


def test_verify_reads_headers_only(zoo_command: Command, folder: Path) -> None:
    good = zoo_command("verify", str(folder))
    assert (good.code, "21 tensors" in good.out) == (0, True)
    wrong = zoo_command("verify", "tiny", "--weights", str(folder))
    assert wrong.code == 2
    report = json.loads(zoo_command("verify", "tiny", "--weights", str(folder), "--json").out)
    assert not report["ok"]


def test_verify_takes_no_empty_path_for_none(zoo_command: Command) -> None:
    found = zoo_command("verify", "tiny", "--weights", "")
    assert (found.code, found.out) == (2, "")
    assert "not a path; found ''" in found.err


def test_a_folder_without_a_tokenizer_says_so(zoo_command: Command, folder: Path) -> None:
    found = zoo_command("run", str(folder), "--prompt", "x", "--device", "cpu")
    assert found.code == 2
    assert "no tokenizer" in found.err
    assert "token ids" in found.err


def test_schema_describes_every_kind(zoo_command: Command) -> None:
    text = zoo_command("schema").out
    assert json.loads(text)["$schema"].startswith("https://json-schema.org/")
    assert "experts_per_token" in text


def test_plugins_and_doctor(zoo_command: Command) -> None:
    rows = json.loads(zoo_command("plugins", "--json").out)
    assert {row["status"] for row in rows if row["name"].startswith("zoo.")} == {"active"}
    shown = zoo_command("doctor").out
    assert re.search(r"native kernels +.*[:;] one token reads weights at \d+ GB/s, ", shown)
    assert torch.__version__ in shown
    assert "memory" in shown


def test_bench_measures(
    zoo_command: Command, quick_limits: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = (
        "--prompt-tokens",
        "9",
        "--new-tokens",
        "4",
        "--repeats",
        "1",
        "--batch",
        "1",
        "--batch",
        "2",
        "--requests",
        "3",
    )
    found = json.loads(zoo_command("bench", "tiny", "--weights", "random", "--json", *sizes).out)["model"]
    rows = [(row["kind"], row["batch"]) for row in found["results"]]
    assert rows == [("prefill", 1), ("decode", 1), ("decode", 2), ("prefill", 1), ("decode", 1)]
    assert all(row["tokens_per_second"] > 0 for row in found["results"])
    assert found["traffic"]["requests"] == 3
    shown = zoo_command("bench", "tiny", "--weights", "random", "--curves", *sizes)
    assert "decode of 2 sequences of 9 tokens" in shown.err
    assert "against context" in shown.out
    assert "GB/s" in shown.out
    assert "no predictions: " in shown.out
    assert "has not been measured" in shown.out


@pytest.mark.parametrize(("context", "tokens"), [("41", 20), ("2048", 512)])
def test_bench_of_a_short_context_has_prompts_that_leave_room(
    context: str, tokens: int, zoo_command: Command, quick_limits: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = ("--max-context", context, "--new-tokens", "2", "--repeats", "1", "--batch", "1", "--requests", "1")
    found = json.loads(zoo_command("bench", "tiny", "--weights", "random", "--json", *sizes).out)["model"]
    assert found["results"][0]["kind"] == "prefill"
    assert found["results"][0]["tokens"] == tokens


def test_bench_of_nothing_is_refused(zoo_command: Command) -> None:
    assert "expected REF, or --machine" in zoo_command("bench").err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--prompt-tokens", "2048"], "--prompt-tokens: the prompts leave no room for an answer; found 2048"),
        (["tiny", "--prompt-tokens", "64", "--max-context", "60"], "expected less than the 60 tokens of the context"),
        (["tiny", "--dtype", "float17"], "unknown dtype"),
        (["tiny", "--quantize", "int7"], "int7"),
        (["tinyy"], "tinyy"),
        (["tiny", "--longest", "nan"], "'--longest': nan is not a number above 0"),
        (["tiny", "--batch", "0"], "0 is not in the range x>=1"),
        (["--machine"], "the machine's profile cannot be stored"),
        (["--machine", "--quantize", "int8"], "--quantize: the option is about a model; found no REF; expected a REF"),
        (["--machine", "--curves"], "--curves: the option is about a model"),
    ],
)
def test_bench_refuses_before_it_measures(
    arguments: list[str], words: str, zoo_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for place in ("zoo.bench.limits.machine_limits", "zoo.bench.machine.machine_limits"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("it measured"))
    found = zoo_command("bench", *arguments)
    assert (found.code, words in found.err) == (2, True)


def test_an_interrupted_bench_shows_what_it_has(
    zoo_command: Command, quick_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.bench.suite.measure_decode", interrupted)
    found = zoo_command("bench", "tiny", "--weights", "random", "--prompt-tokens", "9", "--repeats", "1")
    assert found.code == 130
    assert "prefill" in found.out
    assert "decode" not in found.out


def test_bench_of_the_machine_is_stored(
    zoo_command: Command, quick_limits: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from zoo.costs.profile import Product, Speed

    times = (Product(elements=1000, rows=1, seconds=1e-10),)
    speed = Speed(products={"plain": times}, elements=1e9, step_s=0.0, sequence_s=0.0, paces={})
    monkeypatch.setattr("zoo.bench.machine._speed", lambda *_: speed)
    found = json.loads(zoo_command("bench", "--machine", "--json").out)
    assert found["machine"]["limits"]["call_s"] > 0
    assert json.loads((tmp_path / "zoo/machine-cpu.json").read_text()) == found["machine"]
    sizes = ("--prompt-tokens", "9", "--new-tokens", "4", "--repeats", "1", "--batch", "2", "--requests", "0")
    shown = zoo_command("bench", "tiny", "--weights", "random", *sizes).out
    assert re.search(r"decode +1 +\d+ +[\d.]+ +[\d.]+ +\d+% +\d+% +[\d.]+ \([+-]\d+%(, off)?\)\n", shown)
    assert "no predictions" not in shown


def test_removing_or_fetching_what_has_no_repository(zoo_command: Command) -> None:
    for command in (("pull", "tiny"), ("rm", "tiny", "--yes"), ("inspect", "tiny", "--files")):
        found = zoo_command(*command)
        assert found.code == 2
        assert "tiny" in found.err
