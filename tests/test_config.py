"""The shared keys, the checks before a run, and every recipe in configs/."""

import functools
import importlib.util
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_all_methods import in_memory

from ssl_jax import augment, build, optim, parallel
from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.methods import simclr

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
CLOSED = [path for path in RECIPES if path.stem != "own_images"]  # which leaves values open: see test_decide
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


def by_name(name):
  return next(path for path in RECIPES if path.stem == name)


def shrink(config):
  """The same recipe on 16 images of 16 pixels and narrow layers."""
  config.batch_size = 8
  largest = max(view["size"] for view in config.views)
  config.views = tuple({**view, "size": 16 if view["size"] == largest else 8} for view in config.views)
  if config.encoder.name.startswith("resnet"):
    config.encoder.update(width=0.125, stages=(1, 1))
  else:
    kept = {key: config.encoder[key] for key in ("layer_scale", "registers") if key in config.encoder}
    config.encoder = dict(name="vit", patch_size=4, dim=12, depth=2, heads=3, **kept)
  small = dict(bn_group_size=2, queue_size=24, hidden=16, features=8)
  config.method.update({key: value for key, value in small.items() if key in config.method})
  for key, part in dict(
    projector=dict(features=8),
    mlp=dict(hidden=16, features=8),
    head=dict(hidden=16, bottleneck=8, prototypes=32),
    decoder=dict(dim=12, depth=1, heads=3),
  ).items():
    if key in config.method:
      config.method[key].update(part)
  config.dtype, config.heads_first_steps = "float32", None  # else the encoder waits
  config.eval_view.resize = config.eval_view.size = None
  return config


@pytest.mark.slow  # test_trajectories, test_lowering and test_all_methods have most of them
@pytest.mark.parametrize("path", CLOSED, ids=[path.stem for path in CLOSED])
def test_every_recipe_builds_and_takes_a_step(path, monkeypatch):
  config = shrink(recipe(path))
  channels = config.data.channels
  images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, channels), dtype=np.uint8)
  monkeypatch.setattr(build, "dataset", lambda *_: in_memory(images, np.zeros(16, np.int32)))
  config.steps = 4
  config.lr.warmup_epochs = min(0.5, config.lr.warmup_epochs)  # one step of it: the second has a learning rate
  run = build.run(config)
  state = run.init()
  before = jax.device_get(state.params)
  for _ in range(2):
    state, row = run.train_step(state, parallel.put_batch(run.mesh, {"image": images[:8]}))
  assert all(np.isfinite(value) for value in jax.device_get(row).values())
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
  # Not all of them: a residual block may start as the identity, and some parameters are frozen.
  assert np.mean(jax.tree.leaves(moved)) > 0.5 and any(jax.tree.leaves(moved["encoder"]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_the_shared_keys_and_a_docstring_with_its_command(path):
  config = recipe(path)
  for key in SHARED:
    assert configs.has_key(config, key), key
  assert re.search(r"python (train|finetune|eval_linear)\.py", path.read_text().split('"""')[1])


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


def peak(config):
  return optim.scaled_learning_rate(config.lr.base, config.batch_size, config.lr.scaling)


def test_the_paper_recipes_build_the_papers_model():
  config = recipe(by_name("simclr_imagenet"))
  method = build.method_of(config, 1, 1)[0]
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
    (dict(batch_size=6), "batch_size=6 cannot be split evenly over the 4 devices: batch_size=4 or 8 does"),
    (dict(batch_size=2), "batch_size=4 does"),
    (dict(batch_size=-4), "batch_size=-4"),
    (dict(batch_size=8, microbatch=3), "microbatch=3 cannot be split evenly"),
  ],
)
def test_settings_that_cannot_run_are_told_with_their_values(overrides, text):
  with pytest.raises(UserError) as error:
    configs.check(quick(**overrides), images=24, devices=4)
  assert text in str(error.value)


