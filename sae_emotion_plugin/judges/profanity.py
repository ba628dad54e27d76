"""Whether a text swears: a small word list, written for this project, in English, Korean and Japanese. Data: no model.

It is a filter for a control ("does the effect survive without swearing?") and no moderation tool: slurs are covered in
part, insults ("idiot", "jerk") are not profanity here, and whoever wants to swear unseen can.
"""

import re
import unicodedata

ENGLISH_STEMS = (
    "fuck", "motherfuck", "clusterfuck", "shit", "bullshit", "horseshit", "dipshit", "cunt", "twat", "wank", "bitch",
    "bastard", "asshole", "arsehole", "dickhead", "shithead", "fuckhead", "douchebag", "jackass", "dumbass", "badass",
    "cocksuck", "whore", "slut", "nigger", "nigga", "faggot", "goddamn", "goddam", "dammit", "damnit", "bollock",
    "bugger", "jizz", "pussies",
)  # fmt: skip
"""Words that begin with one of these are profane, whatever the ending."""
ENGLISH_WORDS = (
    "ass", "asses", "arse", "arses", "damn", "damned", "damnation", "hell", "crap", "crappy", "crapped",
    "piss", "pissed", "pissing", "pisses", "prick", "pricks", "dick", "dicks", "cock", "cocks", "pussy", "tits",
    "titties", "fag", "fags", "bloody", "wtf", "stfu", "lmfao", "fml", "mf", "mofo", "fck", "fuk", "fking",
)  # fmt: skip
"""Whole words. "Cocktail", "Dickens" and "assess" begin like some of them and are not."""
NOT_PROFANE = ("shitake", "wankel")
KOREAN_STEMS = (
    "씨발", "시발", "씨팔", "씨바", "쓰발", "ㅅㅂ", "ㅆㅂ", "개새끼", "새끼야", "개색", "좆", "존나", "병신", "ㅂㅅ",
    "지랄", "ㅈㄹ", "염병", "미친놈", "미친년", "썅", "쌍놈", "쌍년", "엿먹", "개소리", "빌어먹", "젠장", "ㅈㄴ",
)  # fmt: skip
"""Parts of words: Korean glues endings behind and prefixes before."""
NOT_PROFANE_KOREAN = ("시발점", "시발역", "시발택시", "시발자동차")
"""Starting points, stations and a make of car."""
JAPANESE_STEMS = (
    "くそったれ",
    "クソ",
    "ちくしょう",
    "畜生",
    "ふざけるな",
    "ふざけんな",
    "馬鹿野郎",
    "バカヤロウ",
    "死ねよ",
    "死ねや",
    "てめえ",
    "くたばれ",
)
# Lone consonants ("ㅅㅂ") have another form after normalisation.
_STEMS_ANYWHERE = tuple(unicodedata.normalize("NFKC", stem) for stem in (*KOREAN_STEMS, *JAPANESE_STEMS))
_WORD = re.compile(r"[^\W_]+(?:[*@#$%!\u2019'\-]+[^\W_]+)*[*@#$%]*")
_DIGITS = str.maketrans({"1": "i", "!": "i", "3": "e", "4": "a", "@": "a", "0": "o", "$": "s", "5": "s"})
_STARRED = re.compile(
    r"(f[*@#$%\-]{1,3}(ck|k)?(ing|er|ed|s)?|s[h]?[*@#$%\-]{1,2}t+(ty|s)?|b[*@#$%\-]{1,3}t?ch(es)?|a[*$]{2}(hole)?)"
)


def is_profane(text: str) -> bool:
    """Whether the text has a swear word: whole words, case and repeated letters ignored, starred forms ("f*ck") too."""
    text = unicodedata.normalize("NFKC", text)
    korean = text
    for innocent in NOT_PROFANE_KOREAN:
        korean = korean.replace(innocent, "")
    if any(stem in korean for stem in _STEMS_ANYWHERE):
        return True
    return any(_is_profane_word(found[0]) for found in _WORD.finditer(text.lower()))


def _is_profane_word(word: str) -> bool:
    if _STARRED.fullmatch(word):
        return True
    spelt = word.translate(_DIGITS) if any(letter.isalpha() for letter in word) else word
    for one in (spelt, *re.split("[-']", spelt)):
        # "fuuuck" and "shittt": runs are tried cut to two letters and to one.
        for form in {one, re.sub(r"(.)\1+", r"\1\1", one), re.sub(r"(.)\1{2,}", r"\1", one)}:
            if form in ENGLISH_WORDS or "fuck" in form:
                return True
            if form.startswith(ENGLISH_STEMS) and not form.startswith(NOT_PROFANE):
                return True
    return False
