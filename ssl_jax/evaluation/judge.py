"""A look at features without labels: the measures of `without_labels` on a bounded number of images, and neighbours."""

from typing import Any

import numpy as np

from ssl_jax.augment import EvaluationView, View
from ssl_jax.data import Dataset
from ssl_jax.data.crop import centre_crop
from ssl_jax.evaluation import without_labels
from ssl_jax.evaluation.features import Extractor

# Images whose features are measured. Of 2,048 images with 3,136 features each the singular values take 2.5 s on a core,
# of 512 half a second: an evaluation within a run should not wait.
IMAGES, IMAGES_IN_A_RUN = 2048, 512
PAIRS = 256  # images that two views are drawn of
SHOWN, NEAREST = 12, 5  # images of the picture, and neighbours of each


def measure(features: np.ndarray) -> dict[str, float]:
  """{"rankme", "effective_rank", "uniformity"} of features [n, d]."""
  names = ("rankme", "effective_rank", "uniformity")
  return {name: float(getattr(without_labels, name)(features)) for name in names}


def aligned(extractor: Extractor, variables: Any, dataset: Dataset, view: View) -> dict[str, float]:
  """{"alignment"} of two views of each of `PAIRS` images. All processes come here."""
  return {"alignment": float(without_labels.alignment(*extractor.pairs(variables, dataset, view, PAIRS)))}


def nearest(features: np.ndarray, queries: np.ndarray, count: int = NEAREST) -> tuple[np.ndarray, np.ndarray]:
  """The rows of the highest cosine similarity to each of some rows, not itself.

  Args:
    features: float [n, d].
    queries: int [q], rows.
    count: of neighbours; n - 1 where there are no more.

  Returns:
    (rows int [q, count], similarities [q, count]), the nearest first.
  """
  unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
  similarity = unit[queries] @ unit.T
  similarity[np.arange(len(queries)), queries] = -np.inf
  rows = np.argsort(-similarity, axis=1, kind="stable")[:, : min(count, len(features) - 1)]
  return rows, np.take_along_axis(similarity, rows, axis=1)


def columns(
  dataset: Dataset, indices: np.ndarray, view: EvaluationView, queries: np.ndarray, found: dict[str, np.ndarray]
) -> list[tuple[str, list[np.ndarray]]]:
  """What `plots.draw_grid` draws: some images, and beside each its nearest neighbours by several kinds of features.

  Args:
    dataset: the images.
    indices: int [n], which of them the rows of the features are of.
    view: how they are cut.
    queries: int [q], rows: the images.
    found: int [q, count] by the kind's name, rows: their neighbours.
  """

  def pictures(rows):
    return [centre_crop(dataset.original(int(indices[row])), view) / 255 for row in rows]

  beside = [(f"{name}\n{i + 1}", pictures(rows[:, i])) for name, rows in found.items() for i in range(rows.shape[1])]
  return [("image", pictures(queries)), *beside]
