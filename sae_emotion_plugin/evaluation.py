"""An SAE, a model and texts -> `DictionaryReport`: what the reconstruction loses, and what the model loses by it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import (
    HookedModel,
    TokenWindow,
    activation_batches,
    canonical_hook,
    model_device,
    tokenize,
)
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.sparse_codes import CHUNK_ENTRIES, checked_hook, flat_heads, token_settings

if TYPE_CHECKING:
    import pandas

# Logits of a 262,144-token vocabulary: 512 positions are half a GiB in float32.
LOGIT_ENTRIES = 128 * 1024 * 1024


@dataclass(frozen=True)
class DictionaryReport:
    """How faithful a dictionary is on texts that it was not trained on."""

    n_documents: int
    n_tokens: int
    d_sae: int
    fvu: float
    """Fraction of variance unexplained: squared error over squared deviation from the mean, all dimensions together."""
    fvu_without_largest_dimension: float
    """The same without the one dimension that carries most variance."""
    largest_dimension: int
    largest_dimension_share: float
    """Share of the variance that this one dimension carries."""
    fvu_mean_over_dimensions: float
    """Of the dimensions that vary."""
    l0: float
    """Features that fire on a token, on average."""
    dead: int
    """Features that fired on none of these tokens."""
    cross_entropy: float
    """Nats a token of the model as it is."""
    cross_entropy_spliced: float
    """With the reconstruction in place of the activations (BOS left alone)."""
    cross_entropy_mean_ablated: float
    """With every activation replaced by the mean: the floor that makes the line above readable."""
    mean_norm: float
    """Mean norm of the activations, BOS excluded: the unit of steering amounts."""
    documents_left_out: int = 0
    """Others, in which an activation was NaN or infinite."""

    @property
    def loss_recovered(self) -> float:
        """Share of the cross-entropy that mean-ablation destroys and the reconstruction keeps; NaN if that is none."""
        destroyed = self.cross_entropy_mean_ablated - self.cross_entropy
        return (self.cross_entropy_mean_ablated - self.cross_entropy_spliced) / destroyed if destroyed else math.nan

    def to_pandas(self) -> "pandas.DataFrame":
        import pandas as pd

        return pd.DataFrame([{**asdict(self), "loss_recovered": self.loss_recovered}])

    def _repr_html_(self) -> str:
        return self.to_pandas().T.to_html(header=False, float_format="{:.4f}".format)

    def save(self, path: str | Path) -> None:
        # JSON has neither NaN nor infinity: a figure that is not defined is null.
        figures = {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}
        write_whole(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "DictionaryReport":
        """The report written by `save`. ValueError for a file that holds something else."""
        try:
            figures: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            figures |= {name: math.nan for name, value in figures.items() if value is None}
            return cls(**figures)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no dictionary report: {error}") from error


def evaluate(
    model: HookedModel, sae: Any, texts: Sequence[str], *, loss_tokens: int = 10_000, progress: bool = True
) -> DictionaryReport:
    """The report of a dictionary on documents; see `Evaluation` for that of several."""
    return Evaluation(model, texts, loss_tokens=loss_tokens, progress=progress).report(sae)


@dataclass(frozen=True)
class _Reading:
    """What a model makes of texts without any dictionary."""

    vectors: Float[Tensor, "token d_in"]
    """The activations at the hook, without BOS."""
    mean: Float[Tensor, " d_in"]
    windows: list[TokenWindow]
    """Those that cross-entropies are measured on."""
    cross_entropy: float
    cross_entropy_mean_ablated: float
    left_out: int
    """Texts in which an activation was NaN or infinite."""


class Evaluation:
    """Reports of dictionaries on the same documents: what the model makes of them by itself is read once for a hook."""

    def __init__(
        self, model: HookedModel, texts: Sequence[str], *, loss_tokens: int = 10_000, progress: bool = True
    ) -> None:
        """`texts` are held in memory, and so are their activations from the first report on.

        Args:
            texts: documents that the dictionaries were not trained on.
            loss_tokens: the cross-entropies are measured on about this many tokens, spread over the texts; the rest of
                a report on all of them.

        Raises:
            ValueError: no texts.
        """
        if len(texts) == 0:
            raise ValueError("no texts to evaluate on: the list is empty")
        if loss_tokens < 1:
            raise ValueError(f"loss_tokens {loss_tokens} is below 1")
        self.model, self.texts, self.loss_tokens, self.progress = model, texts, loss_tokens, progress
        self._read: tuple[tuple[str, dict[str, Any]], _Reading] | None = None
        """Where and how the texts were read last, and what was read."""

    def report(self, sae: Any) -> DictionaryReport:
        """The report of a dictionary. ValueError for an SAE that does not fit the model, and texts without tokens."""
        hook, settings = canonical_hook(self.model, checked_hook(self.model, sae)), token_settings(sae)
        if self._read is None or self._read[0] != (hook, settings):
            self._read = (hook, settings), self._reading(hook, settings)
        reading = self._read[1]
        vectors, mean = reading.vectors, reading.mean
        error, deviation = torch.zeros(sae.cfg.d_in).double(), torch.zeros(sae.cfg.d_in).double()
        fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
        n_active = 0

        def reconstruct(found: Tensor) -> Tensor:
            return sae.decode(sae.encode(found.to(sae.device, sae.dtype))).to(found)

        with torch.inference_mode(), flat_heads(sae):
            for chunk in vectors.split(max(1, CHUNK_ENTRIES // sae.cfg.d_sae)):
                codes = sae.encode(chunk.to(sae.device, sae.dtype))
                rebuilt = sae.decode(codes).float().cpu()
                error += (rebuilt - chunk).double().square().sum(0)
                deviation += (chunk - mean).double().square().sum(0)
                fired |= (codes > 0).any(0).cpu()
                n_active += int((codes > 0).sum())
            spliced = _cross_entropy(self.model, hook, reading.windows, reconstruct, self.progress)
        largest = int(deviation.argmax())
        rest = torch.arange(len(deviation)) != largest
        return DictionaryReport(
            n_documents=len(self.texts) - reading.left_out,
            n_tokens=len(vectors),
            d_sae=sae.cfg.d_sae,
            fvu=float(error.sum() / deviation.sum()),
            fvu_without_largest_dimension=float(error[rest].sum() / deviation[rest].sum()),
            largest_dimension=largest,
            largest_dimension_share=float(deviation[largest] / deviation.sum()),
            fvu_mean_over_dimensions=float((error / deviation)[deviation > 0].mean()),
            l0=n_active / len(vectors),
            dead=int((~fired).sum()),
            cross_entropy=reading.cross_entropy,
            cross_entropy_spliced=spliced,
            cross_entropy_mean_ablated=reading.cross_entropy_mean_ablated,
            mean_norm=float(vectors.norm(dim=-1).double().mean()),
            documents_left_out=reading.left_out,
        )

    def _reading(self, hook: str, settings: dict[str, Any]) -> _Reading:
        batches = activation_batches(self.model, self.texts, hook, progress=self.progress, **settings)
        parts = [(batch.vectors.float().cpu(), batch.text_index) for batch in batches]
        if not parts:
            raise ValueError("no tokens to evaluate on: every text is empty")
        vectors, texts = torch.cat([one for one, _ in parts]), np.concatenate([one for _, one in parts])
        bad = np.unique(texts[~torch.isfinite(vectors).all(dim=-1).numpy()])
        vectors = vectors[torch.from_numpy(~np.isin(texts, bad))]
        if not len(vectors):
            raise ValueError("every text has activations that are NaN or infinite: run the model in float32")
        mean = vectors.mean(0)
        sound = [one for one in tokenize(self.model, self.texts, **settings) if one.text_index not in bad]
        windows = _spread(sound, self.loss_tokens)

        def ablate(found: Tensor) -> Tensor:
            return mean.to(found).expand_as(found)

        losses = (_cross_entropy(self.model, hook, windows, change, self.progress) for change in (None, ablate))
        return _Reading(vectors, mean, windows, *losses, left_out=len(bad))


def token_losses(model: HookedModel, tokens: Int[Tensor, "row position"]) -> Float[Tensor, "row position_minus_1"]:
    """The negative log-likelihood, in nats, of every token after the first of each row."""
    logits = model(tokens)[:, :-1].float()
    targets = tokens[:, 1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def _spread(windows: list[TokenWindow], tokens: int) -> list[TokenWindow]:
    """Every n-th window, so that about `tokens` tokens remain, from all over the texts."""
    windows = [window for window in windows if len(window.token_ids) > 1]
    total = sum(len(window.token_ids) for window in windows)
    return windows[:: max(1, total // tokens)]


def _equal_lengths(windows: list[TokenWindow], positions: int) -> list[list[TokenWindow]]:
    """Batches of windows of one length, so that nothing is padded, of at most `positions` tokens (or one window)."""
    batches: list[list[TokenWindow]] = []
    for window in sorted(windows, key=lambda window: len(window.token_ids)):
        length = len(window.token_ids)
        if batches and len(batches[-1][0].token_ids) == length and (len(batches[-1]) + 1) * length <= positions:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def _cross_entropy(
    model: HookedModel,
    hook: str,
    windows: list[TokenWindow],
    change: Callable[[Tensor], Tensor] | None,
    progress: bool,
) -> float:
    """Mean nats a token, with `change` made of every activation but BOS's at the hook; None: untouched."""
    total, count = 0.0, 0
    batches = _equal_lengths(windows, max(1, LOGIT_ENTRIES // int(model.cfg.d_vocab)))
    with torch.inference_mode():
        for batch in tqdm(batches, desc="cross-entropy", unit="batch", disable=not progress):
            rows = torch.tensor([window.token_ids for window in batch], device=model_device(model))
            count += rows.shape[0] * (rows.shape[1] - 1)
            with model.hooks(fwd_hooks=[(hook, _splice(change, batch[0].bos))] if change else []):
                total += float(token_losses(model, rows).double().sum())
    if not count:
        raise ValueError("no text has two tokens, so there is no cross-entropy to measure")
    return total / count


def _splice(change: Callable[[Tensor], Tensor], keep_first: bool) -> Callable[..., Tensor]:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:
        flat = tensor.flatten(start_dim=2)
        changed = change(flat).clone()
        if keep_first:
            changed[:, 0] = flat[:, 0]
        return changed.view_as(tensor)

    return hook_fn
