import json
import math
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GENERATION, JOY

from sae_emotion_plugin.activations import tokenize
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.generation.likelihoods import mean_kl
from sae_emotion_plugin.generation.records import Generation, summary
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.steering_studies.amounts import Cell, run_cells
from sae_emotion_plugin.steering_studies.costs import (
    SteeringCost,
    SteeringCosts,
    continuation_costs,
    steering_costs,
)

NEUTRAL = ("w1 w2 w3 w4", "w9 w8 such a", "he is")
ROW = replace(GENERATION, baseline_text=" one two three four five", text=" no no no no no no no", degenerate=True)


def plan_of(sae: Any, *amounts: float, mode: Any = "add") -> SteeringPlan:
    return SteeringPlan.of({JOY + i: amount for i, amount in enumerate(amounts)}, sae, residual_norm=5.0, mode=mode)


@pytest.fixture(scope="module")
def made(bridge: Any, planted_sae: Any) -> tuple[tuple[Generation, ...], tuple[SteeringPlan, ...]]:
    plans = (plan_of(planted_sae, 0.8), plan_of(planted_sae, 0.2), plan_of(planted_sae, 0.0))
    prompts = ("he is such a", "w3 w4 w5")
    cells = [Cell("joy", plans, prompts, "report", 1.0, (0, 1)), Cell("joy", plans[:1], prompts, "choose", 0.0)]
    return run_cells(bridge, planted_sae, cells, max_new_tokens=8, progress=False), plans


def test_the_table_holds_the_same_numbers_as_plain_loops(bridge: Any, planted_sae: Any, made: Any) -> None:
    rows, plans = made
    costs = steering_costs(bridge, planted_sae, rows, plans, neutral_texts=NEUTRAL, progress=False)
    report = [row for row in costs.rows if row.part == "report"]
    assert [(row.part, row.temperature, row.amount) for row in costs.rows] == [
        ("choose", 0.0, 0.8),
        *(("report", 1.0, amount) for amount in (0.0, 0.2, 0.8)),
    ]
    for cost in report:
        mine = [row for row in rows if row.part == "report" and row.amount == cost.amount]
        done = summary(mine)
        assert (cost.n_rows, cost.n_prompts) == (done.n_rows, done.n_prompts) == (4, 2)
        assert cost.perplexity_ratio == done.perplexity_ratio
        assert cost.degenerate_share == done.degenerate_share
        assert cost.baseline_degenerate_share == done.baseline_degenerate_share
        for prefix in ("", "baseline_"):
            words = [(row.baseline_text if prefix else row.text).split() for row in mine]  # a token each, here
            bigrams = [list(zip(text, text[1:])) for text in words]  # noqa: B905, RUF007
            four_grams = [list(zip(text, text[1:], text[2:], text[3:])) for text in words]  # noqa: B905
            got = {name: getattr(cost, prefix + name) for name in ("distinct_2", "repetition", "length", "words")}
            assert got["distinct_2"] == pytest.approx(np.mean([len(set(pairs)) / len(pairs) for pairs in bigrams]))
            assert got["repetition"] == pytest.approx(np.mean([1 - len(set(some)) / len(some) for some in four_grams]))
            assert got["length"] == pytest.approx(np.mean([len(text) for text in words]))
        assert cost.baseline_perplexity == pytest.approx(_perplexity(mine))
    windows = tokenize(bridge, NEUTRAL)
    expected = mean_kl(bridge, windows, [partial(steering, bridge, planted_sae, plan) for plan in plans])
    assert [row.mean_kl for row in report] == expected[::-1]
    assert expected[2] == 0 < expected[1] < expected[0]
    assert costs.rows[0].mean_kl == expected[0]
    assert costs.meta == {"counted_in": "tokens", "model": {"name": "unknown"}, "kl_texts": 3, "kl_tokens": 10}


def _perplexity(rows: list[Generation]) -> float:
    of_prompt = {row.prompt: [one.baseline_nll for one in rows if one.prompt == row.prompt] for row in rows}
    means: list[Any] = [np.mean(np.array(values, dtype=float)) for values in of_prompt.values()]
    return float(np.exp(np.mean(means)))


