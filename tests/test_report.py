"""The report page: what is on it, what is escaped, and how it is written."""

import base64
import hashlib
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_emotion_plugin.pages.report import (
    Bounds,
    DoseResponseRow,
    Finding,
    HighlightedText,
    MethodNote,
    ReportContent,
    ScoreDistribution,
    broken_bounds,
    headline,
    render,
    write_report,
)
from sae_emotion_plugin.pages.report_views import HUES, feature_groups, hues, openings, pairs
from sae_emotion_plugin.pages.token_text import marked_token, printable

LENS = {
    "anger": [[" fucking", " damn", " stupid", "!!", " hate", " bullshit", "화났", " idiot"], [" gently", " thank"]],
    "joy": [[" happy", " wonderful", "\n", " delight", "😊", " celebrate", "嬉しい", " smiles"], [" unfortunately"]],
    "sadness": [[" sad", " lonely", " grief", " tears", "슬프", " lost", " alone", "悲し"], [" fun", " exciting"]],
    "fear": [[" afraid", " terrified", " danger", " horror", " scared", "怖"], [" calm", " safe"]],
    "disgust": [[" gross", " vomit", " filthy", " rotten", " stench"], [" delicious"]],
    "surprise": [[" suddenly", " wow", " unexpected", "?!", " astonished"], [" as", " usual"]],
    "neutral": [[" the", " approximately", " located", " km"], [" love", " hate"]],
}
BEST = {"anger": 0.84, "joy": 0.91, "sadness": 0.88, "fear": 0.86, "disgust": 0.8, "surprise": 0.71, "neutral": 0.67}
AFTER = {
    "anger": "fucking idiot, and I am sick of him telling everybody how to run this place.",
    "joy": "wonderful person! I love how happy everybody is when he comes into the room.",
    "sadness": "lonely man. He lost his wife last winter and has not said much since then.",
}
OPENINGS = (
    *("The train to the coast", "My neighbour told me that", "On Monday the office", "The recipe says to"),
    *("She opened the letter and", "After the match, we", "The new library has", "어제 저녁에 동생이", "昨日、友達と"),
)


def score_rows(chance: random.Random) -> list[dict[str, Any]]:
    rows = []
    for emotion, best in BEST.items():
        for rank in range(7):
            auroc = best - 0.025 * rank + chance.uniform(-0.004, 0.004)
            q = 10 ** -(8 - rank) if emotion != "neutral" else 0.031 * (rank + 1)
            rows.append({
                "emotion": emotion, "feature": chance.randrange(8192), "auroc": auroc,
                "held_out_auroc": auroc - chance.uniform(-0.02, 0.06), "p": q / 50, "q": q,
                "rate_in": 0.75 - 0.06 * rank, "rate_out": 0.08 + 0.01 * rank,
                "promotes": LENS[emotion][0], "suppresses": LENS[emotion][1],
            })  # fmt: skip
    return rows


def dose_rows(chance: random.Random) -> list[DoseResponseRow]:
    rows = []
    for emotion, slope, cost in (("anger", -7.0, 14.0), ("joy", 6.2, 9.0), ("sadness", -2.6, 21.0)):
        for part in ("choose", "report"):
            for step in range(0, 8):
                amount = 0.02 * step
                shift = slope * amount * (1 - 2.2 * amount) + (chance.uniform(-0.06, 0.06) if step else 0.0)
                width = 0.05 + 0.9 * amount if step else 0.0
                rows.append(DoseResponseRow(
                    emotion, amount, part, shift, shift - width, shift + width,
                    math.exp((cost * amount) ** 2 * 0.55), min(1.0, (amount * 6.5) ** 4 + 0.02), 10,
                ))  # fmt: skip
    return rows


def generation(prompt: str, emotion: str, amount: float, part: str, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": prompt, "emotion": emotion, "features": [812, 4077, 1203], "mode": "add", "amount": amount,
        "unit": "fraction of mean norm", "temperature": 0.7, "seed": 3, "part": part,
        "baseline_text": " nice guy. He always helps me with the garden, and we talk about the weather.",
        "text": " " + AFTER.get(emotion, "man."), "baseline_valence": 0.68,
        "valence": {"anger": -0.71, "joy": 0.93, "sadness": -0.02}.get(emotion, 0.0),
        "baseline_nll": 2.21, "nll": 2.21 + 5 * amount, "degenerate": False, "baseline_degenerate": False,
    }  # fmt: skip
    return row | changes


