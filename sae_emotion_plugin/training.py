"""A recipe -> a trained dictionary: activations collected once, then SAELens's own trainer over them.

The inputs are centred and divided by one number for training; both are folded into the saved weights, so that plain
SAELens reads a dictionary that needs to know nothing of it. Codes of the saved dictionary are in units of the
residual stream, and its decoder rows are unit vectors.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_emotion_plugin.activation_store import ActivationStore, collect, content_key
from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.evaluation import DictionaryReport, evaluate
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.recipes import TrainingRecipe, read_documents
from sae_emotion_plugin.registry import RegistryEntry
from sae_emotion_plugin.release_files import ReleaseFiles, install, trained_entry

logger = logging.getLogger(__name__)

SHUFFLED_MARK = "weights_shuffled"
"""Attribute of a model whose weights were shuffled; recipes of such references accept no other."""
FROZEN_PARTS: dict[str | None, Literal["decoder", "encoder"]] = {
    "frozen-decoder": "decoder",
    "frozen-encoder": "encoder",
}


@dataclass(frozen=True)
class TrainedDictionary:
    """A folder that plain SAELens loads, with what made it and how good it is."""

    folder: Path
    recipe: TrainingRecipe
    report: DictionaryReport
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file in the folder."""

    @classmethod
    def load(cls, folder: str | Path) -> "TrainedDictionary":
        """The dictionary that `train` wrote to `folder`. FileNotFoundError or ValueError for any other folder."""
        folder = Path(folder)
        if not (folder / "report.json").is_file():
            raise FileNotFoundError(f"no trained dictionary in {folder}: it has no report.json")
        recipe = TrainingRecipe.read(folder / "recipe.yaml")
        return cls(folder, recipe, DictionaryReport.load(folder / "report.json"), file_hashes(folder))

    def provenance(self) -> dict[str, Any]:
        """What the dictionary was made from: model, texts, versions, seed."""
        return json.loads((self.folder / "provenance.json").read_text(encoding="utf-8"))