def with_value(config, key, value):
  """A copy with another value of any type at a dotted key, or at one of a view: "views[1].size"."""
  tree = config.to_dict()
  tree["views"] = tuple(dict(view) for view in tree["views"])
  view = re.fullmatch(r"views\[(\d+)\]\.(\w+)", key)
  *groups, last = (view[2],) if view else key.split(".")
  node = tree["views"][int(view[1])] if view else functools.reduce(lambda node, group: node[group], groups, tree)
  node[last] = value
  return configs.ml_collections.ConfigDict(tree)


def leaves(config):
  """(dotted key, value) of everything in a recipe."""

  def walk(prefix, tree):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from walk(f"{prefix}{key}.", value)
      elif prefix + key == "views":
        for i, view in enumerate(value):
          yield from walk(f"views[{i}].", view)
      else:
        yield prefix + key, value

  return walk("", config.to_dict())


def bad_values(value):
  """What no key with this value in a recipe may have."""
  if isinstance(value, bool):
    return "x", 2, 0.5, ()
  if isinstance(value, int | float):
    return math.nan, math.inf, -1, "x", True, (), {}
  if isinstance(value, str):
    return 3, math.nan, True, ()
  if isinstance(value, tuple | list):
    return "x", 3, (math.nan,), ("(",), None
  return math.nan, -1, 0.5, ("x",)  # of a key that is None: a whole number, a text or a flag


@pytest.mark.parametrize("path", CLOSED, ids=lambda path: path.stem)
def test_no_key_of_any_recipe_takes_a_bad_value_and_each_is_told_by_its_name(path):
  config = recipe(path)
  if path.stem == "adapt":  # which is refused without weights
    config.init_from = "weights.pth"
  configs.check_values(config)
  count = 0
  for key, value in leaves(config):
    for bad in bad_values(value):
      with pytest.raises(UserError) as error:
        configs.check_values(with_value(config, key, bad))
      assert key in str(error.value) and (str(bad) in str(error.value) or repr(bad) in str(error.value)), (key, bad)
      count += 1
    if not key.endswith("name"):  # another method has other keys
      with pytest.raises(UserError, match=re.escape(f"{key}x does not exist; did you mean '{key.split('.')[-1]}'?")):
        configs.check_values(with_value(config, f"{key}x", value))
  assert count > 150


