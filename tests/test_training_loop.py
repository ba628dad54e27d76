import itertools
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs
from sae_lens import TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from training_runs import BATCH, D_SAE, DATA, RESAMPLED, SETTINGS, STEPS, batches, run, training_sae

from sae_emotion_plugin.training import loop
from sae_emotion_plugin.training.checkpoints import Checkpoints
from sae_emotion_plugin.training.loop import FiniteBatches, LoopSettings, fit
from sae_emotion_plugin.training.steps import StepSettings, Trainer, TrainingDiverged

KINDS = ["topk", "openai-topk", "relu-l1", "batchtopk", "jumprelu"]
pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal(ours: Any, theirs: Any) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_learns_and_its_figures_are_logged(kind: str, tmp_path: Path) -> None:
    sae, training = run(kind, tmp_path)
    assert [point["step"] for point in training.curve] == [1, 10, 20, 30, 36]
    first, last = training.curve[0], training.curve[-1]
    assert last["mse_loss"] < 0.8 * first["mse_loss"] and last["fvu"] < first["fvu"]
    assert last["tokens"] == training.tokens == STEPS * BATCH and last["l0"] > 0
    assert last["cosine_random"] == pytest.approx(math.sqrt(2 / (math.pi * 10)))
    assert 0 <= last["dead"] <= 1 and training.bad_tokens == 0
    lines = (tmp_path / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == training.curve
    if kind in ("openai-topk", "relu-l1"):
        torch.testing.assert_close(sae.W_dec.data.norm(dim=-1), torch.ones(D_SAE))


def test_what_is_dead_is_not_known_before_the_window_is_over(tmp_path: Path) -> None:
    settings = replace(SETTINGS, log_steps=1)
    _, training = run("topk", tmp_path / "usual", settings)
    assert [point["dead"] is None for point in training.curve] == [True] * 5 + [False] * (STEPS - 5)
    short = replace(SETTINGS, step=replace(SETTINGS.step, dead_token_window=STEPS * BATCH + 1))
    _, training = run("topk", tmp_path / "short", short)
    assert training.dead is None and training.curve[-1]["dead"] is None


def test_training_leaves_torchs_global_generator_alone(tmp_path: Path) -> None:
    sae = training_sae("openai-topk")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    fit(sae, batches, SETTINGS, tmp_path, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


class Stop(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_interrupted_anywhere_ends_with_equal_weights(kind: str, tmp_path: Path) -> None:
    whole, expected = run(kind, tmp_path / "whole")
    whole_step = Trainer.step
    for stop in (6, 20):
        folder, left = tmp_path / str(stop), iter(range(stop))

        def step(self: Trainer, batch: torch.Tensor, left: Iterator[int] = left) -> Any:
            if next(left, None) is None:
                raise Stop
            return whole_step(self, batch)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(Trainer, "step", step)
            run(kind, folder)
        torch.manual_seed(stop)
        resumed, training = run(kind, folder)
        assert training.resumed_at_step == stop // 7 * 7
        assert_equal(resumed, whole)
        assert replace(training, resumed_at_step=0) == expected
        assert (folder / "curve.jsonl").read_text() == (tmp_path / "whole" / "curve.jsonl").read_text()


@pytest.mark.parametrize(("kind", "step"), [("openai-topk", 25), ("relu-l1", 14)])
def test_a_process_that_was_killed_goes_on_to_the_same_bits(kind: str, step: int, tmp_path: Path) -> None:
    command = [sys.executable, training_runs.__file__, kind]
    killed = subprocess.run([*command, tmp_path / "killed", str(step)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Checkpoints(tmp_path / "killed").paths()
    for folder in ("killed", "whole"):
        run(kind, tmp_path / folder)
    names = [path.name for path in Checkpoints(tmp_path / "whole").paths()]
    assert names[-1] == "step-000000036.safetensors"
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "killed" / "curve.jsonl").read_text() == (tmp_path / "whole" / "curve.jsonl").read_text()


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_the_steps_are_those_of_sae_lens_s_trainer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    ours, theirs = training_sae(kind), training_sae(kind)
    if kind == "topk":
        plain = TopKTrainingSAE(theirs.cfg)
        plain.load_state_dict(theirs.state_dict())
        theirs = plain
    source = batches(0)
    given = [next(source) for _ in range(20)]
    trainer = Trainer(ours, StepSettings(20, 1e-3, lr_warm_up_steps=4, lr_decay_steps=5, dead_token_window=6 * BATCH))
    config = SAETrainerConfig(
        total_training_samples=20 * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=0.0,
        lr_warm_up_steps=4,
        lr_decay_steps=5,
        dead_feature_window=5,  # it counts a feature as dead after more steps than that
    )
    for batch in given:
        trainer.step(batch)
    SAETrainer(cfg=config, sae=theirs, data_provider=iter(given)).fit()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name, rtol=1e-4, atol=1e-5)


def test_the_running_mean_is_the_recurrence_over_the_weights() -> None:
    sae = training_sae("openai-topk")
    trainer = Trainer(sae, StepSettings(10, 1e-2, ema_decay=0.7))
    expected, source = sae.b_dec.detach().clone(), batches(0)
    for step in range(10):
        trainer.step(next(source))
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * sae.b_dec.detach()
    last = sae.b_dec.detach().clone()
    trainer.use_averages()
    torch.testing.assert_close(sae.b_dec.detach(), expected)
    assert not torch.allclose(last, expected)


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    settings = StepSettings(10, 1.0, lr_warm_up_steps=2, lr_decay_steps=4)
    rates = [settings.lr_at(step) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [StepSettings(3, 0.1).lr_at(step) for step in range(3)] == [0.1] * 3


def test_a_long_gradient_is_clipped() -> None:
    sae = training_sae("relu-l1")
    trainer = Trainer(sae, StepSettings(10, 1e-3, clip_norm=1e-12))
    before = sae.b_enc.detach().clone()
    assert trainer.step(next(batches(0))).gradient_norm > 1e-3
    # Adam does not see a gradient's length, but for its epsilon, which is far larger than this one.
    torch.testing.assert_close(sae.b_enc.detach(), before, atol=1e-6, rtol=0)


def test_dead_features_are_those_silent_for_the_window_of_tokens() -> None:
    sae = training_sae("relu-l1")
    sae.b_enc.data[:5] = -1e6
    trainer = Trainer(sae, StepSettings(10, 1e-6, dead_token_window=3 * BATCH))
    source = batches(0)
    for step in range(4):
        assert trainer.dead[:5].all() == (step >= 3)
        trainer.step(next(source))
    assert trainer.dead[:5].all() and not trainer.dead[5:].all()
    trainer.forget(torch.tensor([1]))
    assert trainer.dead[:5].tolist() == [True, False, True, True, True]


def test_the_penalty_rises_over_its_warm_up() -> None:
    trainer = Trainer(training_sae("relu-l1"), StepSettings(100, 1e-3))
    found = []
    for step in (0, 10, 20, 50):
        trainer.step_number = step
        found.append(trainer._coefficients()["l1"])
    assert found == pytest.approx([0, 0.2, 0.4, 0.4])


def test_features_that_hardly_fire_are_resampled_but_not_near_the_end(tmp_path: Path) -> None:
    sae = training_sae("relu-l1")
    sae.b_enc.data[:10] = -1e6
    training = fit(sae, batches, RESAMPLED, tmp_path, sample=training_runs.sample, progress=False)
    assert training.resampled >= 10 and (sae.b_enc.data > -100).all()
    without = training_sae("relu-l1")
    without.b_enc.data[:10] = -1e6
    plain = fit(without, batches, replace(RESAMPLED, resampling=None), tmp_path / "plain", progress=False)
    assert plain.resampled == 0 and (without.b_enc.data[:10] < -100).all()
    assert training.dead is not None and plain.dead is not None and training.dead < plain.dead


def with_bad(first_step: int, share: float) -> Iterator[torch.Tensor]:
    for step, batch in enumerate(batches(first_step), start=first_step):
        bad = np.random.default_rng([2, step]).random(len(batch)) < share
        batch = batch.clone()
        batch[torch.from_numpy(bad), 3] = [math.nan, math.inf, -math.inf][step % 3]
        yield batch


def test_activations_with_nan_or_infinity_are_left_out_and_counted(tmp_path: Path) -> None:
    sae = training_sae("openai-topk")
    training = fit(sae, lambda first: with_bad(first, 0.005), SETTINGS, tmp_path, progress=False)
    given = itertools.islice(with_bad(0, 0.005), STEPS)
    expected = sum(int((~torch.isfinite(batch)).any(-1).sum()) for batch in given)
    assert training.bad_tokens == expected > 0
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())
    assert training.curve[-1]["fvu"] < training.curve[0]["fvu"]


def test_too_many_such_activations_end_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"activations hold NaN or infinity, more than 1%: .*float32"):
        fit(training_sae("openai-topk"), lambda first: with_bad(first, 0.5), SETTINGS, tmp_path, progress=False)
    with pytest.raises(ValueError, match="64 of 64 activations hold NaN"):
        next(FiniteBatches(iter([torch.full((64, 2), math.nan)])))


def test_a_short_training_is_judged_by_its_own_tokens(tmp_path: Path) -> None:
    # Too few for a hundred batches: 3 % of 36 batches are fewer than 1 % of a hundred.
    with pytest.raises(ValueError, match="more than 1%"):
        fit(training_sae("topk"), lambda first: with_bad(first, 0.03), SETTINGS, tmp_path, progress=False)
    source = FiniteBatches(with_bad(0, 0.005), n_batches=STEPS)
    for _ in range(STEPS):
        next(source)
    assert 0 < source.bad <= 0.01 * source.seen


def test_a_sound_batch_passes_as_it_is_and_a_mended_one_keeps_its_size() -> None:
    batch = torch.arange(8.0).view(4, 2)
    assert next(FiniteBatches(iter([batch]))) is batch
    broken = batch.clone()
    broken[1, 0] = math.inf
    source = FiniteBatches(iter([broken]))
    assert torch.equal(next(source), batch[[0, 2, 3, 0]]) and (source.seen, source.bad) == (4, 1)


def test_a_diverging_training_stops_names_the_key_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    steep = LoopSettings(replace(SETTINGS.step, lr=3e-3, lr_warm_up_steps=0, ema_decay=0.0), checkpoint_steps=5)

    def rate(self: StepSettings, step: int) -> float:
        return 1e-3 if step < 12 else 1e3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepSettings, "lr_at", rate)
        with pytest.raises(TrainingDiverged, match=r"diverged at step 1\d: .*look at lr \(0\.003\)") as error:
            fit(training_sae("relu-l1"), batches, steep, tmp_path, progress=False)
    last = Checkpoints(tmp_path).paths()[-1]
    assert last.name == "step-000000010.safetensors" and str(last) in str(error.value)
    checkpoint = Checkpoints(tmp_path).latest()
    assert checkpoint is not None and all(torch.isfinite(value).all() for value in checkpoint.tensors.values())
    training = fit(training_sae("relu-l1"), batches, steep, tmp_path, progress=False)
    assert training.resumed_at_step == 10 and training.steps == STEPS


def test_a_loss_that_is_no_number_is_divergence_and_a_heavy_penalty_is_named() -> None:
    sae = training_sae("relu-l1")
    trainer = Trainer(sae, StepSettings(10, 1e-3, dead_token_window=1))
    sae.b_dec.data[0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"step 0: the loss is no number; look at lr"):
        trainer.step(DATA[:BATCH])
    trainer.silent_tokens += 10
    trainer.step_number = 20
    with pytest.raises(TrainingDiverged, match=r"look at l1_coefficient \(0\.4\): nine in ten features are dead"):
        trainer.step(DATA[:BATCH])


def test_figures_that_need_a_model_are_measured_when_asked(tmp_path: Path) -> None:
    seen: list[Any] = []
    settings = replace(SETTINGS, measure_steps=16)  # not in step with log_steps, 10
    _, training = run("openai-topk", tmp_path, settings, measure=lambda: {"loss_recovered": 0.5}, loggers=[seen.append])
    assert [point["step"] for point in training.curve if "loss_recovered" in point] == [16, 32, 36]
    assert seen == training.curve


def test_what_is_measured_on_the_way_are_the_weights_that_would_be_saved(tmp_path: Path) -> None:
    settings = replace(SETTINGS, measure_steps=12, step=replace(SETTINGS.step, ema_decay=0.9))
    plain, _ = run("openai-topk", tmp_path / "plain", replace(settings, measure_steps=0))
    watched = training_sae("openai-topk")
    seen: list[torch.Tensor] = []

    def measure() -> dict[str, float]:
        seen.append(watched.W_dec.detach().clone())
        return {}

    fit(watched, batches, settings, tmp_path / "watched", measure=measure, progress=False)
    assert_equal(watched, plain)  # measuring changed nothing
    assert len(seen) == 3 and torch.equal(seen[-1], watched.W_dec)  # the last is the running mean that was saved
    for rows in seen:
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(D_SAE))


