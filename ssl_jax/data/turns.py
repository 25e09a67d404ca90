"""Threads that decode images wait for their turns, so that what they hold at once fits in a bounded memory."""

import contextlib
import math
import threading
from collections.abc import Iterator


class _Thread(threading.local):
  """Whether this thread takes turns, and the bytes that it holds."""

  takes_turns = False
  held = 0


_thread = _Thread()
_in_flight, _room = [0], threading.Condition()  # bytes, of all threads


@contextlib.contextmanager
def taking_turns() -> Iterator[None]:
  """Inside, this thread decodes an image only when it fits in the bound of `take` with those of the other threads.

  A decoded image counts until its thread leaves the block or decodes the next one.
  """
  _thread.takes_turns = True
  try:
    yield
  finally:
    _thread.takes_turns = False
    _exchange(0, math.inf)


def take(size: int, most: int) -> None:
  """Waits until `size` bytes fit in `most` beside what other threads hold; alone, an image of any size fits.

  A thread outside `taking_turns` does not wait.
  """
  if _thread.takes_turns:
    _exchange(size, most)


def _exchange(size, most):
  with _room:
    _in_flight[0] -= _thread.held
    _room.notify_all()
    _room.wait_for(lambda: not _in_flight[0] or _in_flight[0] + size <= most)
    _in_flight[0] += size
    _thread.held = size
