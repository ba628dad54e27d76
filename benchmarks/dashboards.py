"""Dashboards of a whole dictionary: seconds a feature and a token, and peak memory, against SAEDashboard's.

    python benchmarks/dashboards.py [--tokens 8192] [--width 32768] [--scaling] [--peer-python PYTHON]

A model of GPT-2's shape with random weights (768 dimensions, 50,257 tokens) and a random TopK SAE (k = 32) behind its
sixth block; texts of 127 random tokens and BOS. Timed is everything from texts to the last `FeatureDashboard`: model,
codes, logits, correlations, files, and reading them back. `ratio` compares with the seconds that SAEDashboard 0.8.0
needs for a feature at as many tokens and latents: `--peer-python` names a Python that has `sae-dashboard` (an
environment of its own: it needs transformer-lens 2 and transformers 4), in which its Neuronpedia runner makes two
batches of 128 features on the same model and tokens; the second counts, which finds the model's activations on disk.
The SAE is the same there, but for its flag `rescale_acts_by_decoder_norm`, without which the runner refuses a TopK SAE;
`--peer-relu` gives it a ReLU SAE of the same size, of which it encodes only the batch. `--peer-seconds` is a figure
measured before. `processor_seconds` are those of all threads together, and say more where others work on the machine
too. `peak_mib` is what the run adds to model and SAE at its peak, memory-mapped files among it. With `--scaling` the
same at twice the tokens, and at half the width. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.setting import gpt2_config, random_gpt2, random_words, run_peer, word_tokenizer, write_folder

D_MODEL, VOCABULARY, K, CONTEXT = 768, 50_257, 32, 128
HOOK = "blocks.5.hook_resid_post"
NEEDED = 50
PEER_BATCH = 128
RELU_BIAS = -3.1
"""So that about as many features fire on a token as of the TopK SAE: pre-activations have a deviation of 1."""
WORDS = random_words(VOCABULARY)
CONFIG = gpt2_config(WORDS, n_positions=1024)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192, help="with BOS")
    parser.add_argument("--width", type=int, default=32_768, help="features of the dictionary")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--peer-seconds", type=float, default=0.22, help="SAEDashboard's seconds a feature")
    peer.add_argument("--peer-python", help="a Python that has sae-dashboard, to measure them")
    parser.add_argument("--peer-relu", action="store_true", help="give SAEDashboard a ReLU SAE")
    parser.add_argument("--peer-only", action="store_true", help="measure nothing but SAEDashboard")
    parser.add_argument("--scaling", action="store_true", help="also at twice the tokens, and at half the width")
    options = parser.parse_args()
    peer_seconds, measured_peer = options.peer_seconds, {}
    if options.peer_python:
        measured_peer = measure_peer(options.peer_python, options.tokens, options.width, relu=options.peer_relu)
        peer_seconds = measured_peer["seconds_per_feature"]
        if options.peer_only:
            print(json.dumps(measured_peer))
            return
    model = random_model()
    measured = measure(model, options.tokens, options.width)
    result: dict[str, Any] = {
        "ratio": round(peer_seconds / measured["seconds_per_feature"], 1),
        "needed": NEEDED,
        "peer_seconds_per_feature": peer_seconds,
        "peer": measured_peer,
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


def measure_peer(python: str, tokens: int, width: int, *, relu: bool) -> dict[str, Any]:
    """Seconds that SAEDashboard needs for a feature."""
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (tokens // CONTEXT, CONTEXT))
    ids[:, 0] = 0
    with tempfile.TemporaryDirectory() as folder:
        write_folder(
            Path(folder) / "in",
            random_gpt2(CONFIG),
            CONFIG,
            WORDS,
            random_sae(width, relu=relu, rescaled=True),
            ids,
            [" ".join(WORDS[word] for word in row[1:]) for row in ids[:8]],
            features_per_batch=PEER_BATCH,
            batches=2,
        )
        (made,) = run_peer(python, [Path(folder) / "in"], Path(folder) / "work")
    first, second = made["seconds"]
    worked = made["processor_seconds"][1]
    return {
        "seconds_per_feature": round(second / PEER_BATCH, 4),
        "seconds_of_first_batch": round(first, 1),
        "seconds_of_second_batch": round(second, 1),
        "processor_seconds_per_feature": round(worked / PEER_BATCH, 4),
        "features_of_a_batch": PEER_BATCH,
        "sae": "relu" if relu else "topk",
        "alive_among_those_made": sum(feature["frac_nonzero"] > 0 for feature in made["features"]),
        "threads": made["threads"],
        "versions": made["versions"],
    }


def random_model() -> Any:
    from sae_emotion_plugin.models import load_model

    return load_model(random_gpt2(CONFIG), tokenizer=word_tokenizer(WORDS))


def random_sae(width: int, *, relu: bool = False, rescaled: bool = False) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=HOOK, model_name="model", context_size=CONTEXT, prepend_bos=True)
    if relu:
        sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=width, metadata=metadata))
    else:
        sae = TopKSAE(
            TopKSAEConfig(d_in=D_MODEL, d_sae=width, k=K, rescale_acts_by_decoder_norm=rescaled, metadata=metadata)
        )
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(width, D_MODEL), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
        if relu:
            sae.b_enc.fill_(RELU_BIAS)
    return sae


def _kib(name: str) -> int:
    """A line of the process's status, in KiB: its resident memory (VmRSS) or the peak of that (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
