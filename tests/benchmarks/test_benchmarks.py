"""The benchmarks run and report what they measured; how fast anything is cannot be tested."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import gates, ranks, traffic
from tests.benchmarks.cases import CASES, Bench, _total
from tests.benchmarks.report import report
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.sides import Machine, Transformers, Zoo, turns
from zoo.bench import arrivals
from zoo.components.compiled import packs
from zoo.engine import runner
from zoo.engine.pack import Batch, split
from zoo.engine.turns import Turns

ABOUT: dict[str, Any] = {
    "date": "2026-01-01",
    "machine": {
        "processor": "one",
        "instructions": ["avx2"],
        "cores": 2,
        "threads": 2,
        "memory_bytes": 1 << 34,
        "bfloat16_multiply_adds_per_second": 1e11,
    },
    "versions": {"torch": "2"},
}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("tests.benchmarks.cases.Machine", partial(Machine, size=64, read=1 << 20))
    shape = replace(SHAPES["tiny"], dim=64, hidden=96, vocab=80)
    return Bench(shape, tmp_path, ["transformers"], batches=(3,), contexts=(7, 14), prompt=9, steps=2, rounds=1)


def test_sides_agree_about_the_next_token(bench: Bench) -> None:
    tokens = bench.prompts(1, 20)[0]
    with bench.sides() as (ours, theirs):
        difference = ours.logits(tokens) - theirs.logits(tokens)
        assert difference.norm() < 0.02 * theirs.logits(tokens).norm()
        assert [len(side.run(bench.prompts(3, 9), 4).steps) for side in (ours, theirs)] == [4, 4]


def test_the_first_of_many_sequences_goes_on_until_the_last_has_begun(bench: Bench) -> None:
    """Those that go on leave less of a step to the others' prompts."""
    with closing(Zoo(bench.folder, max_batch_size=256)) as side:
        timed = side.run(bench.prompts(256, 20), 2)
        assert len(timed.steps) == 2
        assert side.run(bench.prompts(8, 20), 2).meanwhile == 0 < timed.meanwhile < 256 * 20
    rows = [replace(timed, prefill=seconds, steps=[0.5, 0.5], meanwhile=44) for seconds in (1.0, 9.0, 3.0)]
    assert _total(10, 7, rows) == pytest.approx(144 / 4)


def test_the_machine_takes_turns_with_the_sides() -> None:
    machine = Machine(size=64, read=1 << 20)
    (timed,) = turns([machine], [], 3, rounds=1)["machine"]
    read, multiply = machine.limits([timed])
    assert len(timed.steps) == 3
    assert read == pytest.approx((1 << 20) / sorted(timed.steps)[1])
    assert multiply == pytest.approx(64**3 / timed.prefill)


def test_ranks_are_measured(bench: Bench) -> None:
    before = torch.get_num_threads()
    found = CASES["devices"](replace(bench, batches=(2,)))
    torch.set_num_threads(before)
    names = {"1 process, 1 thread", "1 process, 2 threads", "tp=2", "pp=2"}
    for rates in (found["decode_tokens_per_second"]["2"], found["prefill_tokens_per_second"]):
        assert {name for name, rate in rates.items() if rate > 0} == names


