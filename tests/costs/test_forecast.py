"""Seconds from a card and a machine's figures, against adding up by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.components import native
from zoo.costs import glance as glances
from zoo.costs.forecast import FELT, Curve, Forecast, forecast
from zoo.costs.profile import Key, Limits, Pace, Product, Profile, Speed, store
from zoo.costs.work import Step, Work
from zoo.registry.errors import ZooError

FLAT = (Product(elements=1000, rows=1, seconds=1e-10), Product(elements=1000, rows=512, seconds=1e-10))
SPEED = Speed(products={"plain": FLAT, "int8": FLAT}, elements=1e30, step_s=0.0, sequence_s=0.0, paces={})
ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope": {"theta": 1e4}}
GATED = {"kind": "gated", "hidden_dim": 96}
MOE = {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert": GATED}


def work(mixer: dict[str, Any] | None, ffn: dict[str, Any] | None, **changes: Any) -> Work:
    card = {
        "name": "shape",
        "family": "shapes",
        "summary": "A shape.",
        "context_length": 4096,
        "source": {"dtype": "bfloat16"},
        "text": {"features": []},
        "model": {
            "dim": 64,
            "vocab_size": 200,
            "norm": {"kind": "rms", "eps": 1e-5},
            "layers": [{"repeat": 3, "mixer": mixer, "ffn": ffn}],
        },
    }
    return Work(zoo.inspect(card).plan, "bfloat16", **changes)


def known(found: Work, **changes: Any) -> Forecast:
    return Forecast(SPEED.model_copy(update=changes), found)


def test_products_cost_what_their_elements_do() -> None:
    found = work(ATTENTION, GATED)
    matrices = sum(count * m.numel for m, count in found.matrices.items())
    assert known(found).decode(1, 0).total == pytest.approx(matrices * 1e-10)
    head = 64 * 200
    assert known(found).prefill(100).products == pytest.approx(matrices * 1e-10)
    assert known(found).step(Step(1, 100, 0, 0)).products == pytest.approx((matrices - head) * 1e-10)


def test_products_that_wait_for_memory_take_as_long_as_it_takes_now() -> None:
    """The more of their time was reading, the more: an eighth of memory's rate is three steps of its logarithm."""
    found = work(ATTENTION, GATED)
    elements = sum(count * m.numel for m, count in found.matrices.items())
    for waiting, felt in ((1.0, 1.0), (0.5, 0.25), (1.7, 1.0)):
        then = 2 / 1e-10 / waiting
        speed = SPEED.model_copy(update={"memory": {"plain": then}})
        as_then, slower = (Forecast(speed, found, memory=rate) for rate in (None, then / 8))
        assert as_then.decode(1, 0).products == pytest.approx(elements * 1e-10)
        assert slower.decode(1, 0).products == pytest.approx(8 ** (FELT * felt) * elements * 1e-10)
        assert slower.decode(1, 0).calls == as_then.decode(1, 0).calls
    unknown = Forecast(SPEED, found, memory=1e9)
    assert unknown.decode(1, 0) == known(found).decode(1, 0)


def test_a_mixture_costs_the_experts_that_are_chosen() -> None:
    found = known(work(ATTENTION, MOE))
    experts = 3 * 3 * 64 * 96
    one, many = (found.decode(batch, 0).products for batch in (1, 6))
    assert many - one == pytest.approx((8 * (1 - 0.75**6) - 2) * experts * 1e-10)


def test_each_expert_multiplies_its_share_of_the_rows() -> None:
    """Where a product takes as long as it has rows, a mixture takes as long as its tokens' choices."""
    steep = (FLAT[0], Product(elements=1000, rows=512, seconds=512e-10))
    found, step = work(ATTENTION, MOE), Step(1, 100, 0, 0)
    choices = sum(count * m.numel * m.rows(step) * m.chosen for m, count in found.matrices.items())
    assert known(found, products={"plain": steep}).step(step).products == pytest.approx(choices * 1e-10)


