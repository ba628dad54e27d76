"""Dashboards against a plain reference on made-up codes: ties, dead features, repeated texts, any split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_emotion_plugin.code_files import CodeColumns
from sae_emotion_plugin.dashboards import corpus as corpus_module
from sae_emotion_plugin.dashboards import statistics as statistics_module
from sae_emotion_plugin.dashboards.build import _FIXED, DashboardSettings, _finished
from sae_emotion_plugin.dashboards.collect import NeuronSums
from sae_emotion_plugin.dashboards.corpus import store_corpus
from sae_emotion_plugin.dashboards.statistics import activation_arrays, by_feature
from sae_emotion_plugin.dashboards.types import Dashboards, FeatureDashboard

D_SAE, D_IN = 6, 5
SETTINGS = DashboardSettings(n_bins=7, n_strongest=3, n_intervals=4, n_sampled=2, n_logits=2, n_related=2)
Sequence = tuple[tuple[int, ...], np.ndarray, np.ndarray]
"""Token ids, codes `[token, D_SAE]` and activations `[token, D_IN]`."""


def random_sequences(seed: int, n: int, *, levels: int | None) -> list[Sequence]:
    """Short sequences, some of one token, some repeated with the same codes; feature 0 is dead, 1 fires once.

    With few `levels` most activations are tied.
    """
    rng = np.random.default_rng(seed)
    found: list[Sequence] = []
    for _ in range(n):
        length = int(rng.choice([1, 1, 2, 5, 9]))
        codes = rng.random((length, D_SAE)) if levels is None else rng.integers(1, levels + 1, (length, D_SAE)) / levels
        codes = codes.astype(np.float32) * (rng.random((length, D_SAE)) < 0.4)
        codes[:, :2] = 0
        vectors = rng.normal([0, 100, 0, 0, 3], size=(length, D_IN)).astype(np.float32)
        vectors[:, 2] = 1.0  # a neuron that never moves
        found.append((tuple(rng.integers(0, 50, length).tolist()), codes, vectors))
    found[0][1][0, 1] = 0.5
    return found + [found[n // 2]] * 3


def columns_of(sequences: list[Sequence]) -> CodeColumns:
    codes = np.concatenate([codes for _, codes, _ in sequences])
    token, feature = codes.nonzero()
    return CodeColumns(
        values=codes[token, feature],
        features=feature.astype(np.int32),
        counts=np.bincount(token, minlength=len(codes)).astype(np.int32),
        text=np.repeat(np.arange(len(sequences), dtype=np.int32), [len(ids) for ids, _, _ in sequences]),
        token_ids=np.concatenate([ids for ids, _, _ in sequences]).astype(np.int32),
    )


def sums_of(sequences: list[Sequence]) -> NeuronSums:
    sums = NeuronSums.zeros(D_SAE, D_IN)
    columns = columns_of(sequences)
    sums.add_tokens(
        np.concatenate([vectors for _, _, vectors in sequences]), columns.values, columns.features, columns.counts
    )
    return sums


def made(parts: list[list[Sequence]], folder: Path, settings: DashboardSettings = SETTINGS) -> Dashboards:
    """The dashboards of the parts' codes together; what does not depend on them is zeros."""
    folder.mkdir()
    sums = NeuronSums.zeros(D_SAE, D_IN)
    for part in parts:
        sums.add(sums_of(part))
    sums.save(folder / "sums.npz", len(parts))
    stored = store_corpus([columns_of(part) for part in parts], folder / "corpus")
    whole_numbers = ("ids", "counts", "neurons")
    fixed = {
        name: np.zeros(
            (D_SAE, settings.n_bins if name == "logit_counts" else 2),
            np.int64 if name.endswith(whole_numbers) else np.float32,
        )
        for name in _FIXED
    }
    manifest = {"key": "k", "recipe": {"d_sae": D_SAE, "hook_name": "h", "settings": vars(settings)}}
    return _finished(folder, manifest, stored, fixed, {token: f"t{token}" for token in range(50)}, progress=False)


