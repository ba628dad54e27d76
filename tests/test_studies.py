import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import HOOK, JOY, WORDS

from sae_emotion_plugin import SteeringPlan, steering
from sae_emotion_plugin.generation.continuations import Continuation, Request, complete
from sae_emotion_plugin.generation.records import Generation, Part
from sae_emotion_plugin.judges.judge import emotion_lexicon
from sae_emotion_plugin.steering_studies import amounts as studies
from sae_emotion_plugin.steering_studies.amounts import (
    Cell,
    DoseBounds,
    ScreenedFeature,
    dose_response,
    promising_features,
    recommend,
    run_cells,
    screen_features,
    shared_amounts,
    within,
)

NORM = 4.0
SIGNS = {"joy": 1, "anger": -1}


def row(
    emotion: str = "joy",
    amount: float = 0.1,
    change: float = 0.5,
    *,
    part: Part = "choose",
    temperature: float = 0.7,
    prompt: str = "he is",
    ratio: float = 1.0,
    degenerate: bool = False,
    baseline_degenerate: bool = False,
) -> Generation:
    return Generation(
        prompt=prompt,
        emotion=emotion,
        features=(7,),
        mode="add",
        amount=amount,
        unit="residual_norm",
        temperature=temperature,
        seed=0,
        part=part,
        baseline_text="w1",
        text="joy",
        baseline_valence=0.0,
        valence=change,
        baseline_nll=1.0,
        nll=1.0 + math.log(ratio),
        degenerate=degenerate,
        baseline_degenerate=baseline_degenerate,
    )


def test_the_amount_with_the_largest_change_in_its_direction_is_recommended() -> None:
    rows = [
        *(row("joy", amount, change) for amount, change in ((0.05, 0.1), (0.1, 0.4), (0.15, 0.3))),
        *(row("anger", amount, change) for amount, change in ((0.05, 0.9), (0.1, -0.2), (0.15, -0.6))),
    ]
    assert recommend(rows, SIGNS) == {"joy": 0.1, "anger": 0.15}
    assert recommend(reversed(rows), SIGNS) == {"joy": 0.1, "anger": 0.15}


def test_the_smaller_of_two_equal_amounts_is_recommended() -> None:
    assert recommend([row(amount=0.2), row(amount=0.1)], {"joy": 1}) == {"joy": 0.1}


def test_amounts_that_cost_too_much_are_not_recommended() -> None:
    rows = [
        row(amount=0.05, change=0.1),
        row(amount=0.1, change=0.8, ratio=1.71),
        row(amount=0.15, change=0.9, degenerate=True),
    ]
    assert recommend(rows, {"joy": 1}) == {"joy": 0.05}
    lenient = DoseBounds(perplexity_ratio=1.8, degenerate_excess=0.05)
    assert recommend(rows, {"joy": 1}, lenient) == {"joy": 0.1}
    assert recommend(rows, {"joy": 1}, DoseBounds(2.0, 1.0)) == {"joy": 0.15}


def test_rows_of_the_report_the_demonstration_and_greedy_ones_have_no_say() -> None:
    rows = [
        row(amount=0.1, change=0.2),
        row(amount=0.2, change=0.9, part="report"),
        row(amount=0.3, change=0.9, part="demo"),
        row(amount=0.4, change=0.9, temperature=0.0),
    ]
    assert recommend(rows, {"joy": 1}) == {"joy": 0.1}
    assert recommend(rows[1:], {"joy": 1}) == {"joy": None}


def test_nothing_is_recommended_where_nothing_qualifies() -> None:
    rows = [row("joy", 0.1, -0.3), row("joy", 0.2, 0.0), row("anger", 0.1, -0.5, ratio=9.0), row("fear", 0.1, 0.5)]
    assert recommend(rows, SIGNS) == {"joy": None, "anger": None}
    assert recommend([], SIGNS) == {"joy": None, "anger": None}


def test_a_cell_keeps_the_bounds_up_to_their_very_value() -> None:
    cells = dose_response(
        row(amount=0.1, prompt=f"he is {n}", degenerate=n < 2, baseline_degenerate=n < 1) for n in range(10)
    )
    cell = cells["joy", "choose", 0.1]
    assert cell.degenerate_share - cell.baseline_degenerate_share == pytest.approx(0.1)
    assert within(cell, DoseBounds(1.0, 0.1)) and not within(cell, DoseBounds(1.0, 0.09))
    assert not within(cell, DoseBounds(0.99, 0.1))


