import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_emotion_plugin import text_splits
from sae_emotion_plugin.text_splits import (
    comparison_key,
    joined_groups,
    near_duplicate_groups,
    stratified_folds,
    stratified_held_out,
)

deterministic = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def slow_shingles(key: str) -> frozenset[str]:
    found = set()
    for i, character in enumerate(key):
        dense = any(low <= character <= high for low, high in ("ᄀᇿ", "\u2e80\ua4cf", "\uac00\ud7ff", "\uf900\ufaff"))
        shingle = key[i : i + (2 if dense else 3)]
        if len(shingle) == (2 if dense else 3):
            found.add(shingle)
    return frozenset(found | ({key} if len(key) < 3 and not found else set()))


def slow_groups(texts: list[str], threshold: float) -> list[int]:
    """Every pair of texts compared, and groups spread until nothing changes."""
    shingles = [slow_shingles(comparison_key(text)) for text in texts]
    groups = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        equal = comparison_key(texts[i]) == comparison_key(texts[j])
        both = len(shingles[i] | shingles[j])
        if equal or (both and len(shingles[i] & shingles[j]) / both >= threshold - 1e-12):
            old, new = groups[j], groups[i]
            groups = [new if group == old else group for group in groups]
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [order[group] for group in groups]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Thank you so much!", "thank you, so much"),
        ("ＦＵＬＬ　ｗｉｄｔｈ", "full width"),
        ("die Straße", "DIE STRASSE"),
        ("정말 고맙습니다!!", "정말고맙습니다"),
        ("ﾀﾞﾒです。", "ダメです"),
        ("cafe\u0301", "café"),
        ("so\u200bon", "soon"),
        ("it's “fine” — really…", "its fine really"),
        ("❤\ufe0f", "❤"),
    ],
)
def test_case_width_accents_and_punctuation_do_not_make_a_text_another(one: str, other: str) -> None:
    assert comparison_key(one) == comparison_key(other)


@pytest.mark.parametrize(
    ("one", "other"), [("!!!", "?"), ("😀", "😡"), ("he is happy", "he is unhappy"), ("행복", "불행")]
)
def test_texts_that_differ_in_more_keep_different_keys(one: str, other: str) -> None:
    assert comparison_key(one) != comparison_key(other)
    assert len(set(near_duplicate_groups([one, other]).tolist())) == 2


NEAR = {
    "en": (
        "I waited at the station for three hours and nobody came to fetch me.",
        "I waited at the station for three hours, and nobody came to fetch us!",
        "I waited at the office for two days and somebody called to thank me.",
    ),
    "ko": (
        "어제 역에서 세 시간이나 기다렸는데 아무도 데리러 오지 않았어요.",
        "어제 역에서 세시간이나 기다렸는데 아무도 데리러 오지 않았어요...ㅠ",
        "어제 회사에서 전화가 왔는데 모두가 축하한다고 말해 주었어요.",
    ),
    "ja": (
        "昨日は駅で三時間も待っていたのに、誰も迎えに来てくれませんでした。",
        "昨日は駅で三時間も待っていたのに誰も迎えに来てくれませんでしたよ",
        "昨日は会社から電話があって、みんながお祝いを言ってくれました。",
    ),
}


@pytest.mark.parametrize("language", NEAR)
def test_a_small_change_keeps_texts_together_and_a_large_one_does_not(language: str) -> None:
    assert near_duplicate_groups(NEAR[language]).tolist() == [0, 0, 1]


def test_groups_reach_through_chains() -> None:
    chain = ["abcdefghijklmnopqrstuvwxyz0123456789"[:n] for n in range(24, 37, 4)]
    assert near_duplicate_groups([chain[0], chain[-1]]).tolist() == [0, 1]
    assert near_duplicate_groups(chain).tolist() == [0] * len(chain)


def test_no_texts_and_empty_texts_have_groups_too() -> None:
    assert near_duplicate_groups([]).tolist() == []
    assert near_duplicate_groups(["", "a", "", "bb"]).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_groups_equal_those_of_comparing_every_pair(threshold: float) -> None:
    rng = np.random.default_rng(7)
    alphabet = list("abcde 行く가나")
    texts = ["".join(rng.choice(alphabet, rng.integers(1, 40))) for _ in range(60)]
    for text in list(texts):  # copies with a few changes
        letters = list(text)
        for _ in range(rng.integers(1, 4)):
            letters[rng.integers(len(letters))] = str(rng.choice(alphabet))
        texts.append("".join(letters))
    expected = slow_groups(texts, threshold)
    assert 1 < len(set(expected)) < len(texts)
    assert near_duplicate_groups(texts, threshold).tolist() == expected


@deterministic
@given(st.lists(st.text(alphabet="ab가 !", min_size=1, max_size=12), min_size=1, max_size=12))
def test_groups_equal_those_of_comparing_every_pair_also_for_odd_texts(texts: list[str]) -> None:
    assert near_duplicate_groups(texts).tolist() == slow_groups(texts, 0.8)


def test_small_chunks_give_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(12)]
    texts = [" ".join(rng.choice(words, 5)) for _ in range(300)]
    expected = near_duplicate_groups(texts)
    assert 1 < len(set(expected.tolist())) < 300
    monkeypatch.setattr(text_splits, "_PAIRS_AT_ONCE", 10)
    monkeypatch.setattr(text_splits, "_SHINGLES_COUNTED_AT_ONCE", 50)
    np.testing.assert_array_equal(near_duplicate_groups(texts), expected)


