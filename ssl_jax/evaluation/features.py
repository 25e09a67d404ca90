"""Features of a data set, and pictures of what a method does to some images, on all devices."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssl_jax import augment, parallel
from ssl_jax.augment import EvaluationView
from ssl_jax.data import Dataset, Part
from ssl_jax.methods.base import Method


class Features(NamedTuple):
  """Features of the images of a data set that can be read, in its order.

  Attributes:
    features: float32 [n, d].
    labels: int32 [n], -1 where there is none.
    indices: int64 [n], which images they are; `Dataset.image_name` has their names.
  """

  features: np.ndarray
  labels: np.ndarray
  indices: np.ndarray


class Extractor:
  """Computes the features of a data set, on all devices of a mesh; each process reads its part of a batch."""

  def __init__(self, encoder: nn.Module, view: EvaluationView, mesh: Mesh, batch_size: int):
    self.view, self.mesh, self.batch_size = view, mesh, batch_size

    def extract(variables, batch):
      images, *others = batch
      return encoder.apply(variables, augment.evaluation_view(images, view), train=False), *others

    self.extract = parallel.compile_map(extract, mesh)

  def trace(self, variables: Any, channels: int) -> None:
    """Traces the program, so that what is wrong with the shapes shows before anything is compiled."""
    images = jax.ShapeDtypeStruct((self.batch_size, self.view.size, self.view.size, channels), np.uint8)
    batch = images, *(jax.ShapeDtypeStruct((self.batch_size,), dtype) for dtype in (np.int32, np.bool_))
    self.extract.trace(variables, parallel.abstract(batch, parallel.split(self.mesh)))

  def __call__(self, variables: Any, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(features float32 [n, d], labels [n]), without images that have no label or cannot be read; on every process."""
    parts = [(x[labels >= 0], labels[labels >= 0]) for x, labels, _ in self.batches(variables, dataset)]
    features, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    return features, labels

  def all(self, variables: Any, dataset: Dataset) -> Features:
    """The features of all images that can be read, with or without a label; on every process."""
    return Features(*(np.concatenate(x) for x in zip(*self.batches(variables, dataset), strict=True)))

  def batches(self, variables: Any, dataset: Dataset) -> Iterator[Features]:
    """Yields the `Features` of one batch after the other; the last one may be of fewer images."""
    variables = jax.device_put(variables, parallel.replicated(self.mesh))  # once, and not for every batch
    here = Part(jax.process_index(), jax.process_count())
    for i, (images, labels, keep) in enumerate(dataset.in_order(self.view, self.batch_size, here)):
      batch = images, np.where(keep, labels, -1).astype(np.int32), keep
      features, labels, keep = map(np.asarray, self.extract(variables, parallel.put_batch(self.mesh, batch)))
      yield Features(features[keep], labels[keep], i * self.batch_size + np.flatnonzero(keep))


def make_painter(method: Method, view: EvaluationView, mesh: Mesh) -> Callable:
  """Compiles (params, state, uint8 images [n, h, w, C]) -> the method's pictures, whole on every device.

  Images are brought back to [0, 1]. The same images get the same random numbers whenever they are drawn.
  """
  mean, std = np.array(view.mean or 0.0), np.array(view.std or 1.0)

  def paint(params, state, images):
    assert method.pictures is not None
    keys = augment.example_keys(0, jnp.int32(0), jnp.arange(len(images)))
    drawn = method.pictures(params, state, augment.evaluation_view(images, view), keys)
    return jax.tree.map(lambda x: jnp.clip(x * std + mean, 0, 1) if x.ndim == 4 else x, drawn)

  return jax.jit(paint, out_shardings=parallel.replicated(mesh))
