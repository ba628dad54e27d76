"""FVU and loss recovered at equal tokens, k and width: our recipes, SAELens's TopK trainer and EleutherAI's sparsify.

    python benchmarks/trainers.py --texts FOLDER --sparsify-python VENV/bin/python [--work trainers]

Every trainer gets the same batches in the same order, of one buffer of activations of the embedded model, once. Each
has its own defaults, apart from what they share (batch, k, width) and the learning rate: every trainer's own is
multiplied by each of `--factors` with the first seed, and by three times more or less for as long as that is better;
the best by FVU on one half of the held-out documents is taken for all seeds, the other half is reported. SAELens and
sparsify run on activations as they are, as their users have it, and centred and divided by one number, as ours are
(`-centred`). SAELens gets our warm-up, decay and dead window too. sparsify's SparseCoder runs in its own environment
(pip install eai-sparsify torch), with its own optimiser, signum, and with the Adam that it offers (`-adam`). Its usual
batch is 32 sequences, far more than 2,048 tokens: this says nothing of it at that size. A run that was done is not done
again.

The last line is one JSON object: for each trainer the figures of its seeds, and `differences` of ours minus theirs,
mean and 95 % interval over seeds (paired, Student's t), FVU and loss recovered.
"""

import argparse
import itertools
import json
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_buffer import Buffer, open_buffer
from safetensors.torch import load_file, save_file
from scipy import stats

from sae_emotion_plugin.activations import activation_batches
from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.tables import text_table
from sae_emotion_plugin.training.spaces import Fitted, TrainingSpace, finite_sample, sae_metadata, training_space
from sae_emotion_plugin.training.steps import TrainingDiverged

OURS = {"openai-topk": "openai-topk", "topk": "embedded-gemma"}
"""Recipes by the trainer's name."""
THEIRS = ("sae-lens", "sae-lens-centred", "sparsify", "sparsify-centred", "sparsify-adam-centred")
SHOWN = ("fvu", "fvu_without_largest_dimension", "fvu_mean_over_dimensions", "loss_recovered", "l0", "dead")
SAE_LENS_LR = 3e-4
SPARSIFY_LR = {"signum": 5e-3, "adam": 2e-4}
"""Of 16,384 latents; they fall as the inverse root of the width."""
RATE_STEP = 3.0
MOST_RATES = 6
"""Tried for a trainer; where the best is still the largest or smallest then, the result says so."""
NORM_BATCHES = 10
"""That SAELens measures the mean norm on; they are trained on all the same."""


@dataclass(frozen=True)
class Design:
    """What all trainers share."""

    d_sae: int
    k: int
    batch_size: int
    steps: int
    window: int
    """Tokens after which a silent latent is dead."""
    sparsify_python: Path | None


@dataclass(frozen=True)
class Run:
    """One training."""

    trainer: str
    factor: float
    """Of the trainer's own learning rate."""
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts of the recipe openai-topk")
    parser.add_argument(
        "--sparsify-python", type=Path, help="Python that has eai-sparsify; without it those are left out"
    )
    parser.add_argument("--work", type=Path, default=Path("trainers"))
    parser.add_argument("--trainers", nargs="+", choices=[*OURS, *THEIRS], default=[*OURS, *THEIRS])
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument(
        "--all-texts",
        action="store_true",
        help="draw them from all texts, as dead_latents.py has them",
    )
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--window", type=int, default=200_000, help="tokens after which a silent latent is dead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.33, 1.0, 3.0])
    parser.add_argument("--held-out", type=int, default=1000, help="documents; half of them choose the rates")
    parser.add_argument("--loss-tokens", type=int, default=10_000)
    options = parser.parse_args()
    trainers = [name for name in options.trainers if options.sparsify_python or not name.startswith("sparsify")]
    recipe = replace(
        TrainingRecipe.read("openai-topk"),
        d_sae=options.d_sae,
        k=options.k,
        batch_size=options.batch_size,
        dead_token_window=options.window,
    )
    collected = None if options.all_texts else options.tokens
    buffer = open_buffer(recipe, options.texts, options.work, tokens=collected, held_out=options.held_out)
    if len(buffer.store) < options.tokens:
        parser.error(f"--tokens {options.tokens} are more than the {len(buffer.store)} of all texts")
    steps = options.tokens // options.batch_size
    design = Design(
        options.d_sae,
        options.k,
        options.batch_size,
        steps,
        options.window,
        options.sparsify_python,
    )
    choosing, reported = buffer.held_out[::2], buffer.held_out[1::2]
    vectors = torch.cat([batch.vectors for batch in activation_batches(buffer.model, choosing, recipe.hook_name)])
    evaluation = Evaluation(buffer.model, reported, loss_tokens=options.loss_tokens, progress=False)
    found: dict[str, Any] = {}
    for trainer in trainers:
        tried = search(
            options.factors,
            lambda factor, trainer=trainer: _fvu(buffer, Run(trainer, factor, options.seeds[0]), design, vectors),
        )
        factor = min(tried, key=lambda one: tried[one])
        rows = [_reported(buffer, Run(trainer, factor, seed), design, evaluation) for seed in options.seeds]
        at_edge = factor in (min(tried), max(tried))
        shown = {one: fvu if math.isfinite(fvu) else None for one, fvu in tried.items()}  # JSON has no infinity
        found[trainer] = {"factor": factor, "at_edge": at_edge, "fvu_by_factor": shown, "seeds": rows}
        print(trainer, *(f"{row['fvu']:.4f}" for row in rows), flush=True)
    print(
        text_table(
            ("trainer", "rate x", *SHOWN),
            [
                (name, f"{one['factor']:g}", *(f"{np.mean([row[key] for row in one['seeds']]):.4f}" for key in SHOWN))
                for name, one in found.items()
            ],
        )
    )
    result = {
        **{key: value for key, value in asdict(design).items() if key != "sparsify_python"},
        "tokens": steps * design.batch_size,
        "collected_tokens": len(buffer.store),
        "loss_tokens": options.loss_tokens,
        "held_out_documents": len(reported),
        "seeds": options.seeds,
        "differences": differences(found),
        "trainers": found,
    }
    print(json.dumps(result))


