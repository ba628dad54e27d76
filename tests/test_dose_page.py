"""The dose-response page: what is said of the doses, what is marked, what is escaped."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_charts import shapes
from test_dose_response import few_resamples, linear, planted, quadratic, together  # noqa: F401
from test_report import HOSTILE, Page

from sae_emotion_plugin.pages.dose import headline, render, sentence, write_dose_page
from sae_emotion_plugin.steering_studies.dose_response import ChosenDose, DoseResponse, dose_response
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScores


def response_of(scores: SweepScores) -> DoseResponse:
    return dose_response(scores, resamples=100)


def anger_too_dear() -> SweepScores:
    return planted(
        linear, lambda dose, prompt, seed: 4.0, variant="anger", emotion="anger", measure="anger", judges=("a", "b")
    )


@pytest.fixture(scope="module")
def response() -> DoseResponse:
    joy = planted(linear, variant="joy", judges=("words", "sentences"))
    return response_of(together(joy, anger_too_dear()))


def test_the_recommended_dose_is_marked_where_it_stands_on_the_axis(response: DoseResponse) -> None:
    page = render(response)
    figures = re.findall(r"<figure.*?</figure>", page, flags=re.S)
    assert len(figures) == 2
    joy, anger = figures
    assert "recommended <b>0.2</b>" in joy and "no dose recommended" in anger
    (marked,) = shapes(joy, "marked")
    ticks = {
        float(x): label
        for x, label in re.findall(r'<text class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)', joy)
    }
    places = {float(label.replace("−", "-")): x for x, label in ticks.items() if re.fullmatch(r"−?[\d.]+", label)}
    assert float(marked["x1"]) == pytest.approx(places[0.2], abs=0.1)
    assert not shapes(anger, "marked")


def test_every_dose_stands_in_the_curve_and_in_the_table_beside_the_unsteered_text(response: DoseResponse) -> None:
    joy = re.findall(r"<figure.*?</figure>", render(response), flags=re.S)[0]
    points = re.findall(r'<circle class="point main"', joy)
    assert len(points) == 3 * (5 + 1)  # three panels, with dose 0 between
    for dose in ("−0.2", "−0.1", "0.1", "0.2", "0.3"):
        assert f"<td>{dose}</td>" in joy
    assert "bound 1.5" in joy and "bound 5\u00a0%" in joy and len(re.findall(r'class="band main"', joy)) == 1


def test_what_was_found_and_what_not_is_said_in_plain_words(response: DoseResponse) -> None:
    page = render(response)
    assert headline(response).startswith("For 1 of 2 emotions (joy at 0.2) steering at the recommended dose")
    assert "No dose is recommended for anger." in headline(response) and headline(response) in page
    assert "To raise anger: no dose is recommended, because no dose keeps the bounds on the choosing half." in page
    assert "To lower joy: dose −0.2" in page and "which excludes 0 after correction" in page


def test_a_page_without_any_recommended_dose_says_so() -> None:
    page = render(response_of(anger_too_dear()))
    assert "For 0 of 1 emotion steering" in page and "No dose is recommended for anger." in page
    assert 'id="others"' not in page and "openings, 0 of them" not in page


def test_a_sentence_says_when_the_interval_holds_0_and_when_the_bounds_break() -> None:
    one = ChosenDose("joy", "v", "towards", "words", 0.1, None, 0.02, -0.01, 0.05, 0.95, False, 0.03, 1.62, 0.0, False)
    text = sentence(one)
    assert "+0.020 [−0.010, +0.050], which does not exclude 0" in text and "perplexity ratio 1.62" in text
    assert text.endswith("On the reported half it breaks the bounds.")
    assert sentence(replace(one, low=None, high=None, keeps_bounds=True)).endswith("at perplexity ratio 1.62.")


def test_openings_that_move_the_wrong_way_are_hollow_and_counted() -> None:
    def half(dose: float, prompt: str, seed: int) -> float:
        return dose * (-1.0 if int(prompt[-2:]) % 4 == 0 else 3.0)

    found = response_of(planted(half, noise=0.0))
    one = found.recommended("v")
    wrong = sum((value or 0) < 0 for value in one.prompt_changes)
    page = render(found)
    assert 0 < wrong == round((one.wrong_share or 0) * len(one.prompt_changes))
    assert f"Masked change of 10 openings, {wrong} of them the wrong way" in page


def test_what_else_moves_is_shown_for_every_measure(response: DoseResponse) -> None:
    table = re.findall(r'<section id="others">.*?</section>', render(response), flags=re.S)[0]
    row = next(row for row in response.main("joy") if row.dose == 0.2)
    cells = re.findall(r'<td class="([^"]*)"[^>]*>([^<]*)</td>', table)
    assert len(cells) == 2 and [style.endswith("own") for style, _ in cells] == [True, False]
    assert cells[0][1] == f"+{row.masked:.2f}" and row.others[0].measure == "fear"


def test_hostile_names_are_escaped_and_the_page_needs_no_network_and_no_script() -> None:
    scores = planted(linear, quadratic, judges=(HOSTILE, "b"), measure=HOSTILE, emotion=HOSTILE, variant=HOSTILE)
    scores = SweepScores({**scores.meta, "model": {HOSTILE: HOSTILE}, "prompts": [HOSTILE]}, scores.rows)
    page = render(response_of(scores), HOSTILE)
    assert HOSTILE not in page and "<script" not in page and "onerror" not in re.sub(r"&lt;.*?&gt;", "", page)
    read = Page(page)
    assert "alert(1)" in "".join(read.text) and not any(name.startswith("on") for _, own in read.tags for name in own)
    assert "https://" not in page and "default-src 'none'" in page


def test_the_same_results_give_the_same_page_written_whole(response: DoseResponse, tmp_path: Path) -> None:
    path = write_dose_page(tmp_path / "sweep.html", response)
    assert path.read_text(encoding="utf-8") == render(response)
    with pytest.raises(FileNotFoundError):
        write_dose_page(tmp_path / "none" / "sweep.html", response)
    assert [one.name for one in tmp_path.iterdir()] == ["sweep.html"]
