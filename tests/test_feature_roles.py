import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HOOK, JOY, VOCABULARY, WORDS, make_sae
from scipy import stats

from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.feature_roles.explanations import METHOD, explanation_type, explanations
from sae_emotion_plugin.feature_roles.roles import (
    FeatureRole,
    FeatureRoles,
    FiringToken,
    TokenChange,
    evidence_label,
    feature_roles,
    firing_tokens,
)
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.sparse_codes import SparseCodes, encode_texts

NORM = 4.0
PROMPTS = ("he is such a", "w3 w4", "w9 is w7 w6")
TEXTS = ["w1 w2 joy happy", "he is joy", "sad w3 joy w4", "w5 w6 w7 w8", "fear anger w9", "such a joy"] * 2
SCORES = FeatureScores(
    {},
    (
        FeatureScore("anger", JOY, 0.55, 0.5, 0.5, 0.5, 0.1, 0.1),
        FeatureScore("joy", JOY, 0.8612, 0.8349, 1e-9, 1e-7, 0.5, 0.1),
        FeatureScore("anger", 3, 0.6, None, 0.01, 0.0212, 0.5, 0.1),
    ),
)


@pytest.fixture(scope="module")
def codes(bridge: Any, planted_sae: Any) -> SparseCodes:
    return encode_texts(bridge, planted_sae, TEXTS, progress=False)


@pytest.fixture(scope="module")
def roles(bridge: Any, planted_sae: Any, codes: SparseCodes) -> FeatureRoles:
    fires = int(np.bincount(codes.features, minlength=64).argmax())
    return feature_roles(
        bridge, planted_sae, [JOY, 3, fires], codes=codes, scores=SCORES, prompts=PROMPTS, amount=0.8,
        residual_norm=NORM, top=4, max_new_tokens=5, progress=False,
    )  # fmt: skip


def next_token(model: Any, tokens: list[int], sae: Any, plan: SteeringPlan | None) -> torch.Tensor:
    with torch.no_grad():
        if plan is None:
            return model(torch.tensor([tokens]))[0, -1].double().softmax(-1)
        with steering(model, sae, plan):
            return model(torch.tensor([tokens]))[0, -1].double().softmax(-1)


def compared(model: Any, contexts: list[list[int]], sae: Any, plan: SteeringPlan, top: int) -> tuple[Any, ...]:
    before = torch.stack([next_token(model, one, sae, None) for one in contexts])
    after = torch.stack([next_token(model, one, sae, plan) for one in contexts])
    kl = float((after * (after / before).log()).sum(dim=-1).mean())
    means = [(word, float(before[:, place].mean()), float(after[:, place].mean())) for place, word in enumerate(WORDS)]
    raised = sorted(means, key=lambda one: -math.log((one[2] + 1e-4) / (one[1] + 1e-4)))
    lowered = raised[::-1]
    return raised[:top], lowered[:top], kl


def assert_same(changes: tuple[TokenChange, ...], expected: list[tuple[str, float, float]]) -> None:
    assert [one.token for one in changes] == [token for token, _, _ in expected]
    assert [(one.before, one.after) for one in changes] == [
        pytest.approx((before, after), abs=1e-6) for _, before, after in expected
    ]


def test_adding_changes_the_tokens_that_a_plain_loop_finds(bridge: Any, planted_sae: Any, roles: FeatureRoles) -> None:
    contexts = [[1, *(VOCABULARY[word] for word in prompt.split())] for prompt in PROMPTS]
    for role in roles.rows:
        plan = SteeringPlan.of({role.feature: 0.8}, planted_sae, residual_norm=NORM)
        raised, lowered, kl = compared(bridge, contexts, planted_sae, plan, 4)
        assert_same(role.raises, raised)
        assert_same(role.lowers, lowered)
        assert role.kl == pytest.approx(kl, abs=1e-5)


def test_removing_is_looked_at_where_the_feature_fires(
    bridge: Any, planted_sae: Any, codes: SparseCodes, roles: FeatureRoles
) -> None:
    role = roles.rows[2]
    fired = sorted(
        ((float(codes.matrix()[token, role.feature]), token) for token in range(codes.n_tokens)),
        key=lambda one: (-one[0], one[1]),
    )
    contexts = []
    for value, token in fired[:8]:
        assert value > 0
        start = int(np.flatnonzero(codes.text_index == codes.text_index[token])[0])
        contexts.append([1, *codes.token_ids[start : token + 1].tolist()])
    plan = SteeringPlan.of({role.feature: 0.0}, planted_sae, residual_norm=NORM, mode="clamp")
    raised, lowered, kl = compared(bridge, contexts, planted_sae, plan, 4)
    assert role.removal_kl == pytest.approx(kl, abs=1e-5) and kl > 1e-4
    assert_same(role.removal_raises, raised)
    assert_same(role.removal_lowers, lowered)
    assert role.n_firings == int((codes.features == role.feature).sum())


