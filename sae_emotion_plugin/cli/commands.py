"""The command `sae-emotion`: parse, call one library function, print. Heavy imports wait inside the commands."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from sae_emotion_plugin.cli.dashboards import dashboards
from sae_emotion_plugin.cli.discovery import discover, features, layers, lens, roles
from sae_emotion_plugin.cli.inspect import inspect
from sae_emotion_plugin.cli.monitor import monitor
from sae_emotion_plugin.cli.options import OneLineErrors, dictionary_option, json_option, model_option
from sae_emotion_plugin.cli.publish import publish
from sae_emotion_plugin.cli.references import references
from sae_emotion_plugin.cli.registry import registry
from sae_emotion_plugin.cli.steering import export, steer, study
from sae_emotion_plugin.cli.sweep import sweep
from sae_emotion_plugin.cli.view import view
from sae_emotion_plugin.files import CACHE_VARIABLE


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sae-emotion-plugin")
@click.option("--verbose", "-v", is_flag=True, help="Log what is being done.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Folder for downloads, converted models and codes.")
@click.pass_context
def main(ctx: click.Context, verbose: bool, cache_dir: str | None) -> None:
    """Find emotion features in language models with sparse autoencoders, and steer with them."""
    if cache_dir is not None:
        ctx.with_resource(_cache_in(cache_dir))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before


@main.command()
@click.option(
    "-o", "--out", default="report", show_default=True, type=click.Path(file_okay=False), help="Folder to write."
)
@model_option
@dictionary_option
@click.option("--seed", default=0, show_default=True, help="Seed of the corpus split.")
@json_option
def quickstart(out: str, model: str, dictionary: str, seed: int, as_json: bool) -> None:
    """The whole way: discover emotion features, steer with them, write a report."""
    from sae_emotion_plugin.quickstart import quickstart as run

    result = run(out, model=model, dictionary=dictionary, seed=seed, say=lambda line: click.echo(line, err=True))
    if as_json:
        summary = {"report": str(result.page), "recommended": result.generations.meta["recommended"]}
        click.echo(json.dumps({**summary, "findings": [vars(finding) for finding in result.findings]}, indent=2))
        return
    click.echo(repr(result.scores))
    click.echo(result.summary())
    click.echo(f"The report is at {result.page.resolve()}")


@main.command()
@click.option(
    "--judge", "judges", multiple=True, help="A judge by name, or hub:owner/name (repeatable); all by default."
)
@click.option(
    "--calibrate", type=click.Path(path_type=Path), metavar="TEXTS", help="Permute the labels of TEXTS instead."
)
@click.option("--permutations", default=200, show_default=True, help="With --calibrate: how many.")
@click.option("--single-label", is_flag=True, help="With --calibrate: keep only texts with exactly one label.")
@click.option("--skip-rare", is_flag=True, help="With --calibrate: leave out labels with fewer than 20 texts.")
@click.option("--seed", default=0, show_default=True, help="With --calibrate: seed of the permutations.")
@click.option("--refit", type=click.Path(path_type=Path), metavar="CORPORA", help="Fit the judges again instead.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="With --refit: folder for the fitted judges.")
@model_option
@dictionary_option
@json_option
def evidence(
    judges: tuple[str, ...],
    calibrate: Path | None,
    permutations: int,
    single_label: bool,
    skip_rare: bool,
    seed: int,
    refit: Path | None,
    out: Path | None,
    model: str,
    dictionary: str,
    as_json: bool,
) -> None:
    """How far the figures can be trusted: how good the judges of generated text are, measured on labelled texts.

    With --calibrate: how often discovery finds something where there is nothing to find.
    """
    if calibrate and refit:
        raise ValueError("give --calibrate or --refit, not both")
    if refit:
        if out is None:
            raise ValueError(f"--refit {refit} needs --out FOLDER")
        from sae_emotion_plugin.judges.fitting import refit as run

        for path in run(refit, out, names=judges or None):
            click.echo(f"written to {path}")
        return
    if calibrate:
        from dataclasses import asdict

        from sae_emotion_plugin.emotion_texts import LabelledTexts

        texts = LabelledTexts.read(calibrate)

        from sae_emotion_plugin.discovery.emotion_features import calibration
        from sae_emotion_plugin.models import cache_folder, load_model
        from sae_emotion_plugin.plugin import load_dictionary

        sae = load_dictionary(dictionary)
        found = calibration(
            load_model(model),
            sae,
            texts.only_single_label() if single_label else texts,
            permutations=permutations,
            skip_rare=skip_rare,
            seed=seed,
            cache=cache_folder() / "codes",
        )
        click.echo(json.dumps({**asdict(found), "holds": found.holds}, indent=2) if as_json else repr(found))
        return
    from sae_emotion_plugin.judges.quality import quality_table

    table = quality_table(judges or None)
    click.echo(json.dumps(table.to_dict(), ensure_ascii=False, indent=2) if as_json else repr(table))


@main.command()
@click.argument("recipe")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--texts", required=True, type=click.Path(path_type=Path), help="Folder of the recipe's texts.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder of activations and checkpoints, OUT.work by default; runs that share it share activations.",
)
@click.option(
    "--log",
    "loggers",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb"]),
    help="Log the figures there too (repeatable); curve.jsonl beside the checkpoints has them always.",
)
@click.option(
    "--measure-steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Measure FVU and loss recovered on held-out texts every so many steps; 0: at the end only.",
)
@click.option(
    "--checkpoint-steps",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Steps from one checkpoint to the next.",
)
@click.option(
    "--register/--no-register",
    default=None,
    help="Add the dictionary to your registry, to load it by name; by default where its name is free.",
)
@json_option
def train(
    recipe: str,
    out: Path,
    texts: Path,
    work: Path | None,
    loggers: tuple[str, ...],
    measure_steps: int,
    checkpoint_steps: int,
    register: bool | None,
    as_json: bool,
) -> None:
    """Train a dictionary by RECIPE (a YAML file, or a name such as openai-topk) into the folder OUT.

    The same command goes on after an interruption, wherever it was. OUT has weights that plain SAELens loads, the
    report, the curves, a page of both (report.html) and a model card (README.md).
    """
    from sae_emotion_plugin.recipes import TrainingRecipe

    chosen = TrainingRecipe.read(recipe)

    from sae_emotion_plugin.files import write_whole
    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.pages.training import write_training_page
    from sae_emotion_plugin.publishing.hub_files import trained_card
    from sae_emotion_plugin.registry import user_folder
    from sae_emotion_plugin.release_files import check_free
    from sae_emotion_plugin.training import TrainedDictionary, register_dictionary
    from sae_emotion_plugin.training import train as run

    taken = None
    try:
        check_free(chosen.name, chosen.sae_id, user_folder())
    except ValueError as error:
        if register:
            raise
        taken = str(error)
    to_register = taken is None and register is not False
    # A run that was killed behind its last step lacks no more than page, card and registration.
    unfinished = to_register or not all((out / name).exists() for name in ("report.html", "README.md"))
    if unfinished and (out / "recipe.yaml").is_file() and (trained := TrainedDictionary.load(out)).recipe == chosen:
        click.echo(f"{out} was trained before: what it lacks is made", err=True)
    else:
        trained = run(
            chosen,
            load_model(chosen.model),
            texts,
            out,
            work_dir=work,
            measure_steps=measure_steps,
            checkpoint_steps=checkpoint_steps,
            loggers=loggers,
        )
    write_training_page(out / "report.html", trained)
    write_whole(out / "README.md", trained_card(out))
    if to_register:
        register_dictionary(trained, user_folder())
        click.echo(f"registered as {chosen.name}/{chosen.sae_id}", err=True)
    elif register is None:
        click.echo(f"not registered: {taken}", err=True)
    if as_json:
        click.echo((out / "report.json").read_text(encoding="utf-8"), nl=False)
    else:
        click.echo(trained.report.to_pandas().T.to_string(header=False))


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["saelens", "openai"]),
    default="saelens",
    show_default=True,
    help="The format of OUT.",
)
@click.option("--hook-name", help="Hook that the SAE reads, for example blocks.8.hook_resid_post.")
@click.option("--model-name", help="Model that the SAE was trained on, for example gpt2-small.")
@json_option
def convert(source: str, out: Path, form: str, hook_name: str | None, model_name: str | None, as_json: bool) -> None:
    """Convert an OpenAI-format checkpoint SOURCE (.pt) into the folder OUT, in SAELens's format.

    With --to openai the other way round: a dictionary (a registry name, 'owner/repo:id', a folder) into the file OUT.
    """
    given = {"hook_name": hook_name, "model_name": model_name}
    metadata = {key: value for key, value in given.items() if value is not None}
    if form == "openai":
        if metadata:
            raise ValueError(f"OpenAI's format cannot hold {', '.join(metadata)}; valid with --to openai: neither")
        from sae_emotion_plugin.openai_format import save_openai_checkpoint
        from sae_emotion_plugin.plugin import load_dictionary

        written = save_openai_checkpoint(load_dictionary(source, device="cpu"), out)
    else:
        from sae_emotion_plugin.openai_format import convert as run

        written = run(source, out, metadata=metadata)
    key = "file" if form == "openai" else "folder"
    click.echo(json.dumps({key: str(written)}) if as_json else f"written to {written}")


for command in (
    dashboards,
    discover,
    export,
    features,
    inspect,
    layers,
    lens,
    monitor,
    publish,
    references,
    registry,
    roles,
    steer,
    study,
    sweep,
    view,
):
    main.add_command(command)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL: eval "$(sae-emotion completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, "click ships these three"
    click.echo(found(main, {}, "sae-emotion", "_SAE_EMOTION_COMPLETE").source())
