"""The convolution's own gradients against JAX's, and the layout that they are written for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssl_jax.models.conv import conv_general_dilated

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


def test_every_convolution_in_a_loop_is_in_the_layout_of_the_fast_kernels():
  def layouts(convolution):
    def step(x):
      return jax.grad(lambda k: jnp.sum(jnp.sin(convolution(x, k, (2, 2), ((1, 1), (1, 1)), **LAYOUT))))(kernel)

    kernel, images = jnp.ones((3, 3, 4, 5)), jax.ShapeDtypeStruct((2, 6, 9, 9, 4), jnp.float32)
    text = jax.jit(lambda images: lax.map(step, images)).lower(images).compile().as_text()
    return set(re.findall(r"dim_labels=(\w+->\w+)", text))

  assert layouts(conv_general_dilated) == {"b01f_01io->b01f"}
  assert layouts(lax.conv_general_dilated) != {"b01f_01io->b01f"}  # if JAX's are too, ours is not needed any more
