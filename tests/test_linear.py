"""Logistic regression against scikit-learn's solutions, the protocol around it, and what a restored encoder gives."""

import json
import pathlib
import re
import tarfile

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from test_all_methods import in_memory

import eval_knn
import eval_linear
from ssl_jax import build, logistic_regression, parallel, restore, restore_encoder
from ssl_jax.commands import evaluate
from ssl_jax.errors import UserError
from ssl_jax.evaluation import accuracy, features, intervals, linear, probe, scores
from ssl_jax.run import log

flags.FLAGS.mark_as_parsed()  # eval_linear.main reads them


@pytest.fixture(autouse=True)
def three_blocks(monkeypatch):
  """Features are taken up 150 rows at a time: of the golden problem's 400 the last block is moved back."""
  monkeypatch.setattr(linear, "_BLOCK", 150 * 24 * 8)


@pytest.fixture(scope="module")
def problem(golden):
  g, n = golden("logreg"), int(golden("logreg")["n_train"])
  return g, (g["features"][:n], g["labels"][:n])


def test_all_penalties_reach_scikit_learns_minimum_on_features_of_any_scale(problem):
  g, (x, y) = problem
  order = np.random.default_rng(0).permutation(len(g["C"]))
  found = logistic_regression(x, y, C=g["C"][order])
  assert found.coef.dtype == np.float64 and not jax.config.jax_enable_x64
  np.testing.assert_allclose(found.objective, g["objective"][order], rtol=1e-6)
  assert np.all(found.gap < 1e-6) and np.all(found.objective / g["objective"][order] - 1 < found.gap + 1e-9)
  for i, p in enumerate(order):
    if g["C"][p] <= 1e3:
      np.testing.assert_allclose(found.coef[i], g["coef"][p], atol=1e-3 * np.abs(g["coef"][p]).max())
    np.testing.assert_allclose(found.intercept[i], g["intercept"][p], atol=2e-3)
  np.testing.assert_allclose(found.intercept.mean(axis=1), 0, atol=1e-12)
  logits = np.einsum("nd,pkd->pnk", g["features"], found.coef) + found.intercept[:, None]
  correct = np.argmax(logits, axis=2) == g["labels"]
  assert np.all(np.abs(correct[:, : len(x)].sum(axis=1) - g["train_correct"][order]) <= 1)
  assert np.all(np.abs(correct[:, len(x) :].sum(axis=1) - g["test_correct"][order]) <= 1)


def objective(x, y, coef, intercept, c):
  """The docstring's formula in float64 NumPy, and its gradient by coef and intercept."""
  logits = x @ coef.T + intercept
  logits = logits - logits.max(axis=1, keepdims=True)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  residual = p - np.eye(len(coef))[y]
  value = -np.log(p[np.arange(len(x)), y]).sum() + (coef**2).sum() / (2 * c)
  return value, residual.T @ x + coef / c, residual.sum(axis=0)


def test_features_of_very_different_scales_and_offsets_are_solved_as_they_are(problem):
  g, (x, y) = problem
  scale = np.logspace(-3, 3, x.shape[1])
  x = np.float64(x) * scale + 10 * scale
  found = logistic_regression(x, y, C=g["C"])
  for i, c in enumerate(g["C"]):
    value, by_coef, by_intercept = objective(x, y, found.coef[i], found.intercept[i], c)
    np.testing.assert_allclose(found.objective[i], value, rtol=1e-8)
    # The duality gap: no other coefficients are better by more, whatever the solver believes.
    assert c / 2 * (by_coef**2).sum() + np.abs(by_intercept @ found.intercept[i]) < 1e-4 * value


def test_fewer_images_than_features_have_the_same_minimum():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(9, 20)) + 3, np.arange(9) % 3
  found = logistic_regression(x, y, C=10.0)
  value, by_coef, by_intercept = objective(x, y, found.coef[0], found.intercept[0], 10.0)
  np.testing.assert_allclose(found.objective[0], value, rtol=1e-9)
  assert 10 / 2 * (by_coef**2).sum() + np.abs(by_intercept @ found.intercept[0]) < 1e-4 * value


