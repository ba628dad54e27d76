"""`FeatureDashboard`, what is known of one feature, and `Dashboards`, the arrays of all of them on disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt64

from sae_emotion_plugin.files import replacing, write_whole

META = "dashboards.json"
FORMAT = "dashboards 1"


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width."""

    lowest: float
    highest: float
    counts: tuple[int, ...]
    """Of the bins from `lowest` to `highest`, ascending; empty where there is nothing to count."""

    @property
    def centres(self) -> tuple[float, ...]:
        width = (self.highest - self.lowest) / max(len(self.counts), 1)
        return tuple(self.lowest + (bin + 0.5) * width for bin in range(len(self.counts)))


@dataclass(frozen=True)
class ActivatingSequence:
    """A stretch of one text as the model saw it, BOS left out, and one feature's activation on each token."""

    key: str
    """16 hexadecimal digits, a hash of the token ids: the same sequence has the same key in every corpus."""
    tokens: tuple[str, ...]
    """Decoded one by one, leading spaces kept; U+FFFD for part of a character."""
    token_ids: tuple[int, ...]
    values: tuple[float, ...]
    """At least 0, as many as tokens, at least one of them positive."""
    strongest: int
    """Place of the largest value; the first of several."""

    @property
    def maximum(self) -> float:
        return self.values[self.strongest]


@dataclass(frozen=True)
class SequenceGroup:
    """The strongest sequences of a feature, or a sample of those whose maximum lies in an interval.

    No sequence stands twice in a group; one may stand among the strongest and in an interval.
    """

    lowest: float | None
    """Of the interval; None for the strongest."""
    highest: float
    share: float | None
    """Of all tokens, silent ones too, those whose activation lies in the interval, ends included; None for the
    strongest."""
    sequences: tuple[ActivatingSequence, ...]
    """Of the strongest in descending order of maximum, and so in an interval; may be empty there."""


@dataclass(frozen=True)
class TokenEffect:
    """What a feature's direction adds to the logit of a token."""

    token: str
    token_id: int
    effect: float


@dataclass(frozen=True)
class Correlation:
    """Another feature, or a dimension of the activations (a "neuron"), over all tokens."""

    index: int
    pearson: float
    cosine: float


@dataclass(frozen=True)
class AlignedNeuron:
    """A dimension in which the feature's decoder row is large."""

    index: int
    value: float
    l1_share: float
    """Its absolute value as a share of the row's L1 norm."""


@dataclass(frozen=True)
class FeatureDashboard:
    """What one feature does on the corpus, and what its direction does to the logits.

    Activations are those of the SAE after its decoder rows were scaled to length 1 where that can be done
    (`meta["folded"]`), as Neuronpedia's inference server has them. A feature that never fires has no sequences, an
    empty activation histogram and no correlations.
    """

    feature: int
    n_tokens: int
    """Tokens looked at: neither BOS, EOS nor padding."""
    n_active: int
    """Tokens with an activation above 0."""
    fraction_active: float
    maximum: float
    """The largest activation seen; 0 for a feature that never fires."""
    activations: Histogram
    """Of the activations above 0."""
    groups: tuple[SequenceGroup, ...]
    """The strongest sequences first, then the intervals from the highest down; none for a feature that never fires."""
    logits: Histogram
    """Of the direction's effects on the logits of the whole vocabulary."""
    promoted: tuple[TokenEffect, ...]
    """The largest effects, descending."""
    suppressed: tuple[TokenEffect, ...]
    """The smallest effects, ascending."""
    correlated_features: tuple[Correlation, ...]
    """By Pearson, descending; positive only, so there may be fewer than were asked for."""
    correlated_neurons: tuple[Correlation, ...]
    """By Pearson, descending."""
    aligned_neurons: tuple[AlignedNeuron, ...]
    """By value, descending."""


