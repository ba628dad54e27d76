"""One cell of a sweep: trained on the shared activations, measured, and kept in files of its own, whole or not."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_emotion_plugin.activation_store import ActivationStore, content_key
from sae_emotion_plugin.discovery.reference_margins import reference_margins
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.reference_saes import TRAINED, encode_beside, firing_counts, random_directions_sae
from sae_emotion_plugin.training.dictionaries import TrainedDictionary, write_dictionary
from sae_emotion_plugin.training.fitting import fit_recipe, loop_settings
from sae_emotion_plugin.training.steps import TrainingDiverged
from sae_emotion_plugin.training_sweeps.design import Cell, SweepDesign
from sae_emotion_plugin.training_sweeps.results import SweepCell

RANDOM = "random-directions"
"""The reference beside each dictionary: as wide, and firing as often."""


@dataclass(frozen=True)
class Shared:
    """What every cell of a sweep reads."""

    model: Any
    design: SweepDesign
    store: ActivationStore
    sample: ActivationStore
    """Some of the same activations, on which features are counted as dead."""
    held_out: list[str]
    sources: list[dict[str, Any]]
    choosing: LabelledTexts
    """Texts on which the best latent of each emotion is chosen."""
    scoring: LabelledTexts
    """Texts on which it is scored."""

    @cached_property
    def evaluation(self) -> Evaluation:
        """The held-out texts, which the model reads once for all cells."""
        return Evaluation(self.model, self.held_out, loss_tokens=self.design.loss_tokens, progress=False)

    def key(self, cell: Cell) -> str:
        """A hash of all that the cell depends on, apart from versions."""
        labelled = [[list(part.texts), [list(one) for one in part.emotions]] for part in (self.choosing, self.scoring)]
        counts = (self.design.loss_tokens, len(self.sample))
        return content_key(cell.recipe.to_yaml(), self.store.key, self.held_out, labelled, counts)


def finished_cell(cell: Cell, shared: Shared, folder: Path) -> SweepCell | None:
    """The cell that an earlier run kept in `folder`; None where there is none, or it holds something else."""
    try:
        record = json.loads(_file(cell, folder).read_text(encoding="utf-8"))
        return SweepCell.from_dict(record["cell"]) if record["key"] == shared.key(cell) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_cell(cell: Cell, shared: Shared, folder: Path, work: Path, progress: bool = True) -> SweepCell:
    """The cell, trained and measured; its dictionary is `folder/<name>`, and `folder/<name>.json` is written last.

    A training that was killed goes on from its last checkpoint in `work`.
    """
    own_work = work / cell.name
    own_work.mkdir(parents=True, exist_ok=True)
    record: Mapping[str, Any] = {}
    try:
        trained = _trained(cell, shared, folder / cell.name, own_work, progress)
        record = trained.provenance()
        found = _measured(cell, shared, trained, record, progress)
        hashes = trained.sha256
    except TrainingDiverged as error:
        # Without where the checkpoint lies: it goes with the other ones.
        found, hashes = _row(cell, shared, note="; ".join(first_line(error).split("; ")[:2])), {}
    kept = {
        "key": shared.key(cell),
        "cell": found.to_dict(),
        "recipe": cell.recipe.to_yaml(),
        "sha256": hashes,
        "activations": shared.store.key,
        "versions": record.get("versions", {}),
        "model": model_identity(shared.model),
    }
    # Checkpoints are several times the dictionary, which is whole by now; they go before the cell counts as done.
    shutil.rmtree(own_work, ignore_errors=True)
    write_whole(_file(cell, folder), json.dumps(kept, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return found


def _file(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.json"


def _trained(cell: Cell, shared: Shared, folder: Path, work: Path, progress: bool) -> TrainedDictionary:
    if folder.is_dir():
        kept = TrainedDictionary.load(folder)
        if kept.recipe == cell.recipe and kept.provenance().get("activations") == shared.store.key:
            return kept
        shutil.rmtree(folder)
    name = model_identity(shared.model)["name"]
    fitted = fit_recipe(cell.recipe, shared.store, name, work, progress=progress)
    provenance = {
        "texts": shared.sources,
        "training_tokens": len(shared.store),
        "activations": shared.store.key,
        "training": fitted.record,
    }
    return write_dictionary(
        folder,
        cell.recipe,
        shared.model,
        shared.evaluation.report,
        fitted.save,
        provenance,
    )


def _measured(
    cell: Cell, shared: Shared, trained: TrainedDictionary, record: Mapping[str, Any], progress: bool
) -> SweepCell:
    from sae_lens import SAE

    sae = SAE.load_from_disk(trained.folder)
    counts = firing_counts(sae, shared.sample)
    report, curve = trained.report, record["training"].get("curve", [])
    figures: dict[str, Any] = {
        "fvu": _finite(report.fvu),
        "loss_recovered": _finite(report.loss_recovered),
        "l0": report.l0,
        "dead_share": float((counts == 0).mean()),
        "tokens": record["training"]["tokens"],
        "curve": tuple((point["tokens"], point["fvu"]) for point in curve if point.get("fvu") is not None),
    }
    random = random_directions_sae(shared.sample, counts, cell.recipe.seed, sae.cfg.metadata)
    parts = (shared.choosing, shared.scoring)
    saes = {TRAINED: sae, RANDOM: random}
    chosen, scored = (encode_beside(saes, shared.model, part, progress=False) for part in parts)
    try:
        margin = reference_margins(chosen, scored, *parts, trained=TRAINED).of(RANDOM)
    except ValueError as error:  # a dictionary that is silent on these texts is a result too
        return _row(cell, shared, **figures, note=f"no AUROC: {first_line(error)}")
    return _row(
        cell,
        shared,
        **figures,
        auroc=margin.auroc,
        random_auroc=margin.reference_auroc,
        margin=margin.margin,
        margin_low=margin.low,
        margin_high=margin.high,
    )


def _row(cell: Cell, shared: Shared, **figures: Any) -> SweepCell:
    recipe = cell.recipe
    lr = loop_settings(recipe, len(shared.store)).step.lr
    axes = {"k": recipe.k, "l1": recipe.l1_coefficient, "lr": lr, "seed": recipe.seed}
    return SweepCell(name=cell.name, expansion=cell.expansion, d_sae=recipe.d_sae, **axes, **figures)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
