"""Pictures of a run: its curves, a method's pictures, the views of a batch."""

import pathlib
from typing import Any

import numpy as np

from ssl_jax.run import whole
from ssl_jax.run.log import read_rows


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
  key, label = (
    ("test_top1", "test images") if any("test_top1" in x for x in rows) else ("knn_top1", "k-NN of the encoder")
  )
  scores = [(row["step"], row[key]) for row in rows if key in row]
  if scores:
    right.plot(*np.array(scores).T, marker="o", label=label)
    first = next(row for row in rows if key in row)
    for line, style in (("pixels_top1", "--"), ("guessing_top1", ":")):
      if line in first:
        right.axhline(first[line], color="gray", linestyle=style, label=line.removesuffix("_top1"))
    right.legend()
    right.set(xlabel="step", ylabel="top-1 (%)")
  else:
    for key, style in (("encoder_rankme", "-"), ("encoder_effective_rank", "--")):
      if ranks := [(row["step"], row[key]) for row in rows if key in row]:
        right.plot(*np.array(ranks).T, marker="o", linestyle=style, label=key.removeprefix("encoder_"))
        right.legend()
    right.set(xlabel="step", ylabel="directions that the features use")
    right.set_title("no labels, no k-NN", fontsize=8)
  with whole.file(workdir / "curves.png") as scratch:
    figure.savefig(scratch, dpi=120, format="png")


def draw_pictures(path: pathlib.Path, pictures: Any, title: str) -> None:
  """Draws a method's `Pictures` (see methods/base.py), one row an image, into a PNG file."""
  columns = []
  for name, value in pictures._asdict().items():
    parts = value if isinstance(value, tuple) else (value,)
    columns += [(name if len(parts) == 1 else f"{name} {i + 1}", np.asarray(x)) for i, x in enumerate(parts)]
  draw_grid(path, columns, title)


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
  with whole.file(path) as scratch:
    figure.savefig(scratch, dpi=100, format=path.suffix[1:])
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
