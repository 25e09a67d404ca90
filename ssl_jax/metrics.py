"""What a run says about itself: collapse monitors, rows on disk, the curves."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

_ROWS = 256  # of the Gram matrix: enough to see a collapse, too few to cost anything
# Below these a batch of embeddings is collapsed: random ones have about 1, and about min(rows, d). A healthy ViT may
# begin at a rank of 1.6.
COLLAPSED_STD, COLLAPSED_RANK = 0.1, 1.1
UNIFORM_TEACHER, ONE_PROTOTYPE = 0.995, 0.1  # entropies as shares of log K


def monitors(embedding: jax.Array, marginal: jax.Array | None = None) -> dict[str, jax.Array]:
  r"""Collapse monitors of one batch, as in Wang and Isola, 2020, arXiv:2005.10242, for the last two.

  Args:
    embedding: float [n, v, d], one view or two of each example, of any norm.
    marginal: float [K], the batch's mean distribution over prototypes, for methods that have them.

  Returns:
    float32 scalars:
    "feature_std": mean over dimensions of the standard deviation of the unit vectors, times sqrt(d): about 1 where they
      spread evenly, 0 where all are one point;
    "effective_rank": (sum of eigenvalues)^2 / sum of their squares of the covariance of at most 256 rows, from their
      Gram matrix without an eigendecomposition: between 1 and min(d, rows - 1);
    "alignment": mean squared distance of an example's two views, 0 to 4; not there for one view;
    "uniformity": log of the mean of exp(-2 distance^2) over pairs of the same rows, 0 where all are one point;
    "marginal_entropy": of `marginal`, as a share of log K: near 0 all images fall on one prototype, which neither the
      loss nor a k-NN shows; not there without one.
  """
  z = embedding.astype(jnp.float32)
  z = z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))
  first = z[:, 0]
  rows = first[:_ROWS]
  n = rows.shape[0]
  centred = rows - jnp.mean(rows, axis=0, keepdims=True)
  with jax.default_matmul_precision("highest"):
    gram, covariance = rows @ rows.T, centred @ centred.T
  pairs = jnp.where(jnp.eye(n, dtype=bool), 0.0, jnp.exp(4.0 * gram - 4.0))  # |a - b|^2 = 2 - 2 <a, b>
  monitors = {
    "feature_std": jnp.mean(jnp.std(first, axis=0)) * math.sqrt(z.shape[-1]),
    "effective_rank": jnp.square(jnp.trace(covariance)) / jnp.maximum(jnp.sum(jnp.square(covariance)), 1e-12),
    "uniformity": jnp.log(jnp.sum(pairs) / (n * (n - 1))) if n > 1 else jnp.float32(0),
  }
  if z.shape[1] > 1:
    monitors["alignment"] = jnp.mean(jnp.sum(jnp.square(z[:, 0] - z[:, 1]), axis=-1))
  if marginal is not None:
    entropy = -jnp.sum(marginal * jnp.log(jnp.maximum(marginal, 1e-30)))
    monitors["marginal_entropy"] = entropy / math.log(marginal.shape[0])
  return monitors


def collapse_warning(row: dict[str, Any]) -> str | None:
  """A sentence for the user if a row's monitors say that the features have collapsed.

  Rows without "alignment" are of a method with one view, which asks for no invariance and so cannot collapse.
  """
  if "alignment" not in row:
    return None
  if row["feature_std"] < COLLAPSED_STD:
    return (
      f"the features have collapsed: at step {row['step']} all images have nearly the same embedding "
      f"(feature_std {row['feature_std']:.3f}, healthy is about 1)."
    )
  if row["effective_rank"] < COLLAPSED_RANK:
    return (
      f"the features have collapsed: at step {row['step']} the embeddings lie on a line "
      f"(effective_rank {row['effective_rank']:.2f}, healthy is many)."
    )
  if row.get("teacher_entropy", 0.0) > UNIFORM_TEACHER:
    return (
      f"the teacher is uniform at step {row['step']} (teacher_entropy {row['teacher_entropy']:.3f} of log K): it tells "
      "nothing. A lower teacher temperature helps."
    )
  if row.get("marginal_entropy", 1.0) < ONE_PROTOTYPE:
    return (
      f"the teacher has collapsed: at step {row['step']} nearly all images have the same few prototypes "
      f"(marginal_entropy {row['marginal_entropy']:.3f} of log K). The loss is small and means nothing."
    )
  return None


class Writer:
  """Rows to metrics.jsonl and to TensorBoard; a row is on disk when `write` returns.

  On resume at `step`, rows of later steps, and a line cut short by a kill, are dropped: they will come again.
  """

  def __init__(self, workdir: pathlib.Path, step: int):
    self.path = workdir / "metrics.jsonl"
    kept = [row for row in read_rows(self.path) if row["step"] <= step]
    scratch = self.path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(scratch, self.path)
    self.file = self.path.open("a")
    # Not tensorboardX.SummaryWriter: on a full disk its thread dies, and the next rows would wait for it for ever.
    (workdir / "tensorboard").mkdir(exist_ok=True)
    self.board = event_file_writer.EventsWriter(str(workdir / "tensorboard" / "events"))
    self._log(step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))  # hides later steps

  def write(self, row: dict[str, Any]) -> None:
    """Appends one row; floats are written so that they read back exactly."""
    self.file.write(json.dumps(row) + "\n")
    self.file.flush()
    for name, value in row.items():
      if name != "step":
        self._log(row["step"], summary=summary.scalar(name, value))
    self.board.flush()

  def show(self, name: str, image: np.ndarray, step: int) -> None:
    """Logs an image, uint8 [H, W, 3], to TensorBoard."""
    self._log(step, summary=summary.image(name, image, dataformats="HWC"))

  def _log(self, step: int, **content: Any) -> None:
    self.board.write_event(event_pb2.Event(step=step, wall_time=time.time(), **content))

  def close(self) -> None:
    self.file.close()
    self.board.close()


class NoWriter:
  """What stands in for a `Writer` on the processes that do not write."""

  def write(self, row: dict[str, Any]) -> None: ...

  def show(self, name: str, image: np.ndarray, step: int) -> None: ...

  def close(self) -> None: ...


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """All whole rows of a metrics file; none if it does not exist."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break  # cut short by a kill
  return rows


