import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.evidence.association import auroc
from sae_emotion_plugin.evidence.selection import (
    HeldOut,
    Ledger,
    Look,
    choose_by_cross_validation,
    leaks_between,
    nested_cross_validation,
    optimism,
)
from sae_emotion_plugin.text_splits import joined_groups, near_duplicate_groups, stratified_folds, stratified_held_out

N_TEXTS, N_FEATURES = 120, 60


def noise(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features that know nothing of the label, and the label."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N_TEXTS, N_FEATURES)), (rng.random(N_TEXTS) < 0.4)[:, None]


def feature_candidates(
    features: np.ndarray, labels: np.ndarray
) -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """One candidate a feature: its AUROC on the test texts, with the sign it has on the training texts."""

    def of(feature: int) -> Callable[[np.ndarray, np.ndarray], float]:
        def score(train: np.ndarray, test: np.ndarray) -> float:
            sign = 1 if auroc(features[train, feature], labels[train, 0]) >= 0.5 else -1
            return auroc(sign * features[test, feature], labels[test, 0])

        return score

    return {str(feature): of(feature) for feature in range(features.shape[1])}


def selection_inside(features: np.ndarray) -> Callable[[np.ndarray], float]:
    groups = np.arange(len(features))

    def procedure(labels: np.ndarray) -> float:
        candidates = feature_candidates(features, labels)
        return nested_cross_validation(candidates, labels, groups, outer=3, inner=2, seed=0).mean

    return procedure


def selection_on_the_held_out_half(features: np.ndarray) -> Callable[[np.ndarray], float]:
    def procedure(labels: np.ndarray) -> float:
        held_out = stratified_held_out(labels, np.arange(len(labels)), 0.5, seed=0)
        return max(auroc(column[held_out], labels[held_out, 0]) for column in features.T)

    return procedure


def test_selection_on_the_held_out_half_is_caught_and_selection_inside_is_not() -> None:
    features, labels = noise()
    honest = optimism(selection_inside(features[:, :12]), labels, permutations=10, seed=1)
    leaking = optimism(selection_on_the_held_out_half(features), labels, permutations=10, seed=1)
    assert not honest.leaks
    assert honest.interval.low < 0.5 < honest.interval.high
    assert leaking.leaks
    assert leaking.interval.mean > 0.6
    assert json.loads(json.dumps(leaking.to_dict()))["leaks"] is True


def test_a_split_that_tears_duplicates_apart_is_caught_and_one_that_keeps_them_whole_is_not() -> None:
    """The nearest training text tells the label of a duplicate, and of nothing else when labels are permuted."""
    rng = np.random.default_rng(2)
    points = np.repeat(rng.normal(size=(40, 5)), 2, axis=0)
    pairs, labels = np.repeat(np.arange(40), 2), (rng.random(80) < 0.5)[:, None]

    def nearest_neighbour(groups: np.ndarray) -> Callable[[np.ndarray], float]:
        def procedure(labels: np.ndarray) -> float:
            held_out = stratified_held_out(labels, groups, 0.5, seed=0)
            distance = ((points[held_out][:, None] - points[~held_out][None]) ** 2).sum(axis=2)
            return auroc(labels[~held_out, 0][distance.argmin(axis=1)].astype(float), labels[held_out, 0])

        return procedure

    torn = optimism(nearest_neighbour(np.arange(80)), labels, groups=pairs, permutations=12, seed=0)
    whole = optimism(nearest_neighbour(pairs), labels, groups=pairs, permutations=12, seed=0)
    assert torn.leaks
    assert torn.interval.mean > 0.6
    assert not whole.leaks


def test_permuted_labels_keep_groups_alike_and_their_numbers() -> None:
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 0], [0, 0], [1, 1]], dtype=bool)
    groups = np.array([4, 4, 7, 1, 1, 2])
    seen = []

    def procedure(permuted: np.ndarray) -> float:
        seen.append(permuted)
        return 0.5

    optimism(procedure, labels, permutations=30, seed=0)
    assert all(sorted(map(tuple, permuted)) == sorted(map(tuple, labels)) for permuted in seen)
    assert len({permuted.tobytes() for permuted in seen}) > 10
    seen.clear()
    optimism(procedure, labels, groups=groups, permutations=30, seed=0)
    assert all((permuted[0] == permuted[1]).all() and (permuted[3] == permuted[4]).all() for permuted in seen)
    one_text_a_group = sorted(map(tuple, labels[[0, 2, 3, 5]]))
    assert all(sorted(map(tuple, permuted[[0, 2, 3, 5]])) == one_text_a_group for permuted in seen)


