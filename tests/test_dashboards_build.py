"""Dashboards of tiny models: what the SAE's own `encode` gives, interrupted runs, parts of a corpus, logits."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, D_SAE, HOOK, VOCABULARY, WORDS, make_sae
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.dashboards import collect as collect_module
from sae_emotion_plugin.dashboards.build import DashboardSettings, build_dashboards, merge_dashboards
from sae_emotion_plugin.dashboards.collect import corpus_digest, folded_sae
from sae_emotion_plugin.dashboards.logits import _extremes, logit_arrays
from sae_emotion_plugin.dashboards.types import Dashboards

RNG = np.random.default_rng(0)
TEXTS = [
    *(" ".join(RNG.choice(WORDS[4:], size=int(size))) for size in RNG.integers(1, 12, 30)),
    "joy",
    "",
    "he is <eos> happy",
    "he is such a happy smile",
    "he is such a happy smile",
    " ".join(RNG.choice(WORDS[4:], size=70)),
]
SMALL = DashboardSettings(n_strongest=4, n_sampled=2, n_logits=5)


def _random_sae(kind: str) -> Any:
    common: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "metadata": SAEMetadata(hook_name=HOOK, model_name="tiny", context_size=32, prepend_bos=True),
    }
    sae = {
        "topk": lambda: TopKSAE(TopKSAEConfig(k=4, rescale_acts_by_decoder_norm=False, **common)),
        "rescaled topk": lambda: TopKSAE(TopKSAEConfig(k=4, rescale_acts_by_decoder_norm=True, **common)),
        "relu": lambda: StandardSAE(StandardSAEConfig(**common)),
        # What SAELens keeps of a BatchTopK SAE is a JumpReLU one with one threshold.
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**common)),
    }[kind]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if "W" in name else 0.05))
        if kind == "jumprelu":
            sae.threshold.fill_(1.0)
    return sae.eval()


def _dense(model: Any, sae: Any, text: str) -> list[tuple[list[int], np.ndarray]]:
    """The windows of a text: token ids and `sae.encode` of each token, by one forward pass each without padding."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for start in range(0, len(ids), 31):
        window = ids[start : start + 31]
        with torch.inference_mode():
            _, cache = model.run_with_cache(torch.tensor([[VOCABULARY["<bos>"], *window]]))
            codes = sae.encode(cache[canonical_hook(model, HOOK)][0, 1:]).numpy().copy()
        codes[[token in (0, 1, 2) for token in window]] = 0
        found.append((window, codes))
    return found


