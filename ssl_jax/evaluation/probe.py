"""A linear classifier on frozen features: which images are labelled, which of them choose the penalty, and its score.

As in eval/log_regression.py of facebookresearch/dinov2: logistic regression on the features as the encoder gives them,
not normalised; of 45 penalties the best on a held-out tenth of the training images; refitted on all of them.
"""

from typing import NamedTuple

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluation.linear import choose_penalty, logistic_regression
from ssl_jax.evaluation.scores import Scored, scored

PENALTIES = tuple(np.logspace(-6, 5, 45).tolist())  # C


class Labels(NamedTuple):
  """How many training images are labelled: a share of each class, or a number of each.

  Attributes:
    share: in (0, 1]; None: `each` counts.
    each: images of every class.
  """

  share: float | None = 1.0
  each: int = 0

  def of(self, count: int) -> int:
    """How many of the `count` images of a class: at least one, and no more than there are."""
    return min(count, self.each if self.share is None else max(1, round(self.share * count)))


def parse_labels(text: str, key: str = "--labels") -> Labels:
  """ "all", "1%" or "5-per-class". Raises UserError, with the name of the `key`, for anything else."""
  number, percent, rest = text.partition("%")
  try:
    if text == "all":
      return Labels()
    if percent and not rest and 0 < float(number) <= 100:
      return Labels(float(number) / 100)
    if text.endswith("-per-class") and int(text.removesuffix("-per-class")) > 0:
      return Labels(None, int(text.removesuffix("-per-class")))
  except ValueError:
    pass
  raise UserError(f"{key} must be all, a percentage such as 1%, or a number such as 5-per-class, got {text!r}.")


def check_classes(labels: np.ndarray, test_labels: np.ndarray, wanted: Labels, chooses: bool = True) -> None:
  """Raises UserError where a classifier cannot be trained on so many of these labels, or cannot know a class it meets.

  Labels below 0 are those of images without one. `chooses`: something is chosen on held-out images.
  """
  counts = np.bincount(labels[labels >= 0])
  classes = np.flatnonzero(counts)
  missing = np.setdiff1d(test_labels[test_labels >= 0], classes)
  if missing.size:
    raise UserError(f"the training split has no image of {_classes(missing)}, which the test split has.")
  if len(classes) < 2:
    raise UserError("all labelled images of the training split are of one class: there is nothing to tell apart.")
  if wanted.share is None and (few := np.flatnonzero((counts > 0) & (counts < wanted.each))).size:
    raise UserError(f"--labels={wanted.each}-per-class is more than there are of {_classes(few)}.")
  if wanted.share is not None and round(wanted.share * counts.sum()) < len(classes):
    raise UserError(
      f"--labels={100 * wanted.share:g}% of {counts.sum():,} images is fewer than the {len(classes)} classes."
    )
  if chooses and max(map(wanted.of, counts.tolist())) < 2:
    raise UserError(
      "one labelled image a class leaves none to choose on: take two a class at least, or leave no choice (--C=1)."
    )


def _classes(numbers):
  shown = ", ".join(map(str, numbers[:5]))
  return f"class{'' if len(numbers) == 1 else 'es'} {shown}{' and more' if len(numbers) > 5 else ''}"


def draw_labelled(labels: np.ndarray, wanted: Labels, rng: np.random.Generator) -> np.ndarray:
  """Indices, in order, of the images whose labels are used: of each class so many as `wanted` says, drawn."""
  drawn = []
  for c in np.unique(labels):
    at = np.flatnonzero(labels == c)
    drawn.append(rng.permutation(at)[: wanted.of(len(at))])
  return np.sort(np.concatenate(drawn))


def hold_out(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """bool [n]: a tenth of the images, at least one, as evenly from all classes as can be; each class keeps one."""
  place = np.empty(len(labels))
  for c in np.unique(labels):
    at = rng.permutation(np.flatnonzero(labels == c))
    place[at] = (np.arange(len(at)) + rng.uniform()) / len(at)  # evenly in [0, 1), from a drawn start on
    place[at[0]] = -1  # stays
  held = np.zeros(len(labels), bool)
  held[np.argsort(-place)[: max(1, len(labels) // 10)]] = True
  return held & (place >= 0)


def score(
  features: np.ndarray,
  labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  penalties: tuple[float, ...],
  rng: np.random.Generator,
) -> Scored:
  """The answers of the refitted classifier, and its C. See the file's first lines."""
  num_classes = int(labels.max()) + 1
  chosen = penalties[0]
  if len(penalties) > 1:
    chosen, _ = choose_penalty(features, labels, hold_out(labels, rng), penalties, num_classes)
  found = logistic_regression(features, labels, C=chosen, num_classes=num_classes)
  return scored(test_features @ found.coef[0].T + found.intercept[0], test_labels, {"C": chosen})
