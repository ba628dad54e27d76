"""The model card of a published release: what is recorded in its files, and how to load and steer with it.

Every figure comes from a file of the release; what no file says is not said. Texts of others are escaped.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from sae_emotion_plugin.feature_labels import FeatureLabel
from sae_emotion_plugin.registry import RegistryEntry, SaeRecord

LABELS_PER_EMOTION = 3
CURVE_POINTS = 12
TAGS = ("saelens", "sparse-autoencoder", "mechanistic-interpretability", "emotion", "steering")
LICENCES = {
    **{name: name for name in ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0")},
    **{name: name for name in ("bsd-2-clause", "bsd-3-clause", "gemma", "openrail", "gpl-3.0", "unlicense")},
    "cc0": "cc0-1.0",
    "cc by 4.0": "cc-by-4.0",
    "cc0 1.0": "cc0-1.0",
}
"""Names of licences, in small letters, that the Hub has an identifier for; any other is `other` with its name."""


@dataclass(frozen=True)
class CardSources:
    """What is known of one dictionary of the release; empty where its files are not at hand."""

    config: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[FeatureLabel] = ()


def model_card(
    entry: RegistryEntry,
    sources: Mapping[str, CardSources],
    *,
    licence: str | None = None,
    datasets: Sequence[str] | None = None,
) -> str:
    """The text of README.md for the release in `entry.repo_id`, or of one that lies in a folder yet: YAML, Markdown.

    Args:
        sources: by the id of the dictionary.
        licence: identifier or name; by default the one in the entry's provenance.
        datasets: identifiers on the Hub; by default the corpora that the provenance of the dictionaries names.
    """
    sections = [
        _heading(entry, sources),
        _how_to_load(entry),
        _metrics(entry, sources),
        _curves(entry, sources),
        _emotions(entry, sources),
        _how_to_steer(entry, sources),
        _limits(entry, sources),
        _made_from(entry, sources, licence),
    ]
    return _metadata(entry, sources, licence, datasets) + "\n" + "\n\n".join(part for part in sections if part) + "\n"


def markdown(text: object) -> str:
    """The text as it stands, in one line: neither HTML nor Markdown nor a link, whatever it holds."""
    line = " ".join("".join(one if one.isprintable() else " " for one in str(text)).split())
    line = re.sub(r"([\\`*_{}\[\]()#+!|~^$-])", r"\\\1", html.escape(line))
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def _metadata(
    entry: RegistryEntry, sources: Mapping[str, CardSources], licence: str | None, datasets: Sequence[str] | None
) -> str:
    licence = licence or entry.provenance.licence
    identifier = LICENCES.get((licence or "").strip().lower())
    values: dict[str, Any] = {"library_name": "saelens", "base_model": entry.model, "tags": list(TAGS)}
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", entry.model, re.ASCII):
        del values["base_model"]  # a folder's or a file's name is no model on the Hub, and fails the upload
    if identifier:
        values["license"] = identifier
    elif licence:
        values |= {"license": "other", "license_name": _slug(licence)}
    if named := list(datasets if datasets is not None else _corpora(sources)):
        values["datasets"] = named
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)}---\n"


def _slug(licence: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.")[:60].strip("-.") or "other"


def _texts(sources: Mapping[str, CardSources]) -> list[Mapping[str, Any]]:
    found = [text for source in sources.values() for text in source.provenance.get("texts") or ()]
    return [text for text in found if isinstance(text, Mapping) and isinstance(text.get("path"), str)]


def _corpora(sources: Mapping[str, CardSources]) -> list[str]:
    names = (text["path"].split("/")[0].split(".")[0] for text in _texts(sources))
    return [name for name in dict.fromkeys(names) if re.fullmatch(r"[A-Za-z0-9][\w-]{0,95}", name, re.ASCII)]


def _heading(entry: RegistryEntry, sources: Mapping[str, CardSources]) -> str:
    many = "a sparse autoencoder" if len(entry.saes) == 1 else f"{len(entry.saes)} sparse autoencoders"
    labelled = any(source.labels for source in sources.values())
    more = ", with labels of features that tell emotions" if labelled else ""
    line = f"{many[0].upper()}{many[1:]} of {markdown(entry.model)}, in SAELens's format{more}."
    return f"# {markdown(entry.release)}\n\n{line}"


def _how_to_load(entry: RegistryEntry) -> str:
    sae = entry.saes[0]
    if not entry.repo_id:
        return """## How to load

