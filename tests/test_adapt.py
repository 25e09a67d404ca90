"""Going on from good features: heads first, the guard, the best state handed back; killed and resumed bit for bit."""

import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import train
from runs import ROOT, final_state
from ssl_jax import build, restore
from ssl_jax.errors import UserError
from ssl_jax.evaluation import guard
from ssl_jax.evaluation.features import Features
from ssl_jax.weights import layouts


def small_config(**overrides):
  config = runpy.run_path(str(ROOT / "configs" / "adapt.py"))["get_config"]("quickstart")
  config.encoder = dict(name="vit", patch_size=7, dim=12, depth=2, heads=3)
  config.method.head.update(hidden=8, bottleneck=4, prototypes=16)
  given = {"data.split": "train[:128]", "data.test_split": "test[:64]", "batch_size": 32, "steps": 12}
  given |= {"heads_first_steps": 4, "log_every_steps": 2, "checkpoint_every_steps": 2, "lr.base": 0.05}
  config.update_from_flattened_dict(given | overrides)
  return config


@pytest.mark.parametrize("version", ["vit_small", "quickstart"])
def test_no_weights_to_adapt_are_refused_before_any_work(version, monkeypatch):
  monkeypatch.setattr(build, "dataset", None)  # the work
  config = runpy.run_path(str(ROOT / "configs" / "adapt.py"))["get_config"](version)
  with pytest.raises(UserError, match=r"^init_from must be a workdir, an export or a file of weights to start from"):
    build.run(config)


@pytest.fixture
def weights(tmp_path):
  """A file of an encoder for `small_config`."""
  _, encoder = build.method_of(small_config(), 10, 10)
  shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, shapes)
  safetensors.numpy.save_file(layouts.whole_state(encoder, variables), tmp_path / "x.safetensors")
  return str(tmp_path / "x.safetensors"), variables["params"]


@pytest.mark.slow
def test_the_encoder_waits_and_a_run_that_was_stopped_is_the_same(weights, tmp_path, monkeypatch):
  path, start = weights
  config = small_config(init_from=path, keep_checkpoints=20)
  assert train.main(config, tmp_path / "a") == 0
  for stop in (7, None):  # on the way up of the encoder's share, where nothing else happens
    config.stop_after_steps = stop
    assert train.main(config, tmp_path / "b") == 0
  ends = [final_state(tmp_path / name, 12) for name in "ab"]
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), *ends)
  at = {step: final_state(tmp_path / "a", step)["params"] for step in (0, 4, 12)}
  jax.tree.map(np.testing.assert_array_equal, at[4]["encoder"], start)
  moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), at[12]["encoder"], start)
  assert not any(jax.tree.leaves(moved.pop("patch_embed"))) and all(jax.tree.leaves(moved))
  assert not np.array_equal(at[0]["head"]["mlp_0"]["kernel"], at[4]["head"]["mlp_0"]["kernel"])


@pytest.mark.slow
def test_a_ruined_encoder_is_told_and_the_start_handed_back(weights, tmp_path, monkeypatch, capsys):
  path, start = weights
  scores = iter([90.0, 50.0, 20.0, 30.0])
  real = train.during_training.evaluate

  def evaluate(run, state, step):
    return real(run, state, step) | {"knn_top1": next(scores)}

  monkeypatch.setattr(train.during_training, "evaluate", evaluate)
  assert train.main(small_config(init_from=path, keep_checkpoints=1), tmp_path / "run") == 0
  out = capsys.readouterr().out
  assert (
    "k-NN 90.00 % at the start, 20.00 % at the worst (step 8), 30.00 % at the end, 90.00 % at the best (step 0)" in out
  )
  assert "the start was best, and this training made the features worse: restore_encoder" in out
  restored = restore.restore_encoder(tmp_path / "run")
  assert restored.step == 0 and restore.restore_encoder(tmp_path / "run", 12).step == 12
  jax.tree.map(np.testing.assert_array_equal, restored.variables["params"], start)


def cosine(x, y):
  return np.mean(np.sum(x * y, axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))


def test_without_labels_the_latest_state_that_keeps_its_rank_is_the_best(tmp_path):
  rng = np.random.default_rng(0)
  wide = rng.normal(size=(64, 16)).astype(np.float32)
  thin = wide * np.array([1.0] * 2 + [0.01] * 14, np.float32) + 1
  near = wide + 0.1 * rng.normal(size=wide.shape).astype(np.float32)
  every = np.arange(64)
  given = iter([(wide, every), (near[1:], every[1:]), (thin, every)])  # once the first image is unreadable
  extractor = types.SimpleNamespace(all=lambda *_: Features((got := next(given))[0], None, got[1]))
  method = types.SimpleNamespace(encoder=lambda *_: None)
  images = types.SimpleNamespace(thinned=lambda count: range(64))
  run = types.SimpleNamespace(method=method, extractor=extractor, train_set=images)
  state = types.SimpleNamespace(params=None, state=None)
  rows = [{"step": step} | guard.measure(run, state, step, tmp_path, None) for step in (0, 10, 20)]
  assert rows[0]["start_cosine"] == pytest.approx(1, abs=1e-6) and rows[0]["start_rank"] == 1
  assert 0.98 < rows[1]["start_cosine"] < 1 and rows[2]["start_rank"] < 0.5
  np.testing.assert_allclose(rows[1]["start_cosine"], cosine(near[1:], wide[1:]), rtol=1e-5)
  assert [row["guard"] for row in rows] == [0, 10, -1] and guard.best_step(rows) == 10
  assert guard.in_words(rows)[1] == "restore_encoder and every evaluation take step 10"
  fewer, cut, gone = (lambda path: np.save(path, wide[1:])), (lambda path: path.write_bytes(b"")), pathlib.Path.unlink
  for spoil in (fewer, cut, gone):
    spoil(tmp_path / "start_features.npy")
    given = iter([(wide, every)])
    with pytest.raises(UserError, match=r"start_features.npy, with which .*, is gone or damaged"):
      guard.measure(run, state, 30, tmp_path, None)
  equal = [row | {"knn_top1": 90.0, "guard": 90.0} for row in rows]
  assert guard.in_words(equal)[1].startswith(
    "no state was better than the start, and of equal ones the latest counts: "
  )
