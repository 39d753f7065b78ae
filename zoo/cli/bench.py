"""zoo bench: how fast this machine runs a model."""

from typing import Any

import click

from zoo.cli.options import load_options

AT_LEAST_ONE = click.IntRange(min=1)


@click.command()
@click.argument("ref")
@click.option(
    "--batch", "batches", type=AT_LEAST_ONE, multiple=True, default=(1, 8), show_default=True, help="May be repeated."
)
@click.option("--prompt-tokens", type=AT_LEAST_ONE, default=512, show_default=True)
@click.option("--new-tokens", type=AT_LEAST_ONE, default=32, show_default=True)
@click.option("--repeats", type=AT_LEAST_ONE, default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@load_options
def bench(
    ref: str, batches: tuple[int, ...], prompt_tokens: int, new_tokens: int, repeats: int, as_json: bool, **flags: Any
) -> None:
    """Measure REF's prefill and decode beside this machine's memory bandwidth (`--weights random` needs no files)."""
    from zoo.bench import measure, read_bandwidth
    from zoo.cli.console import columns, emit, note
    from zoo.cli.run import load_model

    with load_model(ref, flags) as model:
        bandwidth = read_bandwidth() if model.placement.device.type == "cpu" else None
        if bandwidth:
            note(f"memory bandwidth: {bandwidth / 1e9:.1f} GB/s read")
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
        results = [measure(model, batch=batch, bandwidth=bandwidth, **sizes) for batch in batches]
    if as_json:
        emit({"name": ref, "read_bytes_per_second": bandwidth, "results": [r.to_dict() for r in results]})
        return
    rows = [
        [
            str(r.batch),
            f"{r.prefill_tokens_per_second:.1f}",
            f"{r.decode_tokens_per_second:.2f}",
            f"{r.bandwidth_share:.0%}" if r.bandwidth_share else "-",
        ]
        for r in results
    ]
    click.echo(columns([["BATCH", "PREFILL tok/s", "DECODE tok/s", "OF BANDWIDTH"], *rows]))
