"""What the quickstart's reported steering is worth to judges that may not see the steered words.

    python benchmarks/masked_effects.py [report/generations.json]

For each emotion the sampled rows of the reported openings at the recommended amount, judged as they are, with every
steered feature's 50 most promoted tokens blanked, with emotion words blanked as well, and without the pairs that
swear. A table for reading, and as the last line one JSON object.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sae_emotion_plugin.discovery.tokens import promoted_tokens
from sae_emotion_plugin.evidence.resampling import Interval
from sae_emotion_plugin.generation.records import Generation, Generations
from sae_emotion_plugin.judges.judge import Judge
from sae_emotion_plugin.judges.masking import emotion_mask, masked_change
from sae_emotion_plugin.judges.names import judges_for
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.tables import text_table

PROMOTED = 50
HEAD = ("emotion", "judge", "measure", "plain", "tokens blanked", "emotion words too", "without swearing", "pairs")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("generations", type=Path, nargs="?", default=Path("report/generations.json"))
    options = parser.parse_args()
    made = Generations.load(options.generations)
    model, sae = load_model("embedded"), load_dictionary(made.meta["dictionary"])
    lines, found = [], []
    for emotion, amount in made.meta["recommended"].items():
        rows = [
            row
            for row in made.rows
            if (row.emotion, row.part, row.amount) == (emotion, "report", amount) and row.temperature > 0
        ]
        if not rows:
            continue
        promoted = [
            token
            for tokens in promoted_tokens(model, sae, list(rows[0].features), PROMOTED).values()
            for token in tokens
        ]
        for judge in judges_for("en"):
            for measure in [name for name in ("valence", emotion) if name in judge.measures]:
                line, figures = judged(judge, measure, rows, promoted)
                lines.append((emotion, *line))
                found.append({"emotion": emotion, "amount": amount, **figures})
    print(text_table(HEAD, lines))
    print(json.dumps(found))


def judged(
    judge: Judge, measure: str, rows: Sequence[Generation], promoted: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, object]]:
    """The cells of one line, and the same as numbers."""
    texts = [row.baseline_text for row in rows], [row.text for row in rows], [row.prompt for row in rows]
    tokens, words = (
        masked_change(judge, measure, *texts, emotion_mask(promoted, lexicon=lexicon)) for lexicon in (False, True)
    )
    cells = [shown(one) for one in (tokens.plain, tokens.masked, words.masked, tokens.profanity_free)]
    pairs = f"{tokens.n_pairs}, {tokens.n_profanity_free} without swearing"
    return (judge.name, measure, *cells, pairs), {"tokens": tokens.to_dict(), "tokens_and_words": words.to_dict()}


def shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


if __name__ == "__main__":
    main()