def test_float32_is_as_near_as_it_says(problem, monkeypatch):
  g, (x, y) = problem
  monkeypatch.setattr(linear.jax, "default_backend", lambda: "tpu")
  found = logistic_regression(x, y, C=g["C"][4:7])
  assert found.coef.dtype == np.float32
  np.testing.assert_allclose(found.objective, g["objective"][4:7], rtol=1e-5)
  for coef, want in zip(found.coef, g["coef"][4:7], strict=True):
    np.testing.assert_allclose(coef, want, atol=1e-2 * np.abs(want).max())


def test_a_minimum_that_is_not_reached_is_told(problem, monkeypatch):
  g, (x, y) = problem
  monkeypatch.setattr(linear, "_TOLD", 1e-4)  # less than the solver tries for
  with pytest.warns(UserWarning, match=r"C = .*100000 did not reach its minimum in 2000 steps: .* % above it"):
    logistic_regression(x, y, C=g["C"])


X, Y = np.random.default_rng(0).normal(size=(6, 3)), np.array([0, 1, 0, 1, 2, 2])


@pytest.mark.parametrize(
  "change, error, text",
  [
    (dict(features=X[0]), ValueError, r"features must be \[N, d\] and not empty, got \[3\]"),
    (dict(features=X[:0], labels=Y[:0]), ValueError, r"features .* not empty, got \[0, 3\]"),
    (dict(features=X.astype(int)), TypeError, "features must be floating point, got int64"),
    (dict(features=np.where(X[2, 0] == X, np.nan, X)), ValueError, "features: 1 of 6 rows hold NaN or infinity"),
    (dict(labels=Y[:5]), ValueError, r"labels must be \[6\].* got \[5\]"),
    (dict(labels=Y * 1.0), TypeError, "labels must be integers, got float64"),
    (dict(labels=Y - 1), ValueError, r"labels must be in \[0, 2\), got -1 to 1"),
    (dict(num_classes=2), ValueError, r"labels must be in \[0, 2\), got 0 to 2"),
    (dict(labels=Y * 0), ValueError, "num_classes must be at least 2, got 1"),
    (dict(labels=Y * 0 + 1), ValueError, "labels must be of at least two classes, all are 1"),
    (dict(C=0.0), ValueError, "C must be positive and finite, .* got 0.0"),
    (dict(C=[1.0, np.nan]), ValueError, "C must be positive and finite"),
    (dict(C=[]), ValueError, "C must be positive"),
    (dict(C="1"), TypeError, "C must be a number or an array of numbers, got '1'"),
  ],
)
def test_wrong_arguments_are_named(change, error, text):
  with pytest.raises(error, match=text):
    logistic_regression(**{**dict(features=X, labels=Y, C=1.0), **change})


def test_a_tenth_is_held_out_evenly_and_no_class_loses_its_last_image():
  labels = np.repeat(np.arange(5), (40, 40, 100, 19, 1))
  held = [probe.hold_out(labels, np.random.default_rng(seed)) for seed in (0, 0, 1)]
  assert (held[0] == held[1]).all() and (held[0] != held[2]).any()
  for chosen in held:
    counts = np.bincount(labels[chosen], minlength=5)
    assert chosen.sum() == 20 and counts[4] == 0
    assert np.all(np.abs(counts[:4] - [4, 4, 10, 2]) <= 1)
  rare = np.append(np.arange(40), np.zeros(10, int))  # one image of each class but the first
  assert rare[probe.hold_out(rare, np.random.default_rng(0))].tolist() == [0] * 5
  assert probe.hold_out(np.repeat(np.arange(3), 2), np.random.default_rng(0)).sum() == 1


def test_the_labelled_images_are_a_share_or_a_number_of_each_class():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (200, 100, 40)))
  for text, want in (("10%", [20, 10, 4]), ("1%", [2, 1, 1]), ("7-per-class", [7, 7, 7]), ("all", [200, 100, 40])):
    draws = [probe.draw_labelled(labels, probe.parse_labels(text), np.random.default_rng(seed)) for seed in (0, 1)]
    assert all(np.bincount(labels[at]).tolist() == want and len(set(at)) == len(at) for at in draws)
    assert np.array_equal(*draws) == (text == "all")
  for text in ("0%", "101%", "half", "0-per-class", "x-per-class", "1%%", "-5%", "nan%"):
    with pytest.raises(UserError, match="--labels must be all, a percentage"):
      probe.parse_labels(text)


