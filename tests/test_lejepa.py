"""LeJEPA's whole steps against the official listing's, its slices, and which views are global."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from named_weights import named_images
from test_config import by_name, recipe
from trajectories import error, make_step, named_variables

from ssl_jax import build, convert
from ssl_jax.errors import UserError
from ssl_jax.losses import lejepa_loss
from ssl_jax.methods import lejepa
from ssl_jax.methods.base import OneNetworkState
from ssl_jax.models import heads, vit

KEYS = jax.random.split(jax.random.key(0), 20)
PROJECTOR = {"linear1": 0, "bn1": 1, "linear2": 4, "bn2": 5, "linear3": 8}  # and torchvision's places in its MLP


@pytest.fixture
def precise(dtype):
  """float64 where the test asks for it."""
  with jax.enable_x64(dtype == "float64"):
    yield


@pytest.mark.parametrize(
  "dtype, rtol", [("float64", 1e-6), pytest.param("float32", 1e-4, marks=pytest.mark.slow)], ids=str
)
def test_eight_steps_are_the_minimal_listings(golden, dtype, rtol, precise, monkeypatch):
  g, dtype = golden("lejepa_trajectory"), jnp.dtype(dtype)
  encoder = vit.ViT(patch_size=4, dim=48, depth=2, heads=3, image_size=16, dtype=dtype)
  projector = heads.EmbeddingProjector(embedding=40, hidden=64, features=16, dtype=dtype)
  slices = np.stack([named_images(f"lejepa/slices{i}", (16, 256)) for i in range(8)]).astype(dtype)
  slices = jnp.asarray(slices / np.linalg.norm(slices, axis=1, keepdims=True))
  monkeypatch.setattr(lejepa, "draw_directions", lambda step, dim, count: slices[step])
  method = lejepa.lejepa(encoder, projector, weight=float(g["cfg/lam"]), slices=256)

  params, state = jax.eval_shape(method.init, KEYS[0], (jnp.zeros((4, 1, 16, 16, 3)),))
  rename = {r"^projector\.embedding": "backbone.head", r"^encoder\.": "backbone."}
  rename |= {rf"^projector\.mlp\.{ours}": f"proj.{place}" for ours, place in PROJECTOR.items()}
  shapes = {"params": params, "batch_stats": {"projector": state.batch_stats["projector"]}}
  start = named_variables(shapes, "lejepa/", rename, dtype)
  params, state = start["params"], OneNetworkState({"encoder": {}, **start["batch_stats"]})
  rates = jnp.asarray(g["lr"])
  optimizer = optax.adamw(lambda step: rates[step], weight_decay=float(g["cfg/weight_decay"]))
  opt_state, step = optimizer.init(params), make_step(method, optimizer)
  for i in range(8):
    x = named_images(f"lejepa/views{i}", (20, 4, 16, 16, 3))
    drawn = (jnp.asarray(np.moveaxis(np.float32(0.6) * x[:, :1] + np.float32(0.8) * x, 1, 0), dtype),)
    params, state, opt_state, aux = step(params, state, opt_state, drawn, KEYS, i)
    for key in ("loss", "invariance", "sigreg"):
      np.testing.assert_allclose(aux.metrics[key], g[key][i], rtol=rtol, err_msg=f"{key}, step {i}")

  features = encoder.apply({"params": params["encoder"]}, named_images("lejepa/probe", (6, 16, 16, 3)), train=False)
  projection, _ = heads.train_pass(projector, params["projector"], state.batch_stats["projector"], features)
  assert error(projection, g["probe/projection_train"]) < rtol
  final = convert.to_torch({"params": params}) | convert.to_torch({"batch_stats": state.batch_stats})
  for name, value in final.items():
    for pattern, replacement in rename.items():
      name = re.sub(pattern, replacement, name)
    if f"w/{name}" in g.files:
      assert error(value, g[f"w/{name}"]) < rtol, name


def test_the_slices_are_unit_columns_drawn_anew_in_every_step():
  draw = jax.jit(lejepa.draw_directions, static_argnums=(1, 2))
  first, again, next_one = draw(3, 24, 500), draw(3, 24, 500), draw(4, 24, 500)
  np.testing.assert_allclose(jnp.linalg.norm(first, axis=0), np.ones(500), rtol=1e-6)
  np.testing.assert_array_equal(first, again)
  assert abs(jnp.sum(first * next_one)) < 5 * (500 / 24) ** 0.5  # five deviations of independent directions
  assert np.max(np.abs(first @ first.T / 500 - np.eye(24) / 24)) < 0.02  # no direction is preferred


class Encoder(heads.nn.Module):
  @heads.nn.compact
  def __call__(self, x, *, train):
    return jnp.mean(x, axis=(1, 2))


class Double(heads.nn.Module):
  @heads.nn.compact
  def __call__(self, x, *, train):
    return x * self.param("two", lambda key: jnp.full((), 2.0))


def test_the_first_resolution_is_global_and_the_metrics_are_the_parts():
  method = lejepa.lejepa(Encoder(), Double(), weight=0.3, slices=6)
  large, small = (jax.random.normal(key, (2, 5, side, side, 3)) for key, side in zip(KEYS[:2], (4, 2), strict=True))
  views = (large, jnp.concatenate([small, small + 1]))
  params, state = (
    {"encoder": {}, "projector": {"two": jnp.float32(2)}},
    OneNetworkState({"encoder": {}, "projector": {}}),
  )
  value, aux = jax.jit(method.loss)(params, state, views, KEYS[:5], 7)
  z = jnp.concatenate([2 * jnp.mean(x, axis=(2, 3)) for x in views])
  directions = lejepa.draw_directions(7, 3, 6)
  np.testing.assert_allclose(value, lejepa_loss(z, directions, global_views=2, weight=0.3), rtol=1e-6)
  for part, weight in (("invariance", 0.0), ("sigreg", 1.0)):
    want = lejepa_loss(z, directions, global_views=2, weight=weight)
    np.testing.assert_allclose(aux.metrics[part], want, rtol=1e-5, err_msg=part)
  np.testing.assert_allclose(aux.monitored.embedding, jnp.moveaxis(z[:2], 0, 1), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(16,), (16, 8, 16), (16, 8, 4)])
def test_views_that_are_not_global_before_local_are_refused(sizes):
  config = recipe(by_name("lejepa_imagenette"))
  config.views = tuple(dict(size=size) for size in sizes)
  with pytest.raises(UserError, match=r"global ones of one size before local ones, got sizes \[16"):
    build.method_of(config, 8, 4)