def generation_rows() -> list[dict[str, Any]]:
    rows = []
    for emotion in AFTER:
        for opening in OPENINGS:
            before, after = " was late again, and nobody said why.", " " + AFTER[emotion]
            if opening.startswith("어제"):
                before, after = (
                    " 시장에 다녀왔다.\n\n그리고 저녁을 먹었다.",
                    " 소리를 지르며 문을 쾅 닫았다. 정말 화가 났다.",
                )
            elif opening.startswith("昨日"):
                before, after = "図書館で本を読みました。", "ひどい喧嘩をして、直接怒鳴られた。"
            for amount in (0.06, 0.08):
                kwargs = {"baseline_text": before, "text": after, "baseline_valence": 0.0}
                rows.append(generation(opening, emotion, amount, "report", **kwargs))
        for temperature in (0.0, 0.7):
            for amount in (0.04, 0.06, 0.08, 0.12):
                kwargs = {"temperature": temperature, "seed": 0 if temperature == 0 else 3}
                if amount == 0.12:
                    kwargs |= {"text": " fucking" * 24 if emotion == "anger" else "\n" * 20, "degenerate": True}
                rows.append(generation("he is such a", emotion, amount, "demo", **kwargs))
    return rows


def highlighted_texts() -> list[HighlightedText]:
    sentences = {
        ("anger", 812): [
            "I told you three times , and you still lied to my face .",
            "왜 또 내 물건 을 함부로 건드려 ?",
        ],
        ("joy", 5150): [
            "We danced in the kitchen until the cake was gone .",
            "合格 した と 聞いて 、 飛び上がって 喜んだ 。",
        ],
        ("sadness", 77): ["Her chair stays empty at the table every evening .\nNobody moves it ."],
    }
    chance = random.Random(5)
    texts = []
    for (emotion, feature), lines in sentences.items():
        for i, line in enumerate(lines):
            words = re.findall(r" ?[^ \n]+|\n", line)
            values = [max(0.0, chance.gauss(0.5, 3.2)) for _ in words]
            texts.append(HighlightedText(emotion, feature, f"{emotion}-{i:03}", words, values))
    return texts


def fake_content() -> ReportContent:
    """A whole report's worth of made-up numbers; also what the page is looked at with."""
    chance = random.Random(0)
    distributions = [
        ScoreDistribution(
            emotion, 100 + i,
            [0.0 if chance.random() < 0.25 else chance.gammavariate(5, 1.3) for _ in range(45)],
            [0.0 if chance.random() < 0.82 else chance.gammavariate(1.6, 1.4) for _ in range(300)],
        )
        for i, emotion in enumerate(BEST)
    ]  # fmt: skip
    return ReportContent(
        title="Emotion features of Gemma 3 270M",
        meta={
            "model": "Gemma 3 270M (Q4_K_M, dequantised)", "model_sha256": "a5fd3b62" * 8,
            "dictionary": "gemma-3-270m-emotion / blocks.9", "hook_name": "blocks.9.hook_resid_post",
            "versions": {"torch": "2.13.0", "sae-lens": "6.54.12"}, "seed": 0, "date": "2025-11-21",
            "wall_time_s": 312.4,
        },
        scores=score_rows(chance),
        dictionary={
            "fvu": 0.112, "fvu_without_largest_dimension": 0.21, "fvu_mean_over_dimensions": 0.46, "l0": 32.0,
            "dead": 3, "d_sae": 8192, "tokens": 2_400_000, "cross_entropy": 3.61, "cross_entropy_spliced": 3.93,
            "cross_entropy_mean_ablated": 9.84,
        },
        distributions=distributions,
        dose_response=dose_rows(chance),
        recommended={"anger": 0.08, "joy": 0.08, "sadness": None},
        findings=[
            Finding("anger", 0.08, -0.46, -0.61, -0.31, 1.62, 0.1, 0.05, "fall", 10, "neutral openings, sampled"),
            Finding("joy", 0.08, 0.41, 0.22, 0.58, 1.31, 0.0, 0.0, "rise", 10, "unpleasant openings, sampled"),
            Finding("sadness", None, -0.12, -0.33, 0.08, 2.44, 0.2, 0.05, "fall", 10, "neutral openings, sampled"),
        ],
        generations=generation_rows(),
        highlights=highlighted_texts(),
        method=[MethodNote("Texts", "420 English, 175 Korean, 175 Japanese sentences, half of each class held out.")],
    )  # fmt: skip


