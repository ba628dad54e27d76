import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_codes import codes_of
from scipy.stats import norm

from sae_emotion_plugin.discovery import method_comparison
from sae_emotion_plugin.discovery.method_comparison import compare_methods
from sae_emotion_plugin.discovery.method_table import MethodTable
from sae_emotion_plugin.discovery.probes import METHODS
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import auroc
from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval, compare_aurocs
from sae_emotion_plugin.sparse_codes import SparseCodes

EMOTIONS = ("fear", "joy")
D_IN, D_SAE = 6, 24
SHIFT = {"fear": 1.0, "joy": 1.6}
"""By how many standard deviations an emotion moves its own residual dimension (2, 4) and its own feature (11, 23)."""


def planted_auroc(shift: float) -> float:
    """The chance that a normal value moved by `shift` exceeds one that is not moved."""
    return float(norm.cdf(shift / np.sqrt(2)))


def world(n: int, seed: int) -> tuple[SparseCodes, dict[str, np.ndarray], LabelledTexts]:
    """Normal residuals and features (10 added, so that none is zero), one shifted for each emotion, and plain words."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, 2)) < 0.3
    features = 10 + rng.normal(size=(n, D_SAE))
    dense = rng.normal(size=(n, D_IN))
    for column, (emotion, feature, dimension) in enumerate(zip(EMOTIONS, (11, 23), (2, 4), strict=True)):
        features[:, feature] += SHIFT[emotion] * labels[:, column]
        dense[:, dimension] -= SHIFT[emotion] * labels[:, column]
    dense[:, 0] *= 1_000.0  # one huge dimension, as the residual streams of real models have
    words = np.array([f"w{number}" for number in range(200)])
    texts = [
        " ".join([*rng.choice(words, size=12), *(name for name, on in zip(("dread", "smile"), row, strict=True) if on)])
        for row in labels
    ]
    emotions = [tuple(name for name, on in zip(EMOTIONS, row, strict=True) if on) for row in labels]
    vectors = {"mean": dense.astype(np.float32), "last": rng.normal(size=(n, D_IN)).astype(np.float32)}
    named = LabelledTexts(tuple(texts), tuple(emotions), tuple(f"{seed}-{place}" for place in range(n)))
    return codes_of(features), vectors, named


TRAIN, HELD_OUT = world(800, 1), world(700, 2)


def compared(train: Any = TRAIN, held_out: Any = HELD_OUT, **options: Any) -> tuple[MethodTable, dict[str, np.ndarray]]:
    return compare_methods(*train, *held_out, **{"folds": 2, "resamples": 200, "progress": False, **options})


@pytest.fixture(scope="module")
def whole() -> tuple[MethodTable, dict[str, np.ndarray]]:
    return compared()


def labels_of(texts: LabelledTexts) -> np.ndarray:
    return np.array([[emotion in own for emotion in EMOTIONS] for own in texts.emotions])


def test_every_method_reaches_the_auroc_that_the_planted_shift_allows(whole: Any) -> None:
    table, _ = whole
    assert table.methods == METHODS and table.emotions == EMOTIONS
    for method in ("latent", "latents-2", "latents-5", "latents-16", "difference-of-means", "dense-probe", "neuron"):
        for emotion in EMOTIONS:
            row = table.of(method, emotion)
            assert row.auroc == pytest.approx(planted_auroc(SHIFT[emotion]), abs=0.04), (method, emotion)
            assert row.low < row.auroc < row.high
    assert table.of("bag-of-words").auroc > 0.98
    assert table.of("difference-of-means-raw").auroc < 0.6  # drowned by the huge dimension


def test_the_planted_features_and_dimensions_are_the_ones_chosen(whole: Any) -> None:
    table, _ = whole
    assert table.of("latent", "fear").choice == "max; feature 11" and table.of("latent", "joy").choice.endswith(" 23")
    assert table.of("neuron", "fear").choice == "mean; -dimension 2"
    assert table.of("neuron", "joy").choice == "mean; -dimension 4"
    assert "; features 11, " in table.of("latents-5", "fear").choice
    assert len(table.of("latents-16", "joy").choice.split("; features ")[1].split(", ")) == 16
    for method in ("difference-of-means", "dense-probe", "neuron"):
        assert table.of(method).choice.startswith("mean"), "the last token's vectors are noise"


def test_the_numbers_are_those_of_the_scores_returned_beside_the_table(whole: Any) -> None:
    table, scores = whole
    labels, groups = labels_of(HELD_OUT[2]), HELD_OUT[2].duplicate_groups
    options: dict[str, Any] = {"groups": groups, "resamples": 200, "seed": 0}
    assert tuple(scores) == METHODS
    for method in METHODS:
        own = [auroc(scores[method][:, column], labels[:, column]) for column in range(2)]
        assert [table.of(method, emotion).auroc for emotion in EMOTIONS] == pytest.approx(own)
        mean = table.of(method)
        assert mean.auroc == pytest.approx(np.mean(own)) and mean.low <= mean.auroc <= mean.high
    interval = auroc_interval(scores["neuron"][:, 1], labels[:, 1], **options)
    assert (table.of("neuron", "joy").low, table.of("neuron", "joy").high) == (interval.low, interval.high)
    found = compare_aurocs(scores["latent"], scores["neuron"], labels, margin=0.02, **options)
    row = table.difference("latent", "neuron")
    assert (row.difference, row.low, row.high) == (found.difference, found.low, found.high)


def test_a_method_is_not_worse_where_the_interval_lies_above_the_margin(whole: Any) -> None:
    table, _ = whole
    assert [(row.first, row.second) for row in table.differences if row.emotion == "mean"] == list(
        method_comparison.PAIRS
    )
    for row in table.differences:
        assert row.not_worse == (row.low > -row.margin) and row.margin == 0.02
    assert not table.difference("latents-16", "bag-of-words").not_worse
    generous, _ = compared(methods=("latent", "neuron"), margin=0.3)
    assert generous.difference("latent", "neuron").not_worse


def test_every_choice_is_made_without_the_held_out_texts_and_each_method_looks_once(whole: Any) -> None:
    table, _ = whole
    ledger = table.meta["ledger"]
    assert set(ledger["counts"].values()) == {1} and len(ledger["looks"]) == len(METHODS)
    other, _ = compared(held_out=world(300, 3), methods=("latent", "latents-5", "dense-probe", "neuron"))
    for method in other.methods:
        for emotion in EMOTIONS:
            assert other.of(method, emotion).choice == table.of(method, emotion).choice
        assert other.meta["cross_validation"][method] == table.meta["cross_validation"][method]
        best = max(other.meta["cross_validation"][method].items(), key=lambda item: item[1])[0]
        assert other.of(method).choice == best


def test_labels_that_mean_nothing_give_nothing() -> None:
    rng = np.random.default_rng(5)
    sides = []
    for codes, vectors, texts in (TRAIN, HELD_OUT):
        shuffled = tuple(texts.emotions[place] for place in rng.permutation(len(texts)))
        sides.append((codes, vectors, LabelledTexts(texts.texts, shuffled, texts.ids)))
    table, _ = compared(*sides, methods=("latent", "latents-5", "difference-of-means", "dense-probe", "neuron"))
    for method in table.methods:
        assert abs(table.of(method).auroc - 0.5) < 0.05
        assert max(table.meta["cross_validation"][method].values()) < 0.56


def test_many_training_texts_are_thinned_for_the_folds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_comparison, "FOLD_TEXTS", 300)
    seen: list[int] = []
    families = method_comparison.method_families

    def watched(method: str, inputs: Any) -> list[Any]:
        made = families(method, inputs)
        fits = [family.fit for family in made]

        def watch(fit: Any) -> Any:
            return lambda rows, scored, settings: (seen.append(len(rows)), fit(rows, scored, settings))[1]

        return [
            method_comparison.Family(family.name, watch(fit), family.settings)
            for family, fit in zip(made, fits, strict=True)
        ]

    monkeypatch.setattr(method_comparison, "method_families", watched)
    table, _ = compared(methods=("neuron",))
    assert seen[-1] == 800 and max(seen[:-1]) < 170
    assert abs(table.meta["n_texts"]["cross_validation"] - 300) <= 5


def test_near_duplicates_share_a_fold() -> None:
    groups = np.repeat(np.arange(30), 4)
    labels = (groups[:, None] + np.arange(2)) % 3 == 0
    parts = method_comparison._folds(labels, groups, EMOTIONS, 3, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    for part in parts:
        assert not set(groups[part]) & set(np.delete(groups, part))


def test_the_table_is_shown_saved_and_read(whole: Any, tmp_path: Path) -> None:
    table, _ = whole
    saved = json.loads(table.save(tmp_path / "methods.json").read_text())
    assert saved == json.loads(json.dumps(table.to_dict()))
    assert len(saved["scores"]) == len(METHODS) * 3 and len(saved["differences"]) == 6 * 3
    shown = repr(table)
    assert "latents-16 - dense-probe" in shown and "dense-probe " in shown
    assert f"{table.of('neuron').auroc:.3f}" in shown
    assert table._repr_html_().count("<table>") == 2
    pytest.importorskip("pandas")
    assert list(table.to_pandas()["method"].unique()) == list(METHODS)
    with pytest.raises(ValueError, match=r"no score of 'neurons' for 'mean' \(valid: latent, "):
        table.of("neurons")
    with pytest.raises(ValueError, match=r"no difference neuron - latent for 'mean' \(valid: latent - "):
        table.difference("neuron", "latent")


def changed(side: Any, **parts: Any) -> Any:
    return tuple(parts.get(name, own) for name, own in zip(("codes", "dense", "texts"), side, strict=True))


@pytest.mark.parametrize(
    ("train", "held_out", "options", "message"),
    [
        (TRAIN, HELD_OUT, {"methods": ("latent", "guess")}, r"unknown methods: guess \(valid: latent, "),
        (TRAIN, HELD_OUT, {"methods": ()}, "unknown methods: none given"),
        (TRAIN, HELD_OUT, {"emotions": ["awe"]}, r"unknown emotions: awe \(valid: fear, joy\)"),
        (TRAIN, HELD_OUT, {"margin": -0.1}, r"margin must be 0 or more, got -0\.1"),
        (TRAIN, HELD_OUT, {"folds": 1}, "folds must be at least 2, got 1"),
        (TRAIN, HELD_OUT, {"groups": [1, 2]}, "700 held-out texts, but 2 groups"),
        (changed(TRAIN, codes=HELD_OUT[0]), HELD_OUT, {}, "codes are of 700 texts, but there are 800 texts"),
        (TRAIN, changed(HELD_OUT, dense=TRAIN[1]), {}, "800 mean vectors, but there are 700 held-out texts"),
        (TRAIN, changed(HELD_OUT, dense={"mean": HELD_OUT[1]["mean"]}), {}, "the held-out ones {'mean': 6}"),
        (changed(TRAIN, dense={}), changed(HELD_OUT, dense={}), {}, "the vectors are of no pooling"),
        (TRAIN, world(40, 4), {}, "too few texts for"),
        (changed(TRAIN, dense={"mean": np.full((800, 6), np.nan)}), HELD_OUT, {}, "mean vectors of the texts are"),
        (changed(TRAIN, codes=codes_of(np.ones((800, 3)))), HELD_OUT, {}, "the held-out codes of"),
    ],
)  # fmt: skip
def test_unusable_arguments_are_refused(train: Any, held_out: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(train, held_out, **options)


def test_an_emotion_in_one_group_of_copies_is_refused_by_name() -> None:
    codes, vectors, texts = TRAIN
    copies = ["the very same words of one and the same text"] * 30
    rare = [("awe", *own) if place < 30 else own for place, own in enumerate(texts.emotions)]
    copied = LabelledTexts((*copies, *texts.texts[30:]), tuple(rare), texts.ids)
    held_out = LabelledTexts(HELD_OUT[2].texts, tuple(rare[: len(HELD_OUT[2])]), HELD_OUT[2].ids)
    with pytest.raises(ValueError, match=r"too few texts for awe \(0 in"):
        compared((codes, vectors, copied), changed(HELD_OUT, texts=held_out), methods=("latent",))


def refuse_to_fit(monkeypatch: pytest.MonkeyPatch, *refused: str) -> list[str]:
    """Methods whose families are asked for from now on; a refused one interrupts."""
    real, asked = method_comparison.method_families, []

    def families(method: str, inputs: Any) -> Any:
        asked.append(method)
        if method in refused:
            raise KeyboardInterrupt
        return real(method, inputs)

    monkeypatch.setattr(method_comparison, "method_families", families)
    return asked


def test_an_interrupted_comparison_goes_on_behind_the_last_method(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        refuse_to_fit(patch, METHODS[3])
        compared(cache=tmp_path)
    asked = refuse_to_fit(monkeypatch)
    table, scores = compared(cache=tmp_path)
    assert tuple(asked) == METHODS[3:]
    assert table == whole[0] and all((scores[name] == whole[1][name]).all() for name in METHODS)
    asked.clear()
    again, _ = compared(cache=tmp_path)
    assert again == table and not asked


def test_what_was_kept_of_other_inputs_or_is_damaged_is_not_used(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refuse_to_fit(monkeypatch)
    compared(methods=("latent", "neuron"), cache=tmp_path)
    asked.clear()
    codes, vectors, texts = TRAIN
    turned = {name: -values for name, values in vectors.items()}
    swapped = LabelledTexts(texts.texts, texts.emotions[::-1], texts.ids)
    changed: list[dict[str, Any]] = [{"train": (codes, turned, texts)}, {"train": (codes, vectors, swapped)}]
    for options in [*changed, {"folds": 3}, {"seed": 5}, {"emotions": EMOTIONS[:1]}]:
        compared(methods=("latent",), cache=tmp_path, **options)
        assert asked.pop() == "latent" and not asked, options
    for path in tmp_path.glob("*/neuron.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    table, _ = compared(methods=("latent", "neuron"), cache=tmp_path)
    assert asked == ["neuron"] and table.scores == tuple(row for row in whole[0].scores if row.method in table.methods)
