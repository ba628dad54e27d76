"""Each number of a dashboard by another way, over dense codes of every position; and against SAEDashboard's output."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dashboard_parity
import numpy as np
import pytest
import torch
from conftest import D_MODEL, D_SAE, HOOK, VOCABULARY, WORDS
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from scipy.spatial.distance import correlation, cosine

from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.dashboards.build import DashboardSettings, build_dashboards
from sae_emotion_plugin.dashboards.types import Dashboards, FeatureDashboard

RECORDED = Path(__file__).parent / "data" / "sae_dashboard"
SETTINGS = DashboardSettings(n_bins=9, n_strongest=6, n_intervals=4, n_sampled=3, n_related=5)
DEAD, LEAST = 5, 3
"""Features that fire nowhere, and on one token only."""


@dataclass(frozen=True)
class Seen:
    """Dashboards, and all positions of all texts with BOS and EOS, on which codes are set to 0."""

    dashboards: Dashboards
    decoder: torch.Tensor
    ids: np.ndarray
    codes: np.ndarray
    vectors: np.ndarray

    @property
    def heard(self) -> np.ndarray:
        return ~np.isin(self.ids, [VOCABULARY["<bos>"], VOCABULARY["<eos>"]])

    @property
    def alive(self) -> list[FeatureDashboard]:
        return [one for one in self.dashboards if one.n_active]


@pytest.fixture(scope="module")
def seen(bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny", context_size=32, prepend_bos=True)
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, len(WORDS), (30, 13))
    ids[:, 0], ids[4, 6] = VOCABULARY["<bos>"], VOCABULARY["<eos>"]
    texts = [" ".join(WORDS[word] for word in row[1:]) for row in ids]

    def encoded() -> tuple[np.ndarray, np.ndarray]:
        sae.fold_W_dec_norm()
        with torch.inference_mode():
            vectors = bridge.run_with_cache(torch.from_numpy(ids))[1][canonical_hook(bridge, HOOK)]
            return sae.encode(vectors).numpy().copy(), vectors.numpy()

    codes, vectors = encoded()
    with torch.no_grad():  # biases such that a feature fires on one token in five, one nowhere and one once
        sae.b_enc.sub_(torch.from_numpy(np.quantile(codes[:, 1:], 0.8, axis=(0, 1))))
        sae.b_enc[DEAD] = -1e6
        before = codes[:, 1:, LEAST][ids[:, 1:] != VOCABULARY["<eos>"]]
        sae.b_enc[LEAST] += np.quantile(before, 0.8) - np.sort(before)[-2:].mean()
    codes, vectors = encoded()
    codes[np.isin(ids, [VOCABULARY["<bos>"], VOCABULARY["<eos>"]])] = 0
    folder = tmp_path_factory.mktemp("dashboards")
    dashboards = build_dashboards(bridge, sae, texts, folder / "d", settings=SETTINGS, progress=False)
    return Seen(dashboards, sae.W_dec.detach(), ids, codes, vectors)


def test_the_share_of_active_tokens_leaves_bos_and_eos_out_of_both_counts(seen: Seen) -> None:
    for one in seen.dashboards:
        own = seen.codes[..., one.feature]
        assert one.fraction_active == np.count_nonzero(own) / seen.heard.sum()
        # SAEDashboard divides by all positions: its figure is this one.
        assert one.fraction_active * seen.heard.mean() == pytest.approx((own > 0).mean())
    assert seen.dashboards.feature(DEAD).n_active == 0
    assert seen.dashboards.feature(LEAST).n_active == 1


def test_the_activation_histogram_is_that_of_the_values_above_zero_between_their_extremes(seen: Seen) -> None:
    for one in seen.alive:
        own = torch.from_numpy(seen.codes[..., one.feature])
        active = own[own > 0]
        if one.n_active == 1:
            # Equal bins need a width, which SAEDashboard's lack here: ours begin at 0.
            assert one.activations.counts == (0,) * (SETTINGS.n_bins - 1) + (1,)
            assert one.activations.lowest == 0
            continue
        assert one.activations.counts == tuple(torch.histc(active, SETTINGS.n_bins).int().tolist())
        edges = torch.linspace(float(active.min()), float(active.max()), SETTINGS.n_bins + 1)
        np.testing.assert_allclose(one.activations.centres, (edges[1:] + edges[:-1]) / 2, rtol=1e-4)
    assert seen.dashboards.feature(DEAD).activations.counts == ()


def test_the_intervals_are_equal_parts_up_to_the_maximum_and_hold_a_share_of_all_tokens(seen: Seen) -> None:
    for one in seen.alive:
        own = seen.codes[..., one.feature][seen.heard]
        edges = torch.linspace(0, float(own.max()), SETTINGS.n_intervals + 1).flip(0).tolist()
        assert one.groups[0].lowest is None
        for group, low, high in zip(one.groups[1:], edges[1:], edges[:-1], strict=True):
            assert (group.lowest, group.highest) == pytest.approx((low, high), rel=1e-4, abs=1e-6)
            assert group.share == pytest.approx(np.mean((own >= low * (1 - 1e-6)) & (own <= high * (1 + 1e-6))))


def test_the_strongest_sequences_are_those_of_the_strongest_tokens_without_repetition(seen: Seen) -> None:
    for one in seen.alive:
        own = seen.codes[..., one.feature]
        rows, _ = np.unravel_index(np.argsort(-own, axis=None)[: np.count_nonzero(own)], own.shape)
        wanted = list(dict.fromkeys(rows.tolist()))[: SETTINGS.n_strongest]
        found = one.groups[0].sequences
        # Texts that begin alike are tied: which of them comes first is not told by their maxima.
        assert [row.maximum for row in found] == pytest.approx([own[text].max() for text in wanted], rel=1e-4)
        texts = {tuple(ids.tolist()): values for ids, values in zip(seen.ids[:, 1:], own[:, 1:], strict=True)}
        for row in found:
            np.testing.assert_allclose(row.values, texts[row.token_ids], rtol=1e-4, atol=1e-5)


def test_a_sampled_sequence_lies_with_its_maximum_in_the_interval(seen: Seen) -> None:
    for one in seen.alive:
        peaks = seen.codes[..., one.feature].max(axis=1)
        for group in one.groups[1:]:
            assert group.lowest is not None
            tolerance = 1e-4 * one.maximum
            for row in group.sequences:
                assert group.lowest - tolerance <= row.maximum <= group.highest + tolerance
            inside = (peaks > group.lowest + tolerance) & (peaks < group.highest - tolerance) & (peaks > 0)
            assert len(group.sequences) >= min(inside.sum(), SETTINGS.n_sampled)


def test_correlated_neurons_are_the_largest_pearson_correlations_over_the_tokens(seen: Seen) -> None:
    vectors = seen.vectors[seen.heard].astype(np.float64)
    for one in seen.alive:
        own = seen.codes[seen.heard][:, one.feature].astype(np.float64)
        every = [1 - correlation(own, column) for column in vectors.T]
        assert [row.pearson for row in one.correlated_neurons] == pytest.approx(sorted(every)[::-1][:5], abs=1e-5)
        for row in one.correlated_neurons:
            assert row.pearson == pytest.approx(every[row.index], abs=1e-5)
            assert row.cosine == pytest.approx(1 - cosine(own, vectors[:, row.index]), abs=1e-5)


def test_correlated_features_are_the_largest_positive_pearson_correlations_of_others(seen: Seen) -> None:
    codes = seen.codes[seen.heard].astype(np.float64)
    for one in seen.alive:
        own = codes[:, one.feature]
        every = {
            other: 1 - correlation(own, codes[:, other])
            for other in range(D_SAE)
            if other != one.feature and codes[:, other].any()
        }
        wanted = [value for value in sorted(every.values())[::-1] if value > 0][:5]
        assert [row.pearson for row in one.correlated_features] == pytest.approx(wanted, abs=1e-5)
        for row in one.correlated_features:
            assert row.pearson == pytest.approx(every[row.index], abs=1e-5)
            assert row.cosine == pytest.approx(1 - cosine(own, codes[:, row.index]), abs=1e-5)


def test_aligned_neurons_are_the_largest_entries_of_the_folded_decoder_row(seen: Seen) -> None:
    for one in seen.dashboards:
        row = seen.decoder[one.feature]
        assert row.norm().item() == pytest.approx(1, abs=1e-5)
        assert [near.index for near in one.aligned_neurons] == row.topk(5).indices.tolist()
        for near in one.aligned_neurons:
            assert near.value == pytest.approx(row[near.index].item())
            assert near.l1_share == pytest.approx((row[near.index].abs() / row.abs().sum()).item())


def test_the_logit_histogram_counts_every_token_of_the_vocabulary(seen: Seen, bridge: Any) -> None:
    weight = 1 + bridge.original_model.model.norm.weight.detach()
    logits = (seen.decoder * weight) @ bridge.original_model.lm_head.weight.detach().T
    logits -= logits.mean(dim=1, keepdim=True)
    for one in seen.dashboards:
        row = logits[one.feature]
        assert sum(one.logits.counts) == len(WORDS)
        counts = torch.histc(row, SETTINGS.n_bins).numpy()
        assert np.abs(one.logits.counts - counts).sum() <= 2  # one token at a bin's end
        assert (one.logits.lowest, one.logits.highest) == pytest.approx((row.min().item(), row.max().item()), abs=1e-4)
        assert [effect.effect for effect in one.promoted] == pytest.approx(row.topk(10).values.tolist(), abs=1e-4)
        assert [effect.effect for effect in one.suppressed] == pytest.approx(
            row.topk(10, largest=False).values.tolist(), abs=1e-4
        )
        for effect in (*one.promoted, *one.suppressed):
            assert WORDS[effect.token_id] == effect.token


def recorded(folder: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress((folder / "features.json.gz").read_bytes()))["features"]


@pytest.mark.parametrize("folder", sorted(RECORDED.iterdir()), ids=lambda folder: folder.name)
def test_the_numbers_are_those_that_saedashboard_itself_gives(folder: Path, tmp_path: Path) -> None:
    lines = list(
        dashboard_parity.compared(folder, dashboard_parity.our_dashboards(folder, tmp_path / "ours"), recorded(folder))
    )
    assert len(lines) == (18 if folder.name.endswith(("bos", "eos")) else 24)
    assert [line for line in lines if not line.agrees] == []


def test_every_number_that_saedashboard_gives_otherwise_is_told(tmp_path: Path) -> None:
    folder = RECORDED / "relu"
    ours = dashboard_parity.our_dashboards(folder, tmp_path / "ours")
    for name in (
        "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_values",
        "logits_hist_data_bar_heights", "pos_str", "pos_values", "neg_str", "neg_values", "neuron_alignment_indices",
        "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson",
        "correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson",
        "correlated_features_l1",
    ):  # fmt: skip
        features = recorded(folder)
        one = next(feature for feature in features if ours.feature(feature["feature_index"]).n_active > 30)
        value = one[name]
        if isinstance(value, list):
            value[0] = value[1] if isinstance(value[0], str) else value[0] + 3
        else:
            one[name] = value + 0.001
        assert [line for line in dashboard_parity.compared(folder, ours, features) if not line.agrees], name
    for name in ("values", "bin_max", "bin_contains"):
        features = recorded(folder)
        for row in features[0]["activations"]:
            row[name] = [value + 1 for value in row[name]] if name == "values" else row[name] + 0.01
        assert [line for line in dashboard_parity.compared(folder, ours, features) if not line.agrees], name
