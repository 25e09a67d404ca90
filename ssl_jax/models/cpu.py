"""Gradients of convolutions and linear layers in a form that XLA's CPU compiler computes fast.

Both functions are JAX's own on every other backend.

- **Convolutions.** XLA's CPU compiler has fast convolution kernels only for the layout NHWC, HWIO, and converts others
  to it everywhere but in the body of a loop (jax-ml/jax#12868). JAX writes the gradients of a convolution in other
  layouts, so that with microbatches a step took 20 times as long. Here they are written in that layout.
- **Linear layers.** XLA's CPU compiler transposes the first factor of the product that is a weight's gradient, and JAX
  puts the output's gradient first. Here the narrower factor comes first, in a transformer's MLP a fourth of the bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **settings: Any) -> jax.Array:
  """`lax.conv_general_dilated` as `flax.linen.Conv` calls it, for two axes, one group and no dilation.

  Args:
    x: float [b, H, W, C].
    kernel: float [h, w, C, F].
    strides: (vertical, horizontal).
    padding: ((top, bottom), (left, right)), "SAME" or "VALID".
    settings: the other arguments of `lax.conv_general_dilated`, ignored on a CPU.

  Returns:
    float [b, H', W', F]. On a CPU its gradients are those of this file, and it has no forward mode (`jax.jvp`).
  """
  if jax.default_backend() != "cpu":
    return lax.conv_general_dilated(x, kernel, strides, padding, **settings)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
  return _conv(x, kernel, tuple(strides), tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, strides, padding):
  return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


def _conv_forward(x, kernel, strides, padding):
  return _conv(x, kernel, strides, padding), (x, kernel)


def _conv_backward(strides, padding, saved, g):
  x, kernel = saved
  input_pads, kernel_pads = [], []
  for axis, (stride, (low, _)) in enumerate(zip(strides, padding, strict=True)):
    n, k = x.shape[1 + axis], kernel.shape[axis]
    spread = (g.shape[1 + axis] - 1) * stride + 1  # extent of the outputs, `stride` apart
    input_pads.append((k - 1 - low, n + low - spread))
    kernel_pads.append((low, spread + k - 1 - n - low))
  turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
  dx = lax.conv_general_dilated(g, turned, (1, 1), input_pads, lhs_dilation=strides, dimension_numbers=_LAYOUT)
  # The kernel's gradient is a convolution with the axes of examples and channels swapped.
  channels, outputs = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(g, (1, 2, 0, 3))
  dk = lax.conv_general_dilated(channels, outputs, (1, 1), kernel_pads, rhs_dilation=strides, dimension_numbers=_LAYOUT)
  return dx, jnp.transpose(dk, (1, 2, 0, 3))


_conv.defvjp(_conv_forward, _conv_backward)


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **settings: Any) -> jax.Array:
  """`lax.dot_general` as `flax.linen.Dense` calls it: y = x W.

  Args:
    x: float [..., d].
    kernel: W, float [d, f], of the same type.
    dimension_numbers: of that product.
    settings: the other arguments of `lax.dot_general`, ignored on a CPU.

  Returns:
    float [..., f]. On a CPU its gradients are those of this file, g W^T and x^T g summed over the leading axes, and it
    has no forward mode (`jax.jvp`).
  """
  if jax.default_backend() != "cpu":
    return lax.dot_general(x, kernel, dimension_numbers, **settings)
  return _linear(x, kernel)


def _contract(a, b, axes_a, axes_b):
  return lax.dot_general(a, b, ((axes_a, axes_b), ((), ())))


@jax.custom_vjp
def _linear(x, kernel):
  return _contract(x, kernel, (x.ndim - 1,), (0,))


def _linear_forward(x, kernel):
  return _linear(x, kernel), (x, kernel)


def _linear_backward(saved, g):
  x, kernel = saved
  rows = tuple(range(x.ndim - 1))
  dx = _contract(g, kernel, (g.ndim - 1,), (1,))
  if x.shape[-1] < g.shape[-1]:
    return dx, _contract(x, g, rows, rows)
  # Without the barrier XLA would rewrite this as the other product, x^T g.
  return dx, lax.optimization_barrier(_contract(g, x, rows, rows)).T


_linear.defvjp(_linear_forward, _linear_backward)
