"""Helpers that the losses share: argument checks, the cast to float32, scaling to unit norm, work in blocks of rows."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Numbers that one block of rows may hold. On a CPU 4 MiB of float32, which stay in its caches; for accelerators 64 MiB,
# since blocks follow one after the other and small ones leave them idle. On an H200 these take 1.0 to 1.3 times as long
# as the fastest blocks of `nt_xent` and `info_nce`, up to 16,384 pairs, of which one block takes 8 GiB.
_BLOCK, _BLOCK_OF_ACCELERATORS = 2**20, 2**24


def check_input(name: str, x: jax.Array) -> None:
  """Raises TypeError unless an input is floating point, and ValueError if an axis is empty: a mean of it is NaN."""
  if not hasattr(x, "dtype"):
    raise TypeError(f"{name} must be an array, got a {type(x).__name__}.")
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


def check_whole(name: str, value: Any, least: int) -> None:
  """Raises TypeError or ValueError unless an argument is a whole number, at least `least`."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise TypeError(f"{name} must be a whole number, got {value!r}.")
  if value < least:
    raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_block_size(block_size: Any) -> None:
  """Raises TypeError or ValueError unless a block size is a whole number from 1 up, or None."""
  if block_size is not None:
    check_whole("block_size", block_size, 1)


def check_pair(name1: str, x1: jax.Array, name2: str, x2: jax.Array) -> None:
  """Raises TypeError or ValueError unless two inputs are floating point and [N, d], of one shape."""
  for name, x in ((name1, x1), (name2, x2)):
    check_input(name, x)
    if x.ndim != 2:
      raise ValueError(f"{name} must have shape [N, d], got {x.shape}.")
  if x1.shape != x2.shape:
    raise ValueError(f"{name1} and {name2} must have one shape, got {x1.shape} and {x2.shape}.")


def wide(x: jax.Array) -> jax.Array:
  """Casts to float32; float64 stays as it is, where JAX has it."""
  x = jnp.asarray(x)
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def unit(x: jax.Array) -> jax.Array:
  """Scales the last axis to unit norm in float32; a zero vector stays zero, with a gradient of zero.

  A vector whose square overflows, from a norm of 1.8e19 on, becomes NaN: as zeros it would look like a good loss.
  """
  x = wide(x)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  # Without the `where` the gradient at 0 would be 1e6 times the incoming one, which overflows float16.
  scale = jnp.where(square == jnp.inf, jnp.nan, lax.rsqrt(jnp.maximum(square, 1e-12)))
  return x * jnp.where(square == 0, 0.0, scale)


def at_once(rows: int, columns: int, block_size: int | None) -> bool:
  """Whether all rows of a [rows, columns] matrix are to exist at once, on every platform."""
  return block_size >= rows if block_size else rows * columns <= _BLOCK


def by_rows(function: Callable, rows: Any, columns: int, block_size: int | None) -> Any:
  """Maps `function` over the first axis of `rows`, which makes `columns` numbers of an entry.

  At most `block_size` entries at a time; None: as many as suit the platform that the program is for.
  """
  n = jax.tree.leaves(rows)[0].shape[0]
  if at_once(n, columns, block_size):
    return jax.vmap(function)(rows)

  def in_blocks(size):
    return lambda rows: lax.map(function, rows, batch_size=size) if size < n else jax.vmap(function)(rows)

  if block_size:
    return in_blocks(block_size)(rows)
  on_cpu, elsewhere = (in_blocks(max(1, most // columns)) for most in (_BLOCK, _BLOCK_OF_ACCELERATORS))
  return lax.platform_dependent(rows, cpu=on_cpu, default=elsewhere)
