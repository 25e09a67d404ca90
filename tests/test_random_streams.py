"""No two random decisions draw the same numbers: the streams of keys, and what each purpose draws from its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import augment, block_masks, data, rand_augment, random_streams
from ssl_jax.data import crop
from ssl_jax.methods import dino, mae, moco
from ssl_jax.methods.base import constant_momentum
from ssl_jax.models import heads, vit
from ssl_jax.models.mae import MAEDecoder

N = 1024
KEYS = augment.example_keys(3, jnp.int32(5), jnp.arange(N))


def view_draws():
  """What views are made of: {name: [N]}, for more views than any recipe has: areas, ratios, places, flip, ..."""

  def draw(key, i):
    return jax.random.uniform(jax.random.fold_in(key, i), (36,))

  numbers = (0, 1, 10, 20, 21, 22, 23, 31, 32, 33, 34, 35)
  uniforms = np.asarray(jax.jit(jax.vmap(jax.vmap(draw, (None, 0)), (0, None)))(KEYS, jnp.arange(12)))
  return {f"view {i}, number {j}": uniforms[:, i, j] for i in range(12) for j in numbers}


def drawn(method, images, seen):
  """What the loss of a method draws, which it hands to the list `seen` while it is traced."""
  params, state = jax.jit(method.init)(KEYS[0], images)

  @jax.jit
  def loss():
    seen.clear()
    method.loss(params, state, images, KEYS, 0)
    return list(seen)

  return [np.asarray(x) for x in loss()]


def masks(monkeypatch):
  """The noise that MAE orders the patches by, from its own loss."""
  seen = []
  real = mae.mask_from_noise
  monkeypatch.setattr(mae, "mask_from_noise", lambda noise, keep: seen.append(noise) or real(noise, keep))
  encoder = vit.ViT(patch_size=2, dim=12, depth=1, heads=3, positions="column_first")
  method = mae.mae(encoder, MAEDecoder(4, 12, 1, 3))
  images = (jnp.zeros((1, N, 4, 4, 1)),)
  noise = drawn(method, images, seen)[0]
  return {f"mask, patch {j}": noise[:, j] for j in range(4)}


def dropped_paths():
  """The uniforms that DINO's student gets, from its own loss."""
  seen = []

  class Encoder(nn.Module):
    drop_path: float = 0.5
    depth: int = 2

    @nn.compact
    def __call__(self, images, *, train, uniforms=None):
      if uniforms is not None:
        seen.append(uniforms)  # [depth, 2, v b]
      return nn.Dense(3)(jnp.mean(images, axis=(1, 2)))

  constant = optax.constant_schedule(0.1)
  head = heads.DINOHead(hidden=4, bottleneck=3, prototypes=5)
  method = dino.dino(Encoder(), head, teacher_temperature=constant, teacher_momentum=constant_momentum(0.9))
  images = (jnp.ones((2, N, 2, 2, 1)), jnp.ones((3, N, 1, 1, 1)))
  of_views = np.concatenate([u.reshape(2, 2, -1, N) for u in drawn(method, images, seen)], axis=2)
  return {f"drop path {a}, {b}, view {v}": of_views[a, b, v] for a in range(2) for b in range(2) for v in range(5)}


def places():
  """Where MoCo's shuffle puts each example, in [0, 1)."""
  return {"shuffle": np.asarray(moco.shuffle(KEYS, jnp.arange(N), None)[1]) / N}


def blocks():
  """What DINOv2's masks are drawn from: which crops have one, and each one's first block."""

  @jax.jit
  def draws():
    seen = []
    with pytest.MonkeyPatch.context() as patch:
      real = block_masks.global_rank
      patch.setattr(block_masks, "global_rank", lambda u, axis_name: seen.append(u) or real(u, axis_name))
      patch.setattr(block_masks, "block_mask", lambda key, *_: jax.random.uniform(key, (2, 2)))
      first = block_masks.draw_masks(KEYS, (2, 2), share=0.5, ratios=(0.1, 0.5))
    return *seen, first

  rank, first = draws()
  names = {f"mask of crop {c}": rank[c] for c in range(2)}
  return names | {f"block of crop {c}, {j}": first[c, :, j] for c in range(2) for j in range(4)}


