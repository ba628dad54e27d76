"""Small trainings without a model, for the tests of the loop; run as a program, one that can be killed.

python tests/training_runs.py KIND FOLDER [STEP]: trains in FOLDER, and kills itself with SIGKILL in the step STEP.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch

from sae_emotion_plugin.architectures import (
    OpenAITopKTrainingSAE,
    OpenAITopKTrainingSAEConfig,
    ReluL1TrainingSAE,
    ReluL1TrainingSAEConfig,
    SparseStepTopKTrainingSAE,
)
from sae_emotion_plugin.training.loop import LoopSettings, Training, fit
from sae_emotion_plugin.training.resampling import Resampling
from sae_emotion_plugin.training.steps import StepSettings, Trainer

D_IN, D_SAE, BATCH, STEPS = 10, 48, 64, 36
SETTINGS = LoopSettings(
    StepSettings(STEPS, 3e-3, lr_warm_up_steps=5, lr_decay_steps=10, ema_decay=0.9, dead_token_window=6 * BATCH),
    log_steps=10,
    checkpoint_steps=7,
)
RESAMPLED = LoopSettings(SETTINGS.step, Resampling("anthropic", 12, 0.02), log_steps=10, checkpoint_steps=7)


def data(n: int = 3000) -> torch.Tensor:
    """Sparse sums of 30 directions and some noise, of mean 0 and mean square 1."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((30, D_IN))
    codes = rng.exponential(size=(n, 30)) * (rng.random((n, 30)) < 0.08)
    x = codes @ directions + 0.1 * rng.standard_normal((n, D_IN))
    return torch.from_numpy((x - x.mean(0)) / x.std()).float()


DATA = data()


def batches(first_step: int) -> Iterator[torch.Tensor]:
    """A batch that its step alone decides."""
    step = first_step
    while True:
        yield DATA[np.random.default_rng([1, step]).choice(len(DATA), BATCH)]
        step += 1


def sample(rng: np.random.Generator, n: int) -> torch.Tensor:
    return DATA[rng.choice(len(DATA), min(n, 500), replace=False)]


def training_sae(kind: str) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    match kind:
        case "openai-topk":
            sae = OpenAITopKTrainingSAE(OpenAITopKTrainingSAEConfig(**common, k=3))
            sae.initialize_from(DATA)
            return sae
        case "relu-l1":
            return ReluL1TrainingSAE(ReluL1TrainingSAEConfig(**common, l1_coefficient=0.4, l1_warm_up_steps=20))
        case "topk":
            return SparseStepTopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**common, k=3, decoder_init_norm=1.0))
        case "batchtopk":
            return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**common, k=3))
        case _:
            return sae_lens.JumpReLUTrainingSAE(sae_lens.JumpReLUTrainingSAEConfig(**common, l0_coefficient=0.2))


def run(kind: str, folder: Path, settings: LoopSettings | None = None, **options: Any) -> tuple[Any, Training]:
    sae = training_sae(kind)
    usual = RESAMPLED if kind == "relu-l1" else SETTINGS
    training = fit(sae, batches, settings or usual, folder, sample=sample, progress=False, **options)
    return sae, training


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3:
        steps, whole_step = iter(range(int(sys.argv[3]))), Trainer.step

        def step(self: Trainer, batch: torch.Tensor) -> Any:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole_step(self, batch)

        Trainer.step = step  # type: ignore[method-assign]
    run(sys.argv[1], Path(sys.argv[2]))