Plain SAELens, from the folder of this file:

```python
from sae_lens import SAE

sae = SAE.load_from_disk("FOLDER")
```

`sae-emotion registry add FOLDER` makes it load by name, `sae-emotion publish hub FOLDER owner/repo` publishes it."""
    return f"""## How to load

Plain SAELens:

```python
from sae_lens import SAE

sae = SAE.from_pretrained({entry.repo_id!r}, {sae.id!r})
```

With every file checked against its SHA-256, and the labels there are:

```bash
pip install sae-emotion-plugin
sae-emotion registry add {entry.repo_id}
```

```python
from sae_emotion_plugin import load_dictionary

sae = load_dictionary({f"{entry.release}/{sae.id}"!r})
```"""


_FIGURES = (
    ("features", "d_sae", "d"),
    ("inputs", "d_in", "d"),
    ("L0", "l0", ".1f"),
    ("variance explained", "variance_explained", ".3f"),
    ("without the largest dimension", "without_largest", ".3f"),
    ("cross-entropy recovered", "recovered", ".3f"),
    ("features that never fired", "dead", "d"),
    ("held-out tokens", "n_tokens", "d"),
)


def _metrics(entry: RegistryEntry, sources: Mapping[str, CardSources]) -> str:
    rows = [_figures(sae, sources.get(sae.id, CardSources())) for sae in entry.saes]
    shown = [one for one in _FIGURES if any(row.get(one[1]) is not None for row in rows)]
    if not shown:
        return ""
    lines = [
        [markdown(sae.id), *(_number(row.get(key), form) for _, key, form in shown)]
        for sae, row in zip(entry.saes, rows, strict=True)
    ]
    return "## Measured\n\n" + _table(["dictionary", *(name for name, _, _ in shown)], lines)


def _figures(sae: SaeRecord, source: CardSources) -> dict[str, float | int | None]:
    report = {key: value for key, value in source.report.items() if _is_number(value)}
    values: dict[str, float | int | None] = {"l0": sae.l0, "variance_explained": sae.variance_explained}
    values |= {key: value for key, value in source.config.items() if key in ("d_in", "d_sae") and _is_number(value)}
    values |= {key: report[key] for key in ("d_sae", "l0", "dead", "n_tokens") if key in report}
    if "fvu" in report:
        values["variance_explained"] = 1 - report["fvu"]
    if "fvu_without_largest_dimension" in report:
        values["without_largest"] = 1 - report["fvu_without_largest_dimension"]
    floor, spliced, own = (report.get(f"cross_entropy{part}", 0.0) for part in ("_mean_ablated", "_spliced", ""))
    if {"cross_entropy", "cross_entropy_spliced", "cross_entropy_mean_ablated"} <= report.keys() and floor != own:
        values["recovered"] = (floor - spliced) / (floor - own)
    return values


def _curves(entry: RegistryEntry, sources: Mapping[str, CardSources]) -> str:
    """Tables of what training recorded on its way (`provenance.json`: training, curve); empty where nothing was."""
    parts = []
    for sae in entry.saes:
        training = sources.get(sae.id, CardSources()).provenance.get("training")
        curve = training.get("curve") if isinstance(training, Mapping) else None
        points = [point for point in curve or () if isinstance(point, Mapping)] if isinstance(curve, list) else []
        if not points:
            continue
        step = max(1, -(-len(points) // CURVE_POINTS))
        kept = [*points[:-1:step], points[-1]]
        names = list(dict.fromkeys(str(name) for point in kept for name in point))
        lines = [[_number(point.get(name), ".4g") for name in names] for point in kept]
        parts.append(f"{markdown(sae.id)}:\n\n" + _table([markdown(name) for name in names], lines))
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _emotions(entry: RegistryEntry, sources: Mapping[str, CardSources]) -> str:
    parts = []
    for sae in entry.saes:
        labels = sources.get(sae.id, CardSources()).labels
        by_emotion: dict[str, list[FeatureLabel]] = {}
        for label in labels:
            for emotion in label.emotions[:1]:
                by_emotion.setdefault(emotion, []).append(label)
        lines = []
        for emotion, found in sorted(by_emotion.items()):
            for label in sorted(found, key=_strength)[:LABELS_PER_EMOTION]:
                figures = [_number(label.statistics.get(name), form) for name, form in _STATISTICS.items()]
                lines.append([markdown(emotion), str(label.feature), markdown(label.text), *figures])
        if lines:
            total = f"{markdown(sae.id)}: {len(labels)} labels by {_authors(labels)} in `labels/`"
            head = ["emotion", "feature", "label", "AUROC", "held out", "q"]
            parts.append(f"{total}; up to {LABELS_PER_EMOTION} for each emotion here.\n\n" + _table(head, lines))
    return "## Emotions\n\n" + "\n\n".join(parts) if parts else ""


_STATISTICS = {"auroc": ".3f", "held_out_auroc": ".3f", "q": ".2g"}


def _strength(label: FeatureLabel) -> tuple[float, int]:
    found = [label.statistics.get(name) for name in ("held_out_auroc", "auroc")]
    return -next((value for value in found if isinstance(value, float | int)), 0.0), label.feature


def _authors(labels: Sequence[FeatureLabel]) -> str:
    names = list(dict.fromkeys(label.author for label in labels if label.author.strip()))
    return (
        ", ".join(markdown(name) for name in names[:5]) + (" and others" if len(names) > 5 else "") or "unnamed authors"
    )


def _how_to_steer(entry: RegistryEntry, sources: Mapping[str, CardSources]) -> str:
    for sae in entry.saes:
        labels = [label for label in sources.get(sae.id, CardSources()).labels if label.emotions]
        if labels:
            best = min(labels, key=_strength)
            return f"""## How to steer

