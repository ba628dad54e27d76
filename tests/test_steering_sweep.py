import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import JOY, make_sae

from sae_emotion_plugin import SteeringPlan, steering_sweep
from sae_emotion_plugin.feature_tokens import promoted_tokens
from sae_emotion_plugin.generation import Request, complete
from sae_emotion_plugin.judges.judge import Judge, Judgements
from sae_emotion_plugin.judges.masking import emotion_mask
from sae_emotion_plugin.steering_sweep import SweepText, Variant, score_texts, write_texts
from sae_emotion_plugin.sweep_scores import SweepScore, SweepScores
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
        return Judgements(
            emotions, np.stack([joy, odd], axis=1)[:, : len(emotions)], joy - odd if has_valence else None
        )

    return Judge(name, "en", emotions, has_valence, "nothing", judge)


def share(text: str, kind: str) -> float:
    words = text.split()
    hits = [word == "joy" if kind == "joy" else word[1:].isdigit() and int(word[1:]) % 2 == 1 for word in words]
    return sum(hits) / max(1, len(words))


def test_smoke(bridge, planted_sae, tmp_path):
    vs = [variant(planted_sae, emotion="joy"), variant(planted_sae, 3, name="other")]
    texts = write_texts(bridge, vs, PROMPTS, seeds=(0, 1), max_new_tokens=6, folder=tmp_path, progress=False)
    assert len(texts) == (1 + 6) * 6
    scores = score_texts(bridge, vs, texts, judges=[word_judge()], emotions=["joy"])
    print(scores)
    assert len(scores.rows) == 36 * 2
    print(scores.curve("feature 7", "words", "joy"), scores.curve("feature 7", "words", "joy", negative=True))
    again = write_texts(bridge, vs, PROMPTS, seeds=(0, 1), max_new_tokens=6, folder=tmp_path, progress=False)
    assert again == texts
