"""How tokens are shown: spaces and line breaks as marks, and nothing that cannot be printed."""

import unicodedata
from collections.abc import Iterator

from markupsafe import Markup

MARKS = {" ": "␣", "▁": "␣", "\u00a0": "⍽", "\n": "↵", "\r": "␍", "\t": "⇥"}


def marked(token: str) -> str:
    """`token` as plain text with its spaces, line breaks and invisible characters shown as marks."""
    return "".join(text for text, _ in _pieces(token)) or "∅"


def marked_token(token: str) -> Markup:
    """`marked` as markup that tells the marks from the token's own characters."""
    if not token:
        return Markup('<span class="ws">empty</span>')
    mark = Markup('<span class="ws">{}</span>')
    return Markup("").join(mark.format(text) if is_mark else Markup.escape(text) for text, is_mark in _pieces(token))


def printable(text: str) -> str:
    """`text` with control characters, lone surrogates and direction overrides replaced by visible signs."""
    return text.translate(_UNPRINTABLE)


def reading(token: str) -> Markup:
    """`token` as it reads in running text; a line break, or a token of nothing but space, gets its mark."""
    if not token.strip(" ▁"):
        return marked_token(token)
    parts = [Markup.escape(part) for part in token.replace("▁", " ").split("\n")]
    return Markup('<span class="ws">↵</span>\n').join(parts)


def in_a_row(token: str) -> str:
    """`reading` as plain text."""
    return marked(token) if not token.strip(" ▁") else token.replace("▁", " ").replace("\n", "↵\n")


def _pieces(token: str) -> Iterator[tuple[str, bool]]:
    """Each character of the token, or the mark that stands for it, and whether it is a mark."""
    lonely = all(unicodedata.category(c) in ("Cf", "Mn") for c in token)
    for character in token:
        invisible = unicodedata.category(character) == "Cf" and (lonely or character not in "\u200c\u200d")
        mark = f"U+{ord(character):04X}" if invisible else MARKS.get(character)
        yield mark or character, mark is not None


_UNPRINTABLE = (
    {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    | {code: 0xFFFD for code in (*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}
    | {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    | {0x7F: 0x2421}
)
