import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_openai_format import D_IN, D_SAE, K, checkpoint, inputs, saved

from sae_emotion_plugin.openai_checkpoint import all_finite
from sae_emotion_plugin.openai_format import load_openai_checkpoint


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The file cut short, with a part cut out or put in twice, or with some bytes or bits changed."""
    changed = bytearray(content)
    kind = rng.choice(("cut", "bytes", "bits", "gap", "twice", "head", "ends"))
    at = rng.randrange(len(changed))
    if kind == "cut":
        del changed[at:]
    elif kind in ("bytes", "head", "ends"):
        # Names, pickle and directory stand at both ends: what is changed there hurts more than in the weights.
        low, high = {"bytes": (0, len(changed)), "head": (0, 1500), "ends": (len(changed) - 1500, len(changed))}[kind]
        for _ in range(rng.randrange(1, 12)):
            changed[rng.randrange(low, high)] = rng.randrange(256)
    elif kind == "bits":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "gap":
        del changed[at : at + rng.randrange(1, 200)]
    else:
        changed[at:at] = changed[max(0, at - 100) : at]
    return bytes(changed)


@pytest.mark.parametrize("layout", ["zip", "legacy", "float16 zip", "compressed"])
def test_mutated_checkpoints_load_or_raise_the_documented_errors(layout, tmp_path):
    state = checkpoint("TopK")
    if layout == "float16 zip":
        state = {key: value.half() if value is state["encoder.weight"] else value for key, value in state.items()}
    path = saved(state, tmp_path, _use_new_zipfile_serialization=layout != "legacy")
    if layout == "compressed":
        compress(path)
    content, rng, refused = path.read_bytes(), random.Random(layout), 0
    for _ in range(100):
        path.write_bytes(mutated(content, rng))
        try:
            sae = load_openai_checkpoint(path)
            with torch.no_grad():
                sae(inputs(2))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(path) in str(error)
    assert 30 <= refused < 100


def test_mutated_contents_load_or_raise_the_documented_errors(tmp_path):
    rng, refused = random.Random(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of these layouts experimental, others deprecated
        odd: list[Any] = [
            None, 3, -1, 2**70, 1.5, "TopK", "x" * 500, b"bytes", [], {}, {"k": 2}, True, (1, 2), torch.tensor(3),
            torch.tensor(float("nan")), torch.zeros(0), torch.zeros(D_SAE, D_IN), torch.zeros(D_IN, D_SAE).double(),
            torch.zeros(D_SAE, dtype=torch.bool), torch.zeros(D_SAE, D_IN, dtype=torch.complex64),
            torch.zeros(3, 3, 3), torch.zeros(1).expand(D_IN, D_SAE), torch.zeros(D_SAE, D_IN).to_sparse_csr(),
            torch.nn.Parameter(torch.zeros(D_SAE)), torch.quantize_per_tensor(torch.zeros(D_SAE), 1.0, 0, torch.quint8),
        ]  # fmt: skip
        for _ in range(200):
            state: dict[Any, Any] = checkpoint(rng.choice(["TopK", "ReLU"]))
            for _ in range(rng.randrange(1, 4)):
                key = rng.choice([*state, "k", "postact_fn", "decoder.linear.weight", "activation.k", 5])
                if key in ("k", "postact_fn") and isinstance(state.get("activation_state_dict"), dict):
                    state["activation_state_dict"] = {**state["activation_state_dict"], key: rng.choice(odd)}
                elif rng.random() < 0.3 and key in state:
                    del state[key]
                else:
                    state[key] = rng.choice(odd)
            path = saved(state, tmp_path)
            try:
                load_openai_checkpoint(path)
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and str(path) in str(error)
    assert 100 <= refused < 200


def compress(path: Path) -> None:
    """Packs the file again as any archiver would: smaller."""
    with zipfile.ZipFile(path) as old:
        parts = {part.filename: old.read(part) for part in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)


def test_a_file_that_an_archiver_has_compressed_still_loads(tmp_path):
    path = saved(checkpoint("TopK"), tmp_path)
    expected = load_openai_checkpoint(path).W_dec.clone()
    size = path.stat().st_size
    compress(path)
    assert path.stat().st_size < size
    assert torch.equal(load_openai_checkpoint(path).W_dec, expected)


def test_what_the_published_code_saves_today_loads(tmp_path):
    # Its TopK is a module of the autoencoder too, and adds its own two values to the state dict.
    state = {**checkpoint("TopK"), "activation.k": K, "activation.postact_fn": "ReLU"}
    assert torch.equal(load_openai_checkpoint(saved(state, tmp_path)).W_dec, state["decoder.weight"].T)
    state["activation.k"] = K + 1
    with pytest.raises(ValueError, match=r"activation\.k is 6, which activation_state_dict does not say"):
        load_openai_checkpoint(saved(state, tmp_path))


@pytest.mark.parametrize("make", ["all", "none"])
def test_finite_numbers_are_told_from_others_in_any_order_and_dtype(make):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for bad in (float("nan"), float("inf"), -float("inf")):
            tensor = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
            if make == "none":
                tensor[3, 4] = bad
            for view in (tensor, tensor.T, tensor[:, 1:], tensor.T[2:]):
                assert all_finite(view) is (make == "all")
    assert all_finite(torch.zeros(0)) and all_finite(torch.arange(3))