def test_a_feature_that_writes_a_word_promotes_it(hooked_transformer: Any) -> None:
    sae = make_sae(hook_name="blocks.1.hook_resid_post")
    unembedding = hooked_transformer.unembed.W_U.detach()
    with torch.no_grad():
        sae.W_dec[5] = unembedding[:, VOCABULARY["joy"]] - unembedding.mean(dim=1)
    role = feature_roles(hooked_transformer, sae, [5], prompts=PROMPTS, amount=3, examples=0, progress=False).rows[0]
    assert role.raises[0].token == "joy" and role.raises[0].after > 0.5 > role.raises[0].before
    assert role.label.startswith("promotes: joy")
    assert (role.fires_on, role.n_firings, role.removal_kl, role.examples, role.emotion) == ((), None, None, (), None)


def test_what_a_feature_fires_on_is_what_its_strongest_activations_have_more_of() -> None:
    corpus = Counter({"joy": 10, "the": 100, "smile": 4, "rare": 2, "often": 84})
    strongest = Counter({"joy": 8, "the": 9, "smile": 2, "rare": 1})
    found = firing_tokens(strongest, corpus)
    assert [one.token for one in found] == ["joy", "smile"]  # "the" is as common elsewhere, "rare" was seen once
    assert found[0] == FiringToken("joy", 8, 0.4, 0.05)

    def g(token: str) -> float:
        inside, outside = strongest[token], corpus[token] - strongest[token]
        table = [[inside, outside], [20 - inside, 180 - outside]]
        result: Any = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
        return float(result.statistic)

    assert g("joy") > g("smile")
    assert firing_tokens(Counter(), corpus) == ()
    assert firing_tokens(corpus, corpus) == ()  # everything is strongest: nothing stands out


def test_a_planted_feature_fires_on_its_word(bridge: Any, codes: SparseCodes) -> None:
    joy = VOCABULARY["joy"]
    rows = [[JOY, 2] if token == joy else [2] for token in codes.token_ids.tolist()]
    planted = replace(
        codes,
        values=np.array([5.0 if one == JOY else 1.0 for row in rows for one in row], np.float32),
        features=np.array([one for row in rows for one in row], np.int32),
        row_starts=np.r_[0, np.cumsum([len(row) for row in rows])].astype(np.int64),
    )
    roles = feature_roles(bridge, make_sae(), [JOY, 2, 9], codes=planted, prompts=PROMPTS, examples=0, progress=False)
    fires = {role.feature: role for role in roles.rows}
    assert [one.token for one in fires[JOY].fires_on] == ["joy"]
    assert "fires on: joy" in fires[JOY].label
    assert fires[9].n_firings == 0 and "fires on nothing in the corpus" in fires[9].label
    assert fires[9].removal_kl is None


def test_the_label_is_built_from_evidence_alone() -> None:
    role = FeatureRole(
        feature=7, label="", raises=tuple(TokenChange(one, 0.1, 0.2) for one in (" hate", "hate", "\n", " stupid")),
        lowers=(), kl=0.1, removal_raises=(), removal_lowers=(), removal_kl=None,
        fires_on=(FiringToken("idiot", 9, 0.5, 0.1),), n_firings=20, emotion="anger", auroc=0.8612,
        held_out_auroc=0.8349, q=1e-7, examples=(),
    )  # fmt: skip
    assert evidence_label(role) == (
        "promotes: hate, stupid; fires on: idiot; AUROC anger 0.86, held out 0.83, q < 0.001"
    )
    unsure = replace(role, raises=(TokenChange(" the", 0.2, 0.2),), fires_on=(), held_out_auroc=None, q=0.0212)
    assert evidence_label(unsure) == "AUROC anger 0.86, q = 0.021"
    nothing = replace(unsure, auroc=None, q=None)
    assert evidence_label(nothing) == "no evidence"


