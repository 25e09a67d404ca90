"""Draws views of a recipe's first batch exactly as the network gets them, but for the normalisation, which is undone.

  python -m ssl_jax show --config=configs/dino_imagenet.py --config.data.folder=DIR --out=views.png [--images=6]

One row per image: the picture as it is, then one column per view, headed by what the recipe does to it.

  --config=FILE        the recipe; --config.KEY=VALUE sets any of its keys
  --out=views.png      the picture
  --images=6           how many images of the batch, one per row
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from ssl_jax import augment, build, data, parallel
from ssl_jax import config as configs
from ssl_jax.commands import check_writable
from ssl_jax.data.crop import shrunk
from ssl_jax.errors import UserError
from ssl_jax.run import cli, cluster, plots

SIDE = 512  # pixels that are drawn of an image at most, on each side


def first_views(config, dataset: data.Dataset, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """The first images of step 0, and their views.

  Args:
    config: a recipe.
    dataset: what it trains on.
    count: how many images, at most a batch.

  Returns:
    Images uint8 [H, W, C], `count` of them, large ones shrunk to `SIDE` pixels; and for each view float32 [count, size,
    size, C], as the network gets it.
  """
  views = configs.views(config)
  batch_size = min(config.batch_size, len(dataset))  # The data set may be smaller than a batch.
  order = data.batch_indices(len(dataset), batch_size, config.seed, 0)[:count]
  examples = [dataset.example(int(i), views, (config.seed, 0, j)) for j, i in enumerate(order)]
  images = jax.tree.map(lambda *parts: np.stack(parts), *(example["image"] for example in examples))
  keys = augment.example_keys(config.seed, jnp.int32(0), jnp.arange(len(order)))
  drawn = jax.jit(augment.make_views, static_argnums=2)(keys, images, views)
  by_view = {
    i: x
    for indices, xs in zip(augment.by_resolution(views).values(), drawn, strict=True)
    for i, x in zip(indices, xs, strict=True)
  }
  originals = [shrunk(dataset.original(int(example["index"])), SIDE) for example in examples]
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


def draw(config, out: pathlib.Path, count: int) -> int:
  """Writes the picture. Returns the exit status."""
  config, _ = build.settled(config, build.device_facts(parallel.make_mesh()), None, cli.say)
  dataset = build.dataset(config, config.data.split)
  views, channels = configs.views(config), config.data.channels
  originals, drawn = first_views(config, dataset, count)
  columns: list = [(f"as it is, {channels} channel(s)", [x / 255 for x in originals])]
  for i, (view, x) in enumerate(zip(views, drawn, strict=True), 1):
    columns.append((caption(i, view, channels), shown(x, view.mean, view.std)))
  title = f"{config.method.name}, step 0 with seed {config.seed}\n{dataset.name} {dataset.split}"
  plots.draw_grid(out, columns, title, side=2)
  cli.say(f"wrote {out}: {len(originals)} images, {len(views)} view(s)")
  return 0


def main() -> None:
  """The command."""
  if not {"-h", "--help"}.isdisjoint(sys.argv):  # absl's own would list every flag of every library
    print(__doc__.strip())
    return
  recipe = config_flags.DEFINE_config_file("config", None, "the recipe")
  out = flags.DEFINE_string("out", "views.png", "the picture")
  images = flags.DEFINE_integer("images", 6, "how many images of the batch, one per row", lower_bound=1)

  def start():
    if recipe.value is None:
      raise UserError("give a recipe: --config=configs/quickstart.py")
    if pathlib.Path(out.value).suffix not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
      raise UserError(f"--out must end in .png, .jpg, .jpeg, .pdf or .svg, got {out.value}.")
    path = pathlib.Path(out.value)
    check_writable("--out", path)
    with cluster.ending_together(orderly=UserError, folder=path.parent):
      return draw(recipe.value, path, images.value)

  cli.run(start)
