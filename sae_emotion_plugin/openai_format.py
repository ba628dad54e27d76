"""Checkpoints in the format of OpenAI's sparse autoencoders <-> SAELens objects, in both directions.

OpenAI's reader normalises the input if and only if the activation is TopK. So a TopK file becomes a TopK SAE on
layer-normed input, a ReLU file a standard one, and nothing else can be written.
"""

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from sae_lens import SAE, StandardSAE, TopKSAE
from sae_lens.loading.pretrained_sae_loaders import LLM_METADATA_KEYS
from safetensors import SafetensorError
from torch import Tensor

from sae_emotion_plugin.files import replacing
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.openai_checkpoint import DTYPES, OpenAICheckpoint, all_finite, read_openai_checkpoint
from sae_emotion_plugin.openai_saes import STANDARD, TOPK, ensure_registered

_SAE_LENS_KWARGS_WARNING = r"\s*This SAE has non-empty model_from_pretrained_kwargs"


def load_openai_checkpoint(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    metadata: Mapping[str, Any] | None = None,
) -> SAE:
    """A SAELens TopKSAE (layer-normed input) or StandardSAE that computes what OpenAI's own code computes.

    On the CPU and in the file's own dtype the weights stay in the memory-mapped file and are transposed views of it,
    so the file must not be written to meanwhile. The SAE decodes as often as one likes (`openai_saes`).

    The file knows neither its model nor its hook: say them in `metadata` (``model_name``, ``hook_name``,
    ``neuronpedia_id``, ``context_size``, ...). ``prepend_bos`` is False unless said otherwise, as for OpenAI.
    Raises as `read_openai_checkpoint` does.
    """

    def converter(path: str | Path, device: str, cfg_overrides: dict[str, Any] | None):
        return openai_disk_loader(path, device, {**(metadata or {}), **(cfg_overrides or {})})

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_SAE_LENS_KWARGS_WARNING)
        return SAE.load_from_disk(path, checked_device(device), checked_dtype(dtype), converter=converter)


def openai_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens's config and weights of an OpenAI-format file: ``SAE.load_from_disk(path, converter=...)``."""
    return sae_lens_parts(read_openai_checkpoint(path), device, cfg_overrides, str(path))


