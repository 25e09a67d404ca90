"""Features of a data set, and pictures of what a method does to some images, on all devices."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssl_jax import augment, parallel
from ssl_jax.augment import EvaluationView, View
from ssl_jax.data import Dataset, Part
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Method
from ssl_jax.models.vit import ViT

Read = Callable[[Any, jax.Array], jax.Array]  # (variables, images [b, H, W, C]) -> float32 [b, d]


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


def reading(encoder: nn.Module, kind: str | None = None, blocks: int = 1) -> Read:
  """What is read off an encoder as an image's features: a function (variables, images [b, H, W, C]) -> [b, d].

  Args:
    encoder: a ViT or a ResNet.
    kind: None: what the encoder gives. Of a ViT: "cls", the class tokens of the last `blocks` blocks, each through the
      last norm, oldest first; "mean", the mean of the patches' tokens after the last norm; "cls+mean", both of these in
      this order, which is what DINOv2's linear heads read; "flat", all patches' tokens. Of a ResNet: "pooled", the mean
      of the last maps; "flat", all of them.
    blocks: from how many of the last blocks "cls" and "cls+mean" take the class token.

  Raises:
    UserError: the encoder has no such features, or fewer blocks.
  """
  if not isinstance(encoder, ViT):
    if kind not in (None, "pooled", "flat") or blocks != 1:
      asked = f"--features={kind}" if kind not in (None, "pooled", "flat") else f"--blocks={blocks}"
      raise UserError(f"{asked}: a ResNet has no class token and no patches; its features are pooled or flat.")
  elif kind not in (None, "cls", "mean", "cls+mean", "flat"):
    raise UserError(f"--features={kind}: a ViT's features are cls, mean, cls+mean or flat.")
  elif not 1 <= blocks <= encoder.depth:
    raise UserError(f"--blocks={blocks}: the encoder has {encoder.depth} blocks.")
  elif blocks > 1 and kind not in ("cls", "cls+mean"):
    raise UserError(f"--blocks={blocks} is for the class tokens: give --features=cls or --features=cls+mean.")
  if kind not in ("cls", "cls+mean"):
    whole: Any = encoder if kind is None else encoder.clone(features=kind)
    return lambda variables, images: whole.apply(variables, images, train=False)

  def tokens(variables, images):
    outputs = encoder.apply(variables, images, blocks, method="last_blocks")
    outputs = [x if x.dtype == jnp.float64 else x.astype(jnp.float32) for x in outputs]
    patches = outputs[-1][:, 1 + encoder.registers :]
    return jnp.concatenate([x[:, 0] for x in outputs] + [jnp.mean(patches, axis=1)] * (kind == "cls+mean"), axis=1)

  return tokens


class Extractor:
  """Computes the features of a data set, on all devices of a mesh; each process reads its part of a batch.

  `read` says what is read off the encoder (see `reading`); None: what it gives.
  """

  def __init__(self, encoder: nn.Module, view: EvaluationView, mesh: Mesh, batch_size: int, read: Read | None = None):
    self.view, self.mesh, self.batch_size = view, mesh, batch_size
    self.read = read = read or reading(encoder)
    self.paired: dict[View, Any] = {}  # the programs of `pairs`

    def extract(variables, batch):
      images, *others = batch
      return read(variables, augment.evaluation_view(images, view)), *others

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

  def pairs(self, variables: Any, dataset: Dataset, view: View, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The features of two views of each of at most `count` images, float32 [n, d] each; on every process.

    The images are evenly spaced, and the views are the same whenever and on however many devices they are drawn.
    """
    if view not in self.paired:

      def extract(variables, batch):
        images, positions = batch
        keys = augment.example_keys(0, jnp.int32(0), positions)
        (drawn,) = augment.make_views(keys, images, (view, view))
        return tuple(self.read(variables, x) for x in drawn)

      self.paired[view] = parallel.compile_map(extract, self.mesh)
    count = min(count, len(dataset))
    chosen = np.arange(count) * len(dataset) // count
    filled = np.minimum(np.arange(-(-count // self.mesh.size) * self.mesh.size, dtype=np.int32), count - 1)
    positions = np.split(filled, jax.process_count())[jax.process_index()]
    examples = [dataset.example(int(chosen[i]), (view, view), (0, 0, int(i)))["image"] for i in positions]
    batch = jax.tree.map(lambda *parts: np.stack(parts), *examples), positions
    first, second = self.paired[view](variables, parallel.put_batch(self.mesh, batch))
    return np.asarray(first)[:count], np.asarray(second)[:count]

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
    shown = lambda x: x / 255 if x.dtype == jnp.uint8 else jnp.clip(x * std + mean, 0, 1)  # noqa: E731
    return jax.tree.map(lambda x: shown(x) if x.ndim == 4 else x, drawn)

  return jax.jit(paint, out_shardings=parallel.replicated(mesh))
