"""Memory and time of loading a wide OpenAI-format checkpoint: ours against the straightforward way.

    python benchmarks/load_openai.py [--d-in 768] [--d-sae 131072] [--tokens 8]

A made-up TopK checkpoint of the shape of v5_128k, in float32. Each way has a process of its own: it imports, loads,
encodes and decodes once. `peak` is the largest resident set up to then minus that after the imports, as a share of the
file; mapped pages of the file count in it. `anonymous` is what is left after that and cannot be dropped (RssAnon, minus
that after the imports), as a share of the file. `straightforward` is torch.load, transposes and load_state_dict;
`safetensors` is plain SAELens on our converted copy. `peak_ratio` is ours in float32; at most 1.15 is asked for. The
file is in the page cache for all of them. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("float32", "bfloat16", "straightforward", "safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=8, help="tokens that are encoded and decoded")
    parser.add_argument("--way", choices=WAYS, help="(the process of one way)")
    parser.add_argument("--folder", type=Path, help="(where the files of one way are)")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.folder, options.tokens)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "8.pt", options.d_in, options.d_sae)
        size = (folder / "8.pt").stat().st_size
        convert(folder)
        ways = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--tokens", str(options.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            ways[way] = {name: round(found[name] / size, 3) for name in ("peak", "anonymous")}
            ways[way] |= {name: round(found[name], 2) for name in ("load_seconds", "first_use_seconds")}
            print(way, ways[way], flush=True)
    import torch

    result = {
        "peak_ratio": ways["float32"]["peak"],
        "needed": 1.15,
        "file_bytes": size,
        "d_in": options.d_in,
        "d_sae": options.d_sae,
        "tokens": options.tokens,
        "ways": ways,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


def write_checkpoint(path: Path, d_in: int, d_sae: int) -> None:
    import torch

    torch.manual_seed(0)
    state = {
        "pre_bias": torch.randn(d_in),
        "latent_bias": torch.randn(d_sae),
        "stats_last_nonzero": torch.zeros(d_sae, dtype=torch.long),
        "latents_activation_frequency": torch.rand(d_sae),
        "latents_mean_square": torch.rand(d_sae),
        "encoder.weight": torch.randn(d_sae, d_in),
        "decoder.weight": torch.randn(d_in, d_sae),
        "activation": "TopK",
        "activation_state_dict": {"k": 32, "postact_fn": "ReLU"},
    }
    torch.save(state, path)


def convert(folder: Path) -> None:
    from sae_emotion_plugin.openai_format import convert as run

    run(folder / "8.pt", folder / "converted")


def measure(way: str, folder: Path, tokens: int) -> dict[str, float]:
    """Bytes and seconds of one way, in this process."""
    import torch
    from sae_lens import SAE, TopKSAE, TopKSAEConfig

    from sae_emotion_plugin.openai_format import load_openai_checkpoint

    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    torch.randn(2, 2).matmul(torch.randn(2, 2))  # what the libraries of matrix products set up once
    before, anonymous = _bytes("VmRSS"), _bytes("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    started = time.perf_counter()
    if way == "straightforward":
        state = torch.load(folder / "8.pt", weights_only=True)
        d_sae, d_in = state["encoder.weight"].shape
        settings = state["activation_state_dict"]
        sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=settings["k"], normalize_activations="layer_norm"))
        weights = {"W_enc": state["encoder.weight"].T.contiguous(), "W_dec": state["decoder.weight"].T.contiguous()}
        sae.load_state_dict({**weights, "b_enc": state["latent_bias"], "b_dec": state["pre_bias"]})
        del state, weights
    elif way == "safetensors":
        sae = SAE.load_from_disk(folder / "converted")
    else:
        sae = load_openai_checkpoint(folder / "8.pt", dtype=way)
    loaded = time.perf_counter()
    with torch.inference_mode():
        sae.decode(sae.encode(torch.randn(tokens, sae.cfg.d_in).to(dtype)))
    return {
        "peak": _bytes("VmHWM") - before,
        "anonymous": _bytes("RssAnon") - anonymous,
        "load_seconds": loaded - started,
        "first_use_seconds": time.perf_counter() - loaded,
    }


def _bytes(name: str) -> int:
    """A line of the process's status: its resident memory (VmRSS), the peak of that (VmHWM), its own part (RssAnon)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
