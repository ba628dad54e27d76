import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blob_server import BlobServer, serving
from reference_openai import encode_and_reconstruct
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading import pretrained_saes_directory as directory
from test_openai_format import D_IN, checkpoint, inputs, saved
from transformers import GPT2Config, GPT2LMHeadModel

import sae_emotion_plugin
from sae_emotion_plugin import downloads, openai_releases, registry
from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.openai_format import load_openai_checkpoint
from sae_emotion_plugin.openai_releases import openai_blob_loader
from sae_emotion_plugin.plugin import load_dictionary, register
from sae_emotion_plugin.registry import feature_url

REGISTRY = Path(__file__).parents[1] / "registry"
README = REGISTRY.parent / "README.md"
VERSIONS = {"v1": "", "v4": "_v4", "v5_32k": "_v5_32k", "v5_128k": "_v5_128k"}
HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}
"""OpenAI's locations and what TransformerLens calls them, from the example in OpenAI's README."""
RELEASE, SAE_ID = "gpt2-small-openai-v5_128k", "blocks.8.hook_resid_post"
FILE = "gpt2-small/resid_post_mlp_v5_128k/autoencoders/8.pt"
PATH = f"/sparse-autoencoder/{FILE}"

pytestmark = pytest.mark.usefixtures("sae_lens_as_before")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlobServer]:
    """OpenAI's blob store with a small file in the place of layer 8 of v5_128k, and an empty cache."""
    monkeypatch.setattr(downloads, "BACK_OFF", 0.001)
    monkeypatch.setattr(registry, "packaged_folder", lambda: REGISTRY)
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("SAE_EMOTION_CACHE", str(tmp_path / "cache"))
    with serving() as server:
        server.files[PATH] = saved(checkpoint("TopK"), tmp_path).read_bytes()
        monkeypatch.setenv(openai_releases.URL_VARIABLE, server.url)
        yield server


def entry(version: str) -> registry.RegistryEntry:
    return registry.read_entry(REGISTRY / f"gpt2-small-openai-{version}.yaml")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_sae_of_a_release_is_there_with_its_place_its_hook_and_its_settings(version):
    found = entry(version)
    locations = list(HOOKS)[:2] if version in ("v1", "v4") else list(HOOKS)[1:]
    expected = {
        f"blocks.{layer}.{HOOKS[location]}": f"gpt2-small/{location}{VERSIONS[version]}/autoencoders/{layer}.pt"
        for location in locations
        for layer in range(12)
    }
    assert {sae.id: sae.path for sae in found.saes} == expected
    assert len(found.saes) == (24 if version in ("v1", "v4") else 48)
    assert (found.model, found.repo_id) == ("gpt2-small", "openaipublic/sparse-autoencoder")
    assert found.config_overrides == {
        "model_name": "gpt2-small",
        "prepend_bos": False,
        "context_size": 64,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }


def test_the_neuronpedia_ids_are_those_that_sae_lens_knows_for_the_same_hook():
    known = {
        (lookup.neuronpedia_id[sae_id], sae_id)
        for release, lookup in directory.get_pretrained_saes_directory().items()
        if "OAI-v5" in lookup.repo_id and not release.startswith("gpt2-small-openai")
        for sae_id in lookup.saes_map
    }
    ours = {(sae.neuronpedia, sae.id) for version in VERSIONS for sae in entry(version).saes if sae.neuronpedia}
    assert ours == known and len(ours) == 96
    assert all(sae.neuronpedia is None for version in ("v1", "v4") for sae in entry(version).saes)


def check(sae: SAE) -> None:
    state = checkpoint("TopK")
    codes, reconstruction = encode_and_reconstruct(state, inputs(4))
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(inputs(4)).double(), codes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(inputs(4)).double(), reconstruction, rtol=1e-5, atol=1e-4)
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.model_name, metadata.context_size) == (SAE_ID, "gpt2-small", 64)
    assert (metadata.prepend_bos, metadata.model_from_pretrained_kwargs) == (False, {"center_writing_weights": False})
    assert (
        feature_url(sae.cfg.metadata.neuronpedia_id, 62556)
        == "https://www.neuronpedia.org/gpt2-small/8-res_post_128k-oai/62556"
    )


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")
def test_plain_sae_lens_loads_a_release_by_name_and_a_second_time_without_a_network(server):
    assert RELEASE in register()
    check(SAE.from_pretrained(RELEASE, SAE_ID))
    assert server.asked == [(PATH, None)]
    server.faults = ["503"] * 99
    check(SAE.from_pretrained(RELEASE, SAE_ID))
    config = loaders.load_sae_config_from_huggingface(RELEASE, SAE_ID)
    assert config["metadata"]["hook_name"] == SAE_ID and config["d_sae"] == 40
    assert len(server.asked) == 1


