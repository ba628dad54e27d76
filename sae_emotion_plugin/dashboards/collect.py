"""Texts -> their codes and sums, block by block, in a folder: what the dashboards of any corpus are added up from."""

import copy
import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, activation_batches, context_room
from sae_emotion_plugin.code_files import CodeColumns, read_columns, write_columns
from sae_emotion_plugin.files import replacing, write_whole
from sae_emotion_plugin.sparse_codes import encode_vectors

logger = logging.getLogger(__name__)

BLOCK_TEXTS = 512
"""Texts of a block: what a kill can cost."""
MANIFEST = "manifest.json"
_SUMS = "sums.npz"


@dataclass(frozen=True)
class NeuronSums:
    """What correlations with the dimensions of the activations are made of, over tokens; added to in place."""

    n_tokens: Int[np.ndarray, ""]
    neurons: Float[np.ndarray, " d_in"]
    squares: Float[np.ndarray, " d_in"]
    products: Float[np.ndarray, "d_sae d_in"]
    """Activation of the feature times that of the neuron."""

    @classmethod
    def zeros(cls, d_sae: int, d_in: int) -> "NeuronSums":
        return cls(np.zeros((), np.int64), np.zeros(d_in), np.zeros(d_in), np.zeros((d_sae, d_in)))

    def add(self, other: "NeuronSums") -> None:
        for name, values in vars(self).items():
            values += getattr(other, name)

    def add_tokens(
        self,
        vectors: Float[np.ndarray, "token d_in"],
        values: Float[np.ndarray, " entry"],
        features: Int[np.ndarray, " entry"],
        counts: Int[np.ndarray, " token"],
    ) -> None:
        """Add tokens: their activations, and their codes side by side. In float64: means can dwarf deviations."""
        dense = vectors.astype(np.float64)
        self.n_tokens[...] += len(dense)
        self.neurons[...] += dense.sum(axis=0)
        self.squares[...] += np.square(dense).sum(axis=0)
        firing, place = np.unique(features, return_inverse=True)
        starts = np.r_[0, np.cumsum(counts)]
        codes = scipy.sparse.csr_matrix((values.astype(np.float64), place, starts), shape=(len(dense), len(firing)))
        self.products[firing] += codes.T @ dense

    def save(self, path: Path, n_blocks: int) -> None:
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, n_blocks=np.int64(n_blocks), **vars(self))

    @classmethod
    def load(cls, path: Path) -> tuple["NeuronSums", int]:
        """The sums, and how many blocks are in them. ValueError for a damaged file, FileNotFoundError for none."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                arrays = dict(saved)
            n_blocks = int(arrays.pop("n_blocks"))
            return cls(**arrays), n_blocks
        except (zipfile.BadZipFile, ValueError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def folded_sae(sae: Any) -> tuple[Any, bool]:
    """The SAE as Neuronpedia's inference server uses it, and whether that is another one.

    A copy with decoder rows of length 1, or the SAE itself where SAELens says that folding would change which features
    fire: TopK without rescaling by the decoder's norms, temporal, matching pursuit.
    """
    unsafe = sae.cfg.architecture() in ("temporal", "matching_pursuit")
    if unsafe or not getattr(sae.cfg, "rescale_acts_by_decoder_norm", True):
        return sae, False
    folded = copy.deepcopy(sae)
    folded.fold_W_dec_norm()
    return folded, True


def corpus_digest(texts: Sequence[str]) -> str:
    """A hash of the texts in any order; that of two corpora together is the sum of theirs, modulo 2^256."""
    total = sum(int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()) for text in texts)
    return f"{total % 2**256:064x}"


def collect(
    model: HookedModel,
    sae: Any,
    texts: Sequence[str],
    folder: Path,
    key: str,
    *,
    hook_name: str,
    context_size: int,
    prepend_bos: bool,
    block_texts: int = BLOCK_TEXTS,
    progress: bool = True,
) -> tuple[list[CodeColumns], NeuronSums]:
    """The codes of all texts, memory-mapped block by block, and the sums; read where the folder has them already.

    The texts of a `CodeColumns` are sequences here: windows that fit the context. An interrupted run goes on behind
    its last block.
    """
    blocks = folder / "blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(texts), block_texts)
    paths = [blocks / f"{start:08d}.safetensors" for start in starts]
    labels = [{"format": "dashboard codes 1", "key": key, "texts": f"{start}, {block_texts}"} for start in starts]
    settings = {"context_size": context_size, "prepend_bos": prepend_bos}
    room = context_room(model, **settings)
    silent = _special_tokens(model)
    found, sums = _kept(blocks, paths, labels)
    if sums is None:
        found, sums = [], NeuronSums.zeros(int(sae.cfg.d_sae), int(sae.cfg.d_in))
    with tqdm(total=len(texts), initial=min(len(found) * block_texts, len(texts)), desc="encoding texts",
              unit="text", disable=not progress) as bar:  # fmt: skip
        for number in range(len(found), len(paths)):
            part = texts[starts[number] : starts[number] + block_texts]
            batches = []
            for batch in activation_batches(model, part, hook_name, progress=False, **settings):
                values, features, counts = encode_vectors(sae, batch.vectors)
                token = np.repeat(np.arange(len(counts)), counts)
                heard = ~np.isin(batch.token_ids, silent)
                firing = (values > 0) & heard[token]
                values, features = values[firing], features[firing]
                counts = np.bincount(token[firing], minlength=len(counts))
                vectors = batch.vectors.float().cpu().numpy()
                sums.add_tokens(vectors[heard], values, features, counts[heard])
                batches.append((batch.text_index, batch.position, batch.token_ids, counts, features, values))
            write_columns(paths[number], [_columns(batches, room)], [0], labels[number])
            sums.save(blocks / _SUMS, number + 1)  # behind the block: what is summed up is there
            found.append(read_columns(paths[number], labels[number]))
            bar.update(len(part))
    return found, sums


def _kept(
    blocks: Path, paths: Sequence[Path], labels: Sequence[dict[str, str]]
) -> tuple[list[CodeColumns], NeuronSums | None]:
    """The blocks that an interrupted run left, and their sums: None where they do not agree, and all is made anew."""
    try:
        sums, n_blocks = NeuronSums.load(blocks / _SUMS)
        pairs = list(zip(paths, labels, strict=True))[:n_blocks]
        return [read_columns(path, label) for path, label in pairs], sums
    except FileNotFoundError:
        pass
    except ValueError as error:
        logger.warning("%s: the texts are encoded anew", error)
    return [], None


def _columns(batches: Sequence[tuple[np.ndarray, ...]], room: int) -> CodeColumns:
    """One block's columns in the order of texts and positions; texts of several windows become several sequences."""
    if not batches:
        return CodeColumns(np.zeros(0, np.float32), *(np.zeros(0, np.int32) for _ in range(4)))
    text, position, token_ids, counts, features, values = map(np.concatenate, zip(*batches, strict=True))
    order = np.lexsort((position, text))
    begins = np.diff(text[order], prepend=-1) != 0
    begins |= position[order] % room == 0
    entries = ranges((np.cumsum(counts) - counts)[order], counts[order])
    return CodeColumns(
        values=values[entries].astype(np.float32),
        features=features[entries].astype(np.int32),
        counts=counts[order].astype(np.int32),
        text=(np.cumsum(begins) - 1).astype(np.int32),
        token_ids=token_ids[order].astype(np.int32),
    )


def ranges(starts: Int[np.ndarray, " range"], lengths: Int[np.ndarray, " range"]) -> Int[np.ndarray, " entry"]:
    """The indices `start, start + 1, ...` of every range, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(np.asarray(starts) - (ends - lengths), lengths)


def _special_tokens(model: HookedModel) -> list[int]:
    """BOS, EOS and padding: also where a text spells them out they count for nothing."""
    tokenizer = model.tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [token for token in ids if token is not None]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of dashboards was made of.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no manifest, or a damaged one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"key": manifest["key"], "recipe": dict(manifest["recipe"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no dashboards: {MANIFEST} is missing or damaged ({error!r})") from error


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