def test_a_cell_without_any_likelihood_is_never_within_bounds() -> None:
    silent = Generation(**{**vars(row()), "nll": None})
    (cell,) = dose_response([silent]).values()
    assert cell.perplexity_ratio is None and not within(cell, DoseBounds(1000.0, 1.0))


def test_dose_response_groups_by_emotion_part_and_amount() -> None:
    rows = [
        row("joy", 0.1, 0.2, prompt="a"),
        row("joy", 0.1, 0.6, prompt="b"),
        row("joy", 0.1, 0.9, part="report"),
        row("joy", 0.2, 0.3),
        row("anger", 0.1, -0.5),
        row("joy", 0.1, 0.8, temperature=0.0),
    ]
    sampled = dose_response(rows)
    assert list(sampled) == [
        ("anger", "choose", 0.1),
        ("joy", "choose", 0.1),
        ("joy", "choose", 0.2),
        ("joy", "report", 0.1),
    ]
    cell = sampled["joy", "choose", 0.1]
    assert cell.valence_change == pytest.approx(0.4) and (cell.n_rows, cell.n_prompts) == (2, 2)
    (greedy,) = dose_response(rows, sampled=False).items()
    assert greedy[0] == ("joy", "choose", 0.1) and greedy[1].valence_change == pytest.approx(0.8)


def test_an_amount_is_shared_equally_among_the_features(planted_sae: Any) -> None:
    plans = shared_amounts(planted_sae, [7, 3, 9], [0.06, 0.15], NORM)
    assert [plan.amount for plan in plans] == [0.06, 0.15]
    for plan, amount in zip(plans, (0.06, 0.15), strict=True):
        assert plan.features == (7, 3, 9) and plan.mode == "add"
        assert (plan.hook_name, plan.unit, plan.residual_norm) == (HOOK, "residual_norm", NORM)
        assert [one.amount for one in plan.interventions] == pytest.approx([amount / 3] * 3)


def plan_of(planted_sae: Any, feature: int, amount: float) -> SteeringPlan:
    return SteeringPlan.of({feature: amount}, planted_sae, residual_norm=NORM)


def cells_of(sae: Any) -> list[Cell]:
    plans = tuple(plan_of(sae, 7, amount) for amount in (0.5, 1.0))
    return [
        Cell("joy", plans, ("he is", "such a"), "choose", 0.7, (0, 1)),
        Cell("joy", plans[:1], ("he is",), "demo", 0.0),
        Cell("anger", (plan_of(sae, 9, 1.0),), ("such a",), "report", 0.7, (5,)),
    ]


