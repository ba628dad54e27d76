"""The discovery page: what is said of the features, what is escaped, what is left out and named."""

import math
import random
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import HOSTILE, LENS, Page, highlighted_texts

from sae_emotion_plugin.discovery.absorption import Absorber, Absorption, AbsorptionRow
from sae_emotion_plugin.discovery.layer_scan import LayerScan, LayerScore
from sae_emotion_plugin.discovery.method_table import MethodDifference, MethodScore, MethodTable
from sae_emotion_plugin.discovery.probe_losses import LatentProbe, LatentProbes
from sae_emotion_plugin.discovery.rating_correlations import RatingCorrelation, RatingCorrelations
from sae_emotion_plugin.discovery.reference_margins import ReferenceMargin, ReferenceMargins
from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.discovery.specificity import Specificity, SpecificityRow
from sae_emotion_plugin.discovery.transfer import TransferRow, TransferTable
from sae_emotion_plugin.evidence.calibration import TAIL_THRESHOLDS, Calibration, Tail
from sae_emotion_plugin.evidence.roc import roc_points
from sae_emotion_plugin.feature_roles.steering_ranks import SteeringRank, SteeringRanks
from sae_emotion_plugin.pages.discovery import emotions_of, render, write_discovery_page
from sae_emotion_plugin.pages.discovery_charts import RocCurve
from sae_emotion_plugin.pages.discovery_content import PARTS, DiscoveryContent
from sae_emotion_plugin.pages.discovery_summary import difference_between, facts, headline, method_name, verdict
from sae_emotion_plugin.pages.report_content import HighlightedText, ScoreDistribution
from sae_emotion_plugin.text_lens import LogitLens

EMOTIONS = (
    *("anger", "joy", "sadness", "fear", "love", "surprise", "disgust", "gratitude", "amusement", "admiration"),
    *("curiosity", "annoyance"),
)
METHODS = {
    "latent": 0.811, "latents-2": 0.842, "latents-5": 0.871, "latents-16": 0.893, "difference-of-means": 0.849,
    "difference-of-means-raw": 0.702, "dense-probe": 0.901, "bag-of-words": 0.862, "neuron": 0.712,
}  # fmt: skip
MARGIN = 0.02


def score(emotion: str, feature: int, auroc: float, **changes: Any) -> FeatureScore:
    row = FeatureScore(
        emotion, feature, auroc, auroc - 0.02, 1e-9, 1e-7, 0.62, 0.071, tuple(LENS.get(emotion, LENS["joy"])[0]),
        (" calm", " the"), 1e-5, 0.41, 0.38, 2.1, 0.2, 3.4, 0.47, 0.44,
    )  # fmt: skip
    return replace(row, **changes)


def fake_scores(chance: random.Random) -> FeatureScores:
    rows = []
    for emotion in EMOTIONS:
        best = chance.uniform(0.7, 0.93)
        for rank in range(6):
            auroc = best - 0.02 * rank
            q_above = 1e-4 if auroc > 0.7 else 0.2
            rows.append(score(emotion, chance.randrange(131_072), auroc, q_above=q_above))
    return FeatureScores({"hook_name": "blocks.9.hook_resid_post", "pooling": "max"}, tuple(rows))


def difference(first: str, second: str, emotion: str, value: float, half: float) -> MethodDifference:
    low, high = value - half, value + half
    return MethodDifference(first, second, emotion, value, low, high, MARGIN, low > -MARGIN)


def fake_methods(chance: random.Random) -> MethodTable:
    scores, differences = [], []
    for emotion in ("mean", *EMOTIONS):
        half = 0.006 if emotion == "mean" else 0.025
        own = {m: v + (0 if emotion == "mean" else chance.uniform(-0.07, 0.07)) for m, v in METHODS.items()}
        scores += [MethodScore(m, emotion, v, v - half, v + half, "pooling mean, C 0.1") for m, v in own.items()]
        for first, second in (
            ("latent", "difference-of-means"),
            ("latent", "dense-probe"),
            ("latents-16", "dense-probe"),
        ):
            differences.append(difference(first, second, emotion, own[first] - own[second], half * 1.1))
    return MethodTable({"level": 0.95, "seed": 0}, tuple(scores), tuple(differences))


