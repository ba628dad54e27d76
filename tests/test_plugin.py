import hashlib
import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory
from safetensors.torch import save_file

from sae_emotion_plugin import openai_format, plugin, registry
from sae_emotion_plugin.plugin import load_dictionary, register
from sae_emotion_plugin.registry import Provenance, RegistryEntry, SaeRecord, feature_url

RELEASE, SAE_ID = "tiny-emotion", "blocks.1.hook_resid_post"
D_IN, D_SAE = 6, 20


pytestmark = pytest.mark.usefixtures("sae_lens_as_before")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of a registry with one packaged release, in the place of the real ones."""
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    monkeypatch.setattr(registry, "packaged_folder", lambda: packaged)
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path))
    package(packaged)
    return packaged


def topk_sae() -> TopKSAE:
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4))
    sae.cfg.metadata.hook_name = SAE_ID
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return sae


def save_half(sae: SAE, folder: Path) -> dict[str, torch.Tensor]:
    """Saves float16 weights and float32 biases under a config that says float32; returns what was saved."""
    folder.mkdir(parents=True)
    state = {k: v.half() if k.startswith("W") else v.clone() for k, v in sae.state_dict().items()}
    save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(sae.cfg.to_dict()))
    return state


def openai_file(folder: Path) -> Path:
    state = topk_sae().state_dict()
    checkpoint = {
        "encoder.weight": state["W_enc"].T,
        "decoder.weight": state["W_dec"].T,
        "pre_bias": state["b_dec"],
        "latent_bias": state["b_enc"],
        "activation": "ReLU",
    }
    torch.save(checkpoint, folder / "autoencoder.pt")
    return folder / "autoencoder.pt"


def package(folder: Path, release: str = RELEASE, **changes: Any) -> RegistryEntry:
    home = folder / release / SAE_ID
    save_half(topk_sae(), home)
    hashes = {f"{SAE_ID}/{each.name}": hashlib.sha256(each.read_bytes()).hexdigest() for each in home.iterdir()}
    entry = RegistryEntry(
        release=release,
        model="tiny",
        saes=(SaeRecord(SAE_ID, SAE_ID, l0=4.0, variance_explained=0.5),),
        provenance=Provenance(sha256=hashes),
    )
    entry = replace(entry, **changes)
    registry.write_entry(entry, folder)
    return entry


def assert_float32_copy_of_half(sae: SAE) -> None:
    expected = {k: v.half().float() if k.startswith("W") else v for k, v in topk_sae().state_dict().items()}
    assert sae.cfg.dtype == "float32"
    for name, value in sae.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name])


# The seams of SAELens that register() needs; this fails when SAELens moves.
def test_sae_lens_still_has_the_tables_and_the_directory_that_we_extend():
    ours = inspect.signature(plugin.registry_loader).parameters
    for name, theirs in loaders.NAMED_PRETRAINED_SAE_LOADERS.items():
        assert set(inspect.signature(theirs).parameters) <= set(ours), name
    assert set(loaders.NAMED_PRETRAINED_SAE_LOADERS) == set(loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS)
    assert get_pretrained_saes_directory() is get_pretrained_saes_directory()
    assert "conversion_func" in inspect.signature(PretrainedSAELookup).parameters
    assert {"hook_name", "neuronpedia_id", "prepend_bos"} <= loaders.LLM_METADATA_KEYS


def test_plain_sae_lens_loads_a_registered_release_offline_in_float32(folder):
    assert register() == (RELEASE,)
    sae = SAE.from_pretrained(RELEASE, SAE_ID)
    assert type(sae) is TopKSAE
    assert_float32_copy_of_half(sae)
    assert sae.cfg.metadata.hook_name == SAE_ID
    assert loaders.load_sae_config_from_huggingface(RELEASE, SAE_ID)["k"] == 4
    assert SAE.from_pretrained(RELEASE, SAE_ID, dtype="bfloat16").W_enc.dtype == torch.bfloat16


def test_plain_sae_lens_loads_half_precision_files_from_disk_in_float32(folder):
    assert_float32_copy_of_half(SAE.load_from_disk(folder / RELEASE / SAE_ID))


def test_the_sparsity_file_arrives_when_there_is_one(folder):
    register()
    assert SAE.from_pretrained_with_cfg_and_sparsity(RELEASE, SAE_ID)[2] is None
    save_file({"sparsity": torch.arange(3.0)}, folder / RELEASE / SAE_ID / "sparsity.safetensors")
    sparsity = SAE.from_pretrained_with_cfg_and_sparsity(RELEASE, SAE_ID)[2]
    assert sparsity is not None and sparsity.tolist() == [0, 1, 2]


def test_overrides_of_a_release_reach_the_metadata(folder):
    entry = package(folder, "second", config_overrides={"context_size": 64, "prepend_bos": False})
    registry.write_entry(replace(entry, saes=(replace(entry.saes[0], neuronpedia="tiny/1"),)), folder)
    register()
    metadata = SAE.from_pretrained("second", SAE_ID).cfg.metadata
    assert (metadata.context_size, metadata.prepend_bos, metadata.neuronpedia_id) == (64, False, "tiny/1")
    assert metadata.hook_name == SAE_ID
    assert get_pretrained_saes_directory()["second"].expected_l0 == {SAE_ID: 4.0}


def test_registering_again_changes_nothing_and_repairs_a_cleared_directory(folder):
    register()
    before = dict(get_pretrained_saes_directory())
    register()
    assert get_pretrained_saes_directory() == before
    lost = before.pop(RELEASE)
    get_pretrained_saes_directory().pop(RELEASE)
    assert register() == (RELEASE,)
    assert get_pretrained_saes_directory()[RELEASE] == lost


def test_registering_after_sae_lens_cleared_its_cache_makes_releases_load_again(folder):
    register()
    get_pretrained_saes_directory.cache_clear()
    assert RELEASE not in get_pretrained_saes_directory()
    register()
    assert_float32_copy_of_half(SAE.from_pretrained(RELEASE, SAE_ID))
    get_pretrained_saes_directory().pop(RELEASE)  # the fixture restores the directory that was cleared


def test_registering_follows_changes_of_the_registry(folder):
    package(folder, "second")
    assert set(register()) == {RELEASE, "second"}
    (folder / "second.yaml").unlink()
    assert register() == (RELEASE,)
    assert "second" not in get_pretrained_saes_directory()


def test_a_release_or_loader_that_is_not_ours_is_never_overwritten(folder):
    directory, table = get_pretrained_saes_directory(), loaders.NAMED_PRETRAINED_SAE_LOADERS
    theirs = directory["gpt2-small-res-jb"]
    package(folder, "gpt2-small-res-jb")
    with pytest.raises(ValueError, match="release 'gpt2-small-res-jb' that is not ours"):
        register()
    assert directory["gpt2-small-res-jb"] is theirs
    assert RELEASE not in directory and plugin.REGISTRY_LOADER not in table
    (folder / "gpt2-small-res-jb.yaml").unlink()
    table["openai"] = loaders.sae_lens_huggingface_loader
    with pytest.raises(ValueError, match="loader 'openai' that is not ours"):
        register()
    assert table["openai"] is loaders.sae_lens_huggingface_loader and RELEASE not in directory


def test_a_release_in_a_repository_goes_through_the_loader_that_it_names(folder, tmp_path, monkeypatch):
    record = SaeRecord("8", "a/8.pt", neuronpedia="gpt2-small/8-oai")
    entry = RegistryEntry(
        "remote", "tiny", (record,), repo_id="me/saes", conversion_func="openai", config_overrides={"context_size": 64}
    )
    registry.write_entry(entry, folder)
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, force_download: bool) -> str:
        asked.append((repo_id, filename))
        return str(openai_file(tmp_path))

    monkeypatch.setattr(openai_format, "hf_hub_download", download)
    direct = load_dictionary("remote/8", device="cpu")
    register()
    plain = SAE.from_pretrained("remote", "8")
    for sae in (direct, plain):
        assert (sae.cfg.metadata.context_size, sae.cfg.metadata.neuronpedia_id) == (64, "gpt2-small/8-oai")
        assert torch.equal(sae.W_enc, topk_sae().W_enc)
    assert set(asked) == {("me/saes", "a/8.pt")}
    registry.write_entry(replace(entry, conversion_func="magic"), folder)
    with pytest.raises(ValueError, match="unknown conversion_func 'magic' in release 'remote'; valid: sae_lens"):
        load_dictionary("remote/8", device="cpu")


@pytest.mark.parametrize("name", [RELEASE, f"{RELEASE}/{SAE_ID}", f"{RELEASE}:{SAE_ID}"])
def test_a_dictionary_loads_by_its_registry_name_and_changes_nothing_in_sae_lens(name, folder):
    sae = load_dictionary(name, device="cpu")
    assert_float32_copy_of_half(sae)
    assert RELEASE not in get_pretrained_saes_directory()
    assert plugin.REGISTRY_LOADER not in loaders.NAMED_PRETRAINED_SAE_LOADERS
    register()
    assert SAE.from_pretrained(RELEASE, SAE_ID).cfg.to_dict() == sae.cfg.to_dict()


def test_a_dictionary_loads_from_a_folder_an_openai_file_or_an_object(folder, tmp_path):
    assert_float32_copy_of_half(load_dictionary(folder / RELEASE / SAE_ID, device="cpu"))
    assert_float32_copy_of_half(load_dictionary(str(folder / RELEASE / SAE_ID), device="cpu"))
    sae = topk_sae()
    assert load_dictionary(sae) is sae
    loaded = load_dictionary(openai_file(tmp_path), device="cpu")
    assert isinstance(loaded, StandardSAE) and torch.equal(loaded.W_enc, sae.W_enc)


@pytest.mark.parametrize("name", ["owner/name:a/8", "gpt2-small-res-jb:blocks.0.hook_resid_pre"])
def test_other_names_with_an_id_go_to_sae_lens_without_its_advice(name, folder, monkeypatch):
    asked: list[tuple[str, str, str]] = []

    def load(release: str, sae_id: str, device: str, dtype: str) -> SAE:
        asked.append((release, sae_id, dtype))
        warnings.warn("You are loading an SAE using the HuggingFace repo_id 'x' directly.", stacklevel=2)
        return topk_sae()

    monkeypatch.setattr(SAE, "from_pretrained", load)
    config = {"architecture": "topk", "metadata": {"hook_name": SAE_ID}}
    monkeypatch.setattr(loaders, "load_sae_config_from_huggingface", lambda *_: config)
    load_dictionary(name, device="cpu", dtype="float16")
    assert asked == [(*name.split(":"), "float16")]
    config["architecture"] = "jumprelu_transcoder"
    with pytest.raises(ValueError, match="is a transcoder"):
        load_dictionary(name, device="cpu")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(FileNotFoundError("not in cache\nlong"), FileNotFoundError), (RuntimeError("size\n\tmismatch"), ValueError)],
)
def test_a_download_that_fails_ends_in_one_line(failure, expected, folder, monkeypatch):
    def fail(*_: object) -> dict[str, Any]:
        raise failure

    monkeypatch.setattr(loaders, "load_sae_config_from_huggingface", fail)
    with pytest.raises(expected, match="cannot load owner/name:8: ") as error:
        load_dictionary("owner/name:8", device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "", "owner/name", "unknown:id", ":x"])
def test_an_unknown_name_lists_the_valid_ones(name, folder):
    with pytest.raises(
        ValueError, match=f"unknown dictionary '{name}'; valid: .*; in the registry: {RELEASE}/{SAE_ID}$"
    ):
        load_dictionary(name, device="cpu")


def test_names_that_are_almost_right_say_what_is_wrong(folder, tmp_path):
    with pytest.raises(ValueError, match=f"unknown id 'x' in release '{RELEASE}'; valid: {SAE_ID}"):
        load_dictionary(f"{RELEASE}/x", device="cpu")
    with pytest.raises(ValueError, match=r"unknown id 'x' in release 'gpt2-small-res-jb'; valid: .* and 1 more$"):
        load_dictionary("gpt2-small-res-jb:x", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*absent\.pt"):
        load_dictionary(tmp_path / "absent.pt", device="cpu")
    (tmp_path / "weights.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"weights\.bin is neither a folder nor a \.pt file"):
        load_dictionary(tmp_path / "weights.bin", device="cpu")
    with pytest.raises(ValueError, match="unknown dtype 'half'; valid: float32"):
        load_dictionary(RELEASE, device="cpu", dtype="half")
    with pytest.raises(ValueError, match="unknown device 'gpu'; valid: cpu"):
        load_dictionary(RELEASE, device="gpu")


def test_a_transcoder_is_refused_by_name_as_object_folder_and_second_hook(tmp_path):
    config = TranscoderConfig.from_dict(
        {"architecture": "transcoder", "d_in": 4, "d_sae": 8, "d_out": 4, "apply_b_dec_to_input": False}
        | {"metadata": {"hook_name": "blocks.0.ln2", "hook_name_out": "blocks.0.mlp_out"}}
    )
    transcoder = Transcoder(config)
    message = r"is a transcoder \(transcoder: reads blocks\.0\.ln2, writes blocks\.0\.mlp_out\)"
    with pytest.raises(ValueError, match=f"this Transcoder {message}"):
        load_dictionary(transcoder)
    transcoder.save_model(tmp_path / "transcoder")
    with pytest.raises(ValueError, match=message):
        load_dictionary(tmp_path / "transcoder", device="cpu")
    sae = topk_sae()
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with pytest.raises(ValueError, match=r"this TopKSAE is a transcoder \(topk: reads blocks\.1"):
        load_dictionary(sae)


def spoil_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


def test_a_broken_folder_is_refused_in_one_line(tmp_path):
    def broken(name: str) -> Path:
        save_half(topk_sae(), tmp_path / name)
        return tmp_path / name

    def refused(folder: Path, message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message) as error:
            load_dictionary(folder, device="cpu")
        assert "\n" not in str(error.value)

    (folder := broken("a")).joinpath("cfg.json").unlink()
    refused(folder, "a lacks cfg.json", FileNotFoundError)
    (folder := broken("b")).joinpath("cfg.json").write_text('{"d_in": 3')
    refused(folder, r"cfg\.json is not valid JSON")
    (folder := broken("c")).joinpath("cfg.json").write_text("[]")
    refused(folder, r"cfg\.json holds a list; valid: a JSON object")
    spoil_config(folder := broken("d"), architecture="magic")
    refused(folder, "unknown architecture 'magic'; valid: .*topk")
    spoil_config(folder := broken("e"), d_sae=D_SAE + 1)
    refused(folder, "e is not a SAELens dictionary: .*size mismatch")
    spoil_config(folder := broken("f"), metadata=3)
    refused(folder, "f is not a SAELens dictionary")
    spoil_config(folder := broken("g"), d_in=None)
    refused(folder, "g is not a SAELens dictionary")
    weights = (broken("h") / "sae_weights.safetensors").read_bytes()
    (tmp_path / "h" / "sae_weights.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(tmp_path / "h", "h is not a SAELens dictionary")
    sae = topk_sae()
    sae.W_dec.data[0, 0] = float("nan")
    save_half(sae, tmp_path / "i")
    refused(tmp_path / "i", "i: W_dec holds NaN or infinite numbers")


def test_altered_and_truncated_files_of_a_packaged_release_are_refused(folder):
    path = folder / RELEASE / SAE_ID / "sae_weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors was altered"):
        load_dictionary(RELEASE, device="cpu")
    entry, _ = registry.find(RELEASE)
    registry.write_entry(replace(entry, provenance=Provenance()), folder)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors is truncated or damaged"):
        load_dictionary(RELEASE, device="cpu")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the file .*sae_weights\.safetensors"):
        load_dictionary(RELEASE, device="cpu")


def test_other_architectures_of_sae_lens_load_too(tmp_path):
    config = JumpReLUSAEConfig.from_dict(
        {"architecture": "jumprelu", "d_in": 4, "d_sae": 8}
        | {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": False}}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        JumpReLUSAE(config).save_model(tmp_path / "sae")
    assert type(load_dictionary(tmp_path / "sae", device="cpu")) is JumpReLUSAE


@pytest.mark.parametrize(
    ("release", "layer", "expected"),
    [
        ("gpt2-small-res-jb", 8, "gpt2-small-res-jb:blocks.8.hook_resid_pre"),
        ("gpt2-small-resid-post-v5-128k", 1, "gpt2-small-resid-post-v5-128k:blocks.1.hook_resid_post"),
        ("llama_scope_lxr_8x", 8, "llama_scope_lxr_8x:l8r_8x"),
        (RELEASE, 7, RELEASE),  # a single one needs no choice
        ("google/gemma:layer_8", 8, "google/gemma:layer_8"),
    ],
)
def test_a_layer_chooses_among_the_ids_of_a_release(release, layer, expected, folder, monkeypatch):
    asked = []

    def loaded(source: str, device: str, dtype: str) -> SAE:
        asked.append(source)
        sae = topk_sae()
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        return sae

    monkeypatch.setattr(plugin, "_load", loaded)
    load_dictionary(release, layer=layer)
    assert asked == [expected]


def test_a_layer_that_does_not_fit_is_refused_with_what_there_is(folder):
    with pytest.raises(ValueError, match=r"tiny-emotion reads blocks\.1\.hook_resid_post, not layer 2"):
        load_dictionary(RELEASE, layer=2)
    with pytest.raises(ValueError, match=r"0 SAEs of 'gpt2-small-res-jb' are at layer 40; name one: blocks\.0"):
        load_dictionary("gpt2-small-res-jb", layer=40)
    with pytest.raises(
        ValueError, match=r"SAEs of 'gemma-scope-2-270m-pt-res' are at layer 12; name one: layer_12_wid"
    ):
        load_dictionary("gemma-scope-2-270m-pt-res", layer=12)
    with pytest.raises(ValueError, match=r"this TopKSAE reads blocks\.1\.hook_resid_post, not layer 0"):
        load_dictionary(topk_sae(), layer=0)


@pytest.mark.parametrize("found", [None, "", "gpt2-small", "gpt2-small/8/../x", "https://elsewhere/a", "a/b\n"])
def test_a_feature_without_a_page_on_neuronpedia_has_no_link(found):
    sae = topk_sae()
    sae.cfg.metadata.neuronpedia_id = found
    assert feature_url(sae.cfg.metadata.neuronpedia_id, 3) is None


def test_a_feature_links_to_its_page_on_neuronpedia():
    sae = topk_sae()
    sae.cfg.metadata.neuronpedia_id = "gpt2-small/8-res_post_128k-oai"
    assert (
        feature_url(sae.cfg.metadata.neuronpedia_id, 62556)
        == "https://www.neuronpedia.org/gpt2-small/8-res_post_128k-oai/62556"
    )
