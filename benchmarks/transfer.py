"""Whether features chosen on GoEmotions tell emotions elsewhere: in film subtitles, in Korean, and apart from valence.

    python benchmarks/transfer.py --texts FOLDER [--dictionary NAME] [--train 8000]

FOLDER holds goemotions/, goemotions_ko/, xed_en/, kote/ and emobank/ as JSON Lines. Printed are: the methods fitted on
GoEmotions and scored on XED; the features chosen on GoEmotions beside XED's own, on all and on keyword-free texts; the
English features on the same comments in Korean and on native Korean (KOTE), and Korean features on English; and the
correlations with EmoBank's ratings. Interrupted, it goes on. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.discovery.keywords import emotion_keywords
from sae_emotion_plugin.discovery.method_comparison import compare_methods
from sae_emotion_plugin.discovery.rating_correlations import rating_correlations
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.discovery.scoring import score_features
from sae_emotion_plugin.discovery.transfer import GOEMOTIONS_TO_KOTE, GOEMOTIONS_TO_XED, merged_labels, transfer
from sae_emotion_plugin.discovery_study import DENSE_POOLINGS
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.models import cache_folder, load_model
from sae_emotion_plugin.plugin import DEFAULT_DICTIONARY, load_dictionary
from sae_emotion_plugin.pooled_activations import pooled_activations
from sae_emotion_plugin.sparse_codes import SparseCodes, encode_texts, token_settings
from sae_emotion_plugin.text_rows import file_rows

SHARED = ("anger", "disgust", "fear", "joy", "sadness", "surprise")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, help="folder of the corpora")
    parser.add_argument("--dictionary", default=DEFAULT_DICTIONARY)
    parser.add_argument("--train", type=int, default=8_000, help="GoEmotions texts that choose")
    parser.add_argument("--most", type=int, default=20_000, help="texts of another corpus that are scored at most")
    parser.add_argument("--no-korean", action="store_true", help="English only")
    options = parser.parse_args()
    if options.texts is None:
        print(json.dumps({"skipped": "--texts FOLDER is needed: the corpora are no part of this repository"}))
        return
    model, sae = load_model("embedded"), load_dictionary(options.dictionary)
    rng = np.random.default_rng(0)

    def encoded(texts: LabelledTexts) -> SparseCodes:
        return encode_texts(model, sae, texts, cache=cache_folder() / "codes")

    def dense(texts: LabelledTexts) -> dict[Any, np.ndarray]:
        hook = sae.cfg.metadata.hook_name or ""
        settings = {"poolings": DENSE_POOLINGS, "cache": cache_folder() / "codes", **token_settings(sae)}
        return pooled_activations(model, texts, [hook], **settings)[hook]

    def part(name: str, single: bool = True) -> LabelledTexts:
        texts = LabelledTexts.read(options.texts / name)
        texts = texts.only_single_label() if single else texts
        return texts.select(np.sort(rng.permutation(len(texts))[: options.most]))

    def chosen(texts: LabelledTexts, codes: SparseCodes, held_out: LabelledTexts) -> FeatureScores:
        return score_features(codes, texts, held_out=(encoded(held_out), held_out), emotions=SHARED, top=5)

    dev = LabelledTexts.read(options.texts / "goemotions" / "dev.jsonl.gz").only_single_label()
    whole = LabelledTexts.read(options.texts / "goemotions" / "train.jsonl.gz").only_single_label()
    whole, _ = without_overlap(whole, dev)
    train = whole.select(np.sort(rng.permutation(len(whole))[: options.train]))
    codes, vectors = encoded(train), dense(train)
    xed = part("xed_en/train.jsonl.gz")
    scores, keywords = chosen(train, codes, dev), emotion_keywords(train, SHARED)
    settings: dict[str, Any] = {"emotions": SHARED, "cache": cache_folder() / "codes"}
    methods, _ = compare_methods(codes, vectors, train, encoded(xed), dense(xed), xed, **settings)
    on_xed = transfer(scores, encoded(xed), xed, names=GOEMOTIONS_TO_XED, keywords=keywords)
    print("fitted on GoEmotions, scored on XED\n", methods, "\n\n", on_xed, sep="")

    if not options.no_korean:
        _korean(options.texts, train, dev, scores, part, encoded, chosen)
    rated = list(file_rows(options.texts / "emobank" / "train.jsonl.gz")[0])
    kept = [rated[row][1] for row in np.sort(rng.permutation(len(rated))[: options.most])]
    ratings = rating_correlations(
        encode_texts(model, sae, [row["text"] for row in kept], cache=cache_folder() / "codes"),
        {emotion: scores.top(emotion, 1)[0].feature for emotion in SHARED},
        {name: np.array([float(row[name]) for row in kept]) for name in ("V", "A", "D")},
    )
    print("\ncorrelation with EmoBank's ratings of valence, arousal and dominance\n", ratings, sep="")
    result = {
        "dictionary": options.dictionary,
        "xed_mean_auroc": {row.method: round(row.auroc, 3) for row in methods.scores if row.emotion == "mean"},
        "texts": {"train": len(train), "xed": len(xed)},
    }
    print(json.dumps(result))


def _korean(
    folder: Path,
    train: LabelledTexts,
    dev: LabelledTexts,
    scores: FeatureScores,
    part: Callable[..., LabelledTexts],
    encoded: Callable[[LabelledTexts], SparseCodes],
    chosen: Callable[..., FeatureScores],
) -> None:
    # Line n of the Korean file is the translation of line n of the English one.
    korean = LabelledTexts.read(folder / "goemotions_ko" / "train.jsonl.gz")
    position = {text_id: number for number, text_id in enumerate(korean.ids)}
    rows = [position[text_id] for text_id in train.ids if text_id in position]
    korean_train, korean_test = (korean.select(half) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
    names = {emotion: emotion for emotion in SHARED}
    on_korean = transfer(scores, encoded(korean_test), korean_test, names=names, subsets=("all",))
    kote = merged_labels(part("kote/val.jsonl.gz", single=False), GOEMOTIONS_TO_KOTE)
    on_kote = transfer(scores, encoded(kote), kote, names=names, subsets=("all",))
    from_korean = chosen(korean_train, encoded(korean_train), korean_test)
    on_english = transfer(from_korean, encoded(dev), dev, names=names, subsets=("all",))
    print("\nthe same comments in Korean\n", on_korean, "\n\nnative Korean (KOTE)\n", on_kote, sep="")
    print("\nchosen on the Korean translations, scored in English\n", on_english, sep="")


if __name__ == "__main__":
    main()
