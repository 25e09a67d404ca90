"""What holds for every method: the same numbers on any number of devices, one compilation, an exact resume."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import train
from runs import final_state
from ssl_jax import augment, build, monitors, parallel, restore
from ssl_jax import config as configs
from ssl_jax.data import memory
from ssl_jax.run import log

ROOT = pathlib.Path(__file__).parents[1]
METHODS = ["quickstart", "moco_quickstart", "byol_quickstart", "mae_quickstart", "dino_quickstart", "moco_imagenet:v3"]


def slow(*names):
  return [pytest.param(name, marks=pytest.mark.slow) for name in names]


WITHOUT_A_SECOND_NETWORK = ["vicreg_imagenet", "barlow_twins_imagenet", "simsiam_imagenet", "lejepa_imagenette"]
SLOW = slow("byol_quickstart", "moco_imagenet:v3", "dinov2_quickstart", *WITHOUT_A_SECOND_NETWORK)


def small(name):
  """The method's recipe on 32 grey images of 16 pixels, narrow, with SGD: Adam turns rounding into whole steps."""
  file, _, version = name.partition(":")
  spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([version] if version else []))
  largest = max(view["size"] for view in config.views)
  keep = ("scale", "flip", "jitter", "jitter_p")
  config.views = tuple(
    {"size": 16 if view["size"] == largest else 8} | {k: view[k] for k in keep if k in view} for view in config.views
  )
  if config.encoder.name.startswith("resnet"):
    config.encoder = dict(name="resnet", stages=(1,), width=0.125, stem="patch", features="flat")
    config.encoder.features = "pooled" if "dino" in name else "flat"
  else:
    config.encoder = dict(name="vit", patch_size=4, dim=12, depth=1, heads=3, features="mean")
  if config.method.name == "dinov2":
    config.encoder.init_std = 0.5  # KoLeo enlarges rounding where class tokens hardly differ
  for key, value in dict(bn_group_size=2, queue_size=24, hidden=16, features=8).items():
    if key in config.method:
      config.method[key] = value
  if config.method.name == "dino":
    config.method.head.update(hidden=16, bottleneck=8, prototypes=32)
  if "decoder" in config.method:
    config.method.decoder.update(dim=12, depth=1, heads=3)
  config.data.channels, config.dtype, config.batch_size, config.steps = 1, "float32", 8, 8
  config.eval_view.update(resize=None, size=None, mean=(), std=())
  config.optimizer = dict(name="sgd", momentum=0.9)
  config.lr = dict(base=0.05, scaling="none", warmup_epochs=0.0, end=0.0)
  config.no_decay = ()
  config.log_every_steps = config.eval_every_epochs = 1
  config.checkpoint_every_steps, config.report = 100, False
  return config


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
  images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 1), dtype=np.uint8)
  labels = np.arange(32, dtype=np.int32) % 2
  monkeypatch.setattr(build, "dataset", lambda config, split: in_memory(images, labels, split))


def in_memory(images, labels, split="train"):
  return memory.InMemory(images=images, labels=labels, num_classes=int(labels.max()) + 1, name="random", split=split)


def steps_on(config, mesh, monkeypatch, n=3):
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh)
  run = build.run(config)
  state, rows = run.init(), []
  for step in range(n):
    batch = {"image": run.train_set.images[step * 8 : step * 8 + 8]}
    state, row = run.train_step(state, parallel.put_batch(mesh, batch))
    rows.append(jax.device_get(row))
  assert run.train_step._cache_size() == 1  # the second step is the first one's program
  return jax.device_get(state), rows


def one_step(method, axis, params, state, views, keys):
  """A step of gradient descent as in `training.make_step`, on the mapped axis `axis` or, where it is None, on none."""
  (_, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, views, keys, 0)
  if axis:
    grads, aux = jax.lax.pmean(grads, axis), parallel.combine(aux, axis)
  params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
  return params, method.update(params, state, aux, 0), aux.metrics


def lanes(n, views, keys):
  """[v, b, ...] arrays as [n, v, b / n, ...], and keys [b] as [n, b / n]."""
  parts = tuple(jnp.moveaxis(x.reshape(x.shape[0], n, -1, *x.shape[2:]), 1, 0) for x in views)
  return parts, keys.reshape(n, -1)


