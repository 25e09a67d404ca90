"""Images that do not fit in memory, or differ in size: decoded once, cropped on the host, finished on the device.

Every batch is a pure function of (seed, step), computed by Grain's threads or worker processes ahead of the step that
takes it. So nothing of the input is in a checkpoint, and a run resumes at its next example with any number of them.
"""

import dataclasses
import gc
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from ssl_jax.augment import EvaluationView, View, by_resolution
from ssl_jax.data.dataset import Dataset, batch_indices
from ssl_jax.data.image import MAX_PIXELS, ImageError
from ssl_jax.data.resize import resized_crop
from ssl_jax.errors import UserError
from ssl_jax.streams import CROP

_SAMPLE, _MOST_BAD = 256, 0.1  # images that are tried before a run, and the share of them that may be unreadable


class Images(Protocol):
  """Images that are read one by one; may be sent to other processes."""

  channels: int

  def __len__(self) -> int: ...

  def read(self, i: int) -> np.ndarray:
    """Image i, uint8 [H, W, C] of any size. Raises `ImageError` where it cannot be read."""
    ...

  def read_reduced(self, i: int, least: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Image i, maybe smaller, of at least so many pixels; and its real height and width. Raises as `read`."""
    ...

  def label(self, i: int) -> int:
    """Its class, -1 where there is none."""
    ...

  def name(self, i: int) -> str:
    """What it is called, for people."""
    ...

  def take(self, indices: np.ndarray) -> "Images":
    """Some of the images."""
    ...


@dataclasses.dataclass(frozen=True)
class InMemory:
  """Images in memory that are to be prepared as streamed ones are."""

  pixels: np.ndarray
  labels: np.ndarray

  @property
  def channels(self) -> int:
    return self.pixels.shape[-1]

  def __len__(self) -> int:
    return len(self.pixels)

  def read(self, i: int) -> np.ndarray:
    return self.pixels[i]

  def read_reduced(self, i: int, least: float) -> tuple[np.ndarray, tuple[int, int]]:
    del least
    return self.pixels[i], self.pixels.shape[1:3]

  def label(self, i: int) -> int:
    return int(self.labels[i])

  def name(self, i: int) -> str:
    return str(i)

  def take(self, indices: np.ndarray) -> "InMemory":
    return InMemory(self.pixels[indices], self.labels[indices])


def as_streamed(dataset: Dataset) -> Dataset:
  """The same data set, read one by one."""
  return dataset if dataset.is_streamed else dataset._replace(images=InMemory(dataset.images, dataset.labels))


def batches(
  images: Images,
  views: Sequence[View],
  *,
  batch_size: int,
  seed: int,
  start: int,
  stop: int,
  threads: int,
  workers: int = 0,
  reduced: bool = False,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, Any]]:
  """Yields this process's part of the batches of steps start to stop - 1.

  Args:
    images: the data set.
    views: each view's crop is cut at the image's own resolution and resized as Pillow does; the rest of the view is the
      device's (`augment.make_views`).
    batch_size: global.
    seed: of the order (`batch_indices`) and the crops, which depend on (seed, step, position, view) alone.
    threads: that decode; 0 decodes in the caller's. In each worker, where there are workers.
    workers: processes that decode; 0: none. Outside of absl's `app.run` call `absl.flags.FLAGS.mark_as_parsed()` first.
    reduced: decode JPEGs at 1/2, 1/4 or 1/8 where no view's smallest crop then has fewer pixels than the view
      (`least_pixels`). The crops show the same parts; on photographs they differ by 0.6 gray levels on average for
      SimCLR's views, by 0.4 (at 1/2) to 1.0 (at 1/4) for DINO's ten, and on sharper pictures by 50 at most. None of
      500x375 pixels is reduced for views of 224.

  Yields:
    {"image": tuple of uint8 [b, v, size, size, C], one a resolution, "index" int64 [b], "wanted" int64 [b]}. An image
    that cannot be read is replaced by the next that can: "index" is what came and "wanted" what the order says.
  """
  local = batch_size // process_count
  least = least_pixels(views, reduced)

  def example(i):
    step, position = divmod(int(i), local)
    order = batch_indices(len(images), batch_size, seed, step, process_index=process_index, process_count=process_count)
    pixels, size, index = read_or_next(images, int(order[position]), least)
    crops = cut_views(pixels, views, (seed, step, process_index * local + position), size)
    return {"image": crops, "index": np.int64(index), "wanted": order[position]}

  return _run(start * local, stop * local, example, local, threads, workers)


def evaluation_batches(
  images: Images,
  view: EvaluationView,
  batch_size: int,
  threads: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields this process's part of batches over all images, in order.

  `batch_size` is global; of a part: (uint8 [b, size, size, C], labels [b], bool [b]: which could be read). The last
  batch is filled up with what counts as unreadable. `view.resize` and `view.size` are the host's work here.
  """
  n, local = len(images), batch_size // process_count

  def example(j):
    i = j // local * batch_size + process_index * local + j % local
    try:
      if i < n:
        return centre_crop(images.read(int(i)), view), np.int32(images.label(int(i))), np.True_
    except ImageError:
      pass
    return np.zeros((view.size, view.size, images.channels), np.uint8), np.int32(-1), np.False_

  return _run(0, -(-n // batch_size) * local, example, local, threads, 0)


def _run(start, stop, example, batch_size, threads, workers):
  """Batches of example(i) for i from start to stop, in order, made ahead by threads or worker processes."""
  dataset = grain.MapDataset.range(start, stop).map(example)
  if workers:  # They take turns at whole batches: one message each.
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


def least_pixels(views: Sequence[View], reduced: bool) -> float:
  """How many pixels a reduced image must have, so that no view's smallest crop has fewer than the view; else inf."""
  return max(view.size**2 / view.scale[0] for view in views) if reduced else math.inf


def read_or_next(images: Images, index: int, least: float = math.inf) -> tuple[np.ndarray, tuple[int, ...], int]:
  """(pixels, real height and width, index) of the image at `index` or, where it cannot be read, of the next that can.

  With a finite `least`, a JPEG of more pixels may come reduced to no fewer (`image.read_reduced`).

  Raises:
    UserError: none can.
  """
  for i in range(index, index + len(images)):
    try:
      if least < math.inf:
        return *images.read_reduced(i % len(images), least), i % len(images)
      pixels = images.read(i % len(images))
      return pixels, pixels.shape[:2], i % len(images)
    except ImageError:
      continue
  raise UserError(f"none of the {len(images):,} images can be read.")


def check_sample(images: Images) -> None:
  """Tries evenly spaced images. Raises UserError where more than a tenth of them, and not just one, cannot be read."""
  tried = np.unique(np.arange(_SAMPLE) * len(images) // _SAMPLE)
  bad = []
  for i in tried:
    try:
      images.read(int(i))
    except ImageError as error:
      bad.append(f"{images.name(int(i))}: {error}")
  if len(bad) > max(1, _MOST_BAD * len(tried)):
    raise UserError(
      f"{len(bad)} of {len(tried)} images that were tried cannot be read, such as {'; '.join(bad[:3])}. "
      "`python -m ssl_jax.data.check` lists all of them."
    )


def cut_views(
  pixels: np.ndarray, views: Sequence[View], entropy: tuple[int, ...], size: tuple[int, ...] = ()
) -> tuple[np.ndarray, ...]:
  """The crops of all views of one image [H, W, C]: a tuple of uint8 [v, size, size, C], one a resolution.

  `size` is the image's real height and width where `pixels` are reduced: the crops are of the same parts of it.
  """
  size = size or pixels.shape[:2]
  parts = -(-size[0] // pixels.shape[0])  # A pixel is of parts x parts of them; the last may be of fewer.
  crops = []
  for i, view in enumerate(views):
    rng = np.random.default_rng((*entropy, i, CROP))
    top, left, h, w = crop_box(rng, size, view.scale, view.ratio)
    box = top / parts, left / parts, h / parts, w / parts
    crops.append(resized_crop(pixels, box, (view.size, view.size), view.interpolation))
  return tuple(np.stack([crops[i] for i in indices]) for indices in by_resolution(views).values())


def crop_box(rng: np.random.Generator, image_size: tuple[int, ...], scale, ratio) -> tuple[int, int, int, int]:
  """(top, left, height, width) of torchvision's RandomResizedCrop; `augment.crop_box` is the device's."""
  height, width = image_size
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
  return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def centre_crop(pixels: np.ndarray, view: EvaluationView) -> np.ndarray:
  """Short side to `view.resize`, then the centre of `view.size`, as torchvision's Resize and CenterCrop."""
  height, width = pixels.shape[:2]
  short = min(height, width)
  size = view.resize * height // short, view.resize * width // short
  if size[0] * size[1] > MAX_PIXELS:
    raise ImageError(f"too long: {width}x{height} pixels")
  resized = resized_crop(pixels, (0, 0, height, width), size, view.interpolation)
  top, left = (round((s - view.size) / 2) for s in size)
  return resized[top : top + view.size, left : left + view.size]
