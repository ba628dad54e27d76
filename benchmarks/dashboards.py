"""Dashboards of a whole dictionary: seconds a feature and a token, and peak memory, against SAEDashboard's.

    python benchmarks/dashboards.py [--tokens 8192] [--width 32768] [--peer-seconds 0.22] [--scaling]

A model of GPT-2's shape with random weights (768 dimensions, 50,257 tokens) and a random TopK SAE (k = 32) behind its
sixth block; texts of 127 random tokens and BOS. Timed is everything from texts to the last `FeatureDashboard`: model,
codes, logits, correlations, files, and reading them back. `ratio` compares with the seconds that SAEDashboard 0.8.0
needs for a feature at 8,192 tokens and 32,768 latents: it cannot be installed beside current SAELens, so they are
measured elsewhere and given by `--peer-seconds`; the default was recorded on a machine of the same kind (CPU).
`processor_seconds` are those of all threads together, and say more where others work on the machine too. `peak_mib` is
what the run adds to model and SAE at its peak, memory-mapped files among it. With `--scaling` the same
at twice the tokens, and at half the width. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

D_MODEL, VOCABULARY, K, CONTEXT = 768, 50_257, 32, 128
HOOK = "blocks.5.hook_resid_post"
NEEDED = 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192, help="with BOS")
    parser.add_argument("--width", type=int, default=32_768, help="features of the dictionary")
    parser.add_argument("--peer-seconds", type=float, default=0.22, help="SAEDashboard's seconds a feature")
    parser.add_argument("--scaling", action="store_true", help="also at twice the tokens, and at half the width")
    options = parser.parse_args()
    model = random_model()
    measured = measure(model, options.tokens, options.width)
    result: dict[str, Any] = {
        "ratio": round(options.peer_seconds / measured["seconds_per_feature"], 1),
        "needed": NEEDED,
        "peer_seconds_per_feature": options.peer_seconds,
        **measured,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if options.scaling:
        result["twice_the_tokens"] = measure(model, 2 * options.tokens, options.width)
        result["half_the_width"] = measure(model, options.tokens, options.width // 2)
    print(json.dumps(result))


def measure(model: Any, tokens: int, width: int) -> dict[str, Any]:
    """Seconds, and the peak of memory, of the dashboards of one random dictionary."""
    from sae_emotion_plugin.dashboards.build import build_dashboards

    sae = random_sae(width)
    words = np.random.default_rng(0).integers(3, VOCABULARY, (tokens // CONTEXT, CONTEXT - 1))
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    before = _kib("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        started, worked = time.perf_counter(), time.process_time()
        dashboards = build_dashboards(model, sae, texts, Path(folder) / "dashboards")
        built = time.perf_counter() - started
        alive = sum(dashboard.n_active > 0 for dashboard in dashboards)
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
    return {
        "seconds_per_feature": round(seconds / width, 6),
        "seconds_per_token": round(seconds / tokens, 6),
        "seconds": round(seconds, 1),
        "processor_seconds": round(worked, 1),
        "of_that_reading_back": round(seconds - built, 1),
        "tokens": tokens,
        "width": width,
        "alive": alive,
        "peak_mib": round((_kib("VmHWM") - before) / 1024),
    }


def random_model() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from sae_emotion_plugin.models import load_model

    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        # Both keep TransformerLens from looking the tokenizer up by its name.
        name_or_path="random",
        add_bos_token=True,
    )
    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=1, architectures=["GPT2LMHeadModel"])
    return load_model(GPT2LMHeadModel(config).eval(), tokenizer=fast)


def random_sae(width: int) -> Any:
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    sae = TopKSAE(
        TopKSAEConfig(
            d_in=D_MODEL,
            d_sae=width,
            k=K,
            metadata=SAEMetadata(hook_name=HOOK, model_name="random", context_size=CONTEXT, prepend_bos=True),
        )
    )
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(width, D_MODEL), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def _kib(name: str) -> int:
    """A line of the process's status, in KiB: its resident memory (VmRSS) or the peak of that (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
