"""Six whole training steps of every shipped recipe against PyTorch: losses, every parameter, average and statistic.

The program is the one that `train.py` runs, on two devices: views, loss, gradient, optimizer, slow copy. The recipe
gives what belongs to the method; networks and batches are tiny, chance is taken out of the views, and rates are raised
so that a wrong rule moves the parameters by far more than rounding. tests/golden/make_steps.py is the other side.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from named_weights import named_weight
from trajectories import named_variables

from ssl_jax import build, convert, parallel, training
from ssl_jax.methods import byol, dino, mae, moco, moco_v3
from ssl_jax.methods.base import OneNetworkState
from ssl_jax.models.heads import without_predictor

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STEPS, EPOCH, TOTAL, SIDE = 6, 4, 8, 16
# Pixels and schedules are float32, which six steps of batch norm on 8 images enlarge. Moves are relative to how far the
# parameter came at all; a wrong rule of the optimizer changes them by a hundredth or more.
LOSSES, MOVES = 1e-5, 2e-4
RESNET = dict(name="resnet", stages=(1, 1), width=0.0625, stem="small")
VIT = dict(name="vit", patch_size=4, dim=12, depth=2, heads=3)
LARS = {"lr.base": 8.0, "optimizer.weight_decay": 1e-2}  # a peak of 8 * 8 / 256 = 0.25
ADAMW = {"lr.base": 0.032}  # a peak of 0.001
MLP = {"method.hidden": 16, "method.features": 6}

# The recipe of a run, and what is set in it.
RUNS = {
  "simclr": ("simclr_imagenet", RESNET, LARS | {"lr.base": 1.6, "method.projector.features": 6}),
  "moco_v1": ("moco_imagenet:v1", RESNET, {"lr.milestones": (1,)}),
  "moco_v2": ("moco_imagenet:v2", RESNET, {}),
  "moco_v3": ("moco_imagenet:v3", RESNET, LARS),
  "moco_v3_vit": ("moco_imagenet:v3_vit", VIT, ADAMW),
  "byol": (
    "byol_imagenet:1000",
    RESNET,
    LARS | {"method.target_momentum": 0.9, "method.mlp": dict(hidden=16, features=6)},
  ),
  "mae": (
    "mae_imagenet",
    VIT,
    ADAMW | {"optimizer.weight_decay": 0.5, "method.decoder": dict(dim=12, depth=1, heads=3)},
  ),
  "dino": (
    "dino_imagenet",
    VIT | dict(drop_path=0.5),
    ADAMW
    | {
      "method.teacher_temperature": 0.07,
      "method.teacher_temperature_warmup_epochs": 3,
      "method.teacher_momentum": 0.9,
    }
    | {"method.head": dict(hidden=16, bottleneck=8, prototypes=32, train_gain=False), "lr.end": 1e-4}
    | {"optimizer.weight_decay": 0.4, "optimizer.weight_decay_end": 4.0, "optimizer.clip": 0.3},
  ),
  "vicreg": ("vicreg_imagenet", RESNET, LARS | MLP),
  "barlow_twins": ("barlow_twins_imagenet", RESNET, LARS | MLP),
  "simsiam": (
    "simsiam_imagenet",
    RESNET,
    MLP | {"lr.base": 0.32, "lr.warmup_epochs": 0.0, "optimizer.weight_decay": 1e-2},
  ),
}
MOCO = {"method.queue_size": 20, "method.bn_group_size": 2, "method.features": 6, "method.momentum": 0.9}
MOCO_V3 = MLP | {"method.momentum": 0.9}


def recipe(run):
  """The shipped recipe, tiny and without chance in its views."""
  name, encoder, changes = RUNS[run]
  file, _, version = name.partition(":")
  spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([version] if version else []))
  common = {"batch_size": 8, "dtype": "float64", "encoder": encoder, "lr.warmup_epochs": 1.0}
  if config.method.name == "moco":
    common |= (
      MOCO_V3 if config.method.version == 3 else {**MOCO, "optimizer.weight_decay": 1e-2, "lr.warmup_epochs": 0.0}
    )
  for key, value in {**common, **changes}.items():
    *groups, last = key.split(".")
    section = config
    for group in groups:
      section = section[group]
    section[last] = value
  if run == "moco_v3_vit":
    config.optimizer.weight_decay = 0.1

  def still(size=SIDE, flip=0.0, solarize_p=0.0, like=config.views[0]):
    kept = {key: like[key] for key in ("mean", "std", "interpolation") if key in like}
    return dict(size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip, solarize_p=solarize_p, **kept)

  views = [still(), still(flip=1.0, solarize_p=1.0)]
  if run == "mae":
    views = views[:1]
  if run == "dino":
    views += [still(8), still(8, flip=1.0), still(8, solarize_p=1.0)]
  config.views = tuple(views)
  return config


def started(run, shapes):
  """(params, state) by name, as make_steps.py starts."""
  params, state = shapes
  own = {"params": params}
  if getattr(state, "batch_stats", None):
    own["batch_stats"] = state.batch_stats
  prefix = f"{run}/online/" if run == "byol" else f"{run}/"
  first = named_variables(own, prefix, {}, jnp.float64)
  params, stats = first["params"], first.get("batch_stats", {})
  if run in ("simclr", "vicreg", "barlow_twins", "simsiam"):
    return params, OneNetworkState(stats)
  if run in ("moco_v1", "moco_v2"):
    queue = np.float64(named_weight(f"{run}/queue", (20, 6)))
    queue = jnp.asarray(queue / np.linalg.norm(queue, axis=1, keepdims=True))
    return params, moco.MoCoState(params, stats, stats, queue, jnp.int32(0), jnp.int32(0))
  if run in ("moco_v3", "moco_v3_vit"):
    return params, moco_v3.MoCoV3State(without_predictor(params), stats, without_predictor(stats))
  if run == "byol":
    target = {name: without_predictor(tree) for name, tree in own.items()}
    target = named_variables(target, f"{run}/target/", {}, jnp.float64)
    return params, byol.BYOLState(target["params"], stats, target["batch_stats"])
  if run == "mae":
    return params, mae.MAEState()
  return params, dino.DINOState(params, jnp.zeros(32), stats, stats)


def by_name(params, state):
  """{tree: {PyTorch name: array}} of what is trained and of what is kept."""
  trees = {"params": convert.to_torch({"params": params})}
  for field, tree in vars(state).items():
    if isinstance(tree, dict):
      kind = "batch_stats" if field.endswith("batch_stats") else "params"
      trees[field] = convert.to_torch({kind: tree})
    else:
      trees[field] = {"": np.asarray(tree)}
  return trees


@pytest.mark.parametrize("run", RUNS)
def test_six_steps_are_pytorchs(run, golden, mesh):
  g = golden("steps")
  with jax.enable_x64(True):
    config = recipe(run)
    devices = mesh(2)
    made = build.program(config, devices, TOTAL, EPOCH)
    params, state = started(run, (made.state.params, made.state.state))
    before = by_name(params, state)
    now = training.TrainState(jnp.int32(0), params, state, made.optimizer.init(params))
    now = jax.device_put(jax.tree.map(jnp.copy, now), parallel.replicated(devices))
    losses = []
    for t in range(STEPS):
      now, row = made.train_step(now, parallel.put_batch(devices, {"image": g[f"pixels{t}"]}))
      losses.append(float(row["loss"]))
    got = by_name(now.params, now.state)
    evaluated = made.method.encoder(now.params, now.state)
  # SimSiam's is a cosine, here near zero: its rounding is that of one.
  np.testing.assert_allclose(losses, g[f"{run}/loss"], rtol=LOSSES, atol=LOSSES * (run == "simsiam"))
  # Evaluated is what the papers evaluate: DINO's teacher, everyone else's trained network.
  network = now.state.teacher_params if run == "dino" else now.params
  jax.tree.map(np.testing.assert_array_equal, evaluated["params"], network["encoder"])
  if run not in ("dino", "mae", "moco_v3_vit"):  # whose encoders have no batch norm
    jax.tree.map(np.testing.assert_array_equal, evaluated["batch_stats"], now.state.batch_stats["encoder"])
  compared = set()
  for tree, entries in got.items():
    for name, value in entries.items():
      entry = f"{run}/{tree}/{name}"
      if entry not in g.files:
        assert tree in ("queue_pointer", "queue_written") or value.size == 0, f"{entry} has nothing to compare with"
        continue
      compared.add(entry)
      want, start = g[entry], before[tree][name]
      if name.endswith("attn.qkv.bias"):  # The keys' third has no gradient: Adam turns rounding into steps there.
        value, want, start = (np.delete(x, np.s_[len(x) // 3 : 2 * len(x) // 3]) for x in (value, want, start))
      moved = max(np.max(np.abs(want - start)), 1e-9)
      np.testing.assert_allclose(value, want, rtol=0, atol=MOVES * moved, err_msg=entry)
  assert compared == {name for name in g.files if name.startswith(f"{run}/") and name != f"{run}/loss"}