def train(
    recipe: TrainingRecipe,
    model: Any,
    text_root: str | Path,
    out_dir: str | Path,
    *,
    work_dir: str | Path | None = None,
    loss_tokens: int = 10_000,
    progress: bool = True,
) -> TrainedDictionary:
    """The dictionary made by `recipe` from the texts under `text_root`, written to `out_dir`.

    Activations go to `work_dir` (by default `<out_dir>.work`) in shards, and training leaves checkpoints there: an
    interrupted run goes on where it was when called again. `out_dir` appears when it is complete. Two runs with one
    seed on one machine give equal weights.

    Args:
        loss_tokens: the report's cross-entropies are measured on about this many tokens (see `evaluate`).

    Raises:
        ValueError, FileNotFoundError: `out_dir` exists, a text file is missing, or the model lacks the hook.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise ValueError(f"{out_dir} exists already: choose a folder that does not")
    if recipe.reference == "random-directions":
        raise ValueError(f"{recipe.name} is of random directions, which are not trained: train_references makes it")
    if recipe.reference == "shuffled-weights" and not getattr(model, SHUFFLED_MARK, False):
        raise ValueError(f"{recipe.name} reads a model with shuffled weights: train_references makes it")
    canonical_hook(model, recipe.hook_name)
    training, held_out, sources = recipe_documents(recipe, model, Path(text_root))
    work = Path(work_dir) if work_dir else out_dir.with_name(out_dir.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    store = collect(recipe, model, training, work, progress)
    sae, mean, scale, log = _fit(recipe, store, model_identity(model)["name"], work)
    return write_dictionary(
        out_dir,
        recipe,
        model,
        held_out,
        lambda folder: _save_folded(sae, mean, scale, folder),
        {"texts": sources, "training_tokens": len(store), "training": log},
        loss_tokens=loss_tokens,
        progress=progress,
    )


def write_dictionary(
    out_dir: Path,
    recipe: TrainingRecipe,
    model: Any,
    held_out: list[str],
    save_weights: Callable[[Path], None],
    provenance: dict[str, Any],
    *,
    loss_tokens: int = 10_000,
    progress: bool = True,
) -> TrainedDictionary:
    """The dictionary whose weights `save_weights` writes, with its report, recipe and provenance; whole or not at all.

    Args:
        save_weights: writes `cfg.json` and `sae_weights.safetensors` into the folder that it is given.
        provenance: what is added to the model, the seed and the versions.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}-"))
    try:
        save_weights(scratch)
        from sae_lens import SAE

        report = evaluate(model, SAE.load_from_disk(scratch), held_out, loss_tokens=loss_tokens, progress=progress)
        report.save(scratch / "report.json")
        (scratch / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        record = {
            "model": model_identity(model),
            "held_out_documents": len(held_out),
            "versions": {
                name: metadata.version(name) for name in ("sae-lens", "torch", "transformer-lens", "transformers")
            },
            "seed": recipe.seed,
            **({"reference": recipe.reference} if recipe.reference else {}),
            **provenance,
        }
        _write_json(scratch / "provenance.json", record)
        for path in scratch.iterdir():
            path.chmod(0o644)
        scratch.chmod(0o755)
        os.replace(scratch, out_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TrainedDictionary(out_dir, recipe, report, file_hashes(out_dir))


def register_dictionary(trained: TrainedDictionary, folder: str | Path) -> RegistryEntry:
    """The registry entry of a trained dictionary, after its files were copied to `folder` and the YAML file written.

    It comes beside the other dictionaries of its release.

    Raises:
        ValueError: the release has another dictionary of that id or is of another model, or a name in the recipe
            cannot stand in a registry.
    """
    hashes = file_hashes(trained.folder)
    entry = trained_entry(trained.recipe, asdict(trained.report), trained.provenance(), hashes)
    files = {f"{trained.recipe.sae_id}/{name}": trained.folder / name for name in hashes}
    return install(ReleaseFiles(entry, files), folder)


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file directly in a folder, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


def recipe_documents(
    recipe: TrainingRecipe, model: Any, root: Path
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Training texts, held-out texts and the record of every file; whole documents on one side."""
    rng = np.random.default_rng(recipe.seed)
    training: list[str] = []
    held_out: list[str] = []
    record: list[dict[str, Any]] = []
    for source in recipe.texts:
        path = root / source.path
        documents = read_documents(path, source.document)
        names = list(documents)
        rng.shuffle(names)
        n_held_out = max(1, round(len(names) * recipe.held_out_share))
        if len(names) <= n_held_out:
            raise ValueError(f"{path} has {len(names)} documents, too few to keep one for the report")
        reserved, names = names[:n_held_out], names[n_held_out:]
        # A novel held out as a whole would drown the other sources' documents: at most 200 of its paragraphs count.
        held_out += [text for name in reserved for text in documents[name][:200]]
        texts = [text for name in names for text in documents[name]]
        if source.document:
            rng.shuffle(texts)
        if source.tokens is not None:
            texts = _first_tokens(model, texts, source.tokens)
        training += texts
        record.append(
            {
                "path": source.path,
                "licence": source.licence,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "training_texts": len(texts),
                "held_out_documents": n_held_out,
            }
        )
    rng.shuffle(training)
    return training, held_out, record


def _first_tokens(model: Any, texts: list[str], tokens: int) -> list[str]:
    total = 0
    for index, ids in enumerate(model.tokenizer(texts, add_special_tokens=False)["input_ids"]):
        total += len(ids)
        if total >= tokens:
            return texts[: index + 1]
    return texts


def _fit(
    recipe: TrainingRecipe, store: ActivationStore, model_name: str, work: Path
) -> tuple[Any, Float[Tensor, " d_in"], float, dict[str, Any]]:
    """The trained SAE in normalised space, with the mean and the one number that lead there."""
    from sae_lens import TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from sae_emotion_plugin.architectures import SparseStepTopKTrainingSAE

    rng = np.random.default_rng(recipe.seed)
    sample = store.rows(rng.choice(len(store), size=min(len(store), 100_000), replace=False))
    mean = sample.double().mean(0)
    # One number for all dimensions keeps angles, and so unit decoder rows, what they are in the residual stream.
    scale = float((sample.double() - mean).square().mean().sqrt())
    mean = mean.float()
    config = TopKTrainingSAEConfig(
        d_in=sample.shape[1],
        d_sae=recipe.d_sae,
        k=recipe.k,
        apply_b_dec_to_input=True,
        normalize_activations="none",
        # Tied, unit-norm start: the encoder begins as the decoder's transpose (arXiv 2406.04093, A.1).
        decoder_init_norm=1.0,
        rescale_acts_by_decoder_norm=True,
        aux_loss_coefficient=recipe.aux_loss_coefficient,
        metadata=sae_metadata(recipe, model_name),
    )
    # SAELens draws the first weights from torch's global generator, which is the user's afterwards as it was before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sae = SparseStepTopKTrainingSAE(config, frozen=FROZEN_PARTS.get(recipe.reference))
    checkpoints = work / f"checkpoints-{content_key(recipe.to_yaml(), store.key)}"
    steps = max(1, int(len(store) * recipe.epochs) // recipe.batch_size)
    if len(store) < recipe.batch_size:
        raise ValueError(f"{len(store)} tokens are fewer than one batch of {recipe.batch_size}: more texts are needed")
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * recipe.batch_size,
        train_batch_size_samples=recipe.batch_size,
        lr=recipe.lr,
        lr_warm_up_steps=min(recipe.lr_warm_up_steps, max(1, steps // 10)),
        lr_decay_steps=int(steps * recipe.lr_decay_share),
        lr_end=0.0,
        dead_feature_window=max(1, recipe.dead_token_window // recipe.batch_size),
        n_checkpoints=4,
        checkpoint_path=str(checkpoints),
    )
    trainer = SAETrainer(
        cfg=trainer_config,
        sae=sae,
        data_provider=iter(()),
        save_checkpoint_fn=_mark_complete,
    )
    first_step = _resume(trainer, checkpoints, recipe.batch_size)
    trainer.data_provider = (
        (batch - mean) / scale for batch in store.batches(recipe.batch_size, recipe.seed, first_step)
    )
    trainer.fit()
    log = {"steps": steps, "tokens": steps * recipe.batch_size, "resumed_at_step": first_step}
    return sae, mean, scale, log


def sae_metadata(recipe: TrainingRecipe, model_name: str) -> Any:
    """The metadata by which SAELens and this package know where and how to read the recipe's activations."""
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(
        model_name=model_name,
        hook_name=recipe.hook_name,
        context_size=recipe.context_size,
        prepend_bos=True,
        model_from_pretrained_kwargs={},
    )


def _mark_complete(checkpoint_path: Path | None) -> None:
    if checkpoint_path is not None:
        (checkpoint_path / "complete").touch()


def _resume(trainer: Any, checkpoints: Path, batch_size: int) -> int:
    """Load the last complete checkpoint, if there is one, and return the number of steps it has behind it."""
    complete = [path.parent for path in checkpoints.glob("*/complete")]
    if not complete:
        return 0
    last = max(complete, key=lambda path: int(path.name))
    trainer.sae.load_state_dict(load_file(last / "sae_weights.safetensors"))
    trainer.load_trainer_state(last)
    # SAELens saves before it counts the step.
    trainer.n_training_steps = trainer.n_training_samples // batch_size
    trainer.checkpoint_thresholds = [
        threshold for threshold in trainer.checkpoint_thresholds if threshold > trainer.n_training_samples
    ]
    logger.info("resuming at step %d", trainer.n_training_steps)
    return trainer.n_training_steps


def _save_folded(sae: Any, mean: Float[Tensor, " d_in"], scale: float, folder: Path) -> None:
    """Write the inference SAE for raw activations: unit decoder rows and float16 matrices, float32 biases."""
    sae.save_inference_model(folder)
    state = load_file(folder / "sae_weights.safetensors")
    # x = mean + scale * y: y - b = (x - (mean + scale * b)) / scale, and the reconstruction is scaled back. With the
    # scale moved into the codes, the encoder's division and multiplication cancel.
    state["b_dec"] = mean + scale * state["b_dec"]
    state["b_enc"] = scale * state["b_enc"]
    for name in ("W_enc", "W_dec"):
        state[name] = state[name].to(torch.float16)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    # The rows are unit vectors now: rescaling by their rounded norms would only add noise.
    config["rescale_acts_by_decoder_norm"] = False
    _write_json(folder / "cfg.json", config)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