def by_vmap(step, mesh, params, state, views, keys):
  out = jax.jit(jax.vmap(step, (None, None, 0, 0), axis_name="batch"))(params, state, *lanes(mesh.size, views, keys))
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), out)  # whole everywhere
  return jax.tree.map(lambda x: x[0], out)


def by_pmap(step, mesh, params, state, views, keys):
  devices = list(mesh.devices.flat)
  out = jax.pmap(step, "batch", in_axes=(None, None, 0, 0), devices=devices)(
    params, state, *lanes(mesh.size, views, keys)
  )
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), out)
  return jax.tree.map(lambda x: x[0], out)


def by_shard_map(step, mesh, params, state, views, keys):
  specs = (P(), P(), P(None, "batch"), P("batch"))
  return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))(
    params, state, views, keys
  )


def by_jit(step, mesh, params, state, views, keys):
  put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, P(None, "batch")))
  keys = jax.device_put(keys, jax.NamedSharding(mesh, P("batch")))
  return jax.jit(step)(params, state, jax.tree.map(put, views), keys)


WAYS = [(by_vmap, 4), (by_pmap, 2), (by_jit, 4)]
MORE_WAYS = [
  (by_vmap, 1),
  (by_vmap, 2),
  (by_pmap, 4),
  (by_shard_map, 1),
  (by_shard_map, 2),
  (by_shard_map, 4),
  (by_jit, 2),
]


@pytest.mark.parametrize("ways", [WAYS, pytest.param(MORE_WAYS, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("name", ["moco_quickstart", *slow("quickstart", "mae_quickstart", "dino_quickstart"), *SLOW])
def test_a_step_is_the_same_however_the_batch_is_mapped(name, ways, mesh):
  config = small(name)
  (mapped, _), (plain, _) = build.method_of(config, 8, 4), build.method_of(config, 8, 4, axis_name=None)
  keys = augment.example_keys(0, jnp.int32(0), jnp.arange(8))
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype=np.uint8)
  views = jax.jit(lambda: augment.make_views(keys, images, configs.views(config)))()
  params, state = jax.jit(plain.init)(jax.random.key(0), views)
  args = (*jax.device_get((params, state, views)), keys)
  want = jax.jit(functools.partial(one_step, plain, None))(*args)
  for way, devices in ways:
    method, axis = (plain, None) if way is by_jit else (mapped, "batch")
    got = way(functools.partial(one_step, method, axis), mesh(devices), *args)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
      scale = max(float(np.max(np.abs(y))), 1e-3)
      np.testing.assert_allclose(
        x, y, rtol=0, atol=2e-5 * scale, err_msg=f"{way.__name__} {devices} {jax.tree_util.keystr(path)}"
      )


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", ["moco_quickstart", *slow("quickstart", "mae_quickstart", "dino_quickstart"), *SLOW])
def test_any_number_of_devices_gives_the_same_steps(name, devices, mesh, monkeypatch):
  # Negatives without a gradient, gradients summed twice and norms of one device would all show.
  want, want_rows = steps_on(small(name), mesh(1), monkeypatch)
  got, rows = steps_on(small(name), mesh(devices), monkeypatch)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    # float32 sums in another order, through three steps of batch norms over 8 images
    scale = max(float(np.max(np.abs(y))), 1e-3)
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-4 * scale, err_msg=jax.tree_util.keystr(path))
  for a, b in zip(rows, want_rows, strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


@pytest.mark.parametrize("name", ["dino_quickstart", *slow("quickstart", "moco_quickstart", "mae_quickstart"), *SLOW])
def test_a_sharded_state_gives_the_same_steps_in_a_part_of_the_memory(name, mesh, monkeypatch):
  config = small(name)
  want, want_rows = steps_on(config, mesh(4), monkeypatch)
  config.parallel.shard_state = True
  monkeypatch.setattr(parallel, "SMALLEST_SPLIT", 1)
  got, rows = steps_on(config, mesh(4), monkeypatch)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    scale = max(float(np.max(np.abs(y))), 1e-3)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
  for a, b in zip(rows, want_rows, strict=True):
    assert a.keys() == b.keys()
    # DINO's loss, here 0.09, is the difference of sums near log K = 3.5, and has their rounding.
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
  run = build.run(config)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state))
  assert parallel.bytes_a_device(run.state) < 0.3 * whole
  held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.init())]
  assert sum(held) == parallel.bytes_a_device(run.state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae_quickstart", "dino_quickstart"])
def test_checkpoints_of_a_sharded_state_are_read_whole_and_the_other_way_round(name, tmp_path, mesh, monkeypatch):
  monkeypatch.setattr(parallel, "SMALLEST_SPLIT", 1)
  for workdir, runs in (
    ("whole", [(1, False, None)]),
    ("changing", [(4, True, 3), (1, False, 5), (2, True, None)]),
  ):
    for devices, shard_state, stop in runs:
      config = small(name)
      config.parallel.shard_state, config.stop_after_steps = shard_state, stop
      monkeypatch.setattr(parallel, "make_mesh", lambda devices=devices: mesh(devices))
      assert train.main(config, tmp_path / workdir) == 0
  a, b = (final_state(tmp_path / workdir, 8) for workdir in ("whole", "changing"))
  a, b = ({part: tree for part, tree in state.items() if part != "fingerprint"} for state in (a, b))
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    scale = max(float(np.max(np.abs(y))), 1e-3)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))
  assert restore.restore_encoder(tmp_path / "changing").step == 8


