"""The SAEs that OpenAI-format checkpoints become: SAELens's own, but for three things that SAELens's cannot do.

Their weights may be views of a memory-mapped file and can still be saved; a layer-normed one decodes any number of
times, in any thread. They go by architecture names of their own, because SAELens builds what a name stands for; what
they save is called `topk` and `standard`, and plain SAELens loads it.
"""

import threading
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from torch import Tensor

TOPK, STANDARD = "openai_topk", "openai_standard"
EPS = 1e-5
"""Added to the standard deviation, by OpenAI and SAELens alike."""


class InputStatistics(NamedTuple):
    """What layer norm takes from each input and `decode` gives back."""

    mean: Float[Tensor, "*batch 1"]
    std: Float[Tensor, "*batch 1"]
    """Unbiased, as in OpenAI's code."""


@no_type_check  # SAELens's from_dict passes the metadata as a dict first
class OpenAITopKSAEConfig(TopKSAEConfig):
    """SAELens's config of a TopK SAE, under another name until it is saved."""

    @classmethod
    def architecture(cls) -> str:
        return TOPK

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": TopKSAEConfig.architecture()}


@no_type_check
class OpenAIStandardSAEConfig(StandardSAEConfig):
    """SAELens's config of a standard SAE, under another name until it is saved."""

    @classmethod
    def architecture(cls) -> str:
        return STANDARD

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": StandardSAEConfig.architecture()}


class OpenAIStandardSAE(StandardSAE):
    """SAELens's `StandardSAE` with weights that may be views of a file."""

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        _in_rows(state_dict)


class OpenAITopKSAE(TopKSAE):
    """SAELens's `TopKSAE` on layer-normed input, with weights that may be views of a file.

    `decode(codes)` uses the mean and standard deviation of this thread's last `encode`, as often as it is called;
    `decode(codes, stats=...)` uses those given.
    """

    def _setup_activation_normalization(self) -> None:
        # SAELens binds closures to `self` here, which a deep copy would share; ours are the methods below.
        if self.cfg.normalize_activations != "layer_norm":
            raise ValueError(f"{TOPK} normalises by layer_norm, not {self.cfg.normalize_activations!r}")
        self._last = _LastStatistics()

    def run_time_activation_norm_fn_in(self, x: Tensor) -> Tensor:
        self._last.stats = stats = _statistics(x)
        return (x - stats.mean) / (stats.std + EPS)

    def run_time_activation_norm_fn_out(self, x: Tensor) -> Tensor:
        stats = self._last.stats
        if stats is None:
            raise ValueError(
                "decode needs the mean and standard deviation of the input: call encode first (in this thread), or "
                "pass stats=sae.input_statistics(x)"
            )
        rows = x.shape[:-1]
        for name, value in stats._asdict().items():
            if value.shape[-1:] != (1,) or not _broadcasts(value.shape[:-1], rows):
                raise ValueError(
                    f"the {name} of the input has the shape {tuple(value.shape)}; valid for these codes:"
                    f" {(*rows, 1)}; pass stats=sae.input_statistics(x) of the codes' own input"
                )
        return x * stats.std + stats.mean

    def input_statistics(self, x: Float[Tensor, "*batch d_in"]) -> InputStatistics:
        """The mean and standard deviation that `encode(x)` takes out, for `decode(codes, stats=...)`."""
        return _statistics(self.reshape_fn_in(x.to(self.dtype)))

    def decode(self, feature_acts: Tensor, stats: tuple[Tensor, Tensor] | Mapping[str, Tensor] | None = None) -> Tensor:
        """The reconstruction of `feature_acts` in the scale of the input.

        Args:
            stats: mean and standard deviation of each input, each of shape [..., 1], or OpenAI's `info`, a mapping
                with `mu` and `std`; by default those of this thread's last `encode`.

        Raises:
            ValueError: there was no `encode` in this thread, or the statistics are those of other inputs than the
                codes (by their shape).
        """
        if stats is None:
            return super().decode(feature_acts)
        last = self._last.stats
        try:
            self._last.stats = _checked_statistics(stats)
            return super().decode(feature_acts)
        finally:
            self._last.stats = last

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        _in_rows(state_dict)


class _LastStatistics(threading.local):
    """The statistics of the last `encode`, a thread its own; a copy of the SAE starts without."""

    stats: InputStatistics | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _LastStatistics, ()


def ensure_registered() -> None:
    """Tells SAELens what our two architecture names stand for; ValueError where one is someone else's."""
    ours = {TOPK: (OpenAITopKSAE, OpenAITopKSAEConfig), STANDARD: (OpenAIStandardSAE, OpenAIStandardSAEConfig)}
    for name, classes in ours.items():
        if SAE_CLASS_REGISTRY.get(name, classes) != classes:
            raise ValueError(f"SAELens already has an architecture {name!r} that is not ours; it is left alone")
    for name, classes in ours.items():
        if name not in SAE_CLASS_REGISTRY:
            register_sae_class(name, *classes)


def repeatable_decode(sae: SAE) -> SAE:
    """The SAE, as an `OpenAITopKSAE` with the same parameters where it is SAELens's TopK SAE on layer-normed input."""
    if type(sae) is not TopKSAE or sae.cfg.normalize_activations != "layer_norm":
        return sae
    settings = {each.name: getattr(sae.cfg, each.name) for each in fields(sae.cfg)}
    cfg = OpenAITopKSAEConfig(**{**settings, "device": "meta"})
    ours = OpenAITopKSAE(cfg)
    ours.load_state_dict(sae.state_dict(), assign=True)
    return ours.to(device=sae.device)


def _statistics(x: Tensor) -> InputStatistics:
    mean = x.mean(dim=-1, keepdim=True)
    return InputStatistics(mean, (x - mean).std(dim=-1, keepdim=True))  # centred first: SAELens's bits


def _checked_statistics(stats: tuple[Tensor, Tensor] | Mapping[str, Tensor]) -> InputStatistics:
    if isinstance(stats, Mapping):
        if set(stats) != {"mu", "std"}:
            raise ValueError(f"stats holds {', '.join(map(str, stats)) or 'nothing'}; valid: mu, std")
        return InputStatistics(stats["mu"], stats["std"])
    return InputStatistics(*stats)


def _broadcasts(shape: torch.Size, rows: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, rows) == rows
    except RuntimeError:
        return False


def _in_rows(state_dict: dict[str, Any]) -> None:
    # safetensors refuses views in another order.
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.contiguous()
