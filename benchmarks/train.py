"""Training tokens a second: our loop and TopK step against SAELens's trainer and TopK SAE, interleaved in one run.

    python benchmarks/train.py [--d-sae 6144 32768] [--batch 2048 1024] [--rounds 3] [--compiled]

A whole step each: forward, backward, clipping, Adam, the counters of dead features. Both train on the same activations
with k = 32, tied unit-norm starts, AuxK at work only where a feature is dead (none is here), and no running mean.
`openai_topk` is our class without Multi-TopK, which SAELens lacks; `openai_topk_whole` has that and the running mean;
`openai_topk_compiled`, with `--compiled`, is the first with its losses through torch.compile.
SAELens's also runs without rescaling by decoder norms, and with its sparse activations where they run at all
(`sae_lens_sparse_fails` says why not). The last line is one JSON object; `ratio_<width>` is `openai_topk` over
SAELens's class as it comes, `ratio_to_fastest_variant_<width>` over its fastest variant,
`ratio_whole_to_fastest_variant_<width>` `openai_topk_whole` over that: each of the fastest rounds, the smaller of the
batch sizes' ratios.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_emotion_plugin.architectures import OpenAITopKTrainingSAE, OpenAITopKTrainingSAEConfig
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.training.steps import StepSettings, Trainer

K = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[6144, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[2048, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    rates: dict[str, dict[str, float]] = {}
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for width in options.d_sae:
        ratios = []
        for batch in options.batch:
            torch.manual_seed(0)
            # A few directions carry most of it, as in a model's activations.
            x = torch.randn(batch, options.d_in) * torch.logspace(0.5, -0.5, options.d_in)
            steps = _steps(options.d_in, width, batch, options.compiled)
            try:
                steps["sae_lens_sparse"](x)
            except RuntimeError as error:
                result["sae_lens_sparse_fails"] = first_line(error).split(". ")[0]
                del steps["sae_lens_sparse"]
            found = _tokens_per_second(steps, x, options.rounds)
            print(width, batch, {name: round(rate) for name, rate in found.items()}, flush=True)
            rates[f"{width}, batch {batch}"] = found
            fastest = max(rate for name, rate in found.items() if name.startswith("sae_lens"))
            ours = found["openai_topk"], found["openai_topk_whole"]
            ratios.append([ours[0] / found["sae_lens"], ours[0] / fastest, ours[1] / fastest])
        names = ("ratio", "ratio_to_fastest_variant", "ratio_whole_to_fastest_variant")
        result |= {f"{name}_{width}": min(found) for name, found in zip(names, zip(*ratios, strict=True), strict=True)}
    print(json.dumps({**result, "tokens_per_second": rates}))


def _tokens_per_second(
    steps: dict[str, Callable[[torch.Tensor], Any]], x: torch.Tensor, rounds: int
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step(x)
            seconds[name].append(time.perf_counter() - started)
    # The first round warms up.
    return {name: len(x) / min(times[1:]) for name, times in seconds.items()}


def _steps(d_in: int, d_sae: int, batch: int, compiled: bool) -> dict[str, Callable[[torch.Tensor], Any]]:
    config = SAETrainerConfig(total_training_samples=1000 * batch, train_batch_size_samples=batch, lr=1e-4, lr_end=0.0)
    found: dict[str, Callable[[torch.Tensor], Any]] = {}
    variants: dict[str, dict[str, Any]] = {
        "sae_lens": {},
        "sae_lens_no_rescale": {"rescale_acts_by_decoder_norm": False},
        "sae_lens_sparse": {"use_sparse_activations": True},
    }
    for name, changes in variants.items():
        theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=K, decoder_init_norm=1.0, **changes))
        found[name] = SAETrainer(cfg=config, sae=theirs, data_provider=iter(())).step
    kinds = [("openai_topk", 0.0, 0.0), ("openai_topk_whole", 1 / 8, 0.999)]
    for name, weight, decay in [*kinds, *([("openai_topk_compiled", 0.0, 0.0)] if compiled else [])]:
        ours = OpenAITopKTrainingSAE(OpenAITopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=K, multi_topk_weight=weight))
        if name == "openai_topk_compiled":
            ours.sparse_step = torch.compile(ours.sparse_step)
        found[name] = Trainer(ours, StepSettings(steps=1000, lr=1e-4, ema_decay=decay)).step
    return found


if __name__ == "__main__":
    main()
