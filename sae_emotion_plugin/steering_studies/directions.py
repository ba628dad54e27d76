"""Any vector as a feature: directions from labelled texts or by chance, and the SAELens dictionary that holds them.

Whatever takes an SAE (plans, batches with a plan a row, gates, exports) takes a dictionary of directions as well.
Arrays of activations are [text d_in], pooled over each text's tokens (`pooled_activations`), in the model's own units.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from sae_emotion_plugin.evidence.logistic import fit_logistic, standardised

STRENGTH = 0.003
"""Inverse regularisation of the probe, on standardised dimensions; the middle one of `DENSE_STRENGTHS`."""


def direction_dictionary(
    vectors: Mapping[str, Num[Tensor, " _"] | Num[np.ndarray, " _"]],
    like: Any,
    *,
    hook_name: str | None = None,
    biases: Mapping[str, float | int] | None = None,
) -> Any:
    """A StandardSAE whose feature i is the i-th vector: it writes the unit vector and reads relu(x @ vector + bias).

    Decoder rows are unit vectors, so that amounts mean the same for all; encoder columns are the vectors as given, and
    nothing is normalised before they read, so that a probe's feature fires where the probe says yes. The metadata of
    `like` (an SAE: model, BOS, context size) are taken over, at another hook without what names that SAE; `directions`
    in them has the names.

    Args:
        hook_name: where the vectors live; by default where `like` reads.
        biases: by name; 0 where none is given.

    Raises:
        ValueError: no vectors, vectors of different lengths, one that is zero or not finite, a bias without a vector
            or not finite, or vectors of another width than `like` at its own hook.
    """
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    if not vectors:
        raise ValueError("a dictionary of directions needs at least one vector")
    biases = {name: float(bias) for name, bias in (biases or {}).items()}
    if unknown := [name for name in biases if name not in vectors]:
        raise ValueError(f"a bias for {unknown[0]!r}, which has no vector (valid: {', '.join(vectors)})")
    if broken := [name for name, bias in biases.items() if not math.isfinite(bias)]:
        raise ValueError(f"the bias of {broken[0]!r} is {biases[broken[0]]}; it must be finite")
    columns = {name: torch.as_tensor(vector).detach().float().cpu() for name, vector in vectors.items()}
    known = like.cfg.metadata.to_dict()
    here = hook_name is None or hook_name == known["hook_name"]
    d_in = int(like.cfg.d_in) if here else len(next(iter(columns.values())))
    for name, vector in columns.items():
        if len(vector) != d_in:
            raise ValueError(f"the direction {name!r} has {len(vector)} dimensions, not {d_in}")
        if not vector.isfinite().all():
            raise ValueError(f"the direction {name!r} is not finite")
        if not vector.any():
            raise ValueError(f"the direction {name!r} is zero")
    if not here:
        known = {key: known[key] for key in ("model_name", "context_size", "prepend_bos") if key in known}
    metadata = SAEMetadata(**{**known, "hook_name": hook_name or known["hook_name"], "directions": list(columns)})
    config = StandardSAEConfig(d_in=d_in, d_sae=len(columns), metadata=metadata)
    # Its weights are drawn before they are replaced, and nobody else's draws should change by that.
    with torch.random.fork_rng(devices=[]):
        dictionary = StandardSAE(config)
    rows = torch.stack(list(columns.values()))
    with torch.no_grad():
        # Twice, as the norm of huge and of tiny vectors overflows or vanishes in float32.
        scaled = rows / rows.abs().amax(dim=1, keepdim=True)
        dictionary.W_dec.copy_(torch.nn.functional.normalize(scaled, dim=1))
        dictionary.W_enc.copy_(rows.T)
        dictionary.b_enc.copy_(torch.tensor([biases.get(name, 0.0) for name in columns]))
        dictionary.b_dec.zero_()
    return dictionary.eval().to(like.device)


def difference_of_means(
    pooled: Float[np.ndarray, "text d_in"], labels: Bool[np.ndarray, " label"], *, standardise: bool = False
) -> Float[np.ndarray, " d_in"]:
    """The mean of the labelled texts minus the mean of the others: the direction that CAA adds (arXiv 2312.06681).

    In the model's units, float64. With `standardise` the difference is taken of standardised dimensions and read back
    in raw space: each dimension is divided by its variance over all texts (constant ones become 0). That is the
    direction along which the score of the standardised difference rises fastest; few dimensions of a residual stream
    are so long that they hide the others.

    ValueError for labels of another number than texts, one class, or values that are not finite.
    """
    _check(pooled, labels)
    values = np.asarray(pooled, dtype=np.float64)
    design, scale = _design(values) if standardise else (values, np.ones(values.shape[1]))
    return (design[labels].mean(axis=0) - design[~labels].mean(axis=0)) / scale


def probe_direction(
    pooled: Float[np.ndarray, "text d_in"],
    labels: Bool[np.ndarray, " label"],
    *,
    inverse_regularisation: float = STRENGTH,
) -> tuple[Float[np.ndarray, " d_in"], float]:
    """A logistic probe of the labelled texts as (direction, bias) in raw space: x @ direction + bias are its log-odds.

    Fitted on standardised dimensions (`evidence.logistic.fit_logistic`), float64. Given to `direction_dictionary` with
    its bias, the feature fires where the log-odds are above 0. With few labelled texts among many the log-odds seldom
    are; a gate has a threshold for that.

    ValueError as in `difference_of_means`.
    """
    _check(pooled, labels)
    values = np.asarray(pooled, dtype=np.float64)
    design, scale = _design(values)
    weights, bias = fit_logistic(design, labels, inverse_regularisation)
    direction = weights / scale
    return direction, float(bias - values.mean(axis=0) @ direction)


def covariance_matched_directions(
    pooled: Float[np.ndarray, "text d_in"], n: int, seed: int, *, covariance: bool = False
) -> Float[np.ndarray, "n d_in"]:
    """Random unit directions with the covariance of the activations, [n d_in]: noise of the activations' own kind.

    Isotropic noise of the same length leaves the few directions in which activations vary, and costs the model far
    more than any direction from data; as a control it proves nothing. Of the same seed the first directions are the
    same whatever `n`.

    Args:
        pooled: activations, or with `covariance` their covariance matrix, [d_in d_in].

    Raises:
        ValueError: fewer than 1 direction or 2 texts, values that are not finite, no variance, or a covariance that is
            not square.
    """
    values = np.asarray(pooled, dtype=np.float64)
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    if not np.isfinite(values).all():
        raise ValueError("the activations are not finite")
    if covariance and values.shape[0] != values.shape[1]:
        raise ValueError(f"the covariance is {values.shape}; it must be square")
    if not covariance and len(values) < 2:
        raise ValueError(f"a covariance needs at least 2 texts, got {len(values)}")
    rng = np.random.default_rng(seed)
    if covariance:
        variances, axes = np.linalg.eigh((values + values.T) / 2)
        root = (axes * np.sqrt(np.maximum(variances, 0.0))).T
    else:
        # A draw weighs the centred texts: the same covariance as that of d_in numbers, without its root.
        root = (values - values.mean(axis=0)) / np.sqrt(len(values))
    drawn = rng.standard_normal((n, len(root))) @ root
    lengths = np.linalg.norm(drawn, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise ValueError("the activations do not vary: there is no covariance to match")
    return drawn / lengths


def random_decoder_rows(sae: Any, n: int, seed: int, exclude: Iterable[int] = ()) -> tuple[int, ...]:
    """`n` different features drawn at random, but none of `exclude`; of one seed the first are the same whatever `n`.

    ValueError for fewer than 1, and for more than the SAE has left.
    """
    left = np.setdiff1d(np.arange(int(sae.cfg.d_sae)), np.array(sorted(set(exclude)), dtype=np.int64))
    if not 1 <= n <= len(left):
        raise ValueError(f"n is {n} (valid: 1 to {len(left)} features that are not excluded)")
    return tuple(np.random.default_rng(seed).permutation(left)[:n].tolist())


def _check(pooled: np.ndarray, labels: np.ndarray) -> None:
    if len(pooled) != len(labels):
        raise ValueError(f"{len(pooled)} texts, but {len(labels)} labels")
    if labels.all() or not labels.any():
        raise ValueError(
            f"a direction needs texts with and without the label, got {int(labels.sum())} of {len(labels)}"
        )
    if not np.isfinite(pooled).all():
        raise ValueError("the activations are not finite")


def _design(values: Float[np.ndarray, "text d_in"]) -> tuple[np.ndarray, Float[np.ndarray, " d_in"]]:
    """The standardised values, and each dimension's standard deviation; infinite where it is constant, as there."""
    design, _ = standardised(values, values[:0])
    spread = values.std(axis=0)
    return design, np.where(design.any(axis=0), spread, np.inf)
