"""An SAE and activations -> sparse codes: which features fire on which token, and how strongly.

One streaming pass; what is dense, `[token, d_sae]`, exists for one chunk of tokens at a time.
"""

import html
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_emotion_plugin.activations import (
    HookedModel,
    Pooling,
    activation_batches,
    context_room,
    hook_capture,
    tokenize,
)
from sae_emotion_plugin.code_files import CodeColumns, codes_recipe, open_columns, recipe_key, stored_columns
from sae_emotion_plugin.files import replacing
from sae_emotion_plugin.models import warn_of_another_model
from sae_emotion_plugin.topk_encoding import EncodingPath, PathCounts, is_plain_topk, topk_codes

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

# Dense pre-activations of one chunk: 64 MiB in float32, which stays in cache-friendly territory on a CPU and is
# small change on a GPU.
CHUNK_ENTRIES = 16 * 1024 * 1024
POOLED_TEXTS = 4096
"""Texts whose entries are sorted at a time when they are pooled."""


@dataclass(frozen=True)
class SparseCodes:
    """The non-zero codes of a list of texts, tokens in text order, in compressed sparse rows.

    Row `t` (one token) is `features[row_starts[t]:row_starts[t + 1]]` with the `values` beside it. BOS and padding
    are not among the tokens. The arrays may be memory-mapped (`open_codes`, or a cache of `encode_texts`); what is
    written into those stays in this process.
    """

    values: Float[np.ndarray, " entry"]
    features: Int[np.ndarray, " entry"]
    row_starts: Int[np.ndarray, " token_plus_1"]
    text_index: Int[np.ndarray, " token"]
    """The text of each token, never decreasing; a text without tokens has none."""
    token_ids: Int[np.ndarray, " token"]
    n_texts: int
    d_sae: int
    hook_name: str

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def text_lengths(self) -> Int[np.ndarray, "text"]:
        """How many tokens each text has."""
        return np.bincount(self.text_index, minlength=self.n_texts)

    def matrix(self) -> scipy.sparse.csr_matrix:
        """The codes as a scipy matrix `[token, d_sae]` that shares our arrays."""
        return scipy.sparse.csr_matrix(
            (self.values, self.features, self.row_starts), shape=(self.n_tokens, self.d_sae), copy=False
        )

    def pooled(self, pooling: Pooling = "max") -> scipy.sparse.csr_matrix:
        """One row a text, `[text, d_sae]`: each feature's maximum, mean, sum or last-token code in the text.

        A feature that is silent on a token counts as zero there, in the mean too.
        """
        if pooling not in get_args(Pooling):
            raise ValueError(f"unknown pooling {pooling!r} (valid: {', '.join(get_args(Pooling))})")
        lengths = self.text_lengths
        if pooling == "last":
            ends = np.cumsum(lengths)
            rows = self.matrix()[ends[lengths > 0] - 1]
            return _scatter_rows(rows, np.flatnonzero(lengths), (self.n_texts, self.d_sae))
        parts = [
            self._pooled_texts(pooling, start, min(start + POOLED_TEXTS, self.n_texts))
            for start in range(0, max(self.n_texts, 1), POOLED_TEXTS)
        ]
        return scipy.sparse.csr_matrix(scipy.sparse.vstack(parts, format="csr"))

    def _pooled_texts(self, pooling: Pooling, start: int, end: int) -> scipy.sparse.csr_matrix:
        tokens = slice(*np.searchsorted(self.text_index, [start, end]))
        starts = self.row_starts[tokens.start : tokens.stop + 1]
        entries = slice(starts[0], starts[-1])
        text_index = self.text_index[tokens] - start
        entry_text = np.repeat(text_index, np.diff(starts))
        features = self.features[entries]
        order = np.lexsort((features, entry_text))
        text, feature, value = entry_text[order], features[order], self.values[entries][order]
        first = np.flatnonzero(np.r_[True, (np.diff(text) != 0) | (np.diff(feature) != 0)][: len(text)])
        if len(first) == 0:
            return scipy.sparse.csr_matrix((end - start, self.d_sae), dtype=np.float32)
        if pooling == "max":
            pooled = np.maximum.reduceat(value, first)
        else:
            pooled = np.add.reduceat(value.astype(np.float64), first)
            if pooling == "mean":
                pooled = pooled / np.bincount(text_index)[text[first]]
        return scipy.sparse.csr_matrix(
            (pooled.astype(np.float32), (text[first], feature[first])), shape=(end - start, self.d_sae)
        )

    def select_texts(self, indices: Sequence[int] | Int[np.ndarray, " chosen"]) -> "SparseCodes":
        """The codes of some texts, renumbered in the order given."""
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < self.n_texts):
            raise ValueError(f"texts {chosen.min()} to {chosen.max()} were asked for (valid: 0 to {self.n_texts - 1})")
        starts = np.searchsorted(self.text_index, np.arange(self.n_texts + 1))
        counts = (starts[1:] - starts[:-1])[chosen]
        tokens = _ranges(starts[chosen], counts)
        row_lengths = np.diff(self.row_starts)[tokens]
        entries = _ranges(self.row_starts[tokens], row_lengths)
        return SparseCodes(
            values=self.values[entries],
            features=self.features[entries],
            row_starts=np.r_[0, np.cumsum(row_lengths)].astype(np.int64),
            text_index=np.repeat(np.arange(len(chosen)), counts).astype(np.int32),
            token_ids=self.token_ids[tokens],
            n_texts=len(chosen),
            d_sae=self.d_sae,
            hook_name=self.hook_name,
        )

    def of_text(self, index: int, feature: int) -> tuple[Int[np.ndarray, " token"], Float[np.ndarray, " token"]]:
        """The token ids of one text and one feature's code on each of them (dense: it is one short text)."""
        start, end = np.searchsorted(self.text_index, [index, index + 1])
        codes = self.matrix()[start:end, feature].toarray()[:, 0]
        return self.token_ids[start:end], codes

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each non-zero code: text, token (counted over all texts), token_id, feature, value."""
        import pandas as pd

        token = np.repeat(np.arange(self.n_tokens), np.diff(self.row_starts))
        return pd.DataFrame(
            {
                "text": self.text_index[token],
                "token": token,
                "token_id": self.token_ids[token],
                "feature": self.features,
                "value": self.values,
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the codes as JSON Lines, whole or not at all: a header, then one line a token."""
        header = {"n_texts": self.n_texts, "d_sae": self.d_sae, "hook_name": self.hook_name}
        with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
            for token in range(self.n_tokens):
                entries = slice(self.row_starts[token], self.row_starts[token + 1])
                row = {
                    "text": int(self.text_index[token]),
                    "token_id": int(self.token_ids[token]),
                    "features": self.features[entries].tolist(),
                    # The shortest decimal that gives the same float32 back.
                    "values": [float(str(value)) for value in self.values[entries]],
                }
                file.write(json.dumps(row) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SparseCodes":
        """The codes written by `save`. ValueError for a file that holds something else."""
        try:
            with Path(path).open(encoding="utf-8") as file:
                header = json.loads(file.readline())
                rows = [json.loads(line) for line in file]
            return cls(
                values=np.array([value for row in rows for value in row["values"]], dtype=np.float32),
                features=np.array([feature for row in rows for feature in row["features"]], dtype=np.int32),
                row_starts=np.r_[0, np.cumsum([len(row["features"]) for row in rows])].astype(np.int64),
                text_index=np.array([row["text"] for row in rows], dtype=np.int32),
                token_ids=np.array([row["token_id"] for row in rows], dtype=np.int32),
                n_texts=header["n_texts"],
                d_sae=header["d_sae"],
                hook_name=header["hook_name"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no codes: {error!r}") from error

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"

    def __repr__(self) -> str:
        l0 = len(self.values) / max(self.n_tokens, 1)
        return (
            f"SparseCodes({self.n_texts} texts, {self.n_tokens} tokens, {self.d_sae} features at "
            f"{self.hook_name}, L0 {l0:.1f})"
        )


def encode_texts(
    model: HookedModel,
    sae: Any,
    texts: Sequence[str] | Any,
    *,
    cache: str | Path | None = None,
    progress: bool = True,
) -> SparseCodes:
    """The sparse codes of `texts` (strings, or `LabelledTexts`) at the hook that the SAE was trained on.

    Works for every SAELens SAE that reads and writes one hook (TopK, ReLU, JumpReLU, BatchTopK, gated ...); the
    values are those of its own `encode`. Context size and BOS follow the SAE's metadata.

    Args:
        cache: a folder that keeps the codes, block by block, under a hash of model, SAE and texts: an interrupted
            run goes on where it was, and a second one only reads. The codes are memory-mapped then.

    Raises:
        ValueError: the texts are empty, the model lacks the hook, the widths differ, or the SAE is a transcoder.
    """
    strings: Sequence[str] = getattr(texts, "texts", texts)
    if isinstance(strings, str):
        raise ValueError("texts must be a list of strings, not one string")
    if len(strings) == 0:
        raise ValueError("no texts to encode: the list is empty")
    hook_name = checked_hook(model, sae)
    if cache is None:
        columns = _encode_block(model, sae, strings, hook_name, progress)
    else:
        columns = stored_columns(
            cache,
            codes_recipe(model, sae, strings, token_settings(sae)),
            lambda start, end: _encode_block(model, sae, strings[start:end], hook_name, progress=False),
            progress=progress,
        )
    codes = _from_columns(columns, len(strings), int(sae.cfg.d_sae), hook_name)
    room = context_room(model, **token_settings(sae))
    if n_long := int((codes.text_lengths > room).sum()):
        logger.warning(
            "%d of %d texts are longer than the %d tokens of the SAE's context: they were split, "
            "and no part of a text sees the parts before it",
            n_long,
            len(strings),
            room,
        )
    return codes


def open_codes(folder: str | Path, key: str | None = None) -> SparseCodes:
    """The codes that `encode_texts` kept: one of the folders in its cache, read through memory-mapped files.

    Args:
        key: the codes that are wanted, from `codes_key`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no codes, those of another model, SAE or texts, or not all of them.
    """
    columns, manifest = open_columns(folder, key)
    return _from_columns(columns, manifest["n_texts"], manifest["d_sae"], manifest["hook_name"])


def codes_key(model: HookedModel, sae: Any, texts: Sequence[str] | Any) -> str:
    """The hash under which the codes of these texts are kept: the name of their folder in the cache."""
    return recipe_key(codes_recipe(model, sae, getattr(texts, "texts", texts), token_settings(sae)))


def encode_vectors(
    sae: Any,
    vectors: Float[Tensor, "token d_in"],
    *,
    path: EncodingPath = "auto",
    counts: PathCounts | None = None,
) -> tuple[Float[np.ndarray, " entry"], Int[np.ndarray, " entry"], Int[np.ndarray, " token"]]:
    """The non-zero codes of a batch of vectors: values, features, and how many each token has.

    Args:
        path: how the largest pre-activations of a TopK SAE are found (`topk_encoding.topk_codes`); all others, and
            those that are hooked into, go through their own `encode`.
        counts: what is added to: tokens by the path that their codes took.
    """
    values, features, lengths = [], [], []
    with torch.inference_mode(), flat_heads(sae):
        plain = is_plain_topk(sae)
        found = topk_codes(sae, vectors, path=path, counts=counts) if plain else _dense_codes(sae, vectors)
        for codes, names in found:
            token, place = codes.nonzero(as_tuple=True)
            values.append(codes[token, place].float().cpu().numpy())
            features.append((place if names is None else names[token, place]).to(torch.int32).cpu().numpy())
            lengths.append(torch.bincount(token, minlength=len(codes)).cpu().numpy())
    return np.concatenate(values), np.concatenate(features), np.concatenate(lengths)


def _dense_codes(sae: Any, vectors: Float[Tensor, "token d_in"]) -> Iterator[tuple[Float[Tensor, "token d_sae"], None]]:
    """Each few tokens' dense codes, in the order of the features, which need no names."""
    for chunk in vectors.to(device=sae.device, dtype=sae.dtype).split(max(1, CHUNK_ENTRIES // sae.cfg.d_sae)):
        codes = sae.encode(chunk)
        yield (codes.to_dense() if codes.is_sparse else codes), None


def checked_hook(model: HookedModel, sae: Any) -> str:
    """The SAE's hook name, after a check that the SAE can be used at it.

    Raises:
        ValueError: a transcoder, a hook that the model lacks, or another width; the message gives both sides. An SAE of
            another model with the same width and hook is warned of.
    """
    if "transcoder" in sae.cfg.architecture():
        raise ValueError(
            f"{sae.cfg.architecture()} reads {sae.cfg.metadata.hook_name} and writes "
            f"{sae.cfg.metadata.hook_name_out}: only SAEs that read and write one hook can be used"
        )
    hook_name = sae.cfg.metadata.hook_name
    if not hook_name:
        raise ValueError("the SAE's metadata names no hook (hook_name)")
    windows = tokenize(model, ["a"], **token_settings(sae))
    width = hook_capture(model, hook_name)(torch.tensor([windows[0].token_ids])).shape[-1]
    if width != sae.cfg.d_in:
        raise ValueError(f"the SAE reads {sae.cfg.d_in} dimensions, the model has {width} at {hook_name}")
    warn_of_another_model(model, sae.cfg.metadata.model_name)
    return hook_name


def token_settings(sae: Any) -> dict[str, Any]:
    """How texts are cut for this SAE: `context_size` (at most 512) and `prepend_bos` of its metadata."""
    context_size, prepend_bos = sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos
    return {
        "context_size": min(int(context_size), 512) if context_size else 128,
        "prepend_bos": True if prepend_bos is None else bool(prepend_bos),
    }


@contextmanager
def flat_heads(sae: Any) -> Iterator[None]:
    """Our vectors are flat already: an SAE on attention heads must not fold them again, for as long as this lasts."""
    folding = sae.cfg.reshape_activations == "hook_z" and sae.hook_z_reshaping_mode
    if folding:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if folding:
            sae.turn_on_forward_pass_hook_z_reshaping()


def _encode_block(model: HookedModel, sae: Any, texts: Sequence[str], hook_name: str, progress: bool) -> CodeColumns:
    """The columns of one block's codes, tokens in text order, texts counted from the block's start."""
    batches = []
    for batch in activation_batches(model, texts, hook_name, progress=progress, **token_settings(sae)):
        values, features, counts = encode_vectors(sae, batch.vectors)
        batches.append((batch.text_index, batch.position, batch.token_ids, counts, features, values))
    if not batches:
        return CodeColumns(np.zeros(0, np.float32), *(np.zeros(0, np.int32) for _ in range(4)))
    text, position, token_ids, counts, features, values = map(np.concatenate, zip(*batches, strict=True))
    order = np.lexsort((position, text))
    entries = _ranges((np.cumsum(counts) - counts)[order], counts[order])
    return CodeColumns(
        values=values[entries].astype(np.float32),
        features=features[entries].astype(np.int32),
        counts=counts[order].astype(np.int32),
        text=text[order].astype(np.int32),
        token_ids=token_ids[order].astype(np.int32),
    )


def _from_columns(columns: CodeColumns, n_texts: int, d_sae: int, hook_name: str) -> SparseCodes:
    if not len(columns.text):
        raise ValueError("no tokens to encode: every text is empty")
    return SparseCodes(
        values=columns.values,
        features=columns.features,
        row_starts=np.r_[0, np.cumsum(columns.counts, dtype=np.int64)],
        text_index=columns.text,
        token_ids=columns.token_ids,
        n_texts=n_texts,
        d_sae=d_sae,
        hook_name=hook_name,
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices `start, start + 1, ...` of every range, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(np.asarray(starts) - (ends - lengths), lengths)


def _scatter_rows(rows: scipy.sparse.csr_matrix, where: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_matrix:
    lengths = np.zeros(shape[0], dtype=np.int64)
    lengths[where] = np.diff(rows.indptr)
    return scipy.sparse.csr_matrix((rows.data, rows.indices, np.r_[0, np.cumsum(lengths)]), shape=shape)