@pytest.mark.parametrize(
  "name, key, value, text",
  [
    ("mae_quickstart", "method.mask_ratio", 1.5, "method.mask_ratio must be a number in (0, 1), got 1.5"),
    ("mae_quickstart", "method.mask_ratio", 0, "method.mask_ratio must be a number in (0, 1), got 0"),
    ("quickstart", "seed", 2**31, "seed must be a whole number from 0 to 2,147,483,647, got 2147483648"),
    ("quickstart", "lr.base", -1.0, "lr.base must be a positive number, got -1.0"),
    ("quickstart", "lr.scaling", "log", "lr.scaling must be one of linear, sqrt, none, got 'log'"),
    ("quickstart", "method.temperature", 0.0, "method.temperature must be a positive number and at most 100, got 0.0"),
    *(
      (name, f"method.{key}", 1_000_000_000, f"{most}, got 1000000000")
      for name, key, most in (
        ("quickstart", "temperature", "at most 100"),
        ("quickstart", "projector.features", "at most 16,777,216"),
        ("dinov2_quickstart", "head.prototypes", "at least 2 and at most 16,777,216"),
        ("dinov2_quickstart", "koleo_weight", "at most 1,000,000"),
        ("vicreg_imagenet", "invariance", "at most 1,000,000"),
      )
    ),
    ("quickstart", "knn.k", 0, "knn.k must be a whole number, at least 1, got 0"),
    ("quickstart", "eval_view.size", -1, "eval_view.size must be a whole number, at least 1, or none, got -1"),
    ("quickstart", "eval_view.std", (0.0,), "eval_view.std must be a tuple: a positive number, got (0.0,)"),
    ("quickstart", "eval_view.mean", (0.5, 0.5, 0.5), "eval_view.mean must be one number for each of data.channels=1"),
    ("quickstart", "eval_view.mean", (0.5,), "eval_view.std must be as many numbers as mean, got ()"),
    ("quickstart", "eval_view.resize", 16, "a centre crop of 28 pixels (eval_view.size, else the first view's) does"),
    ("quickstart", "encoder.stem", "large", "encoder.stem must be one of imagenet, small, patch, got 'large'"),
    ("quickstart", "encoder.width", 0, "encoder.width must be a positive number, got 0"),
    ("quickstart", "encoder.name", "resnet81", "got 'resnet81'; did you mean 'resnet18'?"),
    ("quickstart", "method.name", "simcrl", "got 'simcrl'; did you mean 'simclr'?"),
    ("quickstart", "optimizer.name", "adam", "got 'adam'; did you mean 'adamw'?"),
    ("quickstart", "optimizer.eps", 0, "optimizer.eps must be a positive number, got 0"),
    ("quickstart", "optimizer.layer_decay", 0, "optimizer.layer_decay must be a number in (0, 1], got 0"),
    (
      "quickstart",
      "optimizer.rates",
      ((".*", -1),),
      "rates must be a tuple: pairs of a regular expression and a number",
    ),
    ("quickstart", "no_decay", ("(",), "no_decay must be a tuple: regular expressions, got ('(',)"),
    ("quickstart", "profile_steps", (3, 2), "be two steps, the first at least 1 and not after the last, or none, got"),
    (
      "quickstart",
      "loggers",
      ("wandb,tensorbord",),
      "loggers must be names out of tensorboard, wandb, mlflow, or (), got",
    ),
    ("quickstart", "views", (3,), "views[0] must be a group of keys, got 3"),
    ("quickstart", "views", (), "views must be a tuple of dicts"),
    ("quickstart", "views[0].scale", (0.5, 0.2), "views[0].scale must be two numbers in (0, 1], the lower one first"),
    ("quickstart", "views[1].blur_kernel", 4, "views[1].blur_kernel must be an odd whole number, got 4"),
    ("quickstart", "data.folder", "", "data.folder must be a string that is not empty, or none, got ''"),
    ("quickstart", "microbatch", 48, "batch_size=128 is not a multiple of microbatch=48"),
    ("dino_quickstart", "method.head.prototypes", 1, "method.head.prototypes must be a whole number, at least 2"),
    ("dinov2_quickstart", "method.mask_ratios", (0.5, 0.1), "must be two numbers in [0, 1], the lower one first, got"),
    ("dino_quickstart", "method.center_momentum", 2, "method.center_momentum must be a number in [0, 1], got 2"),
    ("mae_quickstart", "encoder.heads", 5, "encoder.heads=5 does not divide encoder.dim=96"),
    ("mae_quickstart", "encoder.patch_size", 5, "encoder.patch_size=5 does not divide views[0].size=28"),
    ("mae_quickstart", "method.decoder.heads", 5, "method.decoder.heads=5 does not divide method.decoder.dim=64"),
  ],
)
def test_a_wrong_value_is_told_with_what_holds(name, key, value, text):
  with pytest.raises(UserError) as error:
    configs.check_values(with_value(recipe(by_name(name)), key, value))
  assert text in str(error.value)


@pytest.mark.parametrize("name", ["byol_quickstart", "simsiam_imagenet", "barlow_twins_imagenet"])
def test_one_image_is_no_batch_where_batch_norm_would_make_it_a_constant(name):
  with pytest.raises(UserError, match="needs a batch of at least two images, got batch_size=1"):
    build.method_of(with_value(recipe(by_name(name)), "batch_size", 1), 10, 1)


@pytest.mark.parametrize(
  "key, value, text",
  [
    ("method.mask_share", 0.005, "mask_share=0.005 of 128 global crops masks none"),
    ("method.mask_ratios", (0.0, 0.02), r"mask_ratios=\(0.0, 0.02\) of 49 patches mask none"),
  ],
)
def test_a_share_of_masks_that_rounds_to_none_is_told(key, value, text):
  with pytest.raises(UserError, match=text):
    build.method_of(with_value(recipe(by_name("dinov2_quickstart")), key, value), 10, 1)


