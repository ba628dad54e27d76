"""Training steps a second: our sparse TopK step against SAELens's own, same weights and batch, interleaved in one run.

    python benchmarks/train_step.py [--d-sae 4096] [--k 64] [--rounds 5]

The last line is one JSON object; `ratio` is ours over SAELens's, each the fastest of its rounds.
"""

import argparse
import json
import time

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from sae_emotion_plugin.architectures import SparseStepTopKTrainingSAE


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-in", type=int, default=640)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(options.batch, options.d_in)
    alive = torch.zeros(options.d_sae, dtype=torch.bool)
    steps = {}
    for name, kind in (("ours", SparseStepTopKTrainingSAE), ("sae_lens", TopKTrainingSAE)):
        sae = kind(TopKTrainingSAEConfig(d_in=options.d_in, d_sae=options.d_sae, k=options.k, decoder_init_norm=1.0))
        steps[name] = (sae, torch.optim.Adam(sae.parameters(), lr=1e-4))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds + 1):
        for name, (sae, optimizer) in steps.items():
            started = time.perf_counter()
            done = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x, coefficients={}, dead_neuron_mask=alive, n_training_steps=0, is_logging_step=False
                )
            )
            done.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - started)
    # The first round warms up.
    rates = {name: options.batch / min(times[1:]) for name, times in seconds.items()}
    print(json.dumps({**vars(options), "tokens_per_second": rates, "ratio": rates["ours"] / rates["sae_lens"]}))


if __name__ == "__main__":
    main()
