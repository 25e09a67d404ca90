"""k-NN accuracy of an encoder, of its untrained self and of raw pixels, all on the same images."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from ssl_jax import augment, knn, parallel
from ssl_jax.data import Dataset


def make_extractor(encoder: nn.Module, view: augment.EvaluationView, mesh: Mesh) -> Callable:
  """Compiles (variables, uint8 images [b, H, W, C] split over the mesh) -> float32 features [b, d], gathered."""

  def extract(variables, images):
    return encoder.apply(variables, augment.evaluation_view(images, view), train=False)

  return parallel.compile_map(extract, mesh)


def features(extractor: Callable, variables: Any, images: np.ndarray, batch_size: int, mesh: Mesh) -> np.ndarray:
  """Features float32 [n, d] of uint8 images [n, H, W, C], `batch_size` at a time; the last batch is filled up."""
  out = []
  for start in range(0, len(images), batch_size):
    part = images[start : start + batch_size]
    filled = np.concatenate([part, np.repeat(part[:1], batch_size - len(part), axis=0)])
    out.append(np.asarray(extractor(variables, parallel.put_batch(mesh, filled)))[: len(part)])
  return np.concatenate(out)


def knn_accuracy(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  labels: np.ndarray,
  *,
  k: int,
  temperature: float,
  exclude: np.ndarray | None = None,
) -> dict[str, float]:
  """Top-1 and top-5 in percent: {"top1", "top5"}. See `knn.knn_predict`; `exclude` as there."""
  scores = knn.knn_predict(
    bank,
    bank_labels,
    queries,
    k=k,
    temperature=temperature,
    num_classes=int(max(bank_labels.max(), labels.max())) + 1,
    exclude=exclude,
  )
  return knn.accuracy(scores, labels, k=k)


def pixel_baselines(bank: Dataset, queries: Dataset, *, k: int, temperature: float) -> dict[str, float]:
  """Top-1 in percent of k-NN on the pixels themselves: raw, centred and standardised by the bank's statistics."""

  def flat(dataset):
    return dataset.images.reshape(len(dataset.images), -1).astype(np.float32) / 255

  a, b = flat(bank), flat(queries)
  mean, std = a.mean(axis=0), a.std(axis=0)
  std[std == 0] = 1  # a pixel that never changes
  forms: dict[str, tuple[Any, Any]] = {
    "pixels_top1": (0, 1),
    "pixels_centred_top1": (mean, 1),
    "pixels_standardised_top1": (mean, std),
  }
  out = {}
  for name, (m, s) in forms.items():
    score = knn_accuracy((a - m) / s, bank.labels, (b - m) / s, queries.labels, k=k, temperature=temperature)
    out[name] = score["top1"]
  counts = np.bincount(bank.labels)
  out["guessing_top1"] = float(100 * np.sum(queries.labels == np.argmax(counts)) / len(queries.labels))
  return out


def first_images(dataset: Dataset, count: int) -> Dataset:
  """The first `count` images: a bank of bounded size."""
  return dataset._replace(images=dataset.images[:count], labels=dataset.labels[:count])
