import importlib.util
import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK, JOY, WORDS, make_sae
from safetensors import safe_open
from torch import Tensor
from transformers import Gemma3ForCausalLM, GPT2LMHeadModel

from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions import exports as plan_exports
from sae_emotion_plugin.interventions.exports import FORMS, export_plan, plan_vectors
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.neuronpedia import neuronpedia_request, neuronpedia_vectors
from sae_emotion_plugin.interventions.plans import Gate, Intervention, SteeringPlan, dictionary_sha256, model_sha256

TOKENS = torch.tensor([[1, 4, 5, 6, 7], [1, 20, 21, 22, 23], [1, 30, 8, 31, 40]])
SECOND = "blocks.1.hook_resid_post"
SUFFIXES = {"safetensors": ".safetensors", "gguf": ".gguf", "hook": ".py", "lm-eval": ".pt", "neuronpedia": ".json"}
AMOUNTS = {JOY: 0.5, 3: -0.25, 50: 2.0}


def plan_of(sae: Any, amounts: dict[int, float] = AMOUNTS, **kwargs: Any) -> SteeringPlan:
    return SteeringPlan.of(amounts, sae, **{"residual_norm": 3.0, **kwargs})


def summed(sae: Any, lengths: dict[int, float]) -> Tensor:
    """Each decoder row, stretched to its length, one number at a time."""
    total = [0.0] * sae.cfg.d_in
    for feature, length in lengths.items():
        row = sae.W_dec[feature].tolist()
        norm = math.sqrt(sum(value * value for value in row))
        total = [old + length * value / norm for old, value in zip(total, row, strict=True)]
    return torch.tensor(total)


@pytest.fixture(scope="module")
def plain(bridge: Any) -> Any:
    """The tiny Gemma of `bridge` as `transformers` alone has it."""
    config = type(bridge.original_model.config)(**bridge.original_model.config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, bridge(TOKENS), atol=1e-4, rtol=1e-4)
    return model


def steered_logits(model: Any, sae: Any, plan: SteeringPlan, **kwargs: Any) -> Tensor:
    with torch.no_grad(), steering(model, sae, plan, **kwargs):
        return model(TOKENS)


