"""A caller's regular expressions: compiled and matched as `re` does, and given up on where that would take forever."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable

from actsparse.errors import ScopeError, shorten_message

# Seconds for one pattern and all names of a model, many times what any reasonable pattern takes.
TIME_LIMIT_S = 10.0
# Some character classes take `re` a second per thousand characters to compile.
_MAX_LENGTH = 5_000
# Without a repeated group, as many choices cost at most the cube of a name's length.
_FEW_CHOICES = 3
_CHOICE = re.compile(r"[*+?{|]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
# Prints the positions of the names that match. `re` cannot be interrupted; a process can.
_PROGRAM = """
import json, re, sys
pattern, names = json.load(sys.stdin)
matches = re.compile(pattern).match
print(*(i for i, name in enumerate(names) if matches(name)))
"""


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """
    Compile a caller's regular expression.

    :param pattern: The expression.
    :return: The compiled expression.
    :raises ScopeError: If it is not one, or is too long.
    """
    if isinstance(pattern, str) and len(pattern) > _MAX_LENGTH:
        msg = f"a pattern is {len(pattern)} characters long; at most {_MAX_LENGTH} are taken; give names instead"
        raise ScopeError(msg)
    try:
        with warnings.catch_warnings():
            # Of what may mean something else in a later Python.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        msg = f"{quote(pattern)} is not a regular expression: {error}"
        raise ScopeError(msg) from None


def match_names(pattern: str, names: Iterable[str]) -> set[str]:
    """
    Find the names that a regular expression matches, anchored at the start as by `re.match`.

    :param pattern: The expression.
    :param names: The names.
    :return: Those that it matches.
    :raises ScopeError: If it is not an expression, or takes longer than `TIME_LIMIT_S`.
    """
    names = list(names)
    compiled = compile_pattern(pattern)
    if len(_CHOICE.findall(pattern)) <= _FEW_CHOICES and not _REPEATED_GROUP.search(pattern):
        return {name for name in names if compiled.match(name)}
    return _match_in_process(pattern, names)


def quote(text: str) -> str:
    """
    Quote a pattern or a name for a message.

    :param text: What the caller wrote.
    :return: It, or its start, in quotes.
    """
    return repr(text if len(text) <= 200 else text[:200] + "…")


def _match_in_process(pattern: str, names: list[str]) -> set[str]:
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command, input=json.dumps([pattern, names]), capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        msg = (
            f"pattern {quote(pattern)} takes too long to match ({TIME_LIMIT_S:g} s were not enough): "
            "write it without repeats inside repeats, such as (a+)+"
        )
        raise ScopeError(msg) from None
    if done.returncode != 0:
        msg = f"pattern {quote(pattern)} cannot be matched: {shorten_message(RuntimeError(done.stderr))}"
        raise ScopeError(msg)
    return {names[int(position)] for position in done.stdout.split()}
