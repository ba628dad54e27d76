"""One training step after another around any training SAE of SAELens: `Trainer`, whose whole state can be kept.

What SAELens's trainer has no seam for: a running mean of the weights, moments that can be reset, codes as entries, and
a state that holds everything, so that a run that was killed ends with the bits of one that was not.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput
from torch import Tensor

from sae_emotion_plugin.architectures.sparse_step import StepsSparsely
from sae_emotion_plugin.training.checkpoints import Checkpoint
from sae_emotion_plugin.training.resampling import forget

DIVERGED = 4.0
"""A running FVU of this many times that of the start, or of predicting the mean, is no training."""
MEMORY = 0.9
"""Decay of that running FVU."""


class TrainingDiverged(ValueError):
    """The loss grew instead of falling; the message names the step and the key to look at."""


@dataclass(frozen=True)
class StepSettings:
    """What decides the weights, beside the SAE and its batches."""

    steps: int
    lr: float
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    clip_norm: float = 1.0
    adam_eps: float = 1e-8
    ema_decay: float = 0.0
    """Of the running mean of the weights; 0 is none. It is less at the start: at most (1 + t) / (10 + t)."""
    dead_token_window: int = 200_000

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, the first of which is 0: linear warm-up, constant, linear decay to zero."""
        warm = min(1.0, (step + 1) / self.lr_warm_up_steps) if self.lr_warm_up_steps else 1.0
        decay = min(1.0, (self.steps - step) / self.lr_decay_steps) if self.lr_decay_steps else 1.0
        return self.lr * warm * decay


@dataclass(frozen=True)
class StepResult:
    """What a step found before it moved the weights."""

    losses: dict[str, float]
    sae_in: Float[Tensor, "token d_in"]
    sae_out: Float[Tensor, "token d_in"]
    firing_counts: Int[Tensor, " feature"]
    gradient_norm: float
    lr: float


