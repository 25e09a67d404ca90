"""FLOPs of traced programs: closed forms, XLA's own count, and the models of the recipes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from test_all_methods import few_images, small  # noqa: F401

from ssl_jax import build, flops, parallel
from ssl_jax.models.cpu import conv_general_dilated
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.vit import ViT


def count(function, *args):
  return flops.count(jax.make_jaxpr(function)(*args))


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_dense_layer_and_its_gradients():
  layer = lambda w, x: jnp.sum(jnp.square(x @ w))  # noqa: E731
  w, x = shape(5, 7), shape(3, 5)
  assert count(layer, w, x) == 2 * 3 * 5 * 7
  assert count(jax.grad(layer), w, x) == 2 * 2 * 3 * 5 * 7  # not to x
  assert count(jax.grad(layer, argnums=(0, 1)), w, x) == 3 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("convolve", [lax.conv_general_dilated, conv_general_dilated], ids=["lax", "ours"])
def test_a_convolution_and_its_gradients(convolve):
  # Three taps on 8 pixels: one of each outer output, or at stride 2 of the last one, meets the edge and is no work.
  layouts = dict(dimension_numbers=("NHWC", "HWIO", "NHWC")) if convolve is lax.conv_general_dilated else {}
  for stride, terms in ((1, 22), (2, 11)):
    layer = lambda k, x, s=stride: jnp.sum(jnp.square(convolve(x, k, (s, s), "SAME", **layouts)))  # noqa: E731
    k, x = shape(3, 3, 4, 6), shape(2, 8, 8, 4)
    assert count(layer, k, x) == 2 * 2 * 6 * 4 * terms**2
    assert count(jax.grad(layer), k, x) == 2 * count(layer, k, x)
    assert count(jax.grad(layer, argnums=(0, 1)), k, x) == 3 * count(layer, k, x)


def test_a_vision_transformer_and_its_gradient():
  dim, depth, b, n = 32, 2, 3, 16
  model = ViT(patch_size=4, dim=dim, depth=depth, heads=2, image_size=16)
  images = shape(b, 16, 16, 3)
  params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
  embed = 2 * b * n * 4 * 4 * 3 * dim
  blocks = depth * b * (1 + n) * (24 * dim**2 + 4 * (1 + n) * dim)
  forward = lambda params, images: jnp.sum(model.apply(params, images, train=True))  # noqa: E731
  assert count(forward, params, images) == embed + blocks
  assert count(jax.grad(forward), params, images) == 2 * embed + 3 * blocks


def test_xla_counts_the_same_where_nothing_is_elementwise_and_nothing_loops():
  def layers(k, w, x):
    y = lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.einsum("bhwc,cd->bhwd", y, w)

  def gradients(g, *args):
    return jax.vjp(layers, *args)[1](g)

  args = shape(3, 3, 4, 6), shape(6, 5), shape(2, 9, 9, 4)
  for function, given in ((layers, args), (gradients, (shape(2, 5, 5, 5), *args))):
    assert count(function, *given) == jax.jit(function).lower(*given).cost_analysis()["flops"]


def test_xla_counts_little_more_of_a_whole_model():
  model = ResNet(stages=(1,), width=0.5, stem="small")
  images = shape(8, 16, 16, 3)
  variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
  function = jax.grad(lambda v, x: jnp.sum(model.apply(v, x, train=False)))
  xla = jax.jit(function).lower(variables, images).cost_analysis()["flops"]
  assert 0.97 * xla < count(function, variables, images) < xla  # norms, ReLU, additions


def test_control_flow(mesh):
  w = shape(4, 4)
  product = 2 * 4**3

  def scanned(w):
    return lax.scan(lambda x, _: (x @ w, None), w, length=5)[0]

  assert count(scanned, w) == 5 * product
  assert count(lambda w: lax.map(lambda x: x @ w, jnp.zeros((3, 4, 4))), w) == 3 * product
  assert count(lambda w: lax.while_loop(lambda x: jnp.all(x < 1), lambda x: x @ w, w), w) == product
  assert count(lambda w: lax.cond(w[0, 0] > 0, lambda: w @ w @ w, lambda: w @ w), w) == 2 * product
  assert count(jax.jit(lambda w: jax.jit(scanned)(w @ w)), w) == 6 * product
  assert count(lambda w: (w @ w, w + 1)[1], w) == 0  # what nothing uses is not computed
  twice = jax.checkpoint(lambda w: jnp.sum(jnp.sin(w @ w) @ w))
  assert count(jax.value_and_grad(twice), w) == count(jax.value_and_grad(twice.__wrapped__), w) == 6 * product
  spread = jax.shard_map(lambda x: x @ x.T, mesh=mesh(4), in_specs=P("batch"), out_specs=P("batch"))
  assert count(spread, shape(8, 4)) == 4 * 2 * 2 * 4 * 2


@pytest.mark.parametrize(
  ("kind", "dtype", "tera"),
  [
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5p", "bfloat16", 459),
    ("TPU v6 lite", "float32", 918),
    ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
    ("NVIDIA A100-SXM4-40GB", "float32", 156),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA L4", "bfloat16", 121),
    ("NVIDIA L40S", "bfloat16", 362),
    ("Tesla V100-SXM2-16GB", "float32", 15.7),
    ("Tesla V100-SXM2-16GB", "bfloat16", None),
    ("cpu", "float32", None),
  ],
)
def test_the_peak_of_a_device(kind, dtype, tera):
  assert flops.peak(kind, dtype) == (tera and pytest.approx(tera * 1e12))


def test_words():
  assert [flops.in_words(x) for x in (3.2e12, 8.4e11, 5e6)] == ["3.2 TFLOP", "840 GFLOP", "0.005 GFLOP"]


def test_a_step_costs_as_much_on_any_number_of_devices(mesh, monkeypatch):
  costs = set()
  for devices, shard_state, microbatch in ((1, False, None), (4, False, None), (4, True, None), (2, False, 4)):
    config = small("quickstart")
    config.parallel.shard_state, config.microbatch = shard_state, microbatch
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=devices: mesh(devices))
    costs.add(build.run(config).flops)
  assert len(costs) == 1
