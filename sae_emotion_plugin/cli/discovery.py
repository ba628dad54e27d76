"""The commands that look for emotions in a model: `discover`, `layers`, `features`, `roles` and `lens`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sae_emotion_plugin.cli.options import dictionary_option, json_option, model_option, page_name
from sae_emotion_plugin.files import check_folder

if TYPE_CHECKING:
    from sae_emotion_plugin.emotion_texts import LabelledTexts

Command = TypeVar("Command", bound=Callable[..., Any])


def text_options(command: Command) -> Command:
    """Labelled texts, held-out ones, and how to read both."""
    for option in reversed(
        (
            click.argument("train", type=click.Path(path_type=Path)),
            click.option(
                "--held-out", type=click.Path(path_type=Path), help="Texts to score on; by default half of TRAIN."
            ),
            click.option("--text-column", default="text", show_default=True, help="Column of the texts."),
            click.option("--label-column", help="Column of the labels; found by name when absent."),
            click.option("--single-label", is_flag=True, help="Keep only texts with exactly one label."),
            click.option(
                "--emotion", "emotions", multiple=True, help="Score this label only (repeatable); by default all."
            ),
            click.option(
                "--skip-rare", is_flag=True, help="Leave out labels with fewer than 20 texts instead of refusing them."
            ),
            click.option("--seed", default=0, show_default=True, help="Seed of every split."),
        )
    ):
        command = option(command)
    return command


def report_option(command: Command) -> Command:
    return click.option(
        "--report",
        type=click.Path(dir_okay=False, path_type=Path),
        help="HTML page to write; by default report.html beside --out.",
    )(command)


@click.command()
@click.argument("prompt")
@model_option
@dictionary_option
@click.option("--top", default=10, show_default=True, help="Features a token.")
@click.option("--each-token", is_flag=True, help="Features of every token, not only of the last.")
@json_option
def features(prompt: str, model: str, dictionary: str, top: int, each_token: bool, as_json: bool) -> None:
    """The strongest features of PROMPT's last token."""
    from sae_emotion_plugin.discovery.tokens import prompt_features
    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.plugin import load_dictionary

    sae = load_dictionary(dictionary)
    found = prompt_features(load_model(model), sae, prompt, top=top, every_token=each_token)
    if as_json:
        click.echo(json.dumps({"prompt": prompt, "rows": [vars(row) for row in found.rows]}, ensure_ascii=False))
    else:
        click.echo(repr(found))


