"""Reference dictionaries beside a trained one: what random directions, and a model that learnt nothing, give already.

The same recipe on the same texts with the decoder or the encoder frozen at its random start (Korznikov et al., arXiv
2602.14111, whose third, softly frozen decoder is left out); random directions that fire as often as the trained
features; and the recipe itself on the model with shuffled weights. They are references for the size of an effect and
no empty nulls: each may carry information on a text's emotion, since random directions see the same activations and a
shuffled model still tells one word from another.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_emotion_plugin.activation_store import ActivationStore, collect
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.recipes import REFERENCES, TrainingRecipe
from sae_emotion_plugin.sparse_codes import CHUNK_ENTRIES, SparseCodes, encode_texts
from sae_emotion_plugin.training import (
    SHUFFLED_MARK,
    TrainedDictionary,
    recipe_documents,
    sae_metadata,
    train,
    write_dictionary,
)

TRAINED = "trained"
"""The name of the dictionary that the references are compared with."""
# Projections on the directions that are handled together: half a GiB in float32.
PROJECTIONS_AT_ONCE = 128 * 1024 * 1024
DRAWS = 10
"""Directions that are tried for a feature until its rate can be had: equal tokens fire together."""
ROUNDING = 1e-6
"""Error of a projection, in units of the largest, that matrix products of different shapes may make."""


def train_references(
    recipe: TrainingRecipe,
    model: Any,
    text_root: str | Path,
    out_dir: str | Path,
    *,
    work_dir: str | Path | None = None,
    kinds: Sequence[str] = REFERENCES,
    loss_tokens: int = 10_000,
    progress: bool = True,
) -> dict[str, TrainedDictionary]:
    """The dictionary that `recipe` makes, under the name `trained`, and the references of these kinds, by kind.

    Each is a folder `<out_dir>/<name>` that plain SAELens loads, with its report, and with recipe and provenance that
    name the kind. All read the activations in `work_dir` (by default `<out_dir>.work`), collected once; those of the
    shuffled model are collected beside them. A folder that is complete is kept, and an interrupted training goes on,
    when this is called again. `model` stays as it is; its shuffled copy needs as much memory again. `loss_tokens` as
    in `train`.

    Raises:
        ValueError, FileNotFoundError: an unknown kind, a recipe of a reference, a folder there that holds something
            else, and whatever `train` refuses.
    """
    for kind in kinds:
        if kind not in REFERENCES:
            raise ValueError(f"unknown reference {kind!r} (valid: {', '.join(REFERENCES)})")
    if recipe.reference is not None:
        raise ValueError(f"{recipe.name} is a reference itself ({recipe.reference}): give the trained one's recipe")
    recipes = {TRAINED: recipe}
    for kind in (kind for kind in REFERENCES if kind in kinds):
        # Refused here, before the first of them trains for an hour, where the architecture has no such reference.
        recipes[kind] = replace(recipe, name=f"{recipe.name}-{kind}", reference=kind)
    out_dir, text_root = Path(out_dir), Path(text_root)
    work = Path(work_dir) if work_dir else out_dir.with_name(out_dir.name + ".work")
    training, held_out, sources = recipe_documents(recipe, model, text_root)
    options: dict[str, Any] = {"loss_tokens": loss_tokens, "progress": progress}
    made: dict[str, TrainedDictionary] = {}
    for name, own in recipes.items():
        shuffled = name == "shuffled-weights"
        folder = out_dir / name
        if folder.exists():
            identity = {"name": _shuffled_name(model, recipe.seed)} if shuffled else model_identity(model)
            matched = made[TRAINED].sha256["sae_weights.safetensors"] if name == "random-directions" else None
            made[name] = _kept(folder, own, {"model": identity, "texts": sources, "firing_rates_of": matched})
        elif name == "random-directions":
            store = collect(recipe, model, training, work, progress)
            made[name] = _random_directions(made[TRAINED], own, model, store, held_out, sources, folder, **options)
        else:
            read = shuffled_model(model, recipe.seed) if shuffled else model
            made[name] = train(own, read, text_root, folder, work_dir=work, **options)
    return made


def shuffled_model(model: Any, seed: int) -> Any:
    """A copy of a hooked model that learnt nothing: the entries of every weight matrix permuted within the matrix.

    Every parameter of two dimensions or more is permuted, the embedding among them, so each keeps its own distribution
    of values; norms and biases (one dimension) stay. A matrix that is used twice (tied embeddings) stays one. The
    copy's name says what was done (Heap et al., arXiv 2501.17727, compare with such models); `model` is not changed.
    """
    shared: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    for module in model.modules():
        # A bridge keeps its last attention pattern; after a pass with gradients, torch refuses to copy it.
        kept = [value for value in vars(module).values() if isinstance(value, torch.Tensor) and not value.is_leaf]
        shared |= {id(value): value.detach() for value in kept}
    shuffled = copy.deepcopy(model, shared)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(_permuted(parameter.detach(), rng))
    name = _shuffled_name(model, seed)
    shuffled.cfg.model_name = name
    config = getattr(getattr(shuffled, "original_model", None), "config", None)
    if config is not None:
        config._name_or_path = name
    setattr(shuffled, SHUFFLED_MARK, True)
    return shuffled


def encode_references(
    dictionaries: Mapping[str, TrainedDictionary],
    model: Any,
    *parts: Sequence[str] | LabelledTexts,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[dict[str, SparseCodes], ...]:
    """For each part (training texts, held-out texts) the codes of every dictionary, by its name.

    A part passes through the model once for all dictionaries that read it, and through the shuffled copy once for those
    that read that. `cache` as in `encode_texts`.
    """
    from sae_lens import SAE

    found: tuple[dict[str, SparseCodes], ...] = tuple({} for _ in parts)
    for shuffled in (False, True):
        names = [name for name, one in dictionaries.items() if (one.recipe.reference == "shuffled-weights") == shuffled]
        if not names:
            continue
        read = shuffled_model(model, dictionaries[names[0]].recipe.seed) if shuffled else model
        saes = {name: SAE.load_from_disk(dictionaries[name].folder) for name in names}
        for part, codes in zip(parts, found, strict=True):
            codes.update(encode_beside(saes, read, part, cache=cache, progress=progress))
    return tuple({name: codes[name] for name in dictionaries} for codes in found)


def encode_beside(
    saes: Mapping[str, Any],
    model: Any,
    texts: Sequence[str] | LabelledTexts,
    *,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, SparseCodes]:
    """The codes of every SAE, all of one hook, by its name; the texts pass through the model once. `cache` as above."""
    joined = _SideBySide(list(saes.values()))
    codes = encode_texts(model, joined, texts, cache=cache, progress=progress)
    return dict(zip(saes, joined.apart(codes), strict=True))


def firing_counts(sae: Any, store: ActivationStore) -> Int[np.ndarray, " feature"]:
    """On how many of the stored tokens each feature of a dictionary fires."""
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    with torch.inference_mode():
        for chunk in _chunks(store, max(1, CHUNK_ENTRIES // sae.cfg.d_sae)):
            counts += (sae.encode(chunk.to(sae.device, sae.dtype)) > 0).sum(0).cpu()
    return counts.numpy()


def random_directions_sae(
    store: ActivationStore, counts: Int[np.ndarray, " feature"], seed: int, metadata: Any = None
) -> Any:
    """A JumpReLU SAE of random unit directions, feature f firing on `counts[f]` of the stored tokens.

    A feature's code is the projection of the centred activation on its direction where that exceeds the feature's
    threshold, and 0 elsewhere. Equal tokens fire together, so a direction that would have to part them is drawn again,
    and a count that no draw can give becomes the nearest one. A feature that fires on more than about half of the
    tokens has a threshold below 0; its code is counted from there. Nothing is fitted but the thresholds and the mean,
    so the reconstruction is a poor one.
    """
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sums, lengths = zip(*((chunk.double().sum(0), len(chunk)) for chunk in _chunks(store)), strict=True)
    mean = torch.stack(sums).sum(0).div(sum(lengths)).float()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.empty(len(counts), len(mean))
    thresholds = np.empty(len(counts), dtype=np.float32)
    step = max(1, PROJECTIONS_AT_ONCE // len(store))
    left = np.arange(len(counts))
    for _ in range(DRAWS):
        drawn = torch.randn(len(left), len(mean), generator=generator)
        directions[left] = torch.nn.functional.normalize(drawn, dim=-1)
        clear = np.zeros(len(left), dtype=bool)
        for first in range(0, len(left), step):
            features = left[first : first + step]
            rows = directions[features]
            projections = torch.cat([rows @ (chunk - mean).T for chunk in _chunks(store)], dim=1).numpy()
            for n, feature in enumerate(features):
                thresholds[feature], clear[first + n] = _threshold(projections[n], int(counts[feature]))
        left = left[~clear]
        if len(left) == 0:
            break
    options = {} if metadata is None else {"metadata": metadata}
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=len(mean), d_sae=len(counts), apply_b_dec_to_input=True, **options))
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
        sae.b_dec.copy_(mean)
        # A JumpReLU is silent below 0 whatever its threshold: what has to fire there is raised to 0.
        sae.b_enc.copy_(torch.from_numpy(np.maximum(-thresholds, 0)))
        sae.threshold.copy_(torch.from_numpy(np.maximum(thresholds, 0)))
    return sae.eval()


def _threshold(projections: Float[np.ndarray, " token"], count: int) -> tuple[float, bool]:
    """The value that `count` of the projections exceed, and whether it is clear of rounding; else the nearest that is.

    The same token in another batch has another last digit: a threshold must not stand between two such projections.
    """
    n = len(projections)
    if count == 0:
        return float(projections.max()) + 1.0, True
    if count == n:
        return float(projections.min()) - 1.0, True
    rounding = ROUNDING * float(np.abs(projections).max())
    silent, fires = np.partition(projections, (n - count - 1, n - count))[n - count - 1 : n - count + 1].tolist()
    if fires - silent > 2 * rounding:
        return (silent + fires) / 2, True
    above, below = fires + rounding, silent - rounding
    without, together = (projections > above).sum(), (projections > below).sum()
    return (above if count - without <= together - count else below), False


def _random_directions(
    trained: TrainedDictionary,
    recipe: TrainingRecipe,
    model: Any,
    store: ActivationStore,
    held_out: list[str],
    sources: list[dict[str, Any]],
    folder: Path,
    **options: Any,
) -> TrainedDictionary:
    from sae_lens import SAE

    counts = firing_counts(SAE.load_from_disk(trained.folder), store)
    sae = random_directions_sae(store, counts, recipe.seed, sae_metadata(recipe, model_identity(model)["name"]))
    off = np.abs(firing_counts(sae, store) - counts)
    provenance = {
        "texts": sources,
        "training_tokens": len(store),
        "firing_rates_of": trained.sha256["sae_weights.safetensors"],
        "largest_firing_rate_difference": float(off.max() / len(store)),
    }

    def save(path: Path) -> None:
        sae.save_model(path)

    return write_dictionary(folder, recipe, model, Evaluation(model, held_out, **options).report, save, provenance)


def _kept(folder: Path, recipe: TrainingRecipe, provenance: dict[str, Any]) -> TrainedDictionary:
    """The dictionary that an earlier call made in `folder`, of the same recipe, model, texts and firing rates."""
    there = TrainedDictionary.load(folder)
    record = there.provenance()
    differing = [name for name, value in provenance.items() if record.get(name) != value]
    if there.recipe != recipe:
        differing = ["recipe", *differing]
    if differing:
        raise ValueError(f"{folder} holds a dictionary with another {differing[0]}: choose another folder")
    return there


def _shuffled_name(model: Any, seed: int) -> str:
    return f"{model_identity(model)['name']}, weights shuffled (seed {seed})"


def _permuted(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    # numpy has no bfloat16, and a permutation need not know what the bits mean.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.cpu().contiguous().flatten().clone()
    rng.shuffle(flat.view(bits).numpy())
    return flat.view(tensor.shape)


def _chunks(store: ActivationStore, tokens: int = 32_768) -> Iterator[Float[Tensor, "token d_in"]]:
    """The stored activations in order, some tokens at a time, without those that hold NaN or infinity."""
    for first in range(0, len(store), tokens):
        rows = store.rows(np.arange(first, min(first + tokens, len(store))))
        yield rows[torch.isfinite(rows).all(dim=-1)]


class _SideBySide:
    """SAEs of one hook as one whose features stand side by side: all that `encode_texts` asks of an SAE."""

    def __init__(self, saes: Sequence[Any]) -> None:
        self.saes = saes
        first = saes[0]
        self.bounds = np.r_[0, np.cumsum([sae.cfg.d_sae for sae in saes])]
        self.device, self.dtype = first.device, first.dtype
        self.cfg = SimpleNamespace(
            d_in=first.cfg.d_in,
            d_sae=int(self.bounds[-1]),
            metadata=first.cfg.metadata,
            reshape_activations="none",
            architecture=lambda: "side by side",
            to_dict=lambda: [sae.cfg.to_dict() for sae in saes],
        )

    def encode(self, vectors: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        return torch.cat([sae.encode(vectors) for sae in self.saes], dim=-1)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{n}.{name}": value for n, sae in enumerate(self.saes) for name, value in sae.state_dict().items()}

    def apart(self, codes: SparseCodes) -> list[SparseCodes]:
        """The codes of each SAE, out of those of all."""
        token = np.repeat(np.arange(codes.n_tokens), np.diff(codes.row_starts))
        parts = []
        for low, high in zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True):
            own = (codes.features >= low) & (codes.features < high)
            lengths = np.bincount(token[own], minlength=codes.n_tokens)
            parts.append(
                replace(
                    codes,
                    values=codes.values[own],
                    features=codes.features[own] - low,
                    row_starts=np.r_[0, np.cumsum(lengths)].astype(np.int64),
                    d_sae=high - low,
                )
            )
        return parts
