"""The convolution's own gradients against JAX's, and what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import cpu_seconds

from ssl_jax.models.cpu import conv_general_dilated

LAYOUT = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))


def gradients(convolution, x, kernel, strides, padding):
  def loss(x, kernel):
    return jnp.sum(jnp.sin(convolution(x, kernel, strides, padding, **LAYOUT)))

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel)


@pytest.mark.parametrize(
  "size, kernel, strides, padding",
  [
    ((9, 9), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((9, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((8, 9), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((28, 27), (7, 7), (4, 4), ((3, 3), (3, 3))),
    ((10, 7), (3, 2), (2, 1), ((0, 2), (1, 0))),
    ((12, 13), (4, 4), (4, 4), "VALID"),
    ((12, 13), (3, 4), (2, 2), "SAME"),
  ],
)
def test_value_and_gradients_are_jaxs(x64, size, kernel, strides, padding):
  rng = np.random.default_rng(0)
  x, k = jnp.asarray(rng.normal(size=(3, *size, 4))), jnp.asarray(rng.normal(size=(*kernel, 4, 5)))
  got, want = (gradients(f, x, k, strides, padding) for f in (conv_general_dilated, lax.conv_general_dilated))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


def slowdown_in_a_loop(convolution):
  """CPU time of both gradients of four batches one after the other, by that of all at once."""
  kernel, images = jnp.ones((3, 3, 16, 16)), jnp.ones((4, 16, 32, 32, 16))

  def step(x):
    loss = lambda x, kernel: jnp.sum(jnp.sin(convolution(x, kernel, (1, 1), ((1, 1), (1, 1)), **LAYOUT)))  # noqa: E731
    return jax.grad(loss, argnums=(0, 1))(x, kernel)

  loop, at_once = cpu_seconds([(lambda x: lax.map(step, x), [images]), (step, [images.reshape(64, 32, 32, 16)])], 5)
  return loop / at_once


def test_a_loop_costs_no_more_than_all_at_once():
  assert slowdown_in_a_loop(conv_general_dilated) < 3  # measured: 1.2


@pytest.mark.slow  # where it fails ours is not needed any more
def test_a_loop_of_jaxs_own_costs_a_multiple():
  assert slowdown_in_a_loop(lax.conv_general_dilated) > 5  # measured: 15 to 80
