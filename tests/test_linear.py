"""Logistic regression against scikit-learn's solutions, and the choice of its penalty."""

import jax
import numpy as np
import pytest

from ssl_jax import logistic_regression
from ssl_jax.errors import UserError
from ssl_jax.evaluation import intervals, linear, probe, scores


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
