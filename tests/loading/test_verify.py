"""Verifying headers against a card, on disk and by the heads of remote files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.loading import hub
from zoo.loading.hub.types import Remote, RemoteFile
from zoo.loading.verify import verify_files, verify_hub
from zoo.registry.card import Card
from zoo.registry.errors import FetchError, WeightsError
from zoo.registry.resolve import Plan, resolve

Plans = Callable[..., Plan]
Names = Callable[[Plan], dict[str, tuple[int, ...]]]
Write = Callable[..., Path]


def test_a_checkpoint_that_fits(tmp_path: Path, plan_of: Plans, native_names: Names, save: Write) -> None:
    plan = plan_of("moe")
    shapes = native_names(plan)
    file = save(tmp_path / "consolidated.safetensors", shapes)
    report = verify_files(plan, tmp_path)
    assert report.ok
    assert (report.tensors, report.placed, report.layout) == (len(shapes), len(shapes), "mistral")
    assert report.bytes == 4 * sum(param.numel for param in plan.model.all_parameters().values())
    assert report == verify_files(plan, file)
    assert json.loads(json.dumps(report.to_dict())) == {
        "ok": True,
        "card": "little",
        "where": str(file),
        "layout": "mistral",
        "files": ["consolidated.safetensors"],
        "note": report.note,
        "schemes": [],
        "tensors": len(shapes),
        "bytes": report.bytes,
        "placed": len(shapes),
        "counts": {},
        "problems": [],
        "summary": "",
    }


def test_every_difference_is_listed_and_counted(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write
) -> None:
    shapes = native_names(plan_of())
    shapes["tok_embeddings.weight"] = (510, 64)
    shapes["zzz"] = (1,)
    del shapes["norm.weight"], shapes["layers.0.ffn_norm.weight"]
    save(tmp_path / "consolidated.safetensors", shapes)
    report = verify_files(plan_of(), tmp_path)
    assert not report.ok
    assert report.counts == {"shape": 1, "missing": 2, "unused": 1}
    assert report.problems == (
        "of another shape: embed.weight (tok_embeddings.weight is [510, 64], the card says [509, 64])",
        "missing from the files: norm.weight [64]",
        "missing from the files: layers.0.ffn_norm.weight [64]",
        "in the files only: zzz [1]",
    )
    assert report.placed == len(list(plan_of().model.tensors())) - 3
    assert report.to_dict()["ok"] is False
    assert report.summary.startswith(f"{tmp_path}/consolidated.safetensors: the files and the card differ in 4 tensors")


def test_no_weights_is_an_error(tmp_path: Path, plan_of: Plans) -> None:
    with pytest.raises(WeightsError, match="no weights here"):
        verify_files(plan_of(), tmp_path)


def hub_plan(plan: Plan, **source: str) -> Plan:
    return resolve(Card.from_dict({**plan.card.to_dict(), "source": {"hub": "somebody/little", **source}}))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A repository made of tmp_path's files; calling it gives the weight files whose heads have been read."""
    seen: list[str] = []

    def listed(repo: str, revision: str | None) -> Remote:
        files = [RemoteFile(file.name, file.stat().st_size, None) for file in sorted(tmp_path.iterdir())]
        return Remote(repo, "0" * 40, tuple(files))

    def head(remote: Remote, path: str) -> bytes:
        seen.append(path)
        data = (tmp_path / path).read_bytes()
        return data[: 8 + int.from_bytes(data[:8], "little")]

    monkeypatch.setattr(hub, "list_files", listed)
    monkeypatch.setattr(hub, "ranged_headers", head)
    monkeypatch.setattr(hub, "read_file", lambda remote, path: (tmp_path / path).read_bytes())
    return lambda: seen


def test_a_repository_is_verified_by_its_heads(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write, repository: Callable[[], list[str]]
) -> None:
    plan = plan_of()
    names = native_names(plan)
    weight_map = {}
    for number, part in enumerate((list(names)[:5], list(names)[5:]), 1):
        file = save(tmp_path / f"consolidated-{number:05d}-of-00002.safetensors", {name: names[name] for name in part})
        weight_map.update(dict.fromkeys(part, file.name))
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save(tmp_path / "model.safetensors", {"model.norm.weight": (64,)})
    report = verify_hub(hub_plan(plan))
    assert report.ok
    assert report.tensors == len(names)
    assert report.where == "somebody/little@000000000000"
    assert set(repository()) == {"consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"}
    other = verify_hub(hub_plan(plan, layout="huggingface"))
    assert other.counts["missing"] == len(names) - 1


def test_a_repository_whose_names_are_not_of_the_cards_layout(
    tmp_path: Path, plan_of: Plans, save: Write, repository: Callable[[], list[str]]
) -> None:
    save(tmp_path / "consolidated.safetensors", {"model.norm.weight": (64,)})
    with pytest.raises(WeightsError, match=r"no weights in layout 'mistral'; found .* \(layout huggingface\)"):
        verify_hub(hub_plan(plan_of(), layout="mistral"))


def test_pickles_on_the_hub_must_be_fetched_first(
    tmp_path: Path, plan_of: Plans, repository: Callable[[], list[str]]
) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(FetchError, match=r"consolidated\.00\.pth: only safetensors files can be read by their heads"):
        verify_hub(hub_plan(plan_of()))


def test_a_card_without_a_repository(plan_of: Plans) -> None:
    with pytest.raises(FetchError, match=r"little: the card has no hub repository; expected source\.hub"):
        verify_hub(plan_of())


def test_torch_is_not_imported(tmp_path: Path, plan_of: Plans, native_names: Names, save: Write) -> None:
    save(tmp_path / "consolidated.safetensors", native_names(plan_of()))
    card = json.dumps(plan_of().card.to_dict())
    code = (
        "import json, sys; from zoo.registry.card import Card; from zoo.registry.resolve import resolve; "
        "from zoo.loading.verify import verify_files; "
        f"assert verify_files(resolve(Card.from_dict(json.loads({card!r}))), {str(tmp_path)!r}).ok; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
