"""What a run looks at while it trains: the k-NN accuracy of its encoder, and the method's pictures."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ssl_jax.evaluation import accuracy
from ssl_jax.run import cluster
from ssl_jax.training import TrainState

if TYPE_CHECKING:
  from ssl_jax.build import Run

PICTURES = 8  # images that pictures are drawn of


def evaluate(run: "Run", train: TrainState, step: int) -> dict[str, Any] | None:
  """The row of an evaluation; None where there are no labels. All processes come here."""
  if run.bank is None or run.test_set is None:
    return None
  variables = run.method.encoder(train.params, train.state)
  features, labels, queries, answers = *run.extractor(variables, run.bank), *run.extractor(variables, run.test_set)
  settings = dict(k=min(run.config.knn.k, len(features)), temperature=run.config.knn.temperature)
  scores = accuracy.knn_accuracy(features, labels, queries, answers, mesh=run.mesh, **settings)
  row = {"step": step, "epoch": step / run.steps_per_epoch} | {f"knn_{name}": x for name, x in scores.items()}
  if step == 0 and cluster.is_main():  # alone: nothing here needs the other processes
    row["guessing_top1"] = accuracy.guessing(labels, answers)
    row |= accuracy.pixel_baselines(run.bank, run.test_set, run.eval_view, **settings)
  return row


def pictures(run: "Run", train: TrainState) -> Any:
  """The method's pictures of a few images; None where it has none. All processes come here."""
  if run.painter is None:
    return None
  shown = (run.test_set or run.train_set).thinned(PICTURES)
  images, _, keep = next(iter(shown.in_order(run.eval_view, len(shown))))
  return jax.device_get(run.painter(train.params, train.state, np.asarray(images)[keep]))
