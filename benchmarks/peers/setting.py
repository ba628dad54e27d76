"""A random model of GPT-2's architecture, its tokenizer of words, and the folder from which SAEDashboard reads both."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SPECIAL = ("<bos>", "<eos>", "<unk>")
RUNNER = Path(__file__).with_name("run_sae_dashboard.py")


def random_words(vocabulary: int) -> list[str]:
    return [*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), vocabulary))]


def word_tokenizer(words: Sequence[str]) -> Any:
    """One token a word; unknown words are `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        # Both keep TransformerLens from looking the tokenizer up by its name.
        name_or_path="random",
        add_bos_token=True,
    )


def random_gpt2(config: dict[str, Any], seed: int = 0) -> Any:
    """A `GPT2LMHeadModel` with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**config)).eval()


def gpt2_config(words: Sequence[str], **sizes: int) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "architectures": ["GPT2LMHeadModel"],
        **sizes,
    }


def write_folder(
    folder: Path,
    model: Any,
    config: dict[str, Any],
    words: Sequence[str],
    sae: Any,
    tokens: np.ndarray,
    texts: Sequence[str],
    *,
    features_per_batch: int,
    batches: int,
) -> None:
    """All that `run_sae_dashboard.py` reads. `tokens`, `[prompt, position]`, are shown; `texts` only drawn from."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, folder / "weights.safetensors")
    sae.save_model(folder / "sae")
    np.save(folder / "tokens.npy", tokens.astype(np.int64))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    setting = {
        "model": config,
        "words": list(words),
        "features_per_batch": features_per_batch,
        "batches": batches,
        "drawn_prompts": len(texts) - len(texts) % 8,
    }
    (folder / "setting.json").write_text(json.dumps(setting))


def read_folder(folder: Path) -> tuple[Any, list[str], Any, np.ndarray]:
    """The model, its words, the SAE and the tokens of a folder that `write_folder` wrote."""
    from sae_lens import SAE

    setting = json.loads((folder / "setting.json").read_text())
    model = random_gpt2(setting["model"])
    missing, _ = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    if set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{folder} lacks weights of the model: {missing}")
    model.tie_weights()
    return model, setting["words"], SAE.load_from_disk(folder / "sae", device="cpu"), np.load(folder / "tokens.npy")


def run_peer(python: str, folders: Sequence[Path], work: Path) -> list[dict[str, Any]]:
    """What SAEDashboard makes of copies of the folders in `work`: `features`, `seconds` and `processor_seconds` of
    each batch, `versions`, and `drawn`, the tokens that it would have drawn from the texts."""
    copies = [Path(shutil.copytree(folder, work / str(number))) for number, folder in enumerate(folders)]
    done = subprocess.run([python, str(RUNNER), *map(str, copies)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{RUNNER.name} failed:\n{done.stderr[-3000:]}")
    return [json.loads((copy / "features.json").read_text()) for copy in copies]
