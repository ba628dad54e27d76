import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_openai import StrictReader, encode_and_reconstruct
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from sae_emotion_plugin import openai_checkpoint, openai_format
from sae_emotion_plugin.openai_checkpoint import read_openai_checkpoint
from sae_emotion_plugin.openai_format import (
    convert,
    load_openai_checkpoint,
    openai_disk_config,
    openai_disk_loader,
    openai_huggingface_config,
    openai_huggingface_loader,
    save_openai_checkpoint,
)

D_IN, D_SAE, K = 12, 40, 5


def checkpoint(activation: str, seed: int = 0, k: int = K) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "pre_bias": normal(D_IN),
        "latent_bias": normal(D_SAE),
        "stats_last_nonzero": torch.arange(D_SAE),
        "latents_activation_frequency": torch.rand(D_SAE, generator=generator),
        "latents_mean_square": torch.rand(D_SAE, generator=generator),
        "encoder.weight": normal(D_SAE, D_IN),
        "decoder.weight": normal(D_IN, D_SAE),
        "activation": activation,
        "activation_state_dict": {"k": k, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }


def saved(state: object, folder: Path, **options: Any) -> Path:
    torch.save(state, folder / "autoencoder.pt", **options)
    return folder / "autoencoder.pt"


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(9)) * 30 + 7


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("activation", "sae_class"), [("TopK", TopKSAE), ("ReLU", StandardSAE)])
def test_codes_and_reconstructions_equal_the_published_equations(activation, sae_class, seed, tmp_path):
    state = checkpoint(activation, seed)
    sae = load_openai_checkpoint(saved(state, tmp_path))
    x = inputs(4, 7)
    codes, reconstruction = encode_and_reconstruct(state, x)
    assert isinstance(sae, sae_class) and sae.cfg.to_dict()["architecture"] == sae_class.__name__[:-3].lower()
    with torch.no_grad():
        ours = sae.encode(x)
        torch.testing.assert_close(ours.double(), codes, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours > 0, codes > 0)
        torch.testing.assert_close(sae.decode(ours).double(), reconstruction, rtol=1e-5, atol=1e-4)


