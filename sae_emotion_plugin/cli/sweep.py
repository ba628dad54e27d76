"""The command `sae-emotion sweep`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sae_emotion_plugin.cli.options import json_option


def _values(kind: Callable[[str], Any], valid: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Reads an option's values, parted by commas."""

    def read(context: click.Context, parameter: click.Parameter, given: str | None) -> Any:
        try:
            return None if given is None else tuple(kind(one) for one in given.split(","))
        except ValueError:
            raise ValueError(f"--{parameter.name} is {given!r} (valid: {valid} parted by commas)") from None

    return read


_numbers, _whole = _values(float, "numbers"), _values(int, "whole numbers")


@click.command()
@click.argument("recipe")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--texts", required=True, type=click.Path(path_type=Path), help="Folder of the recipe's texts.")
@click.option(
    "--expansion",
    callback=_numbers,
    default="2,3,4,6,8,12,16",
    show_default=True,
    metavar="N,N,...",
    help="Features for each dimension of the hook, 1 to 64.",
)
@click.option(
    "--k", callback=_whole, metavar="N,N,...", help="Features on a token; by default half, once and twice the recipe's."
)
@click.option("--l1", callback=_numbers, metavar="X,X,...", help="L1 coefficients, with the same default.")
@click.option("--lr", callback=_numbers, metavar="X,X,...", help="Learning rates; by default the recipe's.")
@click.option(
    "--seed", callback=_whole, default="0", show_default=True, metavar="N,N,...", help="Seeds of weights and order."
)
@click.option("--tokens", default=200_000, show_default=True, help="Tokens to train on.")
@json_option
def sweep(
    recipe: str,
    out: Path,
    texts: Path,
    expansion: tuple[float, ...],
    k: tuple[int, ...] | None,
    l1: tuple[float, ...] | None,
    lr: tuple[float, ...] | None,
    seed: tuple[int, ...],
    tokens: int,
    as_json: bool,
) -> None:
    """Train RECIPE (a YAML file, or a recipe's name) at many widths on one set of activations, into the folder OUT.

    Writes a page with FVU, loss recovered, dead features and emotion AUROC by expansion factor, and scaling laws. The
    same command goes on after an interruption. The defaults take about an hour on 2 CPU cores with the recipe
    embedded-sweep.
    """
    from sae_emotion_plugin.recipes import TrainingRecipe
    from sae_emotion_plugin.training_sweeps.design import SweepDesign

    design = SweepDesign(TrainingRecipe.read(recipe), expansion, k, l1, lr or (), seed, tokens)

    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.recipe_sweep import sweep_recipe

    model = load_model(design.recipe.model)
    found = sweep_recipe(design, model, texts, out, say=lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
    else:
        click.echo(f"{found!r}\nThe page is at {(out / 'index.html').resolve()}")
