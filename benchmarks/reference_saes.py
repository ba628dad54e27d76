"""The shipped recipe's dictionary against its references, on the embedded model: held-out AUROC of the best features.

    python benchmarks/reference_saes.py --texts FOLDER [--tokens 150000] [--work reference_saes]

FOLDER holds the recipe's texts, among them goemotions/train.jsonl.gz and goemotions/dev.jsonl.gz, whose labels choose
and score the features. Without it a small dictionary is trained on the bundled texts, which shows that all runs and
says little. The same command goes on where it was interrupted. The table goes to standard output, the last line is one
JSON object, which also stands in WORK/result.json; WORK/margins.json is what `discover --margins` takes. Seconds of
steps that an earlier run did are seconds of looking.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from sae_emotion_plugin.discovery.reference_margins import reference_margins
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe
from sae_emotion_plugin.reference_saes import encode_references, train_references

RECIPE = Path(__file__).parents[1] / "recipes" / "embedded-gemma.yaml"
SHIPPED_TOKENS = 1_085_000
"""Tokens of the recipe's texts, about, those held out included."""
EMOTIONS = (
    "admiration", "amusement", "anger", "annoyance", "curiosity", "disgust", "fear", "gratitude", "joy", "love",
    "sadness", "surprise",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--tokens", type=int, default=150_000, help="training tokens, shared as in the recipe")
    parser.add_argument("--labelled", type=int, default=8_000, help="labelled texts that choose the features")
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--held-out-share", type=float, default=0.005, help="share of the documents for the reports")
    parser.add_argument("--loss-tokens", type=int, default=2_000, help="tokens for the reports' cross-entropies")
    parser.add_argument("--resamples", type=int, default=2_000)
    parser.add_argument("--work", type=Path, default=Path("reference_saes"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[step] = round(time.perf_counter() - started, 1)

    recipe = TrainingRecipe.read(RECIPE)
    if options.texts:
        recipe = replace(recipe, texts=_shared(recipe.texts, options.tokens), held_out_share=options.held_out_share)
        texts, held_out = (
            LabelledTexts.read(options.texts / "goemotions" / f"{part}.jsonl.gz").only_single_label()
            for part in ("train", "dev")
        )
        chosen = np.random.default_rng(recipe.seed).permutation(len(texts))[: options.labelled]
        texts, dropped = without_overlap(texts.select(np.sort(chosen)), held_out)
        emotions = EMOTIONS
    else:
        bundled = LabelledTexts.bundled("en")
        bundled.save(options.work / "bundled.jsonl")
        options.texts, options.d_sae = options.work, options.d_sae or 256
        recipe = replace(recipe, texts=(TextSource("bundled.jsonl", tokens=options.tokens),), batch_size=256, k=16)
        (texts, held_out), dropped, emotions = bundled.split(0.5, recipe.seed), 0, None
    if options.d_sae:
        recipe = replace(recipe, d_sae=options.d_sae)
    with timed("model"):
        model = load_model(recipe.model)
    with timed("training"):
        made = train_references(
            recipe,
            model,
            options.texts,
            options.work / "saes",
            work_dir=options.work / "work",
            loss_tokens=options.loss_tokens,
        )
    with timed("codes"):
        codes, held_out_codes = encode_references(made, model, texts, held_out, cache=options.work / "codes")
    with timed("margins"):
        margins = reference_margins(
            codes, held_out_codes, texts, held_out, emotions=emotions, resamples=options.resamples
        )
    print(margins)
    result = {
        "training_tokens": made["trained"].provenance()["training_tokens"],
        "d_sae": recipe.d_sae,
        "k": recipe.k,
        "epochs": recipe.epochs,
        "dropped_near_duplicates": dropped,
        "reports": {
            name: {**asdict(one.report), "loss_recovered": one.report.loss_recovered} for name, one in made.items()
        },
        "largest_firing_rate_difference": made["random-directions"].provenance()["largest_firing_rate_difference"],
        "seconds": seconds,
        "margins": margins.to_dict(),
    }
    margins.save(options.work / "margins.json")
    write_whole(options.work / "result.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _shared(sources: tuple[TextSource, ...], tokens: int) -> tuple[TextSource, ...]:
    """The sources with about `tokens` tokens in all, each with its share; those that are read whole share the rest."""
    limited = sum(source.tokens or 0 for source in sources)
    rest = (SHIPPED_TOKENS - limited) / sum(source.tokens is None for source in sources)
    share = min(1.0, tokens / SHIPPED_TOKENS)
    return tuple(replace(source, tokens=max(1, round((source.tokens or rest) * share))) for source in sources)


if __name__ == "__main__":
    main()
