"""The shared keys, the checks before a run, and every recipe in configs/."""

import importlib.util
import math
import pathlib

import jax
import numpy as np
import pytest

import train
from ssl_jax import augment, data, methods, optim
from ssl_jax import config as configs
from ssl_jax.errors import UserError

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
SHARED = [
  "seed",
  "epochs",
  "steps",
  "stop_after_steps",
  "batch_size",
  "microbatch",
  "dtype",
  "data.name",
  "data.data_dir",
  "data.folder",
  "data.channels",
  "views",
  "encoder.name",
  "method.name",
  "optimizer.name",
  "lr.base",
  "no_decay",
  "log_every_steps",
  "eval_every_epochs",
  "checkpoint_every_steps",
]


def recipe(path, *arguments):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


def shrink(config):
  """The same recipe on 16 images of 16 pixels and narrow layers."""
  config.batch_size = 8
  largest = max(view["size"] for view in config.views)
  config.views = tuple({**view, "size": 16 if view["size"] == largest else 8} for view in config.views)
  if config.encoder.name.startswith("resnet"):
    config.encoder.update(width=0.125, stages=(1, 1))
  else:
    config.encoder = dict(name="vit", patch_size=4, dim=12, depth=2, heads=3)
  if "bn_group_size" in config.method:
    config.method.bn_group_size = 2
  config.dtype = "float32"
  config.eval_view.resize = config.eval_view.size = None
  return config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_takes_a_step(path, monkeypatch):
  config = shrink(recipe(path))
  channels = config.data.channels
  images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, channels), dtype=np.uint8)
  monkeypatch.setattr(train, "load", lambda *_: data.Dataset(images, np.zeros(16, np.int32), 1, "random", "train"))
  config.steps, config.lr.warmup_epochs = 4, 0.5  # one step of warm-up: the second has a learning rate
  plan = train.make_plan(config)
  state = plan.init()
  before = jax.device_get(state.params)
  for _ in range(2):
    state, row = plan.train_step(state, train.parallel.put_batch(plan.mesh, {"image": images[:8]}))
  assert all(np.isfinite(value) for value in jax.device_get(row).values())
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
  # Not all of them: a residual block may start as the identity, and some parameters are frozen.
  assert np.mean(jax.tree.leaves(moved)) > 0.5 and any(jax.tree.leaves(moved["encoder"]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_the_shared_keys_and_a_docstring_with_its_command(path):
  config = recipe(path)
  for key in SHARED:
    assert configs.has_key(config, key), key
  assert "python train.py" in path.read_text().split('"""')[1]


def test_the_paper_recipes_have_the_papers_numbers():
  cifar = recipe(by_name("simclr_cifar10"))
  v1, v2 = recipe(by_name("simclr_imagenet")), recipe(by_name("simclr_imagenet"), "v2")
  assert peak(cifar) == 2.0 and peak(v1) == pytest.approx(4.8) and peak(v2) == pytest.approx(6.4)
  assert [c.optimizer.weight_decay for c in (cifar, v1, v2)] == [1e-4, 1e-6, 1e-4]
  assert [c.method.temperature for c in (cifar, v1, v2)] == [0.5, 0.1, 0.1]
  assert [c.method.projector.layers for c in (cifar, v1, v2)] == [3, 2, 3]
  assert [c.epochs for c in (cifar, v1, v2)] == [1000, 100, 800]
  assert [c.lr.warmup_epochs for c in (cifar, v1, v2)] == [10, 10, 40]
  assert [configs.views(c)[0].blur_p for c in (cifar, v1, v2)] == [0, 0.5, 0.5]
  assert [configs.views(c)[0].jitter for c in (cifar, v1)] == [(0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.2)]
  assert configs.schedule_length(v1, 1_281_167) == (31200, 312)


def by_name(name):
  return next(path for path in RECIPES if path.stem == name)


def peak(config):
  return optim.scaled_learning_rate(config.lr.base, config.batch_size, config.lr.scaling)


def test_the_paper_recipes_build_the_papers_model():
  config = recipe(by_name("simclr_imagenet"))
  method = methods.find("simclr").from_config(config, 1, 1)
  params, _ = jax.eval_shape(method.init, jax.random.key(0), (jax.ShapeDtypeStruct((2, 1, 224, 224, 3), np.float32),))
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
  assert count(params["encoder"]) == 23_508_032  # torchvision's ResNet-50 without its classifier
  # 2048 x 2048, its norm, 2048 x 128, and the last norm's scale: no biases, no last offset.
  assert count(params["projector"]) == 2048 * 2048 + 2 * 2048 + 2048 * 128 + 128


def quick(**overrides):
  config = recipe(by_name("quickstart"))
  config.update_from_flattened_dict(overrides)
  return config


def test_steps_replace_epochs_and_a_partial_batch_is_dropped():
  assert configs.schedule_length(quick(epochs=100, batch_size=256), 1000) == (300, 3)
  assert configs.schedule_length(quick(epochs=100, batch_size=256, steps=7), 1000) == (7, 3)


@pytest.mark.parametrize(
  "overrides, text",
  [
    (dict(batch_size=64), "batch_size=64 is more than the 24 images"),
    (dict(batch_size=6), "batch_size=6 does not divide over the 4 devices: batch_size=4 or 8 does"),
    (dict(batch_size=2), "batch_size=4 does"),
    (dict(batch_size=-4), "batch_size=-4"),
    (dict(batch_size=8, microbatch=3), "microbatch=3 does not divide"),
    (dict(batch_size=12, microbatch=8), "batch_size=12 is not a multiple of microbatch=8"),
    (dict(batch_size=8, log_every_steps=0), "log_every_steps must be at least 1, got 0"),
    (dict(batch_size=8, steps=0), "steps must be at least 1"),
    (dict(batch_size=8, stop_after_steps=-1), "stop_after_steps must be at least 1"),
    (dict(batch_size=8, dtype="float33"), "dtype must be"),
  ],
)
def test_settings_that_cannot_run_are_told_with_their_values(overrides, text):
  with pytest.raises(UserError) as error:
    configs.check(quick(**overrides), images=24, devices=4)
  assert text in str(error.value)


def test_views_are_checked_by_name():
  config = quick()
  config.views = (dict(size=28, blurp=0.5),)
  with pytest.raises(UserError, match=r"views\[0\] has no field 'blurp'; did you mean 'blur_p'"):
    configs.views(config)
  config.views = (3,)
  with pytest.raises(UserError, match="tuple of dicts"):
    configs.views(config)


def test_a_config_survives_its_file():
  config = quick()
  saved = configs.to_json(config)
  configs.check_same(config, saved)
  again = configs.ml_collections.ConfigDict(saved)
  assert configs.views(again) == configs.views(config) and all(type(v) is augment.View for v in configs.views(again))
  assert configs.eval_view(again) == configs.eval_view(config)


def test_only_what_changes_no_number_may_change_on_resume():
  saved = configs.to_json(quick())
  configs.check_same(quick(stop_after_steps=3, log_every_steps=1, checkpoint_every_steps=9, eval_every_epochs=2), saved)
  for key, value in {"seed": 1, "epochs": 99, "lr.base": 0.5, "microbatch": 8, "data.split": "train[:5]"}.items():
    with pytest.raises(UserError, match=rf"{key}: now {value!r}".replace("[", r"\[")):
      configs.check_same(quick(**{key: value}), saved)


def test_the_nearest_key_is_a_key():
  config = quick()
  assert configs.nearest_key(config, "batchsize") == "batch_size"
  assert configs.nearest_key(config, "data.nam") == "data.name"
  assert configs.has_key(config, "data") and configs.has_key(config, "data.name") and not configs.has_key(config, "dat")
