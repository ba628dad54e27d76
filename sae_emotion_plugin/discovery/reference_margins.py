"""Codes of a trained dictionary and of its references -> by how much its best features tell emotions apart better.

The references (`reference_saes`) show the size of an effect. None is an empty null: the best of thousands of random
directions can read emotion too, well above an AUROC of 0.5. What is asked is how much training adds to that.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from sae_emotion_plugin.discovery.scoring import score_features
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.auroc_intervals import compare_aurocs
from sae_emotion_plugin.evidence.resampling import check_resampling, group_numbers
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes

if TYPE_CHECKING:
    pass

MEAN = "mean"
"""What stands for the emotion in the row of the mean over emotions."""
FEWEST_GROUPS = 20


@dataclass(frozen=True)
class ReferenceMargin:
    """One emotion's best features, the trained dictionary's and a reference's, on texts that did not choose them."""

    reference: str
    """Kind of the reference."""
    emotion: str
    """`mean` in the row of the mean over emotions."""
    auroc: float
    """Held-out AUROC of the trained dictionary's best feature."""
    reference_auroc: float
    """Held-out AUROC of the reference's best feature."""
    margin: float
    """The first minus the second."""
    low: float
    """Lower end of the margin's interval."""
    high: float
    """Upper end of the margin's interval."""
    feature: int | None
    """The trained dictionary's best feature; None in the row of the mean."""
    reference_feature: int | None
    """The reference's best feature; None in the row of the mean."""


@dataclass(frozen=True, repr=False)
class ReferenceMargins(ResultTable):
    """For each reference the margin of each emotion and of their mean, and in `meta` how they were found."""

    row_type = ReferenceMargin
    head = ("reference", "emotion", "trained", "reference", "margin")

    meta: dict[str, Any]
    rows: tuple[ReferenceMargin, ...]

    @property
    def references(self) -> tuple[str, ...]:
        """The references, in order."""
        return tuple(dict.fromkeys(row.reference for row in self.rows))

    def of(self, reference: str, emotion: str = MEAN) -> ReferenceMargin:
        """Returns the row of a reference and an emotion, or of the mean over emotions. ValueError if there is none."""
        for row in self.rows:
            if (row.reference, row.emotion) == (reference, emotion):
                return row
        emotions = dict.fromkeys(row.emotion for row in self.rows)
        raise ValueError(
            f"no margin over {reference!r} for {emotion!r} (valid: {', '.join(self.references)}; {', '.join(emotions)})"
        )

    @classmethod
    def load(cls, path: str | Path) -> "ReferenceMargins":
        """Returns the margins that `save` wrote. ValueError for a file that holds something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            margins = cls(dict(content["meta"]), tuple(ReferenceMargin(**row) for row in content["rows"]))
            repr(margins)  # reads what the page will read
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no margins: {first_line(error)}") from None
        return margins

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        summary = (
            f"held-out AUROC of the best features, trained and reference; margin with its {self.meta['level']:.0%} "
            f"interval over {self.meta['n_groups']} groups of held-out texts. References are no empty nulls: they "
            "can read emotion too"
        )
        return summary, [
            (
                row.reference,
                row.emotion,
                f"{row.auroc:.3f}",
                f"{row.reference_auroc:.3f}",
                f"{row.margin:+.3f} [{row.low:+.3f}, {row.high:+.3f}]",
            )
            for row in self.rows
        ]


def reference_margins(
    codes: Mapping[str, SparseCodes],
    held_out_codes: Mapping[str, SparseCodes],
    texts: LabelledTexts,
    held_out: LabelledTexts,
    *,
    trained: str = "trained",
    emotions: Sequence[str] | None = None,
    pooling: Pooling = "max",
    groups: Sequence[Hashable] | np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> ReferenceMargins:
    """Returns the margin of the dictionary `trained` over every other one in `codes`, for each emotion and on average.

    Each dictionary's best feature of an emotion is the one with the highest AUROC on `texts`; what is compared is its
    AUROC on `held_out`. The interval is a studentised bootstrap over groups of held-out texts with the same draws for
    both dictionaries (`compare_aurocs`): it covers other texts of this kind, not another training seed.

    Args:
        codes: of `texts`, by the dictionary's name; `held_out_codes` those of `held_out` under the same names.
        groups: what varies independently, a name for each held-out text (its document); by default groups of
            near-duplicates.

    Raises:
        ValueError: names that differ, no reference, an emotion with fewer than 20 groups in or out of class in
            `held_out`, and what `score_features` refuses.
    """
    if trained not in codes:
        raise ValueError(f"no codes named {trained!r} (valid: {', '.join(codes)})")
    names = [trained, *(name for name in codes if name != trained)]
    if len(names) < 2:
        raise ValueError(f"no reference beside {trained!r}: a margin needs codes of at least one")
    if set(names) != set(held_out_codes):
        raise ValueError(f"the held-out codes are of {', '.join(held_out_codes)}, the others of {', '.join(names)}")
    check_resampling(level, resamples)
    member = np.asarray(held_out.duplicate_groups) if groups is None else group_numbers(groups, len(groups))
    if len(member) != len(held_out):
        raise ValueError(f"{len(held_out)} held-out texts, but {len(member)} groups")
    values, best, chosen = {}, {}, ()
    for name in names:
        scores = score_features(
            codes[name], texts, held_out=(held_out_codes[name], held_out), pooling=pooling, top=1, emotions=emotions
        )
        chosen, best[name] = scores.emotions, [row.feature for row in scores.rows]
        values[name] = held_out_codes[name].pooled(pooling).tocsc()[:, best[name]].toarray()
    labels = held_out.label_matrix(chosen)
    _check_groups(labels, member, chosen)
    rows = []
    for name in names[1:]:
        features: list[tuple[int | None, int | None]] = [(None, None), *zip(best[trained], best[name], strict=True)]
        columns = [list(range(len(chosen))), *([column] for column in range(len(chosen)))]
        for emotion, column, pair in zip((MEAN, *chosen), columns, features, strict=True):
            found = compare_aurocs(
                values[trained][:, column],
                values[name][:, column],
                labels[:, column],
                margin=0.0,
                groups=member,
                level=level,
                resamples=resamples,
                seed=seed,
            )
            ends = found.difference, found.low, found.high
            rows.append(ReferenceMargin(name, emotion, found.first, found.second, *ends, *pair))
    meta = {
        "trained": trained,
        "emotions": list(chosen),
        "pooling": pooling,
        "level": level,
        "resamples": resamples,
        "seed": seed,
        "n_texts": {"train": len(texts), "held_out": len(held_out)},
        "n_groups": len(np.unique(member)),
        "d_sae": {name: codes[name].d_sae for name in names},
    }
    return ReferenceMargins(meta, tuple(rows))


def _check_groups(
    labels: Bool[np.ndarray, "text emotion"], member: Int[np.ndarray, "text"], emotions: Sequence[str]
) -> None:
    few = []
    for emotion, positive in zip(emotions, labels.T, strict=True):
        n_in, n_out = (len(np.unique(member[side])) for side in (positive, ~positive))
        if min(n_in, n_out) < FEWEST_GROUPS:
            few.append(f"{emotion} ({n_in} in, {n_out} out)")
    if few:
        raise ValueError(f"too few groups of held-out texts for {', '.join(few)}: at least {FEWEST_GROUPS} are needed")
