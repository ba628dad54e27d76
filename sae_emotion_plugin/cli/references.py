"""The command `sae-emotion references`."""

import json
from pathlib import Path

import click

from sae_emotion_plugin.cli.options import json_option
from sae_emotion_plugin.files import check_folder


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("train", type=click.Path(path_type=Path))
@click.option("--texts", required=True, type=click.Path(path_type=Path), help="Folder of the recipe's texts.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the dictionaries to make.")
@click.option("--held-out", type=click.Path(path_type=Path), help="Texts to score on; by default half of TRAIN.")
@click.option("--kind", "kinds", multiple=True, help="This reference only (repeatable); by default all four.")
@click.option("--emotion", "emotions", multiple=True, help="Compare on this label only (repeatable); by default all.")
@click.option("--single-label", is_flag=True, help="Keep only texts with exactly one label.")
@click.option("--seed", default=0, show_default=True, help="Seed of the split and of the intervals.")
@json_option
def references(
    recipe: Path,
    train: Path,
    texts: Path,
    out: Path,
    held_out: Path | None,
    kinds: tuple[str, ...],
    emotions: tuple[str, ...],
    single_label: bool,
    seed: int,
    as_json: bool,
) -> None:
    """What training adds: train by RECIPE, and its references beside it, and compare their best features.

    References are the same recipe with a frozen random decoder or encoder, random directions that fire as often, and
    the recipe on the model with shuffled weights. Features are chosen on TRAIN, labelled texts. The margins go to
    OUT/margins.json, which `discover --margins` shows. The same command goes on after an interruption.
    """
    check_folder(out)
    from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
    from sae_emotion_plugin.recipes import REFERENCES, TrainingRecipe

    chosen = TrainingRecipe.read(recipe)
    whole, *given = (LabelledTexts.read(path) for path in (train, held_out) if path)
    if single_label:
        whole, *given = (part.only_single_label() for part in (whole, *given))
    ours, theirs = (whole, given[0]) if given else whole.split(0.5, seed)
    ours, _ = without_overlap(ours, theirs)

    from sae_emotion_plugin.discovery.reference_margins import reference_margins
    from sae_emotion_plugin.models import cache_folder, load_model
    from sae_emotion_plugin.reference_saes import encode_references, train_references

    model = load_model(chosen.model)
    made = train_references(chosen, model, texts, out, kinds=kinds or REFERENCES)
    codes, held_out_codes = encode_references(made, model, ours, theirs, cache=cache_folder() / "codes")
    margins = reference_margins(codes, held_out_codes, ours, theirs, emotions=emotions or None, seed=seed)
    path = margins.save(out / "margins.json")
    click.echo(json.dumps(margins.to_dict(), ensure_ascii=False) if as_json else repr(margins))
    click.echo(f"written to {path}", err=True)
