"""Gradients of convolutions and linear layers in a form that XLA's CPU compiler computes fast.

The values are JAX's own everywhere, and so are the gradients in a program for another platform: which one a program is
for is known when it is lowered (`lax.platform_dependent`), and not from what this process runs on.

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


def conv_general_dilated(
  x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, precision: Any = None, **settings: Any
) -> jax.Array:
  """`lax.conv_general_dilated` as `flax.linen.Conv` calls it, for two axes, one group and no dilation.

  Args:
    x: float [b, H, W, C].
    kernel: float [h, w, C, F].
    strides: (vertical, horizontal).
    padding: ((top, bottom), (left, right)), "SAME" or "VALID".
    precision: of the products, also of the gradients'; None: JAX's default where this is called.
    settings: the other arguments of `lax.conv_general_dilated`, ignored.

  Returns:
    float [b, H', W', F]. It has no forward mode (`jax.jvp`).
  """
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
  return _conv(x, kernel, tuple(strides), tuple(map(tuple, padding)), _precision(precision))


def _precision(asked):
  # Read here, as the backward pass is traced outside of the caller's `jax.default_matmul_precision`.
  return asked or jax.config.jax_default_matmul_precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, strides, padding, precision):
  return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision)


def _conv_forward(x, kernel, strides, padding, precision):
  return _conv(x, kernel, strides, padding, precision), (x, kernel)


def _conv_backward(strides, padding, precision, saved, g):
  x, kernel = saved
  conv = functools.partial(lax.conv_general_dilated, dimension_numbers=_LAYOUT, precision=precision)
  input_pads, kernel_pads = [], []
  for axis, (stride, (low, _)) in enumerate(zip(strides, padding, strict=True)):
    n, k = x.shape[1 + axis], kernel.shape[axis]
    spread = (g.shape[1 + axis] - 1) * stride + 1  # extent of the outputs, `stride` apart
    input_pads.append((k - 1 - low, n + low - spread))
    kernel_pads.append((low, spread + k - 1 - n - low))

  def of_input(kernel, g):
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return conv(g, turned, (1, 1), input_pads, lhs_dilation=strides)

  def of_kernel(x, g):  # a convolution with the axes of examples and channels swapped
    channels, outputs = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(g, (1, 2, 0, 3))
    return jnp.transpose(conv(channels, outputs, (1, 1), kernel_pads, rhs_dilation=strides), (1, 2, 0, 3))

  def of_input_by_jax(kernel, g):
    return jax.linear_transpose(lambda x: conv(x, kernel, strides, padding), x)(g)[0]

  def of_kernel_by_jax(x, g):
    return jax.linear_transpose(lambda kernel: conv(x, kernel, strides, padding), kernel)(g)[0]

  # Two choices, so that of a network's first layer, whose input takes no gradient, only one is left.
  return (
    lax.platform_dependent(kernel, g, cpu=of_input, default=of_input_by_jax),
    lax.platform_dependent(x, g, cpu=of_kernel, default=of_kernel_by_jax),
  )


_conv.defvjp(_conv_forward, _conv_backward)


def dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, *, precision: Any = None, **settings: Any
) -> jax.Array:
  """`lax.dot_general` as `flax.linen.Dense` calls it: y = x W.

  Args:
    x: float [..., d].
    kernel: W, float [d, f], of the same type.
    dimension_numbers: of that product.
    precision: of the product, also of the gradients'; None: JAX's default where this is called.
    settings: the other arguments of `lax.dot_general`, ignored.

  Returns:
    float [..., f]. Its gradients are g W^T and x^T g summed over the leading axes, and it has no forward mode
    (`jax.jvp`).
  """
  del dimension_numbers
  return _linear(x, kernel, _precision(precision))


def _contract(a, b, axes_a, axes_b, precision):
  return lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, kernel, precision):
  return _contract(x, kernel, (x.ndim - 1,), (0,), precision)


def _linear_forward(x, kernel, precision):
  return _linear(x, kernel, precision), (x, kernel)


def _linear_backward(precision, saved, g):
  x, kernel = saved
  rows = tuple(range(x.ndim - 1))

  def input_first(x, g):
    return _contract(x, g, rows, rows, precision)

  def output_first(x, g):
    return _contract(g, x, rows, rows, precision).T

  def output_first_and_so_compiled(x, g):
    # Without the barrier XLA would rewrite this as the other product, x^T g.
    return lax.optimization_barrier(_contract(g, x, rows, rows, precision)).T

  on_cpu = input_first if x.shape[-1] < g.shape[-1] else output_first_and_so_compiled
  dx = _contract(g, kernel, (g.ndim - 1,), (1,), precision)
  return dx, lax.platform_dependent(x, g, cpu=on_cpu, default=output_first)


_linear.defvjp(_linear_forward, _linear_backward)
