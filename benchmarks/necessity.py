"""What the model loses without an emotion's features, and whether several do more than their parts.

    python benchmarks/necessity.py [--scores scores.json] [--sets 20] [--seeds 1] [--work FOLDER]

For each emotion its three features that raise its words most are taken away while the model continues openings on which
the emotion is due, beside sets of other features that fire as often and contribute as much; printed are the judges'
changes, what later layers put back, and the costs. Then every set of those features steers neutral openings, at equal
lengths of the summed vector, at equal cost, and by inclusion and exclusion (--combinations FEATURES, 0 for none).
With --work all texts are kept there, and the same command goes on. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path

from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts, study_openings
from sae_emotion_plugin.feature_roles.output_scores import CANDIDATES, steering_order
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import DEFAULT_DICTIONARY, load_dictionary
from sae_emotion_plugin.steering_studies.combinations import study_combinations
from sae_emotion_plugin.steering_studies.necessity import necessity

DOSES = (0.06, 0.12)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scores", type=Path, help="what `discover` wrote; by default it is run on the bundled texts")
    parser.add_argument("--emotions", nargs="+", default=["anger", "joy", "sadness", "fear"])
    parser.add_argument("--features", type=int, default=3, help="that are taken away together")
    parser.add_argument("--sets", type=int, default=20, help="matched control sets")
    parser.add_argument("--combinations", type=int, default=3, help="features whose sets steer")
    parser.add_argument("--openings", type=int, default=30, help="that the sets of features continue")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder that keeps the texts")
    options = parser.parse_args()
    model, sae = load_model("embedded"), load_dictionary(DEFAULT_DICTIONARY)
    if options.scores:
        scores = FeatureScores.load(options.scores)
    else:
        scores = discover(model, sae, LabelledTexts.bundled("en"), top=CANDIDATES).scores
    seeds, prompts = range(options.seeds), study_openings()
    prompts = tuple(prompts[place * len(prompts) // options.openings] for place in range(options.openings))
    found = {}
    for emotion in options.emotions:
        candidates = [row.feature for row in scores.top(emotion, CANDIDATES)]
        best = steering_order(model, sae, emotion, candidates, progress=False)
        lost = necessity(
            *(model, sae, best[: options.features], emotion),
            sets=options.sets,
            exclude=candidates,
            seeds=seeds,
            folder=options.work and options.work / "necessity",
        )
        print(f"{lost}\n", flush=True)
        found[emotion] = {"necessity": lost.to_dict()}
        if options.combinations:
            together = study_combinations(
                *(model, sae, best[: options.combinations], emotion),
                prompts=prompts,
                doses=DOSES,
                temperatures=(0.7,),
                seeds=seeds,
                folder=options.work and options.work / "combinations",
            )
            print(f"{together}\n", flush=True)
            found[emotion]["combinations"] = together.to_dict()
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
