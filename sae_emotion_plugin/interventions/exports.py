"""A `SteeringPlan` out of the tool: files for `transformers`, llama.cpp, lm-evaluation-harness and Neuronpedia.

All of them add a constant vector, so that is what a plan is first turned into (`plan_vectors`); what a constant vector
or a form cannot carry is refused by name. One thing no file can say: our hook leaves BOS alone. The `hook` form does
too; llama.cpp, lm-evaluation-harness and Neuronpedia steer BOS like any other token.
"""

import io
import json
import re
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_emotion_plugin.activations import HookedModel, canonical_hook
from sae_emotion_plugin.files import replacing, write_whole
from sae_emotion_plugin.interventions.constant_vectors import plan_vectors
from sae_emotion_plugin.interventions.neuronpedia import neuronpedia_request, neuronpedia_vectors
from sae_emotion_plugin.interventions.plans import SteeringPlan, check_plan, dictionary_sha256, model_sha256
from sae_emotion_plugin.sparse_codes import token_settings

_BLOCK_OUTPUT = re.compile(r"blocks\.(\d+)\.hook_resid_post")
_SCRIPT = '''\
"""{title}

`handles = steer(model)` steers a causal language model of `transformers`; `handle.remove()` of each ends it.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file


def steer(model):
    n_blocks = model.config.get_text_config().num_hidden_layers
    lists = (part for part in model.base_model.modules() if isinstance(part, torch.nn.ModuleList))
    blocks = next(part for part in lists if len(part) == n_blocks)
    vectors = load_file(Path(__file__).with_suffix(".safetensors"))
    return [blocks[int(hook.split(".")[1])].register_forward_hook(adding(vector)) for hook, vector in vectors.items()]


def adding(vector):
    def add(block, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        change = vector.to(hidden).expand(hidden.shape).clone()
{skip}        return (hidden + change, *output[1:]) if isinstance(output, tuple) else hidden + change

    return add
'''
_SKIP = """\
        if hidden.shape[1] > 1:  # a prompt, not a step of a generation with a cache
            change[:, 0] = 0  # BOS is not steered
"""


def export_plan(plan: SteeringPlan, sae: Any, path: str | Path, form: str, *, model: HookedModel | None = None) -> Path:
    """The path, after the plan was written there in one of the `FORMS`.

    Args:
        form: `safetensors` (.safetensors), `gguf` (.gguf, llama.cpp), `hook` (.py and .safetensors, `transformers`),
            `lm-eval` (.pt, lm-evaluation-harness) or `neuronpedia` (.json).
        model: where given, the plan is checked against it, and names that depend on the model are its own.

    Raises:
        ValueError: an unknown form, another suffix than the form's, a plan that is not for the SAE or the model, or
            one that the form cannot carry: the message names what it cannot.
        FileNotFoundError: there is no such folder.
        ImportError: `gguf` without the extra `demo`.
    """
    if form not in _FORMS:
        raise ValueError(f"unknown form {form!r} (valid: {', '.join(FORMS)})")
    return _FORMS[form](plan, sae, path, model=model)


def export_safetensors(plan: SteeringPlan, sae: Any, path: str | Path, *, model: HookedModel | None = None) -> Path:
    """The path, after the vector of each hook was written there under the hook's name, float32, `d_in` long.

    Its metadata have one entry, `sae_emotion.steering`, a JSON object: `plan`, `dictionary` and `model` (SHA-256),
    `skips_first` (whether the plan leaves BOS alone) and `versions`. Errors as in `export_plan`.
    """
    path = _checked_path(path, ".safetensors")
    with replacing(path) as partial:
        partial.write_bytes(_vector_file(plan, sae, model))
    return path


