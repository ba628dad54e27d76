"""The page of a sweep: the answer in words, charts by expansion, laws or the reason why there is none."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_report import HOSTILE, Page
from test_training_sweeps import planted

from sae_emotion_plugin.pages.sweep import headline, render, write_sweep_page
from sae_emotion_plugin.training_sweeps.laws import scaling_laws, trends
from sae_emotion_plugin.training_sweeps.results import SweepCell, TrainingSweep

META = {"training_tokens": 200_000, "tokens_for_dead_features": 65_536, "hook_name": "blocks.9.hook_resid_post"}
ROWS = tuple(planted(expansion, k) for k in (16, 32) for expansion in (2, 3, 4, 6, 8, 12, 16))


def sweep_of(rows: tuple[SweepCell, ...]) -> TrainingSweep:
    return TrainingSweep(META, rows, scaling_laws(rows, 640), trends(rows))


@pytest.fixture(scope="module")
def sweep() -> TrainingSweep:
    return sweep_of(ROWS)


@pytest.fixture(scope="module")
def page(sweep: TrainingSweep) -> str:
    return render(sweep)


def test_each_sparsity_has_its_charts_with_expansions_below(page: str) -> None:
    figures = page.split("<figure")[1:]
    assert len(figures) == 2
    for figure, name in zip(figures, ("k 16", "k 32"), strict=True):
        assert f"<b>{name}</b>" in figure
        for tick in ("x2", "x3", "x16"):
            assert f">{tick}</text>" in figure
        assert 'class="line minor"' in figure  # predictions


def test_laws_stand_with_their_left_out_points_and_missing_ones_with_the_reason(page: str) -> None:
    assert "L(N), k 16 = e + a N^-b" in page and "N = 1.024e+04" in page
    assert "lr(N): no fit, it needs 4 widths" in page


def test_the_answer_is_given_in_words(sweep: TrainingSweep) -> None:
    text = headline(sweep)
    assert text.startswith(
        "14 trainings from x2 to x16. After 200,000 tokens the FVU is lowest at x16 with k 16, x16 with k 32. FVU per "
    )
    assert "AUROC per doubling: +0.010 [+0.010, +0.010], so it rises." in text and "so it falls" in text
    few = sweep_of(ROWS[:2])
    assert "too few for a trend" in headline(few) and "no law, see below" in render(few)


def test_diverged_trainings_are_counted_and_named(sweep: TrainingSweep) -> None:
    broken = replace(planted(2, 32, 9.0, fvu=None), note="training diverged at step 3")
    with_it = replace(sweep, rows=(*ROWS, broken))
    assert "15 trainings from x2 to x16, 1 of which diverged" in headline(with_it)
    assert "training diverged at step 3" in render(with_it)
    assert "No training ended well" in render(sweep_of((broken,)))


def test_the_page_is_whole_escaped_and_the_same_each_time(tmp_path: Path, sweep: TrainingSweep, page: str) -> None:
    assert render(sweep) == page
    hostile = replace(sweep, rows=(replace(ROWS[0], name=HOSTILE, note=HOSTILE), *ROWS[1:]))
    assert HOSTILE not in render(hostile)
    Page(page)
    assert write_sweep_page(tmp_path / "index.html", sweep).read_text(encoding="utf-8") == page
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_sweep_page(tmp_path / "none/index.html", sweep)
