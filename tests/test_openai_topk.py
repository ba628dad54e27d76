import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from conftest import D_MODEL, HOOK, WORDS
from datasets import Dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from scipy.optimize import minimize

from sae_emotion_plugin.architectures import (
    OpenAITopKTrainingSAE,
    OpenAITopKTrainingSAEConfig,
    ReluL1TrainingSAE,
    ReluL1TrainingSAEConfig,
    register_architectures,
)
from sae_emotion_plugin.architectures.openai_topk import geometric_median, usual_k_aux

D_IN, D_SAE, K = 12, 60, 4


def made(**changes: Any) -> OpenAITopKTrainingSAE:
    torch.manual_seed(0)
    sae = OpenAITopKTrainingSAE(OpenAITopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, **changes))
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(D_IN) * 0.3)
        sae.b_enc.copy_(torch.randn(D_SAE) * 0.1)
        sae.W_enc.add_(torch.randn(D_IN, D_SAE) * 0.1)
    return sae


def data(tokens: int = 200, seed: int = 3) -> torch.Tensor:
    """Sparse sums of few directions, on very different scales, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(40, D_IN, generator=torch.Generator().manual_seed(7)), dim=-1
    )
    codes = torch.rand(tokens, 40, generator=generator) * (torch.rand(tokens, 40, generator=generator) < 0.08)
    scales = torch.exp(torch.randn(tokens, 1, generator=generator))
    return (codes @ directions + 0.05 * torch.randn(tokens, D_IN, generator=generator)) * scales + 2.0


def step_input(x: torch.Tensor, dead: int = 0) -> TrainStepInput:
    mask = torch.arange(D_SAE) < dead
    return TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=mask, n_training_steps=0, is_logging_step=False)


def plain_losses(sae: OpenAITopKTrainingSAE, x: torch.Tensor, dead: int) -> dict[str, torch.Tensor]:
    """The published equations with dense codes (arXiv 2406.04093, 2.3, A.2 and 4.2)."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.std(-1, keepdim=True) + 1e-5)
    rows = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    pre = (y - sae.b_dec) @ sae.W_enc + sae.b_enc

    def rebuilt(k: int) -> torch.Tensor:
        top = pre.topk(k)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ rows

    variance = sae.cfg.input_variance
    found = {"mse_loss": (rebuilt(K) + sae.b_dec - y).square().mean() / variance}
    found["multi_topk_loss"] = (rebuilt(4 * K) + sae.b_dec - y).square().mean() / variance / 8
    found["auxiliary_reconstruction_loss"] = torch.tensor(0.0)
    if dead:
        error = (y - rebuilt(K) - sae.b_dec).detach()
        k = min(usual_k_aux(D_IN), dead)
        top = pre[:, :dead].topk(k)
        codes = torch.zeros(len(x), dead).scatter(1, top.indices, top.values.relu())
        share = (codes @ rows[:dead] - error).square().mean() / (error - error.mean(0)).square().mean()
        found["auxiliary_reconstruction_loss"] = share / 32
    return found


@pytest.mark.parametrize("dead", [0, 1, 5, 50])
def test_losses_and_gradients_are_those_of_the_published_equations(dead: int) -> None:
    sae, reference, x = made(), made(), data()
    sae.cfg.input_variance = reference.cfg.input_variance = 0.7
    found = sae.sparse_step(step_input(x, dead))
    expected = plain_losses(reference, x, dead)
    assert list(found.losses) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found.losses[name], loss, msg=name)
    torch.testing.assert_close(found.loss, sum(expected.values()))
    found.loss.backward()
    sum(expected.values()).backward()  # type: ignore[union-attr]
    theirs = dict(reference.named_parameters())
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None and theirs[name].grad is not None
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_sae_lens_refuses_what_this_class_computes() -> None:
    """Should SAELens come to compute AuxK on layer-normed inputs, this class may have become needless."""
    theirs = sae_lens.TopKTrainingSAE(
        sae_lens.TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, normalize_activations="layer_norm")
    )
    with pytest.raises(ValueError, match="does not support activation normalization"):
        theirs.training_forward_pass(step_input(data(), 5))


def test_the_pre_bias_does_not_enter_the_dead_features_task() -> None:
    """The residual has the pre-bias taken off already: dead features that rebuild just it leave nothing."""
    sae, dead = made(k_aux=2 * D_IN), torch.arange(D_SAE) < 2 * D_IN
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.W_dec[:D_IN], sae.W_dec[D_IN : 2 * D_IN] = torch.eye(D_IN), -torch.eye(D_IN)
        sae.W_enc.copy_(sae.W_dec.T)
    y = sae._normalised(data(50))
    # Nothing fired: the residual is all of the input but the pre-bias, and a pair of features rebuilds a dimension.
    loss = sae._aux_loss(dead, y, sae.b_dec.expand_as(y), sae.W_dec)
    assert sae.b_dec.detach().abs().mean() > 0.1
    assert float(loss.detach()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("x", [torch.zeros(5, D_IN), torch.full((5, D_IN), 3.0), data(1), data(1).expand(5, -1)])
def test_inputs_without_variance_give_numbers(x: torch.Tensor) -> None:
    sae = made()
    step = sae.sparse_step(step_input(x, 30))
    step.loss.backward()
    assert torch.isfinite(step.loss) and torch.isfinite(step.sae_out).all()
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)


