"""The one exception that the commands print as a line of text, and a check that raises it."""

import difflib
import inspect
from collections.abc import Callable, Iterable


class UserError(ValueError):
  """A mistake that the person at the keyboard can mend: a command prints it as one line, without a traceback."""


def check_arguments(section: str, given: Iterable[str], function: Callable) -> None:
  """Raises UserError for a key of a config's section that `function` has no argument for."""
  known = list(inspect.signature(function).parameters)
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1, 0)[0]
      raise UserError(f"{section}.{key} does not exist; did you mean {near!r}?")
