"""The benchmarks of training, on a tiny model: every arm runs, is done once, and the last line is the whole result."""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import blog_training
import candidates
import dead_latents
import numpy as np
import one_buffer
import pytest
import sparsify_coder
import torch
import trainers
from conftest import EMOTIONS, HOOK, WORDS, labelled

from sae_emotion_plugin import activation_store
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe

TINY = ["--batch-size", "32", "--held-out", "40", "--loss-tokens", "200"]


@pytest.fixture
def texts(tmp_path: Path, bridge: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts in Korean's place; recipes name them and the tiny model."""
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS[4:], size=rng.integers(4, 14)))} for _ in range(600)]
    path = tmp_path / "texts" / "nsmc" / "train.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    read = TrainingRecipe.read

    def tiny(name: str) -> TrainingRecipe:
        recipe = replace(read(name), hook_name=HOOK, texts=(TextSource("nsmc/train.jsonl.gz"),), held_out_share=0.1)
        return replace(recipe, k_aux=8) if recipe.architecture == "openai-topk" else recipe

    monkeypatch.setattr(TrainingRecipe, "read", tiny)
    monkeypatch.setattr(one_buffer, "load_model", lambda name: bridge)
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 1000)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return tmp_path / "texts"


def run(module: Any, texts: Path, *options: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    arguments = ["benchmark", "--texts", str(texts), "--work", str(texts.parent / "work"), *TINY, *options]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_the_contrast_of_dead_latents_has_four_arms_that_are_trained_once(
    texts: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tokens", "3000", "--d-sae", "256", "--k", "4", "--window", "300")
    found = run(dead_latents, texts, *options, capsys=capsys, monkeypatch=monkeypatch)
    assert list(found["arms"]) == ["full", "no-auxk", "untied", "neither"] and found["steps"] == 93
    assert found["arms"]["no-auxk"]["dead_share"] > 0.1  # so that AuxK has something to do in the others
    assert len({arm["fvu"] for arm in found["arms"].values()}) == 4
    monkeypatch.setattr(one_buffer, "fit_recipe", None)  # nothing is trained again
    assert run(dead_latents, texts, *options, capsys=capsys, monkeypatch=monkeypatch) == found


@pytest.mark.slow
def test_trainers_are_compared_with_a_rate_chosen_on_other_documents(
    texts: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--tokens", "3000", "--d-sae", "64", "--k", "4", "--window", "600", "--factors", "1", "3"]
    found = run(trainers, texts, *options, "--seeds", "0", "1", capsys=capsys, monkeypatch=monkeypatch)
    assert list(found["trainers"]) == ["openai-topk", "topk", "sae-lens", "sae-lens-centred"]  # no --sparsify-python
    for one in found["trainers"].values():
        tried = {float(factor): fvu for factor, fvu in one["fvu_by_factor"].items()}
        assert one["factor"] == min(tried, key=lambda factor: tried[factor]) and {1.0, 3.0} <= set(tried)
        # A best rate at an end of those tried is one that the search gave up on.
        assert one["at_edge"] == (one["factor"] in (min(tried), max(tried))) <= (len(tried) == trainers.MOST_RATES)
        assert [row["seed"] for row in one["seeds"]] == [0, 1]
        assert all(0 < row["fvu"] < 1 and row["l0"] <= 4.01 for row in one["seeds"])
    ours, theirs = (found["trainers"][name]["seeds"] for name in ("topk", "sae-lens"))
    mean, low, high = found["differences"]["topk - sae-lens"]["fvu"]
    assert mean == pytest.approx(np.mean([a["fvu"] - b["fvu"] for a, b in zip(ours, theirs, strict=True)]))
    assert low < mean < high


@pytest.mark.slow
def test_candidates_stand_beside_the_shipped_dictionary_and_random_directions(
    texts: Path, emotional_sae: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    emotional_sae.save_model(texts.parent / "shipped")
    (texts / "goemotions").mkdir()
    labelled(each=150, seed=0).save(path := texts.parent / "train.jsonl")
    (texts / "goemotions" / "train.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    options = ["--tokens", "3000", "--shipped", str(texts.parent / "shipped"), "--emotions", *EMOTIONS]
    found = run(candidates, texts, *options, capsys=capsys, monkeypatch=monkeypatch)
    assert (found["d_sae"], found["k"], found["tokens"]) == (64, 4, 2976)
    rows = found["dictionaries"]
    assert list(rows) == ["shipped", "openai-topk", "embedded-gemma", "embedded-batchtopk"]
    assert "over_shipped" not in rows["shipped"] and rows["shipped"]["auroc"] > 0.95  # its features were planted
    for name in list(rows)[1:]:
        mean, low, high = rows[name]["over_shipped"]
        assert mean == pytest.approx(rows[name]["auroc"] - rows["shipped"]["auroc"]) and low <= mean <= high
        assert rows[name]["fvu"] < rows["shipped"]["fvu"]  # a planted one rebuilds nothing
    for row in rows.values():
        assert row["over_random"][0] == pytest.approx(row["auroc"] - row["random_auroc"])


def test_rates_are_tried_until_the_best_has_worse_ones_on_both_sides() -> None:
    asked: list[float] = []

    def fvu(factor: float) -> float:
        asked.append(factor)
        return abs(factor - 27.0)

    assert min(trainers.search([1 / 3, 1.0, 3.0], fvu), key=lambda one: abs(one - 27)) == 27.0
    assert asked == [1 / 3, 1.0, 3.0, 9.0, 27.0, 81.0]
    assert len(trainers.search([1.0, 3.0], lambda factor: factor)) == trainers.MOST_RATES  # ever smaller


def test_sparsify_gets_the_batches_that_the_others_get(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, n in zip(paths, (100, 37, 260), strict=True):
        np.save(path, rng.standard_normal((n, 5), dtype=np.float32))
    store = activation_store.ActivationStore(paths, "key")
    job = {"shards": [str(shard.filename) for shard in store.shards], "seed": 2, "batch_size": 64}
    theirs = list(sparsify_coder.batches(job))
    assert len(theirs) == 397 // 64
    for batch, own in zip(theirs, store.batches(64, 2), strict=False):
        assert torch.equal(batch, own)


@pytest.mark.slow
def test_the_blog_s_figures_stand_beside_ours(texts: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--steps", "210", "--hook", HOOK, "--l1", "0.1")
    found = run(blog_training, texts, *options, capsys=capsys, monkeypatch=monkeypatch)
    assert list(found["losses"]) == ["0", "100", "200", "209"] and found["d_sae"] == 8 * 32
    assert found["share_of_start"]["209"] == found["losses"]["209"] / found["losses"]["0"] < 1
    assert list(found["share_of_start"]) == list(found["losses"]) and found["l1"][0] > 0  # the penalty is there at once
    assert found["blog_share_of_start"] == pytest.approx(0.34, abs=0.001)
    assert found["off_diag_mean_random"] == pytest.approx((2 / (np.pi * 32)) ** 0.5)
    assert found["cosine_mean"][0] == pytest.approx(found["off_diag_mean_random"], rel=0.03)
