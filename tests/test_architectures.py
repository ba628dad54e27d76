from typing import Literal

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_emotion_plugin.architectures import SparseStepTopKTrainingSAE


def trained_a_little(kind: type[TopKTrainingSAE], rescale: bool = True) -> TopKTrainingSAE:
    config = TopKTrainingSAEConfig(
        d_in=20, d_sae=100, k=5, aux_loss_coefficient=0.1, rescale_acts_by_decoder_norm=rescale
    )
    sae = kind(config)
    torch.manual_seed(1)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    return sae


def step(sae: TopKTrainingSAE, dead: int, x: torch.Tensor) -> TrainStepOutput:
    mask = torch.arange(100) < dead
    done = sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=mask, n_training_steps=0, is_logging_step=False)
    )
    done.loss.backward()
    return done


@pytest.mark.parametrize("dead", [0, 1, 7, 40])
def test_the_sparse_step_has_the_loss_the_codes_and_the_gradients_of_sae_lens(dead: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    ours, theirs = trained_a_little(SparseStepTopKTrainingSAE), trained_a_little(TopKTrainingSAE)
    mine, reference = step(ours, dead, x), step(theirs, dead, x)
    torch.testing.assert_close(mine.loss, reference.loss)
    torch.testing.assert_close(mine.feature_acts, reference.feature_acts)
    torch.testing.assert_close(mine.sae_out, reference.sae_out)
    assert (mine.losses["auxiliary_reconstruction_loss"] > 0) == (dead > 0)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and expected[name].grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("frozen", "matrix"), [("decoder", "W_dec"), ("encoder", "W_enc")])
def test_a_frozen_side_gets_no_gradient_and_the_others_get_theirs(
    frozen: Literal["decoder", "encoder"], matrix: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    config = TopKTrainingSAEConfig(d_in=20, d_sae=100, k=5, aux_loss_coefficient=0.1)
    whole, ours = SparseStepTopKTrainingSAE(config), SparseStepTopKTrainingSAE(config, frozen=frozen)
    ours.load_state_dict(whole.state_dict())
    torch.testing.assert_close(step(ours, 7, x).loss, step(whole, 7, x).loss)
    expected = dict(whole.named_parameters())
    for name, parameter in ours.named_parameters():
        if name == matrix:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_a_token_with_negative_pre_activations_alone_gives_no_gradient_to_the_encoder() -> None:
    sae = trained_a_little(SparseStepTopKTrainingSAE)
    sae.b_enc.data -= 1000.0
    done = step(sae, 0, torch.randn(3, 20))
    assert not done.feature_acts.any()
    assert sae.W_enc.grad is not None
    assert not sae.W_enc.grad.any()


def test_the_sparse_step_refuses_settings_that_it_does_not_compute() -> None:
    sae = trained_a_little(SparseStepTopKTrainingSAE, rescale=False)
    with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm"):
        step(sae, 0, torch.randn(3, 20))
