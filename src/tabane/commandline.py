"""What the programs' command lines share: options as argparse reads them, mistakes in one sentence.

argparse's own words are for its programmers; so each mistake is noticed where it is made, and said
anew. What is not foreseen is said as argparse says it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from tabane.errors import UsageError

NEGATIVE = re.compile(r"-[0-9]*\.?[0-9]+")


class _Version(argparse.Action):
    """Prints which version this is, and ends. (The number is read only then.)"""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from tabane import __version__

        print(f"{parser.prog.partition(' ')[0]} {__version__}")
        parser.exit()


class CommandLine(argparse.ArgumentParser):
    """Like argparse's, but a mistake is a `UsageError` of one sentence. `prefix` begins it;
    `or_else`: what is said of a word that is no option, where it might have been something else."""

    def __init__(self, prog: str, *, prefix: str = "", or_else: str = "", **more: Any) -> None:
        super().__init__(prog, allow_abbrev=False, exit_on_error=False, **more)
        self._prefix = prefix
        self._or_else = or_else
        self._words: Sequence[str] = ()
        self._is_half_way = False

    def add_version(self, *letters: str) -> None:
        """An option that tells the version: `--version`, and these."""
        about = "show the version and exit"
        self.add_argument(*letters, "--version", action=_Version, nargs=0, help=about)

    def parse_intermixed(self, words: Sequence[str]) -> argparse.Namespace:
        """Options may stand between words, as in `df / -T /srv`."""
        self._is_half_way = True
        try:
            found, rest = self.parse_known_intermixed_args(words)
        except argparse.ArgumentError as error:
            self._explain(error)
        finally:
            self._is_half_way = False
        self._refuse(rest)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """None is unknown: that is refused here, so that a command of several names its own."""
        self._words = list(args or ())
        try:
            found, rest = super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            self._explain(error)
        if not self._is_half_way:
            self._refuse(rest)
        return found, rest

    def _refuse(self, rest: Sequence[str]) -> None:
        """What is left over."""
        for word in rest:
            if is_option(word):
                self.fail(self._describe(word))
        if rest:
            self.fail(f"there are more words than {self._form()} takes")

    def _explain(self, error: argparse.ArgumentError) -> NoReturn:
        self._refuse_unknown()
        for word in self._words:
            name, given, _ = word.partition("=")
            action = self._option_string_actions.get(name)
            if given and action is not None and action.nargs == 0:
                self.fail(f"{name} takes no value")
        self.fail(f"{error.argument_name}: {error.message}")

    def _refuse_unknown(self) -> None:
        for word in self._words:
            if self._unknown(word):
                self.fail(self._describe(word))

    def _unknown(self, word: str) -> str:
        """The first option in a word that there is not."""
        if not is_option(word):
            return ""
        known = self._option_string_actions
        if word.startswith("--"):
            name = word.partition("=")[0]
            return "" if name in known else name
        for letter in word[1:]:
            action = known.get(f"-{letter}")
            if action is None:
                return f"-{letter}"
            if action.nargs != 0:
                break
        return ""

    def _describe(self, word: str) -> str:
        """A sentence on a word that is no option."""
        from difflib import get_close_matches

        if self._or_else and not word.startswith("--"):
            return f"{word} is {self._or_else}"
        unknown = self._unknown(word) or word
        near = get_close_matches(unknown, [o for o in self._option_string_actions if o[1] == "-"])
        hint = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` lists them"
        return f"there is no option {unknown}: {hint}"

    def _form(self) -> str:
        """How it is written."""
        words = [name_of(a) for a in self._actions if not a.option_strings]
        return f"`{self.usage or ' '.join([self.prog, *words])}`"

    def error(self, message: str) -> NoReturn:
        """(called by argparse when something is missing)"""
        self._refuse_unknown()
        self.fail(f"something is missing: write {self._form()}")

    def fail(self, problem: str) -> NoReturn:
        """Raises `UsageError`."""
        raise UsageError(self._prefix + problem)

    def print_help(self, file: Any = None) -> None:
        """argparse's own hides that it could not write."""
        print(self.format_help(), end="", file=file)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            self.fail(f"{name_of(action)} needs a value after it")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            problem = error.message
            if action.type is int:
                problem = f"{arg_string!r} is no whole number"
            self.fail(f"{name_of(action)}: {problem}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError:
            known = ", ".join(map(str, action.choices or ()))
            self.fail(f"{name_of(action)}: {value!r} is none of {known}")


def name_of(action: argparse.Action) -> str:
    """As users write it: `-n/--limit`, `APP`."""
    if action.option_strings:
        return "/".join(action.option_strings)
    many = " ..." if action.nargs in ("*", "+", argparse.REMAINDER) else ""
    return str(action.metavar or action.dest.upper()) + many


def is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and word != "--" and not NEGATIVE.fullmatch(word)
