"""Activations of many tokens at one hook: collected once in shards on disk, read back in seeded batches.

A shard that was written stays, so that an interrupted collection goes on where it was, and every dictionary trained on
the same model, hook and texts reads the same files.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import activation_batches, tokenize
from sae_emotion_plugin.files import replacing
from sae_emotion_plugin.models import weights_identity
from sae_emotion_plugin.recipes import TrainingRecipe

Item = TypeVar("Item")

# About 80 MB of float32 activations a shard at 640 dimensions: what an interrupt can cost.
SHARD_TOKENS = 32_768


class ActivationStore:
    """Float32 activations of many tokens in memory-mapped shards, read back in a seeded order, epoch after epoch."""

    def __init__(self, shards: list[Path], key: str) -> None:
        self.key = key
        """Hash of the model, hook and texts that the activations come from."""
        self.shards = [np.load(path, mmap_mode="r") for path in shards]
        self.starts = np.r_[0, np.cumsum([len(shard) for shard in self.shards])]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, wanted: np.ndarray) -> Float[Tensor, "token d_in"]:
        """The activations of some tokens, in ascending order of their number (a batch's order does not matter)."""
        wanted = np.sort(wanted)
        cuts = np.searchsorted(wanted, self.starts)
        pieces = [
            shard[wanted[low:high] - start]
            for shard, start, low, high in zip(self.shards, self.starts[:-1], cuts[:-1], cuts[1:], strict=True)
            if high > low
        ]
        return torch.from_numpy(np.concatenate(pieces))

    def batches(self, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Float[Tensor, "token d_in"]]:
        """Endless shuffled batches; `first_step` skips what a resumed run has seen."""
        steps = len(self) // batch_size
        epoch, offset = divmod(first_step, steps)
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            for step in range(offset, steps):
                yield self.rows(order[step * batch_size : (step + 1) * batch_size])
            epoch, offset = epoch + 1, 0


def prefetched(items: Iterator[Item], ahead: int = 2) -> Iterator[Item]:
    """The same items in the same order, read by a thread while those before are used; its errors come in their place.

    Closing the iterator ends the thread.
    """
    end: Any = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def store_key(recipe: TrainingRecipe, model: Any, texts: list[str]) -> str:
    """A hash of all that decides the activations: model, hook, windows and texts."""
    return content_key(weights_identity(model), recipe.hook_name, _windows(recipe), texts)


def _windows(recipe: TrainingRecipe) -> dict[str, Any]:
    return {"context_size": recipe.context_size, "prepend_bos": True}


def collect(recipe: TrainingRecipe, model: Any, texts: list[str], work: Path, progress: bool = True) -> ActivationStore:
    """The activations of all texts, a shard of texts at a time; shards that are in `work` already are kept.

    Raises:
        ValueError: the model lacks the hook, or the disk has no room for all of them.
    """
    settings = _windows(recipe)
    windows = tokenize(model, texts, **settings)
    key = store_key(recipe, model, texts)
    folder = work / f"activations-{key}"
    folder.mkdir(exist_ok=True)
    lengths = np.bincount(
        [window.text_index for window in windows],
        weights=[len(window.token_ids) - window.bos for window in windows],
        minlength=len(texts),
    )
    bounds = np.searchsorted(np.cumsum(lengths), np.arange(0, lengths.sum(), SHARD_TOKENS)[1:])
    # One text may fill several shards' worth: the shards that it skips would be empty.
    pieces = [piece for piece in np.split(np.arange(len(texts)), bounds) if lengths[piece].sum()]
    paths = []
    for index, piece in enumerate(tqdm(pieces, desc="activations", unit="shard", disable=not progress)):
        path = folder / f"{index:05d}.npy"
        paths.append(path)
        if path.is_file():
            continue
        batches = activation_batches(model, [texts[i] for i in piece], recipe.hook_name, progress=False, **settings)
        vectors = torch.cat([batch.vectors.float().cpu() for batch in batches]).numpy()
        _check_room(work, int(lengths[np.concatenate(pieces[index:])].sum()) * vectors[0].nbytes)
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, vectors)
    return ActivationStore(paths, key)


def _check_room(folder: Path, needed: int) -> None:
    """ValueError now rather than after an hour when the activations will not fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the activations need another {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free: choose "
            f"a work folder on another disk, or fewer tokens"
        )


def content_key(*parts: Any) -> str:
    """A short hash of what JSON can hold: the name of what is kept between runs."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
