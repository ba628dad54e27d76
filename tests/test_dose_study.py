import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import JOY
from test_dose_response import few_resamples  # noqa: F401
from test_steering_sweep import word_judge

from sae_emotion_plugin.activations import mean_norm
from sae_emotion_plugin.dose_study import DOSES, sweep_study
from sae_emotion_plugin.emotion_texts import openings, study_openings
from sae_emotion_plugin.generation.continuations import Continuation, Request, complete
from sae_emotion_plugin.sparse_codes import token_settings
from sae_emotion_plugin.steering_studies import sweep as steering_sweep

PROMPTS = ("he is such a", "w3 w4", "w9 is w7", "a w5", "he w8", "is w1 w2")


def study(model: Any, sae: Any, folder: Path | None = None, **options: Any) -> Any:
    settings = {"doses": (-0.5, 0.5), "seeds": (0, 1), "max_new_tokens": 5, "judges": [word_judge()], **options}
    return sweep_study(
        model, sae, {"joy": [JOY, 3], "fear": [9]}, prompts=PROMPTS, folder=folder, progress=False, **settings
    )


def test_an_interrupted_study_goes_on_to_the_very_same_file_and_page(
    bridge: Any, planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering_sweep, "BATCH_ROWS", 12)
    whole = study(bridge, planted_sae, tmp_path / "whole")
    calls: list[int] = []

    def interrupted(model: Any, sae: Any, requests: Sequence[Request], **options: Any) -> tuple[Continuation, ...]:
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(model, sae, requests, **options)

    monkeypatch.setattr(steering_sweep, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(bridge, planted_sae, tmp_path / "resumed")
    assert [one.name for one in (tmp_path / "resumed").iterdir()] == ["cells"]
    assert len(list((tmp_path / "resumed" / "cells").iterdir())) == 2
    again = study(bridge, planted_sae, tmp_path / "resumed")
    assert again.texts == whole.texts and again.response == whole.response
    for name in ("sweep.json", "sweep.html"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    data = json.loads((tmp_path / "whole" / "sweep.json").read_text(encoding="utf-8"))
    assert data["meta"]["features"] == {"joy": [JOY, 3], "fear": [9]} and data["meta"]["temperature"] == 0.7
    assert repr(whole) == repr(whole.response) and "<table>" in whole._repr_html_()


def test_a_dose_is_shared_among_the_features_and_measured_in_the_mean_norm(bridge: Any, planted_sae: Any) -> None:
    found = study(bridge, planted_sae)
    norm = mean_norm(bridge, PROMPTS, planted_sae.cfg.metadata.hook_name, **token_settings(planted_sae))
    assert found.response.meta["residual_norm"] == pytest.approx(norm)
    assert study(bridge, planted_sae, residual_norm=2.0).response.meta["residual_norm"] == 2.0
    assert {one.dose for one in found.texts} == {0.0, -0.5, 0.5}


def test_the_standard_design_has_nine_doses_of_both_signs_and_a_hundred_openings() -> None:
    assert len(DOSES) >= 9 and min(DOSES) < 0 < max(DOSES) and 0 not in DOSES and len(set(DOSES)) == len(DOSES)
    assert len(set(study_openings())) == 100 and not set(study_openings()) & set(openings("unpleasant"))
    assert study_openings("ko") == openings("all", "ko")


def test_an_emotion_without_features_is_refused(bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match="no features to steer 'joy' with"):
        sweep_study(bridge, planted_sae, {"joy": []})
