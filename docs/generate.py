"""Writes the reference pages from the code, so that they cannot drift; `--check` fails when a page is out of date.

python docs/generate.py            # write docs/cards.md, components.md, cli.md, and parts of other pages
python docs/generate.py --check    # exit status 1 and a list when one of them differs
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import click
import yaml

from zoo.api import inspect
from zoo.api import list as cards
from zoo.cli import BUILTIN, cli
from zoo.inspection import Inspection
from zoo.loading.infer.families import families
from zoo.registry.manager import Manager
from zoo.registry.spec import Inherited, Slot, Spec
from zoo.units import human_bytes, human_count

ROOT = Path(__file__).parent.parent
MADE = "<!-- Made by docs/generate.py from the code: change that, then run `make docs`. -->\n\n"


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    by_family = _by_family([inspect(card) for card in cards() if not _from_plugin(card.name)])
    lists = {"architectures": _architectures(), "layouts": _layouts()}
    return {
        ROOT / "README.md": _with_lists(
            ROOT / "README.md", {"figures": _figures(), "families": _family_table(by_family)}
        ),
        ROOT / "docs/formats.md": _with_lists(ROOT / "docs/formats.md", lists),
        ROOT / "docs/cards.md": MADE + _cards_page(by_family),
        ROOT / "docs/components.md": MADE + _components_page(),
        ROOT / "docs/cli.md": MADE + _cli_page(),
    }


def _with_lists(page: Path, lists: dict[str, str]) -> str:
    """The page with what stands between the marks of each name replaced."""
    text = page.read_text(encoding="utf-8")
    for name, made in lists.items():
        begin, end = f"<!-- {name}: made by docs/generate.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{made}\n{end}{after}"
    return text


def _figures() -> str:
    """The first of the benchmarks' figures, as they were measured last."""
    results = json.loads((ROOT / "docs/benchmarks/cpu.json").read_text(encoding="utf-8"))
    names = ("prefill", "decode", "mixed", "quantised")
    prefill, decode, mixed, quantised = (results[name] for name in names)
    prompt, batches = prefill["rows"][0], {row["batch"]: row for row in decode["rows"]}
    traffic = {side: figures["new_tokens_per_second"] for side, figures in mixed["sides"].items()}
    others = max(rate for side, rate in traffic.items() if side != "zoo")
    coded = quantised["tokens_per_second"]
    rows: dict[str, tuple[float | None, ...]] = {
        f"a prompt of {prompt['prompt']} tokens": _sides(prompt),
        "decode, one sequence": _sides(batches[1]),
        "decode, 8 sequences": _sides(batches[8]),
        f"{mixed['requests']} requests that arrive over time, new tokens": (traffic["zoo"], others, None),
        "decode, one sequence, weights in four bits": (coded["zoo int4"], None, coded["llama.cpp q4_0"]),
    }
    dates = sorted({results[name]["date"] for name in names})
    lines = [
        f"Tokens per second of a model of 1.1 B parameters in bfloat16 on {decode['machine']['cores']} cores of an "
        f"{decode['machine']['processor']} with AVX-512, measured on {' and '.join(dates)}. The programs of a row took "
        "turns in one process; rows are of different runs, and the speed of this shared machine's memory varies.",
        "",
        "| | zoo | transformers | llama.cpp |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {' | '.join(map(_rate, rates))} |" for name, rates in rows.items()),
        "",
        f"One sequence is decoded at {batches[1]['of_read_limit']:.0%} of the rate at which memory can be read.",
    ]
    return "\n".join(lines)


def _sides(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(row["tokens_per_second"][side] for side in ("zoo", "transformers", "llama.cpp bf16"))


def _rate(rate: float | None) -> str:
    if rate is None:
        return "not measured"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _architectures() -> str:
    return ", ".join(f"`{name}`" for name in families()["config.json"])


def _layouts() -> str:
    resources = Manager(installed=False).layouts()
    tables = {name: yaml.safe_load(resource.file.read_bytes()) for name, resource in resources.items()}
    rows = ["| layout | names |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {table['summary']} |" for name, table in tables.items())])


def _by_family(inspections: list[Inspection]) -> dict[str, list[Inspection]]:
    """The largest family first."""
    names = Counter(i.card.family for i in inspections)
    return {name: [i for i in inspections if i.card.family == name] for name, _ in names.most_common()}


def _from_plugin(name: str) -> bool:
    return name not in Manager(installed=False).cards()


