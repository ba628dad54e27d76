"""The codes of a whole corpus on disk, in an order that does not depend on how the corpus was cut or sorted.

Sequences stand in the order of a hash of their token ids; the same texts in other parts or in another order give the
same files, byte for byte, and so do all counts, ties and samples that are taken from them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int, UInt64
from numpy.lib.format import open_memmap

from sae_emotion_plugin.code_files import CodeColumns
from sae_emotion_plugin.files import write_whole

SLAB_ENTRIES = 4 * 1024 * 1024
"""Codes that are in memory at a time."""
COMPLETE = "corpus.json"


@dataclass(frozen=True)
class StoredCorpus:
    """All sequences and their codes by token, memory-mapped; `CodeColumns` once more, with what finds things in it."""

    values: Float[np.ndarray, " entry"]
    features: Int[np.ndarray, " entry"]
    row_starts: Int[np.ndarray, " token_plus_1"]
    token_ids: Int[np.ndarray, " token"]
    sequence_starts: Int[np.ndarray, " sequence_plus_1"]
    sequence_keys: UInt64[np.ndarray, " sequence"]

    @classmethod
    def load(cls, folder: Path) -> "StoredCorpus":
        """ValueError where the folder holds none, or not all of it."""
        if not (folder / COMPLETE).is_file():
            raise ValueError(f"{folder} holds no codes, or not all of them: build its dashboards again to go on")
        return cls(**{name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in cls.__annotations__})

    def columns(self) -> CodeColumns:
        """The same as one part of a larger corpus."""
        lengths = np.diff(self.sequence_starts)
        return CodeColumns(
            values=self.values,
            features=self.features,
            counts=np.diff(self.row_starts).astype(np.int32),
            text=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            token_ids=self.token_ids,
        )

    def slabs(self, entries: int = SLAB_ENTRIES) -> Iterator[slice]:
        """The tokens in slices of about `entries` codes."""
        n_tokens, start = len(self.token_ids), 0
        while start < n_tokens:
            end = int(np.searchsorted(self.row_starts, self.row_starts[start] + entries, side="right")) - 1
            yield slice(start, end := min(max(end, start + 1), n_tokens))
            start = end

    def matrix(self, tokens: slice, d_sae: int) -> scipy.sparse.csr_matrix:
        """The codes of some tokens, `[token, d_sae]`, in float64."""
        starts = np.asarray(self.row_starts[tokens.start : tokens.stop + 1])
        own = slice(int(starts[0]), int(starts[-1]))
        return scipy.sparse.csr_matrix(
            (self.values[own].astype(np.float64), self.features[own], starts - starts[0]),
            shape=(tokens.stop - tokens.start, d_sae),
        )


@dataclass(frozen=True)
class _Part:
    """Columns, and where the sequences and the tokens' entries begin in them."""

    columns: CodeColumns
    token_starts: Int[np.ndarray, " sequence_plus_1"]
    entry_starts: Int[np.ndarray, " token_plus_1"]

    @classmethod
    def of(cls, columns: CodeColumns) -> "_Part":
        begins = np.flatnonzero(np.diff(columns.text, prepend=-1))
        return cls(columns, np.r_[begins, len(columns.text)], np.r_[0, np.cumsum(columns.counts, dtype=np.int64)])

    def places(self, sequence: int) -> tuple[slice, slice]:
        """The sequence's tokens and its entries."""
        start, end = self.token_starts[sequence : sequence + 2]
        return slice(start, end), slice(*self.entry_starts[[start, end]])

    def keys(self) -> UInt64[np.ndarray, "sequence 2"]:
        """Of each sequence a hash of its tokens and one of its codes."""
        found = np.empty((len(self.token_starts) - 1, 2), np.uint64)
        for sequence in range(len(found)):
            tokens, entries = self.places(sequence)
            whole = self.columns
            found[sequence] = (
                _hash(whole.token_ids[tokens]),
                _hash(whole.counts[tokens], whole.features[entries], whole.values[entries]),
            )
        return found


def store_corpus(columns: Sequence[CodeColumns], folder: Path) -> StoredCorpus:
    """The corpus of all columns, written to the folder, its sequences in the order of their keys."""
    parts = [_Part.of(one) for one in columns]
    keys = np.concatenate([part.keys() for part in parts] or [np.empty((0, 2), np.uint64)])
    owners = [(part, sequence) for part in parts for sequence in range(len(part.token_starts) - 1)]
    # Sequences with the same tokens stand side by side; should a rounding tell their codes apart, in a fixed order.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    n_tokens, n_entries = (sum(len(getattr(one, name)) for one in columns) for name in ("token_ids", "values"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETE).unlink(missing_ok=True)
    shapes = {
        "values": (np.float32, n_entries),
        "features": (np.int32, n_entries),
        "row_starts": (np.int64, n_tokens + 1),
        "token_ids": (np.int32, n_tokens),
        "sequence_starts": (np.int64, len(order) + 1),
        "sequence_keys": (np.uint64, len(order)),
    }
    made = {name: new_array(folder, name, kind, (length,)) for name, (kind, length) in shapes.items()}
    made["sequence_keys"][:] = keys[order, 0]
    token = entry = 0
    for rank, which in enumerate(order.tolist()):
        part, sequence = owners[which]
        tokens, entries = part.places(sequence)
        token_end, entry_end = token + tokens.stop - tokens.start, entry + entries.stop - entries.start
        made["token_ids"][token:token_end] = part.columns.token_ids[tokens]
        made["row_starts"][token + 1 : token_end + 1] = entry + np.cumsum(part.columns.counts[tokens])
        made["features"][entry:entry_end] = part.columns.features[entries]
        made["values"][entry:entry_end] = part.columns.values[entries]
        made["sequence_starts"][rank + 1] = token_end
        token, entry = token_end, entry_end
    for array in made.values():
        array.flush()
    size = {"n_sequences": len(order), "n_tokens": n_tokens, "n_entries": n_entries}
    write_whole(folder / COMPLETE, json.dumps(size) + "\n")
    return StoredCorpus.load(folder)


def new_array(folder: Path, name: str, kind: type, shape: tuple[int, ...]) -> np.memmap:
    """A memory-mapped `.npy` file of zeros."""
    return open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)


def _hash(*arrays: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest())