@pytest.mark.parametrize("kind", ["topk", "rescaled topk", "relu", "jumprelu"])
def test_activations_are_those_of_the_folded_saes_own_encode(bridge: Any, tmp_path: Path, kind: str) -> None:
    sae = _random_sae(kind)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    dashboards = build_dashboards(bridge, sae, TEXTS, tmp_path / "d", settings=SMALL, block_texts=7, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    folded = copy.deepcopy(sae)
    if kind != "topk":
        folded.fold_W_dec_norm()
    assert dashboards.meta["folded"] == (kind != "topk")
    windows = [window for text in TEXTS for window in _dense(bridge, folded, text)]
    codes = np.concatenate([codes for _, codes in windows])
    n_tokens = len(codes) - 1  # "<eos>" in a text does not count
    assert dashboards.n_tokens == n_tokens
    for dashboard in dashboards:
        own = codes[:, dashboard.feature]
        assert dashboard.n_active == (own > 0).sum()
        assert dashboard.maximum == pytest.approx(own.max(), rel=1e-4, abs=1e-5)
        if not dashboard.n_active:
            continue
        maxima = {tuple(ids): own.max() for ids, values in windows if (own := values[:, dashboard.feature]).any()}
        strongest = dashboard.groups[0].sequences
        assert [row.maximum for row in strongest] == pytest.approx(sorted(maxima.values())[::-1][:4], rel=1e-4)
        for row in strongest:
            (ids, values), *_ = (window for window in windows if tuple(window[0]) == row.token_ids)
            np.testing.assert_allclose(row.values, values[:, dashboard.feature], rtol=1e-4, atol=1e-5)
            assert [bridge.tokenizer.decode([token]) for token in ids] == list(row.tokens)
            assert VOCABULARY["<bos>"] not in ids


@pytest.mark.parametrize("seed", range(2))
def test_merging_any_split_of_the_corpus_gives_the_dashboards_of_the_whole(
    bridge: Any, planted_sae: Any, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def build(texts: list[str], name: str) -> Path:
        build_dashboards(
            bridge, planted_sae, texts, tmp_path / name, settings=SMALL, block_texts=1, progress=False
        )  # one text at a time: what it is read with cannot move its rounding
        return tmp_path / name

    whole = Dashboards.load(build(TEXTS, "whole"))
    shuffled = [TEXTS[place] for place in rng.permutation(len(TEXTS))]
    cuts = sorted(rng.choice(np.arange(2, len(TEXTS) - 1), size=2, replace=False).tolist())
    pieces = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(TEXTS)], strict=True)]
    parts = [build(piece, f"part{n}") for n, piece in enumerate(pieces)]
    merged = merge_dashboards(parts[::-1], tmp_path / "merged", progress=False)
    merge_dashboards(parts[:2], tmp_path / "two", progress=False)
    twice = merge_dashboards([*parts[2:], tmp_path / "two"], tmp_path / "twice", progress=False)
    for name in Dashboards.__dataclass_fields__:
        one = getattr(whole, name)
        for other in (getattr(merged, name), getattr(twice, name)):
            if name.startswith("related_neurons_"):
                np.testing.assert_allclose(one, other, atol=1e-10)
            elif isinstance(one, np.ndarray):
                np.testing.assert_array_equal(one, other, err_msg=name)
            else:
                assert one == other


@pytest.mark.parametrize("seed", range(2))
def test_parts_that_were_cut_between_blocks_add_up_exactly(
    bridge: Any, planted_sae: Any, tmp_path: Path, seed: int
) -> None:
    block = 5
    cut = block * int(np.random.default_rng(seed).integers(1, 6))
    for name, texts in (("whole", TEXTS), ("a", TEXTS[:cut]), ("b", TEXTS[cut:])):
        build_dashboards(bridge, planted_sae, texts, tmp_path / name, block_texts=block, progress=False)
    merged = merge_dashboards([tmp_path / "b", tmp_path / "a"], tmp_path / "merged", progress=False)
    whole = Dashboards.load(tmp_path / "whole")
    for name in ("entry_values", "activation_counts", "interval_counts", "strongest", "sampled", "related_features"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(merged, name))
    assert merged.meta == whole.meta


