"""The programs that an accelerator gets: every branch of the code that a CPU does not take, traced and lowered here.

Lowering needs no card and no compiler, and finds what JAX refuses for a platform, such as a shape that cuDNN does not
serve. Nothing is run.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import augment, build
from ssl_jax import config as configs
from ssl_jax.models import vit

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}  # as `jax.default_backend` and as lowering call them
FUSED = "__cudnn$fmha"  # cuDNN's attention, in a program's text


@pytest.fixture
def on(monkeypatch):
  """`on(backend)`: what asks JAX for its backend is told this one, and that cuDNN is there."""

  def pretend(backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

  return pretend


def lowered(function, platform, *shapes):
  return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("tokens", [37, 49, 50, 197, 257])
def test_attention_takes_any_number_of_tokens_under_a_gradient_on_a_gpu(tokens, on):
  on("gpu")
  attention = vit.Attention(3, jax.nn.initializers.zeros, jax.nn.initializers.zeros, jnp.bfloat16)
  x = jax.ShapeDtypeStruct((2, tokens, 192), jnp.float32)
  params = jax.eval_shape(attention.init, jax.random.key(0), x)
  text = lowered(jax.grad(lambda params, x: jnp.sum(attention.apply(params, x))), "cuda", params, x)
  assert f"{FUSED}Softmax(" in text and f"{FUSED}SoftmaxBackward" in text


@pytest.mark.parametrize("dtype, width", [(jnp.float32, 192), (jnp.bfloat16, 3 * 12)], ids=["float32", "heads of 12"])
def test_what_cudnn_does_not_serve_takes_xlas_attention(dtype, width, on):
  on("gpu")
  attention = vit.Attention(3, jax.nn.initializers.zeros, jax.nn.initializers.zeros, dtype)
  x = jax.ShapeDtypeStruct((2, 37, width), jnp.float32)
  params = jax.eval_shape(attention.init, jax.random.key(0), x)
  assert FUSED not in lowered(jax.grad(lambda params, x: jnp.sum(attention.apply(params, x))), "cuda", params, x)


@pytest.mark.parametrize("tokens", [36, 37])
def test_the_added_token_changes_no_output_and_no_gradient(tokens, monkeypatch):
  plain = jax.nn.dot_product_attention
  asked = []

  def by_xla(*args, implementation, **lengths):  # cuDNN's arguments, on a CPU
    asked.append(implementation)
    return plain(*args, **lengths)

  q, k, v, c = (jax.random.normal(key, (2, tokens, 3, 8)) for key in jax.random.split(jax.random.key(0), 4))

  @functools.partial(jax.jit, static_argnums=0)
  def both_ways(attention, q, k, v, c):
    out, back = jax.vjp(attention, q, k, v)
    return out, *back(c)

  want = both_ways(plain, q, k, v, c)
  monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
  got = both_ways(vit.fused_attention, q, k, v, c)
  assert asked == ["cudnn"]
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def recipe(name):
  """A shipped recipe with its sizes, dtype and heads, but few blocks and a small batch."""
  file, _, version = name.partition(":")
  spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([version] if version else []))
  config.batch_size = 64
  if config.encoder.name.startswith("vit"):
    config.encoder.depth = 2
  else:
    config.encoder = dict(name="resnet", stages=(1, 1), bottleneck=True)
  if "decoder" in config.method:
    config.method.decoder.depth = 2
  return config


RECIPES = [
  "simclr_imagenet",
  "moco_imagenet:v2",
  "moco_imagenet:v3_vit",
  "byol_imagenet",
  "mae_imagenet",
  "dino_imagenet",
]


LIKE_BYOL = [
  pytest.param(f"{name}_imagenet", "gpu", marks=pytest.mark.slow) for name in ("vicreg", "barlow_twins", "simsiam")
]


# On a TPU no method takes a branch of its own: one with convolutions and one with attention stand for all.
@pytest.mark.parametrize(
  "name, backend",
  [*((name, "gpu") for name in RECIPES), ("simclr_imagenet", "tpu"), ("dino_imagenet", "tpu"), *LIKE_BYOL],
)
def test_every_methods_step_is_lowered_for_accelerators(name, backend, on, mesh):
  on(backend)
  config = recipe(name)
  config.lr.warmup_epochs = 1.0
  made = build.program(config, mesh(2), 8, 4)
  traced = made.train_step.trace(made.state, {"image": augment.crop_shapes(configs.views(config), 64, 3)})
  text = traced.lower(lowering_platforms=(PLATFORMS[backend],)).as_text()
  assert (FUSED in text) == (backend == "gpu" and config.encoder.name.startswith("vit"))
  assert "callback" not in text