@pytest.mark.parametrize(
  "labels, test_labels, wanted, text",
  [
    ([0, 0, 1, 1], [0, 2, 3], "all", "the training split has no image of classes 2, 3, which the test split has"),
    ([0, 0, 0, -1], [0], "all", "of one class"),
    ([0] * 50 + [1] * 50, [0], "1%", "1% of 100 images is fewer than the 2 classes"),
    ([0, 0, 0, 1, 1], [0], "3-per-class", "3-per-class is more than there are of class 1"),
    ([0, 0, 1, 1], [0], "1-per-class", "leaves none to choose on"),
  ],
)
def test_labels_that_cannot_be_learned_from_are_told(labels, test_labels, wanted, text):
  with pytest.raises(UserError, match=text):
    probe.check_classes(np.array(labels), np.array(test_labels), probe.parse_labels(wanted))


def test_the_penalty_is_chosen_on_held_out_training_images_and_the_rest_is_refitted(problem):
  g, (x, y) = problem
  held = probe.hold_out(y, np.random.default_rng(7))
  every = linear.logistic_regression(x[~held], y[~held], C=g["C"])
  logits = np.einsum("nd,pkd->pnk", x[held], every.coef) + every.intercept[:, None]
  correct = np.sum(np.argmax(logits, axis=2) == y[held], axis=1)
  best = g["C"][np.argmax(correct)]  # of equals the smallest: they ascend
  shuffled = tuple(np.random.default_rng(0).permutation(g["C"]).tolist())
  got = probe.score(x, y, g["features"], g["labels"], penalties=shuffled, rng=np.random.default_rng(7))
  assert got.chosen == {"C": best}
  all_of_it = linear.logistic_regression(x, y, C=best)
  want = np.argmax(g["features"] @ all_of_it.coef[0].T + all_of_it.intercept[0], axis=1)
  np.testing.assert_array_equal(got.answers, want)


def test_the_search_goes_past_penalties_that_answer_with_the_most_frequent_class(monkeypatch):
  rng = np.random.default_rng(0)
  labels = np.arange(200) % 5 // 4  # four to one
  x = rng.normal(size=(200, 4)) + labels[:, None]
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  held = probe.hold_out(labels, rng)
  chosen, tried = linear.choose_penalty(x, labels, held, probe.PENALTIES, 2)
  monkeypatch.setattr(linear, "_PATIENCE", len(probe.PENALTIES))
  linear._count_correct.clear_cache()
  assert (chosen, len(probe.PENALTIES)) == linear.choose_penalty(x, labels, held, probe.PENALTIES, 2)
  assert chosen > 1e-3 and tried > 8
  linear._count_correct.clear_cache()


def test_penalties_far_above_the_best_are_not_tried(problem, monkeypatch):
  g, (x, y) = problem
  held = probe.hold_out(y, np.random.default_rng(7))
  # Right of 40, by rising C: 8, 8, 33, 39, 39, 38, 39, 38, 38, 37, 36, 36.
  assert linear.choose_penalty(x, y, held, g["C"], 5) == (1e-3, 12)
  monkeypatch.setattr(linear, "_PATIENCE", 2)
  linear._count_correct.clear_cache()
  assert linear.choose_penalty(x, y, held, g["C"], 5) == (1e-3, 9)
  linear._count_correct.clear_cache()


def test_intervals_are_those_of_the_papers():
  # Newcombe, 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611.
  np.testing.assert_allclose(intervals.wilson(100 * 81 / 263, 263), (25.53, 36.62), atol=0.01)
  np.testing.assert_allclose(intervals.wilson(0, 20), (0, 16.11), atol=0.01)
  # Newcombe, 1998 (differences), table II, method 10: 56 / 70 - 48 / 80 is in 0.0524 to 0.3339. The mean of 56 / 70 and
  # 1 - 48 / 80 is half of that difference and a half.
  found = intervals.mean_of_shares([100 * 56 / 70, 100 * 32 / 80], [70, 80])
  np.testing.assert_allclose(2 * np.array(found) - 100, (5.24, 33.39), atol=0.01)
  for n in range(1, 200):  # rounding does not leave what a share can be
    for share in (0.0, 100.0):
      found = [intervals.wilson(share, n), intervals.mean_of_shares([share] * 3, [n, n + 1, 7])]
      assert all(0 <= low <= share <= high <= 100 for low, high in found)