def export_hook(plan: SteeringPlan, sae: Any, path: str | Path, *, model: HookedModel | None = None) -> Path:
    """The path, after a Python file was written there that steers without this package; its vectors lie beside it.

    The file needs torch, transformers and safetensors. Its `steer(model)` hooks the outputs of a `transformers` model's
    decoder blocks. BOS is left alone as in `interventions.steering`, by position: where the SAE's texts begin with BOS,
    the first position of every call with several. So it is for one prompt, or prompts of one length: where a batch is
    padded on the left, padding is left alone in place of BOS. Errors as in `export_plan`.
    """
    path = _checked_path(path, ".py")
    for hook in plan.hooks:
        _block(hook, "a hook on decoder blocks")
    data = _vector_file(plan, sae, model)
    skip = _SKIP if token_settings(sae)["prepend_bos"] else ""
    with replacing(path) as script, replacing(path.with_suffix(".safetensors")) as vectors:
        vectors.write_bytes(data)
        script.write_text(_SCRIPT.format(title=repr(plan), skip=skip), encoding="utf-8", newline="\n")
    return path


def export_gguf(plan: SteeringPlan, sae: Any, path: str | Path, *, model: HookedModel | None = None) -> Path:
    """The path, after a GGUF control vector was written there, for llama.cpp's `--control-vector`.

    `direction.N` is added to the output of block N, counted from 0 as in `blocks.N.hook_resid_post`; but llama.cpp has
    no vector for block 0, so N starts at 1. (`common_control_vector_load_one` puts `direction.N` at row N - 1 of a
    buffer, `llama_adapter_cvec::apply` reads row il - 1 for block il, `build_cvec` adds it behind the block's last
    residual sum.) A direction behind the model's last block is ignored there without a word: give the `model` to have
    that noticed. llama.cpp reads neither `controlvector.model_hint` nor `controlvector.layer_count`; the latter is the
    number of directions, as its own generator writes it. Its programs steer BOS too, which can change a greedy text
    (`benchmarks/control_vector.py`); calling `llama_set_adapter_cvec` once BOS has been read gives the plan's own.

    Raises:
        ValueError: as in `export_plan`; a hook that is no block's output, or block 0's.
        ImportError: the package `gguf` is missing.
    """
    path = _checked_path(path, ".gguf")
    if find_spec("gguf") is None:
        raise ImportError("a GGUF control vector needs the extra 'demo': pip install 'sae-emotion-plugin[demo]'")
    import gguf

    what = "a GGUF control vector"
    blocks = {_block(hook, what): vector for hook, vector in _vectors(plan, sae, model).items()}
    if 0 in blocks:
        raise ValueError(f"{what} cannot act at blocks.0.hook_resid_post: llama.cpp steers from block 1 on")
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, "controlvector")
        writer.add_string("controlvector.model_hint", _model_hint(sae, model))
        writer.add_int32("controlvector.layer_count", len(blocks))
        for name, text in _provenance(plan, sae, model).items():
            writer.add_string(name, text)
        for block, vector in sorted(blocks.items()):
            writer.add_tensor(f"direction.{block}", vector.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return path


def export_lm_eval(plan: SteeringPlan, sae: Any, path: str | Path, *, model: HookedModel | None = None) -> Path:
    """The path, after a steering file of lm-evaluation-harness was written there (`--model steered`, `steer_path=`).

    A dictionary from the block's name inside the base model to `steering_vector`, `steering_coefficient` (1), `action`
    ("add"), `bias` and `head_index` (None), as `lm_eval/models/hf_steered.py` reads it with `weights_only=True`. Blocks
    are called `layers.N`, as in Gemma, Llama, Qwen and GPT-NeoX; with a `model`, what it calls them (`h.N` in GPT-2).
    The harness adds the vector at every position, BOS and padding too. Errors as in `export_plan`.
    """
    path = _checked_path(path, ".pt")
    blocks = "layers" if model is None else _block_list(model)
    entries = {
        f"{blocks}.{_block(hook, 'a steering file of lm-evaluation-harness')}": {
            "steering_vector": vector,
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for hook, vector in _vectors(plan, sae, model).items()
    }
    buffer = io.BytesIO()  # torch writes the name of a file into it, and ours is a temporary one
    torch.save(entries, buffer)
    with replacing(path) as partial:
        partial.write_bytes(buffer.getvalue())
    return path


def export_neuronpedia(plan: SteeringPlan, sae: Any, path: str | Path, *, model: HookedModel | None = None) -> Path:
    """The path, after `neuronpedia_request` ("steer") and `neuronpedia_vectors` ("vectors") were written there as JSON.

    "steer" is null for a dictionary that is not on Neuronpedia; the vectors can be uploaded all the same. The prompt is
    to be filled in. Errors as in `export_plan`.
    """
    path = _checked_path(path, ".json")
    _check_model(plan, sae, model)
    listed = sae.cfg.metadata.neuronpedia_id is not None
    request = neuronpedia_request(plan, sae, "he is such a") if listed else None
    data = {"steer": request, "vectors": list(neuronpedia_vectors(plan, sae)), "plan": plan.to_dict()}
    return write_whole(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


_FORMS: dict[str, Callable[..., Path]] = {
    "safetensors": export_safetensors,
    "gguf": export_gguf,
    "hook": export_hook,
    "lm-eval": export_lm_eval,
    "neuronpedia": export_neuronpedia,
}
FORMS = tuple(_FORMS)


def _vectors(plan: SteeringPlan, sae: Any, model: HookedModel | None) -> dict[str, Float[Tensor, " d_in"]]:
    _check_model(plan, sae, model)
    return plan_vectors(plan, sae)


def _check_model(plan: SteeringPlan, sae: Any, model: HookedModel | None) -> None:
    if model is not None:
        check_plan(plan, sae, model)
        for hook in plan.hooks:
            canonical_hook(model, hook)


def _vector_file(plan: SteeringPlan, sae: Any, model: HookedModel | None) -> bytes:
    from safetensors.torch import save

    # Each its own memory, as safetensors asks, although a plan adds the same vector at all its hooks.
    vectors = {hook: vector.clone() for hook, vector in _vectors(plan, sae, model).items()}
    return save(vectors, _provenance(plan, sae, model))


def _provenance(plan: SteeringPlan, sae: Any, model: HookedModel | None) -> dict[str, str]:
    """One entry, as safetensors writes several in a random order."""
    packages = ("sae-emotion-plugin", "sae-lens", "torch")
    about = {
        "plan": plan.to_dict(),
        "dictionary": dictionary_sha256(sae),
        "model": plan.model or (None if model is None else model_sha256(model)),
        "skips_first": token_settings(sae)["prepend_bos"],
        "versions": {name: metadata.version(name) for name in packages},
    }
    return {"sae_emotion.steering": json.dumps(about)}


def _checked_path(path: str | Path, suffix: str) -> Path:
    if Path(path).suffix != suffix:
        raise ValueError(f"{path} should end in {suffix}")
    return Path(path)


def _block(hook_name: str, what: str) -> int:
    """The block whose output the hook is."""
    match = _BLOCK_OUTPUT.fullmatch(hook_name)
    if match is None:
        raise ValueError(f"{what} cannot act at {hook_name}, only at the output of a block (blocks.N.hook_resid_post)")
    return int(match[1])


def _model_hint(sae: Any, model: HookedModel | None) -> str:
    """The architecture as GGUF files call it, where the model tells; otherwise the name in the SAE's metadata."""
    kind = getattr(getattr(getattr(model, "original_model", None), "config", None), "model_type", None)
    return kind.removesuffix("_text") if kind else str(sae.cfg.metadata.model_name or "unknown")


def _block_list(model: HookedModel) -> str:
    """What the base model of `transformers` calls its list of blocks."""
    inner = getattr(model, "original_model", None)
    if inner is None:
        raise ValueError(
            f"a {type(model).__name__} does not tell what transformers calls its blocks: leave out the model"
        )
    for name, part in inner.base_model.named_modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == model.cfg.n_layers:
            return name
    raise ValueError(f"no list of {model.cfg.n_layers} blocks in a {type(inner).__name__}")