def test_each_row_stands_beside_the_baseline_of_its_own_prompt_and_decoding(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def told(model: Any, sae: Any, requests: Sequence[Request], **options: Any) -> tuple[Continuation, ...]:
        """Continuations that say which request they belong to."""
        calls.append(options["max_new_tokens"])
        return tuple(
            Continuation(one, f"{one.prompt}|{one.temperature}|{one.seed}|{one.plan and one.plan.amount}", (), None)
            for one in requests
        )

    monkeypatch.setattr(studies, "complete", told)
    rows = run_cells(bridge, planted_sae, cells_of(planted_sae), max_new_tokens=9, progress=False)
    assert calls == [9]
    assert len(rows) == 2 * 2 * 2 + 1 + 1
    for one in rows:
        decoding = f"{one.prompt}|{one.temperature}|{one.seed}"
        assert one.text == f"{decoding}|{one.amount}" and one.baseline_text == f"{decoding}|None"
    assert [(one.emotion, one.part, one.features) for one in rows] == [
        *[("joy", "choose", (7,))] * 8,
        ("joy", "demo", (7,)),
        ("anger", "report", (9,)),
    ]
    assert {(one.amount, one.prompt, one.seed) for one in rows[:8]} == {
        (amount, prompt, seed) for amount in (0.5, 1.0) for prompt in ("he is", "such a") for seed in (0, 1)
    }


def test_the_rows_of_many_cells_equal_continuations_made_alone(bridge: Any, planted_sae: Any) -> None:
    cells = cells_of(planted_sae)
    rows = run_cells(bridge, planted_sae, cells, max_new_tokens=4, progress=False)
    plans = {(*plan.features, plan.amount): plan for cell in cells for plan in cell.plans}
    assert any(one.text != one.baseline_text for one in rows)
    for one in rows[::3]:
        request = Request(one.prompt, plans[(*one.features, one.amount)], one.temperature, one.seed)
        (alone,) = complete(bridge, planted_sae, [request], max_new_tokens=4, progress=False)
        unsteered = Request(one.prompt, None, one.temperature, one.seed)
        (baseline,) = complete(bridge, planted_sae, [unsteered], max_new_tokens=4, progress=False)
        assert (one.text, one.baseline_text) == (alone.text, baseline.text)
        assert one.nll == pytest.approx(alone.nll, abs=1e-4)
        assert one.baseline_nll == pytest.approx(baseline.nll, abs=1e-4)


def test_features_that_move_valence_most_in_their_direction_are_kept(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What each feature does to valence, alone, on either of two openings.
    effects = {
        "joy": {7: (0.2, 0.4), 3: (0.9, -0.9), 5: (-0.5, -0.5), 9: (0.4, 0.6)},
        "anger": {7: (0.2, 0.4), 4: (-0.4, -0.6)},
    }
    asked: dict[str, Any] = {}

    def made(model: Any, sae: Any, cells: Sequence[Cell], **options: Any) -> tuple[Generation, ...]:
        asked.update(options)
        return tuple(
            Generation(**{**vars(row(cell.emotion, 0.1, change, prompt=prompt)), "features": plan.features})
            for cell in cells
            for plan in cell.plans
            for prompt, change in zip(cell.prompts, effects[cell.emotion][plan.features[0]], strict=True)
        )

    monkeypatch.setattr(studies, "run_cells", made)
    cells = [
        Cell(emotion, tuple(plan_of(planted_sae, f, 0.1) for f in features), ("he is", "such a"), "choose", 0.7)
        for emotion, features in effects.items()
    ]
    kept, table = screen_features(bridge, planted_sae, cells, SIGNS, 2, max_new_tokens=3, progress=False)
    assert kept == {"joy": [9, 7], "anger": [4, 7]}
    assert [(one.emotion, one.feature) for one in table] == [
        *(("joy", feature) for feature in (7, 3, 5, 9)),
        *(("anger", feature) for feature in (7, 4)),
    ]
    assert [one.valence_change for one in table] == pytest.approx([0.3, 0.0, -0.5, 0.5, 0.3, -0.5])
    assert isinstance(table[0], ScreenedFeature) and table[0].degenerate_share == 0
    assert (asked["max_new_tokens"], asked["progress"]) == (3, False)


def test_no_cells_are_refused(bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match="no prompts to continue"):
        run_cells(bridge, planted_sae, [], progress=False)


def test_the_features_that_turn_the_next_tokens_valence_most_are_promising(bridge: Any, planted_sae: Any) -> None:
    features, prompts = (3, JOY, 11, 20), {"joy": ("he is such a", "w1 is"), "anger": ("w1 is",)}
    plans = tuple(SteeringPlan.of({feature: 1.0}, planted_sae, residual_norm=NORM) for feature in features)
    cells = [Cell(emotion, plans, openings, "choose", 0.7) for emotion, openings in prompts.items()]
    kept = promising_features(bridge, planted_sae, cells, SIGNS, 2, progress=False)

    lexicon = emotion_lexicon()
    values = torch.tensor([lexicon.get(word, 0.0) for word in WORDS])
    assert (values != 0).sum() >= 4
    for emotion, openings in prompts.items():
        moved = []
        for plan in plans:
            with torch.inference_mode(), steering(bridge, planted_sae, plan):
                tokens = [torch.tensor([[1, *map(WORDS.index, opening.split())]]) for opening in openings]
                moved.append(sum(float(bridge(each)[0, -1].softmax(-1) @ values) for each in tokens))
        by_valence = [feature for _, feature in sorted(zip(moved, features, strict=True))]
        assert kept[emotion] == (by_valence[::-1][:2] if SIGNS[emotion] > 0 else by_valence[:2])
