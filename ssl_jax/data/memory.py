"""Images in memory, one uint8 array of one size: every crop is drawn on the device."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ssl_jax.augment import EvaluationView, View
from ssl_jax.data.crop import centre_crop
from ssl_jax.data.dataset import WHOLE, Dataset, Part, batch_indices
from ssl_jax.data.pipeline import ordered_batches

LARGEST = 3 * 256**2  # bytes of an image: the step makes floats of whole images, a batch of them at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemory(Dataset):
  """A split whose `images` are uint8 [n, H, W, C], and whose labels are known."""

  images: np.ndarray
  labels: np.ndarray

  def contents(self) -> str:
    digest = hashlib.sha256(f"{self.images.shape}".encode())
    for array in (self.images, self.labels):
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

  @property
  def channels(self) -> int:
    return self.images.shape[-1]

  @property
  def kind(self) -> str:
    return f"of {list(self.images.shape[1:])}"

  def take(self, indices: np.ndarray) -> "InMemory":
    return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])

  def image_name(self, i: int) -> str:
    return f"image {i} of {self.split}"

  def original(self, i: int) -> np.ndarray:
    return self.images[i]

  def pixels(self, view: EvaluationView, most: int) -> np.ndarray | None:
    if view.size**2 * self.channels > most:
      return None
    return self.images if self._is_whole(view) else np.stack([centre_crop(x, view) for x in self.images])

  def batch_shapes(self, views: Sequence[View], batch_size: int) -> dict[str, Any]:
    del views
    return {"image": jax.ShapeDtypeStruct((batch_size, *self.images.shape[1:]), np.uint8)}

  def example(self, index: int, views: Sequence[View], entropy: tuple[int, int, int]) -> dict[str, Any]:
    del views, entropy
    return {"image": self.images[index], "index": index, "wanted": index}

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
    del views
    for step in range(start, stop):
      order = batch_indices(len(self), batch_size, seed, step, part)
      labels = {"label": self.labels[order]} if labelled else {}
      yield {"image": self.images[order], "index": order, "wanted": order, **labels}

  def in_order(
    self, view: EvaluationView, batch_size: int, part: Part = WHOLE
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    if not self._is_whole(view):
      shape = view.size, view.size, self.channels
      cut = lambda i: (centre_crop(self.images[i], view), self.labels[i])  # noqa: E731
      yield from ordered_batches(cut, len(self), shape, batch_size, self.reading.thread_count, part)
      return
    local = batch_size // part.count
    for start in range(part.index * local, len(self) + part.index * local, batch_size):
      at = np.arange(start, start + local)
      images, labels = (np.take(x, at, axis=0, mode="clip") for x in (self.images, self.labels))
      yield images, labels, at < len(self)

  def _is_whole(self, view: EvaluationView) -> bool:
    """Whether the view leaves the images as they are."""
    return self.images.shape[1:3] == (view.size, view.size) and view.resize == view.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut(InMemory):
  """Images that are already as evaluation sees them, and are not cut a second time."""

  def _is_whole(self, view):
    return True
