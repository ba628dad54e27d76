import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK, VOCABULARY, WORDS
from sae_lens import SAE
from safetensors.torch import load_file
from test_cli import refused, run

from sae_emotion_plugin import activation_store, reference_saes
from sae_emotion_plugin.activation_store import ActivationStore, collect
from sae_emotion_plugin.activations import activation_batches
from sae_emotion_plugin.discovery.reference_margins import ReferenceMargins, reference_margins
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evaluation import DictionaryReport, Evaluation
from sae_emotion_plugin.models import model_identity, weights_identity
from sae_emotion_plugin.recipes import REFERENCES, TextSource, TrainingRecipe
from sae_emotion_plugin.reference_saes import (
    encode_references,
    firing_counts,
    random_directions_sae,
    shuffled_model,
    train_references,
)
from sae_emotion_plugin.sparse_codes import encode_texts
from sae_emotion_plugin.training import TrainedDictionary, recipe_documents, train
from sae_emotion_plugin.training.checkpoints import Checkpoints

RECIPE = TrainingRecipe(
    name="tiny-emotion",
    sae_id="layer-0",
    model="tiny",
    hook_name=HOOK,
    texts=(TextSource("texts.jsonl", licence="CC0 1.0"),),
    d_sae=64,
    k=4,
    epochs=4.0,
    lr=0.01,
    context_size=16,
    held_out_share=0.02,
    batch_size=128,
    lr_warm_up_steps=2,
    dead_token_window=512,
)
EMOTIONS = {"joy": WORDS[14:30], "fear": WORDS[30:46]}
NEUTRAL = WORDS[46:]
MADE_UP = DictionaryReport(1, 2, 64, 0.5, 0.5, 0, 0.1, 0.5, 4.0, 0, 1.0, 2.0, 3.0, 9.0)


def labelled(n: int, seed: int) -> LabelledTexts:
    """Neutral words; in two of three texts one word of an emotion, which has sixteen."""
    rng = np.random.default_rng(seed)
    texts, emotions = [], []
    for number in range(n):
        words = rng.choice(NEUTRAL, size=rng.integers(4, 8)).tolist()
        emotion = (*EMOTIONS, None)[number % 3]
        if emotion:
            words[rng.integers(len(words))] = str(rng.choice(EMOTIONS[emotion]))
        texts.append(" ".join(words))
        emotions.append((emotion,) if emotion else ())
    return LabelledTexts(tuple(texts), tuple(emotions), tuple(map(str, range(n))))


@pytest.fixture(scope="module")
def planted(bridge: Any) -> Any:
    """The tiny Gemma, in which the sixteen words of an emotion share a direction."""
    import copy

    model = copy.deepcopy(bridge)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        embedding = next(model.parameters())
        assert embedding.shape == (len(WORDS), D_MODEL)
        for words in EMOTIONS.values():
            shared = torch.randn(D_MODEL, generator=generator)
            for word in words:
                embedding[VOCABULARY[word]] *= 0.5
                embedding[VOCABULARY[word]] += 0.3 * shared
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rows = [json.dumps({"text": text}) for text in labelled(600, 1).texts]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def quiet_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def make(model: Any, root: Path, out: Path, **options: Any) -> dict[str, TrainedDictionary]:
    return train_references(options.pop("recipe", RECIPE), model, root, out, progress=False, **options)


@pytest.fixture(scope="module")
def made(planted: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TrainedDictionary]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setattr(Evaluation, "report", lambda *_: MADE_UP)
        yield make(planted, root, tmp_path_factory.mktemp("references") / "all")


def store_of(made: dict[str, TrainedDictionary], model: Any, root: Path) -> ActivationStore:
    out = made["trained"].folder.parent
    return collect(RECIPE, model, recipe_documents(RECIPE, model, root)[0], out.with_name(out.name + ".work"), False)