def fake_rocs() -> list[RocCurve]:
    rng = np.random.default_rng(0)
    curves = []
    for emotion in EMOTIONS:
        positives = rng.random(3_000) < 0.08
        for method, shift in (("latent", 1.2), ("difference-of-means", 1.5), ("dense-probe", 1.9), ("neuron", 0.7)):
            values = rng.normal(size=3_000) + shift * positives
            values = np.maximum(values - 1, 0) if method == "latent" else values
            inside, outside = values[positives], values[~positives]
            auroc = float(np.mean((inside[:, None] > outside) + (inside[:, None] == outside) / 2))
            curves.append(RocCurve(emotion, method, roc_points(values, positives), auroc))
    return curves


def fake_specificity(chance: random.Random) -> Specificity:
    n = len(EMOTIONS)
    matrix = np.clip(np.random.default_rng(1).normal(0.53, 0.08, (n, n)), 0.05, 0.9)
    matrix[np.arange(n), np.arange(n)] = [chance.uniform(0.7, 0.92) for _ in EMOTIONS]
    matrix[0, -1] = 0.79
    matrix[-1, 0] = 0.84
    rows = []
    for i, emotion in enumerate(EMOTIONS):
        others = [(matrix[i, j], j) for j in range(n) if j != i]
        rival_auroc, j = max(others)
        own = float(matrix[i, i])
        margin = own - float(rival_auroc)
        rows.append(SpecificityRow(
            emotion, 1000 + i, own, EMOTIONS[j], float(rival_auroc), margin, margin - 0.04, margin + 0.04,
            own - 0.05, None if i == 5 else own - 0.09, 12 if i == 5 else 340, own - 0.01, 4_100,
        ))  # fmt: skip
    return Specificity({"level": 0.95}, tuple(rows), matrix)


def fake_layers() -> LayerScan:
    rows = []
    for emotion in ("mean", *EMOTIONS[:5]):
        for pooling, top in (("mean", 0.9), ("last", 0.86)):
            for layer in range(18):
                probe = top - 0.0015 * (layer - 9) ** 2 + 0.01 * math.sin(layer + len(emotion))
                latent = probe - 0.09 if layer in (6, 9, 12) else None
                ends = probe - 0.012, probe + 0.012
                hook = f"blocks.{layer}.hook_resid_post"
                rows.append(LayerScore(layer, hook, pooling, emotion, probe, *ends, latent, 77 if latent else None))
    return LayerScan({"level": 0.95}, tuple(rows))


def fake_lens() -> LogitLens:
    tokens = ("<bos>", "he", " is", " such", " a", " 바보", "\n")
    layers = (0, 3, 6, 9, 12, 15, 17)
    words = [" nice", " fucking", " wonderful", " person", "嬉しい", " the", " extraordinarily"]
    top = tuple(tuple(words[(i * 3 + j) % len(words)] for j in range(len(tokens))) for i in range(len(layers)))
    probability = np.linspace(0.02, 0.95, len(layers))[:, None] * np.linspace(1, 0.4, len(tokens))
    return LogitLens("he is such a 바보\n", tokens, layers, top, probability, 5 - 4 * probability)


def fake_calibration(**changes: Any) -> Calibration:
    def tails(groups: list[str]) -> tuple[Tail, ...]:
        made = []
        for i, group in enumerate(groups):
            for threshold in TAIL_THRESHOLDS:
                expected = 2e5 * threshold
                made.append(Tail(group, threshold, 200_000, round(expected * (0.6 + 0.03 * i)), expected, 0.7))
        return tuple(made)

    found = Calibration(
        200, 0.05, 43_410, 12, 131_072, 61_204, 10, 7, 0.035, 0.014, 0.071,
        (0.097, 0.1, 0.099, 0.1, 0.1, 0.101, 0.1, 0.1, 0.101, 0.102), 0.004,
        tails(["1 to 1", "2 to 4", "10 to 19", "100 to 199", "5000 or more"]),
        tails([f"{e} (412)" for e in EMOTIONS]), 1,
    )  # fmt: skip
    return replace(found, **changes)


