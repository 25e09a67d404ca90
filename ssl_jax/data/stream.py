"""Images that do not fit in memory, or differ in size: decoded once, cropped on the host, finished on the device.

Every batch is a pure function of (seed, step), computed by Grain's threads or worker processes ahead of the step that
takes it. So nothing of the input is in a checkpoint, and a run resumes at its next example with any number of them.
"""

import abc
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from ssl_jax.augment import EvaluationView, View, crop_shapes
from ssl_jax.data.crop import centre_crop, cut_views, least_pixels
from ssl_jax.data.dataset import SAMPLE, WHOLE, Dataset, Part, batch_indices
from ssl_jax.data.image import ImageError, Window, read_image, read_reduced, value_range
from ssl_jax.data.pipeline import batched, ordered_batches
from ssl_jax.data.turns import taking_turns
from ssl_jax.errors import UserError

# Larger than what malloc keeps for each thread: Pillow's memory for a large image goes back as soon as it is cropped.
PIL.Image.core.set_block_size(64 << 20)


def file_print(path: str | os.PathLike) -> str:
  """The size and the time of the last change of a file, or that there is none."""
  try:
    found = os.stat(path)
  except OSError:
    return "none"
  return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


class Images(abc.ABC):
  """Images that are read one by one; may be sent to other processes.

  Attributes:
    channels: of every image.
    window: for values of more than 8 bits, see `image.read_image`.
  """

  channels: int
  window: Window | None

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def source(self, i: int) -> str | bytes:
    """The path or the bytes of image i. Raises `ImageError` where they cannot be had."""

  def read(self, i: int) -> np.ndarray:
    """Image i, uint8 [H, W, C] of any size. Raises `ImageError` where it cannot be read."""
    return read_image(self.source(i), self.channels, self.window)

  def read_reduced(self, i: int, least: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Image i, reduced if `least` pixels still remain; and its whole height and width. Raises what `read` raises."""
    return read_reduced(self.source(i), self.channels, least, self.window)

  @abc.abstractmethod
  def label(self, i: int) -> int:
    """The class of image i, -1 where there is none; used where the data set itself has no array of labels."""

  @abc.abstractmethod
  def name(self, i: int) -> str:
    """What image i is called, for people."""

  @abc.abstractmethod
  def contents(self) -> str:
    """A text that tells these images from any others: which they are, and their files' sizes and times of change."""

  @abc.abstractmethod
  def take(self, indices: np.ndarray) -> "Images":
    """Some of the images."""

  def measured(self) -> Window | None:
    """The window that holds the values of a sample of the images; None: none of them has more than 8 bits."""
    low, high = math.inf, -math.inf
    for i in np.unique(np.arange(SAMPLE) * len(self) // SAMPLE):
      try:
        found = value_range(self.source(int(i)))
      except ImageError:
        continue
      if found:
        low, high = min(low, found[0]), max(high, found[1])
    return (low, high if high > low else low + 1) if low <= high else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streamed(Dataset):
  """A split whose `images` are read one by one.

  Of each view the host cuts the crop, at the image's own resolution and resized as Pillow does; the rest of the view is
  the device's. With `reading.reduced` JPEGs are decoded at 1/2, 1/4 or 1/8 where no view's smallest crop then has fewer
  pixels than the view (`crop.least_pixels`). The crops show the same parts; on photographs they differ by 0.6 gray
  levels on average for SimCLR's views, by 0.4 (at 1/2) to 1.0 (at 1/4) for DINO's ten, and on sharper pictures by 50 at
  most. None of 500x375 pixels is reduced for views of 224.
  """

  images: Images

  def contents(self) -> str:
    labels = b"" if self.labels is None else self.labels.tobytes()
    return hashlib.sha256(labels + self.images.contents().encode()).hexdigest()

  @property
  def channels(self) -> int:
    return self.images.channels

  @property
  def kind(self) -> str:
    return f"streamed, {self.channels} channel{'s' if self.channels > 1 else ''}"

  def take(self, indices: np.ndarray) -> "Streamed":
    labels = None if self.labels is None else self.labels[indices]
    return dataclasses.replace(self, images=self.images.take(indices), labels=labels)

  def image_name(self, i: int) -> str:
    return self.images.name(i)

  def original(self, i: int) -> np.ndarray:
    return self.images.read(i)

  def pixels(self, view: EvaluationView, most: int) -> np.ndarray | None:
    del view, most
    return None

  def batch_shapes(self, views: Sequence[View], batch_size: int) -> dict[str, Any]:
    return {"image": crop_shapes(views, batch_size, self.channels)}

  def example(self, index: int, views: Sequence[View], entropy: tuple[int, int, int]) -> dict[str, Any]:
    with taking_turns():
      pixels, size, found = self.read_or_next(index, least_pixels(views, self.reading.reduced))
      crops = cut_views(pixels, views, entropy, size)
      del pixels
    return {"image": crops, "index": np.int64(found), "wanted": np.int64(index)}

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
    local = batch_size // part.count

    def example(i):
      step, position = divmod(int(i), local)
      order = batch_indices(len(self), batch_size, seed, step, part)
      found = self.example(int(order[position]), views, (seed, step, part.index * local + position))
      return found | {"label": self._known_label(int(found["index"]))} if labelled else found

    threads, workers = self.reading.thread_count, self.reading.workers
    yield from batched(start * local, stop * local, example, local, threads, workers)

  def in_order(
    self, view: EvaluationView, batch_size: int, part: Part = WHOLE
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:

    def example(i):
      with taking_turns():
        return centre_crop(self.images.read(i), view), self.label(i)

    shape = view.size, view.size, self.channels
    yield from ordered_batches(example, len(self), shape, batch_size, self.reading.thread_count, part)

  def _known_label(self, i: int) -> np.int32:
    label = self.label(i)
    if label < 0:  # where only the images themselves know their labels, a missing one shows only now
      raise UserError(f"{self.image_name(i)} has no label, and each image that is trained on needs one.")
    return np.int32(label)

  def read_or_next(self, index: int, least: float = math.inf) -> tuple[np.ndarray, tuple[int, ...], int]:
    """(pixels, real height and width, index) of the image at `index`, or of the next that can be read.

    With a finite `least`, a JPEG of more pixels may come reduced to no fewer (`image.read_reduced`).

    Raises:
      UserError: none can.
    """
    for i in range(index, index + len(self)):
      try:
        if least < math.inf:
          return *self.images.read_reduced(i % len(self), least), i % len(self)
        pixels = self.images.read(i % len(self))
        return pixels, pixels.shape[:2], i % len(self)
      except ImageError:
        continue
    raise UserError(f"none of the {len(self):,} images of {self.name} can be read.")
