"""Draws views of a recipe's first batch exactly as the network gets them, colours put back.

  python -m ssl_jax.data.show --config=configs/dino_imagenet.py --config.data.folder=DIR --out=views.png [--images=6]

One row an image: the picture as it is, then a column a view, headed by what the recipe does to it.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from ssl_jax import augment, data, metrics
from ssl_jax import config as configs
from ssl_jax.cli import run, say
from ssl_jax.errors import UserError


def first_views(config, dataset: data.Dataset, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """The first images of step 0, and their views.

  Args:
    config: a recipe.
    dataset: what it trains on.
    count: how many images, at most a batch.

  Returns:
    Images uint8 [H, W, C], `count` of them; and for each view float32 [count, size, size, C], as the network gets it.
  """
  views = configs.views(config)
  batch_size = min(config.batch_size, len(dataset.images))  # A look needs no whole batch.
  order = data.batch_indices(len(dataset.images), batch_size, config.seed, 0)[:count]
  if dataset.is_streamed:
    least = data.stream.least_pixels(views, config.data.reduced_decoding)
    read = [data.stream.read_or_next(dataset.images, int(i), least) for i in order]
    cut = [data.stream.cut_views(x, views, (config.seed, 0, j), size) for j, (x, size, _) in enumerate(read)]
    originals = [x for x, _, _ in read]
    images = jax.tree.map(lambda *crops: np.stack(crops), *cut)
  else:
    images = dataset.images[order]
    originals = list(images)
  keys = augment.example_keys(config.seed, jnp.int32(0), jnp.arange(len(order)))
  drawn = jax.jit(augment.make_views, static_argnums=2)(keys, images, views)
  by_view = {
    i: x
    for indices, xs in zip(augment.by_resolution(views).values(), drawn, strict=True)
    for i, x in zip(indices, xs, strict=True)
  }
  return originals, [np.asarray(by_view[i]) for i in range(len(views))]


def shown(view: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
  """Undoes `augment.normalize`: float [..., C] with values in [0, 1] again."""
  return np.clip(view * np.array(std) + np.array(mean) if mean else view, 0, 1)


def caption(number: int, view: augment.View, channels: int) -> str:
  """What a view does, in a few short lines; probabilities in per cent."""
  lines = [f"view {number}: {view.size} px", f"crop {view.scale[0]:g}-{view.scale[1]:g} of the area"]
  for name, chance, strengths in (
    ("flip", view.flip, ""),
    (
      "jitter",
      view.jitter_p if any(view.jitter) and channels in (1, 3) else 0,
      " ".join(f"{s:g}" for s in view.jitter),
    ),
    ("gray", view.gray_p if channels == 3 else 0, ""),
    ("blur", view.blur_p, f"{view.blur_sigma[0]:g}-{view.blur_sigma[1]:g}"),
    ("solarize", view.solarize_p, ""),
  ):
    if chance:
      lines.append(" ".join(part for part in (name, strengths, f"{100 * chance:g} %") if part))
  return "\n".join(lines)


def main(config, out: pathlib.Path, count: int) -> int:
  """Writes the picture. Returns the exit status."""
  if config.data.folder:
    dataset = data.load_folder(config.data.folder, config.data.split, channels=config.data.channels)
  else:
    c = config.data
    dataset = data.load(c.name, c.split, data_dir=c.data_dir, channels=c.channels)
  views, channels = configs.views(config), config.data.channels
  originals, drawn = first_views(config, dataset, count)
  columns: list = [
    (f"{'decoded' if dataset.is_streamed else 'in memory'}, {channels} channel(s)", [x / 255 for x in originals])
  ]
  for i, (view, x) in enumerate(zip(views, drawn, strict=True), 1):
    columns.append((caption(i, view, channels), shown(x, view.mean, view.std)))
  title = f"{config.method.name}, step 0 with seed {config.seed}\n{dataset.name} {dataset.split}"
  metrics.draw_grid(out, columns, title, side=2)
  say(f"wrote {out}: {len(originals)} images, {len(views)} view(s)")
  return 0


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe")
  OUT = flags.DEFINE_string("out", "views.png", "the picture")
  IMAGES = flags.DEFINE_integer("images", 6, "how many images of the batch, one a row", lower_bound=1)

  def start():
    if CONFIG.value is None:
      raise UserError("give a recipe: --config=configs/quickstart.py")
    return main(CONFIG.value, pathlib.Path(OUT.value), IMAGES.value)

  run(start)
