import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import JOY, JOY_TOKEN, make_sae

from sae_emotion_plugin import SteeringPlan
from sae_emotion_plugin.discovery.tokens import promoted_tokens
from sae_emotion_plugin.generation.continuations import Continuation, Request, complete
from sae_emotion_plugin.judges.judge import Judge, Judgements
from sae_emotion_plugin.judges.masking import emotion_mask
from sae_emotion_plugin.steering_studies import sweep as steering_sweep
from sae_emotion_plugin.steering_studies.sweep import SweepText, Variant, score_texts, write_texts
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore, SweepScores
from sae_emotion_plugin.text_costs import is_degenerate

NORM = 4.0
PROMPTS = ("he is such a", "w3 w4", "w9 is w7")
DOSES = (-0.5, 0.5, 1.5)


def variant(sae: Any, feature: int = JOY, doses: Sequence[float] = DOSES, **options: Any) -> Variant:
    plans = tuple(SteeringPlan.of({feature: dose}, sae, residual_norm=NORM) for dose in doses)
    return Variant(options.pop("name", f"feature {feature}"), sae, plans, **options)


def word_judge(name: str = "words", emotions: tuple[str, ...] = ("joy", "fear"), has_valence: bool = True) -> Judge:
    """The share of words that are "joy", and of words with an odd number: simple enough to be done by hand."""

    def judge(texts: Sequence[str]) -> Judgements:
        joy, odd = (np.array([share(text, kind) for text in texts]) for kind in ("joy", "odd"))
        columns = np.stack([{"joy": joy, "fear": odd}[one] for one in emotions], axis=1)
        return Judgements(emotions, columns, joy - odd if has_valence else None)

    return Judge(name, "en", emotions, has_valence, "nothing", judge)


def share(text: str, kind: str) -> float:
    words = text.split()
    hits = [word == "joy" if kind == "joy" else word[1:].isdigit() and int(word[1:]) % 2 == 1 for word in words]
    return sum(hits) / max(1, len(words))


def written(
    model: Any, variants: Sequence[Variant], folder: Path | None = None, **options: Any
) -> tuple[SweepText, ...]:
    settings = {"seeds": (0, 1), "max_new_tokens": 6, "progress": False, **options}
    return write_texts(model, variants, PROMPTS, folder=folder, **settings)


def cells_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_text_is_the_one_its_plan_gives_alone_and_unsteered_ones_come_once(bridge: Any, planted_sae: Any) -> None:
    variants = [variant(planted_sae), variant(planted_sae, 3, doses=(1.0,))]
    texts = written(bridge, variants)
    assert len(texts) == (1 + 3 + 1) * len(PROMPTS) * 2
    assert [(one.variant, one.dose) for one in texts[:: len(PROMPTS) * 2]] == [
        ("", 0.0), ("feature 7", -0.5), ("feature 7", 0.5), ("feature 7", 1.5), ("feature 3", 1.0),
    ]  # fmt: skip
    plans = {(one.name, plan.amount): plan for one in variants for plan in one.plans}
    for one in texts[::2]:
        request = Request(one.prompt, plans.get((one.variant, one.dose)), 0.7, one.seed)
        (alone,) = complete(bridge, planted_sae, [request], max_new_tokens=6, progress=False)
        assert one.text == alone.text and one.degenerate == is_degenerate(alone.token_ids)
        assert one.nll == pytest.approx(alone.nll, abs=1e-5)
    assert len({one.text for one in texts}) > 12