@dataclass(frozen=True)
class Dashboards:
    """The dashboards of all features: `dashboards.feature(7)`, or iterate. Arrays are memory-mapped where loaded."""

    meta: dict[str, Any]
    """How they were made: model, hook, hashes of SAE and texts, settings, counts, versions."""
    token_ids: Int[np.ndarray, " token"]
    sequence_starts: Int[np.ndarray, " sequence_plus_1"]
    sequence_keys: UInt64[np.ndarray, " sequence"]
    feature_starts: Int[np.ndarray, " d_sae_plus_1"]
    entry_tokens: Int[np.ndarray, " entry"]
    """The tokens on which a feature fires, features one behind the other, tokens ascending."""
    entry_values: Float[np.ndarray, " entry"]
    minima: Float[np.ndarray, " d_sae"]
    """The smallest activation above 0, where the activation histogram begins; 0 where all are equal."""
    maxima: Float[np.ndarray, " d_sae"]
    activation_counts: Int[np.ndarray, "d_sae bin"]
    interval_counts: Int[np.ndarray, "d_sae interval"]
    strongest: Int[np.ndarray, "d_sae top"]
    """Sequences, the strongest first; -1 where there are no more."""
    sampled: Int[np.ndarray, "d_sae interval sample"]
    logit_ends: Float[np.ndarray, "d_sae 2"]
    logit_counts: Int[np.ndarray, "d_sae bin"]
    promoted_ids: Int[np.ndarray, "d_sae row"]
    promoted_effects: Float[np.ndarray, "d_sae row"]
    suppressed_ids: Int[np.ndarray, "d_sae row"]
    suppressed_effects: Float[np.ndarray, "d_sae row"]
    related_features: Int[np.ndarray, "d_sae related"]
    """-1 where there are no more."""
    related_features_pearson: Float[np.ndarray, "d_sae related"]
    related_features_cosine: Float[np.ndarray, "d_sae related"]
    related_neurons: Int[np.ndarray, "d_sae related_neuron"]
    related_neurons_pearson: Float[np.ndarray, "d_sae related_neuron"]
    related_neurons_cosine: Float[np.ndarray, "d_sae related_neuron"]
    aligned_neurons: Int[np.ndarray, "d_sae aligned"]
    aligned_values: Float[np.ndarray, "d_sae aligned"]
    aligned_shares: Float[np.ndarray, "d_sae aligned"]
    known_ids: Int[np.ndarray, " known"]
    """The token ids that occur anywhere, ascending; their texts are in `known_texts`."""
    known_texts: tuple[str, ...]

    @property
    def d_sae(self) -> int:
        return len(self.feature_starts) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens looked at: neither BOS, EOS nor padding."""
        return int(self.meta["n_tokens"])

    @cached_property
    def _text_of(self) -> dict[int, str]:
        return dict(zip(self.known_ids.tolist(), self.known_texts, strict=True))

    def __len__(self) -> int:
        return self.d_sae

    def __iter__(self) -> Iterator[FeatureDashboard]:
        return (self.feature(index) for index in range(self.d_sae))

    def feature(self, index: int) -> FeatureDashboard:
        """The dashboard of one feature. ValueError for an index outside the dictionary."""
        if not 0 <= index < self.d_sae:
            raise ValueError(f"there is no feature {index} (valid: 0 to {self.d_sae - 1})")
        start, end = (int(place) for place in self.feature_starts[index : index + 2])
        alive = end > start
        maximum = float(self.maxima[index])
        return FeatureDashboard(
            feature=int(index),
            n_tokens=self.n_tokens,
            n_active=end - start,
            fraction_active=(end - start) / max(self.n_tokens, 1),
            maximum=maximum,
            activations=Histogram(
                float(self.minima[index]), maximum, tuple(self.activation_counts[index].tolist()) if alive else ()
            ),
            groups=self._groups(index, slice(start, end)) if alive else (),
            logits=Histogram(
                float(self.logit_ends[index, 0]),
                float(self.logit_ends[index, 1]),
                tuple(self.logit_counts[index].tolist()),
            ),
            promoted=self._effects(self.promoted_ids[index], self.promoted_effects[index]),
            suppressed=self._effects(self.suppressed_ids[index], self.suppressed_effects[index]),
            correlated_features=_correlations(
                self.related_features[index], self.related_features_pearson[index], self.related_features_cosine[index]
            ),
            correlated_neurons=_correlations(
                self.related_neurons[index], self.related_neurons_pearson[index], self.related_neurons_cosine[index]
            ),
            aligned_neurons=tuple(
                AlignedNeuron(*row)
                for row in zip(
                    self.aligned_neurons[index].tolist(),
                    self.aligned_values[index].tolist(),
                    self.aligned_shares[index].tolist(),
                    strict=True,
                )
            ),
        )

    def save(self, folder: str | Path) -> Path:
        """The folder, after the arrays were written there, a file each, and last the file that makes it complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            with replacing(folder / f"{name}.npy") as partial, partial.open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
        content = {"format": FORMAT, "meta": self.meta, "known_texts": self.known_texts}
        write_whole(folder / META, json.dumps(content, allow_nan=False) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Dashboards":
        """The dashboards in a folder.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder holds no dashboards, or not all of them.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        try:
            content = json.loads((folder / META).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            # Plain views of the mapped files: every slice of a `memmap` would cost some microseconds more.
            arrays = {
                name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in _ARRAYS
            }
            return cls(meta=content["meta"], known_texts=tuple(content["known_texts"]), **arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{folder} holds no dashboards, or not all of them: {error}") from error

    def _groups(self, index: int, entries: slice) -> tuple[SequenceGroup, ...]:
        tokens, values = np.asarray(self.entry_tokens[entries]), np.asarray(self.entry_values[entries])
        maximum = float(self.maxima[index])
        n_intervals = self.interval_counts.shape[1]
        ends = interval_ends(self.maxima[index], n_intervals).tolist()
        made = self._sequences(np.unique(np.r_[self.strongest[index], self.sampled[index].ravel()]), tokens, values)

        def chosen(numbers: np.ndarray) -> tuple[ActivatingSequence, ...]:
            return tuple(made[number] for number in numbers.tolist() if number >= 0)

        groups = [SequenceGroup(None, maximum, None, chosen(self.strongest[index]))]
        for interval in reversed(range(n_intervals)):
            groups.append(
                SequenceGroup(
                    ends[interval],
                    ends[interval + 1],
                    int(self.interval_counts[index, interval]) / max(self.n_tokens, 1),
                    chosen(self.sampled[index, interval]),
                )
            )
        return tuple(groups)

    def _sequences(self, numbers: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> dict[int, ActivatingSequence]:
        """The sequences of some numbers, negative ones left out, and on them a feature that fires on `tokens`."""
        numbers = numbers[numbers >= 0]
        starts, ends = self.sequence_starts[numbers], self.sequence_starts[numbers + 1]
        firsts, lasts = np.searchsorted(tokens, starts), np.searchsorted(tokens, ends)
        found = {}
        for number, start, end, first, last in zip(
            *(array.tolist() for array in (numbers, starts, ends, firsts, lasts)), strict=True
        ):
            row = np.zeros(end - start)
            row[tokens[first:last] - start] = values[first:last]
            ids = self.token_ids[start:end].tolist()
            found[number] = ActivatingSequence(
                key=f"{int(self.sequence_keys[number]):016x}",
                tokens=tuple(map(self._text_of.__getitem__, ids)),
                token_ids=tuple(ids),
                values=tuple(row.tolist()),
                strongest=int(row.argmax()),
            )
        return found

    def _effects(self, ids: np.ndarray, effects: np.ndarray) -> tuple[TokenEffect, ...]:
        return tuple(
            TokenEffect(self._text_of[token], token, effect)
            for token, effect in zip(ids.tolist(), effects.tolist(), strict=True)
        )

    def __repr__(self) -> str:
        alive = int((np.diff(self.feature_starts) > 0).sum())
        return (
            f"Dashboards({self.d_sae} features, {alive} of them seen firing, on {self.n_tokens} tokens "
            f"at {self.meta['hook_name']})"
        )


def interval_ends(maximum: Any, n_intervals: int) -> Float[np.ndarray, "*feature end"]:
    """The ends of the equal intervals over [0, maximum], in float32 as the activations are, the last one exact."""
    ends = np.asarray(maximum, np.float32)[..., None] * (np.arange(n_intervals + 1, dtype=np.float32) / n_intervals)
    return ends.astype(np.float32)


def _correlations(which: np.ndarray, pearson: np.ndarray, cosine: np.ndarray) -> tuple[Correlation, ...]:
    rows = zip(which.tolist(), pearson.tolist(), cosine.tolist(), strict=True)
    return tuple(Correlation(*row) for row in rows if row[0] >= 0)


_ARRAYS = tuple(one.name for one in fields(Dashboards) if one.name not in ("meta", "known_texts"))
