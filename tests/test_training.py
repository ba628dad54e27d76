import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK, WORDS
from sae_lens import SAE
from safetensors.torch import load_file

from sae_emotion_plugin import activation_store, registry, training
from sae_emotion_plugin.activations import activation_batches
from sae_emotion_plugin.evaluation import DictionaryReport, Evaluation, evaluate
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe
from sae_emotion_plugin.training import (
    TrainedDictionary,
    dictionaries,
    fitting,
    recipe_documents,
    register_dictionary,
    runs,
    spaces,
    train,
)
from sae_emotion_plugin.training import texts as training_texts
from sae_emotion_plugin.training.steps import Trainer

RECIPE = TrainingRecipe(
    name="tiny-emotion",
    sae_id="layer-0",
    model="tiny",
    hook_name=HOOK,
    texts=(
        TextSource("single.jsonl", licence="CC0 1.0"),
        TextSource("novels.jsonl", document="title", licence="public domain"),
    ),
    d_sae=64,
    k=4,
    epochs=3.0,
    lr=0.01,
    context_size=16,
    held_out_share=0.1,
    batch_size=64,
    lr_warm_up_steps=2,
    dead_token_window=512,
)
MADE_UP = DictionaryReport(1, 2, 64, 0.5, 0.5, 0, 0.1, 0.5, 4.0, 0, 1.0, 2.0, 3.0, 9.0)
FILES = ["cfg.json", "provenance.json", "recipe.yaml", "report.json", "sae_weights.safetensors"]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS[4:], size=rng.integers(2, 12)))


REPORT = Evaluation.report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    single = [{"text": sentence(rng)} for _ in range(80)]
    novels = [{"text": sentence(rng), "title": f"novel {n % 8}"} for n in range(80)]
    for name, rows in (("single.jsonl", single), ("novels.jsonl", novels)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 300)


