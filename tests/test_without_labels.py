"""What is measured without labels: against NumPy, closed forms and the monitors; and the command that tells it."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver
from test_all_methods import in_memory
from test_decide import recipe
from test_eval_linear import old_run as old_run

from ssl_jax import augment, data, monitors
from ssl_jax.augment import EvaluationView, View
from ssl_jax.commands import evaluate
from ssl_jax.commands import judge as command
from ssl_jax.errors import UserError
from ssl_jax.evaluation import judge, without_labels
from ssl_jax.evaluation.features import Extractor
from ssl_jax.evaluation.without_labels import alignment, effective_rank, rankme, uniformity

flags.FLAGS.mark_as_parsed()  # command.look reads them


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_numpy(x, other):
  sigma = np.linalg.svd(x, compute_uv=False)
  p = sigma / sigma.sum() + 1e-7
  spectrum = np.linalg.eigvalsh(np.cov(unit(x), rowvar=False))
  distances = np.sum((unit(x)[:, None] - unit(x)[None]) ** 2, axis=2)[~np.eye(len(x), dtype=bool)]
  return {
    "rankme": np.exp(-np.sum(p * np.log(p))),
    "effective_rank": spectrum.sum() ** 2 / np.sum(spectrum**2),
    "uniformity": np.log(np.mean(np.exp(-2 * distances))),
    "alignment": np.mean(np.linalg.norm(unit(x) - unit(other), axis=1) ** 2),
  }


def measured(x, other):
  return {f.__name__: f(x) for f in (rankme, effective_rank, uniformity)} | {"alignment": alignment(x, other)}


@pytest.mark.parametrize("shape", [(37, 8), (9, 20)])
def test_the_measures_are_those_of_numpy(shape, monkeypatch):
  monkeypatch.setattr(without_labels, "_BLOCK", 16)  # three blocks of rows, the last one moved back
  rng = np.random.default_rng(0)
  x = (rng.normal(size=shape) + 0.5) * np.geomspace(5, 0.01, shape[1])
  other = x + 0.3 * rng.normal(size=shape)
  want = by_numpy(x, other)
  with jax.enable_x64(True):
    for name, value in measured(x, other).items():
      assert value.dtype == np.float64
      np.testing.assert_allclose(value, want[name], rtol=1e-10)
  narrow = measured(np.float32(x), np.float32(other))
  for name, value in narrow.items():
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, want[name], rtol=1e-5)
  half = rankme(np.float16(x))
  assert half.dtype == np.float32 and half == pytest.approx(want["rankme"], rel=1e-2)


def test_the_measures_have_their_closed_forms():
  rng = np.random.default_rng(1)
  q, _ = np.linalg.qr(rng.normal(size=(12, 12)))
  assert rankme(np.float32(q[:, :5])) == pytest.approx(5, rel=1e-4)  # equal singular values
  assert rankme(np.float32(q[:, :2] * [3, 1] @ q[:2])) == pytest.approx(
    np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)), rel=1e-3
  )
  one_way = np.outer(rng.uniform(1, 2, 12), q[0]).astype(np.float32)
  assert rankme(one_way) == pytest.approx(1, abs=1e-3) and effective_rank(one_way) == pytest.approx(0, abs=1e-3)
  assert rankme(np.zeros((3, 4), np.float32)) == pytest.approx(1, abs=1e-3)
  simplex = (np.eye(6) - 1 / 6).astype(np.float32)  # whose covariance has five equal eigenvalues
  assert effective_rank(simplex) == pytest.approx(5, rel=1e-4)
  axes = np.eye(4, dtype=np.float32)
  assert uniformity(axes) == pytest.approx(-4) and uniformity(np.stack([axes[0], -axes[0]])) == pytest.approx(-8)
  assert uniformity(one_way) == pytest.approx(0, abs=1e-5)
  assert alignment(axes, 3 * axes) == 0 and alignment(axes, -axes) == pytest.approx(4)
  assert alignment(axes, axes[::-1]) == pytest.approx(2)


def test_rank_and_spread_are_those_of_the_monitors_of_training():
  x = np.random.default_rng(2).normal(size=(64, 10)).astype(np.float32) + 0.3
  want = jax.jit(monitors.measure)(np.stack([x, x[::-1]], axis=1))
  for name, value in measured(x, x[::-1]).items():
    if name != "rankme":
      assert value == pytest.approx(float(want[name]), rel=1e-4)


@pytest.mark.parametrize(
  "call, error, text",
  [
    (lambda: rankme(np.ones(3)), ValueError, r"features must be \[N, d\] and not empty, got \[3\]"),
    (lambda: effective_rank(np.ones((0, 3))), ValueError, r"not empty, got \[0, 3\]"),
    (lambda: rankme(np.ones((2, 2), int)), TypeError, "features must be floating point, got int"),
    (lambda: uniformity(np.ones((1, 3))), ValueError, r"two rows at least, got \[1, 3\]"),
    (lambda: alignment(np.ones((2, 3)), np.ones((3, 3))), ValueError, r"one shape, got \[2, 3\] and \[3, 3\]"),
    (lambda: alignment(np.ones((2, 3)), np.ones((2, 3), int)), TypeError, "second must be floating point"),
  ],
)
def test_wrong_arguments_are_named(call, error, text):
  with pytest.raises(error, match=text):
    call()


def test_neighbours_are_the_most_similar_others():
  angles = np.deg2rad([0, 10, 25, 180, 4])
  features = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [9], [0.1], [5], [2]]
  rows, similarity = judge.nearest(features, np.array([0, 3]), 3)
  assert rows.tolist() == [[4, 1, 2], [2, 1, 4]]
  np.testing.assert_allclose(similarity[0], np.cos(np.deg2rad([4, 10, 25])))
  assert judge.nearest(features, np.array([1]), 9)[0].shape == (1, 4)


def test_pairs_are_two_views_of_evenly_spaced_images_on_several_devices(mesh):
  images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
  dataset, view = in_memory(images, np.full(10, -1)), View(size=6, scale=(0.3, 1.0))
  flat = Extractor(None, EvaluationView(8, 8), mesh(4), 8, lambda _, x: x.reshape(len(x), -1))
  first, second = flat.pairs({}, dataset, view, 4)
  draw = jax.jit(lambda at, x: augment.make_views(augment.example_keys(0, 0, at), x, (view, view)))
  (want,) = draw(np.arange(4), images[[0, 2, 5, 7]])
  np.testing.assert_allclose(first, want[0].reshape(4, -1), atol=1e-6)
  np.testing.assert_allclose(second, want[1].reshape(4, -1), atol=1e-6)
  seven = flat.pairs({}, dataset, view, 7)  # no multiple of the devices
  np.testing.assert_array_equal(seven[0][0], first[0])
  assert len(seven[0]) == len(seven[1]) == 7 and len(flat.pairs({}, dataset, view, 99)[0]) == 10


def test_judge_tells_and_draws_what_images_without_labels_look_like_to_an_encoder(
  old_run, tmp_path, capsys, monkeypatch
):
  workdir, run = old_run
  images = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
  for i, pixels in enumerate([*images, images[0] ^ 1]):  # the last is nearest to the first
    PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
  monkeypatch.setattr(judge, "SHOWN", 2)  # drawing takes long
  with flagsaver.flagsaver(workdir=str(workdir), folder=str(tmp_path), split="train"):
    assert command.look() == 0
  out = capsys.readouterr().out.splitlines()
  figures = json.loads(out[-1])
  (written,) = workdir.glob("judge_*.json")
  assert figures == json.loads(written.read_text()) and figures["images"] == 10 and figures["step"] == run.step
  dataset = in_memory(np.concatenate([images, images[:1] ^ 1])[..., None], np.full(10, -1))
  want = judge.measure(run.extractor.all(run.variables, dataset).features)
  assert all(figures[name] == pytest.approx(value, rel=1e-4) for name, value in want.items())
  assert (
    0 < figures["alignment"] < 2 and figures["untrained_rankme"] != figures["rankme"] and "pixels_rankme" in figures
  )
  (picture,) = workdir.glob("neighbours_*.png")
  with PIL.Image.open(picture) as drawn:
    assert drawn.size[0] > 3 * drawn.size[1] and f"wrote {picture}" in out
  drawn = judge.columns(dataset, np.arange(10), run.eval_view, np.array([0]), {"encoder": np.array([[9, 3]])})
  assert [name for name, _ in drawn] == ["image", "encoder\n1", "encoder\n2"]
  np.testing.assert_array_equal(drawn[1][1][0][..., 0], (images[0] ^ 1) / 255)
  for given, told in ((dict(test_split="test"), "judge looks at one"), (dict(images=2), "--images must be at least 3")):
    with flagsaver.flagsaver(workdir=str(workdir), **given), pytest.raises(UserError, match=told):
      command.look()


def test_colours_that_become_grey_are_told_of_other_images_than_the_runs(photographs, monkeypatch, capsys):
  config, images = recipe("quickstart"), np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
  lost = "images looked at have colours, which become grey\n"
  with flagsaver.flagsaver(folder=str(photographs)):
    evaluate.find(config, "val[:5]")
  assert capsys.readouterr().out == f"{photographs} val: data.channels=1: 7 of 7 {lost}"
  monkeypatch.setattr(data, "load", lambda *_, channels=3, **__: in_memory(images[..., :channels], np.full(3, -1)))
  with flagsaver.flagsaver(data="pets"):
    evaluate.find(config, "test")
    assert capsys.readouterr().out.endswith(f"test: data.channels=1: 3 of 3 {lost}")
    config.data.channels = 3
    evaluate.find(config, "test")
  config.data.channels = 1
  evaluate.find(config, "test")
  assert capsys.readouterr().out == ""
