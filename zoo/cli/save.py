"""zoo save: a model, merged and converted, into a folder."""

from typing import Any

import click

from zoo.cli.options import positive

GIGA = 10**9


@click.command()
@click.argument("ref")
@click.argument("folder")
@click.option("--adapter", "adapters", multiple=True, help="LoRA adapter to merge into the weights; may be repeated.")
@click.option("--layout", default="auto", show_default=True, help="mistral, huggingface, zoo, or as the files have it.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or the card's.")
@click.option("--weights", default="auto", show_default=True, help="A folder or file, `random`, or auto.")
@click.option(
    "--max-file-size", default=50.0, show_default=True, callback=positive, help="Gigabytes of one weight file."
)
@click.option("--overwrite", is_flag=True, help="Replace a model that is in FOLDER.")
def save(ref: str, folder: str, adapters: tuple[str, ...], max_file_size: float, **flags: Any) -> None:
    """Write REF's weights, settings, card and tokenizer to FOLDER: merged, converted or renamed."""
    from zoo.api import load
    from zoo.cli.console import loading_bar, note
    from zoo.loading.layouts import layout_named
    from zoo.saving.save import check_free

    check_free(folder, flags["overwrite"])
    if flags["layout"] != "auto":
        layout_named(flags["layout"])
    options = {"layout": flags["layout"], "overwrite": flags["overwrite"]}
    with loading_bar(f"loading {ref}") as progress:
        model = load(
            ref, device="cpu", dtype=flags["dtype"], weights=flags["weights"], adapters=adapters, progress=progress
        )
    with model, loading_bar(f"saving {ref}") as progress:
        for line in model.notes:
            note(line)
        for name in model.adapters:
            model.merge_adapter(name)
        saved = model.save(folder, file_bytes=int(max_file_size * GIGA), progress=progress, **options)
    note(saved.note)
    click.echo(saved.folder)