def reference(sequences: list[Sequence], feature: int, settings: DashboardSettings = SETTINGS) -> dict[str, Any]:
    """One feature's numbers by plain loops over dense codes."""
    every = np.concatenate([codes for _, codes, _ in sequences])
    vectors = np.concatenate([vectors for _, _, vectors in sequences]).astype(np.float64)
    own = every[:, feature]
    active = own[own > 0]
    found: dict[str, Any] = {"n_active": len(active), "maximum": float(own.max(initial=0))}
    if not len(active):
        return found
    low, high = active.min(), active.max()
    low = np.float32(0) if low == high else low
    counts = [0] * settings.n_bins
    for value in active.astype(np.float64):
        place = (value - float(low)) / (float(high) - float(low)) * settings.n_bins
        counts[min(int(place), settings.n_bins - 1)] += 1
    found["counts"] = tuple(counts)
    ends = [
        high * np.float32(np.float32(n) / np.float32(settings.n_intervals)) for n in range(settings.n_intervals + 1)
    ]
    found["shares"] = [
        float(np.mean((own >= ends[n]) & (own <= ends[n + 1]))) for n in reversed(range(settings.n_intervals))
    ]
    # Every text once, with the maxima that it reaches.
    texts: dict[tuple[int, ...], float] = {}
    for ids, codes, _ in sequences:
        if (reached := float(codes[:, feature].max())) > 0:
            texts[ids] = max(reached, texts.get(ids, 0))
    found["strongest"] = sorted(texts.values(), reverse=True)[: settings.n_strongest]
    found["texts"] = texts
    found["ends"] = [float(end) for end in ends]
    pairs = []
    for other in range(D_SAE):
        if other != feature and every[:, other].any():
            both = np.corrcoef(own.astype(np.float64), every[:, other].astype(np.float64))[0, 1]
            if both > 1e-12:
                pairs.append((both, other))
    found["features"] = sorted(pairs, reverse=True)[: settings.n_related]
    neurons = [
        np.corrcoef(own, vectors[:, n])[0, 1] if vectors[:, n].std() > 0 else 0.0 for n in range(vectors.shape[1])
    ]
    found["neurons"] = sorted(neurons, reverse=True)[: settings.n_related]
    found["cosine"] = {
        n: own @ vectors[:, n] / np.linalg.norm(own.astype(np.float64)) / np.linalg.norm(vectors[:, n])
        for n in range(vectors.shape[1])
    }
    return found


def check(dashboard: FeatureDashboard, wanted: dict[str, Any], settings: DashboardSettings = SETTINGS) -> None:
    assert dashboard.n_active == wanted["n_active"]
    assert dashboard.maximum == pytest.approx(wanted["maximum"], rel=1e-6)
    if not wanted["n_active"]:
        assert dashboard.groups == dashboard.correlated_features == dashboard.correlated_neurons == ()
        assert dashboard.activations.counts == ()
        return
    assert dashboard.fraction_active == pytest.approx(dashboard.n_active / dashboard.n_tokens)
    assert dashboard.activations.counts == wanted["counts"]
    top, *intervals = dashboard.groups
    assert (top.lowest, top.share) == (None, None)
    assert top.highest == dashboard.maximum
    assert [row.maximum for row in top.sequences] == pytest.approx(wanted["strongest"], rel=1e-6)
    assert [group.share for group in intervals] == pytest.approx(wanted["shares"])
    for number, group in zip(reversed(range(settings.n_intervals)), intervals, strict=True):
        assert (group.lowest, group.highest) == pytest.approx(tuple(wanted["ends"][number : number + 2]), rel=1e-6)
        last = number == settings.n_intervals - 1
        inside = [
            ids
            for ids, value in wanted["texts"].items()
            if wanted["ends"][number] <= value and (last or value < wanted["ends"][number + 1])
        ]
        assert len(group.sequences) == min(len(inside), settings.n_sampled)
        assert {row.token_ids for row in group.sequences} <= set(inside)
        assert [row.maximum for row in group.sequences] == sorted(
            (row.maximum for row in group.sequences), reverse=True
        )
    for group in dashboard.groups:
        assert len({row.key for row in group.sequences}) == len(group.sequences)
        for row in group.sequences:
            assert len(row.values) == len(row.tokens) == len(row.token_ids)
            assert row.maximum == max(row.values) > 0
            assert row.maximum == pytest.approx(wanted["texts"][row.token_ids], rel=1e-6)
    assert [one.pearson for one in dashboard.correlated_features] == pytest.approx(
        [value for value, _ in wanted["features"]], abs=1e-9
    )
    assert [one.pearson for one in dashboard.correlated_neurons] == pytest.approx(wanted["neurons"], abs=1e-9)
    for one in dashboard.correlated_neurons:
        assert one.cosine == pytest.approx(wanted["cosine"][one.index], abs=1e-6)


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("entries", [None, 13])
def test_every_number_is_that_of_plain_loops_over_dense_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int | None, seed: int, entries: int | None
) -> None:
    if entries is not None:  # so that corpus and dictionary are worked on in many pieces
        monkeypatch.setattr(corpus_module.StoredCorpus.slabs, "__defaults__", (entries,))
        monkeypatch.setattr(statistics_module.ByFeature.chunks, "__defaults__", (entries, None))
        monkeypatch.setattr(statistics_module, "PAIR_ENTRIES", 2 * D_SAE)
    sequences = random_sequences(seed, 40, levels=levels)
    dashboards = made([sequences], tmp_path / "d")
    assert dashboards.n_tokens == sum(len(ids) for ids, _, _ in sequences)
    assert len(list(dashboards)) == len(dashboards) == D_SAE
    for feature in range(D_SAE):
        check(dashboards.feature(feature), reference(sequences, feature))
    assert dashboards.feature(0).n_active == 0
    assert dashboards.feature(1).n_active == 1