def test_the_best_emotion_of_a_feature_is_named(roles: FeatureRoles) -> None:
    joy, other, _ = roles.rows
    assert (joy.emotion, joy.auroc, joy.held_out_auroc, joy.q) == ("joy", 0.8612, 0.8349, 1e-7)
    assert "AUROC joy 0.86, held out 0.83, q < 0.001" in joy.label
    assert "AUROC anger 0.60, q = 0.021" in other.label


def test_examples_stand_beside_the_unsteered_text(bridge: Any, planted_sae: Any, roles: FeatureRoles) -> None:
    for role in roles.rows:
        plan = SteeringPlan.of({role.feature: 0.8}, planted_sae, residual_norm=NORM)
        assert [one.prompt for one in role.examples] == list(PROMPTS[:2])
        for one in role.examples:
            before, after = complete(
                bridge, planted_sae, [Request(one.prompt), Request(one.prompt, plan)], max_new_tokens=5, progress=False
            )
            assert (one.before, one.after) == (before.text, after.text)


def test_a_description_is_asked_for_with_the_whole_role(bridge: Any, planted_sae: Any) -> None:
    seen: list[FeatureRole] = []
    given: dict[str, Any] = {"prompts": PROMPTS, "examples": 0, "progress": False}
    found = feature_roles(
        bridge, planted_sae, [3, JOY], **given, describe=lambda role: seen.append(role) or f"feature {role.feature}"
    )
    assert [role.description for role in found.rows] == ["feature 3", f"feature {JOY}"]
    assert [role.label for role in seen] == [role.label for role in found.rows]
    assert "feature 3" in repr(found)


def test_explanations_have_the_fields_of_the_bulk_export(roles: FeatureRoles) -> None:
    when = "2026-01-02T03:04:05Z"
    rows = explanations(roles, "gemma-3-270m", "9-emotion-res-4k", "me", created_at=when)
    assert len({tuple(row) for row in rows}) == 1  # an import reads the first row's keys alone
    for row, role in zip(rows, roles.rows, strict=True):
        assert (row["modelId"], row["layer"], row["index"]) == ("gemma-3-270m", "9-emotion-res-4k", str(role.feature))
        assert row["description"] == role.label and row["typeName"] == METHOD
        assert row["explanationModelName"] is None and row["embedding"] is None and row["scoreV1"] == 0
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert len({row["id"] for row in rows}) == 3
    assert rows == explanations(roles, "gemma-3-270m", "9-emotion-res-4k", "me", created_at=when)
    assert explanation_type("me", "Me", created_at=when)["name"] == METHOD


def test_another_label_is_another_explanation_and_long_ones_are_cut(roles: FeatureRoles) -> None:
    changed = FeatureRoles({}, tuple(replace(role, description="x" * 600) for role in roles.rows))
    settings: dict[str, Any] = {"created_at": "2026-01-02", "type_name": None}
    before, after = (explanations(one, "m", "0-s", "me", **settings) for one in (roles, changed))
    assert {len(row["description"]) for row in after} == {512}
    assert not {row["id"] for row in before} & {row["id"] for row in after}
    assert after[0]["notes"] == roles.rows[0].label and after[0]["typeName"] is None


def test_roles_are_shown_and_saved(roles: FeatureRoles, tmp_path: Path) -> None:
    saved = json.loads(roles.save(tmp_path / "roles.json").read_text())
    assert saved["rows"][0] == json.loads(json.dumps(roles.rows[0].to_dict()))
    assert roles.rows[0].label in repr(roles) and "<table>" in roles._repr_html_()
    assert len(roles.to_pandas()) == 3
    assert all(math.isfinite(role.kl) and role.kl >= 0 for role in roles.rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features": []}, "no features"),
        ({"features": [64]}, "no feature 64"),
        ({"prompts": "he is"}, "not one string"),
        ({"prompts": []}, "no prompts"),
        ({"top": 0}, r"top \(0\)"),
        ({"examples": -1}, r"examples \(-1\)"),
    ],
)
def test_what_has_no_role_is_refused(bridge: Any, planted_sae: Any, change: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"features": [3], "prompts": PROMPTS, "progress": False, **change}
    with pytest.raises(ValueError, match=named):
        feature_roles(bridge, planted_sae, given.pop("features"), **given)


def test_codes_of_another_sae_are_refused(bridge: Any, planted_sae: Any, codes: SparseCodes) -> None:
    with pytest.raises(ValueError, match=f"codes have 65 features at {HOOK}, the SAE 64"):
        feature_roles(bridge, planted_sae, [3], codes=replace(codes, d_sae=65), prompts=PROMPTS, progress=False)