def test_steering_towards_a_planted_word_writes_it_at_a_price(bridge: Any) -> None:
    sae = make_sae(hook_name="blocks.1.hook_resid_post")
    with torch.no_grad():
        sae.W_dec[JOY] = bridge.original_model.lm_head.weight[JOY_TOKEN]
    one = variant(sae, doses=(-3.0, 3.0), emotion="joy")
    texts = written(bridge, [one], seeds=range(6), max_new_tokens=8)
    scores = score_texts(bridge, [one], texts, judges=[word_judge()])
    (mean,) = scores.curve("feature 7", "words", "joy", masked=False).means()
    assert mean.effect > 0.3 and mean.perplexity_ratio > 1.2
    (masked,) = scores.curve("feature 7", "words", "joy").means()
    assert masked.effect == 0  # the word itself is blanked, and nothing else is joyful
    (away,) = scores.curve("feature 7", "words", "joy", masked=False, negative=True).means()
    assert away.effect <= 0 and away.dose == 3


def test_dictionaries_of_different_hooks_stand_in_one_sweep(bridge: Any, planted_sae: Any) -> None:
    later = make_sae(hook_name="blocks.1.hook_resid_post")
    texts = written(bridge, [variant(planted_sae, doses=(2.0,)), variant(later, doses=(2.0,), name="later")])
    both = [[one.text for one in texts if one.variant == name] for name in ("feature 7", "later")]
    assert both[0] != both[1] and len(both[0]) == len(both[1]) == 6