def fake_margins() -> ReferenceMargins:
    rows = []
    kinds = {"frozen-decoder": 0.021, "frozen-encoder": 0.034, "random-direction": 0.112, "shuffled-model": 0.004}
    for name, margin in kinds.items():
        rows.append(
            ReferenceMargin(name, "mean", 0.811, 0.811 - margin, margin, margin - 0.01, margin + 0.01, None, None)
        )
        rows += [
            ReferenceMargin(name, e, 0.8, 0.8 - margin, margin, margin - 0.03, margin + 0.03, 5, 9) for e in EMOTIONS
        ]
    return ReferenceMargins({"level": 0.95, "n_groups": 4000}, tuple(rows))


def fake_absorption() -> Absorption:
    rows = [
        AbsorptionRow(
            emotion, 100 + number, 0.7, 40, 0.85, 0.1 * number, 0.01, 0.5, 34, 0.08 * number, 0.02, 0.4, (1, 2),
            (Absorber(3000 + number, 0.9, 0.61, 0.03),) if number else (),
        )
        for number, emotion in enumerate(EMOTIONS[:3])
    ]  # fmt: skip
    silent = AbsorptionRow(EMOTIONS[3], 103, None, 0, None, None, None, None, 0, None, None, None, (), ())
    return Absorption({"precision": 0.8, "level": 0.95}, (*rows, silent))


def fake_probes() -> LatentProbes:
    rows = [LatentProbe(emotion, 200 + i, 0.21, 0.2234, 0.3, 0.2234 / 0.3) for i, emotion in enumerate(EMOTIONS)]
    return LatentProbes({"pooling": "max"}, tuple(rows))


def fake_ranks(scores: FeatureScores) -> SteeringRanks:
    rows = []
    for number, emotion in enumerate(EMOTIONS):
        best = scores.top(emotion, 6)
        order = list(range(6)) if number % 3 == 0 else [4, 0, 2, 1, 5, 3]
        for place, i in enumerate(order, start=1):
            causal = None if number == 3 else 0.6 - 0.17 * place
            row = best[i]
            rows.append(SteeringRank(
                emotion, row.feature, place, i + 1, row.auroc, row.held_out_auroc, causal, 0.01 * place, 0.1 * i - 0.2,
                0.4, row.promotes,
            ))  # fmt: skip
    meta = {"candidates": 6, "causal_amount": 0.05, "amount": 0.4, "n_prompts": 20}
    return SteeringRanks(meta, tuple(rows))


def fake_ratings() -> RatingCorrelations:
    rows = []
    for number, emotion in enumerate(EMOTIONS[:7]):
        for place, name in enumerate(("V", "A", "D")):
            value = (number - 3) * 0.06 * (1, 0.5, 0.1)[place]
            ends = value - 0.03, value + 0.03
            row = RatingCorrelation(emotion, 1000 + number, name, value * 0.8, *ends, value, *ends, 0.2)
            if (emotion, name) == (EMOTIONS[4], "D"):
                row = RatingCorrelation(emotion, 1000 + number, name, *(None,) * 6, fires=0.0)
            rows.append(row)
    return RatingCorrelations({"n_texts": 8062, "n_groups": 8000, "level": 0.95}, tuple(rows))


def fake_transfer() -> TransferTable:
    rows = []
    for number, emotion in enumerate(EMOTIONS[:4]):
        gap = 0.05 * number
        for subset in ("all", "keyword-free", "profanity-free"):
            row = TransferRow(
                emotion, (emotion,), subset, 1000 + number, 0.8, 0.7 - gap, 0.6, 0.8, 0.7, 77, gap, gap - 0.04,
                gap + 0.04, 1 + 60 * number, 300, 5000,
            )  # fmt: skip
            if (number, subset) == (2, "keyword-free"):
                row = replace(row, **dict.fromkeys(("auroc", "low", "high", "gap", "gap_low", "gap_high")))
            rows.append(row)
    return TransferTable({"level": 0.95, "n_texts": {"choosing": 5000, "scoring": 5300}}, tuple(rows))


