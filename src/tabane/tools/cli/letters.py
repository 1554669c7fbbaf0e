"""The words of ps that are no options to anybody else: `aux`, `axo pid,args`, `-aux`, `1,2`.

ps takes three grammars at once. UNIX options (`-ef`) and GNU's (`--sort`) are left to the parser;
BSD's letters, which have no dash and may take the next word, are taken out here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tabane.errors import UsageError

FLAGS = "aAcfgHhjlmnruwxL"
VALUED = "oOpqUtk"
NOT_TOLD = {
    "e": "environments",
    "s": "signal masks",
    "v": "paging",
    "X": "registers",
    "Z": "security labels",
    "S": "what children used",
    "T": "the terminal that is asked from",
}
UNIX_VALUED = "oOpqugUGCst"
"""UNIX letters whose value is the rest of the word or the next word."""
LONG_VALUED = re.compile(
    r"--(root|dc|node|app|user|format|sort|pid|ppid|sid|tty|group|cols|columns|width|quick-pid)"
)
DISGUISED = re.compile(r"-(?:au?)?x[axwfhlr]*")
"""`-aux`, `-ax` and `-x`: the dash is a habit, no option begins like that."""
APP = re.compile("[a-z0-9-]{4,}")
"""What may have been meant as an app's name."""
PIDS = re.compile(r"[0-9][0-9,]*|[a-z0-9-]+/[a-z0-9-]+:([a-z0-9-]+:)?[0-9]+")

Letters = list[tuple[str, str]]


def take_letters(argv: list[str]) -> tuple[Letters, list[str]]:
    """BSD letters in order, each with its value if it has one, and the words that are left."""
    letters: Letters = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if DISGUISED.fullmatch(word):
            letters += _read_cluster(word[1:], words)
        elif word.startswith("-") and word != "-":
            rest += _with_value(word, words) if _wants_more(word) else [word]
        elif PIDS.fullmatch(word):
            letters.append(("p", word))
        else:
            letters += _read_cluster(word, words)
    return letters, rest


def _with_value(word: str, words: Iterator[str]) -> list[str]:
    """An option and its value; as one word if it would be taken for an option (`--sort -rss`)."""
    value = next(words, None)
    if value is None:
        return [word]
    equals = "=" if word.startswith("--") else ""
    return [word + equals + value] if value.startswith("-") else [word, value]


def _wants_more(word: str) -> bool:
    """Whether a UNIX or GNU option is followed by its value."""
    if word.startswith("--"):
        return LONG_VALUED.fullmatch(word) is not None
    valued = next((n for n, letter in enumerate(word) if letter in UNIX_VALUED), None)
    return valued == len(word) - 1


def _read_cluster(word: str, words: Iterator[str]) -> Letters:
    letters: Letters = []
    for n, letter in enumerate(word):
        if letter in VALUED:
            value = word[n + 1 :] or next(words, None)
            if value is None:
                raise UsageError(f"ps: {letter!r} of {word!r} needs a value after it")
            return [*letters, (letter, value)]
        if letter in NOT_TOLD:
            hint = f" (an app is named by --app {word})" if APP.fullmatch(word) else ""
            problem = f"nodes do not tell {NOT_TOLD[letter]}{hint}"
            raise UsageError(f"ps: {letter!r} of {word!r}: {problem}")
        if letter not in FLAGS:
            hint = "write aux, -ef, --app NAME, or nothing"
            raise UsageError(f"ps: {word!r} is not understood: {hint}")
        letters.append((letter, ""))
    if not word:
        raise UsageError("ps: an empty word is not understood: write aux, -ef, or nothing")
    return letters


def values_of(letters: Letters, which: str) -> list[str]:
    return [value for letter, value in letters if letter in which]


def has(letters: Letters) -> Callable[[str], bool]:
    """Whether a flag is among them."""
    given = {letter for letter, _ in letters}
    return lambda letter: letter in given