def test_the_figures_of_several_draws_are_means_of_their_own():
  labels = np.array([0, 0, 0, 2, 2, 1])
  draws = [
    scores.scored(np.eye(3)[answers], labels, {"C": c, "input": text}, most=2)
    for answers, c, text in (([0, 0, 1, 2, 0, 1], 10.0, "a"), ([0, 1, 1, 2, 2, 2], 0.1, "b"), ([0] * 6, 1.0, "b"))
  ]
  found = scores.summarise(draws, labels)
  each = [4 / 6, 3 / 6, 3 / 6], [(2 / 3 + 1 + 1 / 2) / 3, (1 / 3 + 0 + 1) / 3, 1 / 3]
  for name, values in zip(("top1", "balanced"), each, strict=True):
    assert found[name] == pytest.approx(100 * np.mean(values)) and found[f"{name}_low"] < found[name]
    assert found[f"{name}_std"] == pytest.approx(100 * np.std(values, ddof=1))
  assert found["top5"] == pytest.approx(100 * (5 / 6 + 5 / 6 + 4 / 6) / 3)  # of two answers: the smaller class is next
  assert (found["C"], found["input"]) == (1.0, "b")
  np.testing.assert_array_equal(scores.confusion(draws, labels, 3), [[6, 3, 0], [1, 1, 1], [3, 0, 3]])
  np.testing.assert_allclose(scores.per_class(draws, labels)[0], 100 * np.array([6 / 9, 1 / 3, 3 / 6]))


def test_classes_without_a_test_image_are_told(capsys):
  eval_linear.check_classes(np.array([0, 0, 1, 1, 2, 2, -1]), np.array([0, 2, -1]), probe.parse_labels("all"), True)
  assert capsys.readouterr().out == "note: 1 of the 3 classes have no test image: no figure speaks of them\n"
  one = np.array([0, 1]), np.array([0, 1]), probe.parse_labels("1-per-class")
  eval_linear.check_classes(*one, False)  # where nothing is chosen, one is enough


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
  """A short run that an older version wrote: (workdir, its encoder on one device)."""
  folder = tmp_path_factory.mktemp("run")
  with tarfile.open(pathlib.Path(__file__).parent / "golden" / "old_run.tar.gz") as file:
    file.extractall(folder, filter="data")
  with pytest.MonkeyPatch.context() as patch:
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    patch.setattr(parallel, "make_mesh", lambda: one)
    yield folder, restore_encoder(folder)


def test_images_in_memory_have_the_features_that_the_extractor_gives(old_run):
  _, run = old_run
  dataset = build.dataset(run.config, "test[:100]")
  want, labels, indices = run.extractor.all(run.variables, dataset)
  assert want.dtype == np.float32 and want.std() > 0
  np.testing.assert_array_equal(labels, dataset.labels)
  np.testing.assert_array_equal(indices, np.arange(100))
  np.testing.assert_array_equal(run.features(dataset.images), want)
  rng = np.random.default_rng(0)
  between = np.clip(dataset.images + rng.uniform(-0.4, 0.4, dataset.images.shape), 0, 255)  # the levels of a file
  np.testing.assert_array_equal(run.features(np.float32(between / 255)), want)
  sizes = [(28, 40, 1), (90, 31, 1), (20, 20, 1)]
  several = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
  each = [run.extractor.all(run.variables, in_memory(x[None], np.array([-1]))).features[0] for x in several]
  np.testing.assert_array_equal(run.features([several[0], several[1] / 255, several[2]]), each)