@click.command()
@text_options
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the scores: .json or .parquet.",
)
@model_option
@dictionary_option
@click.option(
    "--layer", type=int, help="The release's SAE at this layer, where --dictionary names a release of several."
)
@click.option(
    "--pooling",
    type=click.Choice(["max", "mean", "last", "sum", "choose"]),
    default="max",
    show_default=True,
    help="How a text's tokens make one number; 'choose' picks by cross-validation inside TRAIN.",
)
@click.option("--top", default=50, show_default=True, help="Features kept for each label.")
@report_option
@click.option("--scores-only", is_flag=True, help="Neither baselines, controls nor a page.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="Compare with this method (repeatable); by default all nine, the slow part.",
)
@click.option("--permutations", default=20, show_default=True, help="Runs on permuted labels for the page; 0: none.")
@click.option("--no-layers", is_flag=True, help="Leave the scan of all layers out of the page.")
@click.option(
    "--margins",
    type=click.Path(path_type=Path),
    help="Margins over reference dictionaries, as `references` wrote them.",
)
@click.option(
    "--ratings",
    type=click.Path(path_type=Path),
    help="Texts with numbers in columns, such as EmoBank's V, A, D: correlate the best features with them.",
)
@click.option(
    "--transfer",
    "elsewhere",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Another corpus with labels of TRAIN's: score the best features there too (repeatable).",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Features of each label that are added to neutral openings, to rank them for steering; 0: none.",
)
@json_option
def discover(
    train: Path,
    held_out: Path | None,
    text_column: str,
    label_column: str | None,
    single_label: bool,
    emotions: tuple[str, ...],
    skip_rare: bool,
    seed: int,
    out: Path,
    model: str,
    dictionary: str,
    layer: int | None,
    pooling: Any,
    top: int,
    report: Path | None,
    scores_only: bool,
    methods: tuple[str, ...],
    permutations: int,
    no_layers: bool,
    margins: Path | None,
    ratings: Path | None,
    elsewhere: tuple[Path, ...],
    candidates: int,
    as_json: bool,
) -> None:
    """Rank features for each label of TRAIN (.jsonl, .csv, .tsv, also .gz) and score them on held-out texts.

    Beside the scores it writes a page, report.html, and what that shows as evidence.json: baselines on the same texts,
    specificity, what to steer with, a scan of the layers, the tests on permuted labels. Scores are written as soon as
    they are there. An interrupted run goes on behind the texts that it encoded and the methods that it fitted.
    """
    if scores_only and (report or margins or ratings or elsewhere):
        raise ValueError("--scores-only writes no page: give it without --report, --margins, --ratings and --transfer")
    page = report or out.with_name("report.html")
    for path in (out, page):
        check_folder(path)
    if out.suffix not in (".json", ".parquet"):
        raise ValueError(f"cannot write {out}: its name must end in .json or .parquet")
    texts, others = _texts(train, held_out, text_column, label_column, single_label)

    others_by_name = _by_name(elsewhere, texts, text_column, label_column, single_label)

    from sae_emotion_plugin.discovery.emotion_features import discover as run
    from sae_emotion_plugin.discovery.reference_margins import ReferenceMargins
    from sae_emotion_plugin.models import cache_folder, load_model
    from sae_emotion_plugin.plugin import load_dictionary
    from sae_emotion_plugin.rated_texts import read_ratings

    over_references = ReferenceMargins.load(margins) if margins else None
    rated = read_ratings(ratings) if ratings else None
    sae = load_dictionary(dictionary, layer=layer)
    hooked = load_model(model)
    shared: dict[str, Any] = {"skip_rare": skip_rare, "seed": seed, "cache": cache_folder() / "codes"}
    discovery = run(hooked, sae, texts, others, pooling=pooling, emotions=emotions or None, top=top, **shared)
    scores, shown = discovery.scores, []
    written = [scores.save(out)]
    if not scores_only:
        from sae_emotion_plugin.discovery_study import METHODS, examine
        from sae_emotion_plugin.pages.discovery import write_discovery_page
        from sae_emotion_plugin.pages.discovery_summary import headline

        found = examine(
            *(hooked, sae, discovery),
            **shared,
            title=f"{page_name(dictionary)} on {train.name}",
            methods=methods or METHODS,
            permutations=permutations,
            candidates=candidates,
            scan=not no_layers,
            margins=over_references,
            ratings=rated,
            others=others_by_name,
        )
        shown = [found.methods, found.specificity, found.ranks, found.ratings, *found.transfers.values()]
        shown.append(headline(found.content))
        written += [found.save(out.with_name("evidence.json")), write_discovery_page(page, found.content)]
    if as_json:
        click.echo(json.dumps(scores.to_dict(), ensure_ascii=False))
    else:
        click.echo(repr(scores))
        click.echo(f"mean held-out AUROC of the best feature: {scores.meta['mean_best_held_out_auroc']:.3f}")
        for part in filter(None, shown):
            click.echo(f"\n{part}")
    for path in written:
        click.echo(f"written to {path}", err=True)


@click.command()
@text_options
@click.option(
    "-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSON file of the scan."
)
@model_option
@click.option(
    "--dictionary",
    "dictionaries",
    multiple=True,
    help="A dictionary whose best features are scored at its layer (repeatable).",
)
@click.option("--layer", "chosen", type=int, multiple=True, help="Scan this layer (repeatable); by default all.")
@report_option
@json_option
def layers(
    train: Path,
    held_out: Path | None,
    text_column: str,
    label_column: str | None,
    single_label: bool,
    emotions: tuple[str, ...],
    skip_rare: bool,
    seed: int,
    out: Path,
    model: str,
    dictionaries: tuple[str, ...],
    chosen: tuple[int, ...],
    report: Path | None,
    as_json: bool,
) -> None:
    """Where in the model is the emotion? A linear probe at every layer, and the best feature where there is an SAE."""
    page = report or out.with_name("report.html")
    for path in (out, page):
        check_folder(path)
    texts, others = _texts(train, held_out, text_column, label_column, single_label)

    from sae_emotion_plugin.activations import hook_layer
    from sae_emotion_plugin.discovery.layer_scan import scan_layers
    from sae_emotion_plugin.emotion_texts import without_overlap
    from sae_emotion_plugin.models import cache_folder, load_model
    from sae_emotion_plugin.pages.discovery import write_discovery_page
    from sae_emotion_plugin.pages.discovery_content import DiscoveryContent
    from sae_emotion_plugin.plugin import load_dictionary

    ours, theirs = (texts, others) if others is not None else texts.split(0.5, seed)
    saes = {hook_layer(sae.cfg.metadata.hook_name or ""): sae for sae in map(load_dictionary, dictionaries)}
    scan = scan_layers(
        load_model(model),
        without_overlap(ours, theirs)[0],
        theirs,
        layers=chosen or None,
        dictionaries=saes,  # pyright: ignore[reportArgumentType] (a hook outside the blocks is refused there)
        emotions=emotions or None,
        skip_rare=skip_rare,
        seed=seed,
        cache=cache_folder() / "codes",
    )
    written = (scan.save(out), write_discovery_page(page, DiscoveryContent(f"Layers: {train.name}", layers=scan)))
    click.echo(json.dumps(scan.to_dict(), ensure_ascii=False) if as_json else repr(scan))
    for path in written:
        click.echo(f"written to {path}", err=True)