@contextmanager
def adding_everywhere(model: Any, vectors: dict[str, Tensor]) -> Iterator[None]:
    """Adds a vector to the output of each named module of the base model, at every position."""

    def adding(vector: Tensor) -> Any:
        return lambda module, inputs, output: (
            (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
        )

    modules = dict(model.base_model.named_modules())
    handles = [modules[name].register_forward_hook(adding(vector)) for name, vector in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exported_steering", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The vector


@pytest.mark.parametrize(
    ("sae_name", "unit"),
    [
        ("planted_sae", "residual_norm"),
        ("planted_sae", "raw"),
        ("planted_sae", "activation"),
        ("planted_sae", "max_activation"),
        ("layer_norm_sae", "residual_norm"),
        ("layer_norm_sae", "raw"),
    ],
)
def test_the_vector_is_what_steering_adds_to_every_token_but_bos(
    bridge: Any, sae_name: str, unit: Any, request: pytest.FixtureRequest
) -> None:
    sae = request.getfixturevalue(sae_name)
    interventions = tuple(Intervention(feature, amount, max_activation=4.0) for feature, amount in AMOUNTS.items())
    plan = SteeringPlan(HOOK, interventions, unit, residual_norm=3.0)
    hook = canonical_hook(bridge, HOOK)
    with torch.no_grad():
        before = bridge.run_with_cache(TOKENS)[1][hook]
        with steering(bridge, sae, plan):
            after = bridge.run_with_cache(TOKENS)[1][hook]
    vectors = plan_vectors(plan, sae)
    assert list(vectors) == [HOOK]
    torch.testing.assert_close((after - before)[:, 1:], vectors[HOOK].expand(3, 4, -1), atol=1e-5, rtol=1e-5)
    if unit in ("residual_norm", "raw"):
        norm = 3.0 if unit == "residual_norm" else 1.0
        torch.testing.assert_close(
            vectors[HOOK], summed(sae, {feature: amount * norm for feature, amount in AMOUNTS.items()})
        )


def test_amounts_in_activations_stretch_the_decoder_rows_as_they_are(planted_sae: Any) -> None:
    rows = planted_sae.W_dec.detach()
    expected = 0.5 * rows[JOY] - 0.25 * rows[3] + 2 * rows[50]
    torch.testing.assert_close(plan_vectors(plan_of(planted_sae, unit="activation"), planted_sae)[HOOK], expected)
    interventions = (Intervention(JOY, 0.5, max_activation=4.0), Intervention(3, -0.25, max_activation=8.0))
    times = SteeringPlan(HOOK, interventions, "max_activation")
    torch.testing.assert_close(plan_vectors(times, planted_sae)[HOOK], 2.0 * rows[JOY] - 2.0 * rows[3])


def test_activations_counted_in_lengths_of_the_contribution_are_added_along_unit_directions() -> None:
    sae = make_sae()
    sae.cfg.rescale_acts_by_decoder_norm = True
    vector = plan_vectors(plan_of(sae, unit="activation"), sae)[HOOK]
    torch.testing.assert_close(vector, summed(sae, AMOUNTS))


def test_a_plan_for_several_hooks_has_its_vector_at_each(planted_sae: Any) -> None:
    vectors = plan_vectors(plan_of(planted_sae, at=(HOOK, SECOND)), planted_sae)
    assert list(vectors) == [HOOK, SECOND]
    assert torch.equal(vectors[HOOK], vectors[SECOND])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"positions": "prompt"}, "positions 'prompt'"),
        ({"positions": "2:5"}, "positions '2:5'"),
        ({"first_tokens": 3}, "first_tokens 3"),
        ({"decay": 0.9}, "decay 0.9"),
        ({"gate": Gate(8)}, "the gate on feature 8"),
        ({"keep_error": False}, "keep_error=False"),
        ({"interventions": (Intervention(JOY, 1.0), Intervention(9, 1.0, "clamp"))}, "cannot clamp feature 9"),
        ({"interventions": (Intervention(9, 1.0, "scale"),)}, "cannot scale feature 9"),
        ({"interventions": (Intervention(9, 1.0, "ablate"),)}, "cannot ablate feature 9"),
        ({"interventions": (Intervention(9, 1.0, "project-out"),)}, "cannot project-out feature 9"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_a_constant_vector_cannot_carry_is_refused_by_name(
    planted_sae: Any, change: dict[str, Any], name: str, form: str, tmp_path: Path
) -> None:
    plan = replace(plan_of(planted_sae, at=()), **change)
    with pytest.raises(ValueError, match=f"a constant vector .*{name}"):
        plan_vectors(plan, planted_sae)
    with pytest.raises(ValueError, match=name):
        export_plan(plan, planted_sae, tmp_path / f"plan{SUFFIXES[form]}", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unit", ["activation", "max_activation"])
@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_a_unit_whose_length_depends_on_the_token_is_refused(unit: Any, normalisation: str) -> None:
    sae = make_sae(normalisation)
    plan = SteeringPlan(HOOK, (Intervention(JOY, 1.0, max_activation=2.0),), unit)
    with pytest.raises(ValueError, match=f"{unit}.*{normalisation}.*valid: residual_norm, raw"):
        plan_vectors(plan, sae)


def test_a_plan_for_another_dictionary_or_model_is_refused(planted_sae: Any, bridge: Any, tmp_path: Path) -> None:
    plan = plan_of(planted_sae)
    with pytest.raises(ValueError, match="made for the dictionary"):
        plan_vectors(replace(plan, dictionary="0" * 64), planted_sae)
    with pytest.raises(ValueError, match="made for the model"):
        export_plan(replace(plan, model="0" * 64), planted_sae, tmp_path / "a.safetensors", "safetensors", model=bridge)
    with pytest.raises(ValueError, match=r"no hook 'blocks\.7\.hook_resid_post'"):
        elsewhere = replace(plan, at=("blocks.7.hook_resid_post",))
        export_plan(elsewhere, planted_sae, tmp_path / "a.gguf", "gguf", model=bridge)


def test_a_vector_that_overflows_is_refused(planted_sae: Any) -> None:
    plan = plan_of(planted_sae, {JOY: 1e30}, residual_norm=1e30)
    with pytest.raises(ValueError, match="not finite"):
        plan_vectors(plan, planted_sae)


# The forms


def test_an_unknown_form_and_a_wrong_suffix_are_refused(planted_sae: Any, tmp_path: Path) -> None:
    plan = plan_of(planted_sae, at=(SECOND,))
    with pytest.raises(ValueError, match=r"unknown form 'onnx'.*safetensors, gguf, hook, lm-eval, neuronpedia"):
        export_plan(plan, planted_sae, tmp_path / "a.onnx", "onnx")
    for form in FORMS:
        with pytest.raises(ValueError, match=rf"a\.bin should end in \{SUFFIXES[form]}"):
            export_plan(plan, planted_sae, tmp_path / "a.bin", form)
        with pytest.raises(FileNotFoundError, match="no folder"):
            export_plan(plan, planted_sae, tmp_path / "absent" / f"a{SUFFIXES[form]}", form)


@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_the_same_bytes_twice_and_leaves_no_other_file(
    planted_sae: Any, form: str, tmp_path: Path
) -> None:
    plan = plan_of(planted_sae, at=(SECOND,))
    contents = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / f"plan{SUFFIXES[form]}"
        assert export_plan(plan, planted_sae, path, form) == path
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    beside = {"plan.safetensors"} if form == "hook" else set()
    assert contents[0] == contents[1]
    assert set(contents[0]) == {f"plan{SUFFIXES[form]}"} | beside


@pytest.mark.parametrize("form", FORMS)
def test_a_failed_write_leaves_what_was_there(
    planted_sae: Any, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"plan{SUFFIXES[form]}"
    path.write_text("before")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", fail)
    monkeypatch.setattr(Path, "write_bytes", fail)
    if form == "neuronpedia":
        monkeypatch.setattr("sae_emotion_plugin.files.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        export_plan(plan_of(planted_sae, at=(SECOND,)), planted_sae, path, form)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_safetensors_file_holds_the_vectors_and_where_they_come_from(
    planted_sae: Any, bridge: Any, tmp_path: Path
) -> None:
    plan = plan_of(planted_sae, at=(HOOK, SECOND))
    path = export_plan(plan, planted_sae, tmp_path / "a.safetensors", "safetensors", model=bridge)
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
        about = json.loads(file.metadata()["sae_emotion.steering"])
    assert set(found) == {HOOK, SECOND}
    for name, vector in plan_vectors(plan, planted_sae).items():
        assert torch.equal(found[name], vector)
    assert SteeringPlan.from_dict(about["plan"]) == plan
    assert about["dictionary"] == dictionary_sha256(planted_sae)
    assert about["model"] == model_sha256(bridge)
    assert about["skips_first"] is True
    assert {"sae-emotion-plugin", "torch"} <= set(about["versions"])


@pytest.mark.parametrize("at", [(), (SECOND,), (HOOK, SECOND)])
def test_the_script_steers_a_plain_model_as_the_plan_does(
    bridge: Any, plain: Any, planted_sae: Any, at: tuple[str, ...], tmp_path: Path
) -> None:
    plan = plan_of(planted_sae, at=at)
    expected = steered_logits(bridge, planted_sae, plan)
    module = imported(export_plan(plan, planted_sae, tmp_path / "steer.py", "hook"))
    with torch.no_grad():
        before = plain(TOKENS).logits
        handles = module.steer(plain)
        after = plain(TOKENS).logits
        for handle in handles:
            handle.remove()
        again = plain(TOKENS).logits
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.equal(again, before)


def test_the_script_needs_nothing_of_this_package_and_is_short(planted_sae: Any, tmp_path: Path) -> None:
    text = export_plan(plan_of(planted_sae), planted_sae, tmp_path / "steer.py", "hook").read_text()
    code = text.split('"""', 2)[2]
    assert "sae_emotion" not in code and "sae_lens" not in code
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20


def test_the_script_generates_what_the_plan_generates(
    bridge: Any, plain: Any, planted_sae: Any, tmp_path: Path
) -> None:
    plan = plan_of(planted_sae)
    (ours,) = complete(bridge, planted_sae, [Request("he is such a", plan)], max_new_tokens=12, with_nll=False)
    (unsteered,) = complete(bridge, planted_sae, [Request("he is such a")], max_new_tokens=12, with_nll=False)
    tokens = torch.tensor([[1, *(WORDS.index(word) for word in ("he", "is", "such", "a"))]])
    handles = imported(export_plan(plan, planted_sae, tmp_path / "steer.py", "hook")).steer(plain)
    try:
        written = plain.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12)
    finally:
        for handle in handles:
            handle.remove()
    new = written[0, 5:].tolist()
    assert tuple(new[: len(ours.token_ids)]) == ours.token_ids
    assert ours.token_ids != unsteered.token_ids


def test_the_script_finds_the_blocks_of_a_gpt2_and_steers_the_first_token_where_texts_have_no_bos(
    learned_positions: Any, tmp_path: Path
) -> None:
    sae = make_sae()
    sae.cfg.metadata.prepend_bos = False
    plan = plan_of(sae)
    config = type(learned_positions.original_model.config)(**learned_positions.original_model.config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    handles = imported(export_plan(plan, sae, tmp_path / "steer.py", "hook")).steer(model)
    with torch.no_grad():
        after = model(TOKENS).logits
    assert len(handles) == 1
    torch.testing.assert_close(after, steered_logits(learned_positions, sae, plan), atol=1e-4, rtol=1e-4)


def loaded_as_llama_cpp_does(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The key-values, and llama.cpp's buffer: row N - 1 is `direction.N`. Read byte by byte, without the package."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    assert data[:4] == b"GGUF"
    at = 4
    assert take("I") == 3
    n_tensors, n_values = take("Q"), take("Q")
    values = {}
    for _ in range(n_values):
        name, kind = text(), take("I")
        values[name] = text() if kind == 8 else take({4: "I", 5: "i"}[kind])
    tensors = []
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        shape = [take("Q") for _ in range(n_dims)]
        kind, offset = take("I"), take("Q")
        assert n_dims == 1 and kind == 0, "llama.cpp takes float32 vectors only"
        prefix, _, layer = name.partition(".")
        assert prefix == "direction" and int(layer) > 0
        tensors.append((int(layer), shape[0], offset))
    begin = -(-at // 32) * 32
    buffer = np.zeros((max(layer for layer, _, _ in tensors), tensors[0][1]), dtype=np.float32)
    for layer, size, offset in tensors:
        buffer[layer - 1] += np.frombuffer(data, np.float32, size, begin + offset)
    return values, buffer


def test_llama_cpp_reads_the_plan_s_vector_for_the_block_that_the_plan_steers(
    bridge: Any, plain: Any, planted_sae: Any, tmp_path: Path
) -> None:
    plan = plan_of(planted_sae, at=(SECOND,))
    path = export_plan(plan, planted_sae, tmp_path / "a.gguf", "gguf", model=bridge)
    values, buffer = loaded_as_llama_cpp_does(path)
    assert values["general.architecture"] == "controlvector"
    assert values["controlvector.model_hint"] == "gemma3"
    assert values["controlvector.layer_count"] == 1
    assert SteeringPlan.from_dict(json.loads(values["sae_emotion.steering"])["plan"]) == plan
    # Block il, counted from 0, adds row il - 1 to its output; llama.cpp steers BOS too.
    by_block = {f"layers.{row + 1}": torch.from_numpy(vector) for row, vector in enumerate(buffer)}
    assert list(by_block) == ["layers.1"]
    everywhere = torch.ones_like(TOKENS, dtype=torch.bool)
    expected = steered_logits(bridge, planted_sae, plan, mask=everywhere)
    with torch.no_grad(), adding_everywhere(plain, by_block):
        torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def test_directions_of_several_blocks_stand_under_their_own_numbers(planted_sae: Any, tmp_path: Path) -> None:
    plan = plan_of(planted_sae, at=("blocks.12.hook_resid_post", "blocks.3.hook_resid_post"))
    values, buffer = loaded_as_llama_cpp_does(export_plan(plan, planted_sae, tmp_path / "a.gguf", "gguf"))
    vector = plan_vectors(plan, planted_sae)["blocks.3.hook_resid_post"].numpy()
    assert values["controlvector.layer_count"] == 2
    assert values["controlvector.model_hint"] == "tiny"
    assert buffer.shape == (12, D_MODEL)
    assert np.flatnonzero(buffer.any(axis=1)).tolist() == [2, 11]
    assert np.array_equal(buffer[2], vector) and np.array_equal(buffer[11], vector)


def test_the_gguf_package_reads_the_control_vector(planted_sae: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    plan = plan_of(planted_sae, at=(SECOND,))
    reader = gguf.GGUFReader(export_plan(plan, planted_sae, tmp_path / "a.gguf", "gguf"))
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1"
    assert np.array_equal(tensor.data, plan_vectors(plan, planted_sae)[SECOND].numpy())
    assert reader.get_field("general.architecture").contents() == "controlvector"


def test_block_0_is_refused_by_llama_cpp_s_form_and_only_there(planted_sae: Any, tmp_path: Path) -> None:
    plan = plan_of(planted_sae)
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_post: llama\.cpp steers from block 1 on"):
        export_plan(plan, planted_sae, tmp_path / "a.gguf", "gguf")
    assert export_plan(plan, planted_sae, tmp_path / "a.pt", "lm-eval").is_file()


@pytest.mark.parametrize("form", ["gguf", "hook", "lm-eval"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "hook_embed"])
def test_hooks_that_are_no_block_s_output_are_refused_by_name(
    planted_sae: Any, form: str, hook: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"cannot act at {hook}, only at the output of a block"):
        export_plan(plan_of(planted_sae, at=(hook,)), planted_sae, tmp_path / f"a{SUFFIXES[form]}", form)


def test_without_the_package_gguf_the_extra_is_named(
    planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_exports, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"extra 'demo'.*sae-emotion-plugin\[demo\]"):
        export_plan(plan_of(planted_sae, at=(SECOND,)), planted_sae, tmp_path / "a.gguf", "gguf")


def test_the_steering_file_of_lm_eval_steers_as_the_plan_does_at_every_position(
    bridge: Any, plain: Any, planted_sae: Any, tmp_path: Path
) -> None:
    plan = plan_of(planted_sae)
    path = export_plan(plan, planted_sae, tmp_path / "steer.pt", "lm-eval")
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["layers.0"]
    entry = loaded["layers.0"]
    assert set(entry) == {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}
    assert (entry["action"], entry["bias"], entry["head_index"]) == ("add", None, None)
    assert entry["steering_vector"].shape == (D_MODEL,)
    vectors = {name: one["steering_vector"] * one["steering_coefficient"] for name, one in loaded.items()}
    expected = steered_logits(bridge, planted_sae, plan, mask=torch.ones_like(TOKENS, dtype=torch.bool))
    with torch.no_grad(), adding_everywhere(plain, vectors):
        torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def test_blocks_are_called_what_the_model_calls_them(
    bridge: Any, learned_positions: Any, hooked_transformer: Any, planted_sae: Any, tmp_path: Path
) -> None:
    plan, path = plan_of(planted_sae, at=(SECOND,)), tmp_path / "steer.pt"
    for model, name in ((bridge, "layers.1"), (learned_positions, "h.1"), (None, "layers.1")):
        loaded = torch.load(export_plan(plan, planted_sae, path, "lm-eval", model=model), weights_only=True)
        assert list(loaded) == [name]
    with pytest.raises(ValueError, match="HookedTransformer does not tell"):
        export_plan(plan, planted_sae, path, "lm-eval", model=hooked_transformer)


# Neuronpedia


def listed_sae(**changes: Any) -> Any:
    sae = make_sae()
    sae.cfg.metadata.neuronpedia_id = "gpt2-small/0-res_post_128k-oai"
    for name, value in changes.items():
        setattr(sae.cfg, name, value)
    return sae


def test_the_steer_request_has_the_fields_that_neuronpedia_requires() -> None:
    sae = listed_sae()
    body = neuronpedia_request(plan_of(sae), sae, "he is such a", n_tokens=32, temperature=0.7, seed=3)
    assert json.loads(json.dumps(body)) == body
    assert {name: value for name, value in body.items() if name != "features"} == {
        "modelId": "gpt2-small",
        "prompt": "he is such a",
        "temperature": 0.7,
        "n_tokens": 32,
        "freq_penalty": 0.0,
        "seed": 3,
        "strength_multiplier": 1.0,
        "steer_method": "SIMPLE_ADDITIVE",
    }
    places = [(one["modelId"], one["layer"], one["index"]) for one in body["features"]]
    assert places == [("gpt2-small", "0-res_post_128k-oai", feature) for feature in AMOUNTS]


@pytest.mark.parametrize("folds", [True, False])
def test_the_strengths_add_up_to_the_plan_s_vector_with_the_rows_that_neuronpedia_uses(folds: bool) -> None:
    sae = listed_sae(rescale_acts_by_decoder_norm=folds)
    plan = plan_of(sae)
    body = neuronpedia_request(plan, sae, "he is such a")
    served = make_sae()
    served.cfg.rescale_acts_by_decoder_norm = folds
    try:
        served.fold_W_dec_norm()
    except NotImplementedError:
        assert not folds
    added = sum(one["strength"] * served.W_dec[one["index"]].detach() for one in body["features"])
    torch.testing.assert_close(added, plan_vectors(plan, sae)[HOOK])


def test_a_request_is_refused_for_features_and_numbers_that_neuronpedia_does_not_know(planted_sae: Any) -> None:
    sae = listed_sae()
    with pytest.raises(ValueError, match="neuronpedia_id is None"):
        neuronpedia_request(plan_of(planted_sae), planted_sae, "he")
    with pytest.raises(ValueError, match=f"its own hook, {HOOK}, not at {SECOND}"):
        neuronpedia_request(plan_of(sae, at=(SECOND,)), sae, "he")
    for prompt in (" ", "a" * 2049):
        with pytest.raises(ValueError, match=f"the prompt has {len(prompt)} characters"):
            neuronpedia_request(plan_of(sae), sae, prompt)
    numbers = {"temperature": 2.5, "n_tokens": 0, "freq_penalty": math.nan, "strength_multiplier": 11.0}
    for name, value in numbers.items():
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            neuronpedia_request(plan_of(sae), sae, "he", **{name: value})


def test_the_client_s_vector_is_what_the_plan_adds_at_strength_1(planted_sae: Any) -> None:
    plan = plan_of(planted_sae, at=(HOOK, SECOND))
    calls = neuronpedia_vectors(plan, planted_sae, model_id="gemma-3-270m")
    assert [(one["layer_num"], one["hook_type"]) for one in calls] == [(0, "hook_resid_post"), (1, "hook_resid_post")]
    for one, vector in zip(calls, plan_vectors(plan, planted_sae).values(), strict=True):
        assert set(one) == {"label", "model_id", "layer_num", "hook_type", "vector", "default_steer_strength"}
        assert one["default_steer_strength"] == 1.0
        assert one["model_id"] == "gemma-3-270m"
        torch.testing.assert_close(torch.tensor(one["vector"]), vector)
    assert calls[0]["label"] == f"+0.5 x feature {JOY}, -0.25 x feature 3, +2 x feature 50 (residual_norm)"


def test_a_vector_that_neuronpedia_has_no_place_for_is_refused(planted_sae: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot act at blocks\.0\.hook_mlp_out \(valid: .*hook_resid_pre"):
        neuronpedia_vectors(plan_of(planted_sae, at=("blocks.0.hook_mlp_out",)), planted_sae)
    sae = make_sae()
    sae.cfg.metadata.model_name = None
    with pytest.raises(ValueError, match="name no model: give model_id"):
        neuronpedia_vectors(plan_of(sae), sae)


def test_the_neuronpedia_file_has_a_request_where_the_dictionary_is_listed(planted_sae: Any, tmp_path: Path) -> None:
    own = json.loads(export_plan(plan_of(planted_sae), planted_sae, tmp_path / "a.json", "neuronpedia").read_text())
    assert own["steer"] is None and own["vectors"][0]["model_id"] == "tiny"
    sae = listed_sae()
    listed = json.loads(export_plan(plan_of(sae), sae, tmp_path / "b.json", "neuronpedia").read_text())
    assert listed["steer"] == neuronpedia_request(plan_of(sae), sae, "he is such a")
    assert listed["vectors"][0]["model_id"] == "gpt2-small"
    assert SteeringPlan.from_dict(listed["plan"]) == plan_of(sae)