def fake_content() -> DiscoveryContent:
    """A whole discovery's worth of made-up numbers; also what the page is looked at with."""
    chance = random.Random(0)
    scores = fake_scores(chance)
    activations = [
        ScoreDistribution(
            emotion, scores.top(emotion, 1)[0].feature,
            [0.0 if chance.random() < 0.3 else chance.gammavariate(5, 1.3) for _ in range(60)],
            [0.0 if chance.random() < 0.85 else chance.gammavariate(1.6, 1.4) for _ in range(300)],
        )
        for emotion in EMOTIONS[:6]
    ]  # fmt: skip
    return DiscoveryContent(
        title="Emotion features of Gemma 3 270M",
        meta={"model": "gemma-3-270m", "hook_name": "blocks.9.hook_resid_post", "seed": 0, "wall_time_s": 312.4},
        scores=scores,
        methods=fake_methods(chance),
        rocs=fake_rocs(),
        specificity=fake_specificity(chance),
        absorption=fake_absorption(),
        activations=activations,
        examples=highlighted_texts(),
        layers=fake_layers(),
        lens=fake_lens(),
        calibration=fake_calibration(),
        margins=fake_margins(),
        links={row.feature: f"https://www.neuronpedia.org/m/l/{row.feature}" for row in scores.rows},
        probes=fake_probes(),
        ranks=fake_ranks(scores),
        ratings=fake_ratings(),
        transfers={"xed_en/train.jsonl.gz": fake_transfer()},
    )


@pytest.fixture(scope="module")
def content() -> DiscoveryContent:
    return fake_content()


@pytest.fixture(scope="module")
def source(content: DiscoveryContent) -> str:
    return render(content)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def table(*differences: MethodDifference, **scores: float) -> MethodTable:
    rows = [MethodScore(m.replace("_", "-"), "mean", v, v - 0.01, v + 0.01, "") for m, v in scores.items()]
    return MethodTable({}, (*rows, MethodScore("latent", "joy", 0.8, 0.7, 0.9, "")), differences)


def hostile_content() -> DiscoveryContent:
    """Every string a caller can give is hostile, every number missing where it may be."""
    bad, nan = HOSTILE + "</text></svg></td></table>", math.nan
    own = score(bad, 1, nan, held_out_auroc=None, promotes=(bad, "", "\n"), suppresses=(bad,), q=nan, q_above=None)
    absorber = Absorber(1, nan, nan, nan)
    row = SpecificityRow(bad, 1, nan, bad, nan, nan, nan, nan, None, None, 0, nan, 0)
    layer = LayerScore(0, bad, bad, bad, nan, nan, nan, None, None)
    one = np.full((1, 1), nan)
    return DiscoveryContent(
        bad,
        {bad: bad, "versions": {bad: bad}, "wall_time_s": nan},
        FeatureScores({bad: bad}, (own, replace(own, promotes=(), suppresses=()))),
        MethodTable(
            {},
            (MethodScore(bad, "mean", nan, nan, nan, bad), MethodScore(bad, bad, nan, nan, nan, bad)),
            (
                MethodDifference(bad, bad, "mean", nan, nan, nan, nan, False),
                MethodDifference("latent" + bad, bad, "mean", nan, nan, nan, nan, False),
            ),
        ),
        [RocCurve(bad, bad, np.array([[0.0, 0.0], [1.0, 1.0]]), None)],
        Specificity({}, (row,), one),
        Absorption({}, (AbsorptionRow(bad, 1, nan, 1, nan, nan, nan, nan, 1, nan, nan, nan, (1,), (absorber,)),)),
        [ScoreDistribution(bad, 1, [nan], [])],
        [HighlightedText(bad, 1, bad, [bad, " ", ""], [1.0, nan, None])],
        LayerScan({}, (layer,)),
        LogitLens(bad, (bad,), (0,), ((bad,),), one, one),
        fake_calibration(by_label=(Tail(bad, 1e-2, 5, 5, 1.0, 1e-9),), fewest_honest=None, deciles=(0.0,) * 10),
        ReferenceMargins({}, (ReferenceMargin(bad, "mean", nan, nan, nan, nan, nan, None, None),)),
        {1: "javascript:alert(1)"},
        LatentProbes({}, (LatentProbe(bad, 1, nan, nan, nan, nan),)),
        SteeringRanks(
            {"candidates": bad, "causal_amount": nan, "amount": nan, "n_prompts": bad},
            (SteeringRank(bad, 1, 1, 2, nan, None, None, nan, nan, nan, (bad, "", "\n")),),
        ),
        RatingCorrelations({"n_texts": nan}, (RatingCorrelation(bad, 1, bad, nan, nan, nan, nan, nan, nan, nan),)),
        {bad: TransferTable({}, (TransferRow(bad, (bad,), "all", 1, nan, *(None,) * 9, n_in=0, n_out=0),))},
    )