Feature {best.feature} is labelled {markdown(best.emotions[0])}; a tenth of the mean residual norm of it is added:

```python
from sae_emotion_plugin import SteeringPlan, load_dictionary, load_model, mean_norm, steering

model, sae = load_model({entry.model!r}), load_dictionary({f"{entry.release}/{sae.id}"!r})
norm = mean_norm(model, ["He is such a"], sae.cfg.metadata.hook_name)
with steering(model, sae, SteeringPlan.of({{{best.feature}: 0.1}}, sae, residual_norm=norm)):
    print(model.generate("He is such a", max_new_tokens=20))
```"""
    return ""


def _limits(entry: RegistryEntry, sources: Mapping[str, CardSources]) -> str:
    lines = [
        "A label says which texts a feature tells apart in the corpus it was measured on. It does not say that the "
        "model feels anything, nor that the feature does the same elsewhere.",
        "How well a feature tells an emotion and what steering with it does are different questions: look at what "
        "is generated before relying on it.",
    ]
    for sae in entry.saes:
        figures = _figures(sae, sources.get(sae.id, CardSources()))
        lost, recovered = figures.get("variance_explained"), figures.get("recovered")
        if lost is not None:
            told = "" if recovered is None else f", and {1 - recovered:.1%} of the cross-entropy between mean and model"
            lines.append(f"{markdown(sae.id)} loses {1 - lost:.1%} of the variance of its inputs{told}.")
    if entry.provenance.notes:
        lines.append(f"Trained on: {markdown(entry.provenance.notes)}. Other weights of that model may differ.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _made_from(entry: RegistryEntry, sources: Mapping[str, CardSources], licence: str | None) -> str:
    lines = []
    texts = list({str(text["path"]): text for text in _texts(sources)}.values())
    if texts:
        rows = [
            [markdown(text["path"]), markdown(text.get("licence", "")), _number(text.get("training_texts"), "d")]
            for text in texts
        ]
        lines.append(_table(["texts", "licence", "used for training"], rows))
    elif entry.provenance.texts:
        lines.append(f"Texts: {markdown(entry.provenance.texts)}.")
    if entry.provenance.model_sha256:
        lines.append(f"SHA-256 of the model's file: `{entry.provenance.model_sha256}`.")
    if named := licence or entry.provenance.licence:
        lines.append(f"Licence: {markdown(named)}.")
    if not entry.repo_id:
        lines.append("`provenance.json` has the SHA-256 of every text, the seed and the versions.")
    else:
        lines.append("`registry.yaml` has the SHA-256 of every file; `pretrained_saes.yaml` is the stanza for SAELens.")
    return "## Made from\n\n" + "\n\n".join(lines)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e300


def _number(value: Any, form: str) -> str:
    if not _is_number(value):
        return "-" if value is None or not isinstance(value, str) else markdown(value)
    return format(int(value), ",") if form == "d" else format(value, form)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
