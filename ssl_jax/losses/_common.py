"""Helpers that the losses share: argument checks, the cast to float32, scaling to unit norm."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def check_input(name: str, x: jax.Array) -> None:
  """Raises TypeError unless an input is floating point, and ValueError if an axis is empty: a mean of it is NaN."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name} must be floating point, got {x.dtype}.")
  if 0 in x.shape:
    raise ValueError(f"{name} must not be empty: axis {x.shape.index(0)} of its shape {x.shape} has no entries.")


def check_temperature(name: str, temperature: Any) -> None:
  """Raises TypeError or ValueError unless a temperature is a positive, finite number; a traced one passes."""
  if isinstance(temperature, jax.core.Tracer):
    return
  if temperature is None or isinstance(temperature, bool | str | complex) or jnp.ndim(temperature) != 0:
    raise TypeError(f"{name} must be a positive number, got {temperature!r}.")
  temperature = float(temperature)  # a jax.Array would be compared under the caller's trace
  if not (math.isfinite(temperature) and temperature > 0):
    raise ValueError(f"{name} must be positive and finite, got {temperature}.")


def wide(x: jax.Array) -> jax.Array:
  """Casts to float32; float64 stays as it is."""
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def unit(x: jax.Array) -> jax.Array:
  """Scales the last axis to unit norm in float32; a zero vector stays zero, with a gradient of zero."""
  x = wide(x)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  # Without the `where` the gradient at 0 would be 1e6 times the incoming one, which overflows float16.
  return x * jnp.where(square == 0, 0.0, lax.rsqrt(jnp.maximum(square, 1e-12)))