@pytest.mark.parametrize("name", ["moco_quickstart", *slow("mae_quickstart", "dino_quickstart"), *SLOW])
def test_a_stopped_run_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
  # Slow copy, queue and learning rate as well: each has once been lost in somebody's resume.
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
  monkeypatch.setattr(parallel, "make_mesh", lambda: jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",)))
  for workdir, stops in (("whole", [None]), ("stopped", [3, 5, None])):
    for stop in stops:
      config = small(name)
      config.stop_after_steps = stop
      assert train.main(config, tmp_path / workdir) == 0
  jax.config.update("jax_compilation_cache_dir", None)
  a, b = (
    ocp.PyTreeCheckpointer().restore(tmp_path / workdir / "checkpoints" / "8" / "state")
    for workdir in ("whole", "stopped")
  )
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)
  rows = [
    [
      {k: v for k, v in row.items() if k not in ("images_per_second", "input_share")}
      for row in log.read_rows(tmp_path / w / "metrics.jsonl")
    ]
    for w in ("whole", "stopped")
  ]
  training = [[row for row in table if "loss" in row] for table in rows]
  assert training[0] == training[1] and len(training[0]) == 8


@pytest.mark.parametrize("name", ["mae_quickstart", "dino_quickstart", *slow("quickstart", "moco_quickstart"), *SLOW])
def test_the_encoders_output_does_not_depend_on_batch_mates(name):
  _, encoder = build.method_of(small(name), 8, 4)
  rng = np.random.default_rng(1)
  images = rng.uniform(size=(4, 16, 16, 1)).astype(np.float32)
  shapes = jax.eval_shape(lambda key: encoder.init(key, images, train=False), jax.random.key(0))
  variables = jax.tree.map(lambda x: rng.uniform(0.05, 0.1, x.shape).astype(x.dtype), shapes)
  apply = jax.jit(lambda images: encoder.apply(variables, images, train=False))
  together = apply(images)
  for i in range(4):
    np.testing.assert_allclose(apply(images[i : i + 1])[0], together[i], atol=1e-5)


@pytest.mark.parametrize("name", [*METHODS[:2], *METHODS[3:5], *SLOW])
def test_slow_copies_are_arrays_of_their_own(name, mesh, monkeypatch):  # donated state must not alias
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(1))
  state = build.run(small(name)).init()
  places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert len(set(places)) == len(places)


def test_a_uniform_teacher_and_a_single_prototype_are_told():
  fine = {"step": 5, "feature_std": 1.0, "effective_rank": 9.0, "alignment": 0.3}
  uniform = {**fine, "teacher_entropy": 0.999, "marginal_entropy": 1.0}
  assert "uniform" in monitors.collapse_warning(uniform)
  one = {**fine, "teacher_entropy": 0.01, "marginal_entropy": 0.02}
  assert "collapsed" in monitors.collapse_warning(one)
  assert monitors.collapse_warning({**one, "teacher_entropy": 0.4, "marginal_entropy": 0.7}) is None
