from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from sae_emotion_plugin.evidence.association import auroc
from sae_emotion_plugin.judges.judge import Judge, Judgements, vader_judge
from sae_emotion_plugin.judges.names import load_judge
from sae_emotion_plugin.judges.quality import (
    EMOTIONS,
    generation_quality,
    generations_facts,
    labelled_generations,
    quality,
    quality_table,
)


def lengths() -> Judge:
    """A judge that calls long texts joyful and pleasant."""

    def judge(texts: Sequence[str]) -> Judgements:
        sizes = np.array([min(1.0, len(text) / 100) for text in texts])
        return Judgements(("joy",), sizes[:, None], 2 * sizes - 1)

    return Judge("lengths", "en", ("joy",), True, "nothing", judge)


TEXTS = ["x" * n for n in range(1, 61)]
LABELS = [("joy",) if n % 3 == 0 or n > 45 else () for n in range(1, 61)]


def test_figures_are_the_aurocs_of_the_emotions_that_the_judge_knows() -> None:
    (figure,) = quality(lengths(), TEXTS, LABELS, on="xs")
    expected = auroc(np.arange(60.0), np.array([bool(one) for one in LABELS]))
    assert (figure.measure, figure.on, figure.auroc) == ("joy", "xs", round(expected, 4))
    assert (figure.n_positive, figure.n) == (sum(map(bool, LABELS)), 60)


def test_valence_leaves_out_what_is_neither() -> None:
    valence = [1] * 20 + [0] * 20 + [-1] * 20
    _, figure = quality(lengths(), TEXTS, LABELS, valence=valence)
    assert (figure.measure, figure.auroc, figure.n_positive, figure.n) == ("valence", 0.0, 20, 40)


def test_profane_texts_can_be_left_out() -> None:
    texts = [f"{text} damn" if n < 20 else text for n, text in enumerate(TEXTS)]
    (figure,) = quality(lengths(), texts, LABELS, profanity_free=True)
    assert figure.n == 40


def test_whole_prompts_are_resampled() -> None:
    alone = quality(lengths(), TEXTS, LABELS)[0]
    grouped = quality(lengths(), TEXTS, LABELS, groups=[n // 10 for n in range(60)])[0]
    assert alone.auroc == grouped.auroc and (alone.low, alone.high) != (grouped.low, grouped.high)


def test_too_few_positives_are_counted_and_not_stated() -> None:
    (figure,) = quality(lengths(), TEXTS, [("joy",)] * 9 + [()] * 51)
    assert figure.auroc is None and figure.n_positive == 9


def test_unequal_lengths_and_empty_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="60 texts, 59 label sets"):
        quality(lengths(), TEXTS, LABELS[:-1])
    with pytest.raises(ValueError, match="60 texts, but 1 groups"):
        quality(lengths(), TEXTS, LABELS, groups=[1])
    with pytest.raises(ValueError, match="text 3 is ''"):
        quality(lengths(), [*TEXTS[:3], "", *TEXTS[4:]], LABELS)


def test_the_labelled_generations_are_240_of_four_conditions_with_labels_that_are_described() -> None:
    rows = labelled_generations()
    assert len(rows) == 240 == len({row.id for row in rows}) and all(row.text.strip() for row in rows)
    assert Counter(row.condition["towards"] for row in rows) == {None: 60, "anger": 60, "joy": 60, "sadness": 60}
    assert {label for row in rows for label in row.labels} == set(EMOTIONS)
    assert {row.valence for row in rows} == {-1, 0, 1} and all(len(row.labels) <= 2 for row in rows)
    facts = generations_facts()
    assert "One large language model" in facts["labelled_by"] and "not people" in facts["labelled_by"]


def test_vader_is_judged_on_the_generations_too() -> None:
    (figure,) = generation_quality(vader_judge(), resamples=100)
    signs = [row.valence for row in labelled_generations()]
    assert (figure.n_positive, figure.n) == (signs.count(1), 240 - signs.count(0))
    assert figure.auroc is not None and figure.auroc > 0.8


def test_the_table_has_every_judge_and_says_why_one_has_no_figures_on_generations() -> None:
    def load(name: str) -> Judge:
        if name == "xed-sentences":
            raise ImportError("the sentence judge needs the extra judges")
        return load_judge(name)

    table = quality_table(load=load, resamples=20)
    of_name = {one.judge: one for one in table.judges}
    assert "needs the extra judges" in of_name["xed-sentences"].note and of_name["xed-sentences"].figures
    assert of_name["kote-characters"].note == "the labelled generations are English"
    on = Counter(figure.on for figure in of_name["xed-words"].figures)
    assert on == {"XED, held out": 9, "EmoBank": 1, "generations": 7}
    surprise = [
        figure for figure in of_name["xed-words"].figures if (figure.measure, figure.on) == ("surprise", "generations")
    ]
    assert surprise[0].auroc is None and surprise[0].n_positive == 8
    shown = repr(table)
    assert (
        "vader" in shown
        and "8 of 240" in shown
        and "Of 240 generations 0 are profane" in shown
        and "not people" in shown
        and "needs the extra judges" in shown
    )
    assert len(table.to_pandas()) == sum(len(one.figures) for one in table.judges)
    assert table.to_dict()["judges"][0]["judge"] == "vader"
    assert "<table" in table._repr_html_() and "needs the extra judges" in table._repr_html_()