def test_all_wrong_keys_are_told_at_once_a_line_each_and_what_is_missing_too():
  config = with_value(with_value(quick(), "lr.base", math.nan), "method.projector.layers", 0)
  del config.knn.k, config.method.temperature
  with pytest.raises(UserError) as error:
    configs.check_values(config)
  first, *others = str(error.value).splitlines()
  assert first == "4 keys of the config are wrong:"
  assert sorted(line.split()[0] for line in others) == [
    "knn.k", "lr.base", "method.projector.layers", "method.temperature"
  ]  # fmt: skip


def test_a_bug_is_not_told_as_a_users_mistake(monkeypatch):
  def broken(*args, **kwargs):
    raise TypeError("a bug")

  monkeypatch.setattr(simclr, "nt_xent", broken)
  with pytest.raises(TypeError, match="a bug"):
    build.run(quick(batch_size=8))


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
  configs.check_same(quick(report=False, profile_steps=(3, 4), loggers=("mlflow,wandb",)), saved)
  for key, value in {"seed": 1, "epochs": 99, "lr.base": 0.5, "microbatch": 8, "data.split": "train[:5]"}.items():
    with pytest.raises(UserError, match=rf"{key}: now {value!r}".replace("[", r"\[")):
      configs.check_same(quick(**{key: value}), saved)


def test_the_nearest_key_is_a_key():
  config = quick()
  assert configs.nearest_key(config, "batchsize") == "batch_size"
  assert configs.nearest_key(config, "data.nam") == "data.name"
  assert configs.has_key(config, "data") and configs.has_key(config, "data.name") and not configs.has_key(config, "dat")


VARIANTS = [
  *((path, ()) for path in CLOSED),
  *((by_name("moco_imagenet"), (version,)) for version in ("v1", "v3", "v3_vit")),
  *((by_name("dino_imagenet"), (version,)) for version in ("boost", "vit_base")),
  *((by_name("dinov2_imagenet"), (version,)) for version in ("small", "ibot")),
  (by_name("dino_quickstart"), ("vit",)),
  (by_name("simclr_imagenet"), ("v2",)),
  (by_name("linear"), ("mae",)),
]


def test_a_folder_and_a_data_dir_are_two_data_sets():
  config = with_value(recipe(by_name("quickstart")), "data.folder", "D")
  configs.check_values(config)
  with pytest.raises(UserError, match=r"data\.folder and data\.data_dir name two data sets"):
    configs.check_values(with_value(config, "data.data_dir", "E"))


def test_each_view_of_a_recipe_is_a_dict_of_its_own():
  for path, arguments in VARIANTS:
    views = recipe(path, *arguments).views
    assert len({id(view) for view in views}) == len(views), path.stem


def test_a_published_figure_stands_only_beside_its_own_settings():
  texts = {path.stem: path.read_text() for path in RECIPES}
  others = [name for name, text in texts.items() if re.search(r"not this recipe's|no published figure", text)]
  assert others == [
    *("byol_cifar10", "dino_cifar10", "dinov2_imagenet", "lejepa_imagenette", "mae_cifar10", "moco_imagenet"),
    "simsiam_imagenet",
  ]
  readme = (RECIPES[0].parents[1] / "README.md").read_text()
  for figure in ("76.1", "84.0 %", "92.6 %", "92.58", "89.8 %", "60.8"):
    assert figure not in readme + "".join(texts.values()), figure