@pytest.mark.parametrize("seed", range(6))
def test_any_split_of_the_sequences_in_any_order_gives_the_same_dashboards(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = random_sequences(seed, 30, levels=3 if seed % 2 else None)
    whole = made([sequences], tmp_path / "whole")
    shuffled = [sequences[place] for place in rng.permutation(len(sequences))]
    cuts = sorted(rng.choice(np.arange(1, len(shuffled)), size=int(rng.integers(1, 6)), replace=False).tolist())
    parts = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(shuffled)], strict=True)]
    merged = made(parts, tmp_path / "merged")
    for name in Dashboards.__dataclass_fields__:
        one, other = getattr(whole, name), getattr(merged, name)
        if name.startswith("related_neurons_"):
            np.testing.assert_allclose(one, other, atol=1e-12)
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            assert one == other


def test_another_seed_draws_another_sample(tmp_path: Path) -> None:
    sequences = random_sequences(0, 200, levels=None)
    first = made([sequences], tmp_path / "a")
    second = made([sequences], tmp_path / "b", DashboardSettings(**{**vars(SETTINGS), "seed": 1}))
    assert (first.strongest == second.strongest).all()
    assert (first.sampled != second.sampled).any()


def test_every_sequence_of_an_interval_is_as_likely_to_be_sampled(tmp_path: Path) -> None:
    ids = [(n,) for n in range(40)]
    code = np.zeros((1, D_SAE), np.float32)
    code[0, 3] = 1
    sequences = [(one, code, np.zeros((1, D_IN), np.float32)) for one in ids]
    corpus = store_corpus([columns_of(sequences)], tmp_path)
    codes = by_feature(corpus, D_SAE, tmp_path)
    drawn = np.zeros(40)
    for seed in range(60):
        arrays = activation_arrays(
            corpus, codes, 40, n_bins=2, n_strongest=1, n_intervals=2, n_sampled=10, seed=seed, progress=False
        )
        drawn[corpus.token_ids[arrays["sampled"][3, 1]]] += 1
    # 60 draws of 10 in 40: binomial around 15 with a deviation of 3.4.
    assert drawn.sum() == 600
    assert drawn.min() >= 3
    assert drawn.max() <= 29


def test_the_order_of_tied_sequences_does_not_follow_the_corpus(tmp_path: Path) -> None:
    code = np.zeros((1, D_SAE), np.float32)
    code[0, 3] = 1
    sequences = [((n,), code, np.zeros((1, D_IN), np.float32)) for n in range(30)]
    forward = made([sequences], tmp_path / "a").feature(3)
    assert forward == made([sequences[::-1]], tmp_path / "b").feature(3)
    keys = [row.key for row in forward.groups[0].sequences]
    assert keys == sorted(keys)


def test_saving_and_loading_gives_the_same(tmp_path: Path) -> None:
    dashboards = made([random_sequences(3, 20, levels=None)], tmp_path / "d")
    dashboards.save(tmp_path / "copy")
    assert list(Dashboards.load(tmp_path / "copy")) == list(dashboards)
    assert "6 features, 5 of them seen firing" in repr(dashboards)
    (tmp_path / "copy" / "maxima.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no dashboards"):
        Dashboards.load(tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="no folder"):
        Dashboards.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no feature 6 \(valid: 0 to 5\)"):
        dashboards.feature(6)


def test_damaged_sums_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sums.npz"
    sums_of(random_sequences(0, 5, levels=None)).save(path, 3)
    sums, n_blocks = NeuronSums.load(path)
    assert n_blocks == 3
    assert sums.products.shape == (D_SAE, D_IN)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        NeuronSums.load(path)


def test_settings_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="n_bins is 0"):
        DashboardSettings(n_bins=0)