VOID = {"meta", "br", "img", "input", "link", "hr"}
HOSTILE = "<script>alert(1)</script>\"'`</style></title><img src=x onerror=alert(1)>\x00\x1b[31m\x85\ud800\u202e😀&amp;"


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def of(self, tag: str, style: str = "") -> list[dict[str, str]]:
        found = [attributes for name, attributes in self.tags if name == tag]
        return [a for a in found if not style or style in a.get("class", "").split()]

    @property
    def prose(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def content() -> ReportContent:
    return fake_content()


@pytest.fixture(scope="module")
def source(content: ReportContent) -> str:
    return render(content)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def small(**changes: Any) -> ReportContent:
    return replace(ReportContent("t", {}, (), {}), **changes)


def finding(**changes: Any) -> Finding:
    return replace(Finding("anger", 0.08, -0.5, -0.6, -0.4, 1.5, 0.1, 0.05, "fall"), **changes)


def hostile_content() -> ReportContent:
    """Every string a caller can give is hostile, every number missing."""
    bad, nan = HOSTILE, math.nan
    score = {"emotion": bad, "feature": 1, "auroc": nan, "held_out_auroc": None, "p": nan, "q": None, "rate_in": nan}
    row = generation(bad, bad, 0.1, "report", mode=bad, unit=bad, baseline_text=bad, text=bad, valence=nan, nll=None)
    return ReportContent(
        bad,
        {bad: bad, "model": bad, "versions": {bad: bad}, "wall_time_s": nan, "seed": None, "flags": [bad, True]},
        [score | {"rate_out": None, "promotes": [bad, "", "\n"], "suppresses": [bad]}],
        {"fvu": nan, bad: bad, "cross_entropy": None},
        [ScoreDistribution(bad, 1, [nan, 0.0], [])],
        [DoseResponseRow(bad, 0.1, "report", nan, None, nan, None, nan, 0)],
        {bad: nan},
        [Finding(bad, None, nan, None, nan, nan, None, nan, "rise", None, bad)],
        [row, row | {"part": "demo"}],
        [HighlightedText(bad, 1, bad, [bad, " ", ""], [1.0, nan, None])],
        [MethodNote(bad, bad)],
        demo_prompt=bad,
    )


def test_the_page_is_well_formed_and_needs_nothing_from_outside(source: str, page: Page):
    assert source.startswith("<!doctype html>")
    assert not re.search(r"(src|srcset|poster|data)=|@import|url\(|https?:", source)
    targets = [attributes["href"] for tag, attributes in page.tags if "href" in attributes]
    names = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert targets and all(target[0] == "#" and target[1:] in names for target in targets)
    assert {"result", "features", "distributions", "dose-response", "before-after", "tokens", "method"} <= names


def test_hostile_text_is_shown_and_never_becomes_markup():
    source = render(hostile_content())
    hostile = Page(source)
    assert len(hostile.of("script")) == len(hostile.of("style")) == len(hostile.of("title")) == 1
    assert not hostile.of("img")
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)
    assert source.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", source)
    assert "<script>alert(1)</script>" in hostile.prose and "␀␛[31m" in hostile.prose and "😀&amp;" in hostile.prose


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_any_text_comes_back_from_the_page_as_it_went_in(text: str):
    shown = Page(render(small(title=text, method=[MethodNote("note", text)])))
    expected = " ".join(printable(text).split())
    assert expected in shown.prose


def test_missing_numbers_are_shown_as_an_en_dash():
    words = Page(render(hostile_content())).prose.split()
    assert words.count("–") >= 10
    assert not {"nan", "NaN", "None", "inf"} & set(words)


def test_the_same_content_gives_the_same_bytes(source: str, tmp_path: Path):
    assert write_report(tmp_path, fake_content()).read_bytes().decode() == source