def test_bits_are_counted_alike_with_and_without_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(2**63, size=100, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert text_splits._count_bits(words).tolist() == [int(word).bit_count() for word in words]


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be above 0"):
        near_duplicate_groups(["a"], threshold)


def random_labels(rng: np.random.Generator, n_texts: int) -> np.ndarray:
    return rng.random((n_texts, 5)) < [0.5, 0.3, 0.1, 0.05, 0.02]


@pytest.mark.parametrize("held_out", [0.5, 0.2, 0.1])
def test_every_label_keeps_its_share(held_out: float) -> None:
    rng = np.random.default_rng(3)
    labels = random_labels(rng, 1000)
    mask = stratified_held_out(labels, np.arange(1000), held_out, seed=0)
    np.testing.assert_allclose(labels[mask].sum(axis=0), held_out * labels.sum(axis=0), atol=2)
    unlabelled = labels.sum(axis=1) == 0
    np.testing.assert_allclose(
        [mask.sum(), unlabelled[mask].sum()], held_out * np.array([1000, unlabelled.sum()]), atol=8
    )


def test_stratifying_beats_a_random_split_on_the_rare_label() -> None:
    labels = random_labels(np.random.default_rng(5), 400)
    rare = labels[:, 4]
    ours, random = [], []
    for seed in range(10):
        ours.append(rare[stratified_held_out(labels, np.arange(400), 0.5, seed)].sum())
        random.append(rare[np.random.default_rng(seed).permutation(400) < 200].sum())
    assert np.std(ours) < 0.7 < np.std(random)


def test_a_label_of_two_texts_has_one_on_each_side_even_of_a_small_share() -> None:
    labels = np.zeros((200, 2), dtype=bool)
    labels[:, 0] = True
    labels[[17, 99]] = [[False, True], [False, True]]
    for seed in range(5):
        mask = stratified_held_out(labels, np.arange(200), 0.1, seed)
        assert mask[[17, 99]].sum() == 1
        assert mask.sum() == pytest.approx(20, abs=2)


@deterministic
@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([0.1, 0.5, 0.8]))
def test_no_group_is_on_both_sides_and_no_side_is_empty(seed: int, n_texts: int, held_out: float) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(max(2, n_texts // 3), size=n_texts)
    groups[:2] = [0, 1]
    mask = stratified_held_out(random_labels(rng, n_texts), groups, held_out, seed)
    assert not set(groups[mask].tolist()) & set(groups[~mask].tolist())
    assert 0 < mask.sum() < n_texts


def test_the_seed_and_nothing_else_decides_the_split() -> None:
    labels, groups = random_labels(np.random.default_rng(2), 100), np.arange(100) // 2
    first = stratified_held_out(labels, groups, 0.5, 4)
    np.testing.assert_array_equal(first, stratified_held_out(labels, groups, 0.5, 4))
    np.testing.assert_array_equal(first, stratified_held_out(labels, groups * 3 + 5, 0.5, 4))
    assert not np.array_equal(first, stratified_held_out(labels, groups, 0.5, 5))


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_outside_0_and_1_is_refused(held_out: float) -> None:
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1"):
        stratified_held_out(np.ones((2, 1), dtype=bool), np.arange(2), held_out, 0)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="all are near-duplicates of one another"):
        stratified_held_out(np.ones((3, 1), dtype=bool), np.zeros(3, dtype=int), 0.5, 0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        stratified_held_out(np.ones((3, 1), dtype=bool), np.arange(3), 0.5, -1)


def test_folds_hold_every_text_once_keep_groups_whole_and_spread_every_label() -> None:
    rng = np.random.default_rng(4)
    labels = random_labels(rng, 900)
    groups = np.repeat(np.arange(450), 2)
    parts = stratified_folds(labels, groups, 5, seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(900))
    for part in parts:
        assert (np.diff(part) > 0).all()
        assert not set(groups[part].tolist()) & set(np.delete(groups, part).tolist())
        np.testing.assert_allclose(labels[part].sum(axis=0), labels.sum(axis=0) / 5, atol=3)
        assert len(part) == pytest.approx(180, abs=6)
    again = stratified_folds(labels, groups * 7 + 3, 5, seed=1)
    assert [part.tolist() for part in again] == [part.tolist() for part in parts]
    assert [part.tolist() for part in stratified_folds(labels, groups, 5, seed=2)] != [part.tolist() for part in parts]


@deterministic
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(0, 30))
def test_no_fold_is_empty_even_with_one_group_for_each(seed: int, n_folds: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(n_folds), rng.integers(n_folds, size=more)])
    parts = stratified_folds(random_labels(rng, len(groups)), groups, n_folds, seed)
    assert len(parts) == n_folds
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))


def test_folds_that_cannot_be_made_are_refused() -> None:
    labels = np.ones((4, 1), dtype=bool)
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        stratified_folds(labels, np.arange(4), 1, 0)
    with pytest.raises(ValueError, match="3 folds need as many groups of texts, got 2"):
        stratified_folds(labels, np.array([0, 0, 1, 1]), 3, 0)


def test_groups_are_joined_through_documents_and_duplicates() -> None:
    documents = np.array([5, 5, 8, 8, 2, 9])
    duplicates = np.array([0, 1, 1, 2, 3, 3])
    assert joined_groups(documents, duplicates).tolist() == [0, 0, 0, 0, 1, 1]
    assert joined_groups(documents, np.arange(6)).tolist() == [0, 0, 1, 1, 2, 3]
    assert joined_groups(np.zeros(0, dtype=int), np.zeros(0, dtype=int)).tolist() == []
