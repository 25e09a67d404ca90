"""The linear layer's own gradients against JAX's, and what they are for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssl_jax.models.linear import dot_general


def gradients(product, x, kernel):
  def loss(x, kernel):
    return jnp.sum(jnp.sin(product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))))

  return jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)


@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("d, f", [(4, 9), (9, 4), (5, 5)])
def test_value_and_gradients_are_jaxs(x64, rows, d, f):
  rng = np.random.default_rng(0)
  x, kernel = jnp.asarray(rng.normal(size=(*rows, d))), jnp.asarray(rng.normal(size=(d, f)))
  got, want = (gradients(product, x, kernel) for product in (dot_general, lax.dot_general))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13), got, want)


def compiled_gradient(product, d, f):
  """The program of the kernel's gradient, of 256 rows."""
  x, kernel = jax.ShapeDtypeStruct((8, 32, d), jnp.float32), jax.ShapeDtypeStruct((d, f), jnp.float32)
  return jax.jit(lambda *given: gradients(product, *given)[1][1]).lower(x, kernel).compile().as_text()


def test_a_cpu_transposes_the_narrow_factor_of_the_kernels_gradient():
  def transposed(product):
    return {width for width in (4, 16) if f"f32[{width},256]" in compiled_gradient(product, 4, 16)}

  assert transposed(dot_general) == {4}
  assert transposed(lax.dot_general) == {16}  # if JAX's is narrow too, ours is not needed any more


def test_the_product_is_not_swapped_back_where_the_outputs_gradient_is_narrow():
  def products(product):
    return set(re.findall(r"= (f32\[16,4\]|f32\[4,16\])\S* dot\(", compiled_gradient(product, 16, 4)))

  assert products(dot_general) == {"f32[4,16]"}
  assert products(lax.dot_general) == {"f32[16,4]"}  # if XLA leaves JAX's as it is, the barrier is not needed any more
