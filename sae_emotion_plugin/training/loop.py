"""`fit`: a training from its first step, or its last checkpoint, to its end, with resampling, monitors and logs."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.training.checkpoints import Checkpoint, Checkpoints
from sae_emotion_plugin.training.logs import CurveFile
from sae_emotion_plugin.training.monitors import batch_figures, decoder_cosines
from sae_emotion_plugin.training.resampling import INPUTS, Resampling, resample
from sae_emotion_plugin.training.steps import StepResult, StepSettings, Trainer, TrainingDiverged

logger = logging.getLogger(__name__)

BAD_SHARE = 0.01
"""Of the activations: from there on, NaN and infinity are no accident."""
UNSOUND = 2.0
"""While the running FVU is more than this many times the best one, no checkpoint is written."""


class FiniteBatches:
    """Batches without tokens that hold NaN or infinity: others of the batch, again, take their places.

    So every batch is of one size. Batches without such tokens pass as they are.
    """

    def __init__(
        self, batches: Iterator[Float[Tensor, "token d_in"]], seen: int = 0, bad: int = 0, n_batches: int = 100
    ) -> None:
        """Of `n_batches` in all: the first bad ones are judged by their share of those, or of the first hundred."""
        self.batches, self.seen, self.bad = batches, seen, bad
        self.judged_from = min(100, n_batches)

    def __iter__(self) -> Iterator[Float[Tensor, "token d_in"]]:
        return self

    def __next__(self) -> Float[Tensor, "token d_in"]:
        """The next batch. ValueError when too many tokens had to be left out."""
        batch = next(self.batches)
        finite = torch.isfinite(batch).all(dim=-1)
        self.seen += len(batch)
        if bool(finite.all()):
            return batch
        self.bad += int((~finite).sum())
        if self.bad > BAD_SHARE * max(self.seen, self.judged_from * len(batch)) or not finite.any():
            raise ValueError(
                f"{self.bad} of {self.seen} activations hold NaN or infinity, more than {BAD_SHARE:.0%}: the model "
                f"overflows at this hook; run it in float32"
            )
        kept = batch[finite]
        return kept[torch.arange(len(batch)) % len(kept)]


@dataclass(frozen=True)
class LoopSettings:
    """How a training is made; `step` and `resampling` and `seed` decide its weights, the rest what is written."""

    step: StepSettings
    resampling: Resampling | None = None
    seed: int = 0
    log_steps: int = 50
    checkpoint_steps: int = 200
    measure_steps: int = 0
    """Steps between calls of `measure`; 0 for none."""

    def __post_init__(self) -> None:
        for name, least in (("log_steps", 1), ("checkpoint_steps", 1), ("measure_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is below {least}")


@dataclass(frozen=True)
class Training:
    """What happened in a training, whose weights are in its SAE."""

    steps: int
    tokens: int
    resumed_at_step: int
    bad_tokens: int
    """Tokens that were left out, for NaN or infinity."""
    dead: int | None
    """Features silent for the whole window at the end; None where the training is shorter than the window."""
    resampled: int
    curve: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def fit(
    sae: Any,
    batches: Callable[[int], Iterator[Float[Tensor, "token d_in"]]],
    settings: LoopSettings,
    folder: Path,
    *,
    sample: Callable[[np.random.Generator, int], Float[Tensor, "token d_in"]] | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
    loggers: Sequence[Callable[[Mapping[str, Any]], None]] = (),
    progress: bool = True,
) -> Training:
    """Train `sae` in place, from the last checkpoint in `folder` if there is one; the same call goes on after a kill.

    Any training SAE of SAELens will do. The global generator of torch is as it was before, afterwards.

    Args:
        batches: the batches from a step on, as the SAE trains on them.
        sample: draws so many tokens, for resampling; the next batch is taken where it is absent.
        measure: figures that need more than a batch, such as the loss recovered; called when `sae` has the weights that
            would be saved, the running mean where there is one.

    Raises:
        TrainingDiverged: see `Trainer.step`; the last good checkpoint stays.
        ValueError: too many activations hold NaN or infinity.
    """
    store = Checkpoints(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        trainer = Trainer(sae, settings.step)
        begun = store.latest()
        counters: dict[str, int] = {"seen": 0, "bad": 0, "resampled": 0}
        if begun is not None:
            trainer.restore(begun)
            counters = {name: int(begun.counters[name]) for name in counters}
            logger.info("resuming at step %d", begun.step)
        resumed_at = trainer.step_number
        source = FiniteBatches(batches(resumed_at), counters["seen"], counters["bad"], settings.step.steps)
        curve = CurveFile(folder / "curve.jsonl", resumed_at)
        bar = tqdm(total=settings.step.steps, initial=resumed_at, desc="training", unit="step", disable=not progress)
        with bar:
            while trainer.step_number < settings.step.steps:
                try:
                    result = trainer.step(next(source))
                except TrainingDiverged as error:
                    last = store.paths()
                    kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
                    raise TrainingDiverged(f"{error}; {kept}") from None
                step = trainer.step_number
                due = settings.resampling is not None and settings.resampling.is_due(step, settings.step.steps)
                if due and settings.resampling is not None:
                    counters["resampled"] += _resampled(trainer, settings.resampling, settings.seed, sample, result)
                bar.update()
                measured = measure if _is_due(step, settings.measure_steps, settings.step.steps) else None
                if step == 1 or _is_due(step, settings.log_steps, settings.step.steps) or measured is not None:
                    point = _point(trainer, result, settings, measured)
                    bar.set_postfix({name: f"{point[name]:.3g}" for name in ("loss", "fvu", "l0", "dead")})
                    kept = curve.add(point)
                    for log in loggers:
                        log(kept)
                # A state that is about to diverge must not take the place of a good one.
                sound = trainer.running_fvu <= UNSOUND * trainer.best_fvu
                if step == settings.step.steps or (step % settings.checkpoint_steps == 0 and sound):
                    state = trainer.state()
                    counters |= {"seen": source.seen, "bad": source.bad}
                    store.save(Checkpoint(step, state.tensors, {**state.counters, **counters}))
        trainer.use_averages()
    return Training(
        steps=trainer.step_number,
        tokens=trainer.tokens,
        resumed_at_step=resumed_at,
        bad_tokens=source.bad,
        dead=int(trainer.dead.sum()) if trainer.knows_dead else None,
        resampled=counters["resampled"],
        curve=curve.points,
    )


def _is_due(step: int, every: int, steps: int) -> bool:
    """Whether something that is done every so many steps, and after the last, is due after `step`; never for 0."""
    return bool(every) and (step % every == 0 or step == steps)


def _resampled(
    trainer: Trainer,
    plan: Resampling,
    seed: int,
    sample: Callable[[np.random.Generator, int], Tensor] | None,
    result: StepResult,
) -> int:
    # Of seed and step alone, so that it needs no state of its own.
    rng = np.random.default_rng([seed, trainer.step_number])
    rare = trainer.fired_since < plan.below * trainer.tokens_since
    inputs = result.sae_in if sample is None else sample(rng, INPUTS).to(result.sae_in)
    inputs = inputs[torch.isfinite(inputs).all(dim=-1)]
    features = resample(trainer.sae, rare, plan.kind, inputs, rng)
    trainer.forget(features)
    trainer.reset_rates()
    return len(features)


def _point(
    trainer: Trainer,
    result: StepResult,
    settings: LoopSettings,
    measure: Callable[[], Mapping[str, float]] | None,
) -> dict[str, Any]:
    """A point of the curve, after the trainer's last step."""
    step, steps, log_steps = trainer.step_number, settings.step.steps, settings.log_steps
    point: dict[str, Any] = {
        "step": step,
        **result.losses,
        **vars(batch_figures(result.sae_in, result.sae_out, result.firing_counts)),
        "tokens": trainer.tokens,
        "dead": float(trainer.dead.float().mean()) if trainer.knows_dead else math.nan,
        "lr": result.lr,
        "gradient_norm": result.gradient_norm,
    }
    # All pairs of a wide decoder are many: about ten times a training.
    every = log_steps * max(1, math.ceil(steps / 10 / log_steps))
    if step == 1 or _is_due(step, every, steps):
        point |= decoder_cosines(trainer.sae.W_dec.detach()).summary()
    if measure is not None:
        with trainer.averaged():
            point |= measure()
    return point