def test_nearly_constant_inputs_are_normalised_with_eps_added_to_the_standard_deviation(tmp_path):
    state = checkpoint("TopK")
    x = 3 + inputs(5) * 1e-7
    codes, _ = encode_and_reconstruct(state, x)
    with torch.no_grad():
        ours = load_openai_checkpoint(saved(state, tmp_path), dtype="float64").encode(x.double())
    torch.testing.assert_close(ours, codes, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(codes, encode_and_reconstruct(state, (x.double() - 3) * 1e3)[0], rtol=1e-2)


def test_negative_values_among_the_top_k_become_zero(tmp_path):
    state = checkpoint("TopK", k=D_SAE)
    with torch.no_grad():
        codes = load_openai_checkpoint(saved(state, tmp_path)).encode(inputs(6))
    assert codes.min() == 0
    torch.testing.assert_close(codes.double(), encode_and_reconstruct(state, inputs(6))[0], rtol=1e-5, atol=1e-5)


def test_sae_lens_loads_a_checkpoint_through_the_disk_converter(tmp_path):
    path = saved(checkpoint("TopK"), tmp_path)
    sae = SAE.load_from_disk(path, converter=openai_disk_loader)
    assert torch.equal(sae.W_enc, load_openai_checkpoint(path).W_enc)
    assert (sae.cfg.metadata.prepend_bos, sae.cfg.normalize_activations) == (False, "layer_norm")
    assert openai_disk_config(path) == openai_disk_loader(path)[0]


def test_what_the_caller_knows_about_the_model_becomes_metadata_without_a_warning(tmp_path):
    metadata = {
        "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_post",
        "context_size": 64,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }
    sae = load_openai_checkpoint(saved(checkpoint("TopK"), tmp_path), metadata=metadata)
    assert {key: sae.cfg.metadata[key] for key in metadata} == metadata
    with pytest.raises(ValueError, match=r"unknown setting 'hook_nmae'.*hook_name"):
        load_openai_checkpoint(saved(checkpoint("TopK"), tmp_path), metadata={"hook_nmae": "x"})


def test_a_tied_decoder_is_read_as_the_transposed_encoder(tmp_path):
    state = checkpoint("ReLU")
    state["decoder.weight"] = state["encoder.weight"].T
    stored = {("decoder.linear.weight" if key == "decoder.weight" else key): value for key, value in state.items()}
    stored["decoder.linear.weight"] = state["encoder.weight"]
    path = saved(stored, tmp_path)
    sae = load_openai_checkpoint(path)
    assert read_openai_checkpoint(path).tied
    with torch.no_grad():
        torch.testing.assert_close(
            sae(inputs(3)).double(), encode_and_reconstruct(state, inputs(3))[1], rtol=1e-5, atol=1e-4
        )
    sae.save_model(tmp_path / "saved")
    stored["decoder.linear.weight"] = state["encoder.weight"] + 1
    with pytest.raises(ValueError, match=r"decoder.linear.weight differs from encoder.weight"):
        load_openai_checkpoint(saved(stored, tmp_path))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_load_as_the_dtype_asked_for(stored, tmp_path):
    state = checkpoint("ReLU")
    for key in ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias"):
        state[key] = state[key].to(stored)
    sae = load_openai_checkpoint(saved(state, tmp_path))
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert torch.equal(sae.W_enc, state["encoder.weight"].float().T)
    assert load_openai_checkpoint(tmp_path / "autoencoder.pt", dtype="bfloat16").W_dec.dtype == torch.bfloat16


def test_a_value_that_overflows_the_dtype_asked_for_is_refused(tmp_path):
    state = checkpoint("ReLU")
    state["decoder.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match="W_dec overflows in float16"):
        load_openai_checkpoint(saved(state, tmp_path), dtype="float16")


def test_files_without_activation_or_statistics_are_relu_autoencoders(tmp_path):
    state = checkpoint("ReLU")
    weights = {key: state[key] for key in openai_checkpoint.WEIGHTS}
    assert isinstance(load_openai_checkpoint(saved(weights, tmp_path)), StandardSAE)
    assert read_openai_checkpoint(tmp_path / "autoencoder.pt").buffers == {}


def test_the_legacy_file_layout_of_torch_loads(tmp_path):
    state = checkpoint("TopK")
    sae = load_openai_checkpoint(saved(state, tmp_path, _use_new_zipfile_serialization=False))
    assert torch.equal(sae.W_dec, state["decoder.weight"].T)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(layout, tmp_path):
    state = {**checkpoint("TopK"), "activation": RunsCode(tmp_path / "it-ran")}
    if layout == "plain pickle":
        path = tmp_path / "autoencoder.pt"
        path.write_bytes(pickle.dumps(state["activation"], protocol=2))
    else:
        path = saved(state, tmp_path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(ValueError, match="mkdir, which could run code") as error:
        load_openai_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "it-ran").exists()


def with_value(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: value})


def poisoned(key: str, value: float) -> Callable[[dict[str, Any]], None]:
    return lambda state: state[key].view(-1)[3:4].fill_(value)


def swap_encoder_and_decoder(state: dict[str, Any]) -> None:
    state["encoder.weight"], state["decoder.weight"] = state["decoder.weight"], state["encoder.weight"]


BAD_STATES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    *((lambda state, key=key: state.pop(key), f"lacks {key}; valid keys: ") for key in openai_checkpoint.WEIGHTS),
    (with_value("W_enc", torch.zeros(2)), "unknown key W_enc; valid keys: encoder.weight"),
    (with_value("decoder.linear.weight", torch.zeros(D_SAE, D_IN)), "unknown key decoder.linear.weight"),
    (with_value("encoder.weight", torch.zeros(D_SAE + 1, D_IN)), r"encoder.weight .*\(41, 12\); valid: \(40, 12\)"),
    (with_value("decoder.weight", torch.zeros(D_IN, 3)), r"decoder.weight .*\(12, 3\); valid: \(12, 40\)"),
    (with_value("latent_bias", torch.zeros(D_SAE, 1)), r"latent_bias .*\(40, 1\); valid: one non-empty axis"),
    (with_value("pre_bias", torch.zeros(0)), r"pre_bias .*\(0,\)"),
    (with_value("stats_last_nonzero", torch.zeros(2)), r"stats_last_nonzero .*\(2,\); valid: \(40,\)"),
    (with_value("encoder.weight", [1.0]), "encoder.weight is a list, not a tensor"),
    (with_value("pre_bias", torch.zeros(D_IN, dtype=torch.int64)), "pre_bias has dtype torch.int64; valid: float32"),
    (with_value("encoder.weight", torch.zeros(D_SAE, D_IN).to_sparse()), "encoder.weight is not a dense tensor"),
    (with_value("encoder.weight", torch.zeros(1).expand(D_SAE, D_IN)), r"\(40, 12\) with too few stored numbers"),
    (with_value("encoder.weight", torch.zeros(D_SAE, D_IN, device="meta")), "encoder.weight is not a dense tensor"),
    (poisoned("encoder.weight", float("nan")), "encoder.weight holds NaN or infinite"),
    (poisoned("latent_bias", float("inf")), "latent_bias holds NaN or infinite"),
    (poisoned("latents_mean_square", float("nan")), "latents_mean_square holds NaN"),
    (swap_encoder_and_decoder, r"are swapped; valid: \(40, 12\) and \(12, 40\)"),
    (with_value("activation", "Identity"), "unknown activation 'Identity'; valid: ReLU, TopK"),
    (with_value("activation", torch.zeros(3)), "unknown activation tensor"),
    (with_value("activation_state_dict", None), "activation_state_dict is a NoneType; valid: a dict"),
    (with_value("activation_state_dict", {"k": 3}), "activation_state_dict of TopK holds k; valid: k, postact_fn"),
    (with_value("activation_state_dict", {"k": 3, "postact_fn": "Identity"}), "postact_fn 'Identity'; valid: 'ReLU'"),
    *(
        (with_value("activation_state_dict", {"k": k, "postact_fn": "ReLU"}), r"k is .*; valid: .* 1 to 40 \(d_sae\)")
        for k in (D_SAE + 1, 0, -1, True, 2.0, "5", None)
    ),
    (lambda state: state.pop("activation"), "activation_state_dict of ReLU holds k, postact_fn; valid: nothing"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_STATES)
def test_a_checkpoint_that_is_not_exactly_the_format_is_refused_in_one_line(spoil, message, tmp_path):
    state = checkpoint("TopK")
    spoil(state)
    with pytest.raises(ValueError, match=message) as error:
        load_openai_checkpoint(saved(state, tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        (b"<?xml version='1.0'?><Error>BlobNotFound</Error>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"\x00" * 400, "truncated or damaged"),
        (b"PK\x03\x04 and no more", "truncated or damaged"),
        (b"two words", "truncated or damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "autoencoder.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_openai_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_a_lone_tensor_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*absent\.pt"):
        load_openai_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="is a folder"):
        load_openai_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="holds a Tensor, not the state_dict"):
        load_openai_checkpoint(saved(torch.zeros(3), tmp_path))


def test_weights_are_views_of_the_file_that_writing_to_them_does_not_change(tmp_path):
    path = saved(checkpoint("TopK"), tmp_path)
    content = path.read_bytes()
    sae = load_openai_checkpoint(path)
    assert not sae.W_enc.is_contiguous() and not sae.W_dec.is_contiguous()
    with torch.no_grad():
        sae.W_enc.mul_(2)
    assert path.read_bytes() == content
    assert torch.equal(sae.W_enc, 2 * load_openai_checkpoint(path).W_enc)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_can_be_saved_and_loaded_by_sae_lens(dtype, tmp_path):
    for activation, kind in (("TopK", TopKSAE), ("ReLU", StandardSAE)):
        sae = load_openai_checkpoint(saved(checkpoint(activation), tmp_path), dtype=dtype)
        sae.save_model(tmp_path / activation)
        again = SAE.load_from_disk(tmp_path / activation)
        assert type(again) is kind
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in sae.state_dict().items())


def test_encoder_and_decoder_that_share_their_numbers_in_the_file_do_not_share_them_in_the_sae(tmp_path):
    state = checkpoint("ReLU")
    state["decoder.linear.weight"] = state["encoder.weight"]
    del state["decoder.weight"]
    sae = load_openai_checkpoint(saved(state, tmp_path))
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert torch.equal(sae.W_dec, 2 * sae.W_enc.T)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_an_sae_saved_for_openai_comes_back_bit_for_bit(activation, stored, tmp_path):
    state = checkpoint(activation)
    for key in openai_checkpoint.WEIGHTS:
        state[key] = state[key].to(stored)
    sae = load_openai_checkpoint(saved(state, tmp_path), dtype=str(stored).removeprefix("torch."))
    path = save_openai_checkpoint(sae, tmp_path / "out.pt")
    written = torch.load(path, weights_only=True)
    assert all(torch.equal(written[key], state[key]) for key in openai_checkpoint.WEIGHTS)
    assert all(written[key] == state[key] for key in ("activation", "activation_state_dict"))
    reader = StrictReader(written)
    assert torch.equal(reader.encoder.weight.to(stored), state["encoder.weight"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["autoencoder.pt", "out.pt"]
    assert path.stat().st_size < 1.1 * (tmp_path / "autoencoder.pt").stat().st_size


def test_decoder_norms_that_scale_the_codes_are_folded(tmp_path):
    torch.manual_seed(0)
    sae = TopKSAE(
        TopKSAEConfig(
            d_in=D_IN, d_sae=D_SAE, k=K, normalize_activations="layer_norm", rescale_acts_by_decoder_norm=True
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
        before = {key: value.clone() for key, value in sae.state_dict().items()}
        state = torch.load(save_openai_checkpoint(sae, tmp_path / "out.pt"), weights_only=True)
        codes, reconstruction = encode_and_reconstruct(state, inputs(5))
        theirs = sae.encode(inputs(5))
        torch.testing.assert_close(theirs.double(), codes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(theirs).double(), reconstruction, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())
    torch.testing.assert_close(state["decoder.weight"].norm(dim=0), torch.ones(D_SAE))


SHAPE: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (TopKSAE(TopKSAEConfig(**SHAPE, k=3)), "a TopK SAE with normalize_activations='none'; valid: 'layer_"),
        (
            StandardSAE(StandardSAEConfig(**SHAPE, normalize_activations="layer_norm")),
            "a ReLU SAE with normalize_activations='layer_norm'; valid: 'none'",
        ),
        (
            StandardSAE(StandardSAEConfig(**SHAPE, normalize_activations="covariance_whitening")),
            "a ReLU SAE with normalize_activations='covariance_whitening'",
        ),
        (StandardSAE(StandardSAEConfig(**SHAPE, apply_b_dec_to_input=False)), "apply_b_dec_to_input=False"),
        (StandardSAE(StandardSAEConfig(**SHAPE, reshape_activations="hook_z")), "reshape_activations='hook_z'"),
        (JumpReLUSAE(JumpReLUSAEConfig(**SHAPE)), r"a JumpReLUSAE \(architecture 'jumprelu'\)"),
        (GatedSAE(GatedSAEConfig(**SHAPE)), r"a GatedSAE \(architecture 'gated'\); valid: a TopKSAE or a Stan"),
        (
            TopKSAE(TopKSAEConfig(**SHAPE, k=D_SAE + 1, normalize_activations="layer_norm")),
            r"k=41; valid: 1 to 40 \(d_sae\)",
        ),
    ],
)
def test_what_the_format_cannot_express_is_refused_by_name(sae, message, tmp_path):
    with pytest.raises(ValueError, match=f"OpenAI's format cannot express {message}"):
        save_openai_checkpoint(sae, tmp_path / "out.pt")
    assert list(tmp_path.iterdir()) == []


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    sae = load_openai_checkpoint(saved(checkpoint("TopK"), tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_openai_checkpoint(sae, tmp_path / "absent" / "out.pt")
    content = save_openai_checkpoint(sae, tmp_path / "out.pt").read_bytes()

    def full_disk(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(ValueError, match=r"cannot write .*out\.pt: PytorchStreamWriter failed writing file$"):
            save_openai_checkpoint(sae, tmp_path / "out.pt")
    with torch.no_grad():
        sae.state_dict()["b_enc"][3] = float("nan")
    with pytest.raises(ValueError, match="b_enc holds NaN"):
        save_openai_checkpoint(sae, tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == content
    assert sorted(file.name for file in tmp_path.iterdir()) == ["autoencoder.pt", "out.pt"]


def test_an_unknown_dtype_or_device_is_refused_by_name(tmp_path):
    path = saved(checkpoint("ReLU"), tmp_path)
    with pytest.raises(ValueError, match="unknown dtype 'float8'; valid: float32"):
        load_openai_checkpoint(path, dtype="float8")
    with pytest.raises(ValueError, match="unknown device 'gpu'; valid: cpu"):
        load_openai_checkpoint(path, device="gpu")


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_a_converted_folder_loads_with_plain_sae_lens_and_keeps_every_bit(activation, tmp_path):
    path = saved(checkpoint(activation), tmp_path)
    folder = convert(path, tmp_path / "new" / "sae", metadata={"hook_name": "blocks.8.hook_resid_post"})
    assert sorted(file.name for file in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert [each.name for each in folder.parent.iterdir()] == ["sae"]
    loaded, direct = SAE.load_from_disk(folder), load_openai_checkpoint(path)
    assert all(torch.equal(value, direct.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.cfg.metadata.hook_name == "blocks.8.hook_resid_post"
    with torch.no_grad():
        assert torch.equal(loaded(inputs(4)), direct(inputs(4)))


def test_conversion_fills_an_empty_folder_but_never_one_in_use(tmp_path):
    path = saved(checkpoint("ReLU"), tmp_path)
    (tmp_path / "empty").mkdir()
    assert (convert(path, tmp_path / "empty") / "cfg.json").is_file()
    with pytest.raises(ValueError, match="empty already exists"):
        convert(path, tmp_path / "empty")
    with pytest.raises(ValueError, match=r"autoencoder.pt already exists"):
        convert(path, path)


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    state = checkpoint("ReLU")
    path = saved(state, tmp_path)

    def full_disk(self: SAE, folder: Path) -> None:
        folder.mkdir()
        (folder / "cfg.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StandardSAE, "save_model", full_disk)
        with pytest.raises(ValueError, match=r"cannot write .*sae: .*No space left on device"):
            convert(path, work / "sae")
    state["pre_bias"][0] = float("nan")
    with pytest.raises(ValueError, match="pre_bias holds NaN"):
        convert(saved(state, tmp_path), work / "sae")
    assert list(work.iterdir()) == []


def test_sae_lens_loads_a_checkpoint_from_a_repository_through_the_converter(tmp_path, monkeypatch):
    path = saved(checkpoint("TopK"), tmp_path)
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, force_download: bool) -> str:
        asked.append((repo_id, filename))
        return str(path)

    monkeypatch.setattr(openai_format, "hf_hub_download", download)
    sae = SAE.from_pretrained("owner/name", "autoencoders/8", converter=openai_huggingface_loader)
    assert torch.equal(sae.W_enc, load_openai_checkpoint(path).W_enc)
    assert openai_huggingface_config("owner/name", "autoencoders/8.pt")["k"] == K
    assert asked == [("owner/name", "autoencoders/8.pt")] * 2


def test_a_failed_download_is_reported_in_one_line(monkeypatch):
    def download(repo_id: str, filename: str, force_download: bool) -> str:
        raise OSError("no such host\nand a long explanation")

    monkeypatch.setattr(openai_format, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"cannot download 8\.pt of owner/name: no such host$"):
        openai_huggingface_loader("owner/name", "8.pt")