def _family_table(by_family: dict[str, list[Inspection]]) -> str:
    """Each family's number of cards, and the sizes of its smallest and its largest model."""
    rows = ["| family | cards | parameters |", "|---|---:|---:|"]
    for name, family in by_family.items():
        sizes = sorted({i.parameters for i in family if i.resolved})
        span = " to ".join(human_count(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        rows.append(f"| [{name}](docs/cards.md#{name}) | {len(family)} | {span} |")
    return "\n".join(rows)


def _card_table(by_family: dict[str, list[Inspection]]) -> str:
    rows = ["| card | family | parameters | active | context | licence |", "|---|---|---:|---:|---:|---|"]
    for i in (i for family in by_family.values() for i in family):
        active = human_count(i.active_parameters) if i.resolved and i.active_parameters != i.parameters else ""
        size = human_count(i.parameters) if i.resolved else "not supported"
        card = i.card
        rows.append(
            f"| [`{card.name}`](#{_anchor(i)}) | {card.family} | {size} | {active} | {card.context_length:,} "
            f"| {card.license} |"
        )
    return "\n".join(rows) + "\n"


def _anchor(inspection: Inspection) -> str:
    """The name of the card's heading in links, as GitHub makes it."""
    return inspection.card.name.lower().replace(".", "")


def _cards_page(by_family: dict[str, list[Inspection]]) -> str:
    head = "# Cards\n\nWhat `zoo list` knows. Bytes are for the card's own number format.\n\n"
    parts = [head, _card_table(by_family)]
    for name, family in by_family.items():
        parts += [f"\n## {name}\n", *map(_card, family)]
    return "".join(parts)


def _card(i: Inspection) -> str:
    card = i.card
    hub = card.source.hub
    source = f"[{hub}](https://huggingface.co/{hub})" if hub else "in the package"
    title = f"\n### {card.name}\n\n{card.summary}\n\n"
    if card.unsupported:
        return (
            f"{title}- not supported: {card.unsupported}\n"
            f"- licence {card.license}; released {card.released or 'unknown'}; weights: {source}\n"
        )
    return (
        f"{title}"
        f"- {human_count(i.parameters)} parameters{_active(i)}; {human_bytes(i.weight_bytes)} of weights in {i.dtype}\n"
        f"- context of {card.context_length:,} tokens; {_cache(i)}\n"
        f"- features: {', '.join(card.text.features) or 'none'}\n"
        f"- licence {card.license}; released {card.released or 'unknown'}; weights: {source}\n\n"
        + "".join(f"- {name} `{text}`\n" for name, text in i.encoders().items())
        + "".join(_layer_row(row) for row in i.layers())
    )


def _active(inspection: Inspection) -> str:
    active = inspection.active_parameters
    return f", {human_count(active)} active for each token" if active != inspection.parameters else ""


def _cache(inspection: Inspection) -> str:
    """Per token, and for the longest sequence, which windows make shorter than the product."""
    longest = inspection.cache_bytes(inspection.card.context_length)
    token = human_bytes(inspection.cache_bytes_per_token)
    return f"{token} of cache per token, {human_bytes(longest)} for the whole context"


def _layer_row(row: dict[str, Any]) -> str:
    parts = "; ".join(f"{name} `{text}`" for name, text in row.items() if name not in ("layers", "block"))
    return f"- layers {row['layers']}, {row['block']}: {parts}\n"


def _components_page() -> str:
    catalog = Manager(installed=False).catalog
    parts = [
        "# Components\n\nEvery kind that may stand in a slot of a card, and what its node may hold. "
        "Fields marked *inherited* come from the enclosing node and are not written.\n"
    ]
    slots: dict[str, list[type[Spec]]] = {}
    for entry in catalog.components.values():
        slots.setdefault(entry.slot, []).append(catalog.spec(entry))
    kinds = {catalog.spec(e): e.kind for e in catalog.components.values()}
    links = (f"[{slot}](#{slot})" for slot in slots)
    parts.append(f"\nSlots: {', '.join(links)}.\n")
    for slot, specs in slots.items():
        parts.append(f"\n## {slot}\n")
        for spec in specs:
            parts.append(f"\n### {slot}: {kinds[spec]}\n\n{_paragraph(spec.__doc__)}\n")
            rows = [*_fields(spec)]
            if rows:
                parts.append("\n| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows))
    return "".join(parts)


def _paragraph(doc: str | None) -> str:
    return " ".join((doc or "").split())


def _fields(spec: type[Spec]) -> Iterator[str]:
    for name, field in spec.model_fields.items():
        if name == "kind":
            continue
        if any(isinstance(m, Inherited) for m in field.metadata):
            default = "*inherited*"
        elif field.is_required():
            slot = next((m for m in field.metadata if isinstance(m, Slot)), None)
            default = {"build": "*its default kind*", "inherit": "*the enclosing node's*"}.get(
                slot.absent if slot else "", "required"
            )
        else:
            default = f"`{_yaml(field.default)}`"
        yield f"| `{name}` | {_type(field)} | {default} | {_paragraph(field.description)} |\n"


def _type(field: Any) -> str:
    slot = next((m for m in field.metadata if isinstance(m, Slot)), None)
    if slot:
        return f"{'list of ' if slot.runs else ''}[{slot.name}](#{slot.name})"
    return _name(field.annotation).replace("|", "\\|")


def _name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name(args[0])
    if args and str(origin) == "typing.Literal":
        return " | ".join(f"`{a}`" for a in args)
    if args:
        return " | ".join(_name(a) for a in args if a is not Ellipsis)
    return {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "NoneType": "null"}.get(
        annotation.__name__, f"{annotation.__name__}: " + ", ".join(getattr(annotation, "model_fields", {}))
    )


def _yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _cli_page() -> str:
    contexts = [*_contexts(click.Context(cli, info_name="zoo", **cli.context_settings))]
    parts = ["# Commands\n\nWhat `--help` prints. How to use them: [running models](running.md).\n\n"]
    for context in contexts:
        path = context.command_path
        parts.append(f"- [{path}](#{path.replace(' ', '-')}): {context.command.get_short_help_str(limit=200)}\n")
    for context in contexts:
        parts.append(f"\n## {context.command_path}\n\n```\n{context.get_help()}\n```\n")
    return "".join(parts)


def _contexts(context: click.Context) -> Iterator[click.Context]:
    """The command's context and those of its subcommands, wide enough that no sentence of a list is cut."""
    context.terminal_width = 130
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            child = context.command.get_command(context, name)
            if child is not None and (name in BUILTIN or context.parent):
                yield from _contexts(click.Context(child, parent=context, info_name=name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for file, text in pages().items():
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(file.relative_to(ROOT))
        if not check:
            file.write_text(text, encoding="utf-8")
    for file in stale:
        sys.stderr.write(f"{file}: {'out of date; run `make docs`' if check else 'written'}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
