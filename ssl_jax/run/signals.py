"""SIGTERM and Ctrl-C: the run ends after the step that it is at, and saves."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from ssl_jax.run import progress


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], int]]:
  """Gives `stopping()`, which all processes call after each step: the signal on which the run is to end there, or 0.

  With several processes SIGTERM to any one of them is enough. With a single process it is SIGTERM or Ctrl-C, and a
  second signal ends it at once. Python lets only the main thread listen; in another one the answer is always 0.
  """
  if jax.distributed.is_initialized():
    # JAX stops them at the number after the highest that any process has passed, or at 1 before the first call: if the
    # numbers were training steps, a run that is resumed from a checkpoint would never reach it.
    asked = itertools.count(1)
    yield lambda: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(asked)) else 0
    return
  came, before = [0], {}

  def handler(number, frame):
    del frame
    came[0] = number
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number == signal.SIGINT:
      progress.keep("stopping after this step, and saving; Ctrl-C once more ends at once")

  if threading.current_thread() is threading.main_thread():
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield lambda: came[0]
  finally:
    for number, earlier in before.items():  # a notebook's, say
      signal.signal(number, earlier)