def test_stages_are_measured_by_how_steps_are_cut(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[int] = []

    def noted(batch: Batch, count: int) -> list[Batch]:
        cuts.append(min(count, 99))
        return split(batch, count)

    monkeypatch.setattr(runner, "split", noted)
    before = torch.get_num_threads()
    begun, begin = set[int](), Turns._begin

    def counted(self: Turns, runner: Any, work: Any, **how: Any) -> None:
        begin(self, runner, work, **how)
        begun.add(len(work))

    monkeypatch.setattr(Turns, "_begin", counted)
    found = CASES["pieces"](replace(bench, batches=(8,)))
    torch.set_num_threads(before)
    names = ["one group, not cut", *(f"each step cut in {count}" for count in (2, 4)), "two groups by turns"]
    assert [*found["decode_tokens_per_second"]["8"]] == ["as zoo does it", *names]
    assert {1, 2, 4} <= {*cuts}
    assert {4, 8} <= begun


def test_what_sharing_out_adds_to_quantising_becomes_a_table(bench: Bench, tmp_path: Path) -> None:
    found = CASES["apart"](bench)
    for errors in found["relative_errors"].values():
        assert 0.003 < errors["tp=2"] < 1.2 * errors["one process"] < 0.2
        assert 0 < errors["each other"] < errors["one process"]
    (tmp_path / "devices.md").write_text("<!-- errors: here -->\nearlier\n<!-- end of errors -->\n")
    (tmp_path / "benchmarks.md").write_text("<!-- results: here -->\n\n<!-- end of results -->\n")
    report({"apart": ABOUT | found}, tmp_path)
    [int8] = [line for line in (tmp_path / "devices.md").read_text().splitlines() if line.startswith("| int8 |")]
    assert int8.count("%") == 3


def test_shares_of_ranks_become_a_table(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "KINDS", ("none",))
    monkeypatch.setattr(ranks, "LAYOUTS", {"tp=2": 1})
    found = CASES["shares"](bench)
    [rank] = found["ranks"]
    files = (bench.folder / "model.safetensors").stat().st_size
    assert (0.3 if packs() else 0.4) * files < rank["holds"] <= rank["reads"] < 0.7 * files
    assert rank["grows"] >= 0
    decode, prompt = {"2": {"x": 4.4}}, {"x": 5.6}
    speeds = {"prompt": 3, "decode_tokens_per_second": decode, "prefill_tokens_per_second": prompt}
    for page, marks in (("benchmarks", ["results"]), ("devices", ["shares", "speeds"])):
        places = [f"<!-- {mark}: here -->\nearlier\n<!-- end of {mark} -->\n" for mark in marks]
        (tmp_path / f"{page}.md").write_text("\n".join(places))
    (tmp_path / "benchmarks").mkdir()
    report({"shares": ABOUT | found, "devices": ABOUT | speeds, "pieces": ABOUT | speeds}, tmp_path)
    text = (tmp_path / "devices.md").read_text()
    assert "| x | 4 | 6 |" in text and "| each of `tp=2` | none |" in text and "earlier" not in text


def test_results_become_tables_and_plots(bench: Bench, tmp_path: Path) -> None:
    names = ("decode", "prefill", "quantised", "mixture", "context", "recurrent", "drafts")
    results = {name: ABOUT | CASES[name](bench) for name in names}
    assert [row["batch"] for row in results["decode"]["rows"]] == [3]
    assert set(results["decode"]["rows"][0]["total_ratios"]) == {"transformers"}
    assert set(results["recurrent"]["rows"][0]["ratios"]) == {"transformers"}
    rows = {row["guesses"]: row for row in results["drafts"]["rows"]}
    assert rows["nothing"]["drafted_tokens"] == rows["a model, always wrong"]["accepted_tokens"] == 0
    right = rows["a model, always right"]
    assert right["accepted_tokens"] == right["drafted_tokens"]
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- results: here -->\nearlier\n<!-- end of results -->\nafter\n")
    (tmp_path / "benchmarks").mkdir()
    report(results, tmp_path)
    report(results, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "earlier" not in text
    assert "| a model, always right |" in text
    assert text.count("| batch | zoo | transformers | of read limit |") == 1
    assert text.count("| zoo int4 |") == 1
    assert text.count("| aim | asked | found |") == 1
    for plot in ("batch.svg", "context.svg"):
        assert len(ElementTree.fromstring((tmp_path / "benchmarks" / plot).read_text())) > 10


def test_all_of_the_traffic_is_served(bench: Bench) -> None:
    plan = arrivals(5, 0.001, (3, 9), (2, 8))
    with bench.sides() as sides:
        theirs = sides[1]
        assert isinstance(theirs, Transformers)
        found = traffic.by_static_batches(theirs, plan, [[3] * one.prompt for one in plan], 2)
    assert found["new_tokens_per_second"] == pytest.approx(sum(one.answer for one in plan) / found["seconds"])
    assert 0 < found["first_median"] < found["seconds"]


def test_aims_are_judged_by_what_the_machine_allows() -> None:
    def words(**row: Any) -> dict[str, str]:
        decode = {"rows": [{"batch": 1, "of_read_limit": 0.8} | row]}
        return {one.what: one.word for one in gates.verdicts({"decode": decode})}

    over = "decode, one sequence: over llama.cpp bf16"
    assert words(ratios={"llama.cpp bf16": 1.3})[over] == "reached"
    assert words(ratios={"llama.cpp bf16": 1.1})[over] == "missed"
    assert words(ratios={"llama.cpp bf16": 1.0})[over] == "beyond this machine"
    assert words(of_read_limit=0.7)["decode, one sequence: share of the read limit"] == "missed"
    assert words()["mixture, one sequence: over dense"] == "not measured"
    ceiling = {"mixture": {"rows": [{"batch": 1, "ratio": 1.3}]}}
    assert {one.what: one.word for one in gates.verdicts(ceiling)}["mixture, one sequence: over dense"] == "missed"
