"""Sets of features as alarms: false alarms on neutral text, hits on labelled text, beside a bag of words.

    python benchmarks/monitor.py --texts FOLDER --scores SCORES [--dictionary NAME] [--neutral 1000] [--train 50000]

FOLDER holds goemotions/, gutenberg/ and wikitext2/ as JSON Lines, SCORES the features that `sae-emotion discover` found
on goemotions/train. Sets are calibrated twice, on comments that people labelled neutral and on paragraphs of novels;
each is then tried on the other kind and on Wikipedia. Hits and AUROCs are those on goemotions/dev, which chose nothing;
the bag of words is fitted on --train comments, and not on those that calibrate (which were among the texts that chose
the features). Hostility is anger, annoyance and disgust together. Also printed: the processor time of watching a text
token by token. The last line is one JSON object.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.models import cache_folder, load_model
from sae_emotion_plugin.monitoring.feature_sets import emotion_sets, union
from sae_emotion_plugin.monitoring.monitor import live_monitor
from sae_emotion_plugin.monitoring.quality import FEATURES, KEYWORDS, WORDS, monitor_quality
from sae_emotion_plugin.monitoring.thresholds import Thresholds, calibrate_monitor
from sae_emotion_plugin.plugin import DEFAULT_DICTIONARY, load_dictionary
from sae_emotion_plugin.sparse_codes import encode_texts

BASIC = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
HOSTILE = ("anger", "annoyance", "disgust")
WORDS_OF_A_PARAGRAPH = range(8, 60)
LENGTHS = (20, 60, 120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, help="folder of the corpora")
    parser.add_argument("--scores", type=Path, help="feature scores of goemotions/train")
    parser.add_argument("--dictionary", default=DEFAULT_DICTIONARY)
    parser.add_argument("--neutral", type=int, default=1_000, help="neutral texts of each kind; half calibrate")
    parser.add_argument(
        "--train",
        type=int,
        default=50_000,
        help="comments that the bag of words learns from; all by default, as the features did",
    )
    parser.add_argument("--held-out", type=int, default=10_000, help="labelled comments at most")
    options = parser.parse_args()
    if options.texts is None or options.scores is None:
        print(json.dumps({"skipped": "--texts FOLDER and --scores FILE are needed: no part of this repository"}))
        return
    model, sae, cache = load_model("embedded"), load_dictionary(options.dictionary), cache_folder() / "codes"
    rng = np.random.default_rng(0)

    def sample(texts: LabelledTexts, n: int) -> LabelledTexts:
        return texts.select(np.sort(rng.permutation(len(texts))[:n]))

    dev = LabelledTexts.read(options.texts / "goemotions" / "dev.jsonl.gz").only_single_label()
    dev = sample(dev, options.held_out) if len(dev) > options.held_out else dev
    whole = LabelledTexts.read(options.texts / "goemotions" / "train.jsonl.gz").only_single_label()
    whole, _ = without_overlap(whole, dev)
    is_neutral = np.array([labels == ("neutral",) for labels in whole.emotions])
    calm = rng.permutation(np.flatnonzero(is_neutral))[: options.neutral]
    novels = LabelledTexts.read(options.texts / "gutenberg" / "paragraphs.jsonl.gz", unlabelled=True)
    usual = [place for place, text in enumerate(novels.texts) if len(text.split()) in WORDS_OF_A_PARAGRAPH]
    neutral = {
        "neutral comments": [whole.texts[place] for place in calm],
        "novels": list(sample(novels.select(usual), options.neutral).texts),
        "Wikipedia": _sentences(options.texts / "wikitext2" / "valid_test.jsonl.gz", options.neutral, rng),
    }
    # The comments that calibrate have no part in what the words learn.
    train = sample(whole.select(np.setdiff1d(np.arange(len(whole)), calm)), options.train)

    scores = FeatureScores.load(options.scores)
    of_emotions = emotion_sets(scores, emotions=BASIC)
    sets = (*of_emotions, union("hostility", emotion_sets(scores, emotions=HOSTILE)))
    labels = {**{name: (name,) for name in BASIC}, "hostility": HOSTILE}
    codes = {kind: encode_texts(model, sae, texts, cache=cache) for kind, texts in neutral.items()}
    dev_codes = encode_texts(model, sae, dev, cache=cache)

    result: dict[str, Any] = {"dictionary": options.dictionary, "held_out": len(dev), "train": len(train)}
    for kind in ("neutral comments", "novels"):
        thresholds = calibrate_monitor(model, sae, sets, neutral[kind], cache=cache)
        print(f"\ncalibrated on {kind}\n{thresholds}\nfalse positives on other kinds of text:")
        elsewhere = {other: thresholds.false_positives(codes[other]) for other in codes if other != kind}
        for other, rates in elsewhere.items():
            print(f"  {other}: " + ", ".join(f"{name} {rate.rate:.3f}" for name, rate in rates.items()))
        result[kind] = {
            "false_positive_rate": {row.name: round(row.text_rate, 4) for row in thresholds.rows},
            "elsewhere": {
                other: {name: round(rate.rate, 4) for name, rate in rates.items()} for other, rates in elsewhere.items()
            },
        }
        quality = monitor_quality(
            thresholds, dev_codes, dev, labels, train=train, neutral_texts=neutral[kind], resamples=1_000
        )
        print(f"\n{quality}")
        for method in (FEATURES, WORDS, KEYWORDS):
            rows = [row for row in quality.rows if row.method == method]
            result[kind][method] = {
                "auroc": {row.set: round(row.auroc, 3) for row in rows},
                "true_positive_rate": {row.set: round(row.true_positive_rate, 3) for row in rows},
            }
    result["live_cpu_ms_per_call"] = _times(model, sae, thresholds, neutral["novels"])
    print("\nCPU ms of a live call, text of n tokens:", result["live_cpu_ms_per_call"])
    print(json.dumps(result))


def _sentences(path: Path, n: int, rng: np.random.Generator) -> list[str]:
    """Stretches of 25 words of the articles."""
    parts = []
    for text in LabelledTexts.read(path, unlabelled=True).texts:
        words = text.split()
        parts += [" ".join(words[start : start + 25]) for start in range(0, len(words) - 25, 25)]
    return [parts[place] for place in np.sort(rng.permutation(len(parts))[:n])]


def _times(model: Any, sae: Any, thresholds: Thresholds, texts: list[str]) -> dict[int, float]:
    """Least processor time of five calls, in ms, by the number of tokens so far."""
    watch = live_monitor(model, sae, None, thresholds)
    ids = model.tokenizer(" ".join(texts[:20]), add_special_tokens=False)["input_ids"]
    found = {}
    for length in LENGTHS:
        times = []
        for _ in range(5):
            start = time.process_time()
            watch(ids[:length])
            times.append(time.process_time() - start)
        found[length] = round(1000 * min(times), 1)
    return found


if __name__ == "__main__":
    main()