def test_calls_are_counted_by_layers_sequences_and_experts() -> None:
    paces = {"attention": Pace(call_s=1.0, item_s=0.01), "moe": Pace(call_s=100.0, item_s=10.0)}
    found = known(work(ATTENTION, MOE), paces=paces, step_s=1000.0, sequence_s=0.1)
    touched = 8 * (1 - 0.75**4)
    assert found.decode(4, 0).calls == pytest.approx(1000 + 0.4 + 3 * (1 + 0.04 + 100 + 10 * touched))
    assert not found.unknown


def test_single_rows_read_their_cache_and_prompts_multiply() -> None:
    paces = {"attention": Pace(call_s=0.0, item_s=0.0, read=1e6, multiply=1e3), "gated": Pace(call_s=0.0, item_s=0.0)}
    found = known(work(ATTENTION, GATED), paces=paces)
    assert found.decode(5, 100).mixing == pytest.approx(3 * 5 * 100 * (2 * 2 * 16 * 2) / 1e6)
    assert found.prefill(101).mixing == pytest.approx(3 * 101 * 50 * (2 * 4 * 16) / 1e3)


def test_channels_of_states_take_their_time_in_prompts() -> None:
    """Each as often as a row moves it on, beside the multiply-adds; not in steps, where states are read."""
    node = {"kind": "mamba2", "num_heads": 4, "head_dim": 16, "num_groups": 1, "state_size": 8, "conv_size": 4}
    pace = Pace(call_s=0.0, item_s=0.0, read=1e9, multiply=1e9)
    paces = {"mamba2": pace}, {"mamba2": pace.model_copy(update={"channel_s": 1e-3})}
    plain, more = (known(work(node | {"norm_eps": 1e-5}, None), paces=one) for one in paces)
    assert more.prefill(10).mixing - plain.prefill(10).mixing == pytest.approx(3 * 10 * 64 * 1e-3)
    assert more.decode(2, 10) == plain.decode(2, 10)


def test_windows_stop_growing() -> None:
    paces = {"attention": Pace(call_s=0.0, item_s=0.0, read=1e6, multiply=1e3)}
    found = known(work(ATTENTION | {"window": 64}, None), paces=paces)
    assert found.decode(1, 64).total == found.decode(1, 4000).total > found.decode(1, 63).total
    assert found.unknown == {"attention window"}


def test_what_was_not_measured_is_told() -> None:
    found = known(work(ATTENTION | {"softcap": 30.0}, MOE), paces={"attention": Pace(call_s=0.0, item_s=0.0)})
    found.decode(1, 1)
    assert found.unknown == {"attention formula", "moe"}


def test_times_lie_between_those_measured() -> None:
    points = [(100, 1, 1.0), (100, 16, 4.0), (10000, 1, 9.0), (10000, 16, 4.0)]
    curve = Curve(tuple(Product(elements=e, rows=r, seconds=s) for e, r, s in points))
    assert curve.seconds(100, 4) == pytest.approx(2.0)
    assert curve.seconds(1000, 1) == pytest.approx(3.0)
    assert curve.seconds(50, 1) == pytest.approx(1.0)
    assert curve.seconds(1e6, 1) == pytest.approx(9.0)
    assert curve.seconds(100, 64) == pytest.approx(16.0)
    assert curve.seconds(1000, 4) == pytest.approx(sqrt(2.0 * 6.0))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits = Limits(read={"sum": 2e10}, multiply={"bfloat16": 1e11}, call_s=1e-6)
    made = Profile(key=Key.here(), measured="2026-11-28", seconds=1.0, limits=limits, speeds={"bfloat16": SPEED})
    store(made, "cpu")
    return made


