"""What steering does to a text besides the wanted effect: repetition, length, another script. No model and no torch."""

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int

_SCRIPT_NAMES = {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA"}
_NO_SCRIPT = {"MODIFIER"}  # letters that any script may use, an apostrophe for example
# Chinese and Japanese put no spaces between words, so that each of their characters counts.
_DENSE = r"[\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
_WORD = re.compile(rf"{_DENSE}|(?:(?!{_DENSE})[^\W_])+(?:['’](?:(?!{_DENSE})[^\W_])+)*")


def four_gram_repetition(tokens: Sequence[Hashable] | Int[np.ndarray, "token"]) -> float:
    """Returns the share of 4-grams that repeat an earlier one: 1 - distinct / all; 0 below 4 tokens."""
    plain = tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)
    four_grams = list(zip(plain, plain[1:], plain[2:], plain[3:], strict=False))
    return 1 - len(set(four_grams)) / len(four_grams) if four_grams else 0.0


def is_degenerate(tokens: Sequence[Hashable] | Int[np.ndarray, "token"], threshold: float = 0.3) -> bool:
    """Returns whether more than `threshold` of the 4-grams are repetitions: a text that loops."""
    return four_gram_repetition(tokens) > threshold


def distinct_2(tokens: Sequence[Hashable] | Int[np.ndarray, "token"]) -> float | None:
    """Returns distinct bigrams over all bigrams (Li et al. 2016, arXiv 1510.03055); None below 2 tokens.

    The longer a text, the lower it is by itself: compare texts of about one length only.
    """
    plain = tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)
    bigrams = list(itertools.pairwise(plain))
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def words(text: str) -> list[str]:
    """Returns the words, in small letters: runs of letters and digits, and every single Han or kana character.

    A word may have apostrophes inside. Nothing else counts, so a text of emoji has no words, and a script that writes
    vowels as combining marks (Devanagari, Thai) is cut at these.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def letter_scripts(text: str) -> Counter[str]:
    """Returns how many letters of each script there are, by the first word of their Unicode names: LATIN, HANGUL, ...

    Hiragana and katakana are one script, KANA; Chinese characters are HAN. Full-width and mathematical letters count
    as the plain ones. Digits, punctuation, emoji and combining marks are no letters.
    """
    counts: Counter[str] = Counter()
    for character, number in Counter(unicodedata.normalize("NFKC", text)).items():
        if not unicodedata.category(character).startswith("L"):
            continue
        name = unicodedata.name(character, "UNKNOWN").split()[0].partition("-")[0]
        if name not in _NO_SCRIPT:
            counts[_SCRIPT_NAMES.get(name, name)] += number
    return counts


def language_switch(reference: str, text: str) -> float | None:
    """Returns the share of the text's letters in scripts that the reference, its prompt say, does not use.

    A reference with kana may go on in Chinese characters, as Japanese is written in both. Languages that share a script
    are not told apart: French after English counts 0. None where the text or the reference has no letters.
    """
    known, found = set(letter_scripts(reference)), letter_scripts(text)
    if not known or not found:
        return None
    if "KANA" in known:
        known.add("HAN")
    return sum(number for script, number in found.items() if script not in known) / found.total()
