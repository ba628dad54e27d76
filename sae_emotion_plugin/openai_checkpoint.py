"""Files in the format of OpenAI's sparse autoencoders: read without running their code, checked, memory-mapped.

A file is what ``torch.save(autoencoder.state_dict())`` of https://github.com/openai/sparse_autoencoder
leaves: ``encoder.weight``, ``decoder.weight``, ``pre_bias``, ``latent_bias``, ``activation``,
``activation_state_dict`` and three training statistics.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

WEIGHTS = ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")
BUFFERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
ACTIVATIONS = ("ReLU", "TopK")
DTYPES = ("float32", "float16", "bfloat16", "float64")

_TIED_DECODER = "decoder.linear.weight"
_OTHER_KEYS = ("activation", "activation_state_dict")
# OpenAI's published `state_dict` of a TopK autoencoder says k twice: here, and in activation_state_dict.
_REPEATED = {"activation.k": "k", "activation.postact_fn": "postact_fn"}


@dataclass(frozen=True)
class OpenAICheckpoint:
    """A checked checkpoint, in the file's own orientation and dtype."""

    encoder: Float[Tensor, "d_sae d_in"]
    decoder: Float[Tensor, "d_in d_sae"]
    pre_bias: Float[Tensor, "d_in"]
    latent_bias: Float[Tensor, "d_sae"]
    activation: Literal["ReLU", "TopK"]
    k: int | None
    """Active latents per token; None for ReLU."""
    buffers: Mapping[str, Tensor]
    """The training statistics that the file carries (OpenAI's files carry all three); they change no code."""
    tied: bool
    """The decoder was stored as ``decoder.linear.weight``, which is the encoder again."""


def read_openai_checkpoint(path: str | Path, *, check_numbers: bool = True) -> OpenAICheckpoint:
    """The checked content of an OpenAI-format file, on the CPU; no code in the file is ever run.

    The tensors are views of the memory-mapped file (privately: writing to them changes no file), unless the file is in
    torch's legacy form or compressed. Without `check_numbers` no weight is looked at, so that a NaN may pass.

    Weights may be float16, bfloat16, float32 or float64. The three statistics may be missing, and so may
    ``activation``, which then means ReLU, as in OpenAI's reader.

    Raises FileNotFoundError when there is no file, ValueError for anything else that cannot be read exactly.
    """
    path = Path(path).expanduser()
    state = _load_state(path)
    tied = _TIED_DECODER in state and "decoder.weight" not in state
    expected = [_TIED_DECODER if tied and key == "decoder.weight" else key for key in WEIGHTS]
    if missing := [key for key in expected if key not in state]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; valid keys: {_valid_keys()}")
    if extra := [str(key) for key in state if key not in (*expected, *BUFFERS, *_OTHER_KEYS, *_REPEATED)]:
        raise ValueError(f"{path} has the unknown key {_shortened(', '.join(extra))}; valid keys: {_valid_keys()}")
    present = [key for key in (*expected, *BUFFERS) if key in state]
    tensors = {key: _checked_tensor(path, key, state[key], check_numbers) for key in present}

    if tied:
        # OpenAI's TiedTranspose stores the encoder a second time and transposes it when decoding.
        if check_numbers and not _equal(tensors[_TIED_DECODER], tensors["encoder.weight"]):
            raise ValueError(f"{path}: {_TIED_DECODER} differs from encoder.weight; a tied decoder equals its encoder")
        tensors["decoder.weight"] = tensors.pop(_TIED_DECODER).T
    _check_shapes(path, tensors)
    d_sae = tensors["latent_bias"].shape[0]
    activation, k = _read_activation(path, state, d_sae)
    return OpenAICheckpoint(
        encoder=tensors["encoder.weight"],
        decoder=tensors["decoder.weight"],
        pre_bias=tensors["pre_bias"],
        latent_bias=tensors["latent_bias"],
        activation=activation,
        k=k,
        buffers={key: tensors[key] for key in BUFFERS if key in tensors},
        tied=tied,
    )