@pytest.fixture(autouse=True)
def quiet_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def run(
    bridge: Any, root: Path, out: Path, recipe: TrainingRecipe = RECIPE, *, measured: bool = False, **options: Any
) -> TrainedDictionary:
    """A training whose report is made up, unless it is to be `measured`, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        if not measured and Evaluation.report is REPORT:
            patch.setattr(Evaluation, "report", lambda *_: MADE_UP)
        return train(recipe, bridge, root, out, progress=False, **options)


@pytest.fixture(scope="module")
def trained(bridge: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainedDictionary]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_store, "SHARD_TOKENS", 300)
        yield run(bridge, root, tmp_path_factory.mktemp("trained") / "tiny", measured=True)


def weights(trained: TrainedDictionary) -> dict[str, torch.Tensor]:
    return load_file(trained.folder / "sae_weights.safetensors")


def assert_equal_weights(ours: TrainedDictionary, theirs: TrainedDictionary) -> None:
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_training_twice_with_one_seed_gives_equal_weights(
    bridge: Any, root: Path, trained: TrainedDictionary, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    again = run(bridge, root, tmp_path / "again", measured=True)
    assert_equal_weights(again, trained)
    assert again.report == trained.report
    assert again.sha256 == trained.sha256


def test_another_seed_gives_other_weights(bridge: Any, root: Path, trained: TrainedDictionary, tmp_path: Path) -> None:
    other = run(bridge, root, tmp_path / "other", replace(RECIPE, seed=1))
    assert not torch.allclose(weights(other)["W_enc"].float(), weights(trained)["W_enc"].float(), atol=1e-2)


def test_training_leaves_torchs_global_generator_alone(bridge: Any, root: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    run(bridge, root, tmp_path / "tiny")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_explains_more_than_an_untrained_dictionary(
    bridge: Any, root: Path, trained: TrainedDictionary, tmp_path: Path
) -> None:
    brief = run(bridge, root, tmp_path / "brief", replace(RECIPE, epochs=0.1), measured=True)
    assert trained.report.fvu < 0.7 * brief.report.fvu
    assert trained.report.l0 == pytest.approx(4, abs=0.5)


def test_the_folder_holds_weights_recipe_report_and_provenance(root: Path, trained: TrainedDictionary) -> None:
    assert sorted(path.name for path in trained.folder.iterdir()) == FILES
    assert trained.sha256 == training.file_hashes(trained.folder) and sorted(trained.sha256) == FILES
    assert TrainingRecipe.read(trained.folder / "recipe.yaml") == RECIPE
    assert DictionaryReport.load(trained.folder / "report.json") == trained.report
    provenance = json.loads((trained.folder / "provenance.json").read_text())
    assert provenance["model"] == {"name": "unknown"} and provenance["seed"] == 0
    single, novels = provenance["texts"]
    assert single["path"] == "single.jsonl" and single["licence"] == "CC0 1.0"
    assert single["sha256"] == training.file_hashes(root)["single.jsonl"]
    assert (single["held_out_documents"], single["training_texts"]) == (8, 72)
    assert (novels["held_out_documents"], novels["training_texts"]) == (1, 70)
    assert provenance["held_out_documents"] == trained.report.n_documents == 18
    assert provenance["versions"].keys() == {
        "sae-emotion-plugin",
        "sae-lens",
        "torch",
        "transformer-lens",
        "transformers",
    }
    assert {path.stat().st_mode & 0o777 for path in trained.folder.iterdir()} == {0o644}


def test_the_saved_weights_are_half_precision_with_unit_decoder_rows(trained: TrainedDictionary) -> None:
    found = weights(trained)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "W_enc": torch.float16,
        "W_dec": torch.float16,
        "b_enc": torch.float32,
        "b_dec": torch.float32,
    }
    torch.testing.assert_close(found["W_dec"].float().norm(dim=-1), torch.ones(64), atol=1e-3, rtol=0)
    assert found["W_dec"].shape == (64, D_MODEL)


def test_plain_sae_lens_loads_the_folder_and_needs_to_know_nothing(
    bridge: Any, root: Path, trained: TrainedDictionary
) -> None:
    sae = SAE.load_from_disk(trained.folder)
    assert sae.dtype == torch.float32 and sae.cfg.normalize_activations == "none"
    assert sae.cfg.metadata.hook_name == HOOK and sae.cfg.metadata.context_size == 16 and sae.cfg.metadata.prepend_bos
    assert sae.cfg.metadata.model_from_pretrained_kwargs == {}
    held_out = recipe_documents(RECIPE, bridge, root)[1]
    assert evaluate(bridge, sae, held_out, progress=False) == trained.report


def test_codes_and_reconstructions_equal_the_trainers_in_normalised_space(
    bridge: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(*arguments: Any, **options: Any) -> Any:
        seen["fitted"] = fitting.fit_recipe(*arguments, **options)
        return seen["fitted"]

    monkeypatch.setattr(runs, "fit_recipe", spy)
    folder = run(bridge, root, tmp_path / "tiny").folder
    own, mean, scale = seen["fitted"].sae.eval(), seen["fitted"].space.mean, seen["fitted"].space.scale
    saved = SAE.load_from_disk(folder)
    texts = ["he is such a joy", "sad fear anger w1 w2 w3"]
    (batch,) = activation_batches(bridge, texts, HOOK, progress=False)
    normalised = (batch.vectors - mean) / scale
    assert float(scale) != pytest.approx(1, abs=0.01) and float(mean.abs().max()) > 0.1
    with torch.inference_mode():
        codes, expected = saved.encode(batch.vectors), own.encode(normalised)
        rebuilt, expected_rebuilt = saved.decode(codes), own.decode(expected)
    # Rounding to float16 may swap features that tie for the last place.
    same = (codes > 0) == (expected > 0)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(codes[same] / scale, expected[same], atol=0.02, rtol=0.01)
    agree = same.all(-1)
    assert agree.float().mean() > 0.8
    torch.testing.assert_close(((rebuilt - mean) / scale)[agree], expected_rebuilt[agree], atol=0.02, rtol=0.01)


def test_no_document_is_on_both_sides(bridge: Any, root: Path, tmp_path: Path) -> None:
    training_texts, held_out, _ = recipe_documents(RECIPE, bridge, root)
    for name, column in (("single.jsonl", None), ("novels.jsonl", "title")):
        rows = [json.loads(line) for line in (root / name).read_text().splitlines()]
        documents: dict[str, set[str]] = {}
        for number, row in enumerate(rows):
            documents.setdefault(row[column] if column else str(number), set()).add(row["text"])
        sides = [(bool(texts & set(training_texts)), bool(texts & set(held_out))) for texts in documents.values()]
        assert (True, True) not in sides and (False, False) not in sides
        assert sum(held for _, held in sides) == max(1, round(0.1 * len(documents)))
    assert len(training_texts) + len(held_out) == 160


def test_a_source_gives_the_tokens_asked_for_and_no_more_texts(bridge: Any, root: Path) -> None:
    recipe = replace(RECIPE, texts=(TextSource("single.jsonl", tokens=50),))
    texts, held_out, _ = recipe_documents(recipe, bridge, root)
    lengths = [len(text.split()) for text in texts]
    assert 50 <= sum(lengths) < 50 + 12 and len(held_out) == 8


def test_the_first_tokens_are_the_same_however_many_texts_are_read_at_a_time(
    bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["he is", "such a joy", "sad", "w1 w2 w3 w4", "fear"]  # 2, 5, 6, 10 and 11 tokens
    for block in (1, 2, 3, 512):
        monkeypatch.setattr(training_texts, "BLOCK", block)
        kept = [len(training_texts.first_tokens(bridge, texts, tokens)) for tokens in (1, 2, 3, 5, 6, 7, 11, 99)]
        assert kept == [1, 1, 2, 2, 3, 4, 5, 5]


def test_a_source_with_one_document_cannot_keep_one_for_the_report(bridge: Any, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("he is joy")
    with pytest.raises(ValueError, match=r"one\.txt has 1 documents, too few to keep one for the report"):
        run(bridge, tmp_path, tmp_path / "out", replace(RECIPE, texts=(TextSource("one.txt"),)))


class Stop(Exception):
    """Stands for whatever ends a run: Ctrl-C, a full disk, the power."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    step, done = Trainer.step, iter(range(steps))

    def counted(self: Any, batch: torch.Tensor) -> Any:
        if next(done, None) is None:
            raise Stop
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", counted)


