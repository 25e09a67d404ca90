"""Weighted k-NN against the official numbers and a plain NumPy vote; ties, chunks and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_all_methods import in_memory

from ssl_jax.augment import EvaluationView
from ssl_jax.evaluation import accuracy as accuracies
from ssl_jax.evaluation import knn
from ssl_jax.evaluation.knn import accuracy, knn_predict


def reference(bank, labels, queries, k, temperature, classes, exclude=None):
  """Sorts all similarities of each query, in float64 NumPy."""
  bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(bank), np.float64(queries)))
  scores = np.zeros((len(queries), classes))
  for i, query in enumerate(queries):
    similarity = bank @ query
    if exclude is not None:
      similarity[exclude[i]] = -np.inf
    nearest = np.argsort(-similarity, kind="stable")[:k]
    votes = np.exp((similarity[nearest] - similarity[nearest[0]]) / temperature)
    np.add.at(scores[i], labels[nearest], votes / votes.sum())
  return scores


def draw(rows, queries=5, d=6, classes=4, seed=0):
  rng = np.random.default_rng(seed)
  bank, asked = rng.normal(size=(rows, d)), rng.normal(size=(queries, d))
  return bank.astype(np.float32), rng.integers(0, classes, rows), asked.astype(np.float32)


def at_angle(cosines):
  """Plane vectors whose cosine with (1, 0) is as given."""
  cosines = np.asarray(cosines)
  return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)


QUERY = np.array([[1, 0]], np.float32)


@pytest.mark.parametrize("chunk_size", [None, 7, 500])
@pytest.mark.parametrize("k", [1, 5, 10, 20, 100])
def test_official_accuracies(golden, k, chunk_size):
  g = golden("knn")
  scores = knn_predict(
    g["train_features"],
    g["train_labels"],
    g["test_features"],
    k=k,
    temperature=float(g["temperature"]),
    chunk_size=chunk_size,
  )
  got = accuracy(scores, g["test_labels"], k=k)
  for name in ("top1", "top5"):
    assert got[name] == pytest.approx(float(g[f"{name}_k{k}"]), abs=1e-9)


@pytest.mark.parametrize(("rows", "k", "temperature"), [(1, 1, 0.07), (9, 4, 1.0), (50, 50, 0.005), (50, 20, 0.2)])
def test_scores_are_the_shares_of_the_votes(rows, k, temperature):
  bank, labels, queries = draw(rows)
  got = knn_predict(bank, labels, queries, k=k, temperature=temperature, num_classes=4)
  assert got.shape == (5, 4)
  assert got.dtype == jnp.float32
  # float32 rounds a similarity to 1e-7; the exponent divides it by the temperature.
  want = reference(bank, labels, queries, k, temperature, 4)
  np.testing.assert_allclose(got, want, atol=1e-6 / min(1, temperature))
  np.testing.assert_allclose(np.sum(got, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 20, 1000])
def test_the_chunk_size_changes_nothing(chunk_size):
  bank, labels, queries = draw(20)
  got = knn_predict(bank, labels, queries, k=6, chunk_size=chunk_size)
  np.testing.assert_allclose(got, knn_predict(bank, labels, queries, k=6), rtol=2e-5, atol=1e-7)  # float32 / 0.07


def test_a_large_chunk_is_searched_group_by_group_with_the_same_neighbours():
  k, (bank, _, queries) = 5, draw(1280, queries=40)
  bank = np.round(bank[:, :2] + 0.5) + 0.5  # many equal rows, and none of length 0
  labels = np.arange(len(bank))  # a class a row, so that each neighbour shows
  settings = dict(k=k, num_classes=len(bank), exclude=np.arange(40))
  whole = knn_predict(bank, labels, queries[:, :2], chunk_size=len(bank), **settings)
  small = knn_predict(bank, labels, queries[:, :2], chunk_size=31, **settings)
  assert knn._candidates(jnp.zeros((1, len(bank))), k)[0].shape == (1, k * knn._GROUP)
  np.testing.assert_allclose(whole, small, atol=1e-6)


def test_queries_of_more_than_one_block_are_each_answered_as_if_alone(monkeypatch):
  bank, labels, queries = draw(20, queries=23)
  want = reference(bank, labels, queries, 5, 0.07, 4, exclude=np.arange(23) % 20)
  monkeypatch.setattr(knn, "_QUERY_BLOCK", 10)  # the last block is moved back to fit
  got = knn_predict(bank, labels, queries, k=5, num_classes=4, exclude=np.arange(23) % 20)
  np.testing.assert_allclose(got, want, atol=1e-5)  # float32 / 0.07


@pytest.mark.parametrize("chunk_size", [1024, 8192])
def test_memory_beyond_the_bank_is_bounded_by_the_chunk(chunk_size):
  rows, d, k = 200_000, 384, 20
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (((rows, d), np.float32), ((rows,), np.int32), ((10_000, d), np.float32), ((10_000,), np.int32))
  ]
  memory = knn._predict.lower(*shapes, 0.07, k, 10, chunk_size).compile().memory_analysis()
  block = 4 * 1024 * (chunk_size + k)
  # A few copies of a block's similarities, never [1024, rows] (781 MiB), nor the queries (15 MiB) or the bank again.
  assert memory.temp_size_in_bytes < 2.5 * block + 4 * 1024 * d * 2


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("rows", [7, 40])
def test_a_bank_split_over_devices_gives_the_same_answer(mesh, devices, rows):
  bank, labels, queries = draw(rows, queries=12)
  bank[3] = bank[5] = bank[rows - 1]  # ties between parts
  sharded = accuracies._sharded_search(mesh(devices), 6, 0.07, 4)
  fill = -rows % devices
  parts = np.pad(bank, ((0, fill), (0, 0))), np.pad(labels, (0, fill), constant_values=-1)
  exclude = np.arange(12) % rows
  want = knn_predict(bank, labels, queries, k=6, num_classes=4, exclude=exclude)
  np.testing.assert_allclose(sharded(*parts, queries, exclude), want, rtol=2e-5, atol=1e-7)  # float32 / 0.07
  score = accuracies.knn_accuracy(bank, labels, queries, np.arange(12) % 4, k=6, temperature=0.07, mesh=mesh(devices))
  assert score == accuracies.knn_accuracy(bank, labels, queries, np.arange(12) % 4, k=6, temperature=0.07)
  with pytest.raises(ValueError, match="queries: 12 of 12 rows"):
    accuracies.knn_accuracy(bank, labels, queries * np.nan, labels[:1], k=6, temperature=0.07, mesh=mesh(devices))


def test_more_neighbours_than_rows_are_all_rows_with_a_warning():
  bank, labels, queries = draw(7)
  with pytest.warns(UserWarning, match="k=20 is more than the bank's 7 rows"):
    got = knn_predict(bank, labels, queries, k=20)
  np.testing.assert_array_equal(got, knn_predict(bank, labels, queries, k=7))


def test_classes_are_counted_from_the_bank():
  bank, _, queries = draw(2)
  got = knn_predict(bank, np.array([0, 1500]), queries, k=2)
  assert got.shape == (5, 1501)
  assert set(np.flatnonzero(np.any(got > 0, axis=0))) == {0, 1500}


def test_a_bank_evaluated_on_itself_leaves_each_row_out():
  rng = np.random.default_rng(0)
  bank, labels = rng.normal(size=(1000, 32)).astype(np.float32), np.arange(1000) % 10
  itself = accuracy(knn_predict(bank, labels, bank, k=1), labels, k=1)["top1"]
  left_out = accuracy(knn_predict(bank, labels, bank, k=20, exclude=np.arange(1000)), labels, k=20)["top1"]
  assert itself == 100
  assert left_out == pytest.approx(10, abs=4)  # 4 standard deviations of a guess among 10 classes
  small = knn_predict(bank[:30], labels[:30], bank[:30], k=5, exclude=np.arange(30))
  want = reference(bank[:30], labels[:30], bank[:30], 5, 0.07, 10, exclude=np.arange(30))
  np.testing.assert_allclose(small, want, atol=1e-5)  # float32 / 0.07


def test_an_excluded_row_does_not_vote_even_where_all_rows_are_asked_for():
  bank, labels, _ = draw(6)
  got = knn_predict(bank, labels, bank, k=6, num_classes=4, exclude=np.arange(6))
  np.testing.assert_allclose(got, reference(bank, labels, bank, 5, 0.07, 4, exclude=np.arange(6)), atol=1e-5)


@pytest.mark.parametrize(("temperature", "winner", "share"), [(0.07, 0, 383518 / (383518 + 275732)), (1.0, 1, None)])
def test_the_temperature_weighs_one_near_against_three_less_near(temperature, winner, share):
  scores = knn_predict(at_angle([0.9, 0.8, 0.8, 0.8]), np.array([0, 1, 1, 1]), QUERY, k=4, temperature=temperature)
  share = 6.677 / (6.677 + 2.460) if share is None else share  # float64 NumPy's votes
  assert np.argmax(scores) == winner
  np.testing.assert_allclose(scores[0, winner], share, rtol=1e-3)


def test_a_low_temperature_does_not_overflow():
  scores = knn_predict(at_angle([0.9, 0.8, 0.8, 0.8]), np.array([0, 1, 1, 1]), QUERY, k=4, temperature=0.005)
  np.testing.assert_allclose(scores, [[1, 3 * np.exp(-20)]], rtol=1e-4)  # exp(1 / 0.005) is beyond float32


@pytest.mark.parametrize("chunk_size", [1, 2, 3, None])
def test_equal_similarities_go_to_the_lower_row_and_equal_scores_to_the_smaller_class(chunk_size):
  tied = at_angle([0.5, 0.8, 0.8, 0.8])
  one = knn_predict(tied, np.array([0, 2, 1, 3]), QUERY, k=1, chunk_size=chunk_size)
  np.testing.assert_array_equal(one, [[0, 0, 1, 0]])  # row 1, of class 2, before rows 2 and 3
  two = knn_predict(tied, np.array([0, 2, 1, 3]), QUERY, k=2, chunk_size=chunk_size)
  np.testing.assert_allclose(two, [[0, 0.5, 0.5, 0]], rtol=1e-6)
  assert accuracy(two, np.array([1]), k=2)["top1"] == 100


def test_a_zero_row_has_similarity_zero_and_no_nan():
  bank = np.concatenate([np.zeros((1, 2), np.float32), at_angle([0.5, -0.5])])
  scores = knn_predict(bank, np.arange(3), QUERY, k=3, temperature=1.0)
  votes = np.exp([0, 0.5, -0.5])
  np.testing.assert_allclose(scores, [votes / votes.sum()], rtol=1e-6)  # float32
  zero_query = knn_predict(bank, np.arange(3), np.zeros((1, 2), np.float32), k=3)
  np.testing.assert_allclose(zero_query, np.full((1, 3), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_with_their_number(bad):
  bank, labels, queries = draw(10)
  bank[[2, 5, 7], 0] = bad
  with pytest.raises(ValueError, match="bank: 3 of 10 rows"):
    knn_predict(bank, labels, queries)
  with pytest.raises(ValueError, match="queries: 3 of 10 rows"):
    knn_predict(queries, labels[:5], bank, k=5)


def test_runs_under_jit_with_the_number_of_classes_given():
  bank, labels, queries = draw(20)
  fixed = functools.partial(knn_predict, k=6, num_classes=4)
  np.testing.assert_allclose(jax.jit(fixed)(bank, labels, queries), fixed(bank, labels, queries), rtol=1e-6)


def test_norms_of_the_features_do_not_matter():
  bank, labels, queries = draw(20)
  scale = np.random.default_rng(1).uniform(1e-3, 1e3, size=(20, 1)).astype(np.float32)
  got = knn_predict(bank * scale, labels, 1e3 * queries, k=6)
  np.testing.assert_allclose(got, knn_predict(bank, labels, queries, k=6), rtol=2e-5, atol=1e-7)  # float32 / 0.07


@pytest.mark.parametrize(
  ("change", "shown"),
  [
    (dict(bank=np.ones((4, 3, 1), np.float32)), r"\(4, 3, 1\)"),
    (dict(queries=np.ones((2, 5), np.float32)), r"\(4, 3\) and \(2, 5\)"),
    (dict(bank_labels=np.zeros(3, int)), r"\[4\].*\(3,\)"),
    (dict(bank_labels=np.zeros((4, 1), int)), r"\[4\].*\(4, 1\)"),
    (dict(k=0), "k=0"),
    (dict(bank=np.ones((0, 3), np.float32), bank_labels=np.zeros(0, int)), "0 rows"),
    (dict(temperature=0), "temperature .*0"),
    (dict(temperature=-0.1), "temperature .*-0.1"),
    (dict(temperature=float("nan")), "temperature .*nan"),
  ],
)
def test_wrong_arguments_are_named(change, shown):
  good = dict(bank=np.ones((4, 3), np.float32), bank_labels=np.zeros(4, int), queries=np.ones((2, 3), np.float32), k=2)
  with pytest.raises(ValueError, match=shown):
    knn_predict(**{**good, **change})


@pytest.mark.parametrize(("k", "top5"), [(1, 50), (2, 75), (5, 100), (20, 100)])
def test_top5_counts_no_more_classes_than_neighbours(k, top5):
  scores = np.eye(6)[[0, 1, 2, 3]] * 10 - np.arange(6)  # ranks: own class, then 0, 1, 2, ... without it
  got = accuracy(scores, np.array([0, 1, 0, 2]), k=k)
  assert got == {"top1": 50.0, "top5": float(top5), "balanced": 50.0}


def test_accuracy_of_fewer_than_five_classes_is_defined():
  half = accuracy(np.array([[0.4, 0.6], [0.9, 0.1]]), np.array([1, 1]), k=20)
  assert half == {"top1": 50.0, "top5": 100.0, "balanced": 50.0}
  assert accuracy(np.ones((3, 1)), np.zeros(3, int), k=5) == dict.fromkeys(("top1", "top5", "balanced"), 100.0)


def test_balanced_accuracy_does_not_reward_the_most_frequent_class():
  scores = np.tile([0.9, 0.1], (20, 1))
  got = accuracy(scores, np.array([0] * 19 + [1]), k=5)
  assert (got["top1"], got["balanced"]) == (95.0, 50.0)


def test_a_single_class_and_classes_of_one_row_have_an_accuracy():
  features, itself = draw(12)[0], np.arange(12)
  settings = dict(k=20, temperature=0.07)
  with pytest.warns(UserWarning, match="more than the bank's 12 rows"):
    for labels, alone in ((np.zeros(12, int), 100), (itself, 0)):
      whole = accuracies.knn_accuracy(features, labels, features, labels, **settings)
      assert set(whole.values()) == {100}
      left_out = accuracies.knn_accuracy(features, labels, features, labels, exclude=itself, **settings)
      assert set(left_out.values()) == {alone}


def test_pixel_baselines_are_the_knn_of_the_pixels_of_both_sets_in_each_form():
  rng = np.random.default_rng(2)
  patterns = rng.normal(size=(4, 6, 6, 1)) * np.linspace(0.5, 12, 36).reshape(6, 6, 1)  # of unequal deviations
  labels = np.arange(120, dtype=np.int32) % 4
  images = np.clip(150 + patterns[labels] + rng.normal(scale=12, size=(120, 6, 6, 1)), 0, 255).astype(np.uint8)
  bank, queries = (in_memory(images[part], labels[part]) for part in (slice(80), slice(80, None)))
  stray = np.concatenate([images[:80], images[:7] // 2]), np.concatenate([labels[:80], np.full(7, -1, np.int32)])
  view = EvaluationView(resize=6, size=6)
  found = accuracies.pixel_baselines(in_memory(*stray), queries, view, k=5, temperature=0.07)
  a, b = (x.images.reshape(len(x), -1) / 255 for x in (bank, queries))
  for name, mean, std in (
    ("pixels_top1", 0, 1),
    ("pixels_centred_top1", a.mean(axis=0), 1),
    ("pixels_standardised_top1", a.mean(axis=0), a.std(axis=0)),
  ):
    scores = knn_predict((a - mean) / std, bank.labels, (b - mean) / std, k=5)
    assert found[name] == pytest.approx(100 * np.mean(np.argmax(scores, axis=1) == queries.labels))
  assert len(set(found.values())) == 3  # so that the forms are told apart
  assert accuracies.pixel_baselines(bank, queries, EvaluationView(resize=96, size=96), k=5, temperature=0.07)
  large = EvaluationView(resize=112, size=112)
  assert not accuracies.pixel_baselines(bank, queries, large, k=5, temperature=0.07)


def test_guessing_answers_the_banks_most_frequent_class():
  assert accuracies.guessing(np.array([2, 0, 2, 1]), np.array([2, 2, 0, 1, 1])) == 40


def test_labels_that_are_none_and_no_queries_are_told():
  bank, queries = np.eye(4), np.eye(4)[:1]
  with pytest.raises(ValueError, match="no row of the bank has a class"):
    knn_predict(bank, np.full(4, -1), queries, k=1)
  with pytest.raises(TypeError, match="bank_labels must be integers, got float64"):
    knn_predict(bank, np.zeros(4), queries, k=1)
  with pytest.raises(ValueError, match="no queries"):
    accuracy(np.zeros((0, 3)), np.zeros(0, np.int32), k=1)
