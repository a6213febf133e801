"""Reading JSON whose form is known, from somebody who is not trusted.

``json.loads`` makes whatever the text asks for: three bytes of ``[],`` become sixty bytes of memory, and two megabytes
of ``[`` an exception of another kind. Here the caller says what comes next, and everything else is an error, so memory
is bounded by the text and by the number of values that the caller allows.
"""

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}(?![0-9.eE])")
_DECODER = json.JSONDecoder()


class Malformed(ValueError):
    """A file or a text is not what it should be. The message says what was got, to go into the caller's sentence.

    Args:
        got: What was found.
        expected: What should have been, where the caller's own words would be too general.
    """

    def __init__(self, got: str, expected: str | None = None) -> None:
        super().__init__(got)
        self.expected = expected


class Scanner:
    """A position in a JSON text; every method reads one thing and moves on.

    Args:
        text: The whole text.
        what: Its name, for messages.
    """

    def __init__(self, text: str, what: str) -> None:
        self.text, self.what = text, what
        self.position = 0

    def next_is(self, mark: str) -> bool:
        """Whether ``mark`` follows; nothing is read but space."""
        found = _SPACE.match(self.text, self.position)
        self.position = found.end() if found else self.position
        return self.text.startswith(mark, self.position)

    def skip(self, mark: str) -> None:
        """``mark`` itself."""
        if not self.next_is(mark):
            raise self.bad(f"no {mark!r}")
        self.position += len(mark)

    def string(self) -> str:
        """A string."""
        if not self.next_is('"'):
            raise self.bad("no string")
        try:
            value, self.position = _DECODER.raw_decode(self.text, self.position)
        except ValueError as error:
            raise self.bad("an unreadable string") from error
        return value

    def integer(self) -> int:
        """A number without sign or fraction, below 10¹⁹."""
        self.next_is("")
        found = _NUMBER.match(self.text, self.position)
        if found is None:
            raise self.bad("no whole number")
        self.position = found.end()
        return int(found.group())

    def entries(self, opening: str, closing: str, most: int) -> Iterator[None]:
        """The entries of a list or an object; the loop's body reads each."""
        self.skip(opening)
        count = 0
        while not self.next_is(closing):
            if count:
                self.skip(",")
            if count == most:
                raise self.bad(f"more than {most} entries")
            count += 1
            yield
        self.skip(closing)

    def keys(self, most: int) -> Iterator[str]:
        """The keys of an object, each at most once; the loop's body reads the value."""
        seen: set[str] = set()
        for _ in self.entries("{", "}", most):
            key = self.string()
            if key in seen:
                raise self.bad(f"a second {key[:40]!r}")
            seen.add(key)
            self.skip(":")
            yield key

    def strings(self, most: int) -> list[str]:
        """A list of strings."""
        return [self.string() for _ in self.entries("[", "]", most)]

    def integers(self, most: int) -> list[int]:
        """A list of whole numbers."""
        return [self.integer() for _ in self.entries("[", "]", most)]

    def end(self) -> None:
        """Nothing more."""
        self.next_is("")
        if self.position != len(self.text):
            raise self.bad("more text after the end")

    def bad(self, got: str) -> Malformed:
        """What is wrong here."""
        return Malformed(f"{got} at character {self.position} of {self.what}")
