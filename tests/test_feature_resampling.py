from typing import Any

import numpy as np
import pytest
import torch
from training_runs import BATCH, DATA, batches, training_sae

from sae_emotion_plugin.training.resampling import Resampling, resample
from sae_emotion_plugin.training.steps import StepSettings, Trainer

RARE = torch.arange(48) < 6


def prepared() -> tuple[Any, Trainer]:
    sae = training_sae("relu-l1")
    trainer = Trainer(sae, StepSettings(100, 1e-2, ema_decay=0.5))
    source = batches(0)
    for _ in range(5):
        trainer.step(next(source))
    return sae, trainer


def test_new_directions_are_inputs_drawn_by_their_squared_loss() -> None:
    sae, _ = prepared()
    inputs = DATA[:20].clone()
    with torch.no_grad():
        # Two inputs that are rebuilt badly, one twice as badly as the other: squared, 16 to 1.
        inputs[4], inputs[9] = torch.zeros(10), torch.zeros(10)
        inputs[4, 0], inputs[9, 1] = 2e3, 1e3
        losses = (sae(inputs) - inputs).square().sum(-1)
    share = float(losses[4] ** 2 / losses.square().sum())
    hits = 0
    for seed in range(300):
        copy = training_sae("relu-l1")
        copy.load_state_dict(sae.state_dict())
        resample(copy, torch.arange(48) < 1, "anthropic", inputs, np.random.default_rng(seed))
        expected = torch.nn.functional.normalize(inputs[4] - sae.b_dec, dim=-1)
        hits += bool(torch.allclose(copy.W_dec[0], expected, atol=1e-5))
    assert 0.8 < share < 0.99 and hits / 300 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(("kind", "length"), [("anthropic", 0.2), ("plain", 1.0)])
def test_rows_are_unit_encoders_in_line_and_biases_zero(kind: str, length: float) -> None:
    sae, _ = prepared()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    features = resample(sae, RARE, kind, DATA[:500], np.random.default_rng(0))
    assert features.tolist() == list(range(6))
    torch.testing.assert_close(sae.W_dec.data[:6].norm(dim=-1), torch.ones(6))
    mean = before["W_enc"][:, 6:].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc.data[:, :6].T, length * mean * sae.W_dec.data[:6])
    assert not sae.b_enc.data[:6].any() and before["b_enc"][:6].any()
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0)):
        kept = sae.state_dict()[name].narrow(axis, 6, 42)
        assert torch.equal(kept, before[name].narrow(axis, 6, 42))
    assert torch.equal(sae.b_dec.data, before["b_dec"])


def test_adam_forgets_the_features_and_no_others() -> None:
    sae, trainer = prepared()
    before = {name: {k: v.clone() for k, v in moments.items()} for name, moments in trainer.moments.items()}
    trainer.forget(resample(sae, RARE, "plain", DATA[:500], np.random.default_rng(0)))
    for name in ("W_enc", "W_dec", "b_enc"):
        for key in ("exp_avg", "exp_avg_sq"):
            assert before[name][key][:6].any() and not trainer.moments[name][key][:6].any()
            assert torch.equal(trainer.moments[name][key][6:], before[name][key][6:])
    assert torch.equal(trainer.moments["b_dec"]["exp_avg"], before["b_dec"]["exp_avg"])
    torch.testing.assert_close(trainer.averages["W_enc"][:6], sae.W_enc.data.T[:6])
    torch.testing.assert_close(trainer.averages["b_enc"][:6], torch.zeros(6))
    trainer.step(DATA[:BATCH])


def test_more_features_than_inputs_and_inputs_without_loss_are_no_trouble() -> None:
    for inputs in (DATA[:3], training_sae("relu-l1").b_dec.detach().expand(3, -1)):
        sae = training_sae("relu-l1")
        sae.b_enc.data -= 1e6  # rebuilds the bias alone
        assert len(resample(sae, RARE, "anthropic", inputs, np.random.default_rng(0))) == 6
        assert all(torch.isfinite(value).all() for value in sae.state_dict().values())
    assert len(resample(sae, torch.zeros(48, dtype=torch.bool), "plain", DATA[:9], np.random.default_rng(0))) == 0
    resample(sae, torch.ones(48, dtype=torch.bool), "plain", DATA[:9], np.random.default_rng(0))
    assert torch.isfinite(sae.W_enc).all()


def test_resampling_is_due_every_so_often_until_as_long_before_the_end() -> None:
    plan = Resampling("plain", 10)
    assert [step for step in range(101) if plan.is_due(step, 100)] == list(range(10, 91, 10))