def test_the_page_is_well_formed_and_loads_nothing(source: str, page: Page):
    assert source.startswith("<!doctype html>")
    assert not re.search(r"(src|srcset|poster|data)=|@import|url\(", source)
    assert not page.of("script") and "default-src 'none'" in source
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    inside = [attributes["href"] for attributes in page.of("a") if attributes["href"][0] == "#"]
    assert {target[1:] for target in inside} <= set(names) and len(inside) >= 16
    outside = [attributes for attributes in page.of("a") if attributes["href"][0] != "#"]
    assert outside and all(a["href"].startswith("https://www.neuronpedia.org/") for a in outside)
    assert all(a["rel"] == "noopener noreferrer" for a in outside)


def test_hostile_text_is_shown_and_never_becomes_markup():
    source = render(hostile_content())
    hostile = Page(source)
    assert not hostile.of("script") and not hostile.of("img")
    assert len(hostile.of("style")) == len(hostile.of("title")) - len(re.findall("<g><title>", source)) == 1
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)
    assert all(a["href"][0] == "#" for a in hostile.of("a"))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", source)
    assert hostile.prose.count("<script>alert(1)</script>") > 25
    assert not {"nan", "NaN", "None", "inf"} & set(hostile.prose.split())
    drawn = re.sub(r'(aria-label|title)="[^"]*"', "", source)
    assert not re.search(r'\s(x|y|d|cx|x1|width|style)="[^"]*(nan|inf)', drawn)