@pytest.mark.parametrize("steps", [0, 30])
def test_a_run_interrupted_in_training_ends_with_the_weights_of_an_uninterrupted_one(
    steps: int, bridge: Any, root: Path, trained: TrainedDictionary, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, steps)
        run(bridge, root, tmp_path / "tiny", checkpoint_steps=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.work"]

    def collected_already(*_: Any, **__: Any) -> Any:
        raise AssertionError("the activations were collected before")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_store, "activation_batches", collected_already)
        resumed = run(bridge, root, tmp_path / "tiny")
    assert_equal_weights(resumed, trained)
    log = json.loads((resumed.folder / "provenance.json").read_text())["training"]
    assert (log["resumed_at_step"] > 0) == (steps > 0)
    assert log["resumed_at_step"] <= steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.work"]


def test_a_run_interrupted_while_collecting_keeps_its_shards(
    bridge: Any, root: Path, trained: TrainedDictionary, tmp_path: Path
) -> None:
    real, calls = activation_store.activation_batches, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_store, "activation_batches", counted)
        with pytest.raises(Stop):
            run(bridge, root, tmp_path / "tiny")
        kept = sorted(path.name for path in (tmp_path / "tiny.work").rglob("*.npy"))
        assert kept == ["00000.npy", "00001.npy"]
        resumed = run(bridge, root, tmp_path / "tiny")
    shards = len(list((tmp_path / "tiny.work").rglob("*.npy")))
    assert len(calls) == 3 + shards - 2
    assert_equal_weights(resumed, trained)


def test_other_texts_are_not_trained_on_old_activations(
    bridge: Any, root: Path, trained: TrainedDictionary, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, texts=(TextSource("single.jsonl"),))
    first = run(bridge, root, tmp_path / "first", recipe, work_dir=tmp_path / "work")
    second = run(bridge, root, tmp_path / "second", work_dir=tmp_path / "work")
    assert_equal_weights(second, trained)
    assert not torch.equal(weights(first)["b_dec"], weights(second)["b_dec"])


