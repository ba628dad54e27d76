"""The page of labelled features: what is on it, that nothing on it can run, and how it behaves in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, Page, contrast

from sae_emotion_plugin.dashboards.types import (
    ActivatingSequence,
    AlignedNeuron,
    Correlation,
    FeatureDashboard,
    Histogram,
    SequenceGroup,
    TokenEffect,
)
from sae_emotion_plugin.feature_labels import FeatureLabel
from sae_emotion_plugin.pages.browser import TOKENS_AFTER, TOKENS_BEFORE, feature_view, render, write_browser
from sae_emotion_plugin.pages.templates import page_data
from sae_emotion_plugin.pages.token_text import printable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STORABLE = HOSTILE.replace("\x00", "").replace("\ud800", "")
"""As hostile as a label can be: one with NUL or half a surrogate pair is refused before."""

FRAME = """<!doctype html><meta charset="utf-8"><iframe id="f" src="page.html" width="1200" height="900"></iframe>
<pre id="found"></pre><script>
const f = document.getElementById("f");
f.onload = async () => {
  const w = f.contentWindow, d = w.document, $ = (s) => d.querySelector(s), all = (s) => [...d.querySelectorAll(s)];
  const rest = () => new Promise((done) => setTimeout(done, 60));
  const press = (key) => d.activeElement.dispatchEvent(new w.KeyboardEvent("keydown", { key, bubbles: true }));
  const open = () => all("#list li:not([hidden]) .num").map((x) => x.textContent);
  const type = (text) => { $("#search").value = text; $("#search").dispatchEvent(new w.Event("input")); };
  const texts = (s) => all(s).map((x) => x.textContent);
  let found;
  try { found = await (async () => { SCRIPT })(); } catch (error) { found = String(error); }
  document.getElementById("found").textContent = JSON.stringify(found);
};</script>"""


def sequence(words: tuple[str, ...], **fires: float) -> ActivatingSequence:
    values = [0.0] * len(words)
    for place, value in fires.items():
        values[int(place[1:])] = value
    return ActivatingSequence("0" * 16, words, tuple(range(len(words))), tuple(values), values.index(max(values)))


def dashboard(feature: int = 7, **changes: Any) -> FeatureDashboard:
    words = (" I", " am", " so", " happy", "\n", "Then", " nothing")
    made = FeatureDashboard(
        feature=feature,
        n_tokens=1000,
        n_active=4,
        fraction_active=0.004,
        maximum=8.0,
        activations=Histogram(1.0, 8.0, (3, 0, 1)),
        groups=(
            SequenceGroup(None, 8.0, None, (sequence(words, t3=8.0, t2=2.0), sequence(words, t5=4.0))),
            SequenceGroup(4.0, 8.0, 0.003, (sequence(words, t5=4.0),)),
            SequenceGroup(0.0, 4.0, 0.001, ()),
        ),
        logits=Histogram(-1.0, 1.0, (10, 80, 10)),
        promoted=(TokenEffect(" happy", 3, 1.0), TokenEffect("\n", 4, 0.5)),
        suppressed=(TokenEffect(" sad", 9, -1.0),),
        correlated_features=(Correlation(12, 0.5, 0.6), Correlation(99, 0.25, 0.3)),
        correlated_neurons=(Correlation(3, 0.125, 0.1),),
        aligned_neurons=(AlignedNeuron(3, 0.5, 0.1),),
    )
    return replace(made, **changes)


def a_label(feature: int = 7, **changes: Any) -> FeatureLabel:
    statistics = {"corpus": "GoEmotions", "rate_in": 0.6, "q": 1e-9, "held_out_auroc": 0.8125, "auroc": 0.84}
    made = FeatureLabel(feature, ("joy",), "people are happy", statistics, "discover", "1", "maintainers")
    return replace(made, **changes)


LABELS = (
    a_label(),
    a_label(author="another", text="good news", emotions=("relief", "joy"), statistics={"held_out_auroc:relief": 0.7}),
    a_label(12, emotions=("anger",), text="insults"),
    a_label(40, emotions=("anger", "fear"), text="threats", statistics={}),
)


def page_of(**changes: Any) -> str:
    given = {"title": "dictionary", "links": {7: "https://www.neuronpedia.org/m/9-set/7"}, "meta": {"model": "m"}}
    return render(LABELS, [dashboard(), dashboard(12), dashboard(13)], **(given | changes))


def hostile_page() -> str:
    tokens = (HOSTILE, "</script>", "<!--<script>", "]]>", "\u2028", "\n", "")
    effects = tuple(TokenEffect(token, i, 1.0) for i, token in enumerate(tokens))
    group = SequenceGroup(None, 8.0, None, (sequence(tokens, t0=8.0, t2=1.0),))
    bad = a_label(emotions=(STORABLE, "__proto__"), text=STORABLE, author=STORABLE, method=STORABLE)
    bad = replace(bad, statistics={STORABLE: STORABLE, "auroc": None})
    made = dashboard(groups=(group,), promoted=effects, suppressed=effects)
    links = {7: 'https://example.org/"onclick="alert(1)'}
    return render([bad, a_label(12)], [made], title=HOSTILE, meta={HOSTILE: HOSTILE}, links=links)


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_every_labelled_feature_is_in_the_list_and_in_the_data_and_no_other_is() -> None:
    source = page_of()
    page = Page(source)
    assert [item["href"] for item in page.of("a") if item["href"].startswith("#feature-")] == [
        "#feature-7",
        "#feature-12",
        "#feature-40",
    ]
    assert [feature["id"] for feature in data_of(source)["features"]] == [7, 12, 40]
    assert "3 labelled features for anger, fear, joy and relief; 1 of them without a dashboard." in page.prose


def test_labels_of_several_authors_stand_beside_each_other_with_their_figures() -> None:
    shown = feature_view(LABELS[:2], dashboard())
    assert shown["emotions"] == ["joy", "relief"]
    first, second = shown["labels"]
    assert (first["text"], first["by"]) == ("people are happy", "maintainers · discover 1")
    assert first["statistics"] == [
        ["AUROC, training", "0.840"],
        ["AUROC, held out", "0.812"],
        ["q", "< 0.001"],
        ["Fires in class", "60\u00a0%"],
        ["Corpus", "GoEmotions"],
    ]
    assert second["statistics"] == [["AUROC, held out, relief", "0.700"]]


def test_emotions_to_filter_by_carry_the_number_of_their_features() -> None:
    buttons = re.findall(r'data-emotion="([^"]*)".*?<span class="num">(\d+)</span></button>', page_of())
    assert buttons == [("", "3"), ("anger", "2"), ("fear", "1"), ("joy", "1"), ("relief", "1")]


def test_a_text_comes_back_from_its_pieces_and_tokens_are_as_strong_as_their_share_of_the_maximum() -> None:
    strongest, interval = feature_view(LABELS[:1], dashboard())["texts"]
    first = strongest["rows"][0]
    assert first["tokens"] == [" I am", [" so", 0.25, "␣so: 2"], [" happy", 1.0, "␣happy: 8"], "↵\nThen nothing"]
    assert first["note"] == "8 at ␣happy" and strongest["open"]
    assert interval["title"] == "1 sample from 4 to 8 (0.3 % of all tokens)" and not interval["open"]


def test_a_long_text_is_cut_around_its_strongest_token() -> None:
    words = tuple(f" w{i}" for i in range(200))
    group = SequenceGroup(None, 8.0, None, (sequence(words, t100=8.0, t0=3.0),))
    (row,) = feature_view(LABELS[:1], dashboard(groups=(group,)))["texts"][0]["rows"]
    before, (word, strength, _), after = row["tokens"]
    assert (word, strength) == (" w100", 1.0)
    assert before.split() == ["…", *(word.strip() for word in words[100 - TOKENS_BEFORE : 100])]
    assert after.split() == [*(word.strip() for word in words[101 : 101 + TOKENS_AFTER]), "…"]


def test_a_histogram_keeps_its_counts_and_names_them_for_those_who_do_not_see_it() -> None:
    activations, logits = feature_view(LABELS[:1], dashboard())["charts"]
    assert activations["bars"] == [[2.167, 3], [4.5, 0], [6.833, 1]] and activations["top"] == 3
    assert activations["label"].endswith("4 tokens from 1 to 8, at most 3 in one of 3 bars")
    assert [text for _, text in logits["ticks"]] == ["−1.0", "−0.5", "0.0", "0.5", "1.0"]


def test_a_feature_that_never_fires_has_logits_only() -> None:
    silent = dashboard(
        n_active=0, fraction_active=0.0, maximum=0.0, activations=Histogram(0.0, 0.0, ()), groups=(),
        correlated_features=(), correlated_neurons=(),
    )  # fmt: skip
    shown = feature_view(LABELS[:1], silent)
    assert [chart["title"] for chart in shown["charts"]] == ["Effects on the logits of all tokens"]
    assert shown["texts"] == shown["related"] == [] and ["Fires on", "0 % of tokens"] in shown["facts"]
    assert shown["promotes"] == [["␣happy", "+1.00"], ["↵", "+0.50"]]


def test_only_https_is_linked() -> None:
    assert feature_view(LABELS[:1], None, "javascript:alert(1)")["url"] is None
    assert feature_view(LABELS[:1], None, "http://example.org")["url"] is None
    assert data_of(page_of())["features"][0]["url"] == "https://www.neuronpedia.org/m/9-set/7"


def test_the_page_may_load_nothing_and_run_its_own_script_only() -> None:
    source = page_of(links={})
    assert not re.search(r"(src|srcset|poster)=|@import|url\(", source)
    assert not re.search(
        r"https?://", source.replace("http://www.w3.org/2000/svg", "").replace('startsWith("https://")', "")
    )
    (policy,) = [meta["content"] for meta in Page(source).of("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(page_data("browser.js").encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    assert script == page_data("browser.js")


def test_the_script_never_makes_markup_or_code_from_text() -> None:
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
    code = r"\beval\b|Function\(|\bimport\b|fetch|XMLHttpRequest|\.on[a-z]+ *=|setTimeout"
    assert not re.search(f"{markup}|{code}", page_data("browser.js"))


def test_hostile_text_is_shown_and_never_becomes_markup() -> None:
    source = hostile_page()
    page = Page(source)
    assert [one.get("type") for one in page.of("script")] == ["application/json", None]
    assert not page.of("img") and len(page.of("style")) == len(page.of("title")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert source.encode("utf-8") and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", source)
    assert "<script>alert(1)</script>" in page.prose and "⟨U+202E⟩" in page.prose
    (block,) = re.findall(r'id="data">(.*?)</script>', source, re.S)
    assert not set("<>&") & set(block)
    first = data_of(source)["features"][0]
    assert first["emotions"] == [printable(STORABLE), "__proto__"] and first["labels"][0]["text"] == printable(STORABLE)
    assert [token for token, _ in first["promotes"]][:3] == [
        printable(HOSTILE).replace(" ", "␣").replace("⟨U+202E⟩", "U+202E"),
        "</script>",
        "<!--<script>",
    ]


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_any_token_comes_back_from_the_data_as_it_went_in(token: str) -> None:
    group = SequenceGroup(None, 8.0, None, (sequence((token, "x"), t1=8.0),))
    page = render([a_label()], [dashboard(groups=(group,))], title="t")
    shown = data_of(page)["features"][0]["texts"][0]["rows"][0]["tokens"]
    if token.strip(" ▁"):
        expected = printable(token).replace("▁", " ").replace("\n", "↵\n")
        assert shown[0] == expected


def test_the_page_is_written_whole_and_is_the_same_each_time(tmp_path: Path) -> None:
    path = write_browser(tmp_path / "features.html", LABELS, [dashboard()], title="t")
    assert path.read_text(encoding="utf-8") == render(LABELS, [dashboard()], title="t")
    with pytest.raises(FileNotFoundError, match="none"):
        write_browser(tmp_path / "none" / "features.html", LABELS, title="t")
    with pytest.raises(ValueError, match="no labels"):
        write_browser(tmp_path / "other.html", (), [dashboard()], title="t")
    assert [one.name for one in tmp_path.iterdir()] == ["features.html"]


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_on_the_chosen_row_and_emotions_in_it_reach_aa_contrast(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\n *(?:color-scheme.*?\n *)?\}", page_of(), re.S)
    found = re.findall(r"--([\w-]+): (#[0-9a-f]{6}|\d+ \d+ \d+);", "".join(blocks[: scheme + 1]))
    colours: dict[str, tuple[float, ...]] = {
        name: tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) if value[0] == "#" else tuple(map(int, value.split()))
        for name, value in found
    }
    names = ["ink", "soft", *(name for name, value in found if value[0] != "#")]
    low = {
        (name, back): contrast(colours[name], colours[back]) for name in names for back in ("paper", "faint", "even-bg")
    }
    assert len(names) >= 12 and {pair: value for pair, value in low.items() if value < 4.5} == {}


@pytest.fixture
def driven(tmp_path: Path) -> Callable[[str, str], Any]:
    """What a script that may use the page of a text finds in it, in a headless browser without network."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")

    def run(page: str, script: str) -> Any:
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        frame = FRAME.replace("SCRIPT", script)
        (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
        options = (
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--timeout=20000"),
            *("--virtual-time-budget=6000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
        )
        url = (tmp_path / "frame.html").as_uri()
        done = subprocess.run([str(CHROMIUM), *options, url], capture_output=True, text=True, timeout=120, check=True)
        (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
        assert found, done.stdout[-2000:]
        return json.loads(Page(f"<p>{found}</p>").text[0])

    return run


def test_in_a_browser_the_features_are_shown_searched_filtered_and_walked_by_keyboard(
    driven: Callable[[str, str], Any],
) -> None:
    script = """
      const seen = { first: $("#shown h2").textContent, all: open(), status: $("#status").textContent };
      seen.bars = all("#shown svg rect").length;
      seen.on = all("#shown details[open] .on").map((x) => [x.textContent, x.style.getPropertyValue("--a")]);
      seen.link = $("#shown header a").href;
      seen.related = all("#shown ol a").map((a) => a.hash);
      seen.hidden = $(".controls").hidden;
      seen.requests = w.performance.getEntriesByType("resource").length;
      type("INSULTS"); seen.label = open();
      type("happy"); seen.token = open();
      type("nothing like it"); seen.none = $("#status").textContent;
      type(""); $("[data-emotion=anger]").click(); seen.anger = open();
      seen.pressed = $("[data-emotion=anger]").ariaPressed;
      seen.tab = all("#list a").map((a) => a.tabIndex);
      $("#search").focus(); press("ArrowDown"); seen.down = d.activeElement.hash;
      press("ArrowDown"); press("ArrowDown"); seen.end = d.activeElement.hash;
      d.activeElement.click(); await rest();
      seen.chosen = $("#shown h2").textContent; seen.focus = d.activeElement.tagName;
      seen.current = $("[aria-current]").hash;
      seen.bare = $("#shown").textContent.includes("No dashboard of this feature");
      const [previous, next] = all(".turn button"); seen.turns = [previous.disabled, next.disabled];
      previous.click(); await rest(); seen.back = $("#shown h2").textContent;
      $("#list a:not([tabindex='-1'])").focus(); press("ArrowUp"); seen.up = d.activeElement.id;
      return seen;"""
    seen = driven(page_of(), script)
    assert seen["first"] == "Feature 7" and seen["all"] == ["7", "12", "40"] and seen["status"] == "3 of 3 features"
    assert seen["bars"] == 6 and seen["on"] == [[" so", "0.25"], [" happy", "1"], ["Then", "0.5"]]
    assert seen["link"] == "https://www.neuronpedia.org/m/9-set/7" and seen["related"] == ["#feature-12"]
    assert seen["hidden"] is False and seen["requests"] == 0
    assert seen["label"] == ["12"] and seen["token"] == ["7", "12"] and seen["none"] == "No feature matches."
    assert seen["anger"] == ["12", "40"] and seen["pressed"] == "true" and seen["tab"] == [-1, 0, -1]
    assert (seen["down"], seen["end"]) == ("#feature-12", "#feature-40")
    assert (seen["chosen"], seen["focus"], seen["current"]) == ("Feature 40", "H2", "#feature-40") and seen["bare"]
    assert seen["turns"] == [False, True] and seen["back"] == "Feature 12" and seen["up"] == "search"


def test_in_a_browser_hostile_text_stays_text(driven: Callable[[str, str], Any]) -> None:
    script = """
      return {images: d.images.length, scripts: all("script").length, styles: all("style").length,
        handlers: all("*").flatMap((x) => x.getAttributeNames()).filter((name) => name.startsWith("on")),
        label: $("#shown .label-text").textContent, tokens: texts("#shown .logits section:first-child code"),
        text: $("#shown .reading").textContent, link: $("#shown header a").getAttribute("href"),
        emotions: all("#shown header .emotion").map((x) => [x.className, x.textContent]),
        requests: w.performance.getEntriesByType("resource").length};"""
    seen = driven(hostile_page(), script)
    assert (seen["images"], seen["scripts"], seen["styles"], seen["handlers"]) == (0, 2, 1, [])
    assert seen["label"] == printable(STORABLE) and seen["tokens"][1:3] == ["</script>", "<!--<script>"]
    assert seen["text"].startswith(printable(HOSTILE)) and "<!--<script>" in seen["text"]
    assert seen["link"] == 'https://example.org/"onclick="alert(1)' and seen["requests"] == 0
    assert [name for _, name in seen["emotions"]] == [printable(STORABLE), "__proto__"]
