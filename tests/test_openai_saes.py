import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_openai import encode_and_reconstruct
from sae_lens import SAE, HookedSAETransformer, TopKSAE, TopKSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY
from test_openai_format import D_IN, checkpoint, inputs, saved

from sae_emotion_plugin import openai_saes
from sae_emotion_plugin.openai_format import load_openai_checkpoint
from sae_emotion_plugin.openai_saes import OpenAITopKSAE, ensure_registered, repeatable_decode
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.topk_encoding import is_plain_topk

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def sae(tmp_path: Path) -> Any:
    return load_openai_checkpoint(saved(checkpoint("TopK"), tmp_path))


@pytest.fixture
def theirs(sae: Any, tmp_path: Path) -> TopKSAE:
    """The same SAE as plain SAELens loads it."""
    sae.save_model(tmp_path / "plain")
    found = SAE.load_from_disk(tmp_path / "plain")
    assert type(found) is TopKSAE
    return found


def test_decoding_works_any_number_of_times_with_the_numbers_of_sae_lens(sae, theirs):
    with torch.no_grad():
        codes = sae.encode(inputs(4, 3))
        expected = theirs.decode(theirs.encode(inputs(4, 3)))
        assert torch.equal(codes, theirs.encode(inputs(4, 3)))
        for _ in range(3):
            assert torch.equal(sae.decode(codes), expected)
        changed = codes.clone()
        changed[..., 2] += 1
        assert not torch.equal(sae.decode(changed), expected)


def test_decoding_takes_the_statistics_of_any_input_and_forgets_them(sae):
    state = checkpoint("TopK")
    one, other = inputs(5), inputs(5) * 3 + 1
    codes, expected = encode_and_reconstruct(state, one)
    with torch.no_grad():
        stats = sae.input_statistics(one)
        fresh = copy.deepcopy(sae)
        for given in (stats, (stats.mean, stats.std), {"mu": stats.mean, "std": stats.std}):
            torch.testing.assert_close(
                fresh.decode(codes.float(), stats=given).double(), expected, rtol=1e-5, atol=1e-4
            )
        with pytest.raises(ValueError, match="call encode first"):
            fresh.decode(codes.float())
        sae.encode(other)
        after = sae.decode(codes.float())
        sae.decode(codes.float(), stats=stats)
        assert torch.equal(sae.decode(codes.float()), after)


def test_decoding_without_an_input_or_with_anothers_says_what_to_do(sae):
    codes = torch.zeros(4, sae.cfg.d_sae)
    with pytest.raises(ValueError, match=r"call encode first .* or pass stats=sae\.input_statistics\(x\)"):
        sae.decode(codes)
    sae.encode(inputs(3))
    with pytest.raises(ValueError, match=r"mean of the input has the shape \(3, 1\); valid for these codes: \(4, 1\)"):
        sae.decode(codes)
    with pytest.raises(ValueError, match=r"the std of the input has the shape \(4,\)"):
        sae.decode(codes, stats=(torch.zeros(4, 1), torch.ones(4)))
    with pytest.raises(ValueError, match="stats holds mean; valid: mu, std"):
        sae.decode(codes, stats={"mean": codes})
    assert sae.decode(codes, stats=sae.input_statistics(inputs(1))).shape == (4, D_IN)


def test_threads_never_mix_their_statistics(sae):
    both = threading.Barrier(2, timeout=30)
    wrong: list[int] = []

    def work(scale: int) -> None:
        x = inputs(6) * scale
        with torch.no_grad():
            stats = sae.input_statistics(x)
            for _ in range(20):
                codes = sae.encode(x)
                both.wait()
                if not torch.equal(sae.decode(codes), sae.decode(codes, stats=stats)):
                    wrong.append(scale)
                both.wait()

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_copy_works_for_itself(sae):
    sae.encode(inputs(3))
    with torch.no_grad():
        codes = sae.encode(inputs(3))
        expected = sae.decode(codes)
        twin = copy.deepcopy(sae)
        twin.W_dec *= 2
        twin.encode(inputs(3) * 9)
        assert torch.equal(sae.decode(codes), expected)
        assert torch.equal(twin.decode(codes, stats=sae.input_statistics(inputs(3))), twin(inputs(3)))


