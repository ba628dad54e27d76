import math
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from test_judge_corpora import write_rows

from sae_emotion_plugin.judges import fitting as judge_fitting
from sae_emotion_plugin.judges.corpora import JudgeTexts
from sae_emotion_plugin.judges.fitting import fit_logistic, learn_vocabulary, refit, split, tfidf_matrix
from sae_emotion_plugin.judges.linear import NgramSettings, judge_facts, linear_judge, tfidf

WORDS = NgramSettings("word", 1, 1)


def newton_logistic(design: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """An independent reference: Newton's method with a free bias in the last place."""
    wide = np.column_stack([design, np.ones(len(design))])
    ridge = np.eye(wide.shape[1])
    ridge[-1, -1] = 0
    parameters = np.zeros(wide.shape[1])
    for _ in range(60):
        rate = 1 / (1 + np.exp(-wide @ parameters))
        gradient = strength * wide.T @ (rate - targets) + ridge @ parameters
        hessian = strength * (wide * (rate * (1 - rate))[:, None]).T @ wide + ridge
        parameters = parameters - np.linalg.solve(hessian, gradient)
    return parameters


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_regression_equals_newtons_method(strength: float, sparse: bool) -> None:
    rng = np.random.default_rng(0)
    design = rng.normal(size=(200, 6)) * (rng.random((200, 6)) < 0.5)
    design[:, 5] = 0  # a feature that no text has
    targets = design[:, 0] - design[:, 1] + rng.normal(size=200) > 0.5
    weights, bias = fit_logistic(scipy.sparse.csr_matrix(design) if sparse else design, targets, strength)
    expected = newton_logistic(design, targets, strength)
    np.testing.assert_allclose([*weights, bias], expected, atol=2e-4)
    assert weights[5] == 0


def test_separable_classes_have_finite_weights() -> None:
    targets = np.arange(20) < 10
    weights, bias = fit_logistic(np.where(targets, 1.0, -1.0)[:, None], targets, 10.0)
    assert 0 < weights[0] < 10 and abs(bias) < 1e-6


@pytest.mark.parametrize("one_class", [True, False])
def test_one_class_is_refused(one_class: bool) -> None:
    with pytest.raises(ValueError, match="needs both classes, got"):
        fit_logistic(np.ones((5, 1)), np.full(5, one_class), 1.0)


def test_the_vocabulary_has_the_commonest_terms_of_at_least_two_texts() -> None:
    vocabulary, idf = learn_vocabulary(["a b", "a a c", "b a", "d"], WORDS, most=5)
    assert vocabulary == {"a": 0, "b": 1}
    assert idf.tolist() == pytest.approx([math.log(5 / 4) + 1, math.log(5 / 3) + 1])
    assert learn_vocabulary(["a b", "a a c", "b a"], WORDS, most=1)[0] == {"a": 0}
    with pytest.raises(ValueError, match="no n-gram stands in 2 of 2 texts"):
        learn_vocabulary(["a", "b"], WORDS, most=5)


def test_the_matrix_has_the_features_of_each_text_in_its_row() -> None:
    texts = ["a b b", "zzz", "a"]
    vocabulary, idf = learn_vocabulary(["a b", "b a", "a"], WORDS, most=5)
    found = tfidf_matrix(texts, WORDS, vocabulary, idf).toarray()
    for row, text in zip(found, texts, strict=True):
        features, values = tfidf(text, WORDS, vocabulary, idf)
        expected = np.zeros(len(vocabulary))
        expected[features] = values
        assert row.tolist() == expected.tolist()


def corpus(texts: list[str], documents: list[int] | None) -> JudgeTexts:
    targets = np.arange(len(texts))[:, None] % 2 == 0
    return JudgeTexts(
        "mine", tuple(texts), ("joy",), targets, np.ones_like(targets),
        None if documents is None else np.array(documents), "",
    )  # fmt: skip


def test_no_document_and_no_near_duplicate_stands_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    plain = ["".join(rng.choice(list("abcdefghij "), size=40)) for _ in range(100)]
    texts = [*plain, *(text.upper() + "!" for text in plain[:30])]
    documents = [place // 4 for place in range(130)]
    for of in (None, documents):
        train, held_out, groups = split(corpus(texts, of), seed=0)
        assert not {texts[place].lower().strip("!") for place in train} & {
            texts[place].lower().strip("!") for place in held_out
        }
        assert not set(groups[train]) & set(groups[held_out])
        assert 25 <= len(held_out) <= 42
    assert len(train) + len(held_out) < 130  # copies in other documents are in neither part


def planted(folder: Path) -> None:
    """Corpora in which one word says the emotion, in noise."""
    rng = np.random.default_rng(0)
    filler = ["".join(rng.choice(list("aeioubdgklmnprst"), size=5)) for _ in range(300)]
    korean = ["".join(rng.choice(list("가나다라마바사아자차카타파하"), size=3)) for _ in range(300)]
    names = ["anger", "disgust", "fear", "joy", "sadness", "surprise", "anticipation", "trust"]
    signs = {
        "기쁨": "좋군",
        "슬픔": "눈물",
        "화남/분노": "으르렁",
        "증오/혐오": "퉤퉤퉤",
        "불안/걱정": "덜덜",
        "놀람": "깜짝",
    }

    def sentence(words: list[str], sign: str) -> str:
        chosen = list(rng.choice(words, size=6))
        if rng.random() < 0.9:
            chosen.insert(3, sign)
        return " ".join(chosen)

    rows = [{"text": sentence(filler, f"x{name}"), "label": [name]} for name in names for _ in range(45)]
    write_rows(folder, "xed_en/train.jsonl.gz", rows)
    rated = [
        {"text": sentence(filler, f"x{name}"), "V": v} for name, v in [("joy", 4.0), ("fear", 2.0)] for _ in range(20)
    ]
    write_rows(folder, "emobank/train.jsonl.gz", rated)
    write_rows(folder, "emobank/dev.jsonl.gz", rated[:1])
    rows = [{"text": sentence(korean, sign), "label": [label]} for label, sign in signs.items() for _ in range(45)]
    write_rows(folder, "kote/val.jsonl.gz", rows)
    rows = [
        {"text": sentence(korean, sign), "label": label, "movie_id": str(film)}
        for label, sign in [("positive", "좋군"), ("negative", "눈물")]
        for film in range(60)
    ]
    write_rows(folder, "nsmc/train.jsonl.gz", rows)


def test_refitting_recovers_planted_words_and_writes_judges_that_load(tmp_path: Path) -> None:
    planted(tmp_path / "corpora")
    names = ["xed-words", "kote-characters", "nsmc-characters"]
    out = tmp_path / "out"
    paths = refit(tmp_path / "corpora", out, names=names)
    assert [path.name for path in paths] == [f"{name}.json" for name in names]
    assert len(list(out.iterdir())) == 9  # three files a judge, and nothing left over
    facts = judge_facts("xed-words", out)
    assert all(figure["auroc"] > 0.9 for figure in facts["figures"])
    assert [figure["on"] for figure in facts["figures"]] == [*["XED, held out"] * 9, "EmoBank"]
    assert facts["n_train"] + facts["n_held_out"] == 8 * 45 and 80 <= facts["n_held_out"] <= 100
    judge = linear_judge("xed-words", out)
    joy = judge(["xjoy this", "xanger this"])
    assert joy.of("joy")[0] > joy.of("joy")[1] + 0.2 and joy.of("valence")[0] > 0 > joy.of("valence")[1]
    assert linear_judge("nsmc-characters", out)(["좋군", "눈물"]).of("valence")[0] > 0


def test_refitting_twice_gives_equal_files(tmp_path: Path) -> None:
    planted(tmp_path / "corpora")
    for out in ("one", "two"):
        refit(tmp_path / "corpora", tmp_path / out, names=["nsmc-characters"])
    one, two = (sorted((tmp_path / out).iterdir()) for out in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_an_unknown_judge_and_a_missing_extra_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no judge 'vader' can be fitted; choose from xed-words"):
        refit(tmp_path, tmp_path / "out", names=["vader"])

    def missing() -> Path:
        raise ImportError("the extra judges")

    monkeypatch.setattr(judge_fitting, "encoder_folder", missing)
    with pytest.raises(ImportError, match="judges"):
        refit(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_corpus_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="kote"):
        refit(tmp_path, tmp_path / "out", names=["kote-characters"])
    assert list((tmp_path / "out").iterdir()) == []
