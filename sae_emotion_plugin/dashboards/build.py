"""A model, an SAE and texts -> the dashboards of all features in one pass; and several such into one."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.activations import HookedModel, context_room
from sae_emotion_plugin.code_files import codes_recipe, recipe_key
from sae_emotion_plugin.dashboards.collect import (
    BLOCK_TEXTS,
    NeuronSums,
    collect,
    corpus_digest,
    folded_sae,
    read_manifest,
    write_manifest,
)
from sae_emotion_plugin.dashboards.corpus import COMPLETE, StoredCorpus, store_corpus
from sae_emotion_plugin.dashboards.logits import alignment_arrays, logit_arrays
from sae_emotion_plugin.dashboards.statistics import activation_arrays, by_feature, related_features, related_neurons
from sae_emotion_plugin.dashboards.types import META, Dashboards
from sae_emotion_plugin.models import decode_token
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings

logger = logging.getLogger(__name__)

_CORPUS = "corpus"
_SUMS = "sums.npz"
_OWN_TEXTS = ("n_texts", "texts_sha256")


@dataclass(frozen=True)
class DashboardSettings:
    """How much a dashboard shows; the defaults are those of SAEDashboard's runner for Neuronpedia."""

    n_bins: int = 50
    """Bins of both histograms."""
    n_strongest: int = 20
    """Sequences in the group of the strongest."""
    n_intervals: int = 5
    """Equal intervals between 0 and the largest activation."""
    n_sampled: int = 5
    """Sequences sampled from each interval."""
    n_logits: int = 10
    """Most promoted tokens, and as many most suppressed."""
    n_related: int = 3
    """Correlated features, correlated neurons and aligned neurons."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value < 1:
                raise ValueError(f"{name} is {value} (valid: 1 or more)")


def build_dashboards(
    model: HookedModel,
    sae: Any,
    texts: Sequence[str] | Any,
    folder: str | Path,
    *,
    settings: DashboardSettings | None = None,
    context_size: int | None = None,
    block_texts: int = BLOCK_TEXTS,
    progress: bool = True,
) -> Dashboards:
    """The dashboards of all features on `texts` (strings, or `LabelledTexts`), made in `folder` and read from there.

    The model reads every text once. A text is one sequence, or several where it is longer than the context; BOS, EOS
    and padding never count. Interrupted, the same call goes on; finished, it only reads. Activations are those of
    `folded_sae`.

    Definitions are those of SAEDashboard 0.8.0 (its runner for Neuronpedia), compared with its output number by number
    (`benchmarks/dashboard_parity.py`). They differ on purpose in this:

    - BOS, EOS and padding are silent there too, but here they are no tokens either: not in the shares of tokens, not
      in correlations, in which BOS's large activations would count.
    - Every token of every text is read, also of a text that occurs twice. SAEDashboard drops repeated and short texts
      and all that is behind the first window.
    - A sequence is shown whole. SAEDashboard cuts the first token off, also where it is no BOS.
    - The strongest and the sampled are sequences, each once, and only such as the feature fires on. SAEDashboard takes
      tokens, and fills up with silent ones; Neuronpedia folds the repetitions away.
    - An interval's sample is of sequences whose maximum lies in it, where the page would move them.
    - Activations that are all equal make a histogram that begins at 0; SAEDashboard's bins have no width then.
    - Correlated features are sought among all features, not among the 128 of a batch, and only positive correlations
      count. A feature that never fires has neither those nor correlated neurons.
    - The model is used as it was given. SAEDashboard's centres what layers write into the residual stream, where the
      norm is a layer norm; and it does not take logits from their mean where the model caps them.
    - Numbers are not rounded.

    Memory beside model and SAE (a folded copy of which is made where it can be): 8 bytes x d_sae x d_in for the
    correlations with neurons, twice while parts are merged; the codes of one block of `block_texts` texts; about 40
    bytes a token of the corpus; and less than 1 GB of work space, whatever the size of corpus and dictionary. On disk:
    16 bytes for each active code. Time grows with the tokens (one forward pass), and with d_sae times the vocabulary.

    Args:
        context_size: tokens of a sequence with BOS; the SAE's own (at most 512) by default.
        block_texts: texts that are encoded together. A model's rounding depends on what it reads together, so parts
            of a corpus that were cut between blocks add up to the whole exactly, others up to that rounding.

    Raises:
        ValueError: no texts or no tokens, the model lacks the hook, the widths differ, the SAE is a transcoder, or the
            folder holds other dashboards.
    """
    strings: Sequence[str] = getattr(texts, "texts", texts)
    if isinstance(strings, str):
        raise ValueError("texts must be a list of strings, not one string")
    if len(strings) == 0:
        raise ValueError("no texts for the dashboards: the list is empty")
    if block_texts < 1:
        raise ValueError(f"block_texts is {block_texts} (valid: 1 or more)")
    settings = settings or DashboardSettings()
    hook_name = checked_hook(model, sae)
    cut: dict[str, Any] = token_settings(sae)
    if context_size is not None:
        cut["context_size"] = context_size
    context_room(model, **cut)
    used, folded = folded_sae(sae)
    recipe = codes_recipe(model, sae, strings, cut) | {
        "block_texts": block_texts,
        "texts_sha256": corpus_digest(strings),
        "folded": folded,
        "settings": asdict(settings),
    }
    folder = Path(folder)
    manifest = _started(folder, recipe)
    if (folder / META).is_file():
        return Dashboards.load(folder)
    if not (folder / _CORPUS / COMPLETE).is_file():
        blocks, sums = collect(
            model, used, strings, folder, manifest["key"], hook_name=hook_name, block_texts=block_texts,
            progress=progress, **cut,
        )  # fmt: skip
        if not sum(len(block.token_ids) for block in blocks):
            raise ValueError("no tokens for the dashboards: every text is empty")
        sums.save(folder / _SUMS, len(blocks))
        store_corpus(blocks, folder / _CORPUS)
    shutil.rmtree(folder / "blocks", ignore_errors=True)
    rows = used.W_dec.detach()
    fixed = logit_arrays(
        model, rows, hook_name, n_bins=settings.n_bins, n_tokens=settings.n_logits, progress=progress
    ) | alignment_arrays(rows, settings.n_related)
    corpus = StoredCorpus.load(folder / _CORPUS)
    ids = np.unique(np.r_[np.unique(corpus.token_ids), fixed["promoted_ids"].ravel(), fixed["suppressed_ids"].ravel()])
    texts_of = {int(token): _token_text(model, int(token)) for token in ids}
    return _finished(folder, manifest, corpus, fixed, texts_of, progress)


def merge_dashboards(parts: Sequence[str | Path], folder: str | Path, *, progress: bool = True) -> Dashboards:
    """The dashboards of the parts' texts together, made in `folder` and read from there; nothing is encoded.

    Parts are folders of finished dashboards, of the same model, SAE and settings. The result is that of all texts at
    once, whatever the parts and their order: byte for byte, but for correlations with neurons, whose float64 sums may
    differ by a rounding, and as far as the parts' codes do not differ by the model's own rounding (`block_texts` of
    `build_dashboards`). A text that is in two parts counts twice, as it does twice in one.

    Raises:
        ValueError: no parts, a part is not finished, or the parts are of different models, SAEs or settings.
        FileNotFoundError: a part does not exist.
    """
    if not parts:
        raise ValueError("no dashboards to merge: the list is empty")
    sources = [Path(part) for part in parts]
    recipes = [read_manifest(source)["recipe"] for source in sources]
    for source, recipe in zip(sources, recipes, strict=True):
        if other := [name for name in recipe if name not in _OWN_TEXTS and recipe[name] != recipes[0].get(name)]:
            raise ValueError(
                f"{source} and {sources[0]} cannot be merged: their {other[0]} differ "
                f"({recipe[other[0]]}, {recipes[0].get(other[0])})"
            )
    made = [Dashboards.load(source) for source in sources]
    digest = sum(int(recipe["texts_sha256"], 16) for recipe in recipes) % 2**256
    recipe = recipes[0] | {"n_texts": sum(one["n_texts"] for one in recipes), "texts_sha256": f"{digest:064x}"}
    folder = Path(folder)
    manifest = _started(folder, recipe)
    if (folder / META).is_file():
        return Dashboards.load(folder)
    sums, _ = NeuronSums.load(sources[0] / _SUMS)
    for source in sources[1:]:
        sums.add(NeuronSums.load(source / _SUMS)[0])
    sums.save(folder / _SUMS, len(sources))
    corpus = store_corpus([StoredCorpus.load(source / _CORPUS).columns() for source in sources], folder / _CORPUS)
    fixed = {name: getattr(made[0], name) for name in _FIXED}
    texts_of = {
        token: text for one in made for token, text in zip(one.known_ids.tolist(), one.known_texts, strict=True)
    }
    return _finished(folder, manifest, corpus, fixed, texts_of, progress)


_FIXED = (
    "logit_ends", "logit_counts", "promoted_ids", "promoted_effects", "suppressed_ids", "suppressed_effects",
    "aligned_neurons", "aligned_values", "aligned_shares",
)  # fmt: skip


def _started(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The manifest, written to the folder unless it is there. ValueError where there is another one."""
    manifest = {"key": recipe_key(recipe), "recipe": recipe}
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        found = read_manifest(folder)
        if found["key"] != manifest["key"]:
            different = sorted(name for name in recipe if found["recipe"].get(name) != recipe[name])
            raise ValueError(
                f"{folder} holds dashboards of another {', '.join(different)}: name a new folder, or remove that one"
            )
        return found
    write_manifest(folder, manifest)
    return manifest


