"""Which values a config's keys may have. The tables themselves stand beside the code that reads their keys.

A table maps a section's keys to a `Setting`, or to a table of their own. `problems` finds everything that is wrong with
a section, one line a key.
"""

import difflib
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

AUTO = "auto"  # in place of a value: `decide` finds one


class Setting(NamedTuple):
  """The values of one key.

  Attributes:
    holds: whether a value is one of them; NaN and infinity never are.
    text: which they are, in words.
    required: whether a recipe must have the key.
  """

  holds: Callable[[Any], bool]
  text: str
  required: bool = False


def whole(least: int = 1, most: float = math.inf, *, required: bool = False) -> Setting:
  words = f"a whole number, at least {least}" if most == math.inf else f"a whole number from {least} to {most:,}"
  return Setting(lambda x: _is_whole(x) and least <= x <= most, words, required)


def number(least: float = 0, most: float = math.inf, *, ends: str = "[]", required: bool = False) -> Setting:
  """A finite number from `least` to `most`; `ends` as in mathematics, "(" and ")" leave the end out."""

  def holds(x):
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not math.isfinite(x):
      return False
    return (x > least if ends[0] == "(" else x >= least) and (x < most if ends[1] == ")" else x <= most)

  words = f"a number, at least {least:g}"
  if most < math.inf:
    words = f"a number in {ends[0]}{least:g}, {most:g}{ends[1]}"
  elif ends[0] == "(":
    words = "a positive number" if least == 0 else f"a number above {least:g}"
  return Setting(holds, words, required)


def positive(*, required: bool = False) -> Setting:
  return number(0, ends="(]", required=required)


def size(least: int = 1, *, required: bool = False) -> Setting:
  """A size of a layer, a queue or a set of prototypes, at most 2^24: more is a slip of the keyboard."""
  return _at_most(2**24, whole(least, required=required))


def temperature(*, required: bool = False) -> Setting:
  """A positive temperature of a loss, at most 100."""
  return _at_most(100, positive(required=required))


def weight(*, required: bool = False) -> Setting:
  """The weight of a term of a loss, at most 10^6."""
  return _at_most(10**6, number(required=required))


def _at_most(most, setting):
  return Setting(lambda x: setting.holds(x) and x <= most, f"{setting.text} and at most {most:,}", setting.required)


def flag(*, required: bool = False) -> Setting:
  return Setting(lambda x: isinstance(x, bool), "true or false", required)


def text(*, required: bool = False) -> Setting:
  return Setting(lambda x: isinstance(x, str) and x != "", "a string that is not empty", required)


def one_of(*values: Any, required: bool = False) -> Setting:
  known = " or ".join(map(str, values)) if len(values) < 3 else f"one of {', '.join(map(str, values))}"
  return Setting(lambda x: any(type(x) is type(value) and x == value for value in values), known, required)


def optional(setting: Setting) -> Setting:
  """Also None."""
  return Setting(lambda x: x is None or setting.holds(x), f"{setting.text}, or none", setting.required)


def each(setting: Setting, counts: tuple[int, ...] | None = None, *, required: bool = False) -> Setting:
  """A tuple of such values, of one of these lengths."""

  def holds(x):
    return isinstance(x, tuple | list) and (counts is None or len(x) in counts) and all(map(setting.holds, x))

  many = "" if counts is None else f"{' or '.join(map(str, counts))} of "
  return Setting(holds, f"a tuple: {many}{setting.text}", required)


def span(least: float, most: float, ends: str = "[]") -> Setting:
  """Two numbers, the lower one first."""
  inside = number(least, most, ends=ends)
  bounds = f" in {ends[0]}{least:g}, {most:g}{ends[1]}" if most < math.inf else f" above {least:g}"

  def holds(x):
    return isinstance(x, tuple | list) and len(x) == 2 and all(map(inside.holds, x)) and x[0] <= x[1]

  return Setting(holds, f"two numbers{bounds}, the lower one first")


def patterns() -> Setting:
  return each(Setting(_is_pattern, "regular expressions"))


def factors() -> Setting:
  """Pairs of a regular expression and what it multiplies by."""
  factor = number()

  def holds(x):
    return isinstance(x, tuple | list) and len(x) == 2 and _is_pattern(x[0]) and factor.holds(x[1])

  return each(Setting(holds, f"pairs of a regular expression and {factor.text}"))


def problems(
  section: str, given: Any, table: Mapping[str, Any], may_be_open: Callable[[str], Any] = lambda key: False
) -> list[str]:
  """What is wrong with the keys of a section, one text a key; `section` is its name with a dot behind, or empty.

  A key of which `may_be_open` is true may also be "auto".
  """
  if not isinstance(given, Mapping):
    return [f"{section.removesuffix('.')} must be a group of keys, got {given!r}"]
  found = []
  for key, value in given.items():
    if key not in table:
      near = difflib.get_close_matches(str(key), table, 1, 0)
      found.append(f"{section}{key} does not exist" + (f"; did you mean {near[0]!r}?" if near else ""))
    elif isinstance(table[key], Mapping):
      found += problems(f"{section}{key}.", value, table[key], may_be_open)
    elif isinstance(value, str) and value == AUTO and may_be_open(f"{section}{key}"):
      continue
    elif not table[key].holds(value):
      found.append(f"{section}{key} must be {table[key].text}, got {value!r}")
  for key, setting in table.items():
    if key not in given and getattr(setting, "required", True):
      found.append(f"{section}{key} is missing" + (f": {setting.text}" if isinstance(setting, Setting) else ""))
  return found


def _is_whole(x):
  return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_pattern(x):
  try:
    return isinstance(x, str) and bool(re.compile(x)) and x != ""
  except re.error:
    return False
