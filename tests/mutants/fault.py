"""One planted fault as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A change of one file that some test must not survive.

    Attributes:
        name: what is wrong, in a few words; unique.
        file: relative to the repository's root.
        right: text that stands exactly once in the file.
        wrong: what stands there instead.
        tests: what pytest is given: files, or tests of a file.
        select: an expression for pytest's -k, "" for all of them.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    select: str = ""

    def apply(self, source: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: the text to change does not stand exactly once in it.
        """
        count = source.count(self.right)
        if count != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.right!r} {count} times, not once")
        return source.replace(self.right, self.wrong)
