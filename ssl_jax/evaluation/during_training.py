"""What a run looks at while it trains: how good its encoder or its classifier is, and the method's pictures."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ssl_jax.evaluation import accuracy, intervals, judge, knn
from ssl_jax.run import cluster
from ssl_jax.training import TrainState

if TYPE_CHECKING:
  from ssl_jax.build import Run

PICTURES = 8  # images that pictures are drawn of


def evaluate(run: "Run", train: TrainState, step: int) -> dict[str, Any]:
  """The row of an evaluation: the k-NN; without labels what `judge` measures. All processes come here."""
  variables, when = run.method.encoder(train.params, train.state), {"step": step, "epoch": step / run.steps_per_epoch}
  if run.bank is None or run.test_set is None:
    looked_at = run.train_set.thinned(judge.IMAGES_IN_A_RUN)
    found = judge.measure(run.extractor.all(variables, looked_at).features)
    found |= judge.aligned(run.extractor, variables, looked_at, run.views[0])
    return when | {f"encoder_{name}": value for name, value in found.items()}
  if run.classifier:
    return classified(run, train, step)
  features, labels, queries, answers = *run.extractor(variables, run.bank), *run.extractor(variables, run.test_set)
  settings = dict(k=min(run.config.knn.k, len(features)), temperature=run.config.knn.temperature)
  scores = accuracy.knn_accuracy(features, labels, queries, answers, mesh=run.mesh, **settings)
  row = when | {f"knn_{name}": x for name, x in scores.items()}
  if step == 0 and cluster.is_main():  # alone: nothing here needs the other processes
    row["guessing_top1"] = accuracy.guessing(labels, answers)
    row |= accuracy.pixel_baselines(run.bank, run.test_set, run.eval_view, **settings)
  return row


def classified(run: "Run", train: TrainState, step: int) -> dict[str, Any]:
  """The row of an objective that takes labels: accuracies on the test images, and the 95 % interval over these."""
  assert run.classifier and run.method.classifier and run.bank and run.test_set
  logits, answers = run.classifier(run.method.classifier.variables(train.params, train.state), run.test_set)
  scores = knn.accuracy(logits, answers, k=5)
  low, high = intervals.wilson(scores["top1"], len(answers))
  row = {"step": step, "epoch": step / run.steps_per_epoch} | {f"test_{name}": x for name, x in scores.items()}
  row |= {"test_top1_low": low, "test_top1_high": high, "test_images": len(answers)}
  if step == 0 and run.bank.labels is not None:
    row["guessing_top1"] = accuracy.guessing(run.bank.labels, answers)
  return row


def pictures(run: "Run", train: TrainState) -> Any:
  """The method's pictures of a few images; None where it has none. All processes come here."""
  if run.painter is None:
    return None
  shown = (run.test_set or run.train_set).thinned(PICTURES)
  images, _, keep = next(iter(shown.in_order(run.eval_view, len(shown))))
  return jax.device_get(run.painter(train.params, train.state, np.asarray(images)[keep]))
