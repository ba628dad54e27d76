"""Products with codes that are mostly zero: forward and gradients through the active entries alone.

No dense `[token, d_sae]` outlives a chunk of tokens. Where so many features are active that a dense product is the
cheaper one (a ReLU at its start, AuxK over few dead features), a chunk is made dense, used, and thrown away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ENTRIES = 8 * 1024 * 1024
"""Pre-activations, or codes made dense, that exist at a time: 32 MiB in float32."""
DENSE_SHARE = 1 / 16
"""From this share of active entries on, a dense product is faster: an entry of a sparse one costs some ten times as
much as one of a dense product (measured on a CPU)."""


@dataclass(frozen=True)
class Active:
    """Which features are active on which tokens, token by token."""

    features: Int[Tensor, " entry"]
    tokens: Int[Tensor, " entry"]
    n_tokens: int
    n_features: int

    @cached_property
    def starts(self) -> Int[Tensor, " token_plus_1"]:
        """Where each token's entries begin; the last one is their number."""
        return _starts(self.tokens, self.n_tokens)

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, " entry"], Int[Tensor, " feature_plus_1"]]:
        """The order that sorts the entries by feature, and where each feature's begin then."""
        return self.features.argsort(stable=True), _starts(self.features, self.n_features)

    @property
    def is_dense(self) -> bool:
        return len(self.features) > DENSE_SHARE * self.n_tokens * self.n_features

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Some tokens at a time: their slice, and that of their entries."""
        step = max(1, CHUNK_ENTRIES // self.n_features)
        for first in range(0, self.n_tokens, step):
            last = min(first + step, self.n_tokens)
            yield slice(first, last), slice(int(self.starts[first]), int(self.starts[last]))

    def dense(self, values: Float[Tensor, " entry"], tokens: slice, entries: slice) -> Float[Tensor, "chunk feature"]:
        codes = values.new_zeros(tokens.stop - tokens.start, self.n_features)
        codes[self.tokens[entries] - tokens.start, self.features[entries]] = values[entries]
        return codes


def _starts(groups: Int[Tensor, " entry"], n: int) -> Int[Tensor, " n_plus_1"]:
    starts = torch.zeros(n + 1, dtype=torch.int64, device=groups.device)
    starts[1:] = torch.bincount(groups, minlength=n).cumsum(0)
    return starts


Selection = Callable[[Float[Tensor, "chunk feature"]], tuple[Tensor, Tensor, Tensor]]
"""Pre-activations of some tokens -> values, tokens and features of the entries to keep, token by token."""


def largest(k: int) -> Selection:
    """The selection of each token's k largest pre-activations, in no order."""

    def select(pre: Float[Tensor, "chunk feature"]) -> tuple[Tensor, Tensor, Tensor]:
        top = pre.topk(k, sorted=False)
        tokens = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
        return top.values.flatten(), tokens, top.indices.flatten()

    return select


def positive(pre: Float[Tensor, "chunk feature"]) -> tuple[Tensor, Tensor, Tensor]:
    """The selection of what a ReLU lets through."""
    tokens, features = (pre > 0).nonzero(as_tuple=True)
    return pre[tokens, features], tokens, features


def encode(
    x: Float[Tensor, "token d_in"],
    pre_bias: Float[Tensor, " d_in"],
    encoder: Float[Tensor, "d_in feature"],
    bias: Float[Tensor, " feature"],
    select: Selection,
) -> tuple[Float[Tensor, " entry"], Active]:
    """The selected entries of `(x - pre_bias) @ encoder + bias`, with gradients to all but `x`.

    The gradient of the encoder needs active features alone, that of the pre-bias one product with a vector.
    """
    with torch.no_grad():
        inputs = x - pre_bias
        rows = max(1, CHUNK_ENTRIES // encoder.shape[1])
        memory = x.new_empty(min(rows, len(x)), encoder.shape[1])
        parts, first = [], 0
        for part in inputs.split(rows):
            values, tokens, features = select(torch.addmm(bias, part, encoder, out=memory[: len(part)]))
            parts.append((values, tokens + first, features))
            first += len(part)
        values, tokens, features = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    active = Active(features, tokens, len(x), encoder.shape[1])
    return _Encoded.apply(values, active, inputs, pre_bias, encoder, bias), active


def decode(
    values: Float[Tensor, " entry"], active: Active, rows: Float[Tensor, "feature d_in"]
) -> Float[Tensor, "token d_in"]:
    """The codes times the decoder's rows, with gradients to both."""
    return _Decoded.apply(values, active, rows)


def unit_rows(rows: Float[Tensor, "feature d_in"]) -> Float[Tensor, "feature d_in"]:
    """Rows of unit norm as they are; their gradient loses what is parallel to them (arXiv 2406.04093, A.1)."""
    return _UnitRows.apply(rows)


@torch.no_grad()
def make_unit_rows_(rows: Float[Tensor, "feature d_in"]) -> None:
    rows.div_(rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny))


