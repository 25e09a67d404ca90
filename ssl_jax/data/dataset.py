"""A data set, and the order in which training visits its images.

`batch_indices` is a pure function of (seed, step), so that a run resumes at its next example on any number of
processes, and nothing of the input needs a checkpoint.
"""

import abc
import dataclasses
import functools
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from ssl_jax.augment import EvaluationView, View
from ssl_jax.data.image import ImageError, Window
from ssl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
  """A process's part of every global batch: number `index` of `count` contiguous ones."""

  index: int = 0
  count: int = 1


WHOLE = Part()
SAMPLE, _MOST_BAD = 256, 0.1  # images that are tried before a run, and the share of them that may be unreadable


def split_named(split: str, there: Collection[str]) -> str:
  """A split, or a slice of one, under the name that it has in `there`: val, valid and validation mean the same."""
  name, bracket, part = split.partition("[")
  same = ("val", "valid", "validation")
  if name in there or name not in same:
    return split
  return next((other for other in same if other in there), name) + bracket + part


def usable_cores() -> int:
  """How many cores this process may use: of a shared machine, the scheduler's or the container's share."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Reading(NamedTuple):
  """How images are decoded and cut on the host; it changes how fast they come.

  Attributes:
    threads: how many decode, in each worker where there are workers; 0: the caller's own thread; None: one per core.
    workers: how many processes decode for training; 0: none.
    reduced: decode large JPEGs smaller for training, which changes pixels a little (see `stream.Streamed`).
  """

  threads: int | None = None
  workers: int = 0
  reduced: bool = False

  @property
  def thread_count(self) -> int:
    return usable_cores() if self.threads is None else self.threads


ALL_CORES = Reading()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(abc.ABC):
  """One split. Its images are in memory (`memory.InMemory`) or read one by one (`stream.Streamed`).

  Attributes:
    images: what holds the pixels.
    labels: int32 [n], -1 where there is none; None where only the images themselves know them.
    num_classes: number of classes, 0 if the set has no labels.
    name: the name that it was loaded by.
    split: the split, or slice of one, that it was loaded by.
    classes: names of the classes, where they are folders.
    class_names: what people call the classes, where that is known otherwise.
    fingerprint: of the list of files, where it is a folder: another list would be visited in another order.
    reading: how many threads and processes read it.
    window: the values of more than 8 bits that become 0 and 255, see `image.read_image`; None: there are none.
    sample: a checksum of the pixels of a sample, where the set was `tried`.
    notes: what was left out of it, in words.
  """

  images: Any
  labels: np.ndarray | None
  num_classes: int
  name: str
  split: str
  classes: tuple[str, ...] = ()
  class_names: tuple[str, ...] = ()
  fingerprint: str = ""
  reading: Reading = ALL_CORES
  window: Window | None = None
  sample: str = ""
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.images)

  @property
  def is_labelled(self) -> bool:
    """Whether any image has a class; where only the images themselves know, whether the first one has."""
    return self.num_classes > 0 and (self.label(0) if self.labels is None else self.labels.max()) >= 0

  def label(self, i: int) -> int:
    """The class of image i, -1 where there is none."""
    return int(self.images.label(i) if self.labels is None else self.labels[i])

  def thinned(self, count: int) -> "Dataset":
    """At most `count` images, for a bank of bounded size; evenly spaced, as a folder's images are sorted by class."""
    return self if len(self) <= count else self.take(np.arange(count) * len(self) // count)

  def numbered_as(self, other: "Dataset") -> "Dataset":
    """The same images with their classes numbered as in `other`, where both know their classes' names.

    Images lose their labels where `other` does not have their class, and `notes` says so.
    """
    if self.classes == other.classes or not self.classes or not other.classes or self.labels is None:
      return self
    number = np.array([other.classes.index(x) if x in other.classes else -1 for x in self.classes], np.int32)
    labels = np.where(self.labels < 0, -1, number[self.labels])
    notes = self.notes
    if unknown := [name for name in self.classes if name not in other.classes]:
      lost = int(np.sum(labels < 0)) - int(np.sum(self.labels < 0))
      which = f"of classes that {other.split!r} does not have ({in_short(unknown)})"
      notes += (f"{lost:,} images {which}: evaluation leaves them out",)
    about: dict[str, Any] = dict(classes=other.classes, num_classes=other.num_classes, notes=notes)
    return dataclasses.replace(self, labels=labels, **about)

  def tried(self) -> "Dataset":
    """The same images, after a look at a sample of them; `notes` says what is odd.

    Raises:
      UserError: more of them cannot be read than a run should replace.
    """
    sample = np.unique(np.arange(SAMPLE) * len(self) // SAMPLE)
    bad, prints, flat = [], [], 0
    for i in map(int, sample):
      try:
        pixels = self.original(i)
      except ImageError as error:
        bad.append(f"{self.image_name(i)}: {error}")
        continue
      prints.append((pixels.shape, zlib.crc32(pixels.data)))
      flat += bool(np.all(pixels.min(axis=(0, 1)) == pixels.max(axis=(0, 1))))
      del pixels  # which may be large, before the next one is read
    if len(bad) > max(1, _MOST_BAD * len(sample)):
      raise UserError(
        f"{len(bad)} of {len(sample)} images that were tried cannot be read, such as {'; '.join(bad[:3])}. "
        "`python -m ssl_jax check` lists all such files of a folder; a prepared set is mended by its `prepare` command."
      )
    notes, copies = list(self.notes), len(prints) - len(set(prints))
    if copies or flat:
      notes.append(f"of {len(prints)} images that were looked at, {copies} are copies of others, {flat} of one colour")
    if self.num_classes == 1:
      notes.append("all images are of one class: an accuracy of 100 % says nothing")
    return dataclasses.replace(self, notes=tuple(notes), sample=f"{zlib.crc32(repr(prints).encode()):08x}")

  def summary(self) -> str:
    """What tells it from another data set, in one line, without a look at its pixels."""
    labels = "" if self.labels is None else f", labels {zlib.crc32(self.labels.tobytes()):08x}"
    return f"{len(self)} images {self.kind}{labels} {self.fingerprint}"

  @abc.abstractmethod
  def contents(self) -> str:
    """A checksum of its labels and pixels; where images are read one by one, of their files in place of the pixels."""

  @property
  @abc.abstractmethod
  def channels(self) -> int:
    """How many channels every image has."""

  @property
  @abc.abstractmethod
  def kind(self) -> str:
    """What its images are, for people: "of [28, 28, 1]"."""

  @abc.abstractmethod
  def take(self, indices: np.ndarray) -> "Dataset":
    """Some of the images."""

  @abc.abstractmethod
  def image_name(self, i: int) -> str:
    """What image i is called, for people."""

  @abc.abstractmethod
  def original(self, i: int) -> np.ndarray:
    """Image i before any view is drawn of it, uint8 [H, W, C]. Raises `image.ImageError` where it cannot be read."""

  @abc.abstractmethod
  def pixels(self, view: EvaluationView, most: int) -> np.ndarray | None:
    """All images as `in_order` gives them, uint8 [n, h, w, C]; None where that costs too much.

    It costs too much where images have to be read from disk, and where one image has more than `most` numbers.
    """

  @abc.abstractmethod
  def batch_shapes(self, views: Sequence[View], batch_size: int) -> dict[str, Any]:
    """The shapes and types of {"image": ...} in a batch of `batch_size`."""

  @abc.abstractmethod
  def example(self, index: int, views: Sequence[View], entropy: tuple[int, int, int]) -> dict[str, Any]:
    """What a batch has of the image at `index`: see `batches`. `entropy` is (seed, step, position in the batch)."""

  @abc.abstractmethod
  def batches(
    self,
    views: Sequence[View],
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    part: Part = WHOLE,
    labelled: bool = False,
  ) -> Iterator[dict[str, Any]]:
    """Yields a process's part, b examples, of the batches of steps `start` to `stop` - 1.

    Args:
      views: the views that training draws.
      batch_size: global.
      seed: decides the order (`batch_indices`) and what is drawn on the host: both depend on (seed, step, position,
        view) alone.
      start, stop: steps.
      part: which process's part.
      labelled: whether the images' classes come too, "label" int32 [b].

    Yields:
      {"image": uint8 [b, H, W, C], or a tuple of crops [b, v, size, size, C], one per resolution, as
      `augment.make_views` takes them; "index" int64 [b], "wanted" int64 [b]}. An image that cannot be read is replaced
      by the next that can: "wanted" are the images that the order names, "index" those that came.
    """

  @abc.abstractmethod
  def in_order(
    self, view: EvaluationView, batch_size: int, part: Part = WHOLE
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields a process's part of batches over all images, in order, resized and cropped as `view` says.

    `batch_size` is global. A part is (uint8 [b, size, size, C], labels [b], bool [b]: which images could be read). The
    last batch is filled up with entries that count as unreadable.
    """


def in_short(names: Sequence[str]) -> str:
  """The first three of some names, and how many more there are."""
  return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def in_words(given: Window | None, measured: Window | None) -> list[str]:
  """A note of which values of more than 8 bits are read as 0 to 255; `measured` is None where there are none."""
  if measured is None:
    return ["data.window changes nothing: it is for values of more than 8 bits"] if given else []
  low, high = given or measured
  how = "" if given else f" (measured on {SAMPLE} images at most; data.window sets it)"
  return [f"values from {low:g} to {high:g} are read as 0 to 255{how}"]


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of one epoch: int64 [n], a permutation of range(n) that depends on (seed, epoch, n) alone."""
  return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, batch_size: int, seed: int, step: int, part: Part = WHOLE) -> np.ndarray:
  """The examples of one step: a pure function of its arguments, cheap for consecutive steps.

  Every epoch is a new order of all n examples, cut into n // batch_size batches. The rest, fewer than a
  batch, is dropped (other examples each epoch), so that every step has the same shapes.

  Args:
    n: number of examples in the data set.
    batch_size: global batch size, a multiple of `part.count`.
    seed: not negative.
    step: global step, from 0 on.
    part: which part of the global batch to return.

  Returns:
    int64 [batch_size // part.count].

  Raises:
    UserError: the data set is smaller than a batch, or the batch does not split evenly.
  """
  if not 0 < batch_size <= n:
    raise UserError(
      f"batch_size must be at least 1 and at most the number of images: got batch_size={batch_size} and "
      f"{n} images. Take a smaller batch, or more images."
    )
  if batch_size % part.count:
    raise UserError(f"batch_size must be a multiple of the {part.count} processes, got {batch_size}.")
  if not 0 <= part.index < part.count:
    raise ValueError(f"part.index must be in [0, {part.count}), got {part.index}.")
  if seed < 0:
    raise UserError(f"seed must not be negative, got {seed}.")
  epoch, batch_of_epoch = divmod(step, n // batch_size)
  local = batch_size // part.count
  start = batch_of_epoch * batch_size + part.index * local
  return _cached_order(seed, epoch, n)[start : start + local].copy()


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