def test_every_kind_is_a_folder_that_plain_sae_lens_loads_and_that_names_its_kind(
    made: dict[str, TrainedDictionary],
) -> None:
    assert list(made) == ["trained", *REFERENCES]
    for name, one in made.items():
        kind = None if name == "trained" else name
        sae = SAE.load_from_disk(one.folder)
        assert sae.cfg.d_sae == 64 and sae.cfg.metadata.hook_name == HOOK and sae.cfg.metadata.context_size == 16
        assert one.folder.name == name and TrainingRecipe.read(one.folder / "recipe.yaml") == one.recipe
        assert one.recipe.reference == kind and one.provenance().get("reference") == kind
        assert replace(one.recipe, name=RECIPE.name, reference=None) == RECIPE
        assert one.recipe.name == (f"tiny-emotion-{name}" if kind else "tiny-emotion")
        assert ("shuffled" in one.provenance()["model"]["name"]) == (name == "shuffled-weights")
        assert TrainedDictionary.load(one.folder) == one
        assert {path.stat().st_mode & 0o777 for path in one.folder.iterdir()} == {0o644}


def first_weights() -> dict[str, torch.Tensor]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    with torch.random.fork_rng():
        torch.manual_seed(RECIPE.seed)
        return TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4, decoder_init_norm=1.0, normalize_activations="none")
        ).state_dict()


