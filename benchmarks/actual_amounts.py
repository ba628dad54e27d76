"""How much of a feature: 1.0, its real activation, or a fraction of the residual norm?

    python benchmarks/actual_amounts.py [--scores scores.json] [--openings 30] [--seeds 1] [--work FOLDER]

A feature is often added with the amount 1.0, or with the activation that it has on some text. For each emotion's three
features the benchmark prints what these are as fractions of the mean residual norm (at equal norm, a single feature's
amounts are one and the same plan), and then steers with the three in equal parts and in the proportions of their real
activations: at equal norm of the summed vector, and at equal cost (a perplexity ratio of 1.3), by judges that see no
promoted token and no emotion word. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.activations import mean_norm
from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts, study_openings
from sae_emotion_plugin.evidence.equal_cost import compare_at_cost
from sae_emotion_plugin.feature_roles.output_scores import steering_order
from sae_emotion_plugin.judges.names import judges_for
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import DEFAULT_DICTIONARY, load_dictionary
from sae_emotion_plugin.sparse_codes import encode_texts, token_settings
from sae_emotion_plugin.steering_studies.combinations import set_plans, summed_length
from sae_emotion_plugin.steering_studies.paired_changes import changes_of, contrast, measures_of, shown_interval
from sae_emotion_plugin.steering_studies.sweep import Variant, score_texts, write_texts

NORMS = (0.06, 0.1, 0.16)
RATIO = 1.3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scores", type=Path, help="what `discover` wrote; by default it is run on the bundled texts")
    parser.add_argument("--emotions", nargs="+", default=["anger", "joy", "sadness", "fear"])
    parser.add_argument("--openings", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--work", type=Path, help="folder that keeps the texts")
    options = parser.parse_args()
    model, sae = load_model("embedded"), load_dictionary(DEFAULT_DICTIONARY)
    texts = LabelledTexts.bundled("en")
    scores = FeatureScores.load(options.scores) if options.scores else discover(model, sae, texts).scores
    norm = mean_norm(model, texts.texts, sae.cfg.metadata.hook_name or "", **token_settings(sae))
    largest = encode_texts(model, sae, texts, progress=False).pooled("max")

    variants, amounts = [], {}
    for emotion in options.emotions:
        candidates = [row.feature for row in scores.top(emotion, 10)]
        best = list(steering_order(model, sae, emotion, candidates, progress=False)[:3])
        own = largest[texts.label_matrix([emotion])[:, 0]][:, best].toarray()
        # The text on which they fire most together stands for "a text of the emotion".
        real = dict(zip(best, map(float, own[own.sum(axis=1).argmax()]), strict=True))
        firing = {feature: value for feature, value in real.items() if value > 0}
        amounts[emotion] = {
            "features": best,
            "one": round(summed_length(sae, dict.fromkeys(best, 1.0)) / norm, 6),
            "actual": round(summed_length(sae, firing) / norm, 4),
            "activations": [round(value, 1) for value in real.values()],
        }
        for name, weights in (("equal", dict.fromkeys(best, 1.0)), ("actual", firing)):
            plans = set_plans(sae, weights, NORMS, NORMS[0] / summed_length(sae, weights), norm)
            variants.append(Variant(f"{emotion}, {name}", sae, tuple(plans.values()), emotion))
    prompts = study_openings()
    prompts = tuple(prompts[place * len(prompts) // options.openings] for place in range(options.openings))
    design: dict[str, Any] = {"seeds": range(options.seeds), "max_new_tokens": options.tokens, "folder": options.work}
    written = write_texts(model, variants, prompts, **design)
    found = score_texts(model, variants, written)

    print(json.dumps(amounts, indent=1))
    differences = []
    for emotion in options.emotions:
        names = [f"{emotion}, {name}" for name in ("actual", "equal")]
        doses = [next(one.doses for one in variants if one.name == name) for name in names]
        for judge, measure, sign in measures_of(judges_for("en"), emotion):
            rows = [[row for row in found.of(name, judge.name, measure)] for name in names]
            for place, length in enumerate(NORMS):
                changes = {
                    name: changes_of(own, dose[place], sign, masked=True)
                    for name, own, dose in zip(names, rows, doses, strict=True)
                }
                at_norm = contrast(changes, dict(zip(names, (1.0, -1.0), strict=True)), seed=0)
                print(f"{emotion}, {judge.name} {measure}, norm {length}: actual - equal {shown_interval(at_norm)}")
                if at_norm:
                    differences.append({"emotion": emotion, "judge": judge.name, "norm": length, **at_norm.to_dict()})
            actual, equal = (found.curve(name, judge.name, measure, sign=sign) for name in names)
            at_cost = compare_at_cost(actual, equal, RATIO, margin=0.02, seed=0)
            print(f"{emotion}, {judge.name} {measure}, at perplexity x{RATIO}: {at_cost!r}".splitlines()[-1])
    clear = [one for one in differences if one["low"] > 0 or one["high"] < 0]
    mean = float(np.mean([one["mean"] for one in differences]))
    print(json.dumps({"amounts": amounts, "mean_difference": round(mean, 4), "clear": clear, "of": len(differences)}))


if __name__ == "__main__":
    main()
