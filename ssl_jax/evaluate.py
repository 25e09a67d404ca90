"""What an encoder is worth: features, k-NN accuracy, and that of the pixels themselves."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ssl_jax import augment, build, checkpoint, knn, parallel
from ssl_jax import config as configs
from ssl_jax.data import Dataset, stream
from ssl_jax.errors import UserError
from ssl_jax.methods.base import AXIS, Method


class Extractor:
  """Computes the features of a data set, on all devices of a mesh; each process reads its part of a batch.

  Images in memory take the evaluation view on the device. Streamed ones are resized and cropped on the host; where the
  recipe has no size for them, to that of its first view, from 8/7 of it.
  """

  def __init__(self, encoder: nn.Module, config: Any, mesh: Mesh, batch_size: int):
    self.view, self.mesh, self.batch_size = configs.eval_view(config), mesh, batch_size
    self.threads = configs.threads(config)
    size = self.size = self.view.size or int(config.views[0]["size"])
    resize = self.resize = self.view.resize or round(size * 8 / 7)
    self.host_view = self.view._replace(size=size, resize=resize)

    def compiled(view):
      def extract(variables, batch):
        images, labels = batch
        return encoder.apply(variables, augment.evaluation_view(images, view), train=False), labels

      return parallel.compile_map(extract, mesh)

    self.whole = compiled(self.view)
    self.cut = compiled(self.view._replace(resize=None, size=None))

  def trace(self, variables: Any, dataset: Dataset) -> None:
    """Raises what is wrong with the shapes, before anything is compiled."""
    if dataset.is_streamed and self.size > self.resize:
      raise UserError(
        f"a centre crop of {self.size} pixels (eval_view.size, else the first view's) does not fit in "
        f"eval_view.resize={self.resize}."
      )
    shape = (self.batch_size, *self.image_shape(dataset))
    batch = jax.ShapeDtypeStruct(shape, np.uint8), jax.ShapeDtypeStruct(shape[:1], np.int32)
    batch = parallel.abstract(batch, parallel.split(self.mesh))
    (self.cut if dataset.is_streamed else self.whole).trace(variables, batch)

  def image_shape(self, dataset: Dataset) -> tuple[int, ...]:
    """Of the arrays that go to the device: (H, W, C)."""
    if dataset.is_streamed:
      return self.size, self.size, dataset.images.channels
    return dataset.images.shape[1:]

  def pixels(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """What goes to the devices, all of it, uint8 [n, H, W, C], and the labels [n]; for a few images."""
    parts = [(images[keep], labels[keep]) for images, labels, keep in self._batches(dataset, 0, 1)]
    return np.concatenate([x for x, _ in parts]), np.concatenate([x for _, x in parts])

  def __call__(self, variables: Any, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(features float32 [n, d], labels [n]), without images that have no label or cannot be read; on every process."""
    extract = self.cut if dataset.is_streamed else self.whole
    variables = jax.device_put(variables, parallel.replicated(self.mesh))  # once, and not for every batch
    features, labels = [], []
    for images, known, keep in self._batches(dataset, jax.process_index(), jax.process_count()):
      batch = images, np.where(keep, known, -1).astype(np.int32)  # -1: filled up, unreadable or without a label
      some, known = (np.asarray(x) for x in extract(variables, parallel.put_batch(self.mesh, batch)))
      features.append(some[known >= 0])
      labels.append(known[known >= 0])
    return np.concatenate(features), np.concatenate(labels)

  def _batches(self, dataset, process_index, process_count):
    """Yields a process's part: (images [b, H, W, C], labels [b], which of them count: the last batch is filled up)."""
    here = dict(process_index=process_index, process_count=process_count)
    if dataset.is_streamed:
      yield from stream.evaluation_batches(dataset.images, self.host_view, self.batch_size, self.threads, **here)
      return
    local = self.batch_size // process_count
    for start in range(process_index * local, len(dataset.images) + process_index * local, self.batch_size):
      at = np.arange(start, start + local)
      images, labels = (np.take(x, at, axis=0, mode="clip") for x in (dataset.images, dataset.labels))
      yield images, labels, at < len(dataset.images)


def make_painter(method: Method, view: augment.EvaluationView, mesh: Mesh) -> Callable:
  """Compiles (params, state, uint8 images [n, H, W, C]) -> the method's pictures, whole on every device.

  Images are brought back to [0, 1].

  The same images get the same random numbers whenever they are drawn.
  """
  mean, std = np.array(view.mean or 0.0), np.array(view.std or 1.0)

  def paint(params, state, images):
    assert method.pictures is not None
    keys = augment.example_keys(0, jnp.int32(0), jnp.arange(len(images)))
    drawn = method.pictures(params, state, augment.evaluation_view(images, view), keys)
    return jax.tree.map(lambda x: jnp.clip(x * std + mean, 0, 1) if x.ndim == 4 else x, drawn)

  return jax.jit(paint, out_shardings=parallel.replicated(mesh))


