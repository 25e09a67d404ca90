"""A first look at a sample of images, before anything is decided about them: sizes, channels, mean and deviation."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ssl_jax.data.dataset import SAMPLE, Dataset, usable_cores
from ssl_jax.data.folder import Files
from ssl_jax.data.image import ImageError, channel_count
from ssl_jax.data.turns import taking_turns
from ssl_jax.errors import UserError

_STRIP = 1 << 20  # values that are looked at together
_VALUES = np.arange(256) / 255  # of the levels of an image


class DataFacts(NamedTuple):
  """What a sample of a data set's images is like.

  Attributes:
    images: how many the data set has.
    sizes: (height, width) of each image of the sample.
    channels: 1 if all of them are grey, 3 if there are colours, else the number that most of them hold.
    coloured: how many of the sample have colours.
    mean, std: of each channel over the pixels of the sample, in [0, 1].
  """

  images: int
  sizes: tuple[tuple[int, int], ...]
  channels: int
  coloured: int
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def short(self) -> int:
    """The median of the shorter sides."""
    return int(np.median([min(size) for size in self.sizes]))

  @property
  def aspect(self) -> float:
    """The median of width / height."""
    return float(np.median([width / height for height, width in self.sizes]))


def look_at_files(files: Files, sample: int = SAMPLE) -> DataFacts:
  """The facts of a folder's images. Raises UserError where none of the sample can be read."""
  files = dataclasses.replace(files, window=files.window or files.measured())
  some = files.take(_spaced(len(files), sample))

  def held(i):
    try:
      return channel_count(some.source(i))
    except ImageError:
      return None

  counts = collections.Counter(filter(None, map(held, range(len(some)))))
  most = counts.most_common(1)[0][0] if counts else 3
  channels = 3 if most in (1, 3) else most
  return _look(dataclasses.replace(some, channels=channels).read, len(some), channels, len(files))


def look_at(dataset: Dataset, sample: int = SAMPLE) -> DataFacts:
  """The facts of a data set that was loaded with 3 channels. Raises UserError where none of the sample can be read."""
  indices = _spaced(len(dataset), sample)
  return _look(lambda i: dataset.original(int(indices[i])), len(indices), dataset.channels, len(dataset))


def is_grey(pixels: np.ndarray) -> bool:
  """Whether an image [H, W, C] has no colours."""
  return all(bool((rows == rows[..., :1]).all()) for rows in strips(pixels))


def levels(pixels: np.ndarray) -> np.ndarray:
  """How many pixels of each channel of an image uint8 [H, W, C] have each of the 256 levels: int64 [C, 256]."""
  counts = np.zeros((pixels.shape[-1], 256), np.int64)
  for rows in strips(pixels):
    for channel, count in enumerate(counts):
      count += np.bincount(rows[..., channel].ravel(), minlength=256)
  return counts


def strips(pixels: np.ndarray) -> Iterator[np.ndarray]:
  """An image [H, W, C] some rows at a time: NumPy's copies of a large one would be many times its size."""
  rows = max(1, _STRIP // pixels[0].size)
  for first in range(0, len(pixels), rows):
    yield pixels[first : first + rows]


def _look(read: Callable[[int], np.ndarray], count: int, channels: int, images: int) -> DataFacts:
  def examine(i):
    try:
      with taking_turns():
        pixels = read(i)
        grey = channels == 3 and is_grey(pixels)
        shares = levels(pixels) / (pixels.size // channels)
        return pixels.shape[:2], grey, shares @ _VALUES, shares @ _VALUES**2
    except ImageError:
      return None

  with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
    found = [x for x in pool.map(examine, range(count)) if x is not None]
  if not found:
    raise UserError(f"none of {count} images that were looked at can be read; `python -m ssl_jax check` says why.")
  sizes, greys, means, squares = zip(*found, strict=True)
  mean, square = np.mean(means, axis=0), np.mean(squares, axis=0)  # each image counts alike, whatever its size
  std = np.sqrt(np.maximum(square - mean**2, 0))
  held = 1 if channels == 3 and all(greys) else channels
  coloured = len(found) - sum(greys) if channels == 3 else 0
  rounded = [tuple(round(float(x), 4) for x in values[:held]) for values in (mean, np.maximum(std, 1e-3))]
  return DataFacts(images, tuple((int(h), int(w)) for h, w in sizes), held, coloured, rounded[0], rounded[1])


def _spaced(n, count):
  return np.unique(np.arange(count) * n // count)
