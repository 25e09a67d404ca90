"""Supervised objectives: mixing and targets against timm's formulas, steps by hand, devices, microbatches, resume."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_all_methods import few_images, in_memory, small  # noqa: F401

import train
from runs import final_state
from ssl_jax import augment, build, data, parallel, restore
from ssl_jax.errors import UserError
from ssl_jax.methods import supervised
from ssl_jax.models import heads, vit
from ssl_jax.run import log

KEYS = [jax.random.key(i) for i in range(40)]


def timm_mixed(images, targets, lam, box):
  """`Mixup._mix_batch` of timm in float64, for a batch whose mirrored place is the neighbour's; `box` is None or
  rows and columns of cutmix's."""
  order = np.concatenate([np.arange(0, len(images), 2), np.arange(1, len(images), 2)[::-1]])  # 0 2 3 1
  x, y = images[order].astype(np.float64), targets[order].astype(np.float64)
  flipped = x[::-1].copy()
  if box is None:
    x = x * lam + flipped * (1 - lam)
  else:
    (top, bottom), (left, right) = box
    x[:, top:bottom, left:right] = flipped[:, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (x.shape[1] * x.shape[2])
  y = y * lam + y[::-1] * (1 - lam)
  back = np.argsort(order)
  return x[back], y[back]


def test_mixing_is_timms_and_each_kind_is_drawn_half_of_the_time():
  rng = np.random.default_rng(0)
  images, labels = rng.normal(size=(6, 9, 8, 2)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0])
  targets = supervised.soft_targets(jnp.asarray(labels), 3, 0.1)
  np.testing.assert_allclose(targets, np.eye(3)[labels] * 0.9 + 0.1 / 3, rtol=1e-6)  # timm: on 1 - s + s/K, off s/K
  mix = jax.jit(lambda key: supervised.mix(key, images, targets, mixup=0.8, cutmix=1.0))
  seen = {"mixup": [], "cutmix": []}
  for key in KEYS:
    mixed, soft = map(np.asarray, mix(key))
    # lam by the targets: of images 0 and 1, of classes 0 and 1.
    lam = float((soft[0, 0] - 0.1 / 3) / 0.9)
    own = np.isclose(mixed[0], images[0]).all(axis=2)
    theirs = np.isclose(mixed[0], images[1]).all(axis=2)
    box = None
    if (own | theirs).all():  # pixels of the one or the other
      rows, columns = np.flatnonzero(theirs.any(axis=1)), np.flatnonzero(theirs.any(axis=0))
      box = [(int(x.min()), int(x.max()) + 1) if len(x) else (0, 0) for x in (rows, columns)]
    want = timm_mixed(images, np.asarray(targets), lam, box)
    np.testing.assert_allclose(mixed, want[0], atol=1e-5)
    np.testing.assert_allclose(soft, want[1], atol=1e-6)
    seen["mixup" if box is None else "cutmix"].append(lam)
  assert all(len(x) > 10 for x in seen.values())


def test_how_much_is_mixed_has_timms_distribution():
  keys, images, targets = jax.random.split(jax.random.key(0), 1000), jnp.ones((2, 8, 8, 1)), jnp.eye(2)
  rng = np.random.default_rng(1)
  lam, middle = rng.beta(1.0, 1.0, 4000), rng.integers(0, 8, (2, 4000))
  half = (8 * np.sqrt(1 - lam)).astype(int) // 2
  sides = np.clip(middle + half, 0, 8) - np.clip(middle - half, 0, 8)
  for kind, want in (
    ({"mixup": 0.8, "cutmix": 0.0}, rng.beta(0.8, 0.8, 4000)),
    ({"mixup": 0.0, "cutmix": 1.0}, 1 - sides[0] * sides[1] / 64),
  ):
    got = jax.jit(jax.vmap(lambda key, kind=kind: supervised.mix(key, images, targets, **kind)[1][0, 0]))(keys)
    # 4 standard errors; one kind alone is drawn always
    assert abs(np.mean(got) - np.mean(want)) < 0.05 and abs(np.std(got) - np.std(want)) < 0.025, kind


