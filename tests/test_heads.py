"""DINOv2's linear heads against SGD in float64 NumPy, what they read of an encoder, and features that are kept."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from test_all_methods import in_memory
from test_eval_linear import old_run as old_run

import eval_linear
from ssl_jax.augment import EvaluationView
from ssl_jax.data import load_folder
from ssl_jax.errors import UserError
from ssl_jax.evaluation import cache, features, heads
from ssl_jax.evaluation.features import Features
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.vit import ViT

READS = {"first": slice(0, 3), "all": slice(0, 7)}


def problem(n=50, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, n)
  return (rng.normal(size=(n, 7)) + 2 * np.eye(7)[labels]).astype(np.float32), labels


def test_heads_are_those_of_sgd_with_momentum_and_a_cosine_each_alone(monkeypatch):
  x, labels = problem()
  monkeypatch.setattr(heads, "_AT_ONCE", 3 * 4 * 16 * 7)  # three steps a call; the last call is filled up
  settings = dict(steps=10, batch_size=16, num_classes=3)
  rates = (0.5, 40.0, 1e6)
  got = heads.train(x, labels, reads=READS, rates=rates, rng=np.random.default_rng(1), **settings)
  rng = np.random.default_rng(1)
  for name, columns in READS.items():
    weights = 0.01 * rng.standard_normal((3, x[:, columns].shape[1], 3), dtype=np.float32)
    batches = np.random.default_rng(1)
    for columns_before in READS.values():  # drawn before the order
      batches.standard_normal((3, x[:, columns_before].shape[1], 3), dtype=np.float32)
    order = np.concatenate([batches.permutation(50) for _ in range(4)])
    for r in range(2):
      w, b, mw, mb = np.float64(weights[r]), np.zeros(3), 0, 0
      for t in range(10):
        at = order[16 * t : 16 * t + 16]
        logits = x[at][:, columns] @ w + b
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        residual = (p / p.sum(axis=1, keepdims=True) - np.eye(3)[labels[at]]) / 16
        mw, mb = 0.9 * mw + x[at][:, columns].T @ residual, 0.9 * mb + residual.sum(axis=0)
        rate = rates[r] * 16 / 256 * 0.5 * (1 + np.cos(np.pi * t / 10))
        w, b = w - rate * mw, b - rate * mb
      np.testing.assert_allclose(got[name][0][r], w, atol=1e-5 * np.abs(w).max())
      np.testing.assert_allclose(got[name][1][r], b, atol=1e-5 * np.abs(w).max())


def test_the_head_is_chosen_on_held_out_training_images_and_trained_again_on_all(monkeypatch):
  x, labels = problem(100)
  calls: list = []

  def train(features, given, *, reads, rates, **_):
    calls.append((len(features), list(reads), rates))
    # The head of rate r on the first input answers r; on the second all are right, but for one that is not finite.
    value = {name: (np.zeros((len(rates), 7, 3)), np.eye(3)[: len(rates)]) for name in reads}
    if "all" in reads:
      value["all"] = np.stack([100 * np.eye(7)[:, :3]] * len(rates)), np.zeros((len(rates), 3))
      value["all"][0][0] = np.nan if len(rates) > 1 else value["all"][0][0]
    return {name: (weight if name == "all" else weight[:, :3], bias) for name, (weight, bias) in value.items()}

  monkeypatch.setattr(heads, "train", train)
  settings = dict(reads=READS, rates=(0.1, 0.2, 0.3), steps=1, batch_size=16, rng=np.random.default_rng(0))
  got = heads.score(x, labels, x, labels, **settings)
  assert calls == [(90, ["first", "all"], (0.1, 0.2, 0.3)), (100, ["all"], (0.2,))]
  assert got.chosen == {"input": "all", "learning_rate": pytest.approx(0.2 * 16 / 256)}
  np.testing.assert_array_equal(got.answers, np.argmax(x[:, :3], axis=1))


def test_no_finite_head_is_told():
  x, labels = problem()
  settings = dict(reads=READS, rates=(1e38,), steps=20, batch_size=16, rng=np.random.default_rng(0))
  with pytest.raises(UserError, match="not finite at any of the learning rates: give smaller ones by --rates"):
    heads.score(1e8 * x, labels, x, labels, **settings)


def jitted_init(encoder, images):
  return jax.jit(lambda key, x: encoder.init(key, x, train=False))(jax.random.key(0), images)


@pytest.fixture(scope="module")
def vit():
  encoder = ViT(patch_size=7, dim=8, depth=3, heads=2, image_size=14, init_std=0.5, registers=2, features="mean")
  variables = jitted_init(encoder, jnp.zeros((1, 14, 14, 1)))
  return encoder, variables, jax.random.uniform(jax.random.key(1), (5, 14, 14, 1))


def test_a_vit_is_read_by_blocks_and_pooling(vit):
  encoder, variables, images = vit
  kinds = (None, 1), ("mean", 1), ("cls", 1), ("cls", 3), ("cls+mean", 2), ("flat", 1), ("cls+mean", 3)

  @jax.jit
  def blocks_and_features(variables, images):
    outputs = encoder.apply(variables, images, method="outputs")
    tokens = [encoder.apply(variables, x, method=lambda m, x: m.norm(x)) for x in outputs]
    return tokens, [features.reading(encoder, kind, n)(variables, images) for kind, n in kinds]

  tokens, found = blocks_and_features(variables, images)
  cls, mean = [np.asarray(x[:, 0]) for x in tokens], np.asarray(tokens[-1][:, 3:].mean(axis=1))
  flat = np.asarray(tokens[-1][:, 3:]).reshape(5, -1)
  for got, want in zip(found, ([mean], [mean], cls[2:], cls, [*cls[1:], mean], [flat], [*cls, mean]), strict=True):
    np.testing.assert_allclose(got, np.concatenate(want, axis=1), atol=1e-5)
  for name, want in {
    "1 block": cls[2:],
    "1 block and mean": [cls[2], mean],
    "3 blocks": cls,
    "3 blocks and mean": [*cls, mean],
  }.items():
    np.testing.assert_allclose(found[-1][:, heads.inputs((3, 1), 8)[name]], np.concatenate(want, axis=1), atol=1e-5)


@pytest.mark.parametrize(
  "encoder, kind, blocks, text",
  [
    ("vit", "cls", 4, "--blocks=4: the encoder has 3 blocks"),
    ("vit", "cls+mean", 0, "--blocks=0: the encoder has 3 blocks"),
    ("vit", "mean", 2, "--blocks=2 is for the class tokens: give --features=cls"),
    ("vit", "pooled", 1, "--features=pooled: a ViT's features are cls, mean, cls[+]mean or flat"),
    ("resnet", "cls", 1, "--features=cls: a ResNet has no class token"),
    ("resnet", None, 4, "--blocks=4: a ResNet has no class token"),
  ],
)
def test_what_an_encoder_has_not_is_refused(vit, encoder, kind, blocks, text):
  with pytest.raises(UserError, match=text):
    features.reading(vit[0] if encoder == "vit" else ResNet(stages=(1,)), kind, blocks)


def test_a_resnets_maps_are_read_pooled_or_flat():
  encoder = ResNet(stages=(1,), width=0.0625, stem="patch", features="flat")
  images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
  variables = jitted_init(encoder, images)
  both = jax.jit(lambda v, x: [features.reading(encoder, kind)(v, x) for kind in ("flat", "pooled")])
  flat, pooled = both(variables, images)
  assert flat.shape == (2, 2 * 2 * 4)
  np.testing.assert_allclose(flat.reshape(2, 4, 4).mean(axis=1), pooled, rtol=1e-5)


def test_eval_linear_with_heads_beside_pixels_and_kept_features(old_run, vit, monkeypatch, capsys, tmp_path):
  _, run = old_run
  encoder = vit[0]  # whose positions are interpolated
  variables = vit[1]
  monkeypatch.setattr(
    eval_linear.restore,
    "restore_encoder",
    lambda *_: run._replace(encoder=encoder, variables=variables, untrained=lambda: variables),
  )
  given = dict(
    workdir=str(tmp_path), protocol="heads", blocks=["1", "3"], rates=["0.1", "1"], head_steps=30, cache=True
  )
  before = None
  for again in (False, True):
    with flagsaver.flagsaver(**given, pixels=not again):
      assert eval_linear.main() == 0
      out = capsys.readouterr().out
      assert out.count("features of fashion_mnist_mini") == 4 * again
      figures = json.loads(out.splitlines()[-1])
      assert figures == json.loads((tmp_path / "linear_heads_blocks-1-3.json").read_text())
      assert not again or figures == {name: x for name, x in before.items() if not name.startswith("pixels")}
      before = before or figures
  assert figures["input"] in heads.inputs((1, 3), 8) and figures["learning_rate"] in (0.1, 0.1 * 10)
  assert figures["top1"] == figures["untrained_top1"] and before["pixels_top1"] > 30 and figures["protocol"] == "heads"
  with flagsaver.flagsaver(**given | {"blocks": ["4"]}), pytest.raises(UserError, match="the encoder has 3 blocks"):
    eval_linear.main()


class Counting:
  """An extractor whose features are the number of the call."""

  view, calls = EvaluationView(resize=8, size=8), 0

  def all(self, variables, dataset):
    self.calls += 1
    return Features(np.full((len(dataset), 2), self.calls, np.float32), dataset.labels, np.arange(len(dataset)))


def test_kept_features_are_used_only_while_nothing_that_made_them_has_changed(tmp_path, monkeypatch):
  extractor, variables = Counting(), {"a": jnp.arange(3.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
  images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), np.array([0, 1, -1])

  def is_computed(variables=variables, images=images, labels=labels, about="as it is", split="train"):
    before, dataset = extractor.calls, in_memory(images, labels, split)
    found = cache.features(extractor, variables, dataset, tmp_path / "kept", "encoder", {"about": about})
    np.testing.assert_array_equal(found.labels, labels)
    assert found.features.shape == (len(images), 2) and (extractor.calls == before or found.features[0, 0] > before)
    return extractor.calls > before

  assert is_computed() and not is_computed()
  for change in (
    dict(variables={**variables, "a": jnp.array([0, 1, 2.0000002])}),
    dict(variables={"a": variables["a"], "c": variables["b"]}),
    dict(images=images ^ np.uint8(np.arange(12).reshape(3, 2, 2, 1) == 7)),
    dict(labels=np.array([0, 0, -1])),
    dict(images=images[:2], labels=labels[:2]),
    dict(images=images.reshape(3, 4, 1, 1)),
    dict(about="another"),
  ):
    assert is_computed(**change) and not is_computed(**change), change
    assert is_computed() and not is_computed()  # the file was the other's, and is written anew
  assert is_computed(split="test") and not is_computed(split="test") and not is_computed()  # a file of its own
  for target, name, value in (
    (extractor, "view", extractor.view._replace(resize=9)),
    (cache, "_code", lambda: "changed"),
    (jax, "__version__", "another"),
  ):
    monkeypatch.setattr(target, name, value)
    assert is_computed() and not is_computed(), name
  path = tmp_path / "kept" / "encoder_random_train.npz"
  for damaged in (path.read_bytes()[:-30], b"", b"no zip"):
    path.write_bytes(damaged)
    assert is_computed() and not is_computed()
  assert sorted(os.listdir(tmp_path / "kept")) == ["encoder_random_test.npz", "encoder_random_train.npz"]


def test_files_that_change_are_other_contents(photographs):
  dataset = load_folder(photographs, "train")  # of several sizes, so read one by one
  before = dataset.contents()
  assert load_folder(photographs, "train").contents() == before != dataset.take(np.arange(3)).contents()
  assert dataclasses.replace(dataset, labels=dataset.labels[::-1].copy()).contents() != before
  path = photographs / "train" / "b" / "1.png"
  times, content = path.stat(), path.read_bytes()
  path.write_bytes(content[:-1] + b"?")  # of the same size
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # and date
  assert load_folder(photographs, "train").contents() != before