@click.command()
@click.argument("prompt")
@model_option
@click.option("--top", default=5, show_default=True, help="Likeliest tokens kept a layer and token (JSON).")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="HTML page to write, with a chart.")
@json_option
def lens(prompt: str, model: str, top: int, report: Path | None, as_json: bool) -> None:
    """What the model would say behind each layer of PROMPT, read by its own head (logit lens)."""
    if report:
        check_folder(report)

    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.text_lens import logit_lens

    found = logit_lens(load_model(model), prompt, top=top)
    if report:
        from sae_emotion_plugin.pages.discovery import write_discovery_page
        from sae_emotion_plugin.pages.discovery_content import DiscoveryContent

        write_discovery_page(report, DiscoveryContent("Logit lens", lens=found))
        click.echo(f"written to {report}", err=True)
    click.echo(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else repr(found))


@click.command()
@click.option("--feature", "features", type=int, multiple=True, help="A feature (repeatable).")
@click.option("--scores", type=click.Path(path_type=Path), help="Scores of discover: their emotions join the labels.")
@click.option("--best", default=1, show_default=True, help="Without --feature: features of each emotion in --scores.")
@click.option("--texts", type=click.Path(path_type=Path), help="Texts that show what a feature fires on.")
@click.option("--amount", default=0.1, show_default=True, help="What is added, as a fraction of the residual norm.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write.")
@model_option
@dictionary_option
@json_option
def roles(
    features: tuple[int, ...],
    scores: Path | None,
    best: int,
    texts: Path | None,
    amount: float,
    out: Path | None,
    model: str,
    dictionary: str,
    as_json: bool,
) -> None:
    """What features do when added or removed, what they fire on, and a label from that evidence."""
    if not features and scores is None:
        raise ValueError("give --feature N (repeatable) or --scores FILE (written by discover or quickstart)")
    if out:
        check_folder(out)

    from sae_emotion_plugin.discovery.scores import FeatureScores

    found = FeatureScores.load(scores) if scores else None
    if not features and found:
        features = tuple(row.feature for emotion in found.emotions for row in found.top(emotion, best))

    from sae_emotion_plugin.emotion_texts import LabelledTexts

    corpus = LabelledTexts.read(texts).texts if texts else None

    from sae_emotion_plugin.feature_roles.roles import feature_roles
    from sae_emotion_plugin.models import cache_folder, load_model
    from sae_emotion_plugin.plugin import load_dictionary
    from sae_emotion_plugin.sparse_codes import encode_texts

    sae, hooked = load_dictionary(dictionary), load_model(model)
    codes = encode_texts(hooked, sae, corpus, cache=cache_folder() / "codes") if corpus else None
    made = feature_roles(hooked, sae, list(dict.fromkeys(features)), codes=codes, scores=found, amount=amount)
    if out:
        click.echo(f"written to {made.save(out)}", err=True)
    click.echo(json.dumps(made.to_dict(), ensure_ascii=False) if as_json else repr(made))


def _texts(
    train: Path, held_out: Path | None, text_column: str, label_column: str | None, single_label: bool
) -> "tuple[LabelledTexts, LabelledTexts | None]":
    from sae_emotion_plugin.emotion_texts import LabelledTexts

    def read(path: Path) -> LabelledTexts:
        texts = LabelledTexts.read(path, text_column=text_column, label_column=label_column)
        return texts.only_single_label() if single_label else texts

    return read(train), read(held_out) if held_out else None


def _by_name(
    paths: tuple[Path, ...],
    texts: "LabelledTexts",
    text_column: str,
    label_column: str | None,
    single_label: bool,
) -> "dict[str, LabelledTexts]":
    """The other corpora by their names: folder and file. ValueError for one that shares no label with `texts`."""
    from sae_emotion_plugin.discovery.transfer import shared_names

    found = {}
    for path in paths:
        name = f"{path.resolve().parent.name}/{path.name}"
        if name in found:
            raise ValueError(f"--transfer {path} is given twice, or two corpora are called {name}")
        found[name], _ = _texts(path, None, text_column, label_column, single_label)
        if not shared_names(texts.labels, found[name].labels):
            ours, theirs = ", ".join(texts.labels), ", ".join(found[name].labels)
            raise ValueError(f"--transfer {path} shares no label with the training texts: {theirs} against {ours}")
    return found
