import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GENERATION

from sae_emotion_plugin.evidence.resampling import geometric_mean
from sae_emotion_plugin.generation.records import Generation, Generations, perplexity_ratio, summary

ROW = GENERATION
CONTRACT = [
    "prompt",
    "emotion",
    "features",
    "mode",
    "amount",
    "unit",
    "temperature",
    "seed",
    "part",
    "baseline_text",
    "text",
    "baseline_valence",
    "valence",
    "baseline_nll",
    "nll",
    "degenerate",
    "baseline_degenerate",
]


def rows(n_prompts: int = 6, seeds: int = 3) -> list[Generation]:
    rng = np.random.default_rng(0)
    return [
        replace(
            ROW,
            prompt=f"prompt {prompt}",
            seed=seed,
            valence=float(rng.uniform(-1, 0)),
            baseline_valence=float(rng.uniform(0, 1)),
            nll=float(rng.uniform(2, 4)),
            baseline_nll=float(rng.uniform(1, 3)),
            degenerate=bool(rng.random() < 0.5),
        )
        for prompt in range(n_prompts)
        for seed in range(seeds)
    ]


def test_a_file_of_generations_follows_the_contract_and_gives_the_same_rows_back(tmp_path: Path) -> None:
    path = tmp_path / "generations.json"
    before = Generations({"recommended": {"anger": 0.1}}, (ROW, replace(ROW, nll=None, text="슬픔 …")))
    assert before.save(path) == path
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["meta"] == {"recommended": {"anger": 0.1}}
    assert [list(row) for row in data["rows"]] == [CONTRACT, CONTRACT]
    assert Generations.load(path) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["generations.json"]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = Generations({}, (ROW,)).save(tmp_path / "generations.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        Generations({"amount": math.nan}, (ROW,)).save(path)
    assert Generations.load(path).rows == (ROW,)
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_into_a_missing_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Generations({}, (ROW,)).save(tmp_path / "nowhere" / "generations.json")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("no json", "Expecting value"),
        ("[]", "list indices"),
        ('{"meta": {}}', "rows"),
        ('{"meta": {}, "rows": [{"prompt": "a"}]}', "baseline_text"),
        ('{"meta": {}, "rows": [3]}', "int"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=named) as error:
        Generations.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_table_shows_before_and_after_and_escapes_html() -> None:
    shown = Generations({}, (ROW,))
    assert "before: nice guy" in repr(shown) and "after:  <b>terrible</b> man" in repr(shown)
    assert "&lt;b&gt;terrible" in shown._repr_html_() and "<b>" not in shown._repr_html_()
    assert list(shown.to_pandas().columns) == CONTRACT


def test_the_perplexity_ratio_is_a_geometric_mean_over_prompts_of_seed_averages() -> None:
    made = rows()

    def by_hand(prompt: str) -> float:
        mine = [row for row in made if row.prompt == prompt]
        steered: list[Any] = [row.nll for row in mine]
        baseline: list[Any] = [row.baseline_nll for row in mine]
        return float(np.exp(np.mean(steered)) / np.exp(np.mean(baseline)))

    expected = geometric_mean([by_hand(f"prompt {prompt}") for prompt in range(6)])
    assert perplexity_ratio(made) == pytest.approx(expected)
    # A prompt with more rows counts no more than the others.
    doubled = [*made, *(row for row in made if row.prompt == "prompt 0")]
    assert perplexity_ratio(doubled) == pytest.approx(expected)


def test_empty_continuations_are_left_out_of_the_perplexity_ratio() -> None:
    empty = replace(ROW, prompt="other", nll=None)
    assert perplexity_ratio([ROW, empty]) == pytest.approx(math.exp(0.5))
    assert perplexity_ratio([empty]) is None
    assert perplexity_ratio([]) is None


def test_a_summary_states_effect_interval_and_cost() -> None:
    made = rows()
    got = summary(made)
    changes = [row.valence - row.baseline_valence for row in made]
    assert got.valence_change == pytest.approx(np.mean(changes))
    assert got.low is not None and got.high is not None
    assert min(changes) < got.low < got.valence_change < got.high < max(changes)
    assert (got.n_rows, got.n_prompts) == (18, 6)
    assert got.degenerate_share == np.mean([row.degenerate for row in made])
    assert got.baseline_degenerate_share == 0
    assert got.perplexity_ratio == perplexity_ratio(made)
    assert summary(made) == got


def test_the_interval_treats_the_seeds_of_a_prompt_as_one_group() -> None:
    changes = {"a": 0.0, "b": -1.0, "c": -0.5}
    few = [replace(ROW, prompt=name, baseline_valence=0.0, valence=change) for name, change in changes.items()]
    many = [replace(row, seed=seed) for row in few for seed in range(50)]
    assert (summary(many).low, summary(many).high) == pytest.approx((summary(few).low, summary(few).high))


def test_one_prompt_has_no_interval_and_no_rows_have_no_summary() -> None:
    assert (summary([ROW]).low, summary([ROW]).high) == (None, None)
    with pytest.raises(ValueError, match="no generations"):
        summary([])
