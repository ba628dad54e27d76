"""The command `sae-emotion view`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sae_emotion_plugin.cli.options import model_option, page_name

if TYPE_CHECKING:
    from sae_emotion_plugin.dashboards.types import FeatureDashboard
    from sae_emotion_plugin.feature_labels import FeatureLabel


@click.command()
@click.argument("dictionary")
@click.option(
    "-o", "--out", default="features.html", show_default=True, type=click.Path(path_type=Path), help="Page to write."
)
@click.option(
    "--labels",
    "label_files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file of labels, JSON Lines (repeatable: several authors); the dictionary's own by default.",
)
@click.option(
    "--dashboards",
    "dashboard_folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Finished dashboards of the dictionary; by default small ones are made from the bundled texts.",
)
@model_option
def view(dictionary: str, out: Path, label_files: tuple[Path, ...], dashboard_folder: Path | None, model: str) -> None:
    """Write a page on which the labelled features of DICTIONARY can be looked through: one file, no network.

    DICTIONARY is a registry name; with --labels also a folder, 'owner/repo:id', or an OpenAI-format .pt file.
    """
    from sae_emotion_plugin.files import check_folder
    from sae_emotion_plugin.pages.browser import write_browser
    from sae_emotion_plugin.registry import feature_url

    check_folder(out)
    labels, neuronpedia = _labels(dictionary, label_files)
    features = sorted({one.feature for one in labels})
    shown, meta = _finished(dashboard_folder, features) if dashboard_folder else _made(dictionary, model, features)
    name = page_name(dictionary)
    write_browser(
        out,
        labels,
        shown,
        title=name,
        meta={"dictionary": name, "labels by": sorted({one.author for one in labels if one.author}), **meta},
        links={feature: url for feature in features if (url := feature_url(neuronpedia, feature))},
    )
    click.echo(f"{len(features)} labelled {'feature' if len(features) == 1 else 'features'}: {out.resolve()}")


def _labels(dictionary: str, files: Sequence[Path]) -> "tuple[tuple[FeatureLabel, ...], str | None]":
    """The labels of the files, or the dictionary's own; and its name on Neuronpedia, where the registry has one."""
    from sae_emotion_plugin import registry
    from sae_emotion_plugin.feature_labels import merge_labels, read_labels

    neuronpedia = None
    labels = merge_labels(*(read_labels(path) for path in files))
    try:
        entry, sae = registry.find(dictionary)
        labels, neuronpedia = labels if files else registry.labels(entry, sae), sae.neuronpedia
    except ValueError:
        if not files:
            raise
    if not labels:
        what = f"{', '.join(map(str, files))} holds" if files else f"{dictionary} has"
        raise ValueError(f"{what} no labels, and only labelled features are shown; valid: --labels FILE with some")
    return labels, neuronpedia


def _finished(folder: Path, features: Sequence[int]) -> "tuple[list[FeatureDashboard], dict[str, Any]]":
    from sae_emotion_plugin.dashboards.types import Dashboards

    dashboards = Dashboards.load(folder)
    return [dashboards.feature(feature) for feature in features], _facts(dashboards.meta)


def _made(dictionary: str, model: str, features: Sequence[int]) -> "tuple[list[FeatureDashboard], dict[str, Any]]":
    """Dashboards of the bundled texts, kept nowhere."""
    import tempfile

    from sae_emotion_plugin.dashboards.build import build_dashboards
    from sae_emotion_plugin.emotion_texts import LabelledTexts
    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.plugin import load_dictionary

    sae = load_dictionary(dictionary)
    if features and features[-1] >= sae.cfg.d_sae:
        raise ValueError(f"there is no feature {features[-1]} (valid: 0 to {sae.cfg.d_sae - 1})")
    with tempfile.TemporaryDirectory() as folder:
        dashboards = build_dashboards(load_model(model), sae, LabelledTexts.bundled(), folder)
        return [dashboards.feature(feature) for feature in features], {
            "corpus": "bundled texts",
            **_facts(dashboards.meta),
        }


def _facts(meta: dict[str, Any]) -> dict[str, Any]:
    """What a reader wants to know of how the dashboards were made, with counts named as what they count."""
    names = {"n_texts": "texts", "n_sequences": "sequences", "n_tokens": "tokens"}
    return {names.get(key, key): value for key, value in meta.items() if key not in ("format", "block_texts", "key")}
