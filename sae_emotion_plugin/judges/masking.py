"""Judging with words blanked out: does a judge see more than the steered tokens, emotion words or swear words?

Steering a feature makes its promoted tokens likelier, and a judge may count just those. Here each continuation is
judged twice, plain and with such words blanked, so that "it says more swear words" and "it is angrier" are two numbers.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_emotion_plugin.evidence.resampling import Interval, bootstrap_mean_interval
from sae_emotion_plugin.judges.judge import Judge, emotion_lexicon
from sae_emotion_plugin.judges.profanity import is_profane

BLANK = "___"
"""What stands where a word was: no judge knows it, and n-grams do not run across it."""
STEM_LETTERS = 4
"""A promoted token of at least so many letters blanks every word that begins or ends with it."""
_STEM_CHARACTERS = 2
"""The same for Hangul."""
PARTICLES = (
    "은", "는", "이", "가", "을", "를", "에", "의", "도", "만", "와", "과", "로", "으로", "에서", "에게", "한테", "께",
    "까지", "부터", "처럼", "보다", "이나", "나", "이랑", "랑", "하고", "밖에", "조차", "마저", "야", "이야",
    "들", "들이", "들은", "들을",
)  # fmt: skip
"""Korean particles: a word is the same word with one of these behind it."""
_HAN = "\u3005\u3400-\u9fff\uf900-\ufaff"
_KANA = "\u3040-\u30ff"
_HANGUL = re.compile("[\uac00-\ud7a3]+")
_UNSPACED = re.compile(f"[{_HAN}{_KANA}]")
_WORD = re.compile(f"[^\\W_{_HAN}{_KANA}]+(?:['\u2019][^\\W_{_HAN}{_KANA}]+)*")


@dataclass(frozen=True)
class Mask:
    """Which words to blank. Compared without case and in compatibility form (NFKC).

    A word in `words` is blanked where it stands as a whole word, with or without a Korean particle. A token in `tokens`
    is a piece of a word: with 4 or more letters (2 or more of Hangul) it blanks every word that begins or ends with
    it, shorter it counts as a word. Emoticons and punctuation are blanked wherever they stand, and so are Japanese and
    Chinese strings, which have no spaces around them; but a lone kana is not, since it could be any word's.
    """

    tokens: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    _stems: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _whole: frozenset[str] = field(init=False, repr=False, compare=False)
    _anywhere: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stems: set[str] = set()
        whole: set[str] = set()
        anywhere: set[str] = set()
        for text, is_token in [*((one, True) for one in self.tokens), *((one, False) for one in self.words)]:
            key = _key(text).strip().strip("\u2581\u0120")
            if not set(key) - {"_", "\ufffd"}:  # nothing, a blank, or a token that is part of a character
                continue
            if _UNSPACED.search(key):
                if len(key) > 1 or re.fullmatch(f"[{_HAN}]", key):
                    anywhere.add(key)
            elif _WORD.fullmatch(key):
                least = _STEM_CHARACTERS if _HANGUL.fullmatch(key) else STEM_LETTERS
                (stems if is_token and len(key) >= least else whole).add(key)
            else:
                anywhere |= {key, text.strip().lower()}
        object.__setattr__(self, "_stems", tuple(sorted(stems)))
        object.__setattr__(self, "_whole", frozenset(whole))
        # A symbol next to letters ("xd:" beside "x") is matched as written, the longest first.
        options = "|".join(_bounded(one) for one in sorted(anywhere, key=lambda one: (-len(one), one)))
        object.__setattr__(self, "_anywhere", re.compile(options) if options else None)

    def __call__(self, text: str) -> str:
        """The text with a blank for each word and symbol that the mask names, and otherwise as it was."""
        if self._anywhere is not None:
            # Lower case may be longer than upper case in rare scripts; then symbols are looked for as written.
            lowered = text.lower() if len(text.lower()) == len(text) else text
            pieces, end = [], 0
            for found in self._anywhere.finditer(lowered):
                pieces += [text[end : found.start()], f" {BLANK} "]
                end = found.end()
            text = "".join([*pieces, text[end:]])
        return _WORD.sub(lambda found: BLANK if self.names(found[0]) else found[0], text)

    def names(self, word: str) -> bool:
        """Whether a single word is blanked."""
        key = _key(word)
        if key in self._whole or any(key.startswith(stem) or key.endswith(stem) for stem in self._stems):
            return True
        return any(key.endswith(particle) and key[: -len(particle)] in self._whole for particle in PARTICLES)


@dataclass(frozen=True)
class MaskedChange:
    """How much a judge's score rose from unsteered to steered continuations: as they are, masked, and without swearing.

    The intervals are bootstraps over prompts. `masked` near 0 beside a large `plain` says that the judge saw only the
    blanked words. VADER is a lexicon: with the emotion lexicon masked it has next to nothing left to see, so that its
    `masked` says nothing about the texts.
    """

    judge: str
    measure: str
    plain: Interval
    masked: Interval
    profanity_free: Interval | None
    """The plain change over the pairs in which neither text is profane; None with fewer than 2 such prompts."""
    n_pairs: int
    n_profanity_free: int
    n_empty: int
    """Pairs left out because a continuation is empty."""
    blanked_share: float
    """Blanks over words, in the steered continuations."""
    baseline_blanked_share: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def emotion_mask(promoted: Iterable[str] = (), *, lexicon: bool = True) -> Mask:
    """The mask of the steered features' promoted tokens and, unless `lexicon` is False, of emotion words.

    Emotion words are those of VADER's lexicon with a valence of size 1 or more (of 4): English words and emoticons.

    Args:
        promoted: the promoted tokens of all steered features as text, 50 of each, say
            (`feature_tokens.promoted_tokens`).
    """
    if isinstance(promoted, str):
        raise ValueError(f"promoted must be a list of tokens, not the string {promoted!r}")
    return Mask(tuple(promoted), frozenset(emotion_lexicon() if lexicon else ()))


def masked_change(
    judge: Judge,
    measure: str,
    baselines: Sequence[str],
    steered: Sequence[str],
    prompts: Sequence[str],
    mask: Mask,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> MaskedChange:
    """The change of `judge`'s `measure` from each baseline to the steered text beside it, plain and masked.

    Pairs with an empty continuation are left out and counted, since no judge can judge nothing.

    Raises:
        ValueError: unequal numbers of texts, no pair left, fewer than 2 prompts, or a measure that the judge does
            not know.
    """
    if not len(baselines) == len(steered) == len(prompts):
        raise ValueError(f"{len(baselines)} baselines, {len(steered)} steered texts and {len(prompts)} prompts")
    kept = [
        place for place, pair in enumerate(zip(baselines, steered, strict=True)) if all(one.strip() for one in pair)
    ]
    if not kept:
        raise ValueError(f"none of {len(steered)} pairs has two continuations that are not empty")
    before, after = [baselines[place] for place in kept], [steered[place] for place in kept]
    of_prompt = [prompts[place] for place in kept]
    masked_before, masked_after = [mask(text) for text in before], [mask(text) for text in after]
    plain = _change(judge, measure, before, after)
    masked = _change(judge, measure, masked_before, masked_after)
    clean = [place for place, pair in enumerate(zip(before, after, strict=True)) if not any(map(is_profane, pair))]

    def interval(change: Float[np.ndarray, "pair"], places: Sequence[int]) -> Interval:
        groups = [of_prompt[place] for place in places]
        return bootstrap_mean_interval(change[list(places)], groups=groups, resamples=resamples, seed=seed)

    everywhere = range(len(kept))
    enough = len({of_prompt[place] for place in clean}) >= 2
    return MaskedChange(
        judge=judge.name,
        measure=measure,
        plain=interval(plain, everywhere),
        masked=interval(masked, everywhere),
        profanity_free=interval(plain, clean) if enough else None,
        n_pairs=len(kept),
        n_profanity_free=len(clean),
        n_empty=len(steered) - len(kept),
        blanked_share=_blanked_share(masked_after),
        baseline_blanked_share=_blanked_share(masked_before),
    )


def _change(judge: Judge, measure: str, baselines: Sequence[str], steered: Sequence[str]) -> Float[np.ndarray, "pair"]:
    return judge(steered).of(measure) - judge(baselines).of(measure)


def _blanked_share(masked: Sequence[str]) -> float:
    blanks = sum(text.count(BLANK) for text in masked)
    return blanks / max(1, blanks + sum(len(_WORD.findall(text)) for text in masked))


def _key(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()


def _bounded(text: str) -> str:
    """The pattern of a symbol; where it begins or ends with a letter or digit, no other may stand beside it."""
    start = r"(?<![^\W_])" if text[0].isalnum() and not _UNSPACED.match(text[0]) else ""
    end = r"(?![^\W_])" if text[-1].isalnum() and not _UNSPACED.match(text[-1]) else ""
    return start + re.escape(text) + end
