"""How a run's lines are drawn: lines that stay and, where somebody watches, one live line below them.

What they say is in `messages`.

In a terminal the live line is drawn again a few times a second, in a notebook every two seconds, both by a carriage
return alone. In a file, where nothing can be drawn again, a line is written when there was none for a minute.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator

_TERMINAL, _NOTEBOOK, _FILE = 0.2, 2.0, 60.0  # seconds between two live lines


class _Shown:
  """What is on the screen: the length of the live line, and when a line was last printed or drawn."""

  length = 0
  time = time.monotonic()


def keep(text: str) -> None:
  """Prints a line that stays, in place of the live one; flushed, so that a log file is up to date."""
  print(("\r" + text.ljust(_Shown.length)) if _Shown.length else text, flush=True)
  _Shown.length, _Shown.time = 0, time.monotonic()


def live(text: Callable[[], str]) -> None:
  """Draws the live line, if it is time for it; cheap otherwise, and `text` is not called."""
  every = _every()
  if time.monotonic() - _Shown.time < every:
    return
  if every == _FILE:
    keep(text())
    return
  line = text()[: shutil.get_terminal_size().columns - 1]  # One that is longer would wrap, and stay.
  print("\r" + line.ljust(_Shown.length), end="", flush=True)
  _Shown.length, _Shown.time = len(line), time.monotonic()


def clear() -> None:
  """Takes the live line away."""
  if _Shown.length:
    print("\r" + " " * _Shown.length + "\r", end="", flush=True)
  _Shown.length = 0


@contextlib.contextmanager
def cleared() -> Iterator[None]:
  """Takes the live line away at the end, however that comes."""
  try:
    yield
  finally:
    clear()


def _every():
  if type(sys.stdout).__module__.startswith("ipykernel"):  # in Jupyter, Colab and Kaggle
    return _NOTEBOOK
  return _TERMINAL if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else _FILE
