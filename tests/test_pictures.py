"""What MAE and DINO show of themselves: pictures, and the parts of DINO's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.losses import patchify
from ssl_jax.methods import dino, mae
from ssl_jax.methods.base import constant_momentum
from ssl_jax.models import heads, resnet, vit
from ssl_jax.models.mae import MAEDecoder

KEYS = jax.random.split(jax.random.key(0), 3)


def test_maes_pictures_are_the_visible_patches_and_the_predicted_ones_in_the_images_own_scale():
  encoder = vit.ViT(patch_size=4, dim=8, depth=1, heads=2, image_size=8, positions="column_first")
  decoder = MAEDecoder(48, dim=8, depth=1, heads=2)
  images = jax.random.uniform(KEYS[1], (3, 8, 16, 3))  # not square
  drawn = {}
  for normalize in (True, False):
    method = mae.mae(encoder, decoder, normalize_target=normalize)
    params, state = jax.jit(method.init)(KEYS[0], (images[None],))
    drawn[normalize] = jax.jit(method.pictures)(params, state, images, KEYS)
  cut = lambda x: patchify(x, 4)  # noqa: E731
  for pictures in drawn.values():
    original, masked, filled = (np.asarray(cut(x)) for x in pictures)
    removed = np.all(masked == np.float32(jnp.mean(images)), axis=-1)
    assert removed.sum(axis=1).tolist() == [6, 6, 6]  # int(8 * 0.25) stay
    np.testing.assert_array_equal(original, cut(images))
    np.testing.assert_array_equal(filled[~removed], original[~removed])
    np.testing.assert_array_equal(masked[~removed], original[~removed])
  raw = cut(drawn[False].reconstruction)[removed]  # what the network says, as it is
  mean, std = original[removed].mean(-1, keepdims=True), original[removed].std(-1, ddof=1, keepdims=True)
  np.testing.assert_allclose(cut(drawn[True].reconstruction)[removed], raw * std + mean, rtol=1e-4, atol=1e-4)


def test_dinos_pictures_are_the_teachers_class_attention_over_the_patches():
  encoder = vit.ViT(patch_size=4, dim=8, depth=2, heads=2, image_size=8)
  head, constant = heads.DINOHead(hidden=8, bottleneck=4, prototypes=8), optax.constant_schedule(0.04)
  method = dino.dino(encoder, head, teacher_temperature=constant, teacher_momentum=constant_momentum(0.9))
  images = jax.random.uniform(KEYS[1], (3, 8, 16, 3))
  params, state = jax.jit(method.init)(KEYS[0], (images[None, :, :, :8],))
  teacher = jax.tree.map(lambda x: x + 0.1, state.teacher_params)
  original, maps = jax.jit(method.pictures)(params, state.replace(teacher_params=teacher), images, KEYS)
  np.testing.assert_array_equal(original, images)
  attention = jax.jit(lambda p: encoder.apply({"params": p}, images, method="attention"))(teacher["encoder"])
  assert len(maps) == 2 and maps[0].shape == (3, 8, 16)
  np.testing.assert_allclose(maps[1][2, 5, 13], attention[2, 1, 0, 1 + 4 * (5 // 4) + 13 // 4], rtol=1e-6)
  assert (
    method.pictures
    and not dino.dino(
      resnet.ResNet(stages=(1,)), head, teacher_temperature=constant, teacher_momentum=constant_momentum(0.9)
    ).pictures
  )


def test_dinos_loss_is_the_teachers_entropy_and_the_divergence():
  encoder, head = vit.ViT(patch_size=4, dim=8, depth=1, heads=2, image_size=8), heads.DINOHead(3, 8, 4, 8)
  method = dino.dino(
    encoder, head, teacher_temperature=lambda _: 0.04, teacher_momentum=constant_momentum(0.9), student_temperature=0.04
  )
  view = jax.random.uniform(KEYS[1], (1, 3, 8, 8, 3))
  params, state = jax.jit(method.init)(KEYS[0], (view,))
  same = jnp.concatenate([view, view])  # student and teacher agree: nothing is left to learn
  center, loss = jnp.arange(8.0), jax.jit(method.loss)
  for c, kl in ((0 * center, 0), (center, None)):
    _, aux = loss(params, state.replace(center=c), (same,), KEYS, 0)
    row = aux.metrics
    np.testing.assert_allclose(row["kl"], row["loss"] - np.log(8) * row["teacher_entropy"], rtol=1e-5, atol=1e-5)
    assert row["kl"] > 0.1 if kl is None else abs(row["kl"]) < 1e-5
    np.testing.assert_allclose(row["center_norm"], np.linalg.norm(c), rtol=1e-6)