@pytest.mark.parametrize("path, arguments", VARIANTS, ids=lambda x: "-".join(x) if isinstance(x, tuple) else x.stem)
def test_what_decays_and_what_is_frozen_leaf_by_leaf(path, arguments):
  config = recipe(path, *arguments)
  method = build.method_of(config, 100, 10)[0]
  sizes = dict.fromkeys(view["size"] for view in config.views)
  drawn = tuple(
    jax.ShapeDtypeStruct((sum(v["size"] == s for v in config.views), 1, s, s, config.data.channels), np.float32)
    for s in sizes
  )
  params, _ = jax.eval_shape(method.init, jax.random.key(0), drawn)
  optim.check_rules(configs.parameter_rules(config), params)
  marks = {
    optim.path_name(leaf): mark
    for leaf, mark in jax.tree_util.tree_leaves_with_path(optim.decayed(params, config.no_decay))
  }
  if not config.no_decay:
    # whose official code decays everything, or nothing
    assert config.method.name in ("moco", "simsiam", "lejepa") or path.stem in ("finetune_resnet", "linear")
    assert all(marks.values())
  else:
    spared = ("cls_token", "pos_embed") if path.stem.startswith("finetune") else ()  # timm's `no_weight_decay`
    kernels = {name for name in marks if name.split("/")[-1] not in ("bias", "scale", "gamma", *spared)}
    assert {name for name, mark in marks.items() if mark} == kernels
    assert {name.split("/")[-1] for name in kernels} <= {
      "kernel", "cls_token", "pos_embed", "mask_token", "register_tokens", "weight_v", "weight_g"
    }  # fmt: skip
  ruled = {
    key: {name for name in marks if any(optim.re.fullmatch(p, name) for p in config.get(key, ()))}
    for key in ("frozen", "late", "held")
  }
  want = {"frozen": set(), "late": set(), "held": set()}
  if path.stem == "adapt":  # whose encoder waits for the whole head
    want["frozen"] = {"head/last_layer/weight_g", "encoder/patch_embed/proj/kernel", "encoder/patch_embed/proj/bias"}
  elif config.method.name == "dino":
    last = {"head/last_layer/weight_g", "head/last_layer/weight_v"}
    want["frozen"] = set() if config.method.head.get("train_gain") else {"head/last_layer/weight_g"}
    want["late"] = last if not want["frozen"] else {"head/last_layer/weight_v"}
    assert ruled["late"] >= want["late"] - want["frozen"] and config.late_epochs == 1
  if config.method.name == "dinov2":
    last = {"head/last_layer/weight_g", "head/last_layer/weight_v"}
    want |= {"late" if arguments == ("ibot",) else "held": last}
  if arguments == ("v3_vit",):
    want["frozen"] = {"encoder/patch_embed/proj/kernel", "encoder/patch_embed/proj/bias"}
  assert ruled == want


def test_frozen_and_late_parameters_neither_move_nor_decay_nor_have_moments():
  params = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}
  rules = optim.ParameterRules(frozen=("a",), late=("b",), late_epochs=2)
  optimizer = optim.make(dict(name="adamw", weight_decay=0.5), rules, lambda step: 0.1 + 0.01 * step, 10, 2)
  state, grads = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
  for step in range(5):
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    assert np.all(params["a"] == 1) and np.all(params["c"] != 1)
    assert np.all(params["b"] == 1) == (step < 4)  # two epochs of two steps
  # Its first step is Adam's first, at the rate of step 4: 1 - 0.14 (1 + 0.5).
  np.testing.assert_allclose(params["b"], 1 - 0.14 * 1.5, rtol=1e-5)


def test_moco_v1_falls_at_its_milestones_and_v2_changes_between_epochs():
  v1, v2 = recipe(by_name("moco_imagenet"), "v1"), recipe(by_name("moco_imagenet"), "v2")
  at = optim.make_schedule(v1.lr, v1.batch_size, 2000, 10)
  np.testing.assert_allclose([at(0), at(1199), at(1200), at(1600)], [0.03, 0.03, 0.003, 0.0003], rtol=1e-5)
  at = optim.make_schedule(v2.lr, v2.batch_size, 2000, 10)
  np.testing.assert_allclose([at(0), at(9), at(10), at(1005)], [0.03, 0.03, *_cosine(1, 100)], rtol=1e-5)


def _cosine(*epochs):
  return [0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200)) for epoch in epochs]
