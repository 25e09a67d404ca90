"""What features are worth: k-NN accuracy on all devices, and that of the pixels themselves."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ssl_jax import parallel
from ssl_jax.augment import EvaluationView
from ssl_jax.data import Dataset
from ssl_jax.evaluation import knn
from ssl_jax.methods.base import AXIS

LARGEST = 64 * 64 * 3  # numbers of an image; as floats, the pixels of larger ones would fill the memory


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
  """Accuracies in percent, as of `knn.accuracy`: {"top1", "top5", "balanced"}; arguments as of `knn_scores`."""
  scores = knn_scores(bank, bank_labels, queries, labels, k=k, temperature=temperature, exclude=exclude, mesh=mesh)
  return knn.accuracy(scores, labels, k=k)


def knn_scores(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  labels: np.ndarray,
  *,
  k: int,
  temperature: float,
  exclude: np.ndarray | None = None,
  mesh: Mesh | None = None,
) -> np.ndarray:
  """The queries' scores [Q, C], as of `knn.knn_predict`, which says what `exclude` is; `labels` only count the classes.

  With a `mesh` each of its devices holds and searches its part of the bank; the answer is the same.
  """
  num_classes = int(max(bank_labels.max(), labels.max())) + 1
  if mesh is None or mesh.size == 1:
    settings: dict[str, Any] = dict(k=k, temperature=temperature, num_classes=num_classes, exclude=exclude)
    return np.asarray(knn.knn_predict(bank, bank_labels, queries, **settings))
  knn.check_finite(bank=bank, queries=queries)
  fill = -len(bank) % mesh.size
  filled = np.pad(bank, ((0, fill), (0, 0))), np.pad(bank_labels, (0, fill), constant_values=-1)
  parts, part_labels = parallel.put_split(mesh, filled)
  exclude = np.full(len(queries), -1) if exclude is None else exclude
  search = _sharded_search(mesh, min(k, len(bank)), temperature, num_classes)
  return np.asarray(search(parts, part_labels, queries, exclude))


@functools.lru_cache(maxsize=8)  # one compilation for all evaluations of a run
def _sharded_search(mesh, k, temperature, num_classes):
  def search(bank, labels, queries, exclude):
    settings = dict(k=k, temperature=temperature, num_classes=num_classes, axis_name=AXIS)
    return knn.knn_predict(bank, labels, queries, exclude=exclude, **settings)

  specs = P(AXIS), P(AXIS), P(), P()
  return jax.jit(jax.shard_map(search, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))


def pixel_baselines(
  bank: Dataset, queries: Dataset, view: EvaluationView, *, k: int, temperature: float
) -> dict[str, float]:
  """Top-1 in percent of k-NN on the pixels themselves: raw, centred and standardised by the bank's statistics.

  Empty where the pixels are not to be had cheaply (`Dataset.pixels`). Images without a label are left out.
  """
  flat, labels = [], []
  for dataset in (bank, queries):
    pixels = dataset.pixels(view, LARGEST)
    if pixels is None or dataset.labels is None:
      return {}
    known = dataset.labels >= 0
    flat.append(pixels[known].reshape(int(np.sum(known)), -1).astype(np.float32) / 255)
    labels.append(dataset.labels[known])
  a, b = flat
  mean, std = a.mean(axis=0), a.std(axis=0)
  std[std == 0] = 1  # a pixel that never changes
  forms: dict[str, tuple[Any, Any]] = {
    "pixels_top1": (0, 1),
    "pixels_centred_top1": (mean, 1),
    "pixels_standardised_top1": (mean, std),
  }
  out = {}
  for name, (m, s) in forms.items():
    score = knn_accuracy((a - m) / s, labels[0], (b - m) / s, labels[1], k=k, temperature=temperature)
    out[name] = score["top1"]
  return out


def guessing(bank_labels: np.ndarray, labels: np.ndarray) -> float:
  """Top-1 in percent of answering the bank's most frequent class."""
  return float(100 * np.sum(labels == np.argmax(np.bincount(bank_labels))) / len(labels))
