"""A data set, and the order in which training visits its images.

`batch_indices` is a pure function of (seed, step), so that a run resumes at its next example on any number of
processes, and nothing of the input needs a checkpoint.
"""

import functools
import zlib
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from ssl_jax.errors import UserError


class Dataset(NamedTuple):
  """One split.

  Attributes:
    images: uint8 [n, H, W, C] in memory; or what is read one by one (`stream.Images`).
    labels: int32 [n], -1 where there is none; None where only the images themselves know them.
    num_classes: number of classes, 0 if the set has no labels.
    name: the name that it was loaded by.
    split: the split, or slice of one, that it was loaded by.
    classes: names of the classes, where they are folders.
    fingerprint: of the list of files, where it is a folder: another list would be visited in another order.
  """

  images: Any
  labels: Any
  num_classes: int
  name: str
  split: str
  classes: tuple[str, ...] = ()
  fingerprint: str = ""

  @property
  def is_labelled(self) -> bool:
    """Whether every image has a class; the first one, where only the images themselves know."""
    return self.num_classes > 0 and (self.images.label(0) if self.labels is None else self.labels.min()) >= 0

  @property
  def is_streamed(self) -> bool:
    return not isinstance(self.images, np.ndarray)


def summary(dataset: Dataset | None) -> str:
  """What tells a data set from another, in one line, without a look at its pixels."""
  if dataset is None:
    return "none"
  labels = "" if dataset.labels is None else f", labels {zlib.crc32(dataset.labels.tobytes()):08x}"
  kind = "streamed" if dataset.is_streamed else f"of {list(dataset.images.shape[1:])}"
  return f"{len(dataset.images)} images {kind}{labels} {dataset.fingerprint}"


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of one epoch: int64 [n], a permutation of range(n) that depends on (seed, epoch, n) alone."""
  return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(
  n: int, batch_size: int, seed: int, step: int, *, process_index: int = 0, process_count: int = 1
) -> np.ndarray:
  """The examples of one step: a pure function of its arguments, cheap for consecutive steps.

  Every epoch is a new order of all n examples, cut into n // batch_size batches. The rest, fewer than a
  batch, is dropped (other examples each epoch), so that every step has the same shapes.

  Args:
    n: number of examples in the data set.
    batch_size: global batch size, a multiple of `process_count`.
    seed: not negative.
    step: global step, from 0 on.
    process_index: which contiguous part of the global batch to return.
    process_count: in how many parts it is cut.

  Returns:
    int64 [batch_size // process_count].

  Raises:
    UserError: the data set is smaller than a batch, or the batch does not split evenly.
  """
  if not 0 < batch_size <= n:
    raise UserError(
      f"batch_size must be at least 1 and at most the number of images: got batch_size={batch_size} and "
      f"{n} images. Take a smaller batch, or more images."
    )
  if batch_size % process_count:
    raise UserError(f"batch_size must be a multiple of the {process_count} processes, got {batch_size}.")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}.")
  if seed < 0:
    raise UserError(f"seed must not be negative, got {seed}.")
  epoch, batch_of_epoch = divmod(step, n // batch_size)
  part = batch_size // process_count
  start = batch_of_epoch * batch_size + process_index * part
  return _cached_order(seed, epoch, n)[start : start + part].copy()


@functools.lru_cache(maxsize=2)  # Two: a prefetching reader goes back and forth over an epoch's end.
def _cached_order(seed, epoch, n):
  return epoch_order(seed, epoch, n)


def check_channels(channels: int) -> None:
  """Raises UserError unless images can be had with this number of channels."""
  if channels not in (1, 3):
    raise UserError(f"channels must be 1 or 3, got {channels}.")


def to_pixels(image: PIL.Image.Image, channels: int) -> np.ndarray:
  """A Pillow image as uint8 [h, w, channels]: grey repeated, colours to ITU-R 601 luma, as Pillow converts."""
  pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
  return pixels[..., None] if channels == 1 else pixels