def test_optimism_refuses_few_permutations_and_undefined_scores() -> None:
    labels = np.ones((4, 1), dtype=bool)
    with pytest.raises(ValueError, match="at least 5, got 4"):
        optimism(lambda labels: 0.5, labels, permutations=4, seed=0)
    with pytest.raises(ValueError, match="permuted labels is nan"):
        optimism(lambda labels: float("nan"), labels, seed=0)


def test_the_candidate_with_the_best_mean_is_chosen_and_the_first_on_a_tie() -> None:
    folds = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
    seen = []

    def steady(train: np.ndarray, test: np.ndarray) -> float:
        seen.append((train.tolist(), test.tolist()))
        return 0.6

    found = choose_by_cross_validation(
        {"lucky once": lambda train, test: 0.9 if 0 in test else 0.4, "steady": steady, "as steady": steady}, folds
    )
    assert found.name == "steady"
    assert found.scores["lucky once"] == (0.9, 0.4, 0.4)
    assert found.means["steady"] == pytest.approx(0.6)
    assert seen[:2] == [([2, 3, 4, 5], [0, 1])] * 2


def test_nested_cross_validation_finds_a_planted_feature_and_never_shows_the_outer_fold() -> None:
    rng = np.random.default_rng(3)
    features, labels = noise(3)
    features = features[:, :5].copy()
    features[:, 2] += 1.5 * labels[:, 0]
    groups = np.arange(N_TEXTS) // 2
    used: list[tuple[set[int], set[int]]] = []
    candidates = {
        name: lambda train, test, score=score: (used.append((set(train), set(test))), score(train, test))[1]
        for name, score in feature_candidates(features, labels).items()
    }
    found = nested_cross_validation(candidates, labels, groups, outer=3, inner=2, seed=int(rng.integers(100)))
    assert [choice.name for choice in found.choices] == ["2", "2", "2"]
    assert found.mean == pytest.approx(np.mean(found.scores))
    assert 0.75 < found.mean < 0.95
    assert len(used) == 3 * (2 * 5 + 1)
    for start in range(0, len(used), 11):
        outer_train, outer_test = used[start + 10]
        assert outer_train | outer_test == set(range(N_TEXTS))
        for train, test in used[start : start + 11]:
            assert not train & test
            assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert all(train | test <= outer_train for train, test in used[start : start + 10])
    assert json.loads(json.dumps(found.to_dict()))["choices"][0]["name"] == "2"


def test_bad_candidates_and_folds_are_refused() -> None:
    folds = [np.array([0]), np.array([1])]
    with pytest.raises(ValueError, match="no candidates"):
        choose_by_cross_validation({}, folds)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        choose_by_cross_validation({"a": lambda train, test: 0.5}, folds[:1])
    with pytest.raises(ValueError, match="folds overlap"):
        choose_by_cross_validation({"a": lambda train, test: 0.5}, [np.array([0, 1]), np.array([1])])
    with pytest.raises(ValueError, match="score of 'a' in fold 1 is nan"):
        choose_by_cross_validation({"a": lambda train, test: 0.5 if 0 in test else float("nan")}, folds)


def test_a_second_look_is_recorded_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    _, labels = noise()
    held_out = HeldOut("dev", labels[:, 0])
    first = held_out.score("max pooling", np.arange(N_TEXTS), auroc)
    assert first == auroc(np.arange(N_TEXTS), labels[:, 0])
    assert held_out.ledger.repeated() == {}
    assert "dev is scored" not in caplog.text
    with caplog.at_level(logging.WARNING):
        held_out.score("mean pooling", np.arange(N_TEXTS)[::-1], auroc)
    assert "dev is scored for the 2. time, with mean pooling" in caplog.text
    assert held_out.ledger.counts() == {"dev": 2}
    assert held_out.ledger.repeated() == {"dev": ("max pooling", "mean pooling")}
    assert "dev, scored 2 times: max pooling" in repr(held_out.ledger)
    assert "looked at more than once" in repr(held_out.ledger)
    assert repr(held_out) == "HeldOut('dev', 120 texts, scored 2 times)"


