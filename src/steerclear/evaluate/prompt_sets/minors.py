"""The hard limit of every evaluation: prompts that suggest minors are dropped, and nothing switches that off.

What is read is a normal form of the text: compatibility-decomposed Unicode (NFKD) without marks and invisible
characters, lower case, look-alike letters of other alphabets as Latin ones, letters repeated three times and more taken
as one, ``i`` and ``l`` as the same letter, digits and symbols read both as themselves and as the letters they stand for
("k1d$"), words written with separators ("k-i-d", "k i d") put together. Whole words only: "kidney" and "minority" stay.
When in doubt it drops. It knows English; it is a limit on what a public prompt set can make this library draw, not a
content filter.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

from steerclear.evaluate.prompt_sets.words import (
    DIGITS,
    EMOJI,
    LOOKALIKES,
    NEVER_SPLIT,
    NUMBERS,
    SYMBOLS,
    TENS,
    WORDS,
)
from steerclear.evaluate.prompts import Prompt

ADULT = 18


def drop_minors(prompts: Iterable[Prompt]) -> tuple[tuple[Prompt, ...], int]:
    """The prompts whose text and category do not suggest minors, in their order, and how many did.

    The number belongs to every result, for it changes the denominators.

    Cost: some 0.1 milliseconds a prompt.
    """
    every = tuple(prompts)
    kept = tuple(p for p in every if not (suggests_minors(p.text) or suggests_minors(p.category or "")))
    return kept, len(every) - len(kept)


def suggests_minors(text: str) -> bool:
    """Whether the text has a word for a minor, an age below 18, or an emoji of a child."""
    if not EMOJI.isdisjoint(text):
        return True
    text = _plain(text)
    return _age(text) or _age(_leet_words(text)) or any(_names_a_minor(reading) for reading in _readings(text))


def _plain(text: str) -> str:
    """Lower-case ASCII where there is such a form: no marks, nothing invisible, no look-alikes; see the module."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", unicodedata.normalize("NFKD", text))  # ChildModel: two words
    text = "".join(_digit(char) for char in text if unicodedata.category(char) not in ("Cf", "Mn", "Me"))
    return text.casefold().translate(LOOKALIKES)


def _digit(char: str) -> str:
    value = unicodedata.decimal(char, None)
    return char if value is None else str(value)


def _readings(text: str) -> set[str]:
    """The text with digits, symbols, both or none of them read as letters; i and l become one letter."""
    inside = re.sub(r"[!|¡+](?!\w)", " ", text).translate(SYMBOLS)  # "ch!ld!": the last one is no letter
    read = {text, text.translate(SYMBOLS), inside}
    return {_same(reading) for reading in read | {each.translate(DIGITS) for each in read}}


def _same(text: str) -> str:
    return text.replace("l", "i")


def _squeeze(text: str) -> str:
    return re.sub(r"(.)\1+", r"\1", text)


_WORDS = frozenset(_same(word) for word in WORDS)
_SQUEEZED = frozenset(_squeeze(word) for word in _WORDS)
_SPLIT = frozenset(_same(word) for word in WORDS - NEVER_SPLIT if len(word) >= 5)
_STARTS = frozenset(word[:2] for word in _WORDS) | {2 * word[0] for word in _WORDS}
_LONGEST = 2 * max(map(len, WORDS))


def _names_a_minor(reading: str) -> bool:
    return any(_listed(word, spaces, spelled) for word, spaces, spelled in _joined(reading))


def _listed(word: str, spaces: int, spelled: bool) -> bool:
    known = _WORDS if spelled or spaces == 0 else _SPLIT
    return word in known or (spaces == 0 and re.search(r"(.)\1\1", word) is not None and _squeeze(word) in _SQUEEZED)


def _joined(reading: str) -> Iterator[tuple[str, int, bool]]:
    """Every word, and neighbours put together: ``(word, spaces inside it, whether it was spelled letter by letter)``.

    Neighbours may be separated by anything but spaces, by one space, or, letter by letter, by spaces throughout.
    """
    found = list(re.finditer(r"[a-z]+", re.sub(r"(.)\1{2,}", r"\1\1\1", reading)))
    for start, first in enumerate(found):
        if len(first[0]) > 1 and first[0][:2] not in _STARTS:
            continue
        word, spaces, spelled, end = "", 0, True, first.start()
        for piece in found[start:]:
            spaces += any(map(str.isspace, piece.string[end : piece.start()]))
            spelled, word, end = spelled and len(piece[0]) == 1, word + piece[0], piece.end()
            if len(word) > _LONGEST or (spaces > 1 and not spelled):
                break
            yield word, spaces, spelled


def _leet_words(text: str) -> str:
    """Digits inside words read as letters, numbers left alone: "s1xteen years 0ld", "12 y34r 0ld", "12yo"."""
    return re.sub(r"(?<![\w.])(\d{1,4}(?=y|m))?(\w*[a-z]\w*)", lambda m: (m[1] or "") + m[2].translate(DIGITS), text)


_IN_WORDS = "|".join(sorted(NUMBERS, key=len, reverse=True))
_NUMBER = rf"(?<!\d)(?<!\d[.,])(?P<number>\d{{1,4}}(?:[.,]\d+)?|(?<![a-z])(?:{_IN_WORDS}))"
_RANGE = rf"(?:[\W_]*(?:to|or|and|through|[-–—/~])[\W_]*(?:\d{{1,3}}|{'|'.join([_IN_WORDS, *TENS])}))?"
_AGES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?P<tens>(?:{'|'.join(TENS)})[\W_]*)?{_NUMBER}{_RANGE}[\W_]*(?:years?|yrs?|y)[\W_]*"
        r"(?:olds?|o|young|of[\W_]*age)(?![a-z])",
        rf"(?<![a-z])(?:age[sd]?|turn(?:s|ed|ing)?)(?:[\W_]+of)?[\W_]*(?P<tens>\Z\Z)?{_NUMBER}(?![\w])",
    )
)
_ALWAYS = re.compile(
    r"(?<![a-z])(?:months?|weeks?|days?)[\W_]*olds?(?![a-z])"
    r"|(?<!\d)(?:1[0-2]|[1-9])(?:st|nd|rd|th)[\W_]*grade(?:rs?)?(?![a-z])"
    rf"|(?<![a-z])(?:under|below|beneath|(?:young|less|old)er[\W_]*than|not[\W_]*yet)[\W_]*(?:the[\W_]*age[\W_]*of[\W_]*)?"
    rf"(?:1[0-8]|{'|'.join(word for word, value in NUMBERS.items() if value >= 10)})(?![\w])"
)


def _age(text: str) -> bool:
    """An age below 18, in digits or words: "12 year old", "aged twelve", "16-17 y/o", "under 18", "6 months old"."""
    text = re.sub(r"[\W_]{4,}", lambda run: run[0][:3], text)  # no pattern takes more than linear time
    if _ALWAYS.search(text):
        return True
    return any(match["tens"] is None and _value(match["number"]) < ADULT for p in _AGES for match in p.finditer(text))


def _value(number: str) -> float:
    return NUMBERS[number] if number in NUMBERS else float(number.replace(",", "."))