def keep_as_rows_(encoder: torch.nn.Parameter) -> None:
    """Lay a `[d_in, feature]` matrix out in memory as a row for each feature: so its gradient comes."""
    encoder.data = encoder.data.T.contiguous().T


@torch.no_grad()
def elsewhere(rows: Float[Tensor, "feature d_in"]) -> Float[Tensor, "feature d_in"]:
    """Random rows as long as these, from torch's global generator: an encoder's start that is not tied to them."""
    drawn = torch.randn_like(rows)
    return drawn / drawn.norm(dim=-1, keepdim=True) * rows.norm(dim=-1, keepdim=True)


def strongest(values: Float[Tensor, " entry"], active: Active, k: int) -> tuple[Float[Tensor, " kept"], Active]:
    """Of a selection of equally many entries for each token the k largest of each."""
    each = len(values) // max(1, active.n_tokens)
    place = values.detach().view(active.n_tokens, each).topk(k, sorted=False).indices
    kept = (place + torch.arange(active.n_tokens, device=place.device)[:, None] * each).flatten()
    return values[kept], Active(active.features[kept], active.tokens[kept], active.n_tokens, active.n_features)


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, active: Active, inputs: Tensor, pre_bias: Tensor, encoder: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(inputs, encoder)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs, encoder = ctx.saved_tensors
        active, grad = ctx.active, grads[0]
        encoder_grad = weighted_sums(grad, active, inputs).T
        bias_grad = grad.new_zeros(active.n_features).index_add_(0, active.features, grad)
        return None, None, None, -(encoder @ bias_grad), encoder_grad, bias_grad


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, active: Active, rows: Tensor) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(values, rows)
        return weighted_rows(values, active, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, rows = ctx.saved_tensors
        grad = grads[0]
        return row_products(grad, ctx.active, rows), None, weighted_sums(values, ctx.active, grad)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (rows,), grad = ctx.saved_tensors, grads[0]
        along = torch.bmm(rows[:, None], grad[:, :, None])[:, 0]
        return grad.addcmul(rows, along, value=-1)


def weighted_rows(
    values: Float[Tensor, " entry"], active: Active, rows: Float[Tensor, "feature d_in"]
) -> Float[Tensor, "token d_in"]:
    """For each token the sum of the rows of its features, weighted by their values."""
    if active.is_dense:
        return torch.cat([active.dense(values, *chunk) @ rows for chunk in active.chunks()])
    return torch.nn.functional.embedding_bag(
        active.features, rows, active.starts[:-1], per_sample_weights=values, mode="sum"
    )


def weighted_sums(
    values: Float[Tensor, " entry"], active: Active, vectors: Float[Tensor, "token d_in"]
) -> Float[Tensor, "feature d_in"]:
    """For each feature the sum of the vectors of its tokens, weighted by its values there."""
    if active.is_dense:
        total = vectors.new_zeros(active.n_features, vectors.shape[1])
        for tokens, entries in active.chunks():
            total.addmm_(active.dense(values, tokens, entries).T, vectors[tokens])
        return total
    order, starts = active.by_feature
    return torch.nn.functional.embedding_bag(
        active.tokens[order], vectors, starts[:-1], per_sample_weights=values[order], mode="sum"
    )


def row_products(
    vectors: Float[Tensor, "token d_in"], active: Active, rows: Float[Tensor, "feature d_in"]
) -> Float[Tensor, " entry"]:
    """For each entry the product of its token's vector and its feature's row."""
    if active.is_dense:
        parts = [
            (vectors[tokens] @ rows.T)[active.tokens[entries] - tokens.start, active.features[entries]]
            for tokens, entries in active.chunks()
        ]
        return torch.cat(parts)
    # The gradient of a bag's weights is this product, without a copy of the rows for each entry.
    with torch.enable_grad():
        weights = vectors.new_zeros(len(active.features), requires_grad=True)
        sums = torch.nn.functional.embedding_bag(
            active.features, rows.detach(), active.starts[:-1], per_sample_weights=weights, mode="sum"
        )
    return torch.autograd.grad(sums, weights, vectors)[0]