def test_the_readme_example_prints_the_features_of_three_sentences(server, word_tokenizer, monkeypatch, capsys):
    # Nine layers of a random GPT-2 as wide as the small file.
    config = GPT2Config(
        vocab_size=len(word_tokenizer), n_embd=D_IN, n_layer=9, n_head=2, architectures=["GPT2LMHeadModel"]
    )
    model = load_model(GPT2LMHeadModel(config).eval(), tokenizer=word_tokenizer)
    monkeypatch.setattr(sae_emotion_plugin, "load_model", lambda name: {"gpt2": model}[name])
    section = README.read_text().split("## OpenAI's dictionaries")[1]
    (example,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" [")[0] for line in lines] == ["he is such a good person", "he is such a fool", "i hate you"]
    _, cache = model.run_with_cache(model.to_tokens("i hate you", prepend_bos=False))
    codes, _ = encode_and_reconstruct(checkpoint("TopK"), cache[canonical_hook(model, SAE_ID)][0, -1:].detach())
    assert json.loads(f"[{lines[2].split(' [')[1]}") == codes[0].topk(5).indices.tolist()


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")
@pytest.mark.parametrize("faults", [["503"], ["drop", "drop"], ["503", "drop", "long", "503", "drop"]])
def test_a_troubled_server_still_gives_the_sae(faults, server):
    register()
    server.faults = faults
    check(SAE.from_pretrained(RELEASE, SAE_ID))


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")
@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("503", FileNotFoundError, "cannot download {url}: the server answers 503 Service Unavailable"),
        ("long", FileNotFoundError, "cannot download {url}: the "),
        ("short", ValueError, r"{url} is not a readable torch\.save file \(truncated or damaged\)"),
        ("html", ValueError, "{url} is a web page, not a file written by torch.save; download it again"),
    ],
)
def test_a_server_that_is_never_right_ends_in_one_line_and_the_next_try_works(fault, kind, message, server, tmp_path):
    register()
    server.faults = [fault] * 99
    with pytest.raises(kind, match=message.format(url=re.escape(server.url + PATH))) as error:
        SAE.from_pretrained(RELEASE, SAE_ID)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.pt"))
    server.faults = []
    check(SAE.from_pretrained(RELEASE, SAE_ID))


@pytest.mark.parametrize(
    "name",
    [
        f"{RELEASE}/{SAE_ID}",
        f"az://openaipublic/sparse-autoencoder/{FILE}",
        f"https://openaipublic.blob.core.windows.net/sparse-autoencoder/{FILE}",
        f"{{url}}/sparse-autoencoder/{FILE}",
    ],
)
def test_the_same_sae_comes_by_name_and_by_each_url_and_is_downloaded_once(name, server):
    for _ in range(2):
        check(load_dictionary(name.format(url=server.url), device="cpu"))
    assert server.asked == [(PATH, None)]


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")
def test_the_blob_loader_works_as_a_converter_without_registration(server):
    sae = SAE.from_pretrained("openaipublic/sparse-autoencoder", FILE, converter=openai_blob_loader)
    check(sae)
    server.files[PATH] = b"\0changed"
    with pytest.raises(ValueError, match="truncated or damaged"):
        SAE.from_pretrained("openaipublic/sparse-autoencoder", FILE, converter=openai_blob_loader, force_download=True)


def test_a_file_anywhere_else_loads_by_its_url_without_metadata(server):
    server.files["/mine/home-made.pt?key=1"] = server.files[PATH]
    for _ in range(2):
        sae = load_dictionary(f"{server.url}/mine/home-made.pt?key=1", device="cpu")
        assert sae.cfg.metadata.hook_name is None
    assert server.asked == [("/mine/home-made.pt?key=1", None)]
    for url in ("ftp://host/8.pt", f"{server.url}/mine/page.html", "https:///8.pt", "az://only/8.pt"):
        with pytest.raises(ValueError, match=r"cannot load '.*'; valid: an http, https or az URL of a \.pt file"):
            load_dictionary(url, device="cpu")


