"""DINOv2: its networks, masks and whole steps against the official code's, and what it draws and splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from named_weights import named_images
from trajectories import error, named_variables

from ssl_jax import convert
from ssl_jax.models import vit

ONE = jax.random.key(0)
TYPES = ("float64", "float32")


@pytest.fixture
def precise(dtype):
  """float64 where the test asks for it."""
  with jax.enable_x64(dtype == "float64"):
    yield


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


# ---- the network


def network(variant, g, dtype):
  """(the module, its parameters by name)."""
  registers = 4 if variant.startswith("reg4") else 0
  shape = {name: int(g[f"cfg/{key}"]) for name, key in dict(patch_size="p", dim="dim", depth="depth").items()}
  settings = dict(heads=3, image_size=16, mask_token=True, layer_scale=1e-5, ffn=variant.split("_")[1], dtype=dtype)
  model = vit.ViT(**shape, registers=registers, resize="antialiased" if registers else "offset", **settings)
  wanted = jax.eval_shape(lambda: model.init(ONE, jnp.zeros((1, 16, 16, 3)), train=False))
  shapes = {name: x.shape for name, x in convert.to_torch(jax.tree.map(lambda x: np.empty(x.shape), wanted)).items()}
  given = dict(zip(g[f"{variant}/param_names"], g[f"{variant}/param_shapes"], strict=True))
  assert {name: str(shape) for name, shape in shapes.items()} == given
  return model, named_variables(wanted, f"dinov2_vit/{variant}/", {}, dtype)


ALL = ("larger", "rect", "smaller", "masked_native")


@pytest.mark.parametrize(
  "variant, dtype, sizes",
  [
    ("plain_mlp", "float64", ()),
    ("reg4_swiglu", "float64", ()),
    *(slow(f"{kind}_{ffn}", dtype, ALL) for kind in ("plain", "reg4") for ffn in ("mlp", "swiglu") for dtype in TYPES),
  ],
)
def test_the_network_and_its_gradients_are_the_official_ones(golden, variant, dtype, sizes, precise):
  g, tolerance = golden("dinov2_vit"), 1e-6 if dtype == "float64" else 1e-4
  model, variables = network(variant, g, jnp.dtype(dtype))
  c = jnp.asarray(named_images("dinov2_vit/cotangent", (1, 36, 48)), dtype)

  def tokens(variables, size):
    name = size.removeprefix("masked_")
    n, height, width = g[f"cfg/size_{name}"]
    images = jnp.asarray(named_images(f"dinov2_vit/images_{name}", (n, height, width, 3)), dtype)
    masked = g[f"{variant}/{size}/mask"] if size.startswith("masked") else None
    return model.apply(variables, images, masked=masked, method="tokens")

  def value(variables):
    x = tokens(variables, "masked_larger")
    return jnp.mean(x[:, -36:] * c) + jnp.mean(x[:, 0] * c[:, 0]), x

  @jax.jit
  def everything(variables):
    last = model.apply(
      variables, jnp.asarray(named_images("dinov2_vit/images_native", (2, 16, 16, 3)), dtype), 2, method="last_blocks"
    )
    (total, masked), grads = jax.value_and_grad(value, has_aux=True)(variables)
    found = {size: tokens(variables, size) for size in sizes} | {"native": last[-1], "masked_larger": masked}
    return found, jnp.stack(last), total, grads

  np.testing.assert_array_equal(g[f"{variant}/grad_larger/mask"], g[f"{variant}/masked_larger/mask"])
  found, last, total, grads = everything(variables)
  patches = slice(1 + model.registers, None)
  for size, x in found.items():
    assert error(x[:, 0], g[f"{variant}/{size}/cls"]) < tolerance, size
    assert error(x[:, patches], g[f"{variant}/{size}/patches"]) < tolerance, size
    if model.registers:
      assert error(x[:, 1:5], g[f"{variant}/{size}/registers"]) < tolerance, size
  assert error(last[:, :, 0], g[f"{variant}/native/last2_cls"]) < tolerance
  assert error(jnp.mean(last[:, :, patches], axis=2), g[f"{variant}/native/last2_patches_mean"]) < tolerance
  # The terms of this sum are about 1, and the official positions are interpolated in float32 in both precisions.
  np.testing.assert_allclose(total, g[f"{variant}/grad_larger/value"], rtol=tolerance, atol=tolerance / 10)
  grads, of = convert.to_torch(grads), f"{variant}/grad_larger/"
  for name in {x.removeprefix(of) for x in g.files if x.startswith(of)} - {"value", "mask"}:
    assert error(grads[name], g[of + name]) < tolerance, name
  for size in ("larger", "rect", "smaller"):
    height, width = (int(x) // 4 for x in g[f"cfg/size_{size}"][1:])
    positions = variables["params"]["pos_embed"]
    positions = vit.interpolate_positions(positions, height, width, antialias=model.resize == "antialiased")
    assert error(positions[0, 1:], g[f"{variant}/{size}/position_patches"]) < tolerance, size


def test_a_masked_patch_is_not_seen_and_features_leave_registers_out():
  shape = dict(patch_size=4, dim=12, depth=1, heads=3, image_size=8, mask_token=True, registers=2)
  images = jax.random.uniform(ONE, (2, 8, 8, 3))
  variables = jax.jit(lambda: vit.ViT(**shape).init(ONE, images, train=False))()
  tokens = jax.jit(lambda x, masked: vit.ViT(**shape).apply(variables, x, masked=masked, method="tokens"))
  masked = jnp.zeros((2, 4), bool).at[0, 0].set(True)
  changed = images.at[:, :4, :4].set(0.5)
  np.testing.assert_array_equal(jnp.any(tokens(images, masked) != tokens(changed, masked), axis=(1, 2)), [False, True])
  mean = jax.jit(lambda x: vit.ViT(**shape, features="mean").apply(variables, x, train=False))(images)
  np.testing.assert_allclose(mean, tokens(images, masked & False)[:, 3:].mean(1), rtol=1e-5, atol=1e-6)