def search(factors: Sequence[float], fvu: Callable[[float], float]) -> dict[float, float]:
    """The FVU of each factor, and of larger or smaller ones until the best has worse ones on both sides."""
    tried = {factor: fvu(factor) for factor in factors}
    while len(tried) < MOST_RATES:
        best = min(tried, key=lambda one: tried[one])
        if best not in (min(tried), max(tried)):
            break
        further = best * RATE_STEP if best == max(tried) else best / RATE_STEP
        tried[further] = fvu(further)
    return tried


def _fvu(buffer: Buffer, run: Run, design: Design, vectors: torch.Tensor) -> float:
    """Infinite where the training did not end well: such a rate is not taken."""
    try:
        found = fvu_of(_run(buffer, run, design), vectors)
    except TrainingDiverged:
        return math.inf
    return found if math.isfinite(found) else math.inf


def differences(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ours minus theirs, seed by seed: means with intervals."""
    pairs = [(one, other) for one in OURS for other in THEIRS if one in found and other in found]
    return {
        f"{one} - {other}": {
            key: _interval([a[key] - b[key] for a, b in zip(found[one]["seeds"], found[other]["seeds"], strict=True)])
            for key in ("fvu", "fvu_mean_over_dimensions", "loss_recovered")
        }
        for one, other in pairs
    }


def _interval(values: Sequence[float]) -> list[float | None]:
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return [mean, None, None]
    reach = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return [mean, mean - reach, mean + reach]


def fvu_of(folder: Path, vectors: torch.Tensor) -> float:
    """Fraction of variance unexplained by the SAE saved in a folder."""
    from sae_lens import SAE

    sae, error = SAE.load_from_disk(folder), 0.0
    with torch.inference_mode():
        for part in vectors.float().split(4096):
            error += float((sae.decode(sae.encode(part)) - part).double().square().sum())
    return error / float((vectors - vectors.mean(0)).double().square().sum())


def _decides(run: Run, design: Design) -> list[Any]:
    """All that a run depends on beside the activations."""
    shared = [asdict(run), {key: value for key, value in asdict(design).items() if key != "sparsify_python"}]
    own = _recipe(run, design).to_yaml() if run.trainer in OURS else [SAE_LENS_LR, SPARSIFY_LR, NORM_BATCHES]
    return [*shared, own]


def _run(buffer: Buffer, run: Run, design: Design) -> Path:
    """The folder of the trained SAE."""

    def make(folder: Path) -> Mapping[str, Any]:
        started = time.perf_counter()
        TRAINERS[run.trainer](buffer, run, design, folder)
        return {"seconds_since_last_start": round(time.perf_counter() - started, 1)}

    decides = _decides(run, design)
    buffer.once(run.trainer, *decides, make=make)
    return buffer.folder(run.trainer, *decides)


def _reported(buffer: Buffer, run: Run, design: Design, evaluation: Evaluation) -> dict[str, Any]:
    folder = _run(buffer, run, design)
    decides = [*_decides(run, design), evaluation.texts, evaluation.loss_tokens]
    report = buffer.once(f"{run.trainer}-report", *decides, make=lambda _: buffer.report(folder, evaluation))
    return {"seed": run.seed, **{key: report[key] for key in SHOWN}, "held_out_tokens": report["n_tokens"]}


def _recipe(run: Run, design: Design) -> TrainingRecipe:
    recipe = TrainingRecipe.read(OURS[run.trainer])
    return replace(
        recipe,
        d_sae=design.d_sae,
        k=design.k,
        batch_size=design.batch_size,
        dead_token_window=design.window,
        epochs=None,
        steps=design.steps,
        lr=recipe.lr * run.factor,
        seed=run.seed,
    )


def _ours(buffer: Buffer, run: Run, design: Design, folder: Path) -> None:
    buffer.fit(_recipe(run, design)).save(folder)


def _space(buffer: Buffer, run: Run, centred: bool) -> TrainingSpace:
    sample = finite_sample(buffer.store, run.seed)
    return training_space(sample) if centred else TrainingSpace(torch.zeros(sample.shape[1]), 1.0)


def _sae_lens(centred: bool) -> Callable[[Buffer, Run, Design, Path], None]:
    def train(buffer: Buffer, run: Run, design: Design, folder: Path) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        space = _space(buffer, run, centred)
        torch.manual_seed(run.seed)
        config = TopKTrainingSAEConfig(
            d_in=len(space.mean),
            d_sae=design.d_sae,
            k=design.k,
            normalize_activations="none" if centred else "expected_average_only_in",
            metadata=sae_metadata(buffer.recipe, buffer.model_name),
        )
        trainer_config = SAETrainerConfig(
            total_training_samples=design.steps * design.batch_size,
            train_batch_size_samples=design.batch_size,
            lr=SAE_LENS_LR * run.factor,
            lr_end=0.0,
            lr_warm_up_steps=min(50, max(1, design.steps // 10)),
            lr_decay_steps=design.steps // 4,
            dead_feature_window=max(1, design.window // design.batch_size),
            n_batches_for_norm_estimate=NORM_BATCHES,
        )
        first = 0 if centred else NORM_BATCHES
        once_more = itertools.chain(
            itertools.islice(buffer.store.batches(design.batch_size, run.seed), first),
            buffer.store.batches(design.batch_size, run.seed),
        )
        sae = TopKTrainingSAE(config)
        SAETrainer(cfg=trainer_config, sae=sae, data_provider=map(space.enter, once_more)).fit()
        if centred:
            Fitted(sae, space, {}).save(folder)
        else:
            sae.save_inference_model(folder)

    return train


def _sparsify(centred: bool, optimizer: str = "signum") -> Callable[[Buffer, Run, Design, Path], None]:
    def train(buffer: Buffer, run: Run, design: Design, folder: Path) -> None:
        space = _space(buffer, run, centred)
        save_file({"mean": space.mean, "scale": torch.tensor(space.scale)}, folder / "space.safetensors")
        job = {
            "d_sae": design.d_sae,
            "k": design.k,
            "batch_size": design.batch_size,
            "steps": design.steps,
            "seed": run.seed,
            "optimizer": optimizer,
            "lr": run.factor * SPARSIFY_LR[optimizer] / (design.d_sae / 2**14) ** 0.5,
            "lr_warm_up_steps": min(50, max(1, design.steps // 10)),
            "shards": [str(Path(shard.filename).resolve()) for shard in buffer.store.shards],
            "space": str((folder / "space.safetensors").resolve()),
            "out": str((folder / "coder.safetensors").resolve()),
        }
        path = write_whole(folder / "job.json", json.dumps(job) + "\n")
        subprocess.run([str(design.sparsify_python), Path(__file__).with_name("sparsify_coder.py"), path], check=True)
        _as_sae_lens(buffer, load_file(job["out"]), space, design).save_model(folder)

    return train


def _as_sae_lens(buffer: Buffer, coder: dict[str, torch.Tensor], space: TrainingSpace, design: Design) -> Any:
    """The same dictionary for activations as they are: sparsify's TopK of ReLU is SAELens's ReLU of TopK."""
    from sae_lens import TopKSAE, TopKSAEConfig

    config = TopKSAEConfig(
        d_in=len(space.mean),
        d_sae=design.d_sae,
        k=design.k,
        rescale_acts_by_decoder_norm=False,
        metadata=sae_metadata(buffer.recipe, buffer.model_name),
    )
    sae = TopKSAE(config)
    sae.W_enc.data = coder["encoder.weight"].T.contiguous()
    sae.b_enc.data = space.scale * coder["encoder.bias"]
    sae.W_dec.data = coder["W_dec"]
    sae.b_dec.data = space.mean + space.scale * coder["b_dec"]
    return sae


TRAINERS: dict[str, Callable[[Buffer, Run, Design, Path], None]] = {
    "openai-topk": _ours,
    "topk": _ours,
    "sae-lens": _sae_lens(centred=False),
    "sae-lens-centred": _sae_lens(centred=True),
    "sparsify": _sparsify(centred=False),
    "sparsify-centred": _sparsify(centred=True),
    "sparsify-adam-centred": _sparsify(centred=True, optimizer="adam"),
}

if __name__ == "__main__":
    main()
