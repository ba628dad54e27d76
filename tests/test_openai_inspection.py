import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_openai_format import D_IN, D_SAE, K, checkpoint, saved

from sae_emotion_plugin.cli import main
from sae_emotion_plugin.openai_inspection import DEAD_AFTER, inspect_checkpoint


def test_a_summary_counts_what_was_planted(tmp_path):
    state = checkpoint("TopK")
    state["stats_last_nonzero"] = torch.tensor([0] * 30 + [DEAD_AFTER] * 3 + [DEAD_AFTER + 1] * 7)
    state["latents_activation_frequency"] = torch.tensor([0.0] * 4 + [3e-5] * 6 + [0.02] * 20 + [1e-9] * 5 + [1.0] * 5)
    state["decoder.weight"] = torch.zeros(D_IN, D_SAE)
    state["decoder.weight"][0] = torch.arange(D_SAE) + 1.0
    path = saved(state, tmp_path)
    found = inspect_checkpoint(path)
    assert (found.d_in, found.d_sae, found.dtype, found.activation, found.k) == (D_IN, D_SAE, "float32", "TopK", K)
    assert (found.dead, found.version, found.tied, found.not_finite) == (7, None, False, {})
    assert inspect_checkpoint(path, dead_after=0).dead == 10
    assert found.decoder_norms == {"smallest": 1.0, "median": 20.0, "largest": 40.0}
    assert found.frequencies is not None
    counted = {(each.lower, each.upper): each.latents for each in found.frequencies if each.latents}
    assert counted == {(0, 0): 4, (0, 1e-7): 5, (1e-5, 1e-4): 6, (0.01, 0.1): 20, (1, 1): 5}
    assert found.file_bytes == path.stat().st_size
    with pytest.raises(ValueError, match="dead_after is -1; valid: a whole number from 0"):
        inspect_checkpoint(path, dead_after=-1)


def test_numbers_that_are_not_finite_are_counted_not_refused(tmp_path):
    state = checkpoint("ReLU")
    state["decoder.weight"][2, 5] = float("nan")
    state["encoder.weight"][:2, 0] = float("inf")
    found = inspect_checkpoint(saved(state, tmp_path))
    assert found.not_finite == {"encoder.weight": 2, "decoder.weight": 1}
    state["decoder.weight"][:] = float("nan")
    found = inspect_checkpoint(saved(state, tmp_path))
    assert found.decoder_norms is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_a_file_does_not_record_is_not_made_up(tmp_path):
    state = checkpoint("ReLU")
    del state["stats_last_nonzero"], state["latents_activation_frequency"]
    found = inspect_checkpoint(saved(state, tmp_path))
    assert (found.dead, found.frequencies) == (None, None)
    assert "not recorded" in repr(found)


@pytest.mark.parametrize(
    ("activation", "d_in", "d_sae", "folder", "version"),
    [
        ("TopK", 768, 32_768, "x", "v5_32k"),
        ("ReLU", 768, 32_768, "x", "v1 or v4"),
        ("ReLU", 768, 32_768, "resid_delta_mlp/autoencoders", "v1"),
        ("ReLU", 768, 32_768, "resid_delta_mlp_v4/autoencoders", "v4"),
        ("TopK", 768, 1000, "resid_post_mlp_v5_32k", None),
    ],
)
def test_openais_versions_are_recognised(activation, d_in, d_sae, folder, version, tmp_path):
    state = {
        "pre_bias": torch.zeros(d_in),
        "latent_bias": torch.zeros(d_sae),
        "encoder.weight": torch.zeros(d_sae, d_in, dtype=torch.float16),
        "decoder.weight": torch.zeros(d_in, d_sae, dtype=torch.float16),
        "activation": activation,
        "activation_state_dict": {"k": 32, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }
    (tmp_path / folder).mkdir(parents=True)
    assert inspect_checkpoint(saved(state, tmp_path / folder)).version == version


def test_the_command_prints_a_table_a_histogram_or_json(tmp_path: Path):
    state = checkpoint("TopK")
    state["latents_activation_frequency"] = torch.tensor([0.02] * 30 + [0.0] * 10)
    path = saved(state, tmp_path)
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert done.exit_code == 0, done.output
    assert f"TopK, k = {K}" in done.output and "12 x 40 float32" in done.output
    bars = {line.split("  ")[0]: line.count("#") for line in done.output.splitlines() if "#" in line}
    assert bars == {"0.01 to 0.1": 40, "no token": 13}
    done = CliRunner().invoke(main, ["inspect", str(path), "--json", "--dead-after", "38"])
    assert json.loads(done.stdout) == json.loads(json.dumps(inspect_checkpoint(path, dead_after=38).to_dict()))
    assert json.loads(done.stdout)["dead"] == 1
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "absent.pt")])
    assert done.exit_code == 2 and "there is no checkpoint at" in done.stderr