@pytest.mark.parametrize("lam, place", [(0.3, (0.0, 0.99)), (0.75, (0.5, 0.5)), (0.0, (0.5, 0.1)), (1.0, (0.2, 0.2))])
def test_the_box_of_cutmix_is_timms(lam, place):
  size = (9, 14)
  want = np.zeros(size)
  ratio, edges = np.sqrt(1 - lam), []
  for n, u in zip(size, place, strict=True):  # rand_bbox; its randint is the draw's floor
    cut, middle = int(n * ratio), int(u * n)
    edges.append(np.clip([middle - cut // 2, middle + cut // 2], 0, n))
  want[edges[0][0] : edges[0][1], edges[1][0] : edges[1][1]] = 1
  np.testing.assert_array_equal(supervised.cut_box(jnp.float32(lam), jnp.asarray(place), size), want)


def recipe(**keys):
  config = small("finetune_quickstart")
  config.encoder.update(features="pooled", drop_path=0.5, depth=2)
  config.method.classes = 2
  config.method.head.init_std = 0.3
  with config.unlocked():
    for key, value in keys.items():
      setattr(config, key, value)
  return config


def frozen(**head):
  config = recipe(encoder=dict(name="resnet", stages=(1,), width=0.125, stem="patch", features="flat"))
  config.method = dict(name="supervised", train_encoder=False, classes=2, head=dict(init_std=0.01, **head))
  return config


def steps_on(config, mesh, monkeypatch, n=3):
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh)
  run = build.run(config)
  state, rows = run.init(), []
  for _, batch in zip(range(n), run.batches(0), strict=False):
    state, row = run.train_step(state, parallel.put_batch(mesh, {name: batch[name] for name in run.inputs}))
    rows.append(jax.device_get(row))
  assert run.train_step._cache_size() == 1
  return jax.device_get(state), rows


def assert_alike(got, want, rows, want_rows, tolerance):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    scale = max(float(np.max(np.abs(y))), 1e-3)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))
  for a, b in zip(rows, want_rows, strict=True):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.slow
def test_devices_and_microbatches_share_what_is_drawn_for_the_whole_batch(mesh, monkeypatch):
  want, want_rows = steps_on(recipe(), mesh(1), monkeypatch)
  config = recipe(microbatch=4)
  config.parallel.shard_state = True
  monkeypatch.setattr(parallel, "SMALLEST_SPLIT", 1)
  got, rows = steps_on(config, mesh(2), monkeypatch)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    scale = max(float(np.max(np.abs(y))), 1e-3)  # float32 sums in another order
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-4 * scale, err_msg=jax.tree_util.keystr(path))
  for a, b in zip(rows, want_rows, strict=True):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def step_on_two(config, mesh, monkeypatch):
  """(run, the state before a step on two devices, the batch, images that it drew, the state after it, metrics)."""
  config.method.label_smoothing = 0.1
  config.optimizer = dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.01)
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(2))
  run = build.run(config)
  state = run.init()
  begun, batch = jax.device_get(state), next(run.batches(0))
  got, row = run.train_step(state, parallel.put_batch(run.mesh, {name: batch[name] for name in run.inputs}))
  keys = augment.example_keys(config.seed, jnp.int32(0), jnp.arange(8))
  images = jax.jit(lambda x: augment.make_views(keys, x, run.views)[0][0])(batch["image"])
  return run, begun, batch, images, jax.device_get(got), row


def assert_head_by_hand(run, begun, got, row, x, z, y):
  """The step of a linear layer on z [8, d] with targets y, in float64; x are the encoder's features."""
  w, b = (np.asarray(begun.params["head"]["linear"][k], np.float64) for k in ("kernel", "bias"))
  logits = z @ w + b
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(row["loss"], -np.mean(np.sum(y * np.log(p), 1)), rtol=1e-4)
  np.testing.assert_allclose(row["feature_norm"], np.linalg.norm(x, axis=1).mean(), rtol=1e-4)
  assert row["accuracy"] == np.mean(logits.argmax(1) == y.argmax(1))
  for name, parameter, gradient in (("kernel", w, z.T @ (p - y) / 8), ("bias", b, (p - y).mean(0))):
    gradient = gradient + 0.01 * parameter
    want = parameter - run.config.lr.base * (gradient + 0.9 * gradient)  # Nesterov's first step
    np.testing.assert_allclose(got.params["head"]["linear"][name], want, rtol=1e-3, atol=1e-6)