@pytest.mark.parametrize(
    ("module", "where"), [(Evaluation, "report"), (spaces, "save_folded"), (dictionaries, "write_whole")]
)
def test_a_failure_after_training_leaves_no_folder(
    module: Any, where: str, bridge: Any, root: Path, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, where, fail)
        run(bridge, root, tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.work"]


def test_a_folder_that_exists_is_refused_and_kept(bridge: Any, root: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"tiny exists already: choose a folder that does not"):
        run(bridge, root, tmp_path / "tiny")
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny", "mine.txt"]


def test_a_missing_text_file_leaves_nothing(bridge: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such text file: .*absent\.jsonl"):
        run(bridge, root, tmp_path / "tiny", replace(RECIPE, texts=(TextSource("absent.jsonl"),)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["../single.jsonl", "texts/../../single.jsonl", "/single.jsonl", "c:\\single.jsonl", ""]
)
def test_a_text_file_outside_the_folder_is_neither_read_nor_written(
    path: str, bridge: Any, root: Path, tmp_path: Path
) -> None:
    outside = replace(RECIPE, texts=(*RECIPE.texts, TextSource(path, dataset="owner/texts")))
    with pytest.raises(ValueError, match=r"texts: path is '.*'; valid: a relative path inside its folder"):
        run(bridge, root, tmp_path / "tiny", outside)
    assert list(tmp_path.iterdir()) == []


def test_a_hook_that_the_model_lacks_leaves_nothing(bridge: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no hook 'blocks.9.hook_resid_post' .valid: blocks.0"):
        run(bridge, root, tmp_path / "tiny", replace(RECIPE, hook_name="blocks.9.hook_resid_post"))
    assert list(tmp_path.iterdir()) == []


def test_texts_for_less_than_one_batch_are_refused_with_both_numbers(bridge: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\d+ tokens are fewer than one batch of 4096"):
        run(bridge, root, tmp_path / "tiny", replace(RECIPE, batch_size=4096))
    assert not (tmp_path / "tiny").exists()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "packaged_folder", lambda: tmp_path / "packaged")
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path / "own"))
    (tmp_path / "packaged").mkdir()
    return tmp_path / "own"


def test_a_registered_dictionary_is_found_and_loads_by_its_name(trained: TrainedDictionary, own: Path) -> None:
    from sae_emotion_plugin.plugin import load_dictionary

    entry = register_dictionary(trained, own)
    found, record = registry.find("tiny-emotion")
    assert found.saes == entry.saes and record.id == "layer-0"
    assert record.l0 == trained.report.l0 and record.variance_explained == pytest.approx(1 - trained.report.fvu)
    assert found.provenance.recipe == "layer-0/recipe.yaml" and found.provenance.report == "layer-0/report.json"
    assert found.provenance.sha256 == {f"layer-0/{name}": digest for name, digest in trained.sha256.items()}
    assert found.provenance.texts == "single.jsonl (CC0 1.0); novels.jsonl (public domain)"
    assert sorted(path.name for path in (own / "tiny-emotion" / "layer-0").iterdir()) == FILES
    assert sorted(path.name for path in own.iterdir()) == [".lock", "tiny-emotion", "tiny-emotion.yaml"]
    loaded = load_dictionary("tiny-emotion/layer-0")
    torch.testing.assert_close(loaded.W_dec.cpu(), weights(trained)["W_dec"].float())


def test_a_second_dictionary_of_a_release_joins_it_and_another_of_the_same_id_is_refused(
    trained: TrainedDictionary, own: Path, tmp_path: Path
) -> None:
    register_dictionary(trained, own)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    register_dictionary(trained, own)
    other = tmp_path / "other"
    shutil.copytree(trained.folder, other)
    (other / "cfg.json").write_text('{"d_sae": 64}')
    with pytest.raises(ValueError, match="exists already: remove it or choose another name"):
        register_dictionary(replace(trained, folder=other), own)
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before
    entry = register_dictionary(replace(trained, recipe=replace(trained.recipe, sae_id="layer-1")), own)
    assert [sae.id for sae in entry.saes] == ["layer-0", "layer-1"] and registry.check(entry) == ()


@pytest.mark.parametrize("change", [{"name": "a/b"}, {"sae_id": "../elsewhere"}, {"name": ""}])
def test_a_name_that_cannot_stand_in_a_registry_leaves_nothing(
    change: dict[str, str], trained: TrainedDictionary, own: Path
) -> None:
    with pytest.raises(ValueError, match="valid: "):
        register_dictionary(replace(trained, recipe=replace(trained.recipe, **change)), own)
    assert not own.exists()


RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "openai-topk": {"k": 4, "k_aux": 8, "multi_topk": 2},
    "relu-l1": {"k": None, "l1_coefficient": 0.3, "resampling": "plain", "resample_every": 10, "resample_below": 0.01},
    "batchtopk": {"k": 4},
    "jumprelu": {"k": None, "l0_coefficient": 0.1},
}


def of_architecture(name: str, **changes: Any) -> TrainingRecipe:
    unused = {"aux_loss_coefficient": None, "epochs": None, "steps": 30}
    return replace(RECIPE, architecture=name, **{**unused, **RECIPES[name], **changes})


@pytest.mark.parametrize("name", RECIPES)
def test_every_architecture_trains_to_a_folder_that_plain_sae_lens_reads(
    name: str, bridge: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(fitting.fit_recipe(*arguments, **options))
        return seen[0]

    monkeypatch.setattr(runs, "fit_recipe", spy)
    trained = run(bridge, root, tmp_path / "tiny", of_architecture(name), measured=True)
    sae = SAE.load_from_disk(trained.folder)
    saved = {"topk": "topk", "openai-topk": "topk", "relu-l1": "standard"}.get(name, "jumprelu")
    assert sae.cfg.architecture() == saved and sae.cfg.metadata.hook_name == HOOK
    torch.testing.assert_close(sae.W_dec.data.norm(dim=-1), torch.ones(64), atol=1e-3, rtol=0)
    assert trained.report.fvu < 1 and trained.report.l0 > 0
    log = trained.provenance()["training"]
    assert log["steps"] == 30 and log["curve"][-1]["step"] == 30 and log["curve"][-1]["fvu"] < log["curve"][0]["fvu"]
    texts = ["he is such a joy", "sad fear anger w1 w2 w3"]
    (batch,) = activation_batches(bridge, texts, HOOK, progress=False)
    own, space = seen[0].sae.eval(), seen[0].space
    with torch.inference_mode():
        rebuilt = sae.decode(sae.encode(batch.vectors))
        if name == "batchtopk":
            return  # its codes depend on the batch; the saved threshold stands for it
        expected = own.decode(own.encode(space.enter(batch.vectors)))
    # Rounding to float16 may swap features that tie for the last place.
    close = torch.isclose((rebuilt - space.mean) / space.scale, expected, atol=0.05, rtol=0.02).all(-1)
    assert close.float().mean() > 0.8


def test_a_loop_s_run_that_was_interrupted_ends_with_equal_weights(bridge: Any, root: Path, tmp_path: Path) -> None:
    recipe = of_architecture("openai-topk")
    options: dict[str, Any] = {"checkpoint_steps": 4}
    whole = run(bridge, root, tmp_path / "whole", recipe, **options)
    real, left = Trainer.step, iter(range(10))

    def step(self: Trainer, batch: torch.Tensor) -> Any:
        if next(left, None) is None:
            raise Stop
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "step", step)
        run(bridge, root, tmp_path / "tiny", recipe, **options)
    with pytest.raises(ValueError, match=r"another recipe was begun here: lr was 0\.01 and is 0\.02\. Go on with"):
        run(bridge, root, tmp_path / "tiny", replace(recipe, lr=0.02), **options)
    resumed = run(bridge, root, tmp_path / "tiny", recipe, **options)
    assert_equal_weights(resumed, whole)
    assert resumed.provenance()["training"] == {**whole.provenance()["training"], "resumed_at_step": 8}
    shutil.rmtree(resumed.folder)
    run(bridge, root, tmp_path / "tiny", replace(recipe, lr=0.02), **options)


def test_the_loss_recovered_is_measured_on_the_way_when_asked(bridge: Any, root: Path, tmp_path: Path) -> None:
    trained = run(bridge, root, tmp_path / "tiny", of_architecture("relu-l1"), measured=True, measure_steps=15)
    points = [point for point in trained.provenance()["training"]["curve"] if "loss_recovered" in point]
    assert [point["step"] for point in points] == [15, 30]
    # What is saved at the end has its rows brought to unit norm once more.
    assert points[-1]["held_out_fvu"] == pytest.approx(trained.report.fvu, rel=0.01)
    assert points[-1]["loss_recovered"] == pytest.approx(trained.report.loss_recovered, rel=0.01)


def test_a_training_that_is_watched_ends_with_the_same_weights(
    bridge: Any, root: Path, tmp_path: Path, trained: TrainedDictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(runs, "check_loggers", lambda names: None)
    monkeypatch.setattr(runs, "open_loggers", lambda names, *_: nullcontext([logged.append]))
    watched = run(bridge, root, tmp_path / "tiny", measured=True, measure_steps=7, loggers=["wandb"])
    assert_equal_weights(watched, trained)
    record = watched.provenance()["training"]
    curve = record["curve"]
    assert [point["step"] for point in logged] == [point["step"] for point in curve]
    assert curve[0]["step"] == 1 and curve[-1]["step"] == record["steps"] and curve[-1]["loss"] < curve[0]["loss"]
    assert {"fvu", "l0", "dead", "lr", "mse_loss", "shrinkage", "cosine_mean", "cosine_random"} <= set(curve[-1])
    assert curve[-1]["l0"] == pytest.approx(RECIPE.k) and record["dead"] == round(curve[-1]["dead"] * RECIPE.d_sae)
    measured = [point for point in curve if "loss_recovered" in point]
    assert {point["step"] for point in measured[:-1]} == set(range(7, record["steps"], 7))
    assert measured[-1]["held_out_fvu"] == pytest.approx(watched.report.fvu, rel=1e-6)


@pytest.mark.parametrize("lr", [30.0, 1e3, 1e30])
def test_a_training_that_diverges_leaves_no_dictionary(lr: float, bridge: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"diverged at step \d+: .*; look at lr"):
        run(bridge, root, tmp_path / "tiny", replace(RECIPE, lr=lr))
    assert not (tmp_path / "tiny").exists()
    run(bridge, root, tmp_path / "tiny", replace(RECIPE, epochs=0.1))  # the advice can be followed there


def test_a_window_of_dead_features_that_is_longer_than_the_training_is_told(
    bridge: Any, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(bridge, root, tmp_path / "usual")
    assert "dead_token_window" not in caplog.text
    run(bridge, root, tmp_path / "tiny", replace(RECIPE, dead_token_window=100_000))
    assert "fewer than dead_token_window (100000): no feature will count as dead" in caplog.text


def test_two_folders_of_one_name_do_not_refuse_each_other(
    bridge: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 3)
        run(bridge, root, tmp_path / "a" / "out", work_dir=tmp_path / "work")
    other = replace(RECIPE, seed=1)
    run(bridge, root, tmp_path / "b" / "out", other, work_dir=tmp_path / "work")
    with pytest.raises(ValueError, match="another recipe was begun here: seed was 0 and is 1"):
        run(bridge, root, tmp_path / "a" / "out", other, work_dir=tmp_path / "work")


def test_weights_of_another_version_are_not_gone_on_from(
    bridge: Any, root: Path, trained: TrainedDictionary, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 30)
        patch.setattr(fitting.metadata, "version", lambda name: "0.0.0")
        run(bridge, root, tmp_path / "tiny", checkpoint_steps=12)
    resumed = run(bridge, root, tmp_path / "tiny")
    assert resumed.provenance()["training"]["resumed_at_step"] == 0
    assert_equal_weights(resumed, trained)


def test_what_cannot_be_done_is_refused_before_any_work(bridge: Any, root: Path, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"loggers": ["mlflow"]}, "unknown logger 'mlflow'"),
        ({"checkpoint_steps": 0}, "checkpoint_steps 0 is below 1"),
        ({"measure_steps": -1}, "measure_steps -1 below 0"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            run(bridge, root, tmp_path / "tiny", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_recipe_is_refused_before_its_activations_are_read(
    bridge: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(runs, "fit_recipe", stop)
        run(bridge, root, tmp_path / "tiny")
    monkeypatch.setattr(runs, "collect", stop)
    with pytest.raises(ValueError, match="another recipe was begun here: context_size was 16 and is 12"):
        run(bridge, root, tmp_path / "tiny", replace(RECIPE, context_size=12))


def test_a_refusal_for_too_few_tokens_can_be_mended_in_the_same_place(bridge: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than one batch of 1000000"):
        run(bridge, root, tmp_path / "tiny", replace(RECIPE, batch_size=1_000_000))
    run(bridge, root, tmp_path / "tiny")


def test_the_rate_is_scaled_with_the_width() -> None:
    recipe = of_architecture("openai-topk", lr=0.1, lr_reference_width=16)
    assert fitting.loop_settings(recipe, 10**6).step.lr == pytest.approx(0.05)
    assert fitting.loop_settings(of_architecture("openai-topk", lr=0.1), 10**6).step.lr == 0.1