def test_all_svg_has_a_text_alternative_and_every_scrolling_box_takes_the_keyboard(page: Page):
    for attributes in page.of("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
    boxes = page.of("div", "scroll")
    assert boxes and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert {"img", "input", "button"}.isdisjoint(tag for tag, _ in page.tags)
    assert all(th.get("scope") for th in page.of("th"))


@pytest.mark.parametrize(
    ("value", "words"),
    [(-0.04, "loses to difference of means (0.85;"), (0.04, "beats difference of means (0.85;"),
     (0.004, "cannot be told apart from difference of means (0.85;")],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_the_headline_says_plainly_who_wins(value: float, words: str, turned: bool):
    first, second = ("difference-of-means", "latent") if turned else ("latent", "difference-of-means")
    row = difference(first, second, "mean", -value if turned else value, 0.01)
    methods = table(row, latent=0.85 + value, difference_of_means=0.85, dense_probe=0.9)
    said = headline(DiscoveryContent("t", methods=methods))
    assert words in said and "was not compared with the dense probe" in said
    shown = f"{value:+.3f}".replace("-", "−")
    assert f"difference {shown} [" in said


def test_without_baselines_the_headline_says_that_nothing_is_known():
    assert "nothing on this page says whether" in headline(DiscoveryContent("t"))
    assert "is not known" in headline(DiscoveryContent("t", methods=table(neuron=0.7)))
    assert headline(DiscoveryContent("t", layers=fake_layers())).startswith(
        "A linear probe reads emotion best at layer"
    )


def test_an_end_of_an_interval_at_zero_decides_nothing():
    assert [verdict(*ends) for ends in ((0.0, 1.0), (-1.0, 0.0), (0.1, 1.0), (-1.0, -0.1), (math.nan, None))] == [
        "unclear", "unclear", "better", "worse", "unclear",
    ]  # fmt: skip
    row = difference("a", "b", "mean", 0.1, 0.05)
    assert difference_between(table(row), "b", "a") == pytest.approx((-0.1, -0.15, -0.05))
    assert difference_between(table(row), "a", "c") is None


def test_what_speaks_against_the_features_is_marked_like_what_speaks_for_them(content: DiscoveryContent):
    found = facts(content)
    by_start = {fact.text.split(":")[0]: fact.good for fact in found}
    assert by_start["One latent against dense probe"] is False
    assert by_start["Probe on 16 latents against dense probe"] is True
    assert by_start["Mean margin of the best features over the reference shuffled-model"] is False
    assert by_start["Mean margin of the best features over the reference random-direction"] is True
    (specific,) = [fact for fact in found if "read their own emotion better" in fact.text]
    assert specific.text.startswith("10 of 12") and specific.good is False
    broken = facts(replace(content, calibration=fake_calibration(fewest_honest=None)))
    assert any("DO NOT keep" in fact.text and fact.good is False for fact in broken)


def test_the_page_counts_wins_and_losses_by_emotion(content: DiscoveryContent):
    rows = [
        difference("latent", "dense-probe", e, v, 0.01)
        for e, v in (("mean", -0.1), ("a", 0.1), ("b", -0.1), ("c", 0.0))
    ]
    (fact,) = facts(DiscoveryContent("t", methods=table(*rows, latent=0.8)))
    assert "by emotion: better for 1, worse for 1, unclear for 1" in fact.text


def test_every_figure_of_the_rows_is_on_the_page(content: DiscoveryContent, page: Page):
    assert content.scores and content.margins and content.methods
    for row in content.scores.rows:
        assert str(row.feature) in page.prose
    assert all(f"{row.auroc:.3f}" in page.prose for row in content.methods.scores if row.emotion == "mean")
    cells = [td for td in page.of("td") if {"up", "down"} & set(td.get("class", "").split())]
    assert len(cells) == len(EMOTIONS) ** 2
    assert len(page.of("td", "own")) == len(page.of("td", "rival")) == len(EMOTIONS)
    assert len(page.of("svg", "roc")) == len(EMOTIONS)
    assert page.prose.count("not told apart") == 2 and page.prose.count("✓ specific") == 10
    assert len(page.of("rect", "cell")) == 7 * 7
    assert "7 of 200" in page.prose and "5 min 12 s" in page.prose


def test_what_to_steer_with_stands_in_the_order_of_the_causal_score(content: DiscoveryContent, page: Page) -> None:
    assert content.ranks
    shown = Page(render(DiscoveryContent("t", ranks=content.ranks)))
    first = [row.feature for emotion in EMOTIONS for row in content.ranks.top(emotion, 3)]
    assert [int(number) for number in re.findall(r"(?<!\S)\d{3,6}(?!\S)", shown.prose)][: len(first)] == first
    assert "no list of words: by AUROC" in shown.prose and "it alone predicted beyond doubt" in shown.prose
    (fact,) = facts(DiscoveryContent("t", ranks=content.ranks))
    assert fact.text.startswith("For 8 of 12 emotions") and fact.good is None


def test_ratings_name_what_goes_with_them_most_and_mark_what_is_beyond_chance(content: DiscoveryContent) -> None:
    assert content.ratings
    (fact,) = facts(DiscoveryContent("t", ratings=content.ratings))
    assert fact.good is None
    assert f"with V −0.180 [−0.210,\u00a0−0.150] ({EMOTIONS[0]}), with A −0.090" in fact.text
    source = render(DiscoveryContent("t", ratings=content.ratings))
    bold = re.findall(r"<b>([+−]0\.\d\d)</b>", source)
    beyond = [row for row in content.ratings.rows if row.spearman is not None and abs(row.spearman) > 0.03]
    assert len(bold) == len(beyond)


def test_features_that_lose_on_another_corpus_are_named(content: DiscoveryContent) -> None:
    (fact,) = facts(DiscoveryContent("t", transfers=content.transfers))
    assert fact.good is False
    assert f"3 of 4 lose to the feature that xed_en/train.jsonl.gz would choose itself: {EMOTIONS[1]}" in fact.text
    table = fake_transfer()
    (fact,) = facts(DiscoveryContent("t", transfers={"x": replace(table, rows=table.rows[:3])}))
    assert fact.good is True and "0 of 1 lose" in fact.text
    none = replace(table.rows[0], **dict.fromkeys(("auroc", "gap", "gap_low", "gap_high")))
    (fact,) = facts(DiscoveryContent("t", transfers={"x": replace(table, rows=(none,))}))
    assert fact.good is None and "too few texts" in fact.text


def test_the_depth_of_a_heat_cell_is_its_distance_from_chance():
    rows = fake_specificity(random.Random(0)).rows[:2]
    shown = Page(
        render(DiscoveryContent("t", specificity=Specificity({}, rows, np.array([[0.9, 0.5], [0.0, math.nan]]))))
    )
    cells = [(td["class"].split()[0], td["style"]) for td in shown.of("td") if "style" in td]
    assert cells == [("up", "--a:0.80"), ("up", "--a:0.00"), ("down", "--a:1.00"), ("up", "--a:0.00")]


def test_parts_that_are_missing_have_no_section_and_are_named(content: DiscoveryContent, page: Page):
    everything = {"method", "main", "top", "provenance"}
    names = {field.name for field in fields(DiscoveryContent)}
    assert set(PARTS) <= names
    for part, words in PARTS.items():
        alone = Page(render(DiscoveryContent("t", **{part: getattr(content, part)})))
        others = [other for other in PARTS.values() if other != words]
        assert f"Not computed in this run: {'; '.join(others)}." in alone.prose
        assert len([a for _, a in alone.tags if "id" in a]) == len(everything) + 1
    bare = Page(render(DiscoveryContent("t")))
    assert {a["id"] for _, a in bare.tags if "id" in a} == everything
    assert all(words in bare.prose for words in PARTS.values())
    assert "Not computed" not in page.prose


def test_emotions_come_in_order_of_mention_and_the_mean_is_none(content: DiscoveryContent):
    assert emotions_of(content) == EMOTIONS
    assert emotions_of(DiscoveryContent("t", layers=fake_layers())) == EMOTIONS[:5]


def test_methods_have_names_in_words_and_unknown_ones_stay():
    assert [method_name(m) for m in ("latent", "latents-5", "dense-probe", "prompting")] == [
        "one latent", "probe on 5 latents", "dense probe", "prompting",
    ]  # fmt: skip


def test_the_page_is_written_whole_and_is_the_same_each_time(tmp_path: Path):
    path, again = (
        write_discovery_page(tmp_path / "report.html", DiscoveryContent("t", margins=fake_margins())) for _ in range(2)
    )
    assert path == again == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(DiscoveryContent("t", margins=fake_margins()))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_discovery_page(tmp_path / "missing" / "report.html", DiscoveryContent("t"))


if __name__ == "__main__":
    print(write_discovery_page(Path(sys.argv[1]), fake_content()))


def test_silent_features_are_named_with_what_fires_instead(content: DiscoveryContent, page: Page) -> None:
    assert "3 of 3" not in page.prose
    assert f"1 of 3 best features are silent in more than 10 % of the texts: {EMOTIONS[2]}." in page.prose.replace(
        "\u00a0", " "
    )
    assert "3002" in page.prose and "61 % / 3 %" in page.prose.replace("\u00a0", " ")
    (fact,) = [one for one in facts(replace(content, methods=None)) if "silent" in one.text]
    assert fact.good is False
    assert content.absorption
    never = [replace(row, true_rate=0.0) for row in content.absorption.rows[:2]]
    (fact,) = [
        one for one in facts(DiscoveryContent("t", absorption=Absorption({}, tuple(never)))) if "silent" in one.text
    ]
    assert fact.good is True and "0 of 2" in fact.text
