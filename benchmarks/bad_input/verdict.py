"""Cases, their right outcomes, and the comparison with what a command did."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

LONGEST_SENTENCE = 320  # characters, without the folders of this program: lskip cuts them at 290, the command aside
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Seen:
    """The observed outcome of a command.

    Attributes:
        code: its exit code; None where an exception came out of it.
        out, err: what it printed.
        here: the case's own folder.
    """

    code: int | None
    out: str
    err: str
    here: Path

    @property
    def sentence(self) -> str:
        """The last line of stderr that is not blank (progress bars leave blank ones)."""
        lines = re.split(r"[\n\r]|\x1b\[A", self.err)
        return next((line for line in reversed(lines) if line.strip()), "")


Check = Callable[[Seen], str | None]


@dataclass(frozen=True)
class Refused:
    """Exit code 2 and one sentence with all of `words` (`a|b`: either of the two), and a passing `check`."""

    words: tuple[str, ...]
    check: Check = lambda seen: None

    def missed(self, seen: Seen, command: str) -> str | None:
        if seen.code != 2:
            return f"exit code {seen.code}, not refused"
        sentence = seen.sentence
        heads = (f"lskip {command}: error: ", "lskip: error: ")  # the latter of the output, whatever the command
        if not sentence.startswith(heads) or seen.err.count(": error: ") != 1:
            return f"not one sentence: {seen.err[-300:]!r}"
        said = sentence.replace(str(seen.here), "").replace(str(seen.here.parent), "")
        if len(said) > LONGEST_SENTENCE:
            return f"a sentence of {len(said)} characters: {said[:120]!r}"
        if CONTROL.search(sentence):
            return f"control characters in the sentence: {sentence!r}"
        for word in self.words:
            if not any(each in sentence for each in word.split("|")):
                return f"{word!r} is not in the sentence: {said!r}"
        wrong = self.check(seen)
        return None if wrong is None else f"wrong effect: {wrong}"


@dataclass(frozen=True)
class Done:
    """Exit code 0 and a passing `check`."""

    check: Check = lambda seen: None
    code: int = 0

    def missed(self, seen: Seen, command: str) -> str | None:
        if seen.code != self.code:
            return f"exit code {seen.code}, not {self.code}: {seen.sentence!r}"
        wrong = self.check(seen)
        return None if wrong is None else f"wrong effect: {wrong}"


@dataclass(frozen=True)
class Either:
    """Any of several right outcomes, where a value may mean two things."""

    ways: tuple[Refused | Done, ...]

    def missed(self, seen: Seen, command: str) -> str | None:
        missed = [way.missed(seen, command) for way in self.ways]
        return None if None in missed else "; or ".join(missed)


Right = Refused | Done | Either


def refused(*words: str, check: Check = lambda seen: None) -> Refused:
    return Refused(words, check)


def done(check: Check = lambda seen: None, code: int = 0) -> Done:
    return Done(check, code)


def either(*ways: Refused | Done) -> Either:
    return Either(ways)


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        command: of lskip.
        kind: of fault: range, type, cut, …
        what: in a few words.
        arguments: behind the command. {here} is the case's own folder, {place} the one that all share.
        right: what must come of it.
        prepare: fills the case's folder.
        around: what is broken while the command runs, as a context manager.
        makes: files and folders below {here} that the command may make or change if it is not refused.
        leaves: those that it may make or change before it is refused.
    """

    command: str
    kind: str
    what: str
    arguments: tuple[str, ...]
    right: Right
    prepare: Callable[[Path], object] = lambda here: None
    around: Callable[[Path], AbstractContextManager] = lambda here: nullcontext()
    makes: tuple[str, ...] = ("out",)
    leaves: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.command} · {self.kind} · {self.what}"

    def command_line(self, here: Path) -> list[str]:
        """Return the command line with the folders filled in."""
        named = {"{here}": str(here), "{place}": str(here.parent)}
        line = [self.command, *self.arguments]
        for key, value in named.items():
            line = [argument.replace(key, value) for argument in line]
        return line


def judge(case: Case, seen: Seen, before: dict[str, bytes], after: dict[str, bytes]) -> str | None:
    """Return what is wrong with the outcome of a case; None if nothing is.

    Args:
        before, after: {relative path: content} of the case's folder.
    """
    if any(name.rpartition("/")[2] == "MARK" for name in after.keys() - before.keys()):
        return "ran what the input named"
    if "Traceback (most recent call last)" in seen.out + seen.err:
        return f"traceback: {(seen.out + seen.err).rpartition('Traceback')[2].strip()[-250:]!r}"
    if (wrong := case.right.missed(seen, case.command)) is not None:
        return wrong
    if "\x1b" in seen.out and case.command != "generate":  # what a model says goes into a pipe as it is
        return "wrong effect: an escape on stdout"
    allowed = case.makes if seen.code != 2 else case.leaves
    changed = {name for name, content in before.items() if after.get(name) != content}
    made = after.keys() - before.keys()
    for name in sorted(changed | made):
        litter = name == "cache" or name.startswith("cache/") or name.endswith(".lock")
        if not litter and not any(name == each or name.startswith(f"{each}/") for each in allowed):
            return f"{'changed' if name in before else 'left'} {name}"
    return None
