"""The order of training: epochs, batches, and each process's part of them."""

import numpy as np
import pytest
from test_all_methods import in_memory

from ssl_jax import data
from ssl_jax.data import dataset as order
from ssl_jax.errors import UserError


def test_an_epoch_visits_every_example_once():
  order = data.epoch_order(3, 1, 100)
  assert order.dtype == np.int64
  np.testing.assert_array_equal(np.sort(order), np.arange(100))


def test_epochs_and_seeds_have_orders_of_their_own_that_repeat():
  orders = [tuple(data.epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
  assert len(set(orders)) == 16
  assert tuple(data.epoch_order(2, 3, 50)) == orders[2 * 4 + 3]


def test_the_order_is_pinned():
  # Resuming an old run needs the very same numbers from every later version.
  assert data.epoch_order(0, 0, 8).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_batches_cut_the_epoch_and_drop_the_last_partial_one():
  n, size = 23, 5
  got = np.concatenate([data.batch_indices(n, size, 7, step) for step in range(8)])
  want = np.concatenate([data.epoch_order(7, epoch, n)[:20] for epoch in range(2)])
  assert got.dtype == np.int64
  np.testing.assert_array_equal(got, want)


def test_the_last_image_alone_makes_no_batch():
  assert [len(data.batch_indices(65, 64, 0, step)) for step in range(3)] == [64, 64, 64]
  assert set(data.batch_indices(65, 64, 0, 0)) != set(data.batch_indices(65, 64, 0, 1))


def test_a_batch_may_be_the_whole_set():
  np.testing.assert_array_equal(np.sort(data.batch_indices(8, 8, 0, 5)), np.arange(8))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_parts_of_the_processes_tile_the_global_batch(count):
  for step in (0, 3, 11):
    parts = [data.batch_indices(50, 12, 1, step, part=data.Part(i, count)) for i in range(count)]
    np.testing.assert_array_equal(np.concatenate(parts), data.batch_indices(50, 12, 1, step))


def test_a_batch_does_not_depend_on_what_was_asked_before():
  want = {step: data.batch_indices(30, 7, 5, step) for step in range(20)}
  for step in np.random.default_rng(0).permutation(20):
    got = data.batch_indices(30, 7, 5, int(step))
    np.testing.assert_array_equal(got, want[step])
    got[:] = -1  # the caller's own copy


def test_consecutive_steps_shuffle_once_an_epoch(monkeypatch):
  calls = []
  monkeypatch.setattr(order, "epoch_order", lambda *args: calls.append(args) or np.arange(args[-1]))
  order._cached_order.cache_clear()
  for step in range(9):
    data.batch_indices(40, 10, 0, step)
  order._cached_order.cache_clear()
  assert calls == [(0, 0, 40), (0, 1, 40), (0, 2, 40)]


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"n": 24, "batch_size": 64}, "got batch_size=64 and 24 images"),
    ({"batch_size": 0}, "got batch_size=0 and 100 images"),
    ({"part": data.Part(0, 3)}, "a multiple of the 3 processes, got 10"),
    ({"seed": -1}, "seed must not be negative, got -1"),
  ],
)
def test_what_makes_no_batches_is_refused(kwargs, message):
  with pytest.raises(UserError) as caught:
    data.batch_indices(**{"n": 100, "batch_size": 10, "seed": 0, "step": 0, **kwargs})
  assert message in str(caught.value)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_process_beyond_the_last_is_refused(index):
  with pytest.raises(ValueError, match=r"part.index must be in \[0, 2\)"):
    data.batch_indices(100, 10, 0, 0, part=data.Part(index, 2))


@pytest.mark.parametrize("count, want", [(4, [0, 2, 5, 7]), (10, range(10)), (11, range(10)), (1, [0])])
def test_a_thinned_set_is_spread_over_the_whole(count, want):
  thinned = in_memory(np.arange(10, dtype=np.uint8)[:, None, None, None], np.arange(10, dtype=np.int32)).thinned(count)
  assert thinned.labels.tolist() == thinned.images.ravel().tolist() == list(want)
