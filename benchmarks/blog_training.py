"""The blog's training of x8 ReLU + L1 features beside ours: 1,000 steps of its architecture on Korean text.

    python benchmarks/blog_training.py --texts FOLDER [--work blog_training] [--steps 1000]

FOLDER holds nsmc/train.jsonl.gz, goemotions_ko/train.jsonl.gz and kote/val.jsonl.gz. The recipe `blog-distilgpt2-mlp5`
on the embedded model: the last block's MLP output, at eight times its width. The blog trained DistilGPT2 on another
Korean data set with settings that it did not publish, so what can be compared is by which factor the loss falls, and
how far the mean |cos| between decoder rows (`off_diag_mean`) is from that of random rows, sqrt(2 / (pi d)). Our loss is
of activations of mean square 1 and holds the penalty with its full weight from the first step. The last line is one
JSON object; `share_of_start` is the loss over that of step 0, at the blog's steps and at the end.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from one_buffer import Buffer, open_buffer

from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe
from sae_emotion_plugin.tables import text_table

PUBLISHED_LOSS = {0: 16.84, 100: 12.87, 200: 9.55, 500: 8.26, 900: 5.72}
PUBLISHED_COSINES = (0.0299, 0.0311)
PUBLISHED_WIDTH = 768
TEXTS = ("nsmc/train.jsonl.gz", "goemotions_ko/train.jsonl.gz", "kote/val.jsonl.gz")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, required=True, help="folder of Korean texts")
    parser.add_argument("--work", type=Path, default=Path("blog_training"))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--hook", default="blocks.17.hook_mlp_out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, help="of the buffer, passed over again where steps need more; all")
    parser.add_argument("--l1", type=float, help="weight of the penalty; the recipe's by default")
    parser.add_argument("--lr", type=float, help="the recipe's by default")
    parser.add_argument("--tied", action="store_true", help="start the encoder as the decoder's transpose")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--loss-tokens", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = replace(
        TrainingRecipe.read("blog-distilgpt2-mlp5"),
        model=options.model,
        hook_name=options.hook,
        texts=tuple(TextSource(path) for path in TEXTS if (options.texts / path).is_file()),
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        tied_init=options.tied,
        **({} if options.l1 is None else {"l1_coefficient": options.l1}),
        **({} if options.lr is None else {"lr": options.lr}),
    )
    buffer = open_buffer(recipe, options.texts, options.work, tokens=options.tokens, held_out=options.held_out)
    width = buffer.store.shards[0].shape[1]
    recipe = replace(recipe, d_sae=options.expansion * width)
    found = _trained(buffer, recipe, options.loss_tokens)
    losses = found["losses"]
    print(
        text_table(
            ("step", "blog", "share of its start", "ours", "share of its start"),
            [
                (
                    str(step),
                    "-" if loss is None else f"{loss:.2f}",
                    "-" if loss is None else f"{loss / PUBLISHED_LOSS[0]:.3f}",
                    f"{losses[str(step)]:.2f}" if str(step) in losses else "-",
                    f"{losses[str(step)] / losses['0']:.3f}" if str(step) in losses else "-",
                )
                for step, loss in [*PUBLISHED_LOSS.items(), (options.steps - 1, None)]
            ],
        )
    )
    ours, null = found["cosine_mean"], math.sqrt(2 / (math.pi * width))
    their_null = math.sqrt(2 / (math.pi * PUBLISHED_WIDTH))
    print(f"off_diag_mean: ours {ours[0]:.4f} to {ours[-1]:.4f}, {null:.4f} for random rows of {width} dimensions")
    low, high = PUBLISHED_COSINES
    print(f"off_diag_mean: blog {low} to {high}, {their_null:.4f} for random rows of {PUBLISHED_WIDTH} dimensions")
    result = {
        "d_in": width,
        **recipe.values("d_sae", "hook_name", "batch_size", "steps", "l1_coefficient", "lr", "tied_init", "seed"),
        "buffer_tokens": len(buffer.store),
        "share_of_start": {step: loss / losses["0"] for step, loss in losses.items()},
        "blog_share_of_start": PUBLISHED_LOSS[900] / PUBLISHED_LOSS[0],
        "off_diag_mean_random": null,
        "blog_off_diag_mean": PUBLISHED_COSINES,
        "blog_off_diag_mean_random": their_null,
        "blog_losses": PUBLISHED_LOSS,
        **found,
    }
    print(json.dumps(result))


def _trained(buffer: Buffer, recipe: TrainingRecipe, loss_tokens: int) -> dict[str, Any]:
    def make(folder: Path) -> Mapping[str, Any]:
        fitted = buffer.fit(recipe)
        fitted.save(folder)
        report = buffer.report(
            folder, Evaluation(buffer.model, buffer.held_out, loss_tokens=loss_tokens, progress=False)
        )
        curve = fitted.record["curve"]
        return {
            "losses": _losses(curve, recipe.steps or 0),
            "mse": [curve[0]["mse_loss"], curve[-1]["mse_loss"]],
            "l1": [curve[0]["l1_loss"], curve[-1]["l1_loss"]],
            "cosine_mean": [point["cosine_mean"] for point in curve if "cosine_mean" in point],
            "cosine_max": [point["cosine_max"] for point in curve if "cosine_max" in point],
            "l0": report["l0"],
            "fvu": report["fvu"],
            "loss_recovered": report["loss_recovered"],
            "dead_share": buffer.dead_share(fitted),
            "resampled": fitted.record["resampled"],
            "shrinkage": curve[-1]["shrinkage"],
        }

    return buffer.once("blog", recipe.to_yaml(), buffer.held_out, loss_tokens, make=make)


def _losses(curve: Sequence[Mapping[str, Any]], steps: int) -> dict[str, float]:
    """The loss before the steps that were published, and before the last; a step is logged after it was made."""
    by_step = {point["step"] - 1: point["loss"] for point in curve}
    wanted = [step for step in (*PUBLISHED_LOSS, steps - 1) if step < steps]
    # A step that is not logged has the loss of the nearest one that is, one batch away in a run of 1,000.
    return {str(step): by_step[min(by_step, key=lambda known: abs(known - step))] for step in wanted}


if __name__ == "__main__":
    main()
