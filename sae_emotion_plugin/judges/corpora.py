"""The corpora that judges are fitted and tried on: files -> texts, targets and documents. Data: no model.

None is part of the package. Features are selected on GoEmotions, so it is not among them.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sae_emotion_plugin.judges.judge import NEGATIVE_EMOTIONS, POSITIVE_EMOTIONS, VALENCE
from sae_emotion_plugin.text_rows import file_rows

Row = Mapping[str, Any]
BASIC_EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
XED_EMOTIONS = (*BASIC_EMOTIONS, "anticipation", "trust")
KOTE_LABELS: Mapping[str, Mapping[str, str]] = {
    "anger": {
        "화남/분노": "anger itself; irritation (짜증) and complaint (불평/불만) mark half of all comments: too wide"
    },
    "disgust": {
        "역겨움/징그러움": "disgust itself",
        "증오/혐오": "loathing: in Plutchik's circle the strong form of disgust",
    },
    "fear": {
        "공포/무서움": "fear itself, in 134 comments only",
        "불안/걱정": "anxiety: apprehension, the weak form of fear",
    },
    "joy": {"기쁨": "joy itself", "즐거움/신남": "delight, its lively form", "행복": "happiness"},
    "sadness": {
        "슬픔": "sadness itself",
        "서러움": "sorrow",
        "절망": "despair: near grief, the strong form of sadness",
    },
    "surprise": {"놀람": "surprise itself", "경악": "shock, its strong form"},
}
"""Which of KOTE's 43 emotions count as each basic one, and why. The other labels are in none.

Left out on purpose, among others: 안타까움/실망 (pity or disappointment, in 45 % of the comments), 당황/난처
(embarrassment), 한심함 (contempt), 환영/호의 and 감동/감탄 (welcome and being moved: pleasant, but not joy itself).
"""
KOTE_NEGATIVE_LABELS = ("화남/분노", "짜증", "불평/불만", "증오/혐오", "역겨움/징그러움", "슬픔", "절망", "서러움")
"""With none of joy's labels, a comment with one of these counts as negative, for trying valence only."""
EMOBANK_POSITIVE, EMOBANK_NEGATIVE = 3.5, 2.5
"""Mean ratings of valence (1 to 5, 3 is neutral) from which, and up to which, a sentence counts as one or the other."""


@dataclass(frozen=True)
class JudgeTexts:
    """Texts of a corpus with what a judge is to say of them."""

    name: str
    texts: tuple[str, ...]
    measures: tuple[str, ...]
    targets: Bool[np.ndarray, "text measure"]
    """Has the emotion; for "valence": is positive."""
    known: Bool[np.ndarray, "text measure"]
    """Whether the corpus says so: texts that are both pleasant and unpleasant, or neither, have no valence."""
    documents: Int[np.ndarray, "text"] | None
    """Number of the document (film) of each text; None where the corpus does not say."""
    sha256: str
    """Of the texts and targets, in order, so that a judge names what it was fitted on."""


def read_xed(folder: str | Path) -> JudgeTexts:
    """XED's English subtitle lines: eight emotions, and valence for lines of one side only. Films are not named."""
    rows = _rows(folder, "xed_en/train.jsonl.gz")
    labels = [set(row["label"]) for row in rows]
    positive = np.array([bool(one & set(POSITIVE_EMOTIONS)) for one in labels])
    negative = np.array([bool(one & set(NEGATIVE_EMOTIONS)) for one in labels])
    emotions = np.array([[emotion in one for emotion in XED_EMOTIONS] for one in labels])
    return _texts("XED", rows, (*XED_EMOTIONS, VALENCE), emotions, (positive, positive != negative))


def read_emobank(folder: str | Path) -> JudgeTexts:
    """EmoBank's sentences, train and dev: valence of at least 3.5 against at most 2.5. To try judges on, not to fit."""
    rows = [*_rows(folder, "emobank/train.jsonl.gz"), *_rows(folder, "emobank/dev.jsonl.gz")]
    rated = np.array([float(row["V"]) for row in rows])
    positive = rated >= EMOBANK_POSITIVE
    known = positive | (rated <= EMOBANK_NEGATIVE)
    return _texts("EmoBank", rows, (VALENCE,), np.zeros((len(rows), 0), dtype=bool), (positive, known))


def read_kote(folder: str | Path) -> JudgeTexts:
    """KOTE's Korean comments: six basic emotions by `KOTE_LABELS`, and valence to try judges on."""
    rows = _rows(folder, "kote/val.jsonl.gz")
    labels = [set(row["label"]) for row in rows]
    emotions = np.array([[bool(one & set(KOTE_LABELS[name])) for name in BASIC_EMOTIONS] for one in labels])
    positive = emotions[:, BASIC_EMOTIONS.index("joy")]
    negative = np.array([bool(one & set(KOTE_NEGATIVE_LABELS)) for one in labels])
    return _texts("KOTE", rows, (*BASIC_EMOTIONS, VALENCE), emotions, (positive, positive != negative))


def read_nsmc(folder: str | Path) -> JudgeTexts:
    """NSMC's Korean film reviews: valence; the films are the documents."""
    rows = _rows(folder, "nsmc/train.jsonl.gz")
    positive = np.array([row["label"] == "positive" for row in rows])
    films = np.unique([str(row["movie_id"]) for row in rows], return_inverse=True)[1]
    nothing = np.zeros((len(rows), 0), dtype=bool)
    return _texts("NSMC", rows, (VALENCE,), nothing, (positive, np.ones(len(rows), dtype=bool)), films)


CORPORA: Mapping[str, Callable[[str | Path], JudgeTexts]] = {
    "XED": read_xed,
    "EmoBank": read_emobank,
    "KOTE": read_kote,
    "NSMC": read_nsmc,
}


def only(texts: JudgeTexts, kept: Int[np.ndarray, "kept"]) -> JudgeTexts:
    """The texts with the indices `kept`."""
    return JudgeTexts(
        texts.name,
        tuple(texts.texts[index] for index in kept),
        texts.measures,
        texts.targets[kept],
        texts.known[kept],
        None if texts.documents is None else texts.documents[kept],
        texts.sha256,
    )


def _rows(folder: str | Path, file_name: str) -> list[Row]:
    path = Path(folder) / file_name
    if not path.is_file():
        raise FileNotFoundError(f"no {file_name} in {folder}: judges are fitted on {', '.join(CORPORA)}")
    rows, _ = file_rows(path)
    return [row for _, row in rows]


def _texts(
    name: str,
    rows: list[Row],
    measures: tuple[str, ...],
    emotions: Bool[np.ndarray, "text emotion"],
    valence: tuple[Bool[np.ndarray, "text"], Bool[np.ndarray, "text"]],
    documents: Int[np.ndarray, "text"] | None = None,
) -> JudgeTexts:
    positive, known = valence
    targets = np.column_stack([emotions, positive & known])
    texts = tuple(str(row["text"]) for row in rows)
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass") + np.packbits(targets).tobytes())
    all_known = np.column_stack([np.ones_like(emotions), known])
    return JudgeTexts(name, texts, measures, targets, all_known, documents, digest.hexdigest())