def test_the_start_is_tied_and_set_by_the_data() -> None:
    torch.manual_seed(0)
    sae = OpenAITopKTrainingSAE(OpenAITopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    x = data(500)
    torch.testing.assert_close(sae.W_enc.data, sae.W_dec.data.T)
    state = torch.random.get_rng_state()
    sae.initialize_from(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.std(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(sae.b_dec.data, geometric_median(y))
    assert sae.cfg.input_variance == pytest.approx(float(y.var(0, unbiased=False).mean()), rel=1e-4)
    cosines = torch.nn.functional.cosine_similarity(sae.W_enc.data.T, sae.W_dec.data)
    torch.testing.assert_close(cosines, torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_dec.data.norm(dim=-1), torch.ones(D_SAE))


def test_without_a_tied_start_the_encoder_points_elsewhere_and_is_as_long() -> None:
    made: list[torch.Tensor] = []
    for tied in (True, False):
        torch.manual_seed(0)
        sae = OpenAITopKTrainingSAE(OpenAITopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, tied_init=tied))
        made.append(sae.W_dec.data.clone())
        torch.testing.assert_close(sae.W_enc.data.norm(dim=0), torch.ones(D_SAE))
        sae.initialize_from(data(500))
    assert torch.equal(made[0], made[1]) and sae.W_enc.data.T.is_contiguous()
    cosines = torch.nn.functional.cosine_similarity(sae.W_enc.data.T, sae.W_dec.data)
    # Of random directions in 12 dimensions: mean 0, deviation 1 / sqrt(12).
    assert abs(float(cosines.mean())) < 0.15 and 0.2 < float(cosines.std()) < 0.4


def test_relu_features_start_tied_or_apart_and_as_long() -> None:
    starts = {}
    for tied in (True, False):
        torch.manual_seed(0)
        sae = ReluL1TrainingSAE(ReluL1TrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, tied_init=tied))
        torch.testing.assert_close(sae.W_enc.data.norm(dim=0), torch.full((D_SAE,), 0.1))
        starts[tied] = torch.nn.functional.cosine_similarity(sae.W_enc.data.T, sae.W_dec.data)
    torch.testing.assert_close(starts[True], torch.ones(D_SAE))
    assert abs(float(starts[False].mean())) < 0.15 and 0.2 < float(starts[False].std()) < 0.4


def test_the_geometric_median_minimises_the_distances_and_shrugs_off_an_outlier() -> None:
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    points[0] = 1e4
    best = minimize(lambda m: float(np.linalg.norm(points.numpy() - m, axis=1).sum()), np.zeros(3), tol=1e-10)
    torch.testing.assert_close(geometric_median(points, 1000, 1e-12), torch.tensor(best.x).float(), atol=1e-3, rtol=0)
    same = torch.ones(5, 3)
    torch.testing.assert_close(geometric_median(same), same[0])
    with pytest.raises(ValueError, match="no points"):
        geometric_median(points[:0])


def test_the_usual_number_of_dead_features_is_a_power_of_two_near_half_the_width() -> None:
    assert [usual_k_aux(d) for d in (640, 768, 2, 1)] == [256, 512, 1, 1]
    assert all(math.log2(usual_k_aux(d)).is_integer() for d in range(1, 100))


def trained_by_sae_lens(sae: Any, x: torch.Tensor, steps: int = 150) -> list[TrainStepOutput]:
    config = SAETrainerConfig(
        total_training_samples=steps * 64, train_batch_size_samples=64, lr=3e-3, lr_end=0.0, dead_feature_window=5
    )
    rng = np.random.default_rng(0)
    batches = (x[rng.choice(len(x), 64)] for _ in range(steps))
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches)
    outputs: list[TrainStepOutput] = []
    step = trainer.step

    def kept(batch: torch.Tensor) -> TrainStepOutput:
        outputs.append(step(batch))
        return outputs[-1]

    trainer.step = kept  # type: ignore[method-assign]
    trainer.fit()
    return outputs