def test_one_plan_in_two_variants_is_carried_out_once(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(model: Any, sae: Any, requests: Sequence[Request], **options: Any) -> tuple[Continuation, ...]:
        asked.append(len(requests))
        return complete(model, sae, requests, **options)

    monkeypatch.setattr(steering_sweep, "complete", counted)
    texts = written(bridge, [variant(planted_sae), variant(planted_sae, name="again", emotion="joy")])
    assert asked == [6, 18]  # the unsteered ones, then the cells of one dictionary together
    first, again = ([(t.dose, t.text) for t in texts if t.variant == name] for name in ("feature 7", "again"))
    assert first == again
    monkeypatch.setattr(steering_sweep, "BATCH_ROWS", 12)
    asked.clear()
    smaller = written(bridge, [variant(planted_sae)])
    assert [one.text for one in smaller] == [one.text for one in texts[:24]]
    assert asked == [6, 12, 6]


def test_at_temperature_0_the_first_seed_alone_is_used(bridge: Any, planted_sae: Any) -> None:
    texts = written(bridge, [variant(planted_sae)], seeds=(4, 5, 6), temperature=0)
    assert {one.seed for one in texts} == {4} and len(texts) == 4 * len(PROMPTS)


def test_an_interrupted_sweep_keeps_its_cells_and_goes_on_to_the_same_files(
    bridge: Any, planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering_sweep, "BATCH_ROWS", 6)  # a cell a call
    variants = [variant(planted_sae), variant(planted_sae, 3)]
    whole = written(bridge, variants, tmp_path / "whole")
    calls: list[int] = []

    def interrupted(model: Any, sae: Any, requests: Sequence[Request], **options: Any) -> tuple[Continuation, ...]:
        calls.append(len(requests))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return complete(model, sae, requests, **options)

    monkeypatch.setattr(steering_sweep, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(bridge, variants, tmp_path / "resumed")
    kept = cells_of(tmp_path / "resumed")
    assert len(kept) == 3 and kept.items() <= cells_of(tmp_path / "whole").items()
    calls[:] = [0] * 10
    assert written(bridge, variants, tmp_path / "resumed") == whole
    assert len(calls) == 10 + 4
    assert cells_of(tmp_path / "resumed") == cells_of(tmp_path / "whole")
    assert written(bridge, variants, tmp_path / "resumed") == whole and len(calls) == 14


def test_a_cell_is_made_anew_when_anything_that_it_depends_on_changes(
    bridge: Any, learned_positions: Any, planted_sae: Any, tmp_path: Path
) -> None:
    one = [variant(planted_sae, doses=(0.5,))]
    written(bridge, one, tmp_path)
    seen = set(cells_of(tmp_path))
    assert len(seen) == 2
    unbound = replace(one[0].plans[0].unbound(), residual_norm=5.0)
    for run in (
        lambda: written(learned_positions, one, tmp_path),
        lambda: written(bridge, one, tmp_path, seeds=(0, 2)),
        lambda: written(bridge, one, tmp_path, max_new_tokens=5),
        lambda: written(bridge, one, tmp_path, temperature=0.8),
        lambda: write_texts(bridge, one, PROMPTS[:2], seeds=(0, 1), max_new_tokens=6, folder=tmp_path, progress=False),
    ):
        run()
        new = set(cells_of(tmp_path)) - seen
        assert len(new) == 2
        seen |= new
    # Neither another plan nor another dictionary changes the unsteered texts.
    written(bridge, [Variant("other norm", planted_sae, (unbound,))], tmp_path)
    other = make_sae(normalize_activations="layer_norm")
    written(bridge, [Variant("other dictionary", other, (unbound,))], tmp_path)
    assert len(set(cells_of(tmp_path)) - seen) == 2


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"made_of": {}, "rows": []}', "half", "rows", "other"])
def test_a_damaged_cell_is_made_anew(
    bridge: Any, planted_sae: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = [variant(planted_sae, doses=(0.5,))]
    texts = written(bridge, one, tmp_path)
    good = cells_of(tmp_path)
    path = tmp_path / max(good)
    data = json.loads(path.read_text(encoding="utf-8"))
    if damage == "half":
        path.write_bytes(good[path.name][:100])
    elif damage == "rows":
        path.write_text(json.dumps({**data, "rows": data["rows"][1:]}), encoding="utf-8")
    elif damage == "other":
        path.write_text(json.dumps({**data, "made_of": {**data["made_of"], "temperature": 9}}), encoding="utf-8")
    else:
        path.write_text(damage, encoding="utf-8")
    assert written(bridge, one, tmp_path) == texts
    assert cells_of(tmp_path) == good and "is damaged and is made anew" in caplog.text


def test_changes_are_those_done_by_hand_plain_and_masked(bridge: Any, planted_sae: Any) -> None:
    variants = [variant(planted_sae, emotion="joy"), variant(planted_sae, 3, blanked=("w1", "w33"))]
    texts = written(bridge, variants)
    scores = score_texts(bridge, variants, texts, judges=[word_judge(), word_judge("joyless", ("fear",), False)])
    assert len(scores.rows) == 2 * 18 * 3 + 2 * 18
    given, promoted = (
        emotion_mask(one) for one in (("w1", "w33"), promoted_tokens(bridge, planted_sae, [JOY], 50)[JOY])
    )
    base = {(one.prompt, one.seed): one for one in texts if not one.variant}
    of = {(one.variant, one.dose, one.prompt, one.seed): one for one in texts}
    for row in scores.rows:
        steered, before = of[row.variant, row.dose, row.prompt, row.seed], base[row.prompt, row.seed]
        assert steered.text.strip() and before.text.strip() and None not in (steered.nll, before.nll)
        if row.variant == "feature 7" and row.dose < 0:
            continue
        mask = given if row.variant == "feature 3" else promoted
        for masked, change in ((False, row.change), (True, row.masked_change)):
            one, other = (mask(text) if masked else text for text in (steered.text, before.text))
            parts = {kind: share(one, kind) - share(other, kind) for kind in ("joy", "odd")}
            wanted = {"joy": parts["joy"], "fear": parts["odd"], "valence": parts["joy"] - parts["odd"]}[row.measure]
            assert change == pytest.approx(wanted, abs=1e-12)
        assert row.log_perplexity_ratio == pytest.approx(steered.nll - before.nll)  # type: ignore[operator]
        assert (row.degenerate, row.baseline_degenerate) == (steered.degenerate, before.degenerate)


def test_a_negative_dose_blanks_what_it_promotes_too(bridge: Any, planted_sae: Any) -> None:
    one = variant(planted_sae)
    masks = steering_sweep._masks(bridge, [one])
    up, down = masks[one.name, 0.5], masks[one.name, -0.5]
    assert up is masks[one.name, 1.5] and set(up.tokens) < set(down.tokens) and len(up.tokens) == 50


def row(dose: float, change: float | None = 0.5, cost: float | None = 0.1, **options: Any) -> SweepScore:
    base = SweepScore("v", dose, "a", 0, "words", "joy", change, change, cost, False, False)
    return replace(base, **options)


def scores_of(*rows: SweepScore) -> SweepScores:
    return SweepScores({}, rows)


def test_a_curve_is_of_one_sign_and_turned_the_wanted_way() -> None:
    scores = scores_of(row(0.1, 0.2), row(0.2, 0.4, math.log(2)), row(-0.1, -0.3), row(0.1, 9.0, measure="fear"))
    curve = scores.curve("v", "words", "joy")
    assert curve.method == "v" and curve.doses == (0.1, 0.2)
    assert [point.effect for point in curve.points] == [0.2, 0.4]
    assert curve.points[1].perplexity_ratio == pytest.approx(2)
    (point,) = scores.curve("v", "words", "joy", sign=-1, negative=True).points
    assert (point.dose, point.effect) == (0.1, 0.3)
    (point,) = scores.curve("v", "words", "fear", prompts=["a"]).points
    assert point.effect == 9.0


def test_a_curve_leaves_out_what_cannot_be_judged_and_counts_it() -> None:
    scores = scores_of(row(0.1), row(0.1, None, prompt="b"), row(0.1, 0.7, None, prompt="c"))
    curve = scores.curve("v", "words", "joy")
    assert curve.left_out == 2 and curve.means()[0].effect == 0.5
    plain = scores_of(row(0.1, masked_change=0.1)).curve("v", "words", "joy", masked=False)
    assert plain.points[0].effect == 0.5


def test_a_curve_that_there_is_not_is_refused_with_the_valid_names() -> None:
    scores = scores_of(row(0.1))
    with pytest.raises(ValueError, match=r"no scores of the variant 'w' .*v"):
        scores.curve("w", "words", "joy")
    with pytest.raises(ValueError, match=r"no scores of the judge 'x' .*words"):
        scores.curve("v", "x", "joy")
    with pytest.raises(ValueError, match=r"no scores of the measure 'fear' .*joy"):
        scores.curve("v", "words", "fear")
    with pytest.raises(ValueError, match="no scored texts at a dose below 0"):
        scores.curve("v", "words", "joy", negative=True)
    with pytest.raises(ValueError, match="no scored texts at a dose above 0"):
        scores.curve("v", "words", "joy", prompts=["z"])
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 2"):
        scores.curve("v", "words", "joy", sign=2)
    with pytest.raises(ValueError, match=r"no scores of the variant 'v' .*none"):
        scores_of().curve("v", "words", "joy")
    mixed = scores_of(row(0.1), row(0.1, judge="other", measure="fear"))
    with pytest.raises(ValueError, match="'other' was not asked for 'joy'"):
        mixed.curve("v", "other", "joy")


def test_empty_texts_are_not_judged(bridge: Any, planted_sae: Any) -> None:
    one = variant(planted_sae, doses=(0.5,))
    texts = [
        SweepText("", 0.0, "a", 0, "w1", 1.0, False), SweepText("feature 7", 0.5, "a", 0, "  ", 2.0, False),
        SweepText("", 0.0, "b", 0, "", None, False), SweepText("feature 7", 0.5, "b", 0, "joy", 2.0, True),
        SweepText("", 0.0, "c", 0, "w1", 1.0, True), SweepText("feature 7", 0.5, "c", 0, "joy w2", 1.5, False),
    ]  # fmt: skip
    scores = score_texts(bridge, [one], texts, judges=[word_judge()], emotions=["joy"])
    rows = {one.prompt: one for one in scores.rows if one.measure == "joy"}
    assert {one.measure for one in scores.rows} == {"joy", "valence"}
    assert (rows["a"].change, rows["a"].masked_change, rows["a"].log_perplexity_ratio) == (None, None, 1.0)
    assert (rows["b"].change, rows["b"].log_perplexity_ratio, rows["b"].degenerate) == (None, None, True)
    assert (rows["c"].change, rows["c"].log_perplexity_ratio, rows["c"].baseline_degenerate) == (0.5, 0.5, True)
    blank = score_texts(bridge, [one], texts[:4], judges=[word_judge()])
    assert all(one.change is None for one in blank.rows)


def test_scores_are_shown_and_kept(tmp_path: Path) -> None:
    scores = scores_of(row(0.1), row(0.1, None, None, prompt="<script>", variant="<b>"))
    text = repr(scores)
    assert "2 rows, 2 of 2 cells shown" in text and "+0.500" in text and "x1.11" in text
    assert "<b>" not in scores._repr_html_()
    data = json.loads(scores.save(tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert data["rows"][1]["change"] is None and len(scores.to_pandas()) == 2
    many = scores_of(*(row(0.01 * n) for n in range(1, 100)))
    assert "40 of 99 cells shown" in repr(many)


def test_bad_variants_are_refused(planted_sae: Any) -> None:
    plan = SteeringPlan.of({JOY: 0.5}, planted_sae, residual_norm=NORM)
    with pytest.raises(ValueError, match="needs a name"):
        Variant("", planted_sae, (plan,))
    with pytest.raises(ValueError, match="'v' has no plans"):
        Variant("v", planted_sae, ())
    with pytest.raises(ValueError, match=r"two plans of dose 0.5"):
        Variant("v", planted_sae, (plan, plan))
    with pytest.raises(ValueError, match="a plan of dose 0"):
        Variant("v", planted_sae, (plan.scaled(0),))


def test_bad_sweeps_are_refused_before_anything_is_written(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    one = variant(planted_sae)

    def refused(match: str, variants: Sequence[Variant], prompts: Any = PROMPTS, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            write_texts(bridge, variants, prompts, folder=tmp_path / "none", progress=False, **options)

    refused("no variants", [])
    refused("no prompts", [one], [])
    refused("no seeds", [one], seeds=())
    refused("not one string", [one], "he is")
    refused("the prompt 'w1' stands twice", [one], ["w1", "w1"])
    refused("the seed 3 stands twice", [one], seeds=(3, 3))
    refused("the variant 'feature 7' stands twice", [one, one])
    refused("made for the dictionary", [Variant("v", make_sae("layer_norm"), one.plans)])
    bare = make_sae()
    bare.cfg.metadata.prepend_bos = False
    refused("no unsteered text fits both", [one, variant(bare, name="bare")])
    assert not (tmp_path / "none").exists()
    refused("is empty", [one], [" "])
    refused("fit the model's context", [one], ["w1 " * 80])


def test_bad_texts_and_judges_are_refused(bridge: Any, planted_sae: Any) -> None:
    one = variant(planted_sae, doses=(0.5,))
    base, steered = SweepText("", 0.0, "a", 0, "w1", 1.0, False), SweepText("feature 7", 0.5, "a", 0, "w2", 1.0, False)

    def refused(match: str, texts: Sequence[SweepText], judges: Sequence[Judge], **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            score_texts(bridge, [one], texts, judges=judges, **options)

    refused("no steered texts among 1", [base], [word_judge()])
    refused("no unsteered text of 'a' with seed 0", [steered], [word_judge()])
    refused("no variant 'feature 7' with the dose 0.7", [base, replace(steered, dose=0.7)], [word_judge()])
    refused("0 judges", [base, steered], [])
    refused("2 judges, with 1 names", [base, steered], [word_judge(), word_judge()])
    refused("no judge knows 'surprise'", [base, steered], [word_judge()], emotions=["joy", "surprise"])
    refused("nothing to ask", [base, steered], [word_judge(has_valence=False)], emotions=["surprise"])