def changes():
  """What RandAugment does to two views of each example, and the draws of random erasing: {name: [N]}."""

  def draw(key, i):
    key = jax.random.fold_in(key, i)
    erase_key, _ = jax.random.split(jax.random.fold_in(key, random_streams.ERASE))
    chosen = rand_augment.draw(jax.random.fold_in(key, random_streams.RAND_AUGMENT), 5.0)
    return jnp.concatenate([*chosen, jax.random.uniform(erase_key, (23,))[::4]])

  found = np.asarray(jax.jit(jax.vmap(jax.vmap(draw, (None, 0)), (0, None)))(KEYS, jnp.arange(2)))
  return {f"change {j} of view {i}": found[:, i, j] for i in range(2) for j in range(found.shape[2])}


def test_no_two_purposes_share_a_draw(monkeypatch):
  draws = view_draws() | masks(monkeypatch) | dropped_paths() | places() | blocks() | changes()
  correlation = np.corrcoef(np.stack(list(draws.values())))
  np.fill_diagonal(correlation, 0)
  names = list(draws)
  i, j = np.unravel_index(np.argmax(np.abs(correlation)), correlation.shape)
  # 1 / sqrt(N) is the deviation of independent ones: over all pairs 5 of them are not reached by chance.
  assert abs(correlation[i, j]) < 5.5 / N**0.5, f"{names[i]} and {names[j]}: {correlation[i, j]:.3f}"


def test_streams_have_numbers_of_their_own_which_no_view_reaches():
  numbers = [random_streams.MASK, random_streams.SHUFFLE, random_streams.DROP_PATH]
  numbers += [random_streams.QUEUE, random_streams.SLICES, random_streams.RAND_AUGMENT, random_streams.ERASE]
  numbers += [random_streams.BATCH, random_streams.BLOCKS]
  assert len(set(numbers)) == len(numbers) and min(numbers) >= 2**16


@pytest.mark.parametrize("view", [0, 1])
def test_the_crops_of_a_batch_norm_group_are_as_different_as_those_of_any_images(view):
  uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, view), (22,)))(KEYS)
  boxes = jax.vmap(lambda u: augment.crop_box(u, (224, 224), (0.2, 1.0), (3 / 4, 4 / 3)))(uniforms)
  area = np.log(np.asarray(boxes[:, 2] * boxes[:, 3]))
  shuffled = np.asarray(moco.shuffle(KEYS, jnp.asarray(area), None)[0]).reshape(-1, 32)  # MoCo v2's groups
  between = np.var(shuffled.mean(axis=1)) / np.var(area)
  assert between < 0.06  # 31 / 1023 = 0.03 by chance; it was 0.77 by the number that was the area too


def test_the_queue_starts_with_numbers_that_no_step_draws():
  key = jax.random.key(0, impl="threefry2x32")
  head = heads.MoCoHead(features=4)
  encoder = nn.Sequential([lambda x, train: jnp.mean(x, axis=(1, 2))])
  method = moco.moco(encoder, head, queue_size=8, temperature=0.2, momentum=constant_momentum(0.9))
  _, state = method.init(key, (jnp.ones((2, 1, 2, 2, 3)),))
  for step in range(4):  # A step folds the run's key with its number, and `split` does the same with 0 and 1.
    drawn = heads.unit(jax.random.normal(jax.random.fold_in(key, step), (8, 4)))
    assert not np.allclose(state.queue, drawn)


def test_the_hosts_crops_are_not_drawn_by_the_generator_of_an_epochs_order():
  pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64, 1).astype(np.uint8)
  boxes = []
  view = augment.View(size=8, scale=(0.1, 0.9))
  for epoch in range(8):  # NumPy pads seeds with zeros: (seed, epoch) and (seed, step, 0, 0) were one.
    box = crop.crop_box(np.random.default_rng((3, epoch)), (64, 64), view.scale, view.ratio)
    want = crop.resized_crop(pixels, box, (8, 8), view.interpolation)
    (got,) = crop.cut_views(pixels, (view,), (3, epoch, 0))
    boxes.append(np.array_equal(got[0], want))
  assert not any(boxes)
  assert sorted(data.epoch_order(3, 0, 8)) == list(range(8))