def draw_curves(workdir: pathlib.Path, chance: float | None, title: str) -> None:
  """Draws curves.png from metrics.jsonl: the loss and its chance level, the k-NN, raw pixels' and guessing."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  figure.suptitle(title)
  rows = read_rows(workdir / "metrics.jsonl")
  losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
  if losses:
    left.plot(*np.array(losses).T, marker=None if len(losses) > 1 else "o", label="loss")  # One point has no line.
  if chance is not None:
    left.axhline(chance, color="gray", linestyle=":", label="chance")
  left.set(xlabel="step", ylabel="loss")
  left.legend()
  scores = [(row["step"], row["knn_top1"]) for row in rows if "knn_top1" in row]
  if scores:
    right.plot(*np.array(scores).T, marker="o", label="k-NN of the encoder")
    first = next(row for row in rows if "knn_top1" in row)
    for key, style in (("pixels_top1", "--"), ("guessing_top1", ":")):
      if key in first:
        right.axhline(first[key], color="gray", linestyle=style, label=key.removesuffix("_top1"))
    right.legend()
  else:
    right.text(0.5, 0.5, "no labels, no k-NN", ha="center", transform=right.transAxes)
  right.set(xlabel="step", ylabel="top-1 (%)")
  figure.savefig(workdir / "curves.png", dpi=120)


def draw_pictures(path: pathlib.Path, pictures: Any, title: str) -> np.ndarray:
  """Draws a method's `Pictures` (see methods/base.py), one row an image, into a PNG file.

  Returns:
    What was drawn, uint8 [H, W, 3].
  """
  columns = []
  for name, value in pictures._asdict().items():
    parts = value if isinstance(value, tuple) else (value,)
    columns += [(name if len(parts) == 1 else f"{name} {i + 1}", np.asarray(x)) for i, x in enumerate(parts)]
  return draw_grid(path, columns, title)


def draw_grid(path: pathlib.Path, columns: list[tuple[str, Any]], title: str, side: float = 1.5) -> np.ndarray:
  """Draws columns of pictures into a PNG file.

  Args:
    path: the file.
    columns: (heading, pictures): float [h, w, c] in [0, 1], of any size; or maps [h, w], which are laid over the first
      column's pictures. Of channels other than 3 the first is drawn.
    title: above all.
    side: of a picture, inches.

  Returns:
    What was drawn, uint8 [H, W, 3].
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  originals = columns[0][1]
  rows = len(originals)
  lines = 1 + max(name.count("\n") for name, _ in columns)
  figure = Figure(
    figsize=(side * len(columns), side * rows + 0.4 + 0.2 * (lines + title.count("\n"))), layout="constrained"
  )
  canvas = FigureCanvasAgg(figure)
  figure.suptitle(title)
  for j, (name, pictures) in enumerate(columns):
    for i, picture in enumerate(pictures):
      axes = figure.add_subplot(rows, len(columns), i * len(columns) + j + 1)
      axes.axis("off")
      if i == 0:
        axes.set_title(name, fontsize=None if lines == 1 else 8)
      shown = picture if picture.ndim == 3 else originals[i]
      axes.imshow(shown if shown.shape[-1] == 3 else shown[..., 0], cmap="gray", vmin=0, vmax=1)
      if picture.ndim == 2:
        axes.imshow(picture, cmap="inferno", alpha=0.7)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=100)
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def format_duration(seconds: float) -> str:
  """'1:02:03' or '02:03'."""
  minutes, seconds = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def nonfinite_leaf(tree: Any) -> str | None:
  """The path of the first array of a tree that holds NaN or infinity."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not jnp.all(jnp.isfinite(leaf)):  # wherever its parts are
      return jax.tree_util.keystr(path, simple=True, separator="/")
  return None


class Clock:
  """Images per second between two questions, leaving out what `restart` follows: compilation, evaluation, saving.

  `share` is the share of that time that was spent `waiting` for input.
  """

  def __init__(self, step: int, batch_size: int):
    self.batch_size, self.rate, self.share = batch_size, 0.0, 0.0
    self.restart(step)

  def restart(self, step: int) -> None:
    self.step, self.time, self.waited = step, time.perf_counter(), 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.waited += time.perf_counter() - start

  def images_per_second(self, step: int) -> float:
    """The rate since the last question or restart; the last one known if no step was taken since."""
    if step > self.step:
      elapsed = time.perf_counter() - self.time
      self.rate, self.share = (step - self.step) * self.batch_size / elapsed, self.waited / elapsed
      self.restart(step)
    return self.rate
