"""Examples made ahead of the step that takes them, by Grain's threads or worker processes, in the order asked for."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from ssl_jax.data.dataset import Part
from ssl_jax.data.image import ImageError


def batched(start, stop, example, batch_size, threads, workers):
  """Batches of example(i) for i from start to stop, in order, made ahead by threads or worker processes."""
  dataset = grain.MapDataset.range(start, stop).map(example)
  if workers:  # They take turns at whole batches: one message each.
    if not flags.FLAGS.is_parsed():  # Grain's workers are sent the flags, which a notebook has not parsed.
      flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=min(threads, 2))
    iterated = dataset.batch(batch_size).to_iter_dataset(options)
    batches = iter(iterated.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _begin_worker))
    try:
      yield from batches
    finally:
      batches.close()  # Ends the workers.
      del batches, iterated
      gc.collect()  # Grain keeps the last batches in a cycle; Python would warn of their shared memory at the end.
    return
  ahead = max(2 * threads, batch_size) if threads else 0
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  yield from dataset.to_iter_dataset(options).batch(batch_size)


def _begin_worker(index, count):
  """Leaves signals to the run, and ends when the run is killed."""
  del index, count
  for number in (signal.SIGTERM, signal.SIGINT):  # A terminal and SLURM signal the whole group; the run has to save.
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch():  # Else it would wait for ever to hand over its next batch.
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def ordered_batches(
  example: Callable[[int], tuple[np.ndarray, Any]],
  n: int,
  shape: tuple[int, ...],
  batch_size: int,
  threads: int,
  part: Part,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Batches of example(i) -> (pixels of `shape`, label) for i below n: see `Dataset.in_order`."""
  local = batch_size // part.count

  def filled(j):
    i = j // local * batch_size + part.index * local + j % local
    try:
      if i < n:
        pixels, label = example(int(i))
        return pixels, np.int32(label), np.True_
    except ImageError:
      pass
    return np.zeros(shape, np.uint8), np.int32(-1), np.False_

  yield from batched(0, -(-n // batch_size) * local, filled, local, threads, 0)