class Trainer:
    """A training SAE, its optimiser and the counters of its features."""

    def __init__(self, sae: TrainingSAE[Any], settings: StepSettings) -> None:
        self.sae, self.settings = sae, settings
        self.step_number = 0
        self.tokens = 0
        self.first_fvu = math.nan
        self.running_fvu = math.nan
        self.best_fvu = math.inf
        """The lowest of those running means."""
        width = sae.cfg.d_sae
        self.silent_tokens = torch.zeros(width, dtype=torch.int64, device=sae.device)
        self.fired_since = torch.zeros(width, dtype=torch.int64, device=sae.device)
        self.tokens_since = 0
        """Both since the last resampling."""
        self.parameters = {name: p for name, p in sae.named_parameters() if p.requires_grad}
        # The optimiser sees an encoder whose features are rows in memory as those rows: on a CPU its fused kernel is
        # several times slower on a transposed matrix.
        self.rows = {name: _as_rows(parameter) for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.Adam(list(self.rows.values()), lr=settings.lr, eps=settings.adam_eps, fused=True)
        self.averages = {name: row.detach().clone() for name, row in self.rows.items()} if settings.ema_decay else {}

    @property
    def dead(self) -> Bool[Tensor, " feature"]:
        """Features that were silent for the whole window."""
        return self.silent_tokens >= self.settings.dead_token_window

    @property
    def knows_dead(self) -> bool:
        """Whether the training is as long as the window yet: before, none can be dead."""
        return self.tokens >= self.settings.dead_token_window

    @property
    def moments(self) -> dict[str, Mapping[str, Tensor]]:
        """Adam's moments by parameter, a row for each feature."""
        return {name: self.optimizer.state.get(row, {}) for name, row in self.rows.items()}

    def step(self, batch: Float[Tensor, "token d_in"]) -> StepResult:
        """Train on one batch, in the space that the SAE trains in.

        Raises:
            TrainingDiverged: a loss or gradient is no number, or the error grew far above its start.
        """
        batch = batch.to(self.sae.device)
        self.sae.train()
        step_input = TrainStepInput(
            sae_in=batch,
            coefficients=self._coefficients(),
            dead_neuron_mask=self.dead,
            n_training_steps=self.step_number,
            is_logging_step=False,
        )
        if isinstance(self.sae, StepsSparsely):
            found = self.sae.sparse_step(step_input)
            counts = found.firing_counts()
        else:
            found = self.sae.training_forward_pass(step_input)
            counts = (found.feature_acts > 0).sum(0)
        losses = {name: float(value.detach()) for name, value in {"loss": found.loss, **found.losses}.items()}
        self._check(losses["loss"], batch, found.sae_out.detach())
        found.loss.backward()
        for name, row in self.rows.items():
            grad = self.parameters[name].grad
            row.grad = grad if grad is None or row is self.parameters[name] else grad.T
        norm = float(torch.nn.utils.clip_grad_norm_(self.rows.values(), self.settings.clip_norm))
        if not math.isfinite(norm):
            raise self._diverged("the gradient is no number")
        lr = self.settings.lr_at(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for name, row in self.rows.items():
            row.grad = self.parameters[name].grad = None
        self._average()
        self._count(counts, len(batch))
        return StepResult(losses, batch, found.sae_out.detach(), counts, norm, lr)

    def forget(self, features: Int[Tensor, " resampled"]) -> None:
        """Treat features as new: no moments, no mean of former weights, and not dead."""
        forget(self.moments, features)
        for name, average in self.averages.items():
            if name != "b_dec":  # all others have a row for each feature
                average[features] = self.rows[name].detach()[features]
        self.silent_tokens[features] = 0

    def reset_rates(self) -> None:
        """Begin to count anew how often each feature fires."""
        self.fired_since.zero_()
        self.tokens_since = 0

    @torch.no_grad()
    def use_averages(self) -> None:
        """Put the running mean, if there is one, in place of the weights; the training is over with it."""
        for name, average in self.averages.items():
            self.rows[name].data.copy_(average)
        if isinstance(self.sae, StepsSparsely):
            self.sae.constrain()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that would be saved now, for measuring; the trained ones are back afterwards, bit by bit."""
        trained = {name: row.detach().clone() for name, row in self.rows.items()}
        self.use_averages()
        try:
            yield
        finally:
            for name, row in self.rows.items():
                row.data.copy_(trained[name])

    def state(self) -> Checkpoint:
        """All that the next step depends on, apart from its batch."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.averages.items()}
        for name, moments in self.moments.items():
            tensors |= {f"adam.{key}.{name}": tensor for key, tensor in moments.items()}
        tensors["silent_tokens"], tensors["fired_since"] = self.silent_tokens, self.fired_since
        tensors["generator"] = torch.random.get_rng_state()
        names = ("tokens", "tokens_since", "first_fvu", "running_fvu", "best_fvu")
        return Checkpoint(self.step_number, tensors, {name: getattr(self, name) for name in names})

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a state, whose weights must be of an SAE of these settings."""
        tensors = checkpoint.tensors
        named = {name.removeprefix("sae."): value for name, value in tensors.items() if name.startswith("sae.")}
        self.sae.load_state_dict(named)
        for name, average in self.averages.items():
            average.copy_(tensors[f"average.{name}"])
        for name, row in self.rows.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                with suppress(KeyError):  # a parameter that never had a gradient has no moments
                    self.optimizer.state[row][key] = tensors[f"adam.{key}.{name}"].to(row.device)
        self.silent_tokens.copy_(tensors["silent_tokens"])
        self.fired_since.copy_(tensors["fired_since"])
        torch.random.set_rng_state(tensors["generator"])
        self.step_number = checkpoint.step
        for name, value in checkpoint.counters.items():
            if hasattr(self, name):
                setattr(self, name, value)

    def _coefficients(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, given in self.sae.get_coefficients().items():
            value, warm = given if isinstance(given, TrainCoefficientConfig) else (given, 0)
            found[name] = value * min(1.0, self.step_number / warm) if warm else value
        return found

    @torch.no_grad()
    def _check(self, loss: float, x: Tensor, out: Tensor) -> None:
        if not math.isfinite(loss):
            raise self._diverged("the loss is no number")
        variance = float((x - x.mean(0)).square().sum())
        fvu = float((out - x).square().sum()) / variance if variance else 0.0
        if math.isnan(self.first_fvu):
            self.first_fvu = self.running_fvu = fvu
        self.running_fvu = MEMORY * self.running_fvu + (1 - MEMORY) * fvu
        self.best_fvu = min(self.best_fvu, self.running_fvu)
        if not self.running_fvu <= DIVERGED * max(1.0, self.first_fvu):
            raise self._diverged(f"the FVU rose from {self.first_fvu:.3g} to {self.running_fvu:.3g}")

    def _diverged(self, what: str) -> TrainingDiverged:
        coefficients = self._coefficients()
        if coefficients and float(self.dead.float().mean()) > 0.9:
            name = next(iter(coefficients))
            look = f"{name}_coefficient ({coefficients[name]:g}): nine in ten features are dead, so a smaller one"
        else:
            look = f"lr ({self.settings.lr:g}): a smaller one, or more lr_warm_up_steps"
        return TrainingDiverged(f"training diverged at step {self.step_number}: {what}; look at {look}")

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        for name, average in self.averages.items():
            average.lerp_(self.rows[name].detach(), 1 - decay)

    def _count(self, counts: Int[Tensor, " feature"], tokens: int) -> None:
        self.step_number += 1
        self.tokens += tokens
        self.tokens_since += tokens
        self.fired_since += counts
        self.silent_tokens += tokens
        self.silent_tokens[counts > 0] = 0


def _as_rows(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The parameter, or for a matrix stored by columns its transpose in the same memory."""
    if parameter.ndim == 2 and not parameter.is_contiguous() and parameter.T.is_contiguous():
        return torch.nn.Parameter(parameter.data.T)
    return parameter
