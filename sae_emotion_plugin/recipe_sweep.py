"""A recipe at many widths, from a model to a page: activations once, cell after cell, and the laws that they follow."""

import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sae_emotion_plugin.activation_store import ActivationStore, collect
from sae_emotion_plugin.activations import hook_capture
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.pages.sweep import write_sweep_page
from sae_emotion_plugin.training.checkpoints import begin_or_go_on
from sae_emotion_plugin.training.texts import first_tokens, recipe_documents
from sae_emotion_plugin.training_sweeps.cells import Shared, finished_cell, run_cell
from sae_emotion_plugin.training_sweeps.design import SweepDesign
from sae_emotion_plugin.training_sweeps.laws import scaling_laws, trends
from sae_emotion_plugin.training_sweeps.results import TrainingSweep

logger = logging.getLogger(__name__)

SAMPLE_SHARDS = 2
"""Shards of activations on which features are counted."""


def sweep_recipe(
    design: SweepDesign,
    model: Any,
    text_root: str | Path,
    out_dir: str | Path,
    *,
    texts: LabelledTexts | None = None,
    progress: bool = True,
    say: Callable[[str], None] = logger.info,
) -> TrainingSweep:
    """Every cell of the design, trained on one buffer of activations and measured, and the laws that they follow.

    `out_dir` gets `cells/` (a dictionary that plain SAELens loads and a JSON file for each cell, kept as soon as it is
    done), `work/` (activations, and the checkpoints of the cell at work), and in the end `sweep.json` and `index.html`.
    The same call goes on after an interruption, within a cell too, and ends with what an uninterrupted one gives. A
    training that diverges is a result: its cell says so.

    Args:
        texts: labelled texts for the AUROC, half of them to choose latents and half to score them; by default the
            bundled English ones.
        say: gets a line about each cell.

    Raises:
        ValueError, FileNotFoundError: `out_dir` holds a sweep of another design (what differs is named) or other
            files, a text file is missing, the model lacks the hook, a k is above a width, or there are fewer tokens
            than one batch.
    """
    recipe = design.recipe
    out_dir = Path(out_dir)
    _check_out(out_dir)
    # Of one token, so that a k above a width is refused before anything is read.
    d_in = hook_capture(model, recipe.hook_name)(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    cells = design.cells(d_in)
    training, held_out, sources = recipe_documents(recipe, model, Path(text_root))
    training = first_tokens(model, training, design.tokens)
    work, folder = out_dir / "work", out_dir / "cells"
    for path in (work, folder):
        path.mkdir(parents=True, exist_ok=True)
    hashes = {source["path"]: source["sha256"] for source in sources}
    begun = out_dir / "design.json"
    settings = {**design.settings(), "texts": hashes, "model": model_identity(model)}
    if begun.is_file():
        begin_or_go_on(begun, settings)  # refused before anything is collected
    store = collect(recipe, model, training, work, progress)
    if len(store) < recipe.batch_size:
        raise ValueError(f"{len(store)} tokens are fewer than one batch of {recipe.batch_size}: more texts are needed")
    begin_or_go_on(begun, settings)
    shards = sorted((work / f"activations-{store.key}").glob("[0-9]*.npy"))[:SAMPLE_SHARDS]
    choosing, scoring = (LabelledTexts.bundled("en") if texts is None else texts).split(0.5, recipe.seed)
    shared = Shared(
        model,
        design,
        store,
        ActivationStore(shards, store.key),
        held_out[:: max(1, len(held_out) // design.held_out_texts)],
        sources,
        without_overlap(choosing, scoring)[0],
        scoring,
    )
    rows = []
    for number, cell in enumerate(cells, start=1):
        row = finished_cell(cell, shared, folder)
        if row is None:
            say(f"cell {number} of {len(cells)}: {cell.name} ...")
            row = run_cell(cell, shared, folder, work, progress)
        rows.append(row)
    say("fitting scaling laws ...")
    meta = {
        "recipe": recipe.name,
        "architecture": recipe.architecture,
        "model": model_identity(model)["name"],
        "hook_name": recipe.hook_name,
        "d_in": d_in,
        "training_tokens": len(store),
        "batch_size": recipe.batch_size,
        "activations": store.key,
        "held_out_texts": len(shared.held_out),
        "tokens_for_dead_features": len(shared.sample),
        "labelled_texts": {"choosing": len(shared.choosing), "scoring": len(scoring)},
        "seeds": list(design.seeds),
        "versions": {name: metadata.version(name) for name in ("sae-emotion-plugin", "sae-lens", "torch")},
    }
    sweep = TrainingSweep(meta, tuple(rows), scaling_laws(rows, d_in), trends(rows))
    sweep.save(out_dir / "sweep.json")
    write_sweep_page(out_dir / "index.html", sweep)
    return sweep


def _check_out(out_dir: Path) -> None:
    """ValueError for a file, and for a folder that holds anything but a sweep."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file: choose a folder")
    others = sorted({path.name for path in out_dir.glob("*")} - {"cells", "work"})
    if others and not (out_dir / "design.json").is_file():
        raise ValueError(f"{out_dir} holds {others[0]}, and no sweep: choose a folder that does not exist")
