"""The whole discovery against a loop over sentences: one `run_with_cache` and one dense `encode` each.

    python benchmarks/discover.py [--texts goemotions/train.jsonl.gz] [--loop-texts 400]

The discovery encodes every text of the file, splits them, tests every feature for every emotion and writes nothing;
the loop does a random part of the texts and keeps each feature's maximum in each. `ratio` is the loop's seconds a text
over the discovery's. For the loop's texts both sides' ten best features of each emotion are compared: the loop's
AUROC is computed densely, by ranks. Where lists differ, `largest_gap` is the largest difference in AUROC between what
stands at the same place. Without --texts the bundled English texts are used. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import FEWEST_POSITIVES, sparse_auroc
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import DEFAULT_DICTIONARY, load_dictionary
from sae_emotion_plugin.sparse_codes import encode_texts, token_settings

TOP = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, help="labelled texts; by default the bundled ones")
    parser.add_argument("--loop-texts", type=int, default=400, help="texts that the loop reads")
    parser.add_argument("--dictionary", default=DEFAULT_DICTIONARY)
    options = parser.parse_args()
    texts = LabelledTexts.read(options.texts) if options.texts else LabelledTexts.bundled("en")
    sae, model = load_dictionary(options.dictionary), load_model("embedded")
    chosen = np.random.default_rng(0).permutation(len(texts))[: options.loop_texts]
    sample = texts.select(np.sort(chosen))
    encode_texts(model, sae, sample.select(range(8)), progress=False)  # what the first call alone pays

    started = time.perf_counter()
    dense = loop(model, sae, sample.texts)
    loop_seconds = (time.perf_counter() - started) / len(sample)
    started = time.perf_counter()
    scores = discover(model, sae, texts, skip_rare=True).scores
    seconds = (time.perf_counter() - started) / len(texts)

    labels = sample.label_matrix()
    common = np.flatnonzero(np.minimum(labels.sum(axis=0), (~labels).sum(axis=0)) >= FEWEST_POSITIVES)
    ours = sparse_auroc(encode_texts(model, sae, sample, progress=False).pooled("max"), labels[:, common]).auroc
    theirs = dense_auroc(dense, labels[:, common])
    best = [np.argsort(-found, axis=1, kind="stable")[:, :TOP] for found in (ours, theirs)]
    ranked = [np.take_along_axis(theirs, own, axis=1) for own in best]
    gaps = np.abs(ranked[0] - ranked[1])
    result = {
        "ratio": round(loop_seconds / seconds, 2),
        "milliseconds_a_text": {"loop": round(1000 * loop_seconds, 2), "discovery": round(1000 * seconds, 2)},
        "texts": {"loop": len(sample), "discovery": len(texts)},
        "emotions": len(scores.emotions),
        "lists_compared": len(common),
        "lists_equal": int((best[0] == best[1]).all(axis=1).sum()),
        "sets_equal": sum(set(own) == set(other) for own, other in zip(*(pair.tolist() for pair in best), strict=True)),
        "largest_gap": float(f"{gaps.max(initial=0):.2g}"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


def loop(model: Any, sae: Any, texts: Sequence[str]) -> Float[np.ndarray, "text d_sae"]:
    """Each feature's maximum in each text, [text, d_sae], a sentence at a time."""
    hook = canonical_hook(model, sae.cfg.metadata.hook_name)
    bos = token_settings(sae)["prepend_bos"]
    rows = []
    for text in tqdm(texts, desc="loop", unit="text"):
        with torch.inference_mode():
            _, cache = model.run_with_cache(model.to_tokens(text, prepend_bos=bos))
            codes = sae.encode(cache[hook][0])
        rows.append(codes[int(bos) :].amax(dim=0).numpy())
    return np.stack(rows)


def dense_auroc(
    values: Float[np.ndarray, "text feature"], labels: Bool[np.ndarray, "text label"]
) -> Float[np.ndarray, "label feature"]:
    """AUROC of every column for every label, [label, feature], by mean ranks."""
    ranks = rankdata(values, axis=0)
    n_in = labels.sum(axis=0)[:, None]
    return (labels.T @ ranks - n_in * (n_in + 1) / 2) / (n_in * (len(labels) - n_in))


if __name__ == "__main__":
    main()
