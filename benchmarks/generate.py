"""What steering costs in time, and our generator beside plain `transformers.generate`.

    python benchmarks/generate.py [--batches 1 16 64] [--runs 5] [--tokens 20]

Seconds for the same prompts, greedy, the same number of new tokens: ours unsteered, ours steered (every row with an
amount of its own), and `transformers.generate` unsteered on a model loaded apart from the bridge, which would switch it
to another attention. Runs are interleaved, the least time of each counts. The last line is one JSON object: `slowdown`
is steered over unsteered, `over_transformers` steered over `transformers.generate`, by batch.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_emotion_plugin.emotion_texts import openings
from sae_emotion_plugin.generation.continuations import complete
from sae_emotion_plugin.generation.decoding import Request
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import DEFAULT_DICTIONARY, load_dictionary


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dictionary", default=DEFAULT_DICTIONARY)
    options = parser.parse_args()
    model, sae = load_model("embedded"), load_dictionary(options.dictionary)
    folder = model.original_model.config._name_or_path
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    found: dict[str, Any] = {"slowdown": {}, "over_transformers": {}, "tokens_per_second": {}}
    for batch in options.batches:
        prompts = openings("all")[:batch]
        plans = [SteeringPlan.of({3: 0.05 + 0.001 * row, 5: 0.05}, sae, residual_norm=6000.0) for row in range(batch)]
        unsteered = [Request(prompt) for prompt in prompts]
        steered = [Request(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]
        ids = tokenizer(list(prompts), return_tensors="pt", padding=True)

        def ours(requests: list[Request]) -> None:
            made = complete(model, sae, requests, max_new_tokens=options.tokens, with_nll=False, progress=False)
            if max(len(one.token_ids) for one in made) < options.tokens:
                raise SystemExit("every text ended early: their times cannot be compared")

        def theirs(ids: Any = ids) -> None:
            plain.generate(**ids, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False)

        ways: dict[str, Callable[[], None]] = {
            "unsteered": lambda given=unsteered: ours(given),
            "steered": lambda given=steered: ours(given),
            "transformers": theirs,
        }
        seconds = least(ways, options.runs)
        print(batch, {name: round(value, 3) for name, value in seconds.items()}, flush=True)
        found["slowdown"][batch] = round(seconds["steered"] / seconds["unsteered"], 3)
        found["over_transformers"][batch] = round(seconds["steered"] / seconds["transformers"], 3)
        found["tokens_per_second"][batch] = {
            name: round(batch * options.tokens / value, 1) for name, value in seconds.items()
        }
    print(json.dumps({**found, "runs": options.runs, "tokens": options.tokens, "threads": torch.get_num_threads()}))


def least(ways: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """The least seconds of each way; one run of each that does not count comes first."""
    seconds = {name: float("inf") for name in ways}
    for turn in range(runs + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