def test_gradients_flow_as_through_sae_lens(sae, theirs):
    gradients = []
    for each in (sae, theirs):
        x = inputs(3).requires_grad_()
        each(x).pow(2).sum().backward()
        gradients.append((x.grad, each.W_enc.grad, each.W_dec.grad))
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_error_term", [False, True])
def test_inside_a_hooked_transformer_and_a_bridge_the_numbers_are_those_of_sae_lens(
    use_error_term, tmp_path, hooked_transformer, bridge
):
    d_model = hooked_transformer.cfg.d_model
    generator = torch.Generator().manual_seed(3)
    state = {
        "pre_bias": torch.randn(d_model, generator=generator),
        "latent_bias": torch.randn(50, generator=generator),
        "encoder.weight": torch.randn(50, d_model, generator=generator),
        "decoder.weight": torch.randn(d_model, 50, generator=generator),
        "activation": "TopK",
        "activation_state_dict": {"k": 4, "postact_fn": "ReLU"},
    }
    sae = load_openai_checkpoint(saved(state, tmp_path), metadata={"hook_name": HOOK, "model_name": "tiny"})
    sae.save_model(tmp_path / "plain")
    theirs = SAE.load_from_disk(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = HookedSAETransformer(hooked_transformer.cfg)
    hooked.load_state_dict(hooked_transformer.state_dict())
    tokens = torch.arange(12).view(2, 6)
    for model in (hooked, bridge):
        plain = model(tokens)
        outputs = []
        for each in (sae, theirs):
            with model.saes(saes=[each], use_error_term=use_error_term):
                logits, cache = model.run_with_cache(tokens)
            # The bridge calls the hook by its own name.
            outputs.append((logits, *(cache[name] for name in cache if name.endswith(("acts_post", "sae_output")))))
        assert [len(each) for each in outputs] == [3, 3]
        for ours, other in zip(*outputs, strict=True):
            assert torch.equal(ours, other)
        assert torch.allclose(outputs[0][0], plain, atol=1e-4) is use_error_term


def test_the_error_term_of_the_sae_itself_gives_the_input_back(sae):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae.use_error_term = True
    with torch.no_grad():
        torch.testing.assert_close(sae(inputs(4)), inputs(4))


def test_a_layer_normed_sae_of_sae_lens_decodes_repeatedly_once_it_is_ours(theirs, tmp_path):
    ours = repeatable_decode(theirs)
    assert type(ours) is OpenAITopKSAE and repeatable_decode(ours) is ours
    assert ours.W_dec.data_ptr() == theirs.W_dec.data_ptr()
    assert ours.cfg.to_dict() == theirs.cfg.to_dict()
    loaded = load_dictionary(tmp_path / "plain", device="cpu")
    with torch.no_grad():
        codes = loaded.encode(inputs(3))
        assert torch.equal(loaded.decode(codes), loaded.decode(codes))
        assert torch.equal(ours(inputs(3)), theirs(inputs(3)))


def test_other_saes_stay_what_they_are():
    plain = TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2))
    assert repeatable_decode(plain) is plain
    with pytest.raises(ValueError, match="openai_topk normalises by layer_norm, not 'none'"):
        OpenAITopKSAE(openai_saes.OpenAITopKSAEConfig(d_in=4, d_sae=8, k=2))


def test_its_sparse_encoding_is_the_fast_one(sae):
    assert is_plain_topk(sae)


def test_an_architecture_name_that_is_not_ours_is_never_taken(monkeypatch):
    ensure_registered()
    ensure_registered()
    theirs = SAE_CLASS_REGISTRY["topk"]
    monkeypatch.setitem(SAE_CLASS_REGISTRY, openai_saes.TOPK, theirs)
    with pytest.raises(ValueError, match="architecture 'openai_topk' that is not ours"):
        ensure_registered()
    assert SAE_CLASS_REGISTRY[openai_saes.TOPK] is theirs
