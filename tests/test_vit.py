"""The ViT, MAE's decoder and DINO's head against the official models' outputs, by their own weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from named_weights import named_images
from trajectories import error, named_variables

from ssl_jax import convert
from ssl_jax.losses import mae_loss, patchify
from ssl_jax.methods import mae
from ssl_jax.models import heads, vit
from ssl_jax.models.mae import MAEDecoder

ONE = jax.random.key(0)


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def load(model):
  shape = jnp.zeros((1, model.image_size, model.image_size, 3))
  shapes = jax.eval_shape(lambda: model.init(ONE, shape, train=False))
  return named_variables(shapes, "", {}, jnp.float32)


@pytest.fixture
def tiny(golden):
  g = golden("dino_vit")
  model = vit.ViT(patch_size=8, dim=48, depth=3, heads=3, image_size=32)
  shapes = jax.eval_shape(lambda: model.init(ONE, jnp.zeros((1, 32, 32, 3)), train=False))
  return model, convert.from_torch({k[2:]: g[k] for k in g.files if k.startswith("w/")}, shapes), g


@pytest.mark.parametrize("size", [32, 48, 24])
def test_positions_are_interpolated_as_in_the_official_dino(tiny, size):
  model, variables, g = tiny
  assert error(model.apply(variables, g[f"images{size}"], train=False), g[f"cls{size}"]) < 1e-5


def test_positions_are_interpolated_where_only_the_number_of_patches_is_the_trained_one():
  rows = jnp.repeat(jnp.arange(8.0), 8)  # each position is its row's number
  positions = jnp.concatenate([jnp.zeros(1), rows])[None, :, None]
  grid = np.asarray(vit.interpolate_positions(positions, 4, 16))[0, 1:, 0].reshape(4, 16)
  assert np.ptp(grid, axis=1).max() < 1e-5 and np.all(np.diff(grid, axis=0) > 1.5)


def test_tokens_and_attention_on_request(tiny):
  model, variables, g = tiny
  assert error(model.apply(variables, g["images32"], method="tokens"), g["tokens32"]) < 1e-5
  for size in (32, 48):
    attention = model.apply(variables, g[f"images{size}"], method="attention")
    assert error(attention, g[f"attention{size}"]) < 1e-5
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)


def test_official_dino_vit_small16(golden):
  g, name, model = golden("official_models"), "dino_vit_small16/", vit.vit_small(patch_size=16)
  variables = load(model)
  small = named_images(f"{name}images96", (2, 96, 96, 3))
  assert error(model.apply(variables, small, train=False), g[f"{name}cls96"]) < 1e-4
  assert error(model.apply(variables, small, method="attention"), g[f"{name}attention96"]) < 1e-4


@pytest.mark.slow
def test_official_dino_vit_small16_on_large_and_wide_images_and_in_its_last_blocks(golden):
  g, name, model = golden("official_models"), "dino_vit_small16/", vit.vit_small(patch_size=16)
  variables = load(model)
  large = named_images(f"{name}images224", (2, 224, 224, 3))
  assert error(model.apply(variables, large, train=False), g[f"{name}cls224"]) < 1e-4
  wide = named_images(f"{name}images_rect", (1, 224, 320, 3))
  assert error(model.apply(variables, wide, train=False), g[f"{name}cls_224x320"]) < 1e-4
  last = model.apply(variables, large, 4, method="last_blocks")
  assert error(jnp.concatenate([x[:, 0] for x in last], axis=-1), g[f"{name}last4_cls224"]) < 1e-4


@pytest.mark.parametrize(
  "name, model, images, key",
  [
    ("moco_v3_vit_small", vit.vit_small(patch_size=16, heads=12, positions="row_first"), "images", "features"),
    slow("dino_vit_small8", vit.vit_small(patch_size=8), "images96", "cls96"),
    slow("dino_vit_base16", vit.vit_base(patch_size=16), "images224", "cls224"),
    slow("timm_vit_small_patch16_224", vit.vit_small(patch_size=16), "images", "features"),
    slow("timm_vit_base_patch16_224.mae", vit.vit_base(patch_size=16), "images", "features"),
  ],
)
def test_official_vits(golden, name, model, images, key):
  g, side = golden("official_models"), 96 if images == "images96" else 224
  drawn = named_images(f"{name}/{images}", (2, side, side, 3))
  assert error(model.apply(load(model), drawn, train=False), g[f"{name}/{key}"]) < 1e-4


@pytest.mark.slow
def test_official_mae_vit_base(golden):
  g, name = golden("official_models"), "mae_vit_base_patch16/"
  encoder, decoder = vit.vit_base(patch_size=16, positions="column_first"), MAEDecoder(768)
  shapes, _ = jax.eval_shape(mae.mae(encoder, decoder).init, ONE, (jnp.zeros((1, 1, 224, 224, 3)),))
  params = named_variables({"params": shapes}, "", {r"^(encoder|decoder)\.": ""}, jnp.float32)["params"]
  images = named_images(f"{name}images", (2, 224, 224, 3))
  visible, mask, restore = mae.mask_from_noise(jnp.asarray(named_images(f"{name}noise", (2, 196))), 49)
  tokens = encoder.apply({"params": params["encoder"]}, images, keep=visible, method="tokens")
  prediction = decoder.apply({"params": params["decoder"]}, tokens, restore, (14, 14))
  np.testing.assert_array_equal(mask, g[f"{name}mask"])
  assert error(tokens[:, :5], g[f"{name}latent"]) < 1e-4 and error(prediction[:, :8], g[f"{name}pred"]) < 1e-4
  for normalize in (True, False):
    loss = mae_loss(prediction, patchify(jnp.asarray(images), 16), mask, normalize_target=normalize)
    np.testing.assert_allclose(loss, g[f"{name}loss_norm_pix_{normalize}"], rtol=1e-5)


def test_fixed_positions_are_the_official_ones_in_both_orders(golden):
  g = golden("official_models")
  columns, rows = (vit.sincos_positions(14, 14, dim, row_first)[0] for dim, row_first in ((768, False), (384, True)))
  np.testing.assert_allclose(columns[:20], g["mae_vit_base_patch16/pos_embed"], atol=1e-6)
  np.testing.assert_allclose(rows[:20], g["moco_v3_vit_small/pos_embed"], atol=1e-6)


def test_dinos_head_is_the_official_one(golden):
  g = golden("dino_head")
  head = heads.DINOHead(hidden=64, bottleneck=24, prototypes=96)
  shapes = jax.eval_shape(lambda: head.init(ONE, jnp.zeros((1, 48))))
  weights = {k[2:]: g[k] for k in g.files if k.startswith("w/")}
  assert error(head.apply(convert.from_torch(weights, shapes), g["x"]), g["y"]) < 1e-5
  head, g = heads.DINOHead(prototypes=8192), golden("official_models")
  shapes = jax.eval_shape(lambda: head.init(ONE, jnp.zeros((1, 384))))
  variables = named_variables(shapes, "", {}, jnp.float32)
  assert error(head.apply(variables, named_images("dino_head/x", (4, 384))), g["dino_head384_8192/y"]) < 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tokens_are_of_the_computations_type_whatever_is_dropped(dtype):
  model = vit.ViT(patch_size=4, dim=12, depth=3, heads=3, image_size=8, drop_path=0.5, dtype=dtype)
  variables = jax.eval_shape(lambda: model.init(ONE, jnp.zeros((4, 8, 8, 3)), train=True))
  outputs = functools.partial(model.apply, method="outputs", uniforms=jnp.zeros((3, 2, 4)))
  assert [x.dtype for x in jax.eval_shape(outputs, variables, jnp.zeros((4, 8, 8, 3)))] == 3 * [dtype]


def test_a_block_keeps_what_its_products_take_and_little_else_for_the_gradient():
  b, n, d, h = 8, 33, 16, 2
  block = vit.Block(h, 4, vit.normal_02, vit.normal_02, jnp.float32)
  x = jnp.zeros((b, n, d))
  params = jax.eval_shape(block.init, ONE, x)
  kept = jax.eval_shape(lambda params: jax.vjp(lambda x: block.apply(params, x), x)[1], params)
  floats = sum(x.size for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating) and x.shape[:1] == (b,))
  # To x alone: the inputs of two norms, queries, keys and values, what GELU takes, the weights of attention.
  assert floats <= b * n * (2 + 3 + 4) * d + 3 * b * h * n * n


def test_dropped_branches_are_a_function_of_the_uniforms():
  model = vit.ViT(patch_size=4, dim=12, depth=3, heads=3, image_size=8, drop_path=0.5)
  images = jax.random.normal(ONE, (4, 8, 8, 3))
  variables = jax.jit(lambda: model.init(ONE, images, train=False))()
  apply = jax.jit(lambda images, uniforms: model.apply(variables, images, train=True, uniforms=uniforms))
  whole = jax.jit(lambda: model.apply(variables, images, train=True))()
  drop = apply(images, jnp.zeros((3, 2, 4)))
  keep = jnp.ones((3, 2, 4)) - 1e-6
  assert not np.allclose(whole, drop)
  # All kept: each branch counts 1 / (1 - rate) times; the first block has rate 0 and the last 0.5.
  assert not np.allclose(whole, apply(images, keep))
  np.testing.assert_array_equal(vit.drop_mask(jnp.array([0.0, 0.49, 0.5, 0.99]), 0.5)[:, 0, 0], [0, 0, 2, 2])
  np.testing.assert_allclose(apply(images[:1], keep[..., :1]), apply(images, keep)[:1], rtol=1e-4, atol=1e-5)


def test_initialisation_is_each_papers():
  key, d = jax.random.key(1), 192
  fused = nn_bound(vit.nn.initializers.xavier_uniform()(key, (d, 3 * d)))
  apart = nn_bound(vit.qkv_xavier(key, (d, 3 * d)))
  patch = nn_bound(vit.patch_xavier(key, (16, 16, 3, d)))
  np.testing.assert_allclose(
    [fused, apart, patch], [math.sqrt(6 / (4 * d)), math.sqrt(6 / (2 * d)), math.sqrt(6 / (768 + d))], rtol=1e-3
  )


def test_the_deviation_of_the_linear_layers_is_a_setting():
  shape = jnp.zeros((1, 32, 32, 3))
  for std in (0.02, 0.1):
    model = vit.ViT(patch_size=8, dim=64, depth=1, heads=4, image_size=32, init_std=std)
    params = jax.jit(functools.partial(model.init, train=False))(ONE, shape)
    block = params["params"]["blocks_0"]
    for kernel in (block["attn"]["qkv"], block["attn"]["proj"], block["mlp"]["fc1"], block["mlp"]["fc2"]):
      np.testing.assert_allclose(np.std(kernel["kernel"]), std, rtol=0.05)


def nn_bound(x):
  return float(jnp.max(jnp.abs(x)))


def test_images_that_do_not_cut_into_patches_are_refused():
  model = vit.ViT(patch_size=16, dim=12, depth=1, heads=3, image_size=32)
  with pytest.raises(ValueError, match="100x100 do not cut into patches of 16"):
    model.init(ONE, jnp.zeros((1, 100, 100, 3)), train=False)
  alone = mae.mae(vit.ViT(patch_size=16, dim=12, depth=1, heads=3, positions="row_first"), MAEDecoder(768, 12, 1, 3))
  with pytest.raises(ValueError, match="more than one patch"):
    alone.init(ONE, (jnp.zeros((1, 1, 16, 16, 3)),))


def test_a_frozen_patch_embedding_takes_no_gradient():
  shape = dict(patch_size=4, dim=12, depth=1, heads=3, image_size=8)
  images = jax.random.normal(ONE, (2, 8, 8, 3))
  for frozen in (True, False):
    model = vit.ViT(**shape, frozen_patch_embed=frozen)
    variables = jax.jit(lambda m=model: m.init(ONE, images, train=False))()
    grads = jax.jit(jax.grad(lambda v, m=model: jnp.sum(m.apply(v, images, train=True) ** 3)))(variables)["params"]
    assert bool(np.any(grads["patch_embed"]["proj"]["kernel"])) != frozen


def test_features_are_the_class_token_the_patches_mean_or_the_patches():
  images = jax.random.uniform(ONE, (2, 8, 8, 3))
  make = functools.partial(vit.ViT, patch_size=4, dim=12, depth=1, heads=3, image_size=8)
  variables = make().init(ONE, images, train=False)
  tokens = make().apply(variables, images, method="tokens")
  assert tokens.shape == (2, 5, 12)
  patches = tokens[:, 1:]
  for features, want in (("cls", tokens[:, 0]), ("mean", patches.mean(1)), ("flat", patches.reshape(2, -1))):
    np.testing.assert_allclose(make(features=features).apply(variables, images, train=False), want, atol=1e-6)


def test_what_is_computed_again_changes_the_memory_and_not_the_numbers():
  images = jax.random.uniform(ONE, (8, 16, 16, 3))
  found = []
  for recompute in (True, False):
    model = vit.ViT(patch_size=2, dim=32, depth=1, heads=2, image_size=16, recompute=recompute)
    params = jax.jit(functools.partial(model.init, train=False))(ONE, images)

    def loss(params, model=model):
      return jnp.sum(jnp.square(model.apply(params, images, train=True)))

    program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    found.append((program(params), program.memory_analysis().temp_size_in_bytes))
  (again, less), (kept, more) = found
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again, kept)
  assert less < 0.95 * more