def test_no_attribute_of_a_held_out_part_holds_its_labels() -> None:
    labels = np.array([True, False, True])
    held_out = HeldOut("dev", labels)
    assert not any(isinstance(value, np.ndarray) for value in vars(held_out).values())
    labels[:] = False
    assert held_out.score("a", np.array([1.0, 0.0, 1.0]), auroc) == 1


def test_what_cannot_be_scored_is_no_look() -> None:
    held_out = HeldOut("dev", np.array([True, False]))
    with pytest.raises(ValueError, match="dev has 2 texts, got 3 scores"):
        held_out.score("a", np.zeros(3), auroc)
    with pytest.raises(ValueError, match="score of 'a' on dev is nan"):
        held_out.score("a", np.zeros(2), lambda scores, labels: float("nan"))
    with pytest.raises(ValueError, match="read-only"):
        held_out.score("a", np.zeros(2), lambda scores, labels: labels.fill(True))
    assert held_out.ledger == Ledger()


def test_a_ledger_goes_to_a_file_and_back(tmp_path: Path) -> None:
    ledger = Ledger((Look("dev", "감정 a", 0.8),)) + Ledger((Look("test", "b", 0.7), Look("dev", "c", 0.81)))
    path = tmp_path / "ledger.json"
    assert ledger.save(path) == path
    assert Ledger.load(path) == ledger
    assert json.loads(path.read_text(encoding="utf-8"))["counts"] == {"dev": 2, "test": 1}
    for broken in ("[]", "{}", '{"looks": [{"part": 1, "what": "x", "score": 0.5}]}', '{"looks": [{"x": 1}]}', "no"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="holds no ledger"):
            Ledger.load(path)


STATION = "I waited at the station for three hours and nobody came to fetch me."
TEXTS = (
    STATION,
    "What a day, the sun came out and we laughed until the evening.",
    "They broke the window and ran away before anyone could shout.",
    "The soup was cold again and the waiter did not care at all.",
)


def labelled(texts: list[str], prefix: str) -> LabelledTexts:
    return LabelledTexts(tuple(texts), (("joy",),) * len(texts), tuple(f"{prefix}{i}" for i in range(len(texts))))


def test_duplicates_across_splits_are_caught_and_gone_after_their_removal() -> None:
    train = labelled([TEXTS[0].upper(), TEXTS[1], STATION.replace("me.", "us!"), TEXTS[3]], "train-")
    held_out = labelled([STATION, TEXTS[2], TEXTS[3] + "!"], "dev-")
    found = leaks_between(train, held_out)
    assert found
    assert found.duplicates == ("train-0", "train-3")
    assert found.near_duplicates == ("train-2",)
    assert found.held_out == ("dev-0", "dev-2")
    assert "of 4 training texts 2 are duplicates (train-0, train-3)" in repr(found)
    cleaned, dropped = without_overlap(train, held_out)
    assert dropped == len(found.duplicates) + len(found.near_duplicates)
    assert not leaks_between(cleaned, held_out)


def test_an_id_on_both_sides_is_a_leak_whatever_its_text() -> None:
    found = leaks_between(labelled([TEXTS[1]], "x"), labelled([TEXTS[2]], "x"))
    assert found
    assert (found.shared_ids, found.duplicates, found.near_duplicates) == (("x0",), (), ())
    assert not leaks_between(labelled([TEXTS[1]], "x"), labelled([TEXTS[2]], "y"))


def test_a_split_by_document_and_near_duplicate_leaks_nothing() -> None:
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice([f"word{i}" for i in range(200)], size=8)) for _ in range(60)]
    texts += [text + "!" for text in texts[:15]]
    documents = np.concatenate([np.arange(60) // 3, 100 + np.arange(15) // 3])
    groups = joined_groups(documents, near_duplicate_groups(texts))
    corpus = labelled(texts, "t")
    for fold in stratified_folds(corpus.label_matrix(), groups, 3, seed=0):
        rest = np.setdiff1d(np.arange(len(texts)), fold)
        assert not leaks_between(corpus.select(rest), corpus.select(fold))
        assert not set(documents[rest].tolist()) & set(documents[fold].tolist())
