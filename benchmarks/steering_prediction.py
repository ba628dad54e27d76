"""Which score predicts that steering with a feature works: AUROC, output score, delta confidence or causal score?

    python benchmarks/steering_prediction.py --scores scores.json --out FOLDER [--features 168] [--prompts 8]

`scores.json` is what `sae-emotion discover` writes (with a --top large enough). Features of the emotions that the judge
knows, from the best to the last of the file, are each steered alone on neutral openings and judged with words blanked;
their output scores are taken on other openings. The texts are kept in FOLDER, so that the same command goes on where it
was interrupted. The table goes to standard output, the last line is one JSON object, which also stands in
FOLDER/steering_prediction.json with all features.
"""

import argparse
import json
import time
from pathlib import Path

from sae_emotion_plugin.activations import mean_norm
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts, openings
from sae_emotion_plugin.feature_roles.output_scores import AMOUNT, CAUSAL_AMOUNT, output_scores
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.judges.names import load_judge
from sae_emotion_plugin.judges.sentence import has_encoder
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.sparse_codes import token_settings
from sae_emotion_plugin.steering_studies.prediction import spread_features, steering_prediction
from sae_emotion_plugin.steering_studies.success import AMOUNT as STEERING_AMOUNT
from sae_emotion_plugin.steering_studies.success import steering_success


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--features", type=int, default=168)
    parser.add_argument("--prompts", type=int, default=8, help="neutral openings that are continued")
    parser.add_argument("--score-prompts", type=int, default=8, help="other neutral openings, for the output scores")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--amount", type=float, default=STEERING_AMOUNT, help="dose of the steering that is judged")
    parser.add_argument("--strong-amount", type=float, default=AMOUNT, help="dose of the output score")
    parser.add_argument("--causal-amount", type=float, default=CAUSAL_AMOUNT)
    parser.add_argument("--judge", help="by default xed-sentences where its extra is installed, else xed-words")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dictionary", default="gemma-3-270m-emotion")
    parser.add_argument("--resamples", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def timed(step: str) -> None:
        seconds[step] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    scores = FeatureScores.load(options.scores)
    judge = load_judge(options.judge or ("xed-sentences" if has_encoder() else "xed-words"))
    emotions = [emotion for emotion in scores.emotions if emotion in judge.emotions]
    pairs = spread_features(scores, emotions, options.features)
    model, sae = load_model(options.model), load_dictionary(options.dictionary)
    texts = LabelledTexts.bundled("en").texts
    norm = mean_norm(model, texts, sae.cfg.metadata.hook_name, **token_settings(sae))
    timed("model")
    outputs = output_scores(
        model,
        sae,
        sorted({feature for _, feature in pairs}),
        prompts=openings("everyday")[: options.score_prompts],
        amount=options.strong_amount,
        causal_amount=options.causal_amount,
        residual_norm=norm,
    )
    timed("output scores")
    successes = steering_success(
        model,
        sae,
        pairs,
        amount=options.amount,
        prompts=openings("neutral")[: options.prompts],
        max_new_tokens=options.tokens,
        seed=options.seed,
        residual_norm=norm,
        judge=judge,
        folder=options.out,
    )
    timed("steering and judging")
    found = steering_prediction(scores, outputs, successes, resamples=options.resamples, seed=options.seed)
    timed("correlations")
    print(found)
    settings = {"judge": judge.name, "amount": options.amount, "prompts": options.prompts, "tokens": options.tokens}
    result = {**found.to_dict(), **settings, "successes": [vars(one) for one in successes], "seconds": seconds}
    write_whole(options.out / "steering_prediction.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(json.dumps({**settings, "n": len(pairs), "rows": result["rows"], "meta": result["meta"], "seconds": seconds}))


if __name__ == "__main__":
    main()