def encoded(run, variables, images):
  return np.asarray(jax.jit(lambda x: run.encoder.apply(variables, x, train=False))(images), np.float64)


def test_a_step_of_the_linear_protocol_is_the_one_by_hand_and_leaves_the_encoder_alone(mesh, monkeypatch):
  run, begun, batch, images, got, row = step_on_two(frozen(batch_norm=True), mesh, monkeypatch)
  x = encoded(run, run.method.encoder(begun.params, begun.state), images)
  z = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)  # of both devices' images
  assert_head_by_hand(run, begun, got, row, x, z, np.eye(2)[batch["label"]] * 0.9 + 0.05)
  before, after = (x.state.frozen | {"stats": x.state.batch_stats["encoder"]} for x in (begun, got))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  np.testing.assert_allclose(got.state.batch_stats["head"]["bn"]["mean"], 0.1 * x.mean(0), rtol=1e-3, atol=1e-5)
  sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (got.params, got.opt_state)]
  assert set(got.params) == {"head"} and sizes[1] == sizes[0] + 1  # no momentum but the head's; a step's number


@pytest.mark.slow
def test_a_step_of_fine_tuning_is_the_one_by_hand_on_mixed_images(mesh, monkeypatch):
  config = recipe()
  config.encoder.update(depth=1, drop_path=0.0)
  run, begun, batch, images, got, row = step_on_two(config, mesh, monkeypatch)
  targets = jnp.asarray(np.eye(2)[batch["label"]] * 0.9 + 0.05, jnp.float32)
  key = augment.batch_key(config.seed, jnp.int32(0))
  mixed, y = jax.jit(lambda *x: supervised.mix(key, *x, mixup=0.8, cutmix=1.0))(images, targets)
  assert not np.array_equal(mixed, images)
  x = encoded(run, run.method.encoder(begun.params, begun.state), mixed)
  assert_head_by_hand(run, begun, got, row, x, x, np.asarray(y, np.float64))
  assert np.any(got.params["encoder"]["fc_norm"]["bias"])  # the encoder is trained too


def test_drop_path_is_drawn_by_example_and_only_where_the_encoder_is_trained():
  seen = []

  class Encoder(nn.Module):
    drop_path: float = 0.5
    depth: int = 3

    @nn.compact
    def __call__(self, images, *, train, uniforms=None):
      seen.append(uniforms)
      return nn.Dense(4)(jnp.mean(images, axis=(1, 2)))

  keys, labels = augment.example_keys(0, jnp.int32(0), jnp.arange(6)), jnp.zeros(6, jnp.int32)
  for train_encoder in (True, False):
    network = heads.ClassifierNetwork(Encoder(), heads.LinearClassifier(2), train_encoder=train_encoder)
    method = supervised.supervised(network)
    params, state = method.init(jax.random.key(0), (jnp.ones((1, 1, 2, 2, 1)),))
    for n in (6, 2):
      method.loss(params, state, (jnp.ones((1, n, 2, 2, 1)),), keys[:n], 0, labels[:n])
  _, all_of_them, two, *frozen_ones = seen
  assert all_of_them.shape == (3, 2, 6) and len(np.unique(all_of_them)) == 36
  np.testing.assert_array_equal(two, all_of_them[..., :2])
  assert all(x is None for x in frozen_ones)


def test_class_tokens_of_the_last_blocks_stand_before_the_mean_of_the_patches():
  encoder = vit.ViT(patch_size=2, dim=8, depth=3, heads=2, image_size=4)
  network = heads.ClassifierNetwork(encoder, heads.LinearClassifier(2), blocks=2, mean_patches=True)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32)
  variables = jax.jit(lambda: network.init(jax.random.key(0), images, train=False))()
  of_encoder = {"params": variables["params"]["encoder"]}
  _, got = jax.jit(lambda: network.apply(variables, images, train=False, method="classify"))()
  older, last = jax.jit(lambda: encoder.apply(of_encoder, images, 2, method="last_blocks"))()
  want = np.concatenate([older[:, 0], last[:, 0], np.mean(last[:, 1:], axis=1)], axis=1)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("made", [recipe, frozen])
