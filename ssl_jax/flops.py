"""The FLOPs of a training step, and the peak of the device.

Counted are matrix products and convolutions, from the traced program: the same on every backend, and exact where XLA's
cost analysis counts the body of a loop once. Elementwise work is not counted, as is usual for model FLOP utilisation.
"""

import math

import numpy as np
from jax.extend.core import ClosedJaxpr, jaxprs_in_params

# Dense peaks of one JAX device, from the vendors' data sheets, in TFLOP/s: (bfloat16, float32). By JAX's defaults
# products of float32 are one bfloat16 pass on a TPU, and TF32 on a GPU from Ampere on. None: no such units. The first
# name that is part of the device's kind is used.
PEAKS = {
  "TPU v2": (22.5, 22.5),  # per core, which is one JAX device up to v3
  "TPU v3": (61.5, 61.5),
  "TPU v4 lite": (138.0, 138.0),
  "TPU v4": (275.0, 275.0),
  "TPU v5 lite": (197.0, 197.0),
  "TPU v5e": (197.0, 197.0),
  "TPU v5": (459.0, 459.0),
  "TPU v6": (918.0, 918.0),
  "H200": (989.4, 494.7),
  "GH200": (989.4, 494.7),
  "H100 PCIe": (756.0, 378.0),
  "H100 NVL": (835.5, 417.8),
  "H100": (989.4, 494.7),
  "A100": (312.0, 156.0),
  "A40": (149.7, 74.8),
  "A10G": (70.0, 35.0),
  "A10": (125.0, 62.5),
  "L40S": (362.0, 183.0),
  "L4": (121.0, 60.5),
  "V100": (None, 15.7),
  "T4": (None, 8.1),
}


def peak(device_kind: str, dtype: str) -> float | None:
  """The dense peak in FLOP/s of a device of this `device_kind` that computes in "bfloat16" or "float32".

  None where it is not known, as for a CPU.
  """
  for name, peaks in PEAKS.items():
    if name in device_kind:
      tera = peaks[dtype == "float32"]
      return tera and tera * 1e12
  return None


def count(program: ClosedJaxpr) -> int:
  """The FLOPs of a traced program, `jax.make_jaxpr(f)(*args)` or `jax.jit(f).trace(*args).jaxpr`, on all its devices.

  Two for each multiplication and addition. A loop counts once per iteration where the trace has their number
  (`lax.scan`, `lax.map`), else once; a conditional counts as its most expensive branch. Terms of a convolution that
  fall on padding or the holes of a dilation are left out, so that each of its two gradients costs exactly what it does.
  What `jax.checkpoint` recomputes in the backward pass is left out, since these are the FLOPs of the model.
  """
  return _count(program.jaxpr)


def in_words(flops: float) -> str:
  """'3.2 TFLOP', '840 GFLOP'."""
  return f"{flops / 1e12:.3g} TFLOP" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP"


def _count(jaxpr):
  # Unused results are not computed, such as the gradient of the first layer with respect to the images.
  total, used = 0, {id(x) for x in jaxpr.outvars}
  for equation in reversed(jaxpr.eqns):
    if equation.effects or not used.isdisjoint(map(id, equation.outvars)):
      used.update(map(id, equation.invars))
      total += _count_equation(equation)
  return total


def _count_equation(equation):
  name, params = equation.primitive.name, equation.params
  if "rematted_computation" in str(equation.source_info.name_stack):  # JAX's name for recomputation
    return 0
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
  if name == "conv_general_dilated":
    return _count_convolution(*(x.aval.shape for x in (*equation.invars, *equation.outvars)), params)
  if name in _FUSED_ATTENTION:  # of cuDNN, [b, n, heads, d]
    query, key = (x.aval for x in equation.invars[:2])
    return _FUSED_ATTENTION[name] * 2 * query.size * key.shape[1]
  inner = [_count(jaxpr) for jaxpr in jaxprs_in_params(params)]
  if name == "cond":
    return max(inner)
  times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
  return times * sum(inner)


# The number of products of the size of queries times keys in a fused kernel.
_FUSED_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


def _count_convolution(image, kernel, out, params):
  numbers = params["dimension_numbers"]
  (batch, features, *places), (_, inputs, *taps) = numbers.out_spec, numbers.rhs_spec
  terms = 1
  for axis, (place, tap) in enumerate(zip(places, taps, strict=True)):
    stride, low = params["window_strides"][axis], params["padding"][axis][0]
    spread, apart = params["lhs_dilation"][axis], params["rhs_dilation"][axis]
    # Where each output's taps fall on the input, whose pixels are `spread` apart.
    at = np.arange(out[place])[:, None] * stride + np.arange(kernel[tap]) * apart - low
    pixels = image[numbers.lhs_spec[2 + axis]]
    terms *= int(np.sum((at >= 0) & (at <= (pixels - 1) * spread) & (at % spread == 0)))
  return 2 * out[batch] * out[features] * kernel[inputs] * terms
