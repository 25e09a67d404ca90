"""Collapse monitors against float64 NumPy, and what they make the run say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from ssl_jax import monitors
from ssl_jax.monitors import collapse_warning
from ssl_jax.run.plots import draw_curves

measure = jax.jit(monitors.measure)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(n, d, seed=0):
  return np.random.default_rng(seed).normal(size=(n, 2, d))


def rows_with_spectrum(eigenvalues, n, seed=0):
  """[n, d] unit rows; the caller reads the spectrum that normalisation leaves off `np.linalg.eigvalsh`."""
  rng = np.random.default_rng(seed)
  rotation, _ = np.linalg.qr(rng.normal(size=2 * [len(eigenvalues)]))
  return unit(rng.normal(size=(n, len(eigenvalues))) * np.sqrt(eigenvalues) @ rotation)


def twice(rows):
  return np.stack([rows, rows], axis=1)


def test_random_embeddings_have_standard_deviation_about_one_and_many_dimensions():
  got = measure(draw(256, 32).astype(np.float32))
  assert got["feature_std"] == pytest.approx(1, abs=0.02)  # 1 / sqrt(2 * 256 * 32) is 0.008
  assert 25 < got["effective_rank"] < 32
  assert got["alignment"] == pytest.approx(2, abs=0.1)  # two independent unit vectors
  assert got["uniformity"] < -3


@pytest.mark.parametrize("n", [2, 64, 300])
def test_constant_embeddings_have_standard_deviation_rank_and_uniformity_of_a_point(n):
  got = measure(np.broadcast_to(draw(1, 16), (n, 2, 16)).astype(np.float32))
  assert got["feature_std"] == pytest.approx(0, abs=1e-5)  # float32 rounding of a mean
  assert got["effective_rank"] == pytest.approx(0, abs=1e-3)
  assert got["uniformity"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("eigenvalues", [[1.0, 1.0], [4.0, 2.0, 1.0, 0.5], np.geomspace(1, 1e-3, 24), [1.0, 0.0, 0.0]])
def test_effective_rank_is_that_of_the_covariances_eigenvalues(eigenvalues):
  rows = rows_with_spectrum(eigenvalues, 100)
  spectrum = np.linalg.eigvalsh(np.cov(rows, rowvar=False, bias=True))
  got = measure(twice(rows).astype(np.float32))
  assert got["effective_rank"] == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum(), rel=1e-5)  # float32


def test_effective_rank_counts_orthogonal_directions_exactly():
  rows = np.concatenate([np.eye(8), -np.eye(8)])  # centred, 8 equal eigenvalues
  assert measure(twice(rows).astype(np.float32))["effective_rank"] == pytest.approx(8, rel=1e-6)


def test_alignment_and_uniformity_are_wang_and_isolas():
  z = unit(draw(40, 6))
  got = measure(z.astype(np.float32))
  assert got["alignment"] == pytest.approx(np.mean(np.sum((z[:, 0] - z[:, 1]) ** 2, axis=-1)), rel=1e-5)
  x = z[:, 0]
  pairs = [math.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i in range(40) for j in range(40) if i != j]
  assert got["uniformity"] == pytest.approx(math.log(np.mean(pairs)), rel=1e-5)  # float32
  assert got["feature_std"] == pytest.approx(np.std(x, axis=0).mean() * math.sqrt(6), rel=1e-5)


def test_alignment_is_zero_for_equal_views_and_four_for_opposite_ones():
  z = draw(20, 6)
  z[:, 1] = z[:, 0]
  assert measure(z.astype(np.float32))["alignment"] == pytest.approx(0, abs=1e-6)
  z[:, 1] *= -3
  assert measure(z.astype(np.float32))["alignment"] == pytest.approx(4, rel=1e-6)


def test_one_view_has_no_alignment_and_the_same_other_figures():
  z = draw(20, 6).astype(np.float32)
  both, one = measure(z), measure(z[:, :1])
  assert both.keys() - one.keys() == {"alignment"}
  for name, value in one.items():
    np.testing.assert_allclose(value, both[name], rtol=1e-6, err_msg=name)


def test_the_marginal_entropy_is_a_share_of_log_k():
  z = draw(4, 3).astype(np.float32)
  for p, share in ((np.full(8, 1 / 8), 1), (np.eye(8)[2], 0), (np.repeat([0.5, 0], [2, 6]), 1 / 3)):
    assert measure(z, p.astype(np.float32))["marginal_entropy"] == pytest.approx(share, abs=1e-6)


def test_norms_do_not_matter():
  z = draw(20, 6)
  scaled = z * np.random.default_rng(1).uniform(0.1, 100, size=(20, 2, 1))
  got, want = (measure(x.astype(np.float32)) for x in (scaled, z))
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)  # float32


def test_only_the_first_256_rows_enter_the_gram_matrix_and_all_enter_the_means():
  z = unit(draw(600, 6))
  z[256:, 0] = z[0, 0]  # collapsed after row 256
  got, first = (measure(x.astype(np.float32)) for x in (z, z[:256]))
  for name in ("effective_rank", "uniformity"):
    np.testing.assert_allclose(got[name], first[name], rtol=1e-6)
  assert got["feature_std"] == pytest.approx(np.std(z[:, 0], axis=0).mean() * math.sqrt(6), rel=1e-5)
  assert got["alignment"] == pytest.approx(np.mean(np.sum((z[:, 0] - z[:, 1]) ** 2, axis=-1)), rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("n", [2, 5])
def test_zero_vectors_give_finite_float32_figures(n, dtype):
  for z in (jnp.zeros((n, 2, 4), dtype), jnp.zeros((n, 2, 4), dtype).at[0].set(1)):
    got = measure(z)
    assert {value.dtype for value in got.values()} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(value) for value in got.values()), got


HEALTHY = {"step": 7, "feature_std": 0.9, "effective_rank": 20.0, "alignment": 0.3}


def test_a_healthy_row_and_a_row_without_monitors_have_no_warning():
  assert collapse_warning(HEALTHY) is None
  assert collapse_warning({"step": 7, "knn_top1": 50.0}) is None
  # MAE's mean tokens start like this, and its k-NN rises from there.
  assert collapse_warning({"step": 7, "feature_std": 0.04, "effective_rank": 1.9}) is None


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"feature_std": 0.0123}, "at step 7 all images have nearly the same embedding (feature_std 0.012"),
    ({"effective_rank": 1.05}, "at step 7 the embeddings lie on a line (effective_rank 1.05"),
    ({"feature_std": 0.05, "effective_rank": 1.0}, "all images have nearly the same embedding"),
  ],
)
def test_a_collapse_is_said_with_its_step_and_figure(row, said):
  text = collapse_warning(HEALTHY | row)
  assert text.startswith("the features have collapsed")
  assert said in text


@pytest.mark.parametrize(("collapse", "said"), [("point", "the same embedding"), ("line", "on a line")])
def test_the_monitors_of_collapsed_embeddings_raise_the_warning(collapse, said):
  direction = draw(1, 32)[:, :1]
  along = np.ones((64, 1, 1)) if collapse == "point" else np.random.default_rng(1).choice([-1, 1], (64, 1, 1))
  z = np.broadcast_to(along * direction, (64, 2, 32)) + 1e-3 * draw(64, 32, seed=2)
  row = {name: float(value) for name, value in measure(z.astype(np.float32)).items()}
  assert said in collapse_warning({"step": 1} | row)


def test_a_single_logged_step_is_seen_in_the_curves(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.5}\n')
  draw_curves(tmp_path, 2.0, "title")
  pixels = np.asarray(PIL.Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
  blue = np.all(np.abs(pixels - (31, 119, 180)) < 9, axis=-1)  # the first colour of a plot
  middle = blue.shape[1] // 4  # of the left half; the legend is at a side
  assert blue[:, middle - 30 : middle + 90].any()
