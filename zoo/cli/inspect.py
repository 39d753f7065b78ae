"""zoo inspect: what a model is and costs, before anything is fetched."""

from typing import TYPE_CHECKING, Any

import click

from zoo.cli.options import parse_overrides, refuse_beside
from zoo.registry.errors import RequestError
from zoo.units import human_bytes, human_count

if TYPE_CHECKING:
    from zoo.inspection import Inspection


@click.command()
@click.argument("ref")
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens to reckon the cache for. [default: the card's context length]"
)
@click.option("--dtype", default="auto", show_default=True, help="Number format for the byte figures.")
@click.option("--cache-dtype", default="auto", show_default=True, help="int8, fp8, none, or auto: as the card says.")
@click.option("--quantize", help="int8 or int4: reckon with large matrices stored so.")
@click.option("--prompt", help="Show this prompt's token ids and pieces as the model would get them.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    show_default="512, or the card's context length",
    help="Without --prompt: of the prompt whose first new token is reckoned.",
)
@click.option("--raw", is_flag=True, help="With --prompt: as raw text, not as a chat turn.")
@click.option("--files", is_flag=True, help="Ask the hub which files a pull would fetch.")
@click.option("--resolved", is_flag=True, help="Print the flat card, parents merged, and nothing else.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a card's field.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def inspect(
    ref: str,
    context: int | None,
    dtype: str,
    cache_dtype: str,
    quantize: str | None,
    prompt: str | None,
    prompt_tokens: int | None,
    raw: bool,
    files: bool,
    resolved: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show REF's parameters, memory, layers, source and cost. Fetches nothing, imports no torch."""
    from zoo.api import inspect as examine
    from zoo.cli.console import emit

    if resolved:
        figures = {"--context": context, "--dtype": dtype != "auto", "--quantize": quantize, "--json": as_json}
        shown_too = {"--prompt": prompt, "--prompt-tokens": prompt_tokens, "--raw": raw, "--files": files}
        refuse_beside("--resolved", "the flat card is all that is printed", figures | shown_too)
    if prompt is not None:
        refuse_beside("--prompt", "the prompt has its own number of tokens", {"--prompt-tokens": prompt_tokens})
    elif raw:
        raise RequestError("there is no prompt", where="--raw", expected="--prompt TEXT")
    found = examine(ref, dtype=dtype, cache_dtype=cache_dtype, quantize=quantize, overrides=parse_overrides(overrides))
    if resolved:
        click.echo(found.card.to_yaml(), nl=False)
        return
    shown = None if prompt is None else _prompt(found, prompt, raw)
    data = found.to_dict(context, _tokens(found.card.context_length, prompt_tokens) if shown is None else len(shown))
    if files:
        data["files"] = _files(found)
    if shown is not None:
        data["prompt"] = shown
    if as_json:
        emit(data)
    else:
        _write(data)


def _tokens(most: int, asked: int | None) -> int:
    """The tokens of the prompt whose answer is reckoned. Raises RequestError for more than the model reads."""
    if asked is not None and asked > most:
        expected = f"at most {most}, the card's context_length"
        raise RequestError(
            "the prompt is longer than the context", where="--prompt-tokens", found=asked, expected=expected
        )
    return min(512, most) if asked is None else asked


def _files(found: "Inspection") -> list[dict[str, Any]]:
    from zoo.cli.files import repository
    from zoo.loading.hub import plan_fetch

    repository(found.card)
    return [{"path": f.path, "bytes": f.size} for f in plan_fetch(found.card.source).chosen.files]


def _prompt(found: "Inspection", prompt: str, raw: bool) -> list[dict[str, Any]]:
    from zoo.api import tokenizer_of

    tokenizer = tokenizer_of(found)
    chat = not raw and "chat" in found.card.text.features
    ids = tokenizer.render([{"role": "user", "content": prompt}]).ids if chat else tokenizer.encode(prompt)
    return [{"id": i, "piece": tokenizer.piece(i)} for i in ids]


def _write(data: dict[str, Any]) -> None:
    from zoo.cli.console import columns

    facts = [
        ["name", f"{data['name']}: {data['summary']}"],
        ["license", f"{data['license'] or 'unknown'}, released {data['released'] or 'unknown'}"],
        ["source", data["folder"] or data["source"]["hub"] or "none"],
        ["features", ", ".join(data["features"]) or "none"],
    ]
    if data["unsupported"]:
        click.echo(columns([*facts, ["unsupported", data["unsupported"]]], heading=False))
        return
    memory = data["memory"]
    active = data["active_parameters"]
    sparse = f" ({human_count(active)} active for each token)" if active != data["parameters"] else ""
    facts += [
        ["parameters", human_count(data["parameters"]) + sparse],
        ["weights", f"{human_bytes(data['weight_bytes'])} in {_format(data)}"],
        ["cache", " and ".join(_cache(data)) + (f" in {data['cache_dtype']}" if data["cache_dtype"] else "") or "none"],
        ["compute", f"{human_count(data['flops_per_token'])} operations per token"],
        ["memory", f"{_total(data, memory)}: {_shares(memory)}"],
        ["here", f"{human_bytes(memory['free_bytes'])} free: {_verdict(memory)}"],
    ]
    if gpu := data["gpu_memory"]:
        facts.append(["GPU", f"{_total(data, gpu)}, {human_bytes(gpu['free_bytes'])} free: {_verdict(gpu)}"])
    facts += _speed(data["speed"])
    facts += [[name, text] for name, text in data["encoders"].items()]
    click.echo(columns(facts, heading=False))
    for row in data["layers"]:
        click.echo(f"\nlayers {row['layers']}")
        click.echo(columns([[f"  {name}", text] for name, text in row.items() if name != "layers"], heading=False))
    for title in ("files", "prompt"):
        if title in data:
            rows = [[str(v) for v in row.values()] for row in data[title]]
            click.echo("\n" + columns([[name.upper() for name in data[title][0]], *rows]))


def _format(data: dict[str, Any]) -> str:
    return data["dtype"] if data["quantize"] is None else f"{data['quantize']}, what stays in {data['dtype']}"


def _total(data: dict[str, Any], memory: dict[str, Any]) -> str:
    """What a run takes, and in which format where that is another than the card's."""

    other = "" if memory["dtype"] == data["dtype"] else f", in {memory['dtype']}"
    return f"{human_bytes(memory['total_bytes'])} at {memory['context']} tokens{other}"


def _verdict(memory: dict[str, Any]) -> str:
    """Whether it fits, and what would."""
    return "; ".join(filter(None, (memory["verdict"], memory["hint"])))


def _shares(memory: dict[str, Any]) -> str:
    """What the bytes are for."""

    names = {"weights": "weights", "cache": "cache", "working": "between", "spare": "left free"}
    names |= {"process": "Python and torch"}
    sizes = {words: memory[f"{name}_bytes"] for name, words in names.items()}
    return ", ".join(f"{words} {human_bytes(count)}" for words, count in sizes.items() if count)


def _speed(speed: dict[str, Any]) -> list[list[str]]:
    """What to expect of this machine, or why that is not known."""
    if "why" in speed:
        rough = speed["rough"]
        if rough is None:
            return [["speed", f"not known: {speed['why']}"]]
        many = f"about {rough['tokens_per_second']:.2g} tokens/s for one sequence of {rough['context']} tokens"
        read = f"roughly: memory was read at {rough['read_bytes_per_second'] / 1e9:.0f} GB/s just now"
        return [["speed", f"{many} on the CPU"], ["", f"{read}; {speed['why']}"]]
    first, (one, *more) = speed["prefill"], speed["decode"]
    others = ", ".join(f"{row['tokens_per_second']:.3g} for {row['batch']}" for row in more)
    rest = f"; like others: {', '.join(speed['unmeasured'])}" if speed["unmeasured"] else ""
    if rate := speed["read_bytes_per_second"]:
        rest = f"; memory is read at {rate / 1e9:.0f} GB/s now{rest}"
    return [
        ["speed", f"{one['tokens_per_second']:.3g} tokens/s for one sequence of {one['context']} tokens, {others}"],
        ["", f"first token of a prompt of {first['tokens']} tokens after {first['seconds']:.3g} s"],
        ["", f"reckoned for {speed['device']}, measured on {speed['measured'][:10]}{rest}"],
    ]


def _cache(data: dict[str, Any]) -> list[str]:
    """What the cache takes: of a sequence however short, and of each token."""

    return [
        f"{human_bytes(data[f'cache_bytes_per_{what}'])} per {what}"
        for what in ("sequence", "token")
        if data[f"cache_bytes_per_{what}"]
    ]