def _finished(
    folder: Path,
    manifest: dict[str, Any],
    corpus: StoredCorpus,
    fixed: dict[str, np.ndarray],
    texts_of: dict[int, str],
    progress: bool,
) -> Dashboards:
    """The dashboards of a corpus and its sums, written to their folder."""
    recipe = manifest["recipe"]
    settings = DashboardSettings(**recipe["settings"])
    sums, _ = NeuronSums.load(folder / _SUMS)
    n_tokens = int(sums.n_tokens)
    codes = by_feature(corpus, recipe["d_sae"], folder)
    arrays = fixed | activation_arrays(
        corpus,
        codes,
        n_tokens,
        n_bins=settings.n_bins,
        n_strongest=settings.n_strongest,
        n_intervals=settings.n_intervals,
        n_sampled=settings.n_sampled,
        seed=settings.seed,
        progress=progress,
    )
    arrays |= related_features(corpus, codes, n_tokens, settings.n_related, progress=progress)
    arrays |= related_neurons(codes, sums, settings.n_related)
    known = sorted(texts_of)
    Dashboards(
        meta={**recipe, "key": manifest["key"], "n_tokens": n_tokens, "n_sequences": len(corpus.sequence_keys)},
        token_ids=corpus.token_ids,
        sequence_starts=corpus.sequence_starts,
        sequence_keys=corpus.sequence_keys,
        feature_starts=codes.starts,
        entry_tokens=codes.tokens,
        entry_values=codes.values,
        known_ids=np.array(known, np.int64),
        known_texts=tuple(texts_of[token] for token in known),
        **arrays,
    ).save(folder)
    return Dashboards.load(folder)


def _token_text(model: HookedModel, token_id: int) -> str:
    """The text of one token; a vocabulary may be padded with ids that its tokenizer does not have."""
    return decode_token(model, token_id) if token_id < len(model.tokenizer) else "<|outofrange|>"