def test_the_report_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path):
    folder = tmp_path / "new" / "report"
    write_report(folder, small(title="old"))
    path = write_report(folder, small(title="new"))
    assert path == folder / "index.html"
    assert "<h1>new</h1>" in path.read_text(encoding="utf-8")
    assert [p.name for p in folder.iterdir()] == ["index.html"]


def test_a_failed_write_keeps_the_older_page_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = write_report(tmp_path, small(title="old")).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, small(title="new"))
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_bytes() == before


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match=r"taken' is a file; the report needs a folder"):
        write_report(tmp_path / "taken", small())


def test_a_row_without_a_key_is_named_with_the_keys_it_needs():
    row = score_rows(random.Random(0))[0]
    with pytest.raises(ValueError, match=r"row 1 of scores has no 'q'; a row needs emotion, feature"):
        small(scores=[row, {k: v for k, v in row.items() if k != "q"}])
    with pytest.raises(ValueError, match="row 0 of generations has no 'prompt'"):
        small(generations=[{"emotion": "joy"}])


def test_a_highlighted_text_needs_one_activation_per_token():
    with pytest.raises(ValueError, match="text 'a-1' has 2 tokens but 1 activations"):
        HighlightedText("joy", 1, "a-1", ["a", "b"], [1.0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"amount": None}, "no amount"),
        ({"effect": math.nan}, "no effect was measured"),
        ({"high": 0.0}, "includes 0"),
        ({"effect": 0.5, "low": 0.4, "high": 0.6}, "did not fall"),
        ({"effect": 0.5, "low": 0.4, "high": 0.6, "expected": None}, ""),
        ({"effect": -0.29}, "below 0.30"),
        ({"effect": -0.3}, ""),
        ({"perplexity_ratio": 2.0}, ""),
        ({"perplexity_ratio": 2.01}, "perplexity ratio 2.01"),
        ({"perplexity_ratio": math.inf}, "perplexity ratio"),
        ({"degenerate_steered": 0.15}, ""),
        ({"degenerate_steered": 0.2}, "degenerate share"),
        ({"degenerate_baseline": None}, "degenerate share"),
    ],
)
def test_a_finding_keeps_the_bounds_up_to_their_edge(changes: dict[str, Any], words: str):
    broken = broken_bounds(finding(**changes), Bounds())
    assert len(broken) == bool(words)
    assert words in "".join(broken)


def test_without_a_smallest_effect_any_clear_shift_the_right_way_will_do():
    slight = finding(effect=-0.02, low=-0.03, high=-0.01)
    assert broken_bounds(slight, Bounds()) and not broken_bounds(slight, Bounds(effect=None))


def test_the_headline_names_what_worked_and_what_did_not():
    good, bad = finding(), finding(emotion="joy", perplexity_ratio=3.0)
    both = headline(small(findings=[good, bad]))
    assert "−0.50 [−0.60, −0.40] for anger" in both and "joy did not keep the bounds" in both
    assert "did not" not in headline(small(findings=[good]))
    assert headline(small(findings=[bad])) == "Steering towards joy did not keep the bounds."
    assert "no steering result" in headline(small())


def test_results_against_us_stand_beside_the_others(page: Page):
    assert len(page.of("div", "row")) == 1 + 3
    assert len(page.of("span", "yes")) == 2 and len(page.of("span", "no")) == 1
    assert "−0.12 [−0.33, +0.08]" in page.prose
    assert "no amount is recommended; the interval includes 0; the shift is below 0.30" in page.prose


def test_features_are_ranked_on_the_training_half_alone():
    rows = score_rows(random.Random(1))
    random.Random(2).shuffle(rows)
    for group in feature_groups(small(scores=rows), ["anger", "joy"]):
        slow = sorted((r["auroc"] for r in rows if r["emotion"] == group["emotion"]), reverse=True)[:5]
        assert [row["auroc"] for row in group["rows"]] == slow
        assert group["n"] == 7


def test_a_feature_worse_than_chance_widens_the_axis_to_zero():
    row = score_rows(random.Random(1))[0]
    assert "AUROC axis from 0.5" in render(small(scores=[row]))
    assert "AUROC axis from 0.0" in render(small(scores=[row | {"held_out_auroc": 0.0}]))