def _load_state(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; an OpenAI checkpoint is one .pt file")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise ValueError(f"{path} is empty; an OpenAI checkpoint is a file written by torch.save")
    if start.startswith((b"<", b"version https://git-lfs")):
        kind = "a web page" if start.startswith(b"<") else "a Git LFS pointer"
        raise ValueError(f"{path} is {kind}, not a file written by torch.save; download it again")
    try:
        state = _loaded(path, mapped=_can_be_mapped(path))
    except pickle.UnpicklingError as error:
        if refused := re.search(r"(?:GLOBAL|Unsupported class|Unsupported global:?) ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds {refused[1]}, which could run code; valid: only tensors, numbers and text"
            ) from error
        raise ValueError(f"{path} is not a readable torch.save file (truncated or damaged)") from error
    except Exception as error:
        # Damaged bytes surface as almost any exception of the unpickler, the zip reader or torch.
        raise ValueError(f"{path} is not a readable torch.save file (truncated or damaged)") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the state_dict of an autoencoder")
    return state


def _can_be_mapped(path: Path) -> bool:
    """Whether the file is of torch's zip form with every part stored as it is: a mapping would not unpack it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
    except Exception:
        # Whatever is wrong with a damaged file, torch's own reader is to say so.
        return False


def _loaded(path: Path, *, mapped: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, found without a second tensor of that size."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    # aminmax copies what is not in row order; a transposed matrix is, the other way round.
    in_rows = tensor.T if tensor.ndim == 2 and tensor.T.is_contiguous() else tensor
    lowest, highest = torch.aminmax(in_rows.detach())
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _checked_tensor(path: Path, key: str, value: object, check_numbers: bool) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: {key} is a {type(value).__name__}, not a tensor")
    floating = value.dtype in tuple(getattr(torch, dtype) for dtype in DTYPES)
    if key not in BUFFERS and not floating:
        raise ValueError(f"{path}: {key} has dtype {value.dtype}; valid: {', '.join(DTYPES)}")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{path}: {key} is not a dense tensor with data")
    # A few stored bytes may claim any shape through zero strides.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{path}: {key} claims the shape {_shape(value)} with too few stored numbers")
    value = value.detach()
    if floating and check_numbers and not all_finite(value):
        raise ValueError(f"{path}: {key} holds NaN or infinite numbers; every number must be finite")
    return value


def _check_shapes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key in ("pre_bias", "latent_bias"):
        if tensors[key].ndim != 1 or tensors[key].numel() == 0:
            raise ValueError(f"{path}: {key} has the shape {_shape(tensors[key])}; valid: one non-empty axis")
    d_in, d_sae = tensors["pre_bias"].shape[0], tensors["latent_bias"].shape[0]
    valid = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}
    if d_in != d_sae and all(tensors[key].shape == shape[::-1] for key, shape in valid.items()):
        raise ValueError(
            f"{path}: encoder.weight {_shape(tensors['encoder.weight'])} and decoder.weight"
            f" {_shape(tensors['decoder.weight'])} are swapped; valid: {(d_sae, d_in)} and {(d_in, d_sae)}"
        )
    for key, shape in {**valid, **{key: (d_sae,) for key in BUFFERS if key in tensors}}.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{path}: {key} has the shape {_shape(tensors[key])}; valid: {shape},"
                f" from d_in={d_in} (pre_bias) and d_sae={d_sae} (latent_bias)"
            )


def _read_activation(path: Path, state: Mapping[str, Any], d_sae: int) -> tuple[Literal["ReLU", "TopK"], int | None]:
    activation, options = state.get("activation", "ReLU"), state.get("activation_state_dict", {})
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: unknown activation {_shortened(repr(activation))}; valid: {', '.join(ACTIVATIONS)}")
    if not isinstance(options, dict):
        raise ValueError(f"{path}: activation_state_dict is a {type(options).__name__}; valid: a dict")
    valid = {"k", "postact_fn"} if activation == "TopK" else set()
    if set(options) != valid:
        found = _shortened(", ".join(map(str, options))) or "nothing"
        raise ValueError(
            f"{path}: activation_state_dict of {activation} holds {found};"
            f" valid: {', '.join(sorted(valid)) or 'nothing'}"
        )
    for key, name in _REPEATED.items():
        if key in state and repr(state[key]) != repr(options.get(name)):
            raise ValueError(
                f"{path}: {key} is {_shortened(repr(state[key]))}, which activation_state_dict does not say"
            )
    if activation == "ReLU":
        return "ReLU", None
    k, postact_fn = options["k"], options["postact_fn"]
    if postact_fn != "ReLU":
        # SAELens's TopK always ends in a ReLU, so negative codes would be lost without a word.
        raise ValueError(f"{path}: unsupported postact_fn {_shortened(repr(postact_fn))}; valid: 'ReLU'")
    if type(k) is not int or not 1 <= k <= d_sae:
        raise ValueError(f"{path}: k is {_shortened(repr(k))}; valid: a whole number from 1 to {d_sae} (d_sae)")
    return "TopK", k


def _valid_keys() -> str:
    return ", ".join((*WEIGHTS, *BUFFERS, *_OTHER_KEYS))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _shortened(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."