def test_a_killed_run_goes_on_behind_its_last_block(
    bridge: Any, planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_dashboards(bridge, planted_sae, TEXTS, tmp_path / "whole", block_texts=10, progress=False)
    encoded: list[int] = []
    original = collect_module.activation_batches

    def counting(fail_at: int) -> Callable[..., Any]:
        def batches(model: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
            if len(encoded) == fail_at:
                raise KeyboardInterrupt
            encoded.append(len(texts))
            return original(model, texts, *args, **kwargs)

        return batches

    folder = tmp_path / "killed"
    monkeypatch.setattr(collect_module, "activation_batches", counting(2))
    with pytest.raises(KeyboardInterrupt):
        build_dashboards(bridge, planted_sae, TEXTS, folder, block_texts=10, progress=False)
    with pytest.raises(ValueError, match="holds no dashboards"):
        Dashboards.load(folder)
    shutil.copytree(folder, tmp_path / "damaged")
    monkeypatch.setattr(collect_module, "activation_batches", counting(-1))
    again = build_dashboards(bridge, planted_sae, TEXTS, folder, block_texts=10, progress=False)
    assert encoded == [10, 10, 10, 6]
    assert list(again) == list(whole)
    build_dashboards(bridge, planted_sae, TEXTS, folder, block_texts=10, progress=False)
    assert len(encoded) == 4  # finished: it was only read
    block = next((tmp_path / "damaged" / "blocks").glob("*.safetensors"))
    block.write_bytes(block.read_bytes()[:-4])
    anew = build_dashboards(bridge, planted_sae, TEXTS, tmp_path / "damaged", block_texts=10, progress=False)
    assert encoded[4:] == [10, 10, 10, 6]
    assert list(anew) == list(whole)


def test_a_kill_after_the_encoding_costs_no_encoding(
    bridge: Any, planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_emotion_plugin.dashboards import build as build_module

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    folder = tmp_path / "d"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "related_features", killed)
        build_dashboards(bridge, planted_sae, TEXTS, folder, progress=False)
    monkeypatch.setattr(build_module, "collect", killed)
    assert build_dashboards(bridge, planted_sae, TEXTS, folder, progress=False).n_tokens > 0


def test_logits_are_those_of_a_processed_models_unembedding(hooked_transformer: Any, planted_sae: Any) -> None:
    rows = planted_sae.W_dec.detach()
    arrays = logit_arrays(hooked_transformer, rows, HOOK, n_bins=50, n_tokens=5, progress=False)
    processed = copy.deepcopy(hooked_transformer)
    with torch.no_grad():  # a norm that does something
        processed.ln_final.w.copy_(torch.linspace(0.5, 2, D_MODEL))
    unprocessed = copy.deepcopy(processed)
    arrays = logit_arrays(unprocessed, rows, HOOK, n_bins=50, n_tokens=5, progress=False)
    state = processed.fold_layer_norm(processed.state_dict())
    state = processed.center_unembed(state)
    wanted = (rows - rows.mean(1, keepdim=True)) @ state["unembed.W_U"]
    for side, largest in (("promoted", True), ("suppressed", False)):
        values, ids = wanted.topk(5, largest=largest)
        assert arrays[f"{side}_ids"].tolist() == ids.tolist()
        np.testing.assert_allclose(arrays[f"{side}_effects"], values, atol=1e-4)
    np.testing.assert_allclose(arrays["logit_ends"][:, 0], wanted.amin(1), atol=1e-4)
    np.testing.assert_allclose(arrays["logit_ends"][:, 1], wanted.amax(1), atol=1e-4)
    assert (arrays["logit_counts"].sum(axis=1) == len(WORDS)).all()
    np.testing.assert_array_equal(arrays["logit_counts"][9], torch.histc(wanted[9], 50))


def test_logits_of_a_model_with_a_root_mean_square_norm(bridge: Any, planted_sae: Any) -> None:
    rows = planted_sae.W_dec.detach()
    arrays = logit_arrays(bridge, rows, HOOK, n_bins=10, n_tokens=3, progress=False)
    weight = 1 + bridge.original_model.model.norm.weight.detach()
    wanted = (rows * weight) @ bridge.original_model.lm_head.weight.detach().T
    wanted = wanted - wanted.mean(1, keepdim=True)
    np.testing.assert_allclose(arrays["promoted_effects"], wanted.topk(3).values, atol=1e-4)


def test_logits_of_neurons_and_heads_go_through_their_output_weights(hooked_transformer: Any) -> None:
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    block = hooked_transformer.blocks[1]
    for hook, hidden, weight in (
        ("blocks.1.mlp.hook_post", rows, block.mlp.W_out),
        ("blocks.1.attn.hook_z", rows[:, :32], block.attn.W_O.flatten(end_dim=1)),
    ):
        through = logit_arrays(hooked_transformer, hidden, hook, n_bins=5, n_tokens=3, progress=False)
        direct = logit_arrays(hooked_transformer, hidden @ weight.detach(), HOOK, n_bins=5, n_tokens=3, progress=False)
        np.testing.assert_allclose(through["promoted_effects"], direct["promoted_effects"], atol=1e-4)
    with pytest.raises(ValueError, match="64 dimensions reaches a residual stream of 32 is not known"):
        logit_arrays(hooked_transformer, rows, HOOK, n_bins=5, n_tokens=3, progress=False)


@pytest.mark.parametrize("largest", [True, False])
def test_extremes_are_those_of_a_sorted_row(largest: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 128 * 12 + 37, generator=generator)
    logits[1, -3:] = 9 if largest else -9  # in what is left behind the last whole block
    logits[2, [5, 700, 1500]] = 9 if largest else -9
    values, ids = _extremes(logits, 4, largest)
    for row in range(6):
        order = np.lexsort((np.arange(logits.shape[1]), (-1 if largest else 1) * logits[row].numpy()))[:4]
        assert ids[row].tolist() == order.tolist()
        assert values[row].tolist() == logits[row, order].tolist()


def test_a_decoder_row_of_zeros_has_a_histogram_all_the_same(bridge: Any) -> None:
    arrays = logit_arrays(bridge, torch.zeros(1, D_MODEL), HOOK, n_bins=10, n_tokens=3, progress=False)
    assert arrays["logit_ends"].tolist() == [[-0.5, 0.5]]
    assert arrays["logit_counts"].sum() == len(WORDS)


def test_aligned_neurons_are_the_largest_entries_of_the_decoder_row(
    bridge: Any, planted_sae: Any, tmp_path: Path
) -> None:
    dashboards = build_dashboards(bridge, planted_sae, TEXTS, tmp_path / "d", progress=False)
    row = planted_sae.W_dec[7].detach().numpy()
    found = dashboards.feature(7).aligned_neurons
    assert [one.index for one in found] == np.argsort(-row)[:3].tolist()
    assert [one.l1_share for one in found] == pytest.approx([abs(row[one.index]) / abs(row).sum() for one in found])


def test_an_sae_that_cannot_be_folded_safely_is_used_as_it_is() -> None:
    sae = make_sae()
    assert folded_sae(sae) == (sae, False)


def test_the_hash_of_a_corpus_does_not_depend_on_the_order() -> None:
    texts = ["a", "b", "a", "\ud83d"]
    assert corpus_digest(texts) == corpus_digest(texts[::-1]) != corpus_digest(texts[1:])


def test_what_cannot_be_built_is_refused_in_one_line(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    def build(texts: Any, name: str = "d", sae: Any = planted_sae, **options: Any) -> Dashboards:
        return build_dashboards(bridge, sae, texts, tmp_path / name, progress=False, **options)

    with pytest.raises(ValueError, match="not one string"):
        build("a text")
    with pytest.raises(ValueError, match="the list is empty"):
        build([])
    with pytest.raises(ValueError, match="every text is empty"):
        build(["", ""], "empty")
    with pytest.raises(ValueError, match="block_texts is 0"):
        build(["joy"], block_texts=0)
    with pytest.raises(ValueError, match="context_size 1 leaves no room"):
        build(["joy"], context_size=1)
    build(TEXTS[:10])
    with pytest.raises(ValueError, match="holds dashboards of another n_texts, texts_sha256"):
        build(TEXTS[:9])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no dashboards"):
        build(TEXTS[:9], "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="the list is empty"):
        merge_dashboards([], tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        merge_dashboards([tmp_path / "nowhere"], tmp_path / "m")
    build(TEXTS[10:], "wider", context_size=20)
    with pytest.raises(ValueError, match="cannot be merged: their context_size differ"):
        merge_dashboards([tmp_path / "d", tmp_path / "wider"], tmp_path / "m")
    (tmp_path / "wider" / "dashboards.json").unlink()
    with pytest.raises(ValueError, match="holds no dashboards, or not all of them"):
        merge_dashboards([tmp_path / "wider"], tmp_path / "m")
    manifest = tmp_path / "d" / "manifest.json"
    manifest.write_text(json.dumps({"key": 1}))
    with pytest.raises(ValueError, match="missing or damaged"):
        merge_dashboards([tmp_path / "d"], tmp_path / "m")
