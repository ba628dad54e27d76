"""Feature sets, thresholds, monitoring and the live monitor, on the tiny model whose features are planted."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EMOTIONS, JOY, make_sae
from planted_codes import codes_of
from scipy.stats import beta

from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.generation.decoding import Request
from sae_emotion_plugin.generation.streaming import stream
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import Intervention, SteeringPlan
from sae_emotion_plugin.monitoring.feature_sets import FeatureSet, emotion_sets, read_feature_sets, union
from sae_emotion_plugin.monitoring.monitor import Guard, LiveMonitor, live_monitor, monitor, on_token
from sae_emotion_plugin.monitoring.thresholds import (
    SetThreshold,
    Thresholds,
    binomial_rate,
    calibrate_monitor,
    conformal_threshold,
    pooled_risks,
)
from sae_emotion_plugin.sparse_codes import encode_texts

JOYFUL = FeatureSet("joy", (EMOTIONS["joy"],))
HOSTILE = FeatureSet("hostility", (EMOTIONS["anger"], EMOTIONS["sadness"]), (1.0, 0.5))


def neutral(n: int, seed: int, length: int = 6) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.choice(50, size=length, replace=False)) for _ in range(n)]


@pytest.fixture(scope="module")
def thresholds(bridge: Any, emotional_sae: Any) -> Thresholds:
    return calibrate_monitor(bridge, emotional_sae, [JOYFUL, HOSTILE], neutral(240, 0), progress=False)


@pytest.fixture(scope="module")
def watch(bridge: Any, emotional_sae: Any, thresholds: Thresholds) -> LiveMonitor:
    return live_monitor(bridge, emotional_sae, None, thresholds)


def row(name: str, features: tuple[int, ...], scales: tuple[float, ...], **own: Any) -> SetThreshold:
    nothing = dict.fromkeys(("text_rate", "text_low", "text_high", "token_rate", "token_low", "token_high"), 0.0)
    given = {"weights": (1.0,) * len(features), "text_threshold": 1.0, "token_threshold": 1.0, **own}
    return SetThreshold(name=name, features=features, scales=scales, **{**nothing, **given})


def ids_of(bridge: Any, text: str) -> list[int]:
    return bridge.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Token:
    token_id: int


def test_a_token_risk_is_the_weighted_sum_of_activations_in_units_of_each_scale() -> None:
    rng = np.random.default_rng(0)
    dense = np.maximum(rng.normal(size=(30, 5)), 0).astype(np.float32)
    rows = (row("a", (1, 3), (2.0, 0.5), weights=(1.0, -3.0)), row("b", (4,), (1.5,)))
    risks = Thresholds({"pooling": "max"}, rows).token_risks(codes_of(dense))
    for token in range(30):
        assert risks[token, 0] == pytest.approx(dense[token, 1] / 2 - 3 * dense[token, 3] / 0.5)
        assert risks[token, 1] == pytest.approx(dense[token, 4] / 1.5)


def test_a_text_risk_is_the_largest_or_the_mean_over_its_tokens() -> None:
    rng = np.random.default_rng(1)
    lengths = np.array([1, 4, 2, 7])
    risks = rng.normal(size=(14, 2))
    parts = np.split(risks, np.cumsum(lengths)[:-1])
    assert np.array_equal(pooled_risks(risks, lengths, "max"), [part.max(axis=0) for part in parts])
    np.testing.assert_allclose(pooled_risks(risks, lengths, "mean"), [part.mean(axis=0) for part in parts])
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        pooled_risks(risks, np.array([7, 0, 7]), "max")


@pytest.mark.parametrize(("n", "rate"), [(100, 0.05), (99, 0.05), (199, 0.01), (20, 0.5), (333, 0.031)])
def test_the_threshold_leaves_as_many_above_it_as_the_conformal_rule_says(n: int, rate: float) -> None:
    risks = np.random.default_rng(n).permutation(n).astype(np.float64)
    threshold = conformal_threshold(risks, rate)
    k = next(k for k in range(1, n + 1) if k >= (n + 1) * (1 - rate) - 1e-9)
    assert threshold == sorted(risks)[k - 1]
    # A new risk falls into each of the n + 1 gaps alike: at most `rate` of these lie above.
    assert (n + 1 - k) / (n + 1) <= rate + 1e-12


def test_new_texts_are_flagged_at_the_rate_that_was_asked_for() -> None:
    rng = np.random.default_rng(3)
    flagged = [
        float((rng.gamma(2, size=50) > conformal_threshold(rng.gamma(2, size=100), 0.1)).mean()) for _ in range(400)
    ]
    # 101 gaps, of which floor(10.1) = 10 lie above.
    assert np.mean(flagged) == pytest.approx(10 / 101, abs=0.008)


def test_ties_and_silent_sets_make_fewer_alarms_and_not_more() -> None:
    risks = np.array([0.0] * 95 + [1.0] * 5)
    assert conformal_threshold(risks, 0.05) == 1.0
    assert conformal_threshold(np.zeros(100), 0.05) == 0.0
    with pytest.raises(ValueError, match="at least 19 values, got 18"):
        conformal_threshold(np.zeros(18), 0.05)


@pytest.mark.parametrize(("n", "of"), [(0, 40), (3, 50), (50, 50)])
def test_the_interval_of_a_rate_is_clopper_and_pearsons(n: int, of: int) -> None:
    found = binomial_rate(n, of)
    low = 0.0 if n == 0 else float(beta.ppf(0.025, n, of - n + 1))
    high = 1.0 if n == of else float(beta.ppf(0.975, n + 1, of - n))
    assert (found.rate, found.low, found.high) == pytest.approx((n / of, low, high))


def test_calibrated_sets_fire_on_their_emotion_and_seldom_on_neutral_texts(
    bridge: Any, emotional_sae: Any, thresholds: Thresholds
) -> None:
    codes = encode_texts(bridge, emotional_sae, neutral(300, 9), progress=False)
    for name, rate in thresholds.false_positives(codes).items():
        assert rate.low <= 0.05 <= rate.high or rate.rate < 0.05, name
    emotional = [f"{text} {word}" for text in neutral(20, 4, 4) for word in ("joy", "anger")]
    found = monitor(bridge, emotional_sae, emotional, None, thresholds)
    joyful = [("joy" in found.fired(text)) for text in range(40)]
    hostile = [("hostility" in found.fired(text)) for text in range(40)]
    assert np.mean(joyful[::2]) > 0.9 > 0.2 > np.mean(joyful[1::2])
    assert np.mean(hostile[1::2]) > 0.9 > 0.2 > np.mean(hostile[::2])
    peaks = [one.peak_token for one in found.rows if one.set == "joy"][::2]
    assert peaks.count("joy") > 18


def test_calibration_is_a_slow_loop_over_the_same_half_of_the_texts(bridge: Any, emotional_sae: Any) -> None:
    texts = neutral(240, 5)
    texts[10] = texts[11]
    found = calibrate_monitor(bridge, emotional_sae, [HOSTILE], texts, pooling="mean", seed=3, progress=False)
    codes = encode_texts(bridge, emotional_sae, texts, progress=False)
    matrices = [codes.matrix()[codes.text_index == text].toarray() for text in range(len(texts))]
    n = found.meta["n_texts"]
    assert n["calibration"] + n["check"] == 240 and abs(n["check"] - 120) <= 2
    (one,) = found.rows

    def risks(matrix: np.ndarray) -> np.ndarray:
        return np.sum(
            [w * matrix[:, f] / s for f, w, s in zip(one.features, one.weights, one.scales, strict=True)], axis=0
        )

    means = np.array([risks(matrix).mean() for matrix in matrices])
    # Which half calibrated is not told, but the threshold is one of its risks, and its rank among all is near the 95th.
    assert np.isclose(means, one.text_threshold, atol=1e-5).any()
    above = means > one.text_threshold + 1e-6
    n_above = math.floor((n["calibration"] + 1) * 0.05) - 1
    assert above.sum() == n_above + round(one.text_rate * n["check"])


def test_scales_are_the_usual_activations_and_a_silent_feature_has_that_of_all(bridge: Any, emotional_sae: Any) -> None:
    texts = neutral(240, 6)
    dense = encode_texts(bridge, emotional_sae, texts, progress=False).matrix().toarray()
    silent = [int(f) for f in np.flatnonzero(~dense.any(axis=0))]
    busy = int(np.argmax((dense > 0).sum(axis=0)))
    sets = [FeatureSet("busy", (busy,)), *(FeatureSet("silent", (f,)) for f in silent[:1])]
    found = calibrate_monitor(bridge, emotional_sae, sets, texts, progress=False)
    # Half of the texts: near, not equal.
    assert found.of("busy").scales[0] == pytest.approx(dense[:, busy][dense[:, busy] > 0].mean(), rel=0.1)
    if silent:
        assert found.of("silent").scales[0] == pytest.approx(dense[dense > 0].mean(), rel=0.1)
        assert (found.of("silent").text_threshold, found.of("silent").text_rate) == (0.0, 0.0)
        assert 0 < found.of("silent").token_high < 0.1


def test_documents_and_near_duplicates_stay_on_one_side(bridge: Any, emotional_sae: Any) -> None:
    texts = neutral(30, 7) * 8
    with pytest.raises(ValueError, match="at least 2000 calibration texts, got 1"):
        calibrate_monitor(bridge, emotional_sae, [JOYFUL], texts, false_positive_rate=0.0025, progress=False)
    found = calibrate_monitor(bridge, emotional_sae, [JOYFUL], texts, progress=False)
    assert found.meta["n_texts"]["check"] % 8 == 0
    grouped = calibrate_monitor(
        bridge, emotional_sae, [JOYFUL], neutral(240, 8), groups=[n // 80 for n in range(240)], progress=False
    )
    assert grouped.meta["n_texts"]["check"] in (80, 160)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sets": []}, "no feature sets"),
        ({"sets": [JOYFUL, JOYFUL]}, "'joy' stands twice"),
        ({"sets": [FeatureSet("far", (3, 64))]}, r"no feature 64 of the set 'far' \(valid: 0 to 63\)"),
        ({"neutral_texts": ["fine", " "]}, "text 1: the text is empty"),
        ({"neutral_texts": []}, "at least one string"),
        ({"neutral_texts": "one string"}, "must be a list"),
        ({"neutral_texts": neutral(198, 0)}, "0.05 needs at least 100 calibration texts, got 99"),
        ({"false_positive_rate": 0.01}, "0.01 needs at least 500 calibration texts, got 120"),
        ({"token_false_positive_rate": 0.001}, "0.001 needs at least 5000 calibration tokens, got 720"),
        ({"false_positive_rate": 0.0}, "false_positive_rate is 0.0"),
        ({"token_false_positive_rate": 0.7}, "token_false_positive_rate is 0.7"),
        ({"pooling": "sum"}, "sum"),
        ({"groups": [1, 2]}, "240 values, but 2 groups"),
    ],
)
def test_a_calibration_that_would_mean_nothing_is_refused(
    bridge: Any, emotional_sae: Any, options: dict[str, Any], named: str
) -> None:
    given: dict[str, Any] = {"sets": [JOYFUL], "neutral_texts": neutral(240, 0), "progress": False, **options}
    sets, texts = given.pop("sets"), given.pop("neutral_texts")
    if options == {"pooling": "sum"}:  # beartype refuses the literal before we do
        with pytest.raises(Exception, match=named):
            calibrate_monitor(bridge, emotional_sae, sets, texts, **given)
        return
    with pytest.raises(ValueError, match=named):
        calibrate_monitor(bridge, emotional_sae, sets, texts, **given)


def test_thresholds_come_back_from_their_file_and_flag_the_same(
    bridge: Any, emotional_sae: Any, thresholds: Thresholds, tmp_path: Path
) -> None:
    read = Thresholds.load(thresholds.save(tmp_path / "thresholds.json"))
    assert read == thresholds
    texts = ["he is such a joy", "w1 w2 anger"]
    assert monitor(bridge, emotional_sae, texts, None, read) == monitor(bridge, emotional_sae, texts, None, thresholds)
    assert "joy" in repr(read) and "false positives" in repr(read)
    assert list(read.to_pandas()["name"]) == ["joy", "hostility"]
    for content in ("[]", "{", '{"meta": {}, "rows": []}', '{"meta": {"pooling": "max"}, "rows": [{"name": 1}]}'):
        (tmp_path / "broken.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"broken.json holds no thresholds"):
            Thresholds.load(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError):
        Thresholds.load(tmp_path / "absent.json")


def test_thresholds_of_another_dictionary_or_model_are_refused(
    bridge: Any, learned_positions: Any, emotional_sae: Any, thresholds: Thresholds
) -> None:
    with pytest.raises(ValueError, match="calibrated with the dictionary"):
        monitor(bridge, make_sae(), "he is", None, thresholds)
    with pytest.raises(ValueError, match="calibrated with the model"):
        live_monitor(learned_positions, emotional_sae, None, thresholds)


def test_an_unknown_set_and_one_of_other_features_are_refused(
    bridge: Any, emotional_sae: Any, thresholds: Thresholds
) -> None:
    with pytest.raises(ValueError, match=r"'envy' \(valid: joy, hostility\)"):
        monitor(bridge, emotional_sae, "he is", ["envy"], thresholds)
    with pytest.raises(ValueError, match="'joy' has other features"):
        monitor(bridge, emotional_sae, "he is", [FeatureSet("joy", (3,))], thresholds)
    with pytest.raises(ValueError, match="at least one set"):
        monitor(bridge, emotional_sae, "he is", [], thresholds)
    with pytest.raises(ValueError, match="text 0: the text is empty"):
        monitor(bridge, emotional_sae, "", None, thresholds)


def test_several_texts_at_once_are_the_texts_one_by_one(
    bridge: Any, emotional_sae: Any, thresholds: Thresholds
) -> None:
    texts = ["he is such a joy", "w3", *neutral(6, 2, 9), "anger sad anger"]
    together = monitor(bridge, emotional_sae, texts, [HOSTILE, "joy"], thresholds)
    assert together.meta["sets"] == ["hostility", "joy"] and together.meta["n_longer"] == 6
    assert "6 are longer" in repr(together)
    for place, text in enumerate(texts):
        alone = monitor(bridge, emotional_sae, text, [HOSTILE, JOYFUL], thresholds)
        ours = [one for one in together.rows if one.text == place]
        assert together.tokens[place] == alone.tokens[0] == tuple(text.split())
        np.testing.assert_allclose(together.token_risks[place], alone.token_risks[0], atol=1e-4)
        for one, other in zip(ours, alone.rows, strict=True):
            assert (one.set, one.peak, one.fires) == (other.set, other.peak, other.fires)
            assert one.risk == pytest.approx(other.risk, abs=1e-4)
            assert one.risk == pytest.approx(
                together.token_risks[place].max(axis=0)[[*together.meta["sets"]].index(one.set)]
            )


def test_a_monitoring_is_shown_and_kept_with_tokens_escaped(
    bridge: Any, emotional_sae: Any, thresholds: Thresholds
) -> None:
    found = monitor(bridge, emotional_sae, "he is joy", None, thresholds)
    assert found.fired() == ("joy",)
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert kept["texts"][0]["tokens"] == ["he", "is", "joy"]
    assert kept["texts"][0]["risks"]["joy"] == found.token_risks[0][:, 0].tolist()
    hostile = replace(found, tokens=(("he", "is", "<script>"),))
    page = hostile._repr_html_()
    assert "<mark" in page and "&lt;script&gt;" in page and "<script>" not in page
    assert "yes" in repr(found)


def test_the_live_monitor_reads_what_the_monitor_reads(
    bridge: Any, emotional_sae: Any, thresholds: Thresholds, watch: LiveMonitor
) -> None:
    long = " ".join(neutral(9, 11, 9)) + " anger"  # beyond one context of 32 tokens
    for text in ("he is such a joy", "w3", long):
        risks = watch(ids_of(bridge, text))
        found = monitor(bridge, emotional_sae, text, None, thresholds)
        assert list(risks.values()) == pytest.approx([one.risk for one in found.rows], abs=1e-4)
        assert watch.above(risks) == found.fired()


def test_the_live_monitor_reads_the_unsteered_model_even_from_within_steering(model: Any, planted_sae: Any) -> None:
    limits = calibrate_monitor(model, planted_sae, [FeatureSet("joy", (JOY,))], neutral(220, 0), progress=False)
    watch = live_monitor(model, planted_sae, ["joy"], limits)
    ids = ids_of(model, "he is such a w4")
    plain = watch(ids)
    (expected,) = monitor(model, planted_sae, "he is such a w4", None, limits).rows
    assert plain["joy"] == pytest.approx(expected.risk, abs=1e-4)
    plan = SteeringPlan(planted_sae.cfg.metadata.hook_name, (Intervention(JOY, 50.0),), unit="raw")
    unsteered = model("he is such a")
    with steering(model, planted_sae, plan):
        steered = model("he is such a")
        assert watch(ids) == plain
        assert (model("he is such a") == steered).all(), "the steering is as it was"
        assert monitor(model, planted_sae, "he is such a w4", None, limits).rows[0].risk > plain["joy"] + 1
    assert (steered != unsteered).any()
    assert (model("he is such a") == unsteered).all()


def test_a_prompt_is_context_and_does_not_fire_itself(bridge: Any, watch: LiveMonitor) -> None:
    ids = ids_of(bridge, "joy joy w1 w2")
    assert watch(ids)["joy"] > watch(ids, context=2)["joy"]
    guard = on_token(watch, "stop", prompt="joy joy")
    assert guard(Token(ids_of(bridge, "w1")[0])) is None
    assert guard.risks == [watch(ids[:3], context=2)]


def test_a_guard_stops_at_the_first_token_that_fires_and_tells_why(bridge: Any, watch: LiveMonitor) -> None:
    guard = on_token(watch, "stop", prompt="he is")
    assert isinstance(guard, Guard)
    actions = [guard(Token(token)) for token in ids_of(bridge, "w1 w2 joy w3")]
    assert actions == [None, None, "stop", None] and guard.fired == ("joy",)
    risks = [one["joy"] for one in guard.risks]
    assert risks == sorted(risks) and len(risks) == 4


def test_a_guard_hands_over_its_plan_once(bridge: Any, watch: LiveMonitor, emotional_sae: Any) -> None:
    calm = SteeringPlan.of({EMOTIONS["anger"]: -1.0}, emotional_sae, unit="raw")
    guard = on_token(watch, calm)
    assert [guard(Token(token)) for token in ids_of(bridge, "w1 anger anger")] == [None, calm, None]


def test_a_guard_may_look_at_every_second_token_only(bridge: Any, watch: LiveMonitor) -> None:
    guard = on_token(watch, "stop", every=2)
    assert [guard(Token(token)) for token in ids_of(bridge, "joy w1 w2 w3")] == [None, "stop", None, None]
    assert len(guard.risks) == 2
    with pytest.raises(ValueError, match="every is 0"):
        on_token(watch, "stop", every=0)


def test_what_cannot_be_watched_is_refused(watch: LiveMonitor) -> None:
    with pytest.raises(ValueError, match="no tokens to watch"):
        watch([])
    with pytest.raises(ValueError, match="the first 2 are context"):
        watch([5, 6], context=2)
    with pytest.raises(ValueError, match="no token 640"):
        watch([5, 640])


SCORES = FeatureScores(
    {},
    tuple(
        FeatureScore(emotion, feature, 0.9, 0.8, 0.01, 0.02, 0.5, 0.1)
        for emotion, feature in (("joy", 3), ("joy", 4), ("anger", 4), ("anger", 9))
    ),
)


def test_sets_come_from_scores_and_join() -> None:
    joy, anger = emotion_sets(SCORES)
    assert joy == FeatureSet("joy", (3, 4)) and emotion_sets(SCORES, emotions=["anger"], top=1)[0].features == (4,)
    both = union("both", [joy, replace(anger, weights=(2.0, 0.5))])
    assert (both.features, both.weights) == ((3, 4, 9), (1.0, 2.0, 0.5))
    with pytest.raises(ValueError, match="'envy'"):
        emotion_sets(SCORES, emotions=["envy"])


def test_the_users_own_sets_are_json(tmp_path: Path) -> None:
    path = tmp_path / "sets.json"
    path.write_text('{"plain": [1, 2], "weighted": {"3": 1, "5": -0.5}}', encoding="utf-8")
    assert read_feature_sets(path) == (FeatureSet("plain", (1, 2)), FeatureSet("weighted", (3, 5), (1.0, -0.5)))
    for content, named in (
        ("[1]", "an object of sets"),
        ("{}", "an object of sets"),
        ('{"a": [1.5]}', "'a' must be a list"),
        ('{"a": {"x": 1}}', "x"),
        ('{"a": {"1": "x"}}', "no number"),
        ('{"a": []}', "'a' has no features"),
        ('{"a": [1, 1]}', "feature 1 of the set 'a' stands twice"),
        ('{"a": [-1]}', "is negative"),
        ('{"a": {"1": 0}}', "not all 0"),
        ('{"a": {"1": NaN}}', "must be finite"),
        ("{", "holds no feature sets"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=named):
            read_feature_sets(path)
    with pytest.raises(ValueError, match="2 features, but 1 weights"):
        FeatureSet("a", (1, 2), (1.0,))
    with pytest.raises(ValueError, match="needs a name"):
        FeatureSet(" ", (1,))


def test_a_guard_ends_a_stream_where_its_set_fires(bridge: Any, watch: LiveMonitor, emotional_sae: Any) -> None:
    shortened = 0
    for seed in range(12):
        request = Request("he is", None, 3.0, seed)
        whole = list(stream(bridge, emotional_sae, request, max_new_tokens=8))
        guard = on_token(watch, "stop", prompt=request.prompt)
        fires = [guard(token) == "stop" for token in whole]
        shown = list(
            stream(
                *(bridge, emotional_sae, request),
                max_new_tokens=8,
                on_token=on_token(watch, "stop", prompt=request.prompt),
            )
        )
        assert len(shown) == (fires.index(True) + 1 if any(fires) else len(whole))
        assert [one.token_id for one in shown] == [one.token_id for one in whole[: len(shown)]]
        shortened += len(shown) < len(whole)
    assert 0 < shortened < 12