def test_images_without_a_label_have_features_and_those_unreadable_are_left_out(old_run, photographs, monkeypatch):
  _, run = old_run
  monkeypatch.setattr(run.extractor, "batch_size", 8)  # several batches, the last one not full
  config = run.config.copy_and_resolve_references()
  config.data.folder, config.data.channels = str(photographs), 1
  (photographs / "train" / "0_stray.png").write_bytes((photographs / "train" / "b" / "1.png").read_bytes())
  dataset = build.dataset(config, "train")
  found = run.extractor.all(run.variables, dataset)
  assert len(found.features) == len(dataset) - 1 == 24  # a/4.png is broken
  names = [dataset.image_name(i) for i in found.indices]
  assert "a/4.png" not in names and found.labels[names.index("0_stray.png")] == -1
  same = [names.index(name) for name in ("0_stray.png", "b/1.png")]
  np.testing.assert_array_equal(*found.features[same])
  labelled = run.extractor(run.variables, dataset)[0]
  np.testing.assert_array_equal(labelled, found.features[found.labels >= 0])
  assert len(labelled) == 23
  originals = [dataset.original(i) for i in found.indices]
  np.testing.assert_array_equal(run.features(originals), found.features)
  margin = run.eval_view._replace(resize=32)  # more than its size
  cropping = features.Extractor(run.encoder, margin, parallel.make_mesh(), 8)
  want = cropping.all(run.variables, dataset).features
  np.testing.assert_array_equal(run._replace(eval_view=margin, extractor=cropping).features(originals), want)


@pytest.mark.parametrize(
  "images, error, text",
  [
    (np.zeros((0, 28, 28, 1), np.uint8), ValueError, "images must hold one at least"),
    (np.zeros((2, 28, 28, 1), np.int32), TypeError, r"uint8, or floating point in \[0, 1\], got int32"),
    (np.full((2, 28, 28, 1), 255.0), ValueError, r"must be in \[0, 1\], got 255.0 to 255.0: divide by 255"),
    (np.full((2, 28, 28, 1), np.nan), ValueError, r"must be in \[0, 1\], got nan"),
    (np.zeros((2, 28, 28, 3), np.uint8), ValueError, r"number of channels, 1, got \[28, 28, 3\]"),
    (
      np.zeros((28, 28, 1), np.uint8),
      ValueError,
      r"\[n, H, W, C\] or a list of \[H, W, C\], got one image of \[28, 1\]",
    ),
    ([np.zeros((0, 28, 1), np.uint8)], ValueError, r"got one image of \[0, 28, 1\]"),
  ],
)
def test_images_that_are_none_are_refused(old_run, images, error, text):
  with pytest.raises(error, match=text):
    old_run[1].features(images)


def test_eval_linear_tells_what_the_encoder_its_untrained_self_and_pixels_are_worth(old_run, capsys):
  workdir, run = old_run
  with flagsaver.flagsaver(workdir=str(workdir), labels="5-per-class", draws=2, C=["0.1"], per_class=True):
    assert eval_linear.main() == 0
  out = capsys.readouterr().out.splitlines()
  figures = json.loads(out[-1])
  assert figures == json.loads((workdir / "linear_labels-5-per-class.json").read_text())
  assert not (workdir / "linear.json").exists()  # which is of all labels
  made_of = dict(data="fashion_mnist_mini", data_dir=None, train_split="train[:256]", train_images=256, seed=0)
  made_of |= dict(test_split="test[:100]", test_images=100, features=run.config.encoder.features, blocks=None)
  assert made_of.items() <= figures.items()
  for name in ("", "untrained_", "pixels_", "pixels_standardised_"):
    for key in ("top1", "top5", "balanced"):
      assert figures[f"{name}{key}_low"] < figures[f"{name}{key}"] < figures[f"{name}{key}_high"]
    assert figures[f"{name}images"] == 50 and figures[f"{name}C"] == 0.1 and figures[f"{name}top1_std"] >= 0
    assert figures[f"{name}top1"] > 25  # of ten classes
  assert figures["guessing_top1"] < 20 and (figures["step"], figures["protocol"], figures["draws"]) == (5, "logreg", 2)
  begins = ("raw pixels  ", "pixels, standardised ", "encoder, untrained  ", "encoder   ")
  at = out.index(next(line for line in out if line.startswith("raw pixels")))
  assert all(line.startswith(text) for line, text in zip(out[at:], begins, strict=False))
  pixels = build.dataset(run.config, run.config.data.split).images.reshape(256, -1) / 255
  norm, spread = (np.mean(np.linalg.norm(x, axis=1)) for x in (pixels, pixels - pixels.mean(axis=0)))
  assert figures["pixels_feature_norm"] == pytest.approx(norm, rel=1e-5) and spread < norm
  varies = np.sqrt(np.sum(pixels.std(axis=0) > 0))
  assert 0.9 * varies < figures["pixels_standardised_feature_norm"] < varies  # each is 1 in the mean square
  head, *classes = [line.split(",") for line in (workdir / "linear_labels-5-per-class.csv").read_text().splitlines()]
  assert head[:3] == ["class", "images", "top1"] and head[5:] == [f"answered {c}" for c in range(10)]
  counts = np.array([row[5:] for row in classes], int)
  assert figures["top1"] == pytest.approx(100 * np.trace(counts) / counts.sum()) and counts.sum() == 2 * 100
  assert figures["balanced"] == pytest.approx(np.mean([float(row[2]) for row in classes]))
  # The untrained encoder is the one that the run's first evaluation saw.
  sets = [build.dataset(run.config, split) for split in (run.config.data.split, run.config.data.test_split)]
  found = [x for dataset in sets for x in run.extractor(run.untrained(), dataset)]
  then = next(row["knn_top1"] for row in log.read_rows(workdir / "metrics.jsonl") if "knn_top1" in row)
  scores = accuracy.knn_accuracy(*found, k=run.config.knn.k, temperature=run.config.knn.temperature)
  assert abs(scores["top1"] - then) <= 1  # one of a hundred images


