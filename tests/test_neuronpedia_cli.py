import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import D_SAE, HOOK, make_sae
from neuronpedia_server import KEY, neuronpedia_server
from planted_dashboards import planted_dashboards

from sae_emotion_plugin.cli import main
from sae_emotion_plugin.feature_labels import FeatureLabel, write_labels
from sae_emotion_plugin.interventions.plans import Intervention, SteeringPlan
from sae_emotion_plugin.publishing.neuronpedia_checks import check_export
from sae_emotion_plugin.publishing.neuronpedia_source import NeuronpediaModel, check_same_dictionary, source_at
from sae_emotion_plugin.publishing.neuronpedia_tables import read_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dictionary, its dashboards, labels and a plan."""
    folder = tmp_path_factory.mktemp("place")
    sae = make_sae()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae.save_model(folder / "sae")
    aligned = np.argsort(-sae.W_dec.detach().numpy(), axis=1)[:, :2]
    values = np.take_along_axis(sae.W_dec.detach().numpy(), aligned, axis=1)
    meta = {"n_tokens": 60, "hook_name": HOOK, "folded": False}
    given = {"meta": meta, "aligned_neurons": aligned, "aligned_values": values}
    planted_dashboards(d_sae=D_SAE, sequences=30, length=2, **given).save(folder / "dashboards")
    write_labels(folder / "labels.jsonl", [FeatureLabel(7, ("joy",), "joy", {"auroc": 0.9}, "by hand", "1", "me")])
    SteeringPlan(HOOK, (Intervention(7, 2.0),), unit="activation").save(folder / "plan.json")
    return folder


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    named = {
        "--dashboards": place / "dashboards",
        "--labels": place / "labels.jsonl",
        "--plan": place / "plan.json",
        "--published": "owner/repo:blocks.0",
        "--creator": "A. Person",
        "--layers": 2,
        "--created-at": "2026-01-31",
    }
    options = [str(part) for pair in named.items() for part in pair]
    return ["publish", "neuronpedia", str(place / "sae"), str(out), *options, *more]


def run(*given: str) -> Result:
    return CliRunner().invoke(main, list(given))


def refused(*given: str) -> str:
    result = run(*given)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def test_the_command_writes_a_sound_export_of_what_the_dictionary_says(place: Path, tmp_path: Path) -> None:
    result = run(*arguments(place, tmp_path / "np"))
    assert result.exit_code == 0, result.output
    assert f"{D_SAE} features" in result.output and "a feature; checked" in result.output
    assert check_export(tmp_path / "np").problems == ()
    path = tmp_path / "np/v1/tiny/0-emotion-res-64"
    (source,) = read_rows(path / "source.jsonl")
    assert (source["hfRepoId"], source["hfFolderId"]) == ("owner/repo", "blocks.0")
    assert source["saelensConfig"]["d_sae"] == D_SAE
    assert source["saelensConfig"]["hook_name"] == HOOK
    assert source["createdAt"] == "2026-01-31T00:00:00.000Z"
    assert [row["description"] for row in read_rows(path / "explanations")] == ["joy"]
    (vector,) = read_rows(tmp_path / "np/v1/tiny/0-emotion-res-64-vectors/features")
    assert vector["vector"] == pytest.approx((2 * make_sae().W_dec[7]).tolist(), rel=1e-5)


def test_a_dry_run_sends_and_keeps_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    result = run(*arguments(place, tmp_path / "np", "--dry-run"))
    assert result.exit_code == 0, result.output
    paths = [line.split()[1] for line in result.output.splitlines() if line.startswith("POST")]
    assert paths == ["source-set/new", "feature/upload-batch", "list/new", "list/add-features", "vector/new"]
    assert "nothing was sent" in result.output
    bodies = [
        json.loads(line) for line in run(*arguments(place, tmp_path / "np", "--dry-run", "--json")).output.splitlines()
    ]
    assert [body["path"] for body in bodies] == paths
    assert len(bodies[1]["body"]["features"]) == D_SAE - 2
    assert list(tmp_path.iterdir()) == []


def test_a_push_resumes_with_the_export_that_is_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with neuronpedia_server() as server:
        given = arguments(place, tmp_path / "np", "--push", "--no-lists", "--server", server.url)
        monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
        assert "NEURONPEDIA_API_KEY is not set" in refused(*given)
        monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
        server.failures = [None, (403, {}, '{"message": "not yours"}')]
        assert "not yours; 1 requests are done" in refused(*given)
        server.vectors, length = [], 32
        monkeypatch.setattr(server, "new_vector", lambda body: {"vector": {"source": "s", "index": str(length)}})
        result = run(*given, "--json")
        assert result.exit_code == 0, result.output
        assert (json.loads(result.output)["sent"], json.loads(result.output)["skipped"]) == (2, 1)
        assert len(server.features) == D_SAE - 2
        assert KEY not in result.output


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("--dashboards", "needs --dashboards"),
        ("--creator", "needs --creator"),
        ("--published", "give --published OWNER/REPO:FOLDER"),
    ],
)
def test_what_is_missing_is_named(place: Path, tmp_path: Path, drop: str, message: str) -> None:
    given = arguments(place, tmp_path / "np")
    at = given.index(drop)
    assert message in refused(*given[:at], *given[at + 2 :])
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "np"
    assert "there is no folder" in refused(*arguments(place, out, "--dashboards", str(tmp_path / "none")))
    assert "labels" in refused(*arguments(place, out, "--labels", str(tmp_path / "none")))
    assert "valid: OWNER/REPO:FOLDER" in refused(*arguments(place, out, "--published", "owner/repo"))
    assert "need --push or --dry-run" in refused(*arguments(place, out, "--no-lists"))
    assert "yesterday" in refused(*arguments(place, out, "--created-at", "yesterday"))
    assert list(tmp_path.iterdir()) == []


def test_dashboards_of_another_dictionary_are_refused(place: Path) -> None:
    sae = make_sae()
    with pytest.raises(ValueError, match="8 features"):
        check_same_dictionary(planted_dashboards(), sae)
    for largest in (31, 32):
        aligned = np.full((D_SAE, 2), largest)
        random = planted_dashboards(d_sae=D_SAE, meta={"n_tokens": 60, "hook_name": HOOK}, aligned_neurons=aligned)
        with pytest.raises(ValueError, match="its decoder has other weights"):
            check_same_dictionary(random, sae)


def test_a_folded_dictionary_is_recognised_by_its_unit_rows() -> None:
    rows = make_sae().W_dec.detach().numpy()
    aligned = np.argsort(-rows, axis=1)[:, :2]
    unit = np.take_along_axis(rows / np.linalg.norm(rows, axis=1, keepdims=True), aligned, axis=1)
    given = {"aligned_neurons": aligned, "aligned_values": unit}
    meta = {"n_tokens": 60, "hook_name": HOOK}
    check_same_dictionary(planted_dashboards(d_sae=D_SAE, meta=meta | {"folded": True}, **given), make_sae())
    with pytest.raises(ValueError, match="other weights"):
        check_same_dictionary(planted_dashboards(d_sae=D_SAE, meta=meta | {"folded": False}, **given), make_sae())


@pytest.mark.parametrize(
    ("hook", "known", "expected"),
    [
        ("blocks.9.hook_resid_post", None, ("9-emotion-res-64", "Residual")),
        ("blocks.3.hook_mlp_out", None, ("3-emotion-mlp-64", "MLP")),
        ("blocks.3.attn.hook_z", None, ("3-emotion-att-64", "Attention")),
        ("blocks.6.hook_resid_pre", "gpt2-small/6-res-jb", ("6-res-jb", "Residual")),
        ("blocks.6.hook_resid_pre", "gemma/6-gemmascope-res__l0-80", ("6-gemmascope-res", "Residual")),
    ],
)
def test_the_source_is_named_by_where_the_dictionary_reads(
    hook: str, known: str | None, expected: tuple[str, str]
) -> None:
    sae = make_sae(hook_name=hook)
    sae.cfg.metadata.neuronpedia_id = known
    source = source_at(sae, NeuronpediaModel("tiny", 12, 32), published="o/r:f", creator="me", created_at="2026-01-31")
    assert (source.id, source.kind, source.release) == (*expected, "r")


def test_a_dictionary_that_reads_no_block_has_no_source() -> None:
    with pytest.raises(ValueError, match="hook_embed"):
        source_at(
            make_sae(hook_name="hook_embed"),
            NeuronpediaModel("tiny", 12, 32),
            published="o/r:f",
            creator="me",
            created_at="2026-01-31",
        )


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sae_emotion_plugin.cli import main\n"
        "assert CliRunner().invoke(main, ['publish', 'neuronpedia', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'sae_lens', 'numpy', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