def test_a_recorded_hash_is_compared(server, tmp_path):
    digest = hashlib.sha256(b"something else").hexdigest()
    mine = replace(entry("v5_128k"), release="mine", repo_id="openaipublic/mirror")
    provenance = replace(mine.provenance, sha256={FILE: digest})
    registry.write_entry(replace(mine, provenance=provenance), tmp_path)
    server.files[f"/mirror/{FILE}"] = server.files[PATH]
    with pytest.raises(ValueError, match=f"not {digest}"):
        load_dictionary(f"mine/{SAE_ID}", device="cpu")
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_names_that_are_wrong_are_refused_before_anything_is_asked(server):
    with pytest.raises(ValueError, match=r"unknown id 'blocks\.12.*' in release 'gpt2-small-openai-v5_128k'"):
        load_dictionary(f"{RELEASE}/blocks.12.hook_resid_post", device="cpu")
    with pytest.raises(ValueError, match=r"4 SAEs of 'gpt2-small-openai-v5_128k' are at layer 8; name one: "):
        load_dictionary(RELEASE, layer=8, device="cpu")
    with pytest.raises(ValueError, match=r"file is '\.\./8\.pt'; valid: a relative path inside its folder"):
        openai_blob_loader("openaipublic/sparse-autoencoder", "../8.pt")
    assert server.asked == []


def test_the_cache_moves_with_the_option_of_the_command(server, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from sae_emotion_plugin.cli import main

    arguments = ["convert", f"{RELEASE}/{SAE_ID}", str(tmp_path / "out.pt"), "--to", "openai", "--json"]
    done = CliRunner().invoke(main, ["--cache-dir", str(tmp_path / "elsewhere"), *arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"file": str(tmp_path / "out.pt")}
    assert [path.name for path in (tmp_path / "elsewhere").rglob("*.pt")] == ["8.pt"]
    assert not (tmp_path / "cache").exists()
    written, stored = (
        torch.load(path, weights_only=True) for path in (tmp_path / "out.pt", tmp_path / "autoencoder.pt")
    )
    assert torch.equal(written["encoder.weight"], stored["encoder.weight"])
    done = CliRunner().invoke(main, [*arguments[:-1], "--hook-name", "x"])
    assert done.exit_code == 2 and "OpenAI's format cannot hold hook_name" in done.stderr


def test_the_stanzas_have_no_key_that_sae_lens_does_not_know():
    for version in VERSIONS:
        document = yaml.safe_load((REGISTRY / f"gpt2-small-openai-{version}.yaml").read_text())
        assert set(document) == {
            "release", "repo_id", "model", "conversion_func", "config_overrides", "saes", "provenance",
        }  # fmt: skip
        assert all(set(sae) <= {"id", "path", "neuronpedia"} for sae in document["saes"])


@pytest.mark.slow
def test_at_full_size_codes_and_chosen_features_are_those_of_the_published_equations(tmp_path):
    generator = torch.Generator().manual_seed(0)
    d_in, d_sae = 768, 131_072
    decoder = torch.nn.functional.normalize(torch.randn(d_in, d_sae, generator=generator), dim=0)
    state: dict[str, Any] = {
        "pre_bias": torch.randn(d_in, generator=generator) / 10,
        "latent_bias": torch.randn(d_sae, generator=generator) / 10,
        "encoder.weight": decoder.T.contiguous(),
        "decoder.weight": decoder,
        "activation": "TopK",
        "activation_state_dict": {"k": 32, "postact_fn": "ReLU"},
    }
    sae = load_openai_checkpoint(saved(state, tmp_path))
    x = torch.randn(4, d_in, generator=generator) * 3
    codes, reconstruction = encode_and_reconstruct(state, x)
    with torch.no_grad():
        ours = sae.encode(x)
        rebuilt = sae.decode(ours)
    assert torch.equal(ours > 0, codes > 0) and int((ours > 0).sum()) == 4 * 32
    torch.testing.assert_close(ours.double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rebuilt.double(), reconstruction, rtol=1e-5, atol=1e-5)