def test_a_stopped_run_goes_on_bit_for_bit_and_its_rows_are_of_the_test_images(made, tmp_path, mesh, monkeypatch):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(1))
  for workdir, stops in (("whole", [None]), ("stopped", [3, None])):
    for stop in stops:
      config = made()
      config.stop_after_steps = stop
      assert train.main(config, tmp_path / workdir) == 0
  jax.config.update("jax_compilation_cache_dir", None)
  a, b = (final_state(tmp_path / workdir, 8) for workdir in ("whole", "stopped"))
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)
  first, *_, last = [row for row in log.read_rows(tmp_path / "whole" / "metrics.jsonl") if "test_top1" in row]
  assert last["step"] == 8 and last["test_images"] == 32 and first["guessing_top1"] == 50
  assert last["test_top1_low"] < last["test_top1"] < last["test_top1_high"]
  restored = restore.restore_encoder(tmp_path / "stopped")
  assert restored.features(np.zeros((3, 16, 16, 1), np.uint8)).shape[0] == 3


def unlabelled(labels):
  images = np.zeros((len(labels), 16, 16, 1), np.uint8)
  return in_memory(images, np.asarray(labels, np.int32))


@pytest.mark.parametrize(
  "labels, keys, text",
  [
    ([-1] * 16, {}, r"data\.split='train' of random has no labels, and method\.name='supervised' trains by them"),
    ([0, 1, -1, 1] * 4, {}, r"4 of the 16 images of data\.split='train' of random have no label"),
    ([0, 1, 2, 1] * 4, {}, r"method\.classes=2, and data\.split='train' of random has 3 classes"),
    ([0] * 16, {}, r"of one class"),
    (
      [0, 1] * 8,
      {"method.labels": "9-per-class"},
      r"method\.labels='9-per-class' is more than the 8 images of a class",
    ),
    ([0, 1] * 8, {"method.labels": "half"}, r"method\.labels must be all, a percentage"),
    ([0, 1] * 8, {"method.labels": "2-per-class"}, r"batch_size=8 is more than the 4 images"),
    ([0, 1] * 8, {"batch_size": 4}, r"mix pairs of images, got 1 at once .*batch_size"),
    ([0, 1] * 8, {"method.head.blocks": 1}, r"method\.head\.blocks=1 takes class tokens after the last norm"),
    ([0, 1] * 8, {"encoder.features": "cls", "method.head.blocks": 3}, r"blocks=3 is more than the encoder's 2 blocks"),
  ],
)
def test_wrong_use_is_told_before_anything_is_compiled(labels, keys, text, monkeypatch):
  monkeypatch.setattr(build, "dataset", lambda config, split: unlabelled(labels))
  config = recipe()
  with config.unlocked():
    config.method.update(labels=None)
    config.method.head.update(blocks=None)
    config.update_from_flattened_dict(keys)
  with pytest.raises(UserError, match=text):
    build.run(config)


def test_few_labels_are_drawn_by_class_and_are_the_same_for_every_run(mesh, monkeypatch):
  config = recipe(batch_size=4)
  with config.unlocked():
    config.method.labels = "25%"
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(1))
  drawn = [build.run(config).train_set for _ in range(2)]
  assert np.bincount(drawn[0].labels).tolist() == [4, 4]
  np.testing.assert_array_equal(drawn[0].images, drawn[1].images)


def test_images_that_are_read_from_disk_come_with_the_labels_of_those_that_came(photographs):
  dataset = data.load_folder(str(photographs), "train", channels=3)
  settings = dict(batch_size=24, seed=0, start=0, stop=1, labelled=True)
  batch = next(dataset.batches((augment.View(size=8),), **settings))
  np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
  assert np.sum(batch["index"] != batch["wanted"]) == 1  # one file is broken
  unknown = dataclasses.replace(dataset, labels=np.full(24, -1, np.int32))
  with pytest.raises(UserError, match="has no label, and each image that is trained on needs one"):
    next(unknown.batches((augment.View(size=8),), **settings))