def test_a_plan_that_changes_nothing_costs_nothing(bridge: Any, planted_sae: Any, made: Any) -> None:
    rows, plans = made
    zero = [row for row in rows if row.amount == 0]
    (cost,) = steering_costs(bridge, planted_sae, zero, plans, neutral_texts=NEUTRAL, progress=False).rows
    assert (cost.mean_kl, cost.perplexity_ratio, cost.length_ratio) == (0, 1, 1)
    for name in ("repetition", "degenerate_share", "distinct_2", "length", "words", "language_switch", "empty_share"):
        assert getattr(cost, name) == getattr(cost, f"baseline_{name}")


def test_the_neutral_sentences_of_the_bundled_corpus_are_the_default(
    bridge: Any, planted_sae: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def tokenized(model: Any, texts: Any, **settings: Any) -> Any:
        seen.append((texts, settings))
        return tokenize(model, NEUTRAL, **settings)

    monkeypatch.setattr("sae_emotion_plugin.steering_studies.costs.tokenize", tokenized)
    costs = steering_costs(bridge, planted_sae, *made, progress=False)
    ((texts, settings),) = seen
    neutral = [label == ("neutral",) for label in LabelledTexts.bundled("en").emotions]
    assert len(texts) == sum(neutral) == costs.meta["kl_texts"] >= 60
    assert settings == {"context_size": 32, "prepend_bos": True}


def test_without_a_model_words_are_counted_and_there_is_no_divergence() -> None:
    costs = continuation_costs([ROW, replace(ROW, prompt="you are", text=" Это so-so text", seed=2)])
    (cost,) = costs.rows
    assert costs.meta == {"counted_in": "words", "model": None, "kl_texts": None, "kl_tokens": None}
    assert cost.mean_kl is None
    assert cost.length == cost.words == (7 + 4) / 2 and cost.baseline_length == 5 and cost.length_ratio == 5.5 / 5
    assert cost.repetition == pytest.approx((3 / 4 + 0) / 2) and cost.baseline_repetition == 0
    assert cost.distinct_2 == pytest.approx((1 / 6 + 1) / 2) and cost.baseline_distinct_2 == 1
    assert cost.language_switch == pytest.approx((0 + 3 / 11) / 2) and cost.baseline_language_switch == 0
    assert cost.perplexity_ratio == pytest.approx(math.exp(0.5))
    assert cost.baseline_perplexity == pytest.approx(math.exp(2))
    assert cost.degenerate_share == 1 and cost.baseline_degenerate_share == 0


def test_a_tokenizer_alone_counts_tokens(word_tokenizer: Any) -> None:
    row = replace(ROW, text=" w1 , w2 ! w1 , w2", baseline_text=" w1 w2")
    costs = continuation_costs([row], word_tokenizer)
    assert costs.meta["counted_in"] == "tokens"
    assert (costs.rows[0].length, costs.rows[0].words, costs.rows[0].baseline_length) == (7, 4, 2)


def test_empty_continuations_are_counted_and_left_out_of_the_means_over_texts() -> None:
    empty = replace(ROW, prompt="you are", text=" \n", nll=None)
    (cost,) = continuation_costs([ROW, empty]).rows
    (alone,) = continuation_costs([ROW]).rows
    assert (cost.empty_share, cost.baseline_empty_share) == (0.5, 0)
    assert (cost.repetition, cost.distinct_2) == (alone.repetition, alone.distinct_2)
    assert cost.language_switch == alone.language_switch
    assert cost.perplexity_ratio == alone.perplexity_ratio
    assert cost.length == alone.length / 2 and cost.length_ratio == 3.5 / 5
    (nothing,) = continuation_costs([replace(empty, baseline_text="", baseline_nll=None)]).rows
    assert nothing.empty_share == nothing.baseline_empty_share == 1
    for name in ("repetition", "distinct_2", "language_switch", "length_ratio", "perplexity_ratio"):
        assert getattr(nothing, name) is None
    assert "-" in repr(SteeringCosts({}, (nothing,)))


def test_emotions_parts_temperatures_and_plans_have_rows_of_their_own() -> None:
    changes: list[dict[str, Any]] = [
        {"emotion": "joy"},
        {"part": "choose"},
        {"temperature": 0.0},
        {"features": (3,)},
        {"mode": "clamp"},
        {"unit": "raw"},
        {"amount": 0.2},
    ]
    rows = [ROW, *(replace(ROW, **change) for change in changes)]
    costs = continuation_costs(rows)
    assert len(costs.rows) == len(rows)
    assert continuation_costs(rows[::-1]) == costs


def test_rows_without_a_plan_and_plans_that_look_alike_are_refused(bridge: Any, planted_sae: Any, made: Any) -> None:
    rows, plans = made
    with pytest.raises(ValueError, match=r"no plan for add \+0.2 x features \(7,\) in residual_norm \(given: Steer"):
        steering_costs(bridge, planted_sae, rows, plans[:1], neutral_texts=NEUTRAL)
    with pytest.raises(ValueError, match="given: none"):
        steering_costs(bridge, planted_sae, rows, [], neutral_texts=NEUTRAL)
    alike = [plan_of(planted_sae, 0.1, 0.3), plan_of(planted_sae, 0.3, 0.1)]
    with pytest.raises(ValueError, match="the rows cannot tell SteeringPlan"):
        steering_costs(bridge, planted_sae, rows, [*plans, *alike], neutral_texts=NEUTRAL)


def test_what_cannot_be_measured_is_refused(bridge: Any, planted_sae: Any, made: Any) -> None:
    rows, plans = made
    with pytest.raises(ValueError, match="no generations to take the costs of"):
        continuation_costs([])
    with pytest.raises(ValueError, match="no generations"):
        steering_costs(bridge, planted_sae, [], plans, neutral_texts=NEUTRAL, progress=False)
    with pytest.raises(ValueError, match="must be a list of strings"):
        steering_costs(bridge, planted_sae, rows, plans, neutral_texts="he is")
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="no tokens to compare"):
            steering_costs(bridge, planted_sae, rows, plans, neutral_texts=nothing, progress=False)
    other = [replace(plan, hook_name="blocks.1.hook_resid_post") for plan in plans]
    with pytest.raises(ValueError, match=r"the plan steers blocks\.1"):
        steering_costs(bridge, planted_sae, rows, other, neutral_texts=NEUTRAL)