@pytest.fixture(autouse=True)
def quiet_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_it_trains_under_sae_lens_and_what_is_saved_is_a_plain_topk_sae(tmp_path: Path) -> None:
    sae, x = made(), data(2000)
    sae.initialize_from(x)
    outputs = trained_by_sae_lens(sae, x)
    losses = [{name: float(loss.detach()) for name, loss in output.losses.items()} for output in outputs]
    assert losses[-1]["mse_loss"] < 0.5 * losses[0]["mse_loss"]
    assert any(loss["auxiliary_reconstruction_loss"] > 0 for loss in losses)
    torch.testing.assert_close(outputs[-1].feature_acts.count_nonzero(-1).max(), torch.tensor(K))
    sae.eval().save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is TopKSAE and loaded.cfg.architecture() == "topk"
    assert loaded.cfg.normalize_activations == "layer_norm"
    with torch.inference_mode():
        codes, expected = loaded.encode(x), sae.encode(x)
        assert torch.equal(codes, expected)
        assert torch.equal(loaded.decode(codes), sae.decode(expected))


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized")
@pytest.mark.filterwarnings("ignore:(?s).*non-empty model_from_pretrained_kwargs")
def test_both_train_under_sae_lens_s_runner_from_a_model_and_texts(hooked_transformer: Any, tmp_path: Path) -> None:
    register_architectures()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[4:], size=20)) for _ in range(2100)]
    common: dict[str, Any] = {"d_in": D_MODEL, "d_sae": 64}
    makers = {
        "openai-topk": OpenAITopKTrainingSAEConfig(**common, k=4),
        "relu-l1": ReluL1TrainingSAEConfig(**common, l1_coefficient=0.1),
    }
    for name, config in makers.items():
        out = tmp_path / name
        runner = LanguageModelSAETrainingRunner(
            LanguageModelSAERunnerConfig(
                sae=config,
                model_name="tiny",
                hook_name=HOOK,
                dataset_path="none",
                streaming=False,
                is_dataset_tokenized=False,
                training_tokens=2048,
                train_batch_size_tokens=128,
                context_size=16,
                store_batch_size_prompts=8,
                n_batches_in_buffer=32,
                n_eval_batches=1,
                lr=3e-3,
                output_path=str(out),
                checkpoint_path=None,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            override_dataset=Dataset.from_dict({"text": texts}),
            override_model=hooked_transformer,
        )
        sae = runner.run()
        assert type(sae).__name__ == {"openai-topk": "OpenAITopKTrainingSAE", "relu-l1": "ReluL1TrainingSAE"}[name]
        loaded = SAE.load_from_disk(out)
        assert loaded.cfg.architecture() == {"openai-topk": "topk", "relu-l1": "standard"}[name]
        torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(64), atol=1e-2, rtol=0)


def test_relu_l1_trains_under_sae_lens_and_what_is_saved_is_a_plain_standard_sae(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = data(2000)
    x = (x - x.mean(0)) / x.std()
    sae = ReluL1TrainingSAE(ReluL1TrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=0.5))
    outputs = trained_by_sae_lens(sae, x)
    assert float(outputs[-1].loss.detach()) < 0.5 * float(outputs[0].loss.detach())
    first, last = (float((o.feature_acts > 0).float().mean()) for o in (outputs[0], outputs[-1]))
    assert last < 0.5 * first
    sae.constrain()
    sae.eval().save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is sae_lens.StandardSAE
    with torch.inference_mode():
        assert torch.equal(loaded.encode(x), sae.encode(x))
        assert torch.equal(loaded.decode(loaded.encode(x)), sae.decode(sae.encode(x)))
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_relu_l1_has_the_loss_and_gradients_of_dense_products() -> None:
    torch.manual_seed(0)
    config = ReluL1TrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=0.3)
    sae, x = ReluL1TrainingSAE(config), data(50) - 2.0
    inputs = TrainStepInput(x, {"l1": 0.3}, None, 0, False)
    step = sae.sparse_step(inputs)
    given = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    codes = ((x - given["b_dec"]) @ given["W_enc"] + given["b_enc"]).relu()
    out = codes @ torch.nn.functional.normalize(given["W_dec"], dim=-1) + given["b_dec"]
    expected = (out - x).square().sum(-1).mean() + 0.3 * codes.sum(-1).mean()
    torch.testing.assert_close(step.loss, expected)
    step.loss.backward()
    expected.backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, given[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    dense = sae.training_forward_pass(inputs)
    torch.testing.assert_close(dense.feature_acts, codes.detach())


def test_checkpoints_of_sae_lens_bring_the_class_back(tmp_path: Path) -> None:
    names = register_architectures()
    assert names == ("openai-topk", "relu-l1") == register_architectures()
    assert get_sae_training_class("openai-topk") == (OpenAITopKTrainingSAE, OpenAITopKTrainingSAEConfig)
    sae = made(k_aux=3)
    sae.save_model(tmp_path)
    again = OpenAITopKTrainingSAE.load_from_disk(tmp_path)
    assert isinstance(again, OpenAITopKTrainingSAE) and again.cfg.k_aux == 3
    x = data(20)
    assert torch.equal(again.encode(x), sae.encode(x))


def test_another_class_of_the_same_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    monkeypatch.setitem(
        SAE_TRAINING_CLASS_REGISTRY, "relu-l1", (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig)
    )
    with pytest.raises(ValueError, match="another training class named 'relu-l1': StandardTrainingSAE"):
        register_architectures()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_acts_by_decoder_norm": True}, "unit norm"),
        ({"apply_b_dec_to_input": False}, "b_dec"),
        ({"k": 0}, "k 0 is not between"),
        ({"k_aux": 0}, "k_aux 0 is below 1"),
        ({"multi_topk_weight": -1.0}, "multi_topk_weight -1.0 is negative"),
    ],
)
def test_settings_that_it_does_not_compute_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenAITopKTrainingSAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "k": K, **changes})
    with pytest.raises(ValueError, match="lp_norm 1"):
        ReluL1TrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, lp_norm=2.0)