def test_intervals_of_no_steps_are_refused() -> None:
    for name in ("log_steps", "checkpoint_steps"):
        with pytest.raises(ValueError, match=f"{name} 0 is below 1"):
            replace(SETTINGS, **{name: 0})
    with pytest.raises(ValueError, match="measure_steps -5 is below 0"):
        replace(SETTINGS, measure_steps=-5)


def test_a_checkpoint_that_cannot_be_written_leaves_the_former_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, whole_step = resource.getrlimit(resource.RLIMIT_FSIZE), Trainer.step

    def full(self: Trainer, batch: torch.Tensor) -> Any:
        if self.step_number == 15:  # from here on no file can grow as large as a checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        return whole_step(self, batch)

    monkeypatch.setattr(Trainer, "step", full)
    try:
        with pytest.raises(OSError, match=r"cannot write .*step-000000021\.safetensors: .*too large"):
            run("openai-topk", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name[5:14] for path in sorted(tmp_path.glob("*"))][1:] == ["000000007", "000000014"]
    monkeypatch.undo()
    resumed, training = run("openai-topk", tmp_path)
    assert training.resumed_at_step == 14
    assert_equal(resumed, run("openai-topk", tmp_path / "whole")[0])


def test_an_unreadable_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    whole, _ = run("openai-topk", tmp_path)
    last = Checkpoints(tmp_path).paths()[-1]
    last.write_bytes(last.read_bytes()[:100])
    again, training = run("openai-topk", tmp_path)
    assert training.resumed_at_step == 35
    assert_equal(again, whole)