def test_spaces_and_line_breaks_of_tokens_are_visible():
    assert marked_token(" the\n").striptags() == "␣the↵"
    assert marked_token("▁the\t").striptags() == "␣the⇥"
    assert marked_token("").striptags() == "empty"
    assert marked_token("a\u200b").striptags() == "aU+200B"
    assert marked_token("\u200d").striptags() == "U+200D"
    assert marked_token("👩\u200d👧") == "👩\u200d👧"
    assert printable(marked_token("<b>&\x00")) == "&lt;b&gt;&amp;␀"


def test_line_breaks_of_a_looping_text_do_not_stretch_the_page():
    row = generation("he is such a", "joy", 0.1, "demo", text="\n" * 30)
    source = render(small(generations=[row]))
    assert Page(source).prose.count("↵") == 30
    assert all("\n" not in text for text in re.findall(r'<p class="text".*?</p>', source, re.S))


def test_the_demonstration_comes_first_with_greedy_and_sampled_text(source: str, page: Page):
    assert source.index("The prompt “he is such a”") < source.index("Reported openings, anger")
    decodings = [(card["data-emotion"], card["data-decoding"]) for card in page.of("article", "pair")][:6]
    assert decodings == [(e, d) for e in ("anger", "joy", "sadness") for d in ("greedy", "sampled")]


def test_pairs_show_the_recommended_amount_first_and_keep_the_others():
    rows = [generation("p", "anger", amount, "demo") for amount in (0.12, 0.04, 0.08)]
    (chosen,) = pairs(small(recommended={"anger": 0.04}), rows)
    assert chosen["recommended"] and chosen["shown"]["amount"] == 0.04
    assert [row["amount"] for row in chosen["others"]] == [0.08, 0.12]
    (middle,) = pairs(small(recommended={"anger": None}), rows)
    assert not middle["recommended"] and middle["shown"]["amount"] == 0.08


def test_pairs_of_different_decodings_seeds_and_baselines_stay_apart():
    changes = [{}, {"temperature": 0.0}, {"seed": 4}, {"baseline_text": " other"}, {"features": [1]}, {"mode": "clamp"}]
    rows = [generation("p", "anger", 0.1, "demo", **change) for change in changes]
    assert len(pairs(small(), rows)) == len(changes)


def test_every_opening_of_the_reported_half_is_on_the_page_and_none_of_the_choosing_half(content: ReportContent):
    chosen = [generation("An opening used for choosing", "anger", 0.08, "choose", text=" secret")]
    page = Page(render(replace(content, generations=[*content.generations, *chosen])))
    assert "secret" not in page.prose
    for opening in OPENINGS:
        assert page.prose.count(opening) >= 2 * 3
    (anger, _, sadness) = openings(content, ["anger", "joy", "sadness"])
    assert anger["recommended"] and anger["amount"] == 0.08 and len(anger["pairs"]) == len(OPENINGS)
    assert not sadness["recommended"]


def test_degenerate_text_and_valence_are_marked():
    row = generation("p", "anger", 0.1, "report", degenerate=True, baseline_valence=0.05, valence=-0.06)
    page = Page(render(small(generations=[row])))
    assert page.prose.count("degenerate: repeats itself") == 1
    assert len(page.of("span", "even")) == 2 and len(page.of("span", "negative")) == 2  # one of each is the key


def test_token_strength_is_a_fraction_of_the_largest_activation_of_its_feature():
    texts = [HighlightedText("joy", 3, "a", [" glad", "x"], [4.0, 0.0]), HighlightedText("joy", 3, "b", [" so"], [8.0])]
    page = Page(render(small(highlights=[*texts, HighlightedText("joy", 4, "c", ["y"], [1.0])])))
    assert [span["style"] for span in page.of("span", "on")] == ["--a:0.50", "--a:1.00", "--a:1.00"]
    titles = [span["title"] for span in page.of("span") if "title" in span]
    assert titles == ["␣glad: 4.00", "x: 0.00", "␣so: 8.00", "y: 1.00"]


def test_a_feature_that_never_fires_highlights_nothing():
    page = Page(render(small(highlights=[HighlightedText("joy", 3, "a", ["x", "y"], [0.0, math.nan])])))
    assert not page.of("span", "on")


def test_texts_carry_the_language_that_decides_their_letter_shapes(page: Page):
    assert {"ko", "ja", "en"} <= {p["lang"] for p in page.of("p", "text")}
    assert [p["lang"] for p in page.of("p", "reading")] == ["en", "ko", "en", "ja", "en"]