def last_checkpoint(work: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint of the one training in this folder."""
    (folder,) = work.glob("checkpoints-*")
    found = Checkpoints(folder).latest()
    assert found is not None
    return {name.removeprefix("sae."): value for name, value in found.tensors.items() if name.startswith("sae.")}


@pytest.mark.parametrize(("kind", "frozen", "free"), [("decoder", "W_dec", "W_enc"), ("encoder", "W_enc", "W_dec")])
def test_the_frozen_side_keeps_every_bit_of_its_start_and_the_rest_learns(
    kind: str, frozen: str, free: str, planted: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "report", lambda *_: MADE_UP)
    recipe = replace(RECIPE, reference=f"frozen-{kind}", epochs=2.0)
    train(recipe, planted, root, tmp_path / "out", work_dir=tmp_path / "work", progress=False)
    start, end = first_weights(), last_checkpoint(tmp_path / "work")
    assert torch.equal(start[frozen], end[frozen])
    for name in (free, "b_enc", "b_dec"):
        assert not torch.allclose(start[name], end[name], atol=1e-3), name


def test_the_saved_frozen_sides_are_the_random_start(made: dict[str, TrainedDictionary]) -> None:
    start = first_weights()
    saved = {name: load_file(one.folder / "sae_weights.safetensors") for name, one in made.items()}
    torch.testing.assert_close(saved["frozen-decoder"]["W_dec"], start["W_dec"].half(), atol=5e-4, rtol=0)
    # Each direction of a frozen encoder may have learnt a factor: the norm of its decoder row.
    cosine = torch.nn.functional.cosine_similarity(saved["frozen-encoder"]["W_enc"].float(), start["W_enc"], dim=0)
    torch.testing.assert_close(cosine, torch.ones(64), atol=1e-5, rtol=0)
    for name in ("W_enc", "W_dec"):
        axis = 0 if name == "W_enc" else 1
        moved = torch.nn.functional.cosine_similarity(saved["trained"][name].float(), start[name], dim=axis)
        assert moved.median() < 0.99, name


def test_random_directions_fire_as_often_as_the_trained_features(
    made: dict[str, TrainedDictionary], planted: Any, root: Path
) -> None:
    store = store_of(made, planted, root)
    expected = firing_counts(SAE.load_from_disk(made["trained"].folder), store)
    found = firing_counts(SAE.load_from_disk(made["random-directions"].folder), store)
    everything = store.rows(np.arange(len(store)))
    plain = (SAE.load_from_disk(made["trained"].folder).encode(everything) > 0).sum(0).numpy()
    assert np.array_equal(expected, plain) and len(set(expected.tolist())) > 10
    assert np.abs(found - expected).max() <= 1
    record = made["random-directions"].provenance()
    assert record["largest_firing_rate_difference"] <= 1 / len(store)
    assert record["firing_rates_of"] == made["trained"].sha256["sae_weights.safetensors"]
    assert record["training_tokens"] == len(store)


def plain_store(folder: Path, vectors: np.ndarray) -> ActivationStore:
    np.save(folder / "0.npy", vectors[:50].astype(np.float32))
    np.save(folder / "1.npy", vectors[50:].astype(np.float32))
    return ActivationStore([folder / "0.npy", folder / "1.npy"], "key")


def test_activations_that_are_no_numbers_have_no_part_in_random_directions(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(120, 6)) + 3
    counts = np.array([0, 7, 60])
    broken = np.insert(vectors, [3, 70], np.inf, axis=0)
    (tmp_path / "broken").mkdir()
    ours = random_directions_sae(plain_store(tmp_path / "broken", broken), counts, seed=5).state_dict()
    for name, value in random_directions_sae(plain_store(tmp_path, vectors), counts, seed=5).state_dict().items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_a_random_direction_reads_the_projection_above_its_threshold_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(reference_saes, "PROJECTIONS_AT_ONCE", at_once)
    vectors = np.random.default_rng(0).normal(size=(120, 6)) + 3
    counts = np.array([0, 1, 7, 59, 60, 61, 119, 120])
    sae = random_directions_sae(plain_store(tmp_path, vectors), counts, seed=5)
    x = torch.from_numpy(vectors).float()
    codes = sae.encode(x)
    assert (codes > 0).sum(0).tolist() == counts.tolist()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(8))
    torch.testing.assert_close(sae.W_enc.T, sae.W_dec)
    torch.testing.assert_close(sae.b_dec, x.mean(0))
    projections = (x - x.mean(0)) @ sae.W_dec.T
    for feature, count in enumerate(counts.tolist()):
        fires = torch.zeros(120, dtype=torch.bool)
        fires[projections[:, feature].argsort(descending=True)[:count]] = True
        assert torch.equal(codes[:, feature] > 0, fires)
        if count <= 50:  # above that the code is counted from a threshold below 0
            torch.testing.assert_close(codes[fires, feature], projections[fires, feature])
    again = random_directions_sae(plain_store(tmp_path, vectors), counts, seed=5)
    other = random_directions_sae(plain_store(tmp_path, vectors), counts, seed=6)
    assert torch.equal(again.W_dec, sae.W_dec) and torch.equal(again.threshold, sae.threshold)
    assert not torch.allclose(other.W_dec, sae.W_dec)


def test_tokens_that_are_equal_fire_together_as_near_to_the_rate_as_can_be(tmp_path: Path) -> None:
    # Four distinct tokens, 30 times each: a feature can fire on 0, 30, 60, 90 or 120.
    vectors = np.repeat(np.random.default_rng(0).integers(-4, 5, size=(4, 3)).astype(float), 30, axis=0)
    counts = np.array([3, 14, 16, 31, 44, 46, 75, 76, 110])
    sae = random_directions_sae(plain_store(tmp_path, vectors), counts, seed=0)
    found = (sae.encode(torch.from_numpy(vectors).float()) > 0).sum(0).numpy()
    assert set(found.tolist()) <= {0, 30, 60, 90, 120}
    # Which counts can be had depends on the direction: two of the tokens may have one projection.
    projections = (torch.from_numpy(vectors).float() - sae.b_dec) @ sae.W_dec.T
    for feature, count in enumerate(counts.tolist()):
        values = projections[:, feature].round(decimals=4)
        possible = [0, *(int((values >= value).sum()) for value in values.unique())]
        assert abs(found[feature] - count) == min(abs(one - count) for one in possible)


def test_a_direction_that_would_part_equal_tokens_is_drawn_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    vectors = np.concatenate([np.tile([[3.0, -2.0, 1.0, 4.0]], (60, 1)), rng.normal(size=(240, 4))])
    counts = np.arange(10, 60, dtype=np.int64)
    sae = random_directions_sae(plain_store(tmp_path, vectors), counts, seed=0)
    assert ((sae.encode(torch.from_numpy(vectors).float()) > 0).sum(0).numpy() == counts).all()
    first = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.isclose(torch.nn.functional.normalize(first, dim=-1), sae.W_dec).all(-1)
    assert 0 < kept.sum() < 50


def test_shuffling_permutes_each_matrix_keeps_vectors_and_leaves_the_model_alone(model: Any) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    identity = weights_identity(model)
    shuffled = shuffled_model(model, 3)
    after = dict(shuffled.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.data_ptr() != after[name].data_ptr()
        if parameter.ndim == 1:
            assert torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name].flatten().sort()[0], before[name].flatten().sort()[0])
            assert torch.equal(after[name], before[name]) == bool((before[name] == before[name].flatten()[0]).all())
    assert weights_identity(model) == identity
    assert "weights shuffled (seed 3)" in model_identity(shuffled)["name"]
    assert model_identity(shuffled) != model_identity(model)
    assert shuffled.tokenizer is model.tokenizer


def test_a_model_that_last_ran_with_gradients_is_shuffled_too(model: Any) -> None:
    model(model.to_tokens("he is such a joy"))
    assert "weights shuffled (seed 0)" in model_identity(shuffled_model(model, 0))["name"]


def activations(model: Any) -> torch.Tensor:
    return torch.cat([b.vectors for b in activation_batches(model, ["he is such a joy w1"], HOOK, progress=False)])


def test_a_shuffled_model_computes_with_its_own_weights_and_depends_on_the_seed_alone(model: Any) -> None:
    own = activations(model)
    first, again, other = (activations(shuffled_model(model, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and torch.equal(activations(model), own)
    assert not torch.allclose(first, own, atol=0.1) and not torch.allclose(first, other, atol=0.1)


def test_a_shuffled_model_equals_one_built_from_the_shuffled_weights(hooked_transformer: Any) -> None:
    shuffled = shuffled_model(hooked_transformer, 0)
    import copy

    rebuilt = copy.deepcopy(hooked_transformer)
    rebuilt.load_state_dict(shuffled.state_dict())
    assert torch.equal(activations(rebuilt), activations(shuffled))


def test_tied_embeddings_stay_tied(word_tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from sae_emotion_plugin.models import load_model

    config = GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=D_MODEL, n_layer=1, n_head=2, bos_token_id=1)
    bridge = load_model(GPT2LMHeadModel(config).eval(), tokenizer=word_tokenizer)
    shuffled = shuffled_model(bridge, 0)
    embedding, unembedding = (next(part.parameters()) for part in (shuffled.embed, shuffled.unembed))
    assert embedding.data_ptr() == unembedding.data_ptr()
    assert not torch.equal(embedding, next(bridge.embed.parameters()))


def test_half_precision_weights_are_shuffled_bit_by_bit() -> None:
    values = torch.arange(12).reshape(3, 4).to(torch.bfloat16)
    found = reference_saes._permuted(values, np.random.default_rng(0))
    assert found.dtype == torch.bfloat16 and found.shape == (3, 4) and not torch.equal(found, values)
    assert found.flatten().sort()[0].tolist() == list(range(12)) and values.flatten().tolist() == list(range(12))


def test_each_dictionarys_codes_are_those_of_encoding_with_it_alone(
    made: dict[str, TrainedDictionary], planted: Any
) -> None:
    texts, held_out = labelled(30, 5), labelled(20, 6)
    found, found_held_out = encode_references(made, planted, texts, held_out.texts, progress=False)
    assert list(found) == list(found_held_out) == list(made)
    shuffled = shuffled_model(planted, RECIPE.seed)
    for name, one in made.items():
        read = shuffled if name == "shuffled-weights" else planted
        alone = encode_texts(read, SAE.load_from_disk(one.folder), texts, progress=False)
        assert found[name].d_sae == alone.d_sae == 64 and found[name].hook_name == HOOK
        assert np.array_equal(found[name].token_ids, alone.token_ids)
        assert np.array_equal(found[name].row_starts, alone.row_starts), name
        assert np.array_equal(found[name].features, alone.features)
        np.testing.assert_allclose(found[name].values, alone.values, rtol=1e-5)
        assert found_held_out[name].n_texts == 20


def test_a_trained_dictionary_beats_every_reference_on_planted_directions(
    made: dict[str, TrainedDictionary], planted: Any
) -> None:
    texts, held_out = labelled(450, 7), labelled(450, 8)
    codes, held_out_codes = encode_references(made, planted, texts, held_out, progress=False)
    margins = reference_margins(codes, held_out_codes, texts, held_out, resamples=500)
    assert margins.references == REFERENCES
    for kind in REFERENCES:
        row = margins.of(kind)
        assert row.auroc > 0.9 and row.low > 0.03, row
        assert row.reference_auroc > 0.52, f"{kind} is no empty null"


def test_what_is_complete_is_kept_and_what_was_interrupted_goes_on(
    made: dict[str, TrainedDictionary], planted: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        """Stands for whatever ends a run."""

    reports = []

    def stopping(*_: Any, **__: Any) -> DictionaryReport:
        reports.append(1)
        if len(reports) == 3:
            raise Stop
        return MADE_UP

    monkeypatch.setattr(Evaluation, "report", stopping)
    with pytest.raises(Stop):
        make(planted, root, tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["frozen-decoder", "trained"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*")}
    again = make(planted, root, tmp_path / "all")
    assert len(reports) == 3 + 3 and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again["frozen-encoder"].provenance()["training"]["resumed_at_step"] > 0
    for name, one in again.items():
        assert one.sha256["sae_weights.safetensors"] == made[name].sha256["sae_weights.safetensors"], name

    def collected_already(*_: Any, **__: Any) -> Any:
        raise AssertionError("the activations were collected before")

    monkeypatch.setattr(activation_store, "activation_batches", collected_already)
    assert make(planted, root, tmp_path / "all") == again
    assert len(reports) == 6


def test_only_the_kinds_asked_for_are_made_of_activations_collected_once(
    planted: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "report", lambda *_: MADE_UP)
    recipe = replace(RECIPE, epochs=0.2)
    found = make(
        planted, root, tmp_path / "some", recipe=recipe, kinds=("frozen-encoder",), work_dir=tmp_path / "elsewhere"
    )
    assert list(found) == ["trained", "frozen-encoder"]
    assert len(list((tmp_path / "elsewhere").glob("activations-*"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "some"]


def test_a_folder_of_another_recipe_model_or_text_is_refused_and_kept(
    made: dict[str, TrainedDictionary], planted: Any, root: Path, tmp_path: Path
) -> None:
    out = made["trained"].folder.parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match="trained holds a dictionary with another recipe: choose another folder"):
        make(planted, root, out, recipe=replace(RECIPE, lr=0.02))
    with pytest.raises(ValueError, match="trained holds a dictionary with another model"):
        make(shuffled_model(planted, 9), root, out)
    (tmp_path / "texts.jsonl").write_text((root / "texts.jsonl").read_text() + '{"text": "he is joy"}\n')
    with pytest.raises(ValueError, match="trained holds a dictionary with another texts"):
        make(planted, tmp_path, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / "all" / "trained").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no trained dictionary in .*trained: it has no report\.json"):
        make(planted, root, tmp_path / "all")


def test_a_recipe_names_a_known_kind_and_without_one_reads_as_before() -> None:
    assert "reference" not in RECIPE.to_yaml()
    assert "reference: frozen-encoder\n" in replace(RECIPE, reference="frozen-encoder").to_yaml()
    with pytest.raises(ValueError, match=r"unknown reference 'frozen' \(valid: frozen-decoder, .*, or none"):
        replace(RECIPE, reference="frozen")


def test_an_unknown_kind_and_the_recipe_of_a_reference_are_refused(planted: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown reference 'random' \(valid: frozen-decoder, frozen-encoder, random-"
    ):
        make(planted, root, tmp_path / "out", kinds=("random",))
    with pytest.raises(ValueError, match=r"tiny-emotion is a reference itself \(frozen-decoder\)"):
        make(planted, root, tmp_path / "out", recipe=replace(RECIPE, reference="frozen-decoder"))
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_without_references_is_refused_before_any_training(
    planted: Any, root: Path, tmp_path: Path
) -> None:
    relu = replace(RECIPE, architecture="relu-l1", l1_coefficient=1.0, k=None, aux_loss_coefficient=None)
    with pytest.raises(ValueError, match=r"architecture 'relu-l1' has no references \(valid: topk\)"):
        make(planted, root, tmp_path / "out", recipe=relu)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["random-directions", "shuffled-weights"])
def test_training_alone_refuses_the_recipes_that_need_more(kind: str, planted: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_references makes it"):
        train(replace(RECIPE, reference=kind), planted, root, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_them_and_writes_margins_that_a_page_can_show(
    planted: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_EMOTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sae_emotion_plugin.models.load_model", lambda name: planted)
    monkeypatch.setattr(Evaluation, "report", lambda *_: MADE_UP)
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml(), encoding="utf-8")
    labelled(200, 2).save(tmp_path / "train.jsonl")
    out = tmp_path / "made"
    asked = ("references", str(tmp_path / "recipe.yaml"), str(tmp_path / "train.jsonl"), "--texts", str(root))
    result = run(*asked, "-o", str(out), "--kind", "random-directions", "--emotion", "joy", "--emotion", "fear")
    assert result.exit_code == 0, result.output
    margins = ReferenceMargins.load(out / "margins.json")
    assert margins.references == ("random-directions",) and margins.meta["emotions"] == ["joy", "fear"]
    assert "References are no empty nulls" in result.stdout
    assert "unknown reference 'frozen'" in refused(*asked, "-o", str(out), "--kind", "frozen")
