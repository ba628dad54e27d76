"""How good the judges are: AUROC on labelled texts, and the table of all judges on the generations of a model."""

import html
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from sae_emotion_plugin.judges.figures import auroc_figure
from sae_emotion_plugin.judges.judge import VALENCE, Figure, Judge
from sae_emotion_plugin.judges.names import judge_language, judge_names, load_judge, stored_figures
from sae_emotion_plugin.judges.profanity import is_profane

if TYPE_CHECKING:
    import pandas

EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
"""What the generations were labelled for."""
GENERATIONS = "generations"
PROFANITY_FREE = "generations without profanity"
_COLUMNS = ("judge", "language", "measure", "on", "auroc", "low", "high", "n_positive", "n")


@dataclass(frozen=True)
class LabelledGeneration:
    """A continuation by the embedded model and its labels, given blind by a single annotator, a language model."""

    id: str
    prompt: str
    text: str
    labels: tuple[str, ...]
    """Of `EMOTIONS`; none means no emotion."""
    valence: int
    """1 pleasant, -1 unpleasant, 0 neither or both."""
    condition: dict[str, Any]
    """What it was steered towards, hidden while labelling: `towards` (None: unsteered), features, amount, seed."""


@dataclass(frozen=True)
class JudgeQuality:
    """Figures of one judge."""

    judge: str
    language: str
    figures: tuple[Figure, ...]
    note: str = ""
    """Why there are no figures on generations, where there are none."""


@dataclass(frozen=True)
class QualityTable:
    """The figures of all judges: on held-out texts, as stored when fitted, and on generations, measured now."""

    judges: tuple[JudgeQuality, ...]
    about_generations: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_pandas(self) -> "pandas.DataFrame":
        """One line a figure."""
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=list(_COLUMNS))

    def __repr__(self) -> str:
        lines = [f"{'judge':<16} {'':<2} {'measure':<12} {'AUROC':>6} {'95 % interval':<16} {'positives':>12}  on"]
        for row in self._rows():
            interval = "" if row["auroc"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
            auroc = "-" if row["auroc"] is None else f"{row['auroc']:.3f}"
            counts = f"{row['n_positive']} of {row['n']}"
            lines.append(
                f"{row['judge']:<16} {row['language']:<2} {row['measure']:<12} {auroc:>6} {interval:<16} "
                f"{counts:>12}  {row['on']}"
            )
        lines += [f"{one.judge}: {one.note}" for one in self.judges if one.note]
        lines.append("-: fewer than 10 on a side, or in fewer than 5 groups. Valence: positive against negative texts.")
        lines.append(self.about_generations)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(escape=True, index=False, na_rep="-", float_format="{:.3f}".format)
        notes = "".join(f"<p>{html.escape(f'{one.judge}: {one.note}')}</p>" for one in self.judges if one.note)
        return f"{table}{notes}<p>{html.escape(self.about_generations)}</p>"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"judge": one.judge, "language": one.language, **asdict(figure)}
            for one in self.judges
            for figure in one.figures
        ]


def labelled_generations() -> tuple[LabelledGeneration, ...]:
    """The 240 labelled continuations that come with the package; `generations_facts` says how they were made."""
    text = (files("sae_emotion_plugin") / "data" / "labelled_generations.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple(LabelledGeneration(**{**row, "labels": tuple(row["labels"])}) for row in rows)


def generations_facts() -> dict[str, Any]:
    """How the labelled continuations were made, and who or what labelled them."""
    return json.loads((files("sae_emotion_plugin") / "data" / "labelled_generations.json").read_text(encoding="utf-8"))


def quality(
    judge: Judge,
    texts: Sequence[str],
    labels: Sequence[Sequence[str]],
    *,
    valence: Sequence[int] | None = None,
    groups: Sequence[Hashable] | None = None,
    emotions: Sequence[str] = EMOTIONS,
    on: str = "texts",
    profanity_free: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Figure, ...]:
    """AUROC of the judge for each of `emotions` that it knows, and for valence: positive against negative texts.

    Args:
        labels: the emotions of each text.
        valence: the sign of each text; those with 0 have no part in valence's figure.
        groups: what varies independently, one name a text (its prompt, its document); by default each text.
        profanity_free: look at the texts without profanity only.

    Raises:
        ValueError: unequal lengths, or texts that the judge refuses. Too few positives are no error: the figure's
            AUROC is None then.
    """
    if len(labels) != len(texts) or (valence is not None and len(valence) != len(texts)):
        raise ValueError(f"{len(texts)} texts, {len(labels)} label sets and {len(valence or texts)} valences")
    if groups is not None and len(groups) != len(texts):
        raise ValueError(f"{len(texts)} texts, but {len(groups)} groups")
    judged = judge(texts)
    clean = np.array([not (profanity_free and is_profane(text)) for text in texts])
    members = list(range(len(texts))) if groups is None else list(groups)

    def figure(measure: str, positives: Bool[np.ndarray, "text"], kept: Bool[np.ndarray, "text"]) -> Figure:
        chosen = [members[place] for place in np.flatnonzero(kept)]
        scores = judged.of(measure)[kept]
        return auroc_figure(measure, on, scores, positives[kept], chosen, resamples=resamples, seed=seed)

    figures = [
        figure(emotion, np.array([emotion in one for one in labels]), clean)
        for emotion in emotions
        if emotion in judge.emotions
    ]
    if valence is not None and judge.has_valence:
        signs = np.array(valence)
        figures.append(figure(VALENCE, signs > 0, clean & (signs != 0)))
    return tuple(figures)


def generation_quality(judge: Judge, *, profanity_free: bool = False, resamples: int = 1000) -> tuple[Figure, ...]:
    """The judge's figures on the labelled continuations, prompts resampled as a whole."""
    rows = [row for row in labelled_generations() if row.text.strip()]
    return quality(
        judge,
        [row.text for row in rows],
        [row.labels for row in rows],
        valence=[row.valence for row in rows],
        groups=[row.prompt for row in rows],
        on=PROFANITY_FREE if profanity_free else GENERATIONS,
        profanity_free=profanity_free,
        resamples=resamples,
    )


def quality_table(
    names: Iterable[str] | None = None,
    *,
    load: Callable[[str], Judge] = load_judge,
    resamples: int = 1000,
) -> QualityTable:
    """The figures of the judges `names`, by default all that come with the package.

    Held-out figures are those stored when a judge was fitted; those on generations are computed here, for English
    judges. A judge whose extra is not installed has its stored figures, and a note that names the extra.
    """
    rows = labelled_generations()
    profane = sum(is_profane(row.text) for row in rows)
    kinds = (False, True) if profane else (False,)  # the same texts need no second set of figures
    judges = []
    for name in judge_names() if names is None else names:
        try:
            judge = load(name)
        except ImportError as error:
            judges.append(JudgeQuality(name, judge_language(name), stored_figures(name), str(error)))
            continue
        if judge.language not in ("en", "und"):
            note = "the labelled generations are English"
            judges.append(JudgeQuality(judge.name, judge.language, judge.figures, note))
            continue
        live = [
            figure
            for profanity_free in kinds
            for figure in generation_quality(judge, profanity_free=profanity_free, resamples=resamples)
        ]
        judges.append(JudgeQuality(judge.name, judge.language, (*judge.figures, *live)))
    about = (
        f"Of {len(rows)} generations {profane} are profane. They were labelled by: {generations_facts()['labelled_by']}"
    )
    return QualityTable(tuple(judges), about)
