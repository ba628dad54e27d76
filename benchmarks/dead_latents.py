"""OpenAI's contrast (arXiv 2406.04093): dead latents with and without AuxK, with and without tied initialisation.

    python benchmarks/dead_latents.py --texts FOLDER [--work dead_latents] [--tokens N] [--arms full no-auxk ...]

The recipe `openai-topk` on the embedded model (16,384 latents, k = 32, some 2 million tokens), one buffer of
activations for all arms, one pass over it each. An arm that was done is not done again, and one that was killed goes on
from its last checkpoint. A latent is dead that was silent for the recipe's window of tokens; `dead_held_out_share` is
the share of those silent on all held-out documents. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from one_buffer import Buffer, open_buffer

from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.tables import text_table

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-auxk": {"aux_loss_coefficient": 0.0},
    "untied": {"tied_init": False},
    "neither": {"aux_loss_coefficient": 0.0, "tied_init": False},
}
SHOWN = ("fvu", "fvu_without_largest_dimension", "fvu_mean_over_dimensions", "loss_recovered", "l0")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, required=True, help="folder of the recipe's texts")
    parser.add_argument("--work", type=Path, default=Path("dead_latents"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--tokens", type=int, help="of training; all of the recipe's by default")
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, help="the recipe's by default")
    parser.add_argument(
        "--window", type=int, help="tokens after which a silent latent is dead; the recipe's by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=1000, help="documents for the figures")
    parser.add_argument("--loss-tokens", type=int, default=10_000)
    options = parser.parse_args()
    given = {"d_sae": options.d_sae, "k": options.k, "lr_reference_width": 16_384}
    given |= {"batch_size": options.batch_size} if options.batch_size else {}
    given |= {"dead_token_window": options.window} if options.window else {}
    recipe = replace(TrainingRecipe.read("openai-topk"), **given)
    buffer = open_buffer(recipe, options.texts, options.work, tokens=options.tokens, held_out=options.held_out)
    if (tokens := (buffer.recipe.steps or 0) * recipe.batch_size) < recipe.dead_token_window:
        parser.error(f"{tokens} tokens are fewer than the window of dead latents, {recipe.dead_token_window}")
    evaluation = Evaluation(buffer.model, buffer.held_out, loss_tokens=options.loss_tokens, progress=False)
    rows = {}
    for arm in options.arms:
        rows[arm] = _arm(buffer, arm, options.seed, evaluation)
        print(f"{arm}: {rows[arm]['dead_share']:.1%} dead, FVU {rows[arm]['fvu']:.4f}", flush=True)
    columns = ("arm", "dead share", "dead, held out", *SHOWN)
    print(
        text_table(
            columns,
            [
                (
                    arm,
                    f"{row['dead_share']:.4f}",
                    f"{row['dead_held_out_share']:.4f}",
                    *(f"{row[n]:.4f}" for n in SHOWN),
                )
                for arm, row in rows.items()
            ],
        )
    )
    settings = {
        **recipe.values("d_sae", "k", "batch_size", "dead_token_window", "lr"),
        "steps": buffer.recipe.steps,
        "tokens": tokens,
        "seed": options.seed,
        "held_out_documents": len(buffer.held_out),
    }
    print(json.dumps({**settings, "arms": rows}))


def _arm(buffer: Buffer, arm: str, seed: int, evaluation: Evaluation) -> dict[str, Any]:
    recipe = replace(buffer.recipe, seed=seed, **ARMS[arm])

    def make(folder: Path) -> Mapping[str, Any]:
        started = time.perf_counter()
        fitted = buffer.fit(recipe)
        seconds = time.perf_counter() - started
        fitted.save(folder)
        report = buffer.report(folder, evaluation)
        # The points that have the cosines, about ten of them.
        points = [point for point in fitted.record["curve"] if "cosine_mean" in point]
        return {
            "dead_share": buffer.dead_share(fitted),
            "dead_held_out_share": report["dead"] / recipe.d_sae,
            **{name: report[name] for name in SHOWN},
            "held_out_tokens": report["n_tokens"],
            "seconds_since_last_start": round(seconds, 1),
            "curve": [{name: point[name] for name in ("step", "fvu", "dead", "cosine_mean")} for point in points],
        }

    return buffer.once(arm, recipe.to_yaml(), evaluation.texts, evaluation.loss_tokens, make=make)


if __name__ == "__main__":
    main()
