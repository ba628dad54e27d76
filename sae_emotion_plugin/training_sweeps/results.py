"""`TrainingSweep`: the cells of a sweep beside each other, and the laws that they follow."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_emotion_plugin.evidence.scaling_laws import Estimate, ScalingLaw
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.result_table import ResultTable


@dataclass(frozen=True)
class SweepCell:
    """One training and what came of it; figures are None where it diverged."""

    name: str
    expansion: float
    d_sae: int
    k: int | None
    l1: float | None
    lr: float
    """Peak learning rate that was used."""
    seed: int
    tokens: int = 0
    """Training tokens seen, epochs counted."""
    fvu: float | None = None
    """Fraction of variance unexplained on held-out texts."""
    loss_recovered: float | None = None
    """Share of the cross-entropy that mean-ablation destroys and the reconstruction keeps, on held-out texts."""
    l0: float | None = None
    dead_share: float | None = None
    """Share of the features that fire on none of a sample of the training tokens."""
    auroc: float | None = None
    """Held-out AUROC of the best single latent of each emotion, mean over emotions."""
    random_auroc: float | None = None
    """The same of random directions: as many, firing as often."""
    margin: float | None = None
    """The first minus the second."""
    margin_low: float | None = None
    """Ends of its interval over held-out texts."""
    margin_high: float | None = None
    note: str = ""
    """What went wrong."""
    curve: tuple[tuple[int, float], ...] = ()
    """Tokens and FVU of the batch, while training."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SweepCell":
        """The cell that `to_dict` gave, through JSON."""
        return cls(**{**data, "curve": tuple((int(tokens), float(fvu)) for tokens, fvu in data["curve"])})

    @property
    def sparsity(self) -> str:
        """What its L0 comes from, as words: `k 32`."""
        return f"k {self.k}" if self.k is not None else f"L1 {self.l1:g}" if self.l1 is not None else "as in the recipe"


@dataclass(frozen=True, repr=False)
class TrainingSweep(ResultTable):
    """All cells, the narrow ones first, with scaling laws and trends."""

    row_type = SweepCell
    head = ("cell", "width", "lr", "FVU", "loss rec.", "L0", "dead", "AUROC", "random", "margin", "note")

    meta: dict[str, Any]
    rows: tuple[SweepCell, ...]
    laws: tuple[ScalingLaw, ...] = ()
    trends: tuple[Estimate, ...] = ()
    """What a doubling of the width adds, to the AUROC and to its margin over random directions."""

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: meta, rows, laws and trends."""
        laws = [law.to_dict() for law in self.laws]
        return {**super().to_dict(), "laws": laws, "trends": [asdict(one) for one in self.trends]}

    @classmethod
    def load(cls, path: str | Path) -> "TrainingSweep":
        """Returns the sweep that `save` wrote. ValueError for a file that holds something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(SweepCell.from_dict(one) for one in data["rows"])
            laws = tuple(ScalingLaw.from_dict(one) for one in data["laws"])
            return cls(dict(data["meta"]), rows, laws, tuple(Estimate(**one) for one in data["trends"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no sweep: {first_line(error)}") from None

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        caption = (
            f"{len(self.rows)} trainings on {self.meta['training_tokens']:,} tokens. AUROC: best single latent of each "
            "emotion on texts that did not choose it, mean; random: as many random directions that fire as often"
        )
        return caption, [
            (
                row.name,
                str(row.d_sae),
                f"{row.lr:.2g}",
                *(_shown(one) for one in (row.fvu, row.loss_recovered)),
                _shown(row.l0, 1),
                *(_shown(one) for one in (row.dead_share, row.auroc, row.random_auroc)),
                "-" if row.margin is None else f"{row.margin:+.3f} [{row.margin_low:+.3f}, {row.margin_high:+.3f}]",
                row.note,
            )
            for row in self.rows
        ]

    def __repr__(self) -> str:
        trends = [f"{one.name}: {one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]" for one in self.trends]
        return "\n".join([super().__repr__(), *trends, *map(str, self.laws)])


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
