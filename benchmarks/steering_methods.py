"""Ways to steer compared at equal cost: SAE features, difference of means, probe, random directions, few-shot and more.

    python benchmarks/steering_methods.py --work FOLDER [--openings 100] [--seeds 3] [--doses 5] [--random 20]

The features are the best of each emotion on half of the labelled texts (`discover`); directions come from all of them:
the bundled corpus, or a file of `LabelledTexts.read` (--texts). All texts are kept in FOLDER, so that the same command
goes on where it was interrupted, and other --ratios are read off the same texts. At the start it says about how long
it will take. The tables go to standard output, the last line is one JSON object; all rows stand in
FOLDER/steering_methods.json.
"""

import argparse
import json
import logging
import time
from pathlib import Path

from sae_emotion_plugin.activations import mean_norm
from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts, study_openings
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.judges.names import judges_for, load_judge
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.sparse_codes import token_settings
from sae_emotion_plugin.steering_studies.compared_methods import METHODS, ComparisonDesign
from sae_emotion_plugin.steering_studies.methods import compare_steering
from sae_emotion_plugin.tables import text_table

MULTIPLES = {1: (1.0,), 2: (1.0, 1.8), 3: (0.6, 1.0, 1.6), 4: (0.6, 0.9, 1.25, 1.8), 5: (0.5, 0.75, 1.0, 1.35, 1.8)}
"""Doses by their number, as multiples of the amount that the pilot finds."""
PROBED_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--emotions", nargs="+", default=["anger", "joy", "sadness", "fear"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--full", nargs="+", default=list(ComparisonDesign.full), choices=list(METHODS))
    parser.add_argument("--texts", type=Path, help="labelled texts; by default the bundled English corpus")
    parser.add_argument("--scores", type=Path, help="what `discover` wrote; by default it is run on the texts")
    parser.add_argument("--candidates", type=int, default=10, help="features of each emotion that are ranked")
    parser.add_argument("--several", type=int, default=ComparisonDesign.several, help="features steered together")
    parser.add_argument("--openings", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--doses", type=int, default=5, choices=list(MULTIPLES))
    parser.add_argument("--reduced", type=int, default=ComparisonDesign.reduced_prompts, help="openings, one seed each")
    parser.add_argument("--random", type=int, default=ComparisonDesign.random, help="directions of each random kind")
    parser.add_argument("--examples", type=int, nargs="+", default=list(ComparisonDesign.examples))
    parser.add_argument("--tokens", type=int, default=ComparisonDesign.max_new_tokens)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5])
    parser.add_argument("--judges", nargs="+", help="by default all that come with the package for English")
    parser.add_argument("--wrong-hook")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dictionary", default="gemma-3-270m-emotion")
    parser.add_argument("--resamples", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    texts = LabelledTexts.read(options.texts) if options.texts else LabelledTexts.bundled("en")
    model, sae = load_model(options.model), load_dictionary(options.dictionary)
    if options.scores:
        scores = FeatureScores.load(options.scores)
    else:
        scores = discover(model, sae, texts, top=options.candidates, seed=options.seed).scores
    features = {
        emotion: [row.feature for row in scores.top(emotion, options.candidates)] for emotion in options.emotions
    }
    prompts = study_openings()
    prompts = tuple(prompts[place * len(prompts) // options.openings] for place in range(options.openings))
    design = ComparisonDesign(
        full=tuple(options.full),
        seeds=tuple(range(options.seeds)),
        reduced_prompts=options.reduced,
        doses=MULTIPLES[options.doses],
        pilot_prompts=min(ComparisonDesign.pilot_prompts, options.reduced),
        examples=tuple(options.examples),
        several=options.several,
        random=options.random,
        max_new_tokens=options.tokens,
    )
    n_texts = design.n_texts(len(features), len(prompts), options.methods)
    rate = texts_a_second(model, sae, texts, prompts, next(iter(features.values()))[0], options.tokens)
    print(
        f"{n_texts} continuations at {rate:.2f} a second: {n_texts / rate / 60:.0f} minutes, then the judges",
        flush=True,
    )

    begun = time.perf_counter()
    found = compare_steering(
        model,
        sae,
        features,
        texts,
        prompts,
        methods=options.methods,
        design=design,
        judges=[load_judge(name) for name in options.judges] if options.judges else judges_for("en"),
        wrong_hook=options.wrong_hook,
        perplexity_ratios=options.ratios,
        resamples=options.resamples,
        seed=options.seed,
        folder=options.work,
    )
    seconds = {"comparison": round(time.perf_counter() - begun, 1), "all": round(time.perf_counter() - started, 1)}
    print(found)
    print(text_table(*found.null_table()))
    found.save(options.work / "steering_methods.json")
    about = {"n_texts": n_texts, "texts_a_second_before": round(rate, 2), "seconds": seconds}
    print(json.dumps({**about, **found.to_dict()}, allow_nan=False))


def texts_a_second(model, sae, texts, prompts, feature: int, tokens: int) -> float:
    """How many steered continuations with their likelihoods are written in a second."""
    norm = mean_norm(model, texts.texts[:100], sae.cfg.metadata.hook_name, **token_settings(sae))
    plan = SteeringPlan.of({feature: 0.1}, sae, residual_norm=norm)
    requests = [Request(prompts[row % len(prompts)], plan, 0.7, row) for row in range(PROBED_ROWS)]
    begun = time.perf_counter()
    complete(model, sae, requests, max_new_tokens=tokens, batch_rows=PROBED_ROWS, progress=False)
    return PROBED_ROWS / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