@pytest.mark.parametrize(
  "given, text",
  [
    (dict(protocol="sgd"), "there is no --protocol=sgd; there is logreg, heads"),
    (dict(protocol="heads", C=["1"]), "--C is for --protocol=logreg, and this is heads"),
    (dict(rates=["0.1"]), "--rates is for --protocol=heads"),
    (dict(protocol="heads", rates=["-1"]), "--rates must be positive numbers with commas between, got '-1'"),
    (dict(blocks=["1", "4"]), "--blocks must be one number for --protocol=logreg, got 2"),
    (dict(protocol="heads", blocks=["x"]), "--blocks must be whole numbers from 1 on with commas between, got 'x'"),
    (dict(protocol="heads", blocks=["2"]), "--blocks=2: a ResNet has no class token and no patches"),
    (dict(features="cls"), "--features=cls: a ResNet has no class token and no patches"),
    (dict(labels="some"), "--labels must be all"),
    (dict(draws=3), "--draws must be at least 1, and 1 where all labels are used, got 3"),
    (dict(draws=0, labels="10%"), "--draws must be at least 1"),
    (dict(C=["1", "0"]), "--C must be positive numbers with commas between, got '1,0'"),
    (dict(C=["one"]), "--C must be positive numbers"),
    (dict(test_split="train[:256]"), r"both are 'train\[:256\]'"),
    (dict(test_split="train[255:300]"), r"'train\[:256\]' shares images with 'train\[255:300\]'"),
    *(
      ({"protocol": "linear", name: value}, f"--{name} is for --protocol=.*, and this is linear")
      for name, value in {
        **dict(C=["3"], features="cls", blocks=["77"], rates=["5"], head_steps=9, head_batch=8, draws=3),
        **dict(per_class=True, cache=True, batch_size=8, step=5, pixels=False),
      }.items()
    ),
    (dict(train_split="train[:9]"), "the training split has no image of class"),
    (dict(labels="1%"), r"1% of 256 images is fewer than the 10 classes"),
  ],
)
def test_wrong_use_is_told_before_work_begins(old_run, monkeypatch, given, text):
  monkeypatch.setattr(eval_linear, "Extractor", None)  # work
  monkeypatch.setattr(restore, "restore_encoder", lambda *_: old_run[1])
  with flagsaver.flagsaver(workdir=str(old_run[0]), **given), pytest.raises(UserError, match=text):
    eval_linear.main()


def test_a_set_without_labels_is_told_with_what_needs_them(old_run, tmp_path):
  import PIL.Image

  for i in range(3):
    PIL.Image.fromarray(np.full((28, 28), 9 * i, np.uint8)).save(tmp_path / f"{i}.png")
  given = dict(workdir=str(old_run[0]), folder=str(tmp_path), train_split="train")
  with (
    flagsaver.flagsaver(**given),
    pytest.raises(UserError, match="no labels, and a classifier is trained and scored"),
  ):
    eval_linear.main()