def test_a_format_that_was_not_measured_is_refused(measured: Profile) -> None:
    plan = work(ATTENTION, GATED).plan
    with pytest.raises(ZooError, match=r"dtype: .*found float32; expected bfloat16"):
        forecast(measured, Work(plan, "float32"))
    with pytest.raises(ZooError, match=r"quantize: .*found int4 beside bfloat16; expected plain or int8"):
        forecast(measured, Work(plan, "bfloat16", "int4"))
    assert forecast(measured, Work(plan, "bfloat16", "int8")).decode(1, 0).total > 0


def test_inspect_tells_the_speed(measured: Profile) -> None:
    found = zoo.inspect("mixtral-8x7b").speed(prompt=600, context=2000)
    expected = Forecast(SPEED, Work(zoo.inspect("mixtral-8x7b").plan, "bfloat16"))
    assert found["decode"][1]["tokens_per_second"] == 8 / expected.decode(8, 2000).total
    assert found["prefill"]["seconds"] == expected.prefill(600).total
    assert found["prefill"]["parts"]["products"] > 0
    assert found["unmeasured"] == ["attention", "moe"]


def test_inspect_predicts_for_memory_as_it_is_read_now(
    measured: Profile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.cli import main

    speed = SPEED.model_copy(update={"memory": {"plain": 1e10}})
    store(measured.model_copy(update={"speeds": {"bfloat16": speed}}), "cpu")
    told, seconds = [], []
    for rate in (1e10, 5e9, None):
        monkeypatch.setattr(glances, "read_rate", lambda rate=rate: rate)
        found = zoo.inspect("mixtral-8x7b").speed()
        told.append(found["read_bytes_per_second"])
        seconds.append(1 / found["decode"][0]["tokens_per_second"])
        text = _shown(main, capsys, "inspect", "mixtral-8x7b")
        assert ("memory is read at 5 GB/s now" in text) == (rate == 5e9)
    assert told == [1e10, 5e9, None]
    assert seconds[0] == seconds[2] == pytest.approx(seconds[1] / 2**FELT)


@pytest.mark.parametrize("packed", [False, True])
def test_inspect_without_measurements_tells_what_memory_allows(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.cli import main

    monkeypatch.setattr("zoo.inspection.packs", lambda: packed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(glances, "read_rate", lambda: 1e12)
    found = zoo.inspect("mixtral-8x7b")
    told = found.speed(context=500)
    read = Work(found.plan, "bfloat16", packed=packed).read_bytes(Step.decode(1, 500))
    assert "`zoo bench --machine`" in told["why"]
    assert told["rough"]["tokens_per_second"] == pytest.approx(0.8 * 1e12 / read)
    text = _shown(main, capsys, "inspect", "mixtral-8x7b", "--context", "500")
    assert f"about {42 if packed else 31} tokens/s for one sequence of 500 tokens on the CPU" in text
    assert "memory was read at 1000 GB/s just now; " in text and "`zoo bench --machine`" in text
    assert zoo.inspect("mixtral-8x7b", dtype="float32").speed()["rough"] is None


def test_memory_is_read_in_a_glance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_rate = glances.read_rate.__wrapped__
    if native.missing() is None:
        assert 1e8 < (read_rate() or 0.0) < 1e13
    monkeypatch.setattr(glances, "kernels_file", lambda: None)
    assert read_rate() is None
    monkeypatch.setattr(glances, "kernels_file", lambda: tmp_path / "absent.so")
    assert read_rate() is None


def test_the_command_shows_it(measured: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli import main

    shown: Callable[..., str] = lambda *arguments: _shown(main, capsys, *arguments)  # noqa: E731
    text = shown("inspect", "mixtral-8x7b", "--prompt-tokens", "700", "--context", "900")
    assert "tokens/s for one sequence of 900 tokens" in text
    assert "first token of a prompt of 700 tokens" in text
    assert "like others: attention, moe" in text
    assert json.loads(shown("inspect", "mixtral-8x7b", "--json"))["speed"]["prefill"]["tokens"] == 512
    assert "not known: dtype" in shown("inspect", "mixtral-8x7b", "--dtype", "float32")


def _shown(main: Callable[..., None], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main([*arguments])
    return capsys.readouterr().out
