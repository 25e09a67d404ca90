"""A classifier's answers on the test images, and the figures made of them: accuracies with their intervals."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.evaluation.intervals import mean_of_shares, wilson


class Scored(NamedTuple):
  """What a classifier answered.

  Attributes:
    answers: int [n], of each test image.
    among_five: bool [n], whether its class is among the five best answers.
    chosen: what was chosen on held-out images, a number or a text by its name.
  """

  answers: np.ndarray
  among_five: np.ndarray
  chosen: Mapping[str, float | str] = {}


def scored(logits: np.ndarray, labels: np.ndarray, chosen: Mapping[str, float | str], most: int = 5) -> Scored:
  """The answers by logits [n, K]; of equal ones the smaller class. `most` < 5: of fewer answers than five."""
  order = np.argsort(-np.asarray(logits), axis=1, kind="stable")[:, :most]
  return Scored(order[:, 0], np.any(order == labels[:, None], axis=1), chosen)


def summarise(draws: Sequence[Scored], labels: np.ndarray) -> dict[str, Any]:
  """Means over the draws, in percent, of "top1", "top5" and "balanced", the mean over the classes of each one's top-1.

  Beside each NAME are "NAME_low" and "NAME_high", its 95 % interval over the test images: Wilson's, and of the balanced
  accuracy `mean_of_shares`; and, of several draws, "NAME_std", their standard deviation. What was chosen is the middle
  one of the draws, of texts the most frequent.
  """
  n = len(labels)
  shares = per_class(draws, labels)
  each = {
    "top1": [100 * np.sum(x.answers == labels) / n for x in draws],
    "top5": [100 * np.sum(x.among_five) / n for x in draws],
    "balanced": [100 * np.mean([np.mean(x.answers[labels == c] == c) for c in np.unique(labels)]) for x in draws],
  }
  figures: dict[str, Any] = {name: float(np.mean(values)) for name, values in each.items()}
  limits = {name: wilson(figures[name], n) for name in ("top1", "top5")} | {"balanced": mean_of_shares(*shares)}
  for name, (low, high) in limits.items():
    figures |= {f"{name}_low": low, f"{name}_high": high}
  if len(draws) > 1:
    figures |= {f"{name}_std": float(np.std(values, ddof=1)) for name, values in each.items()}
  for name, value in draws[0].chosen.items():
    middle = statistics.mode if isinstance(value, str) else statistics.median_high
    figures[name] = middle([x.chosen[name] for x in draws])
  return figures


def per_class(draws: Sequence[Scored], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(top-1 in percent, number of test images) of the classes that have test images, in their order; mean over draws."""
  right = np.mean([x.answers == labels for x in draws], axis=0)
  classes = np.unique(labels)
  counts = np.array([np.sum(labels == c) for c in classes])
  return np.array([100 * right[labels == c].mean() for c in classes]), counts


def confusion(draws: Sequence[Scored], labels: np.ndarray, num_classes: int) -> np.ndarray:
  """int [K, K]: how many test images of class i were answered j, summed over the draws."""
  counts = np.zeros((num_classes, num_classes), int)
  for x in draws:
    np.add.at(counts, (labels, x.answers), 1)
  return counts
