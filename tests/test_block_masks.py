"""DINOv2's block masks: the official sampler's distribution, and which crops of the global batch get which."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import augment, block_masks

SETTINGS = dict(share=0.5, ratios=(0.1, 0.5))


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample(side, draws, target):
  keys = jax.random.split(jax.random.key(7), draws)
  return jax.vmap(lambda key: block_masks.block_mask(key, target, (side, side), side // 2 * side))(keys)


@pytest.mark.parametrize(
  "side, draws, targets",
  [
    (14, 2000, (39, 98)),
    pytest.param(14, 20_000, (20, 39, 58, 78, 98), marks=pytest.mark.slow),
    pytest.param(16, 20_000, (20, 39, 58, 78, 98), marks=pytest.mark.slow),
  ],
)
def test_blocks_are_distributed_as_the_official_samplers(golden, side, draws, targets):
  g, name = golden("masks_dinov2"), f"{side}x{side}"
  for target in targets:
    i = list(g[f"{name}/targets"]).index(target)
    drawn = np.asarray(sample(side, draws, target))
    counts, histogram = drawn.sum((1, 2)), g[f"{name}/histogram"][i]
    assert counts.max() <= target
    short, each = g[f"{name}/short_fraction"][i], g[f"{name}/mean_map"][i]
    vertical, horizontal = drawn[:, 1:] & drawn[:, :-1], drawn[:, :, 1:] & drawn[:, :, :-1]
    lines = np.stack([drawn.any(2).sum(1), drawn.any(1).sum(1)], axis=1)
    spread = np.sqrt(np.average((np.arange(len(histogram)) - g[f"{name}/count_mean"][i]) ** 2, weights=histogram))
    compared = {
      "count_mean": (counts.mean(), g[f"{name}/count_mean"][i], spread),
      "short_fraction": (np.mean(counts < target), short, np.sqrt(short * (1 - short))),
      "mean_map": (drawn.mean(0), each, np.sqrt(each * (1 - each))),
      "adjacent": (
        [x.sum((1, 2)).mean() for x in (vertical, horizontal)],
        g[f"{name}/adjacent_mean"][i],
        g[f"{name}/adjacent_std"][i],
      ),
      "occupied": (lines.mean(0), g[f"{name}/occupied_rows_columns"][i], lines.std(0)),
    }
    for what, (got, want, deviation) in compared.items():
      errors = np.abs(got - want) / (deviation * np.sqrt(1 / draws + 1 / int(g["draws"])))
      assert np.max(errors) < 4, (target, what, np.max(errors))


@pytest.fixture
def exact(monkeypatch):
  """Masks whose first patches are masked, as many as the target says."""

  def first(key, target, grid, limit):
    del key, limit
    return (jnp.arange(grid[0] * grid[1]) < target).reshape(grid)

  monkeypatch.setattr(block_masks, "block_mask", first)


def test_half_of_the_crops_have_a_mask_each_with_a_target_from_an_interval_of_its_own(exact):
  b, patches = 40, 14 * 14
  edges = np.linspace(0.1, 0.5, b + 1)
  seen = []
  draw = jax.jit(functools.partial(block_masks.draw_masks, grid=(14, 14), **SETTINGS))
  for step in range(2):
    keys = augment.example_keys(0, jnp.int32(step), jnp.arange(b))
    drawn = np.asarray(draw(keys))
    assert drawn.shape == (2, b, patches)
    counts = drawn.sum(-1)
    targets = np.sort(counts[counts > 0])
    assert len(targets) == b  # int(2 b / 2)
    assert np.all(np.floor(patches * edges[:-1]) <= targets) and np.all(targets <= np.floor(patches * edges[1:]))
    assert targets.sum() <= block_masks.most_masked(2 * b, 2 * b, patches, **SETTINGS)
    assert abs(np.corrcoef(counts[0], counts[1])[0, 1]) < 0.4  # the crops of an image are masked independently
    assert 0.2 < np.mean(counts[0] > 0) < 0.8
    seen.append(counts)
  assert np.mean(seen[0] != seen[1]) > 0.5


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_masks_do_not_depend_on_the_number_of_devices(devices, exact):
  keys = augment.example_keys(0, jnp.int32(3), jnp.arange(8))
  whole = jax.jit(lambda: block_masks.draw_masks(keys, (6, 6), **SETTINGS))()
  over = functools.partial(block_masks.draw_masks, grid=(6, 6), axis_name="batch", **SETTINGS)
  parts = jax.jit(jax.vmap(over, axis_name="batch", out_axes=1))(keys.reshape(devices, -1))
  np.testing.assert_array_equal(parts.reshape(whole.shape), whole)
  # A device has room for whatever may fall to it.
  most = block_masks.most_masked(16 // devices, 16, 36, **SETTINGS)
  assert np.max(np.sum(parts, axis=(0, 2, 3))) <= most <= 16 // devices * 18


def test_equal_draws_have_different_ranks_in_the_order_of_the_crops():
  u = jnp.array([[0.5, 0.2, 0.5], [0.2, 0.5, 0.9]])
  rank, n = block_masks.global_rank(u, None)
  assert n == 6
  np.testing.assert_array_equal(rank, [[2, 0, 3], [1, 4, 5]])


def test_a_device_has_room_for_the_largest_targets():
  sizes = [block_masks.most_masked(crops, of, 196, **SETTINGS) for crops, of in ((64, 64), (128, 128), (2, 64), (1, 2))]
  assert sizes == [1906, 3771, 98 + 95, 98]  # the official code's constants for 32 and 64 images
