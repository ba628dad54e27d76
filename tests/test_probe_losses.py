"""One latent's logistic probe for each emotion, as a table: fitted on training texts, scored on held-out ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from planted_codes import codes_of, texts_of

from sae_emotion_plugin.discovery.probe_losses import LatentProbes, latent_probes

ALWAYS, OFTEN, NOISE = range(3)


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def world(n: int, seed: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Joy in a quarter of the texts, exactly where ALWAYS fires; OFTEN fires in 9 of 10 angry and 1 of 10 others."""
    joy, anger = np.arange(n) % 4 == 0, np.arange(n) % 2 == 1
    fires = np.where(anger, (np.arange(n) // 2) % 10 < 9, (np.arange(n) // 2) % 10 < 1)
    values = np.column_stack([2.0 * joy, 3.0 * fires, np.random.default_rng(seed).random(n)])
    names = [tuple(name for name, has in (("joy", j), ("anger", a)) if has) for j, a in zip(joy, anger, strict=True)]
    return values, names


@pytest.fixture(scope="module")
def found() -> LatentProbes:
    parts = [world(n, seed) for n, seed in ((400, 1), (200, 2))]
    codes, texts = zip(
        *((codes_of(values), texts_of(names, n)) for n, (values, names) in enumerate(parts)), strict=True
    )
    return latent_probes(codes[0], texts[0], codes[1], texts[1], emotions=("joy", "anger"))


def test_the_loss_is_that_of_the_closed_form(found: LatentProbes) -> None:
    joy, anger = found.rows
    assert (joy.emotion, joy.feature, anger.emotion, anger.feature) == ("joy", ALWAYS, "anger", OFTEN)
    assert joy.loss_ratio < 0.01 and joy.baseline_loss == pytest.approx(entropy(0.25))
    # A feature of two values: the probe says the share of the class on either side, 0.9 and 0.1.
    assert (anger.train_loss, anger.loss) == pytest.approx((entropy(0.1), entropy(0.1)), abs=1e-5)
    assert anger.baseline_loss == pytest.approx(entropy(0.5))
    assert anger.loss_ratio == pytest.approx(anger.loss / anger.baseline_loss)
    assert found.mean_loss_ratio == pytest.approx((joy.loss_ratio + anger.loss_ratio) / 2)


def test_the_table_names_the_mean_and_is_saved(found: LatentProbes, tmp_path: Path) -> None:
    assert f"alone {found.mean_loss_ratio:.3f}" in repr(found)
    saved = json.loads(found.save(tmp_path / "probes.json").read_text(encoding="utf-8"))
    assert [row["feature"] for row in saved["rows"]] == [ALWAYS, OFTEN]
    assert saved["meta"]["n_texts"] == {"train": 400, "held_out": 200}


def test_an_emotion_of_every_text_is_refused() -> None:
    values, _ = world(40, 1)
    texts = texts_of([("joy",)] * 40, 1)
    with pytest.raises(ValueError, match="single class"):
        latent_probes(codes_of(values), texts, codes_of(values), texts, emotions=("joy",))
