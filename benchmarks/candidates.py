"""Would one of the recipes give a better dictionary than the shipped one? Its width and sparsity, as many tokens.

    python benchmarks/candidates.py --texts FOLDER [--work candidates] [--recipes openai-topk embedded-gemma ...]

Each recipe is trained with the shipped dictionary's width and k on the texts of `openai-topk`, one pass over two
million tokens; the shipped one made two passes over one million, of the same comments and fewer novels. All are
measured on the same held-out documents, which neither saw. The best latent of each of twelve emotions is chosen on one
half of some one-label comments of GoEmotions train and scored on the other half, beside as many random directions that
fire as often; dev is not looked at. A training that was done is not done again. The last line is one JSON object;
`over_shipped` and `over_random` are differences of mean AUROC with 95 % intervals over comments, not over seeds.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from one_buffer import Buffer, open_buffer
from reference_saes import EMOTIONS
from sae_lens import SAE

from sae_emotion_plugin.activation_store import ActivationStore
from sae_emotion_plugin.discovery.reference_margins import reference_margins
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.reference_saes import encode_beside, firing_counts, random_directions_sae
from sae_emotion_plugin.tables import text_table

SHIPPED = "gemma-3-270m-emotion"
SHOWN = ("fvu", "fvu_without_largest_dimension", "fvu_mean_over_dimensions", "loss_recovered", "l0", "dead")
SAMPLE_SHARDS = 2
"""Of the activations, on which the random directions' thresholds are set."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts of the recipe openai-topk")
    parser.add_argument("--work", type=Path, default=Path("candidates"))
    parser.add_argument("--recipes", nargs="+", default=["openai-topk", "embedded-gemma", "embedded-batchtopk"])
    parser.add_argument("--shipped", default=SHIPPED, help="the dictionary that the others are compared with")
    parser.add_argument("--tokens", type=int, help="of training; all of the recipe's by default")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=3000, help="documents for the figures")
    parser.add_argument("--loss-tokens", type=int, default=10_000)
    parser.add_argument("--labelled", type=int, default=8000, help="comments, half of them to choose latents")
    parser.add_argument("--emotions", nargs="+", default=list(EMOTIONS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shipped = load_dictionary(options.shipped)
    recipe = replace(TrainingRecipe.read("openai-topk"), batch_size=options.batch_size)
    buffer = open_buffer(recipe, options.texts, options.work, tokens=options.tokens, held_out=options.held_out)
    evaluation = Evaluation(buffer.model, buffer.held_out, loss_tokens=options.loss_tokens, progress=False)
    saes: dict[str, Any] = {"shipped": shipped}
    for name in options.recipes:
        saes[name] = _trained(buffer, name, shipped, options.seed)
    found: dict[str, dict[str, Any]] = {}
    for name, sae in saes.items():
        report = evaluation.report(sae)
        found[name] = {key: getattr(report, key) for key in SHOWN} | {"held_out_tokens": report.n_tokens}
    _add_aurocs(found, saes, buffer, options.texts, options.labelled, options.emotions, options.seed)
    print(
        text_table(
            ("dictionary", *SHOWN, "AUROC", "random"),
            [
                (name, *(f"{row[key]:.4g}" for key in SHOWN), f"{row['auroc']:.3f}", f"{row['random_auroc']:.3f}")
                for name, row in found.items()
            ],
        )
    )
    settings = {
        "d_sae": shipped.cfg.d_sae,
        "k": shipped.cfg.k,
        "tokens": (buffer.recipe.steps or 0) * recipe.batch_size,
    }
    print(json.dumps({**settings, "seed": options.seed, "dictionaries": found}))


def _trained(buffer: Buffer, name: str, shipped: Any, seed: int) -> Any:
    base = TrainingRecipe.read(name)
    recipe = replace(
        base,
        d_sae=shipped.cfg.d_sae,
        k=shipped.cfg.k,
        batch_size=buffer.recipe.batch_size,
        epochs=None,
        steps=buffer.recipe.steps,
        seed=seed,
    )

    def make(folder: Path) -> Mapping[str, Any]:
        fitted = buffer.fit(recipe)
        fitted.save(folder)
        return {"dead": fitted.record["dead"]}

    buffer.once(name, recipe.to_yaml(), make=make)
    return SAE.load_from_disk(buffer.folder(name, recipe.to_yaml()))


def _add_aurocs(
    found: dict[str, dict[str, Any]],
    saes: Mapping[str, Any],
    buffer: Buffer,
    root: Path,
    labelled: int,
    emotions: list[str],
    seed: int,
) -> None:
    """Add AUROCs and margins to each dictionary's figures."""
    comments = LabelledTexts.read(root / "goemotions" / "train.jsonl.gz").only_single_label()
    chosen = np.random.default_rng(seed).permutation(len(comments))[:labelled]
    choosing, scoring = comments.select(np.sort(chosen)).split(0.5, seed)
    choosing, _ = without_overlap(choosing, scoring)
    shards = [Path(shard.filename) for shard in buffer.store.shards[:SAMPLE_SHARDS]]
    sample = ActivationStore(shards, buffer.store.key)
    beside = {
        f"random-{name}": random_directions_sae(sample, firing_counts(sae, sample), seed, sae.cfg.metadata)
        for name, sae in saes.items()
    }
    codes, scored = (
        encode_beside({**saes, **beside}, buffer.model, part, progress=False) for part in (choosing, scoring)
    )

    def margin(name: str, other: str) -> Any:
        both, both_scored = ({key: part[key] for key in (name, other)} for part in (codes, scored))
        return reference_margins(both, both_scored, choosing, scoring, trained=name, emotions=emotions).of(other)

    for name, row in found.items():
        random = margin(name, f"random-{name}")
        row |= {"auroc": random.auroc, "random_auroc": random.reference_auroc}
        row["over_random"] = [random.margin, random.low, random.high]
        if name != "shipped":
            over = margin(name, "shipped")
            row["over_shipped"] = [over.margin, over.low, over.high]


if __name__ == "__main__":
    main()
