"""Codes and labels -> how much of each emotion one latent knows, as a loss: `LatentProbes` (arXiv 2406.04093, 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.latent_probes import latent_probe_losses, probe_loss_on
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes


@dataclass(frozen=True)
class LatentProbe:
    """The latent whose 1-d logistic probe has the least loss on the training texts, for one emotion."""

    emotion: str
    feature: int
    train_loss: float
    """Nats a text, on the texts that chose latent and probe."""
    loss: float
    """The same on held-out texts."""
    baseline_loss: float
    """There, of the predictor that says the training share of the emotion, whatever the text."""
    loss_ratio: float
    """`loss / baseline_loss`: 1 where the latent says nothing, 0 where it says all."""


@dataclass(frozen=True, repr=False)
class LatentProbes(ResultTable):
    """A row for each emotion, and in `meta` how they were found."""

    row_type = LatentProbe
    head = ("emotion", "feature", "loss, train", "held out", "of the share alone", "ratio")

    meta: dict[str, Any]
    rows: tuple[LatentProbe, ...]

    @property
    def mean_loss_ratio(self) -> float:
        return float(np.mean([row.loss_ratio for row in self.rows]))

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        caption = (
            "1-d logistic probes, the best latent of each emotion: nats a text; mean ratio of held-out losses to that "
            f"of the emotion's share alone {self.mean_loss_ratio:.3f}"
        )
        return caption, [
            (
                row.emotion,
                str(row.feature),
                *(f"{value:.4f}" for value in (row.train_loss, row.loss, row.baseline_loss)),
                f"{row.loss_ratio:.3f}",
            )
            for row in self.rows
        ]


def latent_probes(
    codes: SparseCodes,
    texts: LabelledTexts,
    held_out_codes: SparseCodes,
    held_out: LabelledTexts,
    *,
    emotions: Sequence[str],
    pooling: Pooling = "max",
) -> LatentProbes:
    """Returns each emotion's best latent by the loss of its 1-d logistic probe, fitted on `texts`, also on `held_out`.

    A latent with a high AUROC can have a poor probe (its activations tell the order and not how likely the emotion is),
    and of a rare emotion the share alone leaves little loss to take away. ValueError for an emotion in all or none of
    the training texts.
    """
    fitted = latent_probe_losses(codes.pooled(pooling), texts.label_matrix(emotions))
    found = probe_loss_on(fitted, held_out_codes.pooled(pooling), held_out.label_matrix(emotions))
    columns = (fitted.best_latent, fitted.loss, found.loss, found.baseline_loss, found.loss_ratio)
    rows = [
        LatentProbe(emotion, *values)
        for emotion, *values in zip(emotions, *(column.tolist() for column in columns), strict=True)
    ]
    meta = {
        "hook_name": codes.hook_name,
        "d_sae": codes.d_sae,
        "pooling": pooling,
        "n_texts": {"train": len(texts), "held_out": len(held_out)},
    }
    return LatentProbes(meta, tuple(rows))
