"""The command `sae-emotion inspect`."""

import json
from pathlib import Path

import click

from sae_emotion_plugin.cli.options import json_option


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--dead-after", type=int, metavar="BATCHES", help="Batches without activation that make a latent dead.")
@json_option
def inspect(checkpoint: Path, dead_after: int | None, as_json: bool) -> None:
    """What an OpenAI-format CHECKPOINT (.pt) holds: version, shapes, dead latents, frequencies, norms, NaN."""
    from sae_emotion_plugin.openai_inspection import DEAD_AFTER, inspect_checkpoint

    found = inspect_checkpoint(checkpoint, dead_after=DEAD_AFTER if dead_after is None else dead_after)
    click.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else repr(found))