def sae_lens_parts(
    checkpoint: OpenAICheckpoint, device: str, cfg_overrides: Mapping[str, Any] | None, name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens's config and weights of a checkpoint; `name` is what an error calls it."""
    ensure_registered()
    cfg = _sae_lens_config(checkpoint, device, cfg_overrides)
    dtype = getattr(torch, cfg["dtype"])
    encoder, decoder = checkpoint.encoder, checkpoint.decoder
    if decoder.untyped_storage().data_ptr() == encoder.untyped_storage().data_ptr():
        decoder = decoder.clone()  # what changes one in place, such as folding norms, may not change the other
    stored = {"W_enc": encoder, "W_dec": decoder, "b_enc": checkpoint.latent_bias, "b_dec": checkpoint.pre_bias}
    weights = {}
    for key, tensor in stored.items():
        moved = tensor.to(cfg["device"], dtype)
        if moved.dtype != tensor.dtype and not all_finite(moved):
            raise ValueError(f"{name}: {key} overflows in {cfg['dtype']}; valid dtypes: {', '.join(DTYPES)}")
        weights[key] = moved.T if key.startswith("W") else moved
    return cfg, weights


def openai_disk_config(
    path: str | Path, device: str | None = None, cfg_overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """SAELens's flat config of an OpenAI-format file."""
    ensure_registered()
    return _sae_lens_config(read_openai_checkpoint(path, check_numbers=False), device or "cpu", cfg_overrides)


def openai_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """SAELens's config and weights of the OpenAI-format file `folder_name` in a Hugging Face repository.

    Pass it as ``SAE.from_pretrained(repo_id, "path/to/8.pt", converter=openai_huggingface_loader)``.
    """
    path = _downloaded(repo_id, folder_name, force_download)
    cfg, weights = openai_disk_loader(path, device, cfg_overrides)
    return cfg, weights, None


def openai_huggingface_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """SAELens's flat config of the OpenAI-format file `folder_name` in a Hugging Face repository."""
    return openai_disk_config(_downloaded(repo_id, folder_name, force_download), device, cfg_overrides)


def convert(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """The folder, now holding ``cfg.json`` and ``sae_weights.safetensors`` that plain SAELens loads.

    The folder appears complete or not at all. Raises ValueError when it exists and is not empty, and as
    `read_openai_checkpoint` does.
    """
    out = Path(out_dir).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists; name a folder that is empty or not there yet")
    sae = load_openai_checkpoint(checkpoint, dtype=dtype, metadata=metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            sae.save_model(Path(temporary) / "sae")
            if out.exists():
                out.rmdir()
            os.replace(Path(temporary) / "sae", out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {out}: {first_line(error)}") from error
    return out


def save_openai_checkpoint(sae: SAE, path: str | Path) -> Path:
    """The path of a file, now written, that OpenAI's own ``Autoencoder.from_state_dict`` reads as the same autoencoder.

    Weights keep their dtype and every bit, but for decoder norms that scale the codes
    (``rescale_acts_by_decoder_norm``), which are folded into the weights. The training statistics, which SAELens does
    not know, are OpenAI's initial ones.

    Raises ValueError for what the format cannot express, FileNotFoundError when the folder does not exist.
    """
    activation, k = _expressible(sae)
    weights = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    for name, tensor in weights.items():
        if not all_finite(tensor):
            raise ValueError(f"cannot save this SAE: {name} holds NaN or infinite numbers; valid: finite numbers")
    encoder, decoder, latent_bias = weights["W_enc"], weights["W_dec"], weights["b_enc"]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        norms = sae.get_W_dec_norm().cpu()
        encoder, latent_bias, decoder = encoder * norms, latent_bias * norms, decoder / norms[:, None]
    d_sae = int(sae.cfg.d_sae)
    state = {
        "pre_bias": weights["b_dec"],
        "latent_bias": latent_bias,
        "stats_last_nonzero": torch.zeros(d_sae, dtype=torch.long),
        "latents_activation_frequency": torch.ones(d_sae),
        "latents_mean_square": torch.zeros(d_sae),
        "encoder.weight": encoder.T,
        "decoder.weight": decoder.T,
        "activation": activation,
        "activation_state_dict": {} if k is None else {"k": k, "postact_fn": "ReLU"},
    }
    # Contiguous and apart: torch.save writes the whole storage behind a view.
    state = {
        key: value.contiguous().clone() if isinstance(value, Tensor) and _is_view(value) else value
        for key, value in state.items()
    }
    try:
        with replacing(path) as partial:
            torch.save(state, partial)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer has no error of its own for a full disk
        raise ValueError(f"cannot write {path}: {first_line(error)}") from error
    return Path(path)


def checked_device(device: str | None) -> str:
    """The device itself; for None a GPU when torch sees one, else the CPU."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; valid: cpu, cuda, cuda:0, mps") from error
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.mps.is_available()):
        raise ValueError(f"device {device!r} is not available on this machine; valid: cpu")
    return device


def checked_dtype(dtype: str) -> str:
    """The dtype's name itself, when an SAE can be loaded in it."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid: {', '.join(DTYPES)}")
    return dtype


def _expressible(sae: SAE) -> tuple[str, int | None]:
    """The activation and k of an SAE that the format can hold; ValueError naming what it cannot."""
    cfg = sae.cfg
    if not isinstance(sae, TopKSAE | StandardSAE):
        found = f"a {type(sae).__name__} (architecture {cfg.architecture()!r})"
        valid = "a TopKSAE or a StandardSAE"
    elif cfg.reshape_activations != "none":
        found, valid = f"reshape_activations={cfg.reshape_activations!r}", "'none'"
    elif not cfg.apply_b_dec_to_input:
        found, valid = "apply_b_dec_to_input=False", "True"
    elif isinstance(sae, TopKSAE) and cfg.normalize_activations != "layer_norm":
        found = f"a TopK SAE with normalize_activations={cfg.normalize_activations!r}"
        valid = "'layer_norm' (OpenAI's reader normalises the input if and only if the activation is TopK)"
    elif isinstance(sae, StandardSAE) and cfg.normalize_activations != "none":
        found = f"a ReLU SAE with normalize_activations={cfg.normalize_activations!r}"
        valid = "'none' (OpenAI's reader normalises the input if and only if the activation is TopK)"
    elif isinstance(sae, TopKSAE) and not 1 <= sae.cfg.k <= cfg.d_sae:
        found, valid = f"k={sae.cfg.k}", f"1 to {cfg.d_sae} (d_sae)"
    else:
        return ("TopK", int(sae.cfg.k)) if isinstance(sae, TopKSAE) else ("ReLU", None)
    raise ValueError(f"OpenAI's format cannot express {found}; valid: {valid}")


def _is_view(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _sae_lens_config(checkpoint: OpenAICheckpoint, device: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    # Flat and without sae_lens_version, as SAELens's own loaders do it: SAELens nests the metadata.
    d_sae, d_in = checkpoint.encoder.shape
    cfg: dict[str, Any] = {
        "architecture": TOPK if checkpoint.activation == "TopK" else STANDARD,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if checkpoint.activation == "TopK" else "none",
        "prepend_bos": False,
    }
    if checkpoint.k is not None:
        cfg["k"] = checkpoint.k
    valid = {"dtype", "device", *LLM_METADATA_KEYS}
    for key, value in (overrides or {}).items():
        if key not in valid:
            raise ValueError(f"unknown setting {key!r} for an OpenAI checkpoint; valid: {', '.join(sorted(valid))}")
        if value is not None:
            cfg[key] = value
    cfg["dtype"] = checked_dtype(str(cfg["dtype"]).removeprefix("torch."))
    return cfg


def _downloaded(repo_id: str, file: str, force_download: bool) -> str:
    file = file if Path(file).suffix == ".pt" else f"{file}.pt"
    try:
        return hf_hub_download(repo_id, file, force_download=force_download)
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"cannot download {file} of {repo_id}: {first_line(error)}") from error
