"""The picture of a batch's views is of what the network gets."""

import jax
import numpy as np
import PIL.Image
import pytest
from photographs import photograph
from test_train import folder_config, small_config

from ssl_jax import augment, build
from ssl_jax import config as configs
from ssl_jax.commands import show
from ssl_jax.data.crop import shrunk
from ssl_jax.run import plots

LOOK = dict(scale=(0.2, 0.9), solarize_p=0.5)


@pytest.mark.parametrize("streamed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_views_are_those_of_the_first_step(photographs, tmp_path, streamed, monkeypatch):
  config = folder_config(photographs) if streamed else small_config(batch_size=8)
  if streamed:
    config.data.reduced_decoding = True
    for path in (photographs / "train").rglob("*.jpg"):
      photograph(path, 0, (240, 160))
  c = config.data.channels
  large, small = dict(size=16, mean=(0.5,) * c, std=(0.2,) * c, **LOOK), dict(size=8, **LOOK)
  config.views = (large, small, large)
  views = configs.views(config)
  dataset = build.dataset(config, config.data.split)
  batch = next(dataset.batches(views, batch_size=8, seed=config.seed, start=0, stop=1))["image"]
  keys = augment.example_keys(config.seed, 0, np.arange(config.batch_size))
  made = jax.jit(augment.make_views, static_argnums=2)(keys, batch, views)
  originals, drawn = show.first_views(config, dataset, 8)
  assert len(originals) == 8
  for got, want in zip(drawn, (made[0][0], made[1][0], made[0][1]), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)
  put_back = show.shown(drawn[0], views[0].mean, views[0].std)
  np.testing.assert_allclose((put_back - 0.5) / 0.2, drawn[0], atol=1e-4)
  sizes = []
  monkeypatch.setattr(
    plots, "draw_grid", lambda path, columns, *_, **__: sizes.append([x[0].shape for _, x in columns])
  )
  show.draw(config, tmp_path / "views.png", 8)
  assert sizes == [[originals[0].shape, (16, 16, c), (8, 8, c), (16, 16, c)]]


def test_a_folder_of_fewer_images_than_a_batch_is_shown_and_large_ones_are_shrunk(photographs, monkeypatch):
  monkeypatch.setattr(show, "SIDE", 20)
  config = folder_config(photographs, batch_size=512)
  originals, drawn = show.first_views(config, build.dataset(config, "train"), 6)
  assert len(originals) == 6 and all(len(view) == 6 for view in drawn)
  assert all(max(x.shape[:2]) == 20 for x in originals)


def test_shrunk_keeps_the_proportions_and_leaves_small_images_alone():
  pixels = np.random.default_rng(0).integers(0, 256, (50, 20, 3), np.uint8)
  assert shrunk(pixels, 25).shape == (25, 10, 3) and shrunk(pixels[:, :1], 10).shape == (10, 1, 3)
  assert shrunk(pixels, 50) is pixels


def test_a_caption_says_what_the_recipe_does():
  view = augment.View(size=32, jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.2)
  text = "view 2: 32 px\ncrop 0.08-1 of the area\nflip 50 %\njitter 0.4 0.4 0.2 0.1 80 %"
  assert show.caption(2, view, 1) == text
  assert show.caption(2, view, 3) == text + "\ngray 20 %"


def test_a_grid_takes_pictures_of_different_sizes(tmp_path):
  pictures = [np.zeros((5, 9, 3)), np.ones((20, 4, 3))]
  drawn = plots.draw_grid(tmp_path / "new" / "grid.png", [("as they are", pictures), ("two\nlines", pictures)], "title")
  assert drawn.shape == np.asarray(PIL.Image.open(tmp_path / "new" / "grid.png"))[..., :3].shape
