"""What an OpenAI-format checkpoint holds, without making an SAE of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_emotion_plugin.openai_checkpoint import OpenAICheckpoint, all_finite, read_openai_checkpoint
from sae_emotion_plugin.tables import text_table

DEAD_AFTER = 76
"""Batches without activation after which a latent counts as dead: 10 million tokens in batches of 131,072, as in Gao et
al. (arXiv 2406.04093). A file does not say how long its own batches were."""
_BAR = 40


@dataclass(frozen=True)
class FrequencyBin:
    """How many latents are active on a share of tokens from `lower` to below `upper`."""

    lower: float
    upper: float
    latents: int


@dataclass(frozen=True)
class CheckpointSummary:
    """What `inspect_checkpoint` found."""

    path: str
    version: str | None
    """OpenAI's name for checkpoints of this shape and activation (and folder, where v1 and v4 are alike); None for
    any other."""
    d_in: int
    d_sae: int
    dtype: str
    activation: str
    k: int | None
    tied: bool
    file_bytes: int
    dead_after: int
    dead: int | None
    """Latents that have not been active for more than `dead_after` batches; None without `stats_last_nonzero`."""
    frequencies: tuple[FrequencyBin, ...] | None
    """By powers of ten; None without `latents_activation_frequency`."""
    decoder_norms: Mapping[str, float] | None
    """Smallest, median and largest norm of a latent's decoder vector, of those that are finite."""
    not_finite: Mapping[str, int]
    """How many numbers of a tensor are NaN or infinite, for tensors with any."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)

    def __repr__(self) -> str:
        norms = self.decoder_norms
        rows = [
            ("version", self.version or "none of OpenAI's"),
            ("d_in x d_sae", f"{self.d_in:,} x {self.d_sae:,} {self.dtype}"),
            ("activation", self.activation + (f", k = {self.k}" if self.k is not None else "")),
            ("decoder", "tied" if self.tied else "its own"),
            ("decoder norms", " / ".join(f"{norm:.4g}" for norm in norms.values()) if norms else "none finite"),
            ("dead", "not recorded" if self.dead is None else f"{self.dead:,} of {self.d_sae:,}"),
            ("NaN or infinite", ", ".join(f"{n:,} in {key}" for key, n in self.not_finite.items()) or "none"),
            ("file", f"{self.file_bytes:,} bytes"),
        ]
        parts = [text_table(("", self.path), rows), f"dead: not active for more than {self.dead_after} batches"]
        if self.frequencies is not None:
            most = max(1, *(each.latents for each in self.frequencies))
            bins = [
                (_share(each), f"{each.latents:,}", "#" * round(_BAR * each.latents / most))
                for each in self.frequencies
            ]
            parts += [text_table(("active on", "latents", ""), bins)]
        return "\n\n".join(parts)


def inspect_checkpoint(path: str | Path, *, dead_after: int = DEAD_AFTER) -> CheckpointSummary:
    """The summary of an OpenAI-format file; its numbers may be NaN, which is then counted.

    Raises FileNotFoundError or ValueError as `read_openai_checkpoint` does, but for NaN and infinite numbers.
    """
    if dead_after < 0:
        raise ValueError(f"dead_after is {dead_after}; valid: a whole number from 0")
    path = Path(path).expanduser()
    checkpoint = read_openai_checkpoint(path, check_numbers=False)
    d_sae, d_in = checkpoint.encoder.shape
    last, frequency = (checkpoint.buffers.get(key) for key in ("stats_last_nonzero", "latents_activation_frequency"))
    tensors = {
        "encoder.weight": checkpoint.encoder,
        "decoder.weight": checkpoint.decoder,
        "pre_bias": checkpoint.pre_bias,
        "latent_bias": checkpoint.latent_bias,
        **checkpoint.buffers,
    }
    return CheckpointSummary(
        path=str(path),
        version=_version(checkpoint, path),
        d_in=d_in,
        d_sae=d_sae,
        dtype=str(checkpoint.encoder.dtype).removeprefix("torch."),
        activation=checkpoint.activation,
        k=checkpoint.k,
        tied=checkpoint.tied,
        file_bytes=path.stat().st_size,
        dead_after=dead_after,
        dead=None if last is None else int((last > dead_after).sum()),
        frequencies=None if frequency is None else _frequency_bins(frequency),
        decoder_norms=_norms(checkpoint.decoder),
        not_finite={key: count for key, tensor in tensors.items() if (count := _not_finite(tensor))},
    )


def _version(checkpoint: OpenAICheckpoint, path: Path) -> str | None:
    d_sae, d_in = checkpoint.encoder.shape
    if checkpoint.activation == "ReLU" and (d_sae, d_in) in ((32_768, 768), (32_768, 3072)):
        folders = [part for part in path.parts if part.startswith(("mlp_post_act", "resid_delta_mlp"))]
        if folders:
            return "v4" if folders[-1].endswith("_v4") else "v1"
        return "v1 or v4"
    if checkpoint.k == 32 and d_in == 768:
        return {32_768: "v5_32k", 131_072: "v5_128k"}.get(d_sae)
    return None


def _norms(decoder: Tensor) -> dict[str, float] | None:
    norms = torch.linalg.vector_norm(decoder, dim=0, dtype=torch.float64 if decoder.dtype == torch.float64 else None)
    norms = norms.double()[torch.isfinite(norms)]
    if not len(norms):
        return None
    return {"smallest": float(norms.min()), "median": float(norms.median()), "largest": float(norms.max())}


def _frequency_bins(frequency: Tensor) -> tuple[FrequencyBin, ...]:
    edges = [0.0, *(10.0**power for power in range(-7, 1))]
    between = [
        FrequencyBin(low, high, int(((frequency >= low) & (frequency < high) & (frequency > 0)).sum()))
        for low, high in pairwise(edges)
    ]
    never, always = int((frequency == 0).sum()), int((frequency >= 1).sum())
    return (FrequencyBin(0.0, 0.0, never), *between, FrequencyBin(1.0, 1.0, always))


def _share(each: FrequencyBin) -> str:
    if each.lower == each.upper:
        return "no token" if each.upper == 0 else "every token"
    return f"{each.lower:g} to {each.upper:g}"


def _not_finite(tensor: Tensor) -> int:
    if all_finite(tensor):
        return 0
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.split(1024))