def test_saved_costs_are_read_back_as_they_were(tmp_path: Path) -> None:
    costs = continuation_costs([ROW, replace(ROW, emotion="슬픔", nll=None)])
    path = costs.save(tmp_path / "costs.json")
    assert SteeringCosts.load(path) == costs
    assert SteeringCosts.from_dict(costs.to_dict()) == costs
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(costs.to_dict()))
    assert [file.name for file in tmp_path.iterdir()] == ["costs.json"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        costs.save(tmp_path / "nowhere" / "costs.json")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("no json", "Expecting value"),
        ("[]", "JSON list, not an object"),
        ("{}", "not none"),
        ('{"meta": {}}', "not meta"),
        ('{"meta": {}, "rows": [{"emotion": "a"}]}', "lacks or adds amount"),
        ('{"meta": {}, "rows": [3]}', "int"),
        ("3", "JSON int, not an object"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=named) as error:
        SteeringCosts.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_table_shows_steered_beside_unsteered_and_escapes_html() -> None:
    costs = continuation_costs([replace(ROW, emotion="<b>anger</b>")])
    assert repr(costs).splitlines()[0] == ("SteeringCosts: 1 rows, counted in words, no KL; unsteered in parentheses")
    shown = repr(costs).splitlines()[2]
    for cell in ("add +0.1", "1 x 1 report, T 0.7", "x1.65 (7.39)", "0.750 (0.000)", "100.0% (0.0%)", "x1.40 (5.0)"):
        assert cell in shown
    assert "&lt;b&gt;anger" in costs._repr_html_() and "<b>" not in costs._repr_html_()
    assert list(costs.to_pandas().columns) == [field.name for field in fields(SteeringCost)]
    assert "KL in nats a token on 3 neutral texts (10 tokens)" in repr(
        SteeringCosts({"counted_in": "tokens", "kl_texts": 3, "kl_tokens": 10}, (replace(costs.rows[0], mean_kl=0.5),))
    )
