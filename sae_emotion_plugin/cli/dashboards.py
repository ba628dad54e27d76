"""The command `sae-emotion dashboards`."""

import json
from pathlib import Path

import click

from sae_emotion_plugin.cli.options import dictionary_option, json_option, model_option


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TEXTS...")
@click.option(
    "-o", "--out", default="dashboards", show_default=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--texts", "most", type=click.IntRange(min=1), help="Take this many texts, drawn evenly; all by default.")
@click.option("--context-size", type=click.IntRange(min=2), help="Tokens of a sequence; the dictionary's by default.")
@click.option("--merge", is_flag=True, help="TEXTS are folders of finished dashboards: make one of them.")
@model_option
@dictionary_option
@json_option
def dashboards(
    sources: tuple[Path, ...],
    out: Path,
    most: int | None,
    context_size: int | None,
    merge: bool,
    model: str,
    dictionary: str,
    as_json: bool,
) -> None:
    """Make the dashboards of all features of a dictionary in one pass over TEXTS (.txt, or .jsonl with `text`; .gz).

    The same command goes on after an interruption. `sae-emotion view` and `publish neuronpedia` read the folder.
    """
    if merge and (most or context_size):
        raise ValueError("--merge joins what was made: --texts and --context-size are for making it")
    from sae_emotion_plugin.dashboards.build import build_dashboards, merge_dashboards

    if merge:
        made = merge_dashboards(sources, out)
    else:
        from sae_emotion_plugin.recipes import read_documents

        texts = [text for source in sources for document in read_documents(source).values() for text in document]
        if most is not None and most < len(texts):
            texts = [texts[place * len(texts) // most] for place in range(most)]

        from sae_emotion_plugin.models import load_model
        from sae_emotion_plugin.plugin import load_dictionary

        made = build_dashboards(load_model(model), load_dictionary(dictionary), texts, out, context_size=context_size)
    if as_json:
        click.echo(json.dumps({"folder": str(out), **made.meta}, ensure_ascii=False, indent=2))
    else:
        click.echo(f"{made!r}\n{out.resolve()}")