def test_the_progress_line_shows_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(training_sae("openai-topk"), batches, SETTINGS, tmp_path, progress=True)
    assert loop.tqdm is not None and "fvu=" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_on_a_gpu_goes_as_on_the_cpu_and_on_from_its_checkpoints(kind: str, tmp_path: Path) -> None:
    usual = RESAMPLED if kind == "relu-l1" else SETTINGS
    _, expected = run(kind, tmp_path / "cpu")
    sae = training_sae(kind).to(torch.device("cuda"))
    training = fit(sae, batches, usual, tmp_path / "gpu", sample=training_runs.sample, progress=False)
    assert sae.W_dec.is_cuda and training.tokens == expected.tokens
    for ours, theirs in zip(training.curve, expected.curve, strict=True):
        assert ours["fvu"] == pytest.approx(theirs["fvu"], rel=0.05)
    for path in Checkpoints(tmp_path / "gpu").paths()[1:]:
        path.unlink()
    again = training_sae(kind).to(torch.device("cuda"))
    resumed = fit(again, batches, usual, tmp_path / "gpu", sample=training_runs.sample, progress=False)
    assert resumed.resumed_at_step > 0
    assert resumed.curve[-1]["fvu"] == pytest.approx(expected.curve[-1]["fvu"], rel=0.05)
