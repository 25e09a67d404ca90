"""What training does to features that were good when it began: which evaluated state is to be handed back."""

import io
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import monitors
from ssl_jax.errors import UserError
from ssl_jax.run import cluster, whole
from ssl_jax.training import TrainState

if TYPE_CHECKING:
  from ssl_jax.build import Run

IMAGES = 512  # of the training split, whose features are compared with those at the start
LEAST_RANK = 0.5  # of the effective rank at the start


def measure(
  run: "Run", train: TrainState, step: int, workdir: pathlib.Path, accuracy: float | None
) -> dict[str, float]:
  """What an evaluation's row says beside the k-NN. All processes come here.

  "start_cosine" is the mean cosine of features to those of the same images at step 0, which are kept in
  WORKDIR/start_features.npy, a row an image, NaN where it could not be read; "start_rank" is the effective rank as a
  share of that at step 0. "guard" is by what states are compared: the k-NN's top-1; without labels the step where the
  rank is at least half of the start's, else -1.
  """
  variables = run.method.encoder(train.params, train.state)
  images = run.train_set.thinned(IMAGES)
  found = run.extractor.all(variables, images)
  if not cluster.is_main():  # which alone writes rows
    return {}
  path = workdir / "start_features.npy"
  now = np.full((len(images), found.features.shape[1]), np.nan, np.float32)
  now[found.indices] = found.features
  if step == 0:
    held = io.BytesIO()  # NumPy writes a file itself past Python, and of a full disk only says how much it wrote
    np.save(held, now)
    with whole.file(path) as scratch:
      scratch.write_bytes(held.getvalue())
  try:
    start = np.load(path)
    if start.shape != now.shape:
      raise ValueError(f"it holds {start.shape}, and the features are {now.shape}")
  except (OSError, EOFError, ValueError) as error:
    told = f"{path}, with which this run compares its features, is gone or damaged ({error}): begin anew."
    raise UserError(told) from error
  both = np.isfinite(now[:, 0]) & np.isfinite(start[:, 0])  # readable then and now
  now, start = now[both], start[both]
  norms = np.linalg.norm(now, axis=1) * np.linalg.norm(start, axis=1)
  cosine = np.mean(np.sum(now * start, axis=1) / np.maximum(norms, 1e-12))
  rank, at_start = (float(jax.jit(monitors.measure)(jnp.asarray(x)[:, None])["effective_rank"]) for x in (now, start))
  kept = step if rank >= LEAST_RANK * at_start else -1
  score = kept if accuracy is None else accuracy
  return {"start_cosine": float(cosine), "start_rank": rank / at_start, "guard": float(score)}


def best_step(rows: Sequence[dict[str, Any]]) -> int | None:
  """The step of the best row, the latest of equals; None: none was judged."""
  judged = [(row["guard"], row["step"]) for row in rows if "guard" in row]
  return max(judged)[1] if judged else None


def in_words(rows: Sequence[dict[str, Any]]) -> list[str]:
  """What became of the features, for people."""
  judged = [row for row in rows if "guard" in row]
  if not judged:
    return []
  best = best_step(judged)
  last = judged[-1]
  if "knn_top1" in last:
    worst = min(judged, key=lambda row: row["knn_top1"])
    by_step = {row["step"]: row["knn_top1"] for row in judged}
    told = f"k-NN {by_step[judged[0]['step']]:.2f} % at the start, {worst['knn_top1']:.2f} % at the worst (step "
    told += f"{worst['step']}), {last['knn_top1']:.2f} % at the end, {by_step[best]:.2f} % at the best (step {best})"
  else:
    least = min(row["start_rank"] for row in judged)
    told = (
      f"effective rank {100 * least:.0f} % of the start's at the least, {100 * last['start_rank']:.0f} % at the end"
    )
  told += f"; cosine to the start {last['start_cosine']:.3f} at the end"
  start = judged[0]
  outcome = "the start was best, and this training made the features worse: " if best == 0 else ""
  if best != 0 and "knn_top1" in last and by_step[best] == start["knn_top1"]:
    outcome = "no state was better than the start, and of equal ones the latest counts: "
  return [told, f"{outcome}restore_encoder and every evaluation take step {best}"]