def test_the_dose_response_shows_both_halves_and_the_recommended_amount(content: ReportContent, page: Page):
    assert len(page.of("line", "marked")) == 2  # sadness has no recommended amount
    assert len(page.of("path", "band")) == 2 * 3
    assert len(page.of("tr")) == 3 + len(content.dose_response)
    assert "bound 2.0" in page.prose and "bound 15 %" in page.prose


def test_one_reported_amount_is_enough_for_a_chart():
    row = DoseResponseRow("joy", 0.1, "report", 0.3, 0.1, 0.5, 1.2, 0.0, 10)
    page = Page(render(small(dose_response=[row])))
    assert len(page.of("line", "whisker")) == 1


def test_empty_sections_are_left_out_with_their_links():
    page = Page(render(small()))
    assert [a["href"] for a in page.of("a")] == ["#main", "#method", "#provenance", "#method", "#top"]
    assert "no steering result was recorded" in page.prose


def test_the_filter_is_hidden_until_the_script_runs_and_only_that_script_may_run(source: str, page: Page):
    (filters,) = page.of("div", "filters")
    assert "hidden" in filters
    assert not any("hidden" in attributes for attributes in page.of("article"))
    script = re.search(r"<script>(.*?)</script>", source, re.S)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_the_offensive_text_warning_and_the_method_stand_at_the_top(source: str):
    top = source[: source.index("<nav")]
    assert "Steered text can be offensive" in top and 'href="#method"' in top
    method = source[source.index('id="method"') :]
    assert "420 English" in method and "AUROC 0.5" in method and "The baseline is" in method


def test_provenance_lists_every_fact_of_the_run(page: Page):
    assert "a5fd3b62" * 8 in page.prose
    assert "5 min 12 s" in page.prose and "sae-lens 6.54.12" in page.prose and "2,400,000" in page.prose
    assert "Dead features 3 " in page.prose and "Cross-entropy of the model alone 3.61" in page.prose


def test_well_known_emotions_keep_their_colours_and_others_get_free_ones():
    names = ("joy", "gratitude", "anger", "분노", "curiosity")
    found = hues(names)
    assert found["joy"] == HUES["joy"] and found["anger"] == HUES["anger"]
    assert len(set(found.values())) == len(names)
    assert len(hues([f"label {i}" for i in range(40)])) == 40


def test_importing_the_report_needs_no_torch():
    code = "import sys, sae_emotion_plugin.pages.report; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def luminance(rgb: tuple[float, ...]) -> float:
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(front: tuple[float, ...], back: tuple[float, ...]) -> float:
    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def over(front: tuple[float, ...], back: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    return tuple(alpha * f + (1 - alpha) * b for f, b in zip(front, back, strict=True))


@pytest.mark.parametrize("scheme", [0, 1])
def test_every_text_colour_reaches_aa_contrast_on_its_background(source: str, scheme: int):
    blocks = re.findall(r":root \{(.*?)\n *(?:color-scheme.*?\n *)?\}", source, re.S)
    colours: dict[str, tuple[float, ...]] = {}
    for name, value in re.findall(r"--([\w-]+): (#[0-9a-f]{6}|\d+ \d+ \d+);", "".join(blocks[: scheme + 1])):
        rgb = [int(value[i : i + 2], 16) for i in (1, 3, 5)] if value[0] == "#" else map(int, value.split())
        colours[name] = tuple(rgb)
    strongest = 0.45
    assert f"var(--a) * {strongest:g}".replace("0.", ".") in source
    surfaces = [(front, back) for front in ("ink", "soft", "link") for back in ("paper", "ground")]
    surfaces += [("good", "good-bg"), ("bad", "bad-bg"), ("bad", "paper"), ("warn-ink", "warn-bg"), ("ink", "even-bg")]
    hue_names = sorted(set(hues([*HUES, *map(str, range(20))]).values()))
    assert len(hue_names) == 10
    surfaces += [(hue, "paper") for hue in hue_names]
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in surfaces}
    for hue in hue_names:
        low["ink", hue] = contrast(colours["ink"], over(colours[hue], colours["paper"], strongest))
        low["soft", hue] = contrast(colours["soft"], over(colours[hue], colours["paper"], 0.1))
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1]), fake_content()))