def knn_accuracy(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  labels: np.ndarray,
  *,
  k: int,
  temperature: float,
  exclude: np.ndarray | None = None,
  mesh: Mesh | None = None,
) -> dict[str, float]:
  """Top-1 and top-5 in percent: {"top1", "top5"}. See `knn.knn_predict`; `exclude` as there.

  With a `mesh` each of its devices holds and searches its part of the bank; the answer is the same.
  """
  num_classes = int(max(bank_labels.max(), labels.max())) + 1
  if mesh is None or mesh.size == 1:
    settings: dict[str, Any] = dict(k=k, temperature=temperature, num_classes=num_classes, exclude=exclude)
    return knn.accuracy(knn.knn_predict(bank, bank_labels, queries, **settings), labels, k=k)
  knn.check_finite(bank=bank, queries=queries)
  fill = -len(bank) % mesh.size
  filled = np.pad(bank, ((0, fill), (0, 0))), np.pad(bank_labels, (0, fill), constant_values=-1)
  parts, part_labels = parallel.put_split(mesh, filled)
  exclude = np.full(len(queries), -1) if exclude is None else exclude
  search = _sharded_search(mesh, min(k, len(bank)), temperature, num_classes)
  return knn.accuracy(np.asarray(search(parts, part_labels, queries, exclude)), labels, k=k)


@functools.lru_cache(maxsize=8)  # one compilation for all evaluations of a run
def _sharded_search(mesh, k, temperature, num_classes):
  def search(bank, labels, queries, exclude):
    settings = dict(k=k, temperature=temperature, num_classes=num_classes, axis_name=AXIS)
    return knn.knn_predict(bank, labels, queries, exclude=exclude, **settings)

  specs = P(AXIS), P(AXIS), P(), P()
  return jax.jit(jax.shard_map(search, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))


def pixel_baselines(bank: Dataset, queries: Dataset, *, k: int, temperature: float) -> dict[str, float]:
  """Top-1 in percent of k-NN on the pixels themselves: raw, centred and standardised by the bank's statistics.

  Also of guessing the most frequent class. Both sets are in memory. Images larger than 64x64 are left out: as floats
  their pixels would fill it.
  """

  def flat(dataset):
    return dataset.images.reshape(len(dataset.images), -1).astype(np.float32) / 255

  counts = np.bincount(bank.labels)
  out = {"guessing_top1": float(100 * np.sum(queries.labels == np.argmax(counts)) / len(queries.labels))}
  if bank.images[0].size > 64 * 64 * 3:
    return out
  a, b = flat(bank), flat(queries)
  mean, std = a.mean(axis=0), a.std(axis=0)
  std[std == 0] = 1  # a pixel that never changes
  forms: dict[str, tuple[Any, Any]] = {
    "pixels_top1": (0, 1),
    "pixels_centred_top1": (mean, 1),
    "pixels_standardised_top1": (mean, std),
  }
  for name, (m, s) in forms.items():
    score = knn_accuracy((a - m) / s, bank.labels, (b - m) / s, queries.labels, k=k, temperature=temperature)
    out[name] = score["top1"]
  return out


def match(bank: Dataset, queries: Dataset) -> tuple[Dataset, Dataset]:
  """Makes two sets comparable: both streamed if one is, and the queries' classes numbered as the bank's.

  Raises:
    UserError: the queries have classes that the bank has not.
  """
  if bank.classes != queries.classes and bank.classes and queries.classes:
    unknown = [name for name in queries.classes if name not in bank.classes]
    if unknown:
      raise UserError(
        f"{queries.name} {queries.split!r} has classes that {bank.split!r} has not: {', '.join(unknown)}."
      )
    number = np.array([bank.classes.index(name) for name in queries.classes], np.int32)
    labels = np.where(queries.labels < 0, -1, number[queries.labels])
    images = dataclasses.replace(queries.images, labels=labels) if queries.is_streamed else queries.images
    queries = queries._replace(images=images, labels=labels, classes=bank.classes)
  if bank.is_streamed or queries.is_streamed:
    return stream.as_streamed(bank), stream.as_streamed(queries)
  return bank, queries


def thinned(dataset: Dataset, count: int) -> Dataset:
  """At most `count` images, evenly spaced, since a folder's are sorted by class: a bank of bounded size."""
  if len(dataset.images) <= count:
    return dataset
  taken = np.arange(count) * len(dataset.images) // count
  images = dataset.images.take(taken) if dataset.is_streamed else dataset.images[taken]
  return dataset._replace(images=images, labels=None if dataset.labels is None else dataset.labels[taken])


class Restored(NamedTuple):
  """An encoder from a run: `encoder.apply(variables, images, train=False)` gives its features."""

  encoder: nn.Module
  variables: dict[str, Any]
  step: int
  config: Any


def restore_encoder(workdir: str | os.PathLike, step: int | None = None) -> Restored:
  """Restores the encoder that a run's method evaluates, onto this process's devices, however many wrote it.

  Args:
    workdir: what train.py wrote to.
    step: which checkpoint; None: the newest.

  Raises:
    UserError: there is no such run or checkpoint, or it cannot be read.
  """
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} is not a run: it has no config.json.")
  config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
  folder = workdir / "checkpoints"
  found = checkpoint.steps(folder)
  step = next(iter(found), None) if step is None else step
  if step not in found:
    raise UserError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}.")
  method, encoder = build.method(config, 1, 1)
  views = configs.views(config)

  def init():
    keys = augment.example_keys(config.seed, jnp.int32(0), jnp.arange(1))
    image = jnp.zeros((1, views[0].size, views[0].size, config.data.channels), jnp.uint8)
    return method.init(jax.random.key(0), augment.make_views(keys, image, views))

  params, state = parallel.abstract(jax.eval_shape(init), parallel.replicated(parallel.make_mesh()))
  try:
    restored = checkpoint.restore(folder, step, {"params": params, "state": state})
  except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
    raise UserError(f"the checkpoint of step {step} cannot be read: {checkpoint.first_line(error)}") from error
  variables = method.encoder(restored["params"], restored["state"])
  return Restored(encoder, variables, step, config)
