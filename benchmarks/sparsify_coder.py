"""EleutherAI's SparseCoder trained on our activations, with its own trainer's defaults; run by its own Python.

    SPARSIFY_PYTHON benchmarks/sparsify_coder.py JOB.json

`benchmarks/trainers.py` writes the job. The steps are those of sparsify's `Trainer` (1.3.3): the bias starts at the
first batch's mean, decoder rows are brought to unit norm before a step, their gradient loses its parallel part, and the
optimiser is schedule-free signum, or Adam with linear warm-up and decay. That trainer itself takes a model and texts,
not activations.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def main(job: dict[str, Any]) -> None:
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(job["seed"])
    space = load_file(job["space"])
    config = SparseCoderConfig(num_latents=job["d_sae"], k=job["k"])
    coder = SparseCoder(len(space["mean"]), config, dtype=torch.float32)
    optimizer: Any
    schedule: Any = None
    if job["optimizer"] == "adam":
        optimizer = torch.optim.Adam(coder.parameters(), lr=job["lr"])
        schedule = get_linear_schedule_with_warmup(optimizer, job["lr_warm_up_steps"], job["steps"])
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=job["lr"]), momentum=0.95)
        optimizer.train()
    for step, raw in zip(range(job["steps"]), batches(job), strict=False):
        x = (raw - space["mean"]) / space["scale"]
        if step == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    if schedule is None:
        optimizer.eval()
    out = Path(job["out"])
    partial = out.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in coder.state_dict().items()}, partial)
    partial.replace(out)


def batches(job: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The batches of `ActivationStore.batches`, for one pass."""
    shards = [np.load(path, mmap_mode="r") for path in job["shards"]]
    starts = np.r_[0, np.cumsum([len(shard) for shard in shards])]
    order = np.random.default_rng([job["seed"], 0]).permutation(int(starts[-1]))
    for first in range(0, len(order) - job["batch_size"] + 1, job["batch_size"]):
        wanted = np.sort(order[first : first + job["batch_size"]])
        cuts = np.searchsorted(wanted, starts)
        pieces = [
            shard[wanted[low:high] - start]
            for shard, start, low, high in zip(shards, starts[:-1], cuts[:-1], cuts[1:], strict=True)
        ]
        yield torch.from_numpy(np.concatenate(pieces))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
