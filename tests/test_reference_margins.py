import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_codes import codes_of
from scipy.stats import mannwhitneyu

from sae_emotion_plugin.discovery.reference_margins import ReferenceMargin, ReferenceMargins, reference_margins
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.auroc_intervals import compare_aurocs

EMOTIONS = ("fear", "joy")


def texts_of(emotions: Sequence[tuple[str, ...]], seed: int) -> LabelledTexts:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=20)) for _ in emotions]
    return LabelledTexts(tuple(words), tuple(emotions), tuple(f"{seed}-{n}" for n in range(len(emotions))))


def dictionary(labels: np.ndarray, effect: float, seed: int) -> np.ndarray:
    """Five features; 1 reads fear and 3 reads joy as clearly as `effect` says; rectified, so that zeros tie."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(labels), 5))
    values[:, 1] += effect * labels[:, 0]
    values[:, 3] += effect * labels[:, 1]
    return np.maximum(values, 0)


def study(n: int = 400, **effects: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, seed in (("train", 1), ("held_out", 2)):
        labels = np.random.default_rng(seed).random((n, 2)) < 0.3
        emotions = [tuple(name for name, on in zip(EMOTIONS, row, strict=True) if on) for row in labels]
        found[part] = texts_of(emotions, seed)
        found[part + "_labels"] = labels
        found[part + "_codes"] = {
            name: codes_of(dictionary(labels, effect, 10 * seed + number))
            for number, (name, effect) in enumerate(effects.items())
        }
    return found


def margins_of(made: dict[str, Any], **options: Any) -> ReferenceMargins:
    options = {"resamples": 300, **options}
    return reference_margins(made["train_codes"], made["held_out_codes"], made["train"], made["held_out"], **options)


def test_the_margin_is_the_difference_of_the_held_out_aurocs_of_the_features_that_training_texts_choose() -> None:
    made = study(trained=2.0, weak=0.7)
    margins = margins_of(made)
    labels = made["held_out_labels"]
    assert margins.references == ("weak",) and [row.emotion for row in margins.rows] == ["mean", "fear", "joy"]
    expected = []
    for column, (emotion, feature) in enumerate(zip(EMOTIONS, (1, 3), strict=True)):
        row = margins.of("weak", emotion)
        assert (row.feature, row.reference_feature) == (feature, feature)
        both = []
        for name in ("trained", "weak"):
            values = made["held_out_codes"][name].matrix().toarray()[:, feature]
            positive = labels[:, column]
            u = mannwhitneyu(values[positive], values[~positive]).statistic
            both.append(u / (positive.sum() * (~positive).sum()))
        assert (row.auroc, row.reference_auroc) == pytest.approx(tuple(both))
        assert row.margin == pytest.approx(both[0] - both[1]) and row.low < row.margin < row.high
        expected.append(both)
    mean = margins.of("weak")
    assert (mean.auroc, mean.reference_auroc) == pytest.approx(tuple(np.mean(expected, axis=0)))
    assert mean.margin == pytest.approx(mean.auroc - mean.reference_auroc) and mean.low > 0
    assert mean.feature is None and mean.reference_feature is None
    assert margins.meta["n_groups"] == 400 and margins.meta["d_sae"] == {"trained": 5, "weak": 5}


def test_a_dictionary_has_no_margin_over_itself_and_a_better_reference_has_a_negative_one() -> None:
    made = study(trained=1.0, better=2.5)
    for part in ("train_codes", "held_out_codes"):
        made[part]["itself"] = made[part]["trained"]
    margins = margins_of(made)
    assert margins.references == ("better", "itself")
    for emotion in ("mean", *EMOTIONS):
        row = margins.of("itself", emotion)
        assert row.margin == row.low == row.high == 0
    assert margins.of("better").high < 0


def test_the_held_out_texts_choose_nothing() -> None:
    made = study(trained=2.0, weak=0.7)
    swapped = made["held_out_codes"]["trained"].matrix().toarray()[:, [0, 2, 1, 4, 3]]
    made["held_out_codes"]["trained"] = codes_of(swapped)
    row = margins_of(made).of("weak", "joy")
    assert row.feature == 3 and row.auroc < 0.6


def test_the_intervals_are_those_of_the_paired_comparison_of_the_best_features() -> None:
    made = study(trained=2.0, weak=0.7)
    margins = margins_of(made)
    ours, theirs = (made["held_out_codes"][name].matrix().toarray()[:, [1, 3]] for name in ("trained", "weak"))
    options = {"margin": 0.0, "groups": np.arange(400), "resamples": 300, "seed": 0}
    mean = compare_aurocs(ours, theirs, made["held_out_labels"], **options)
    joy = compare_aurocs(ours[:, 1], theirs[:, 1], made["held_out_labels"][:, 1], **options)
    for row, expected in ((margins.of("weak"), mean), (margins.of("weak", "joy"), joy)):
        assert (row.margin, row.low, row.high) == (expected.difference, expected.low, expected.high)


def test_copies_of_texts_widen_nothing_when_they_are_one_group_and_narrow_when_not() -> None:
    made = study(200, trained=1.2, weak=0.8)
    once = margins_of(made, resamples=1000).of("weak")
    held_out = made["held_out"]
    documents = np.tile(np.arange(200), 3)
    copies = np.tile(np.arange(200), 3)
    made["held_out"] = texts_of([held_out.emotions[n] for n in copies], 9)
    made["held_out_codes"] = {name: codes.select_texts(copies) for name, codes in made["held_out_codes"].items()}
    grouped = margins_of(made, groups=[f"document {n}" for n in documents], resamples=1000).of("weak")
    apart = margins_of(made, resamples=1000).of("weak")
    assert grouped.margin == pytest.approx(once.margin) and apart.margin == pytest.approx(once.margin)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.15)
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


def test_near_duplicates_are_one_group_by_default() -> None:
    made = study(trained=2.0, weak=0.7)
    held_out = made["held_out"]
    doubled = (held_out.texts[0], held_out.texts[0] + "!", *held_out.texts[2:])
    made["held_out"] = LabelledTexts(doubled, held_out.emotions, held_out.ids)
    assert margins_of(made).meta["n_groups"] == 399


def test_the_interval_depends_on_the_seed_and_the_level_alone() -> None:
    made = study(trained=1.5, weak=0.7)
    assert margins_of(made) == margins_of(made) and margins_of(made, seed=1) != margins_of(made)
    wide, narrow = margins_of(made).of("weak"), margins_of(made, level=0.5).of("weak")
    assert narrow.high - narrow.low < wide.high - wide.low and narrow.margin == wide.margin


def test_too_few_groups_are_refused_by_the_emotions_name() -> None:
    made = study(400, trained=1.0, weak=0.5)
    first_joy = np.flatnonzero(made["held_out_labels"][:, 1])
    documents = np.arange(400)
    documents[first_joy] = documents[first_joy] % 19
    with pytest.raises(ValueError, match=r"too few groups of held-out texts for joy \(19 in, \d+ out\): at least 20"):
        margins_of(made, groups=documents)
    assert margins_of(made, groups=documents, emotions=["fear"]).of("weak", "fear").margin > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained": "ours"}, r"no codes named 'ours' \(valid: trained, weak\)"),
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"groups": ["one"]}, "400 held-out texts, but 1 groups"),
        ({"emotions": ["awe"]}, "unknown emotions: awe; the texts have: fear, joy"),
    ],
)
def test_bad_options_are_refused_with_the_valid_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        margins_of(study(trained=1.0, weak=0.5), **options)


def test_names_that_differ_and_a_lone_dictionary_are_refused() -> None:
    made = study(trained=1.0, weak=0.5)
    held_out = made["held_out_codes"]
    made["held_out_codes"] = {"trained": held_out["trained"]}
    with pytest.raises(ValueError, match="the held-out codes are of trained, the others of trained, weak"):
        margins_of(made)
    made["train_codes"] = {"trained": made["train_codes"]["trained"]}
    with pytest.raises(ValueError, match="no reference beside 'trained'"):
        margins_of(made)


MADE_UP = ReferenceMargins(
    {"level": 0.95, "n_groups": 12},
    (
        ReferenceMargin("frozen <decoder>", "mean", 0.8, 0.7, 0.1, 0.05, 0.15, None, None),
        ReferenceMargin("frozen <decoder>", "joy", 0.9, 0.95, -0.05, -0.1, 0.0, 3, 4),
    ),
)


def test_the_table_says_that_references_are_no_empty_nulls() -> None:
    shown = repr(MADE_UP)
    assert (
        "References are no empty nulls: they can read emotion too" in shown and "12 groups of held-out texts" in shown
    )
    assert "frozen <decoder>  mean     0.800    0.700      +0.100 [+0.050, +0.150]" in shown
    page = MADE_UP._repr_html_()
    assert "frozen &lt;decoder&gt;" in page and "<td>-0.050 [-0.100, +0.000]</td>" in page
    with pytest.raises(ValueError, match=r"no margin over 'x' for 'mean' \(valid: frozen <decoder>; mean, joy\)"):
        MADE_UP.of("x")


def test_margins_are_written_as_json_and_listed_as_a_frame(tmp_path: Path) -> None:
    path = MADE_UP.save(tmp_path / "margins.json")
    read = json.loads(path.read_text())
    assert read == MADE_UP.to_dict()
    assert ReferenceMargins(read["meta"], tuple(ReferenceMargin(**row) for row in read["rows"])) == MADE_UP
    frame = MADE_UP.to_pandas()
    assert frame.emotion.tolist() == ["mean", "joy"] and frame.margin.tolist() == [0.1, -0.05]
    with pytest.raises(FileNotFoundError):
        MADE_UP.save(tmp_path / "absent" / "margins.json")