def test_only_figures_of_the_runs_own_data_and_features_have_the_plain_name(tmp_path):
  assert evaluate.place(tmp_path, "knn", "json") == tmp_path / "knn.json"
  names = []
  for given, text in (
    (dict(features="flat"), "_features-flat"),
    (dict(features="cls+mean", blocks=["1", "4"]), r"_features-cls\+mean_blocks-1-4"),
    (dict(labels="1%"), "_labels-1pct"),
    (dict(step=500, seed=3), "_step-500_seed-3"),
    (dict(data="fashion_mnist", data_dir="D"), r"_data-fashion_mnist_data_dir-D-\w{8}"),
    (dict(data_dir=str(tmp_path / "D")), r"_data_dir-D-\w{8}"),
    (dict(folder="one/photographs"), r"_folder-photographs-\w{8}"),
    (dict(folder="two/photographs"), r"_folder-photographs-\w{8}"),
    (dict(test_split="train[:50%]"), r"_test_split-train_50pct-\w{8}"),
    (dict(test_split="train[50%:]"), r"_test_split-train_50pct-\w{8}"),
    (dict(bank_split="train_50"), "_bank_split-train_50"),
    (dict(train_split="x" * 300), r"_train_split-x{40}-\w{8}"),
  ):
    with flagsaver.flagsaver(**given):
      names.append(evaluate.place(tmp_path, "knn", "json").name)
    assert re.fullmatch(rf"knn{text}\.json", names[-1]), names[-1]
  assert len(set(names)) == len(names)


def test_splits_share_images_where_their_slices_meet_or_one_folder_holds_the_other(old_run, tmp_path):
  config = old_run[1].config.copy_and_resolve_references()
  for one, other, want in (
    ("train[:50%]", "train[1499:1501]", True),
    ("train[:50%]", "train[50%:]", False),
    ("train[:100]+train[200:300]", "train[250:]", True),
    ("train", "test", False),
    ("train", "train", True),
  ):
    assert build.overlap(config, one, other) == build.overlap(config, other, one) == want, (one, other)
  config.data.folder = str(tmp_path)
  for name in ("train/a", "val/a", "more/val"):
    (tmp_path / name).mkdir(parents=True)
  pairs = ("train", "val"), ("val", "validation"), (".", "val"), ("more", "more/val"), ("val", "test")
  assert [build.overlap(config, *pair) for pair in pairs] == [False, True, True, True, False]


def test_k_nn_on_images_that_the_bank_has_too_says_so_in_its_record(old_run, monkeypatch, capsys):
  workdir, run = old_run
  monkeypatch.setattr(restore, "restore_encoder", lambda *_: run)
  made_up = lambda _, __, dataset, *___: (np.eye(len(dataset), 9, dtype=np.float32) + 1, dataset.labels)  # noqa: E731
  monkeypatch.setattr(eval_knn, "features_of", made_up)
  monkeypatch.setattr(eval_knn, "knn_scores", lambda bank, numbers, queries, labels, **_: np.eye(10)[labels])
  for split, overlap in (("train[200:300]", True), ("train[256:300]", False)):
    with flagsaver.flagsaver(workdir=str(workdir), test_split=split, k=["3"], temperature=0.2):
      assert eval_knn.main() == 0
      figures = json.loads(evaluate.place(workdir, "knn", "json").read_text())
    assert ("an image that is in both finds itself" in capsys.readouterr().out) == figures["overlap"] == overlap
    assert (figures["test_split"], figures["temperature"], figures["bank_images"]) == (split, 0.2, 256)
  assert not (workdir / "knn.json").exists()


def test_another_seed_of_the_linear_protocol_draws_other_labels_into_another_folder(old_run, monkeypatch):
  seen = []
  monkeypatch.setattr(eval_linear.train, "main", lambda config, workdir: seen.append((config, workdir)) or 1)
  monkeypatch.setattr(eval_linear, "version_for", lambda config: "simclr")
  given = dict(workdir=str(old_run[0]), protocol="linear", labels="10%")
  for seed, name in (({}, "linear_simclr_labels-10pct"), ({"seed": 7}, "linear_simclr_labels-10pct_seed-7")):
    with flagsaver.flagsaver(**given, **seed):
      assert eval_linear.main() == 1
    config, workdir = seen[-1]
    assert (config.seed, config.method.labels, workdir) == (seed.get("seed", 0), "10%", old_run[0] / name)
  wrong = flagsaver.flagsaver(**given | {"test_split": "train[:9]"})
  with wrong, pytest.raises(UserError, match=r"'train\[:256\]' shares images with 'train\[:9\]'"):
    eval_linear.main()
