"""The commands that watch texts: `monitor calibrate` and `monitor check`."""

import json
from pathlib import Path

import click

from sae_emotion_plugin.cli.options import dictionary_option, json_option, model_option
from sae_emotion_plugin.files import check_folder


@click.group()
def monitor() -> None:
    """Watch texts for emotions, hostility, or what else features stand for."""


@monitor.command()
@click.argument("neutral", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write.")
@click.option("--scores", type=click.Path(path_type=Path), help="Scores of discover: a set for each emotion.")
@click.option("--emotion", "emotions", multiple=True, help="With --scores: this emotion only (repeatable).")
@click.option("--best", default=10, show_default=True, help="With --scores: features of a set.")
@click.option(
    "--union",
    "unions",
    multiple=True,
    metavar="NAME=EMOTION,...",
    help="With --scores: one set of several emotions, as hostility=anger,disgust (repeatable).",
)
@click.option("--sets", type=click.Path(path_type=Path), help='Your own sets, JSON: {"name": [12, 34]}.')
@click.option("--rate", default=0.05, show_default=True, help="False positives wanted, of neutral texts.")
@click.option("--token-rate", default=0.01, show_default=True, help="The same, of the tokens of neutral texts.")
@click.option(
    "--pooling",
    type=click.Choice(["max", "mean"]),
    default="max",
    show_default=True,
    help="How the risks of a text's tokens make the text's.",
)
@click.option("--text-column", default="text", show_default=True, help="Column of the texts.")
@click.option("--seed", default=0, show_default=True, help="Seed of the split of NEUTRAL.")
@model_option
@dictionary_option
@json_option
def calibrate(
    neutral: Path,
    out: Path,
    scores: Path | None,
    emotions: tuple[str, ...],
    best: int,
    unions: tuple[str, ...],
    sets: Path | None,
    rate: float,
    token_rate: float,
    pooling: str,
    text_column: str,
    seed: int,
    model: str,
    dictionary: str,
    as_json: bool,
) -> None:
    """Find from which risk on sets of features fire, on NEUTRAL texts (.jsonl, .csv, .tsv) like those to be watched.

    Half of the texts set the thresholds, the others tell the rate of false positives that is achieved.
    """
    if scores is None and sets is None:
        raise ValueError("give --scores FILE (written by discover) or --sets FILE (your own)")
    if scores is None and (emotions or unions):
        raise ValueError("--emotion and --union need --scores FILE (written by discover)")
    check_folder(out)

    from sae_emotion_plugin.discovery.scores import FeatureScores
    from sae_emotion_plugin.emotion_texts import LabelledTexts
    from sae_emotion_plugin.monitoring.feature_sets import emotion_sets, read_feature_sets, union

    chosen = list(read_feature_sets(sets)) if sets else []
    if scores:
        found = FeatureScores.load(scores)
        # Unions alone mean that nothing else is wanted; a single emotion is a union of one.
        if emotions or not unions:
            chosen += emotion_sets(found, emotions=emotions or None, top=best)
        chosen += [union(name, emotion_sets(found, emotions=names, top=best)) for name, names in map(_union, unions)]
    texts = LabelledTexts.read(neutral, text_column=text_column, unlabelled=True).texts

    from sae_emotion_plugin.models import cache_folder, load_model
    from sae_emotion_plugin.monitoring.thresholds import calibrate_monitor as run
    from sae_emotion_plugin.plugin import load_dictionary

    made = run(
        load_model(model),
        load_dictionary(dictionary),
        chosen,
        texts,
        false_positive_rate=rate,
        token_false_positive_rate=token_rate,
        pooling="max" if pooling == "max" else "mean",
        seed=seed,
        cache=cache_folder() / "codes",
    )
    click.echo(f"written to {made.save(out)}", err=True)
    click.echo(json.dumps(made.to_dict(), ensure_ascii=False) if as_json else repr(made))


@monitor.command()
@click.argument("texts", nargs=-1)
@click.option("--file", "path", type=click.Path(path_type=Path), help="More texts: .jsonl, .csv or .tsv, also .gz.")
@click.option("--thresholds", required=True, type=click.Path(path_type=Path), help="Written by monitor calibrate.")
@click.option("--set", "sets", multiple=True, help="Watch this set only (repeatable).")
@click.option("--text-column", default="text", show_default=True, help="Column of the texts in --file.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="HTML page, with tokens highlighted.")
@model_option
@dictionary_option
@json_option
def check(
    texts: tuple[str, ...],
    path: Path | None,
    thresholds: Path,
    sets: tuple[str, ...],
    text_column: str,
    report: Path | None,
    model: str,
    dictionary: str,
    as_json: bool,
) -> None:
    """The risk of every set on each of TEXTS, and whether it fires."""
    if not texts and path is None:
        raise ValueError("no texts: give some, or --file FILE")
    if report:
        check_folder(report)

    from sae_emotion_plugin.emotion_texts import LabelledTexts

    more = LabelledTexts.read(path, text_column=text_column, unlabelled=True).texts if path else ()

    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.monitoring.monitor import monitor as run
    from sae_emotion_plugin.monitoring.thresholds import Thresholds
    from sae_emotion_plugin.plugin import load_dictionary

    limits = Thresholds.load(thresholds).select(sets or None)
    found = run(load_model(model), load_dictionary(dictionary), [*texts, *more], None, limits)
    if report:
        from sae_emotion_plugin.files import write_whole

        page = f"<!doctype html><meta charset=utf-8><title>Monitor</title>{found._repr_html_()}\n"
        click.echo(f"written to {write_whole(report, page)}", err=True)
    click.echo(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else repr(found))


def _union(text: str) -> tuple[str, list[str]]:
    name, _, emotions = text.partition("=")
    names = [part.strip() for part in emotions.split(",") if part.strip()]
    if not name.strip() or not names:
        raise ValueError(f"--union {text!r} is not of the form NAME=EMOTION,..., for example hostility=anger,disgust")
    return name.strip(), names
