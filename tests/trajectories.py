"""What the tests of the methods share: weights by name, and a training step without the loop around it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from named_weights import named_images, named_weight

from ssl_jax import convert


def error(got, want):
  """The largest difference, relative to the largest entry."""
  return float(np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want)))


def named_variables(shapes, prefix, rename, dtype):
  """Variables whose values are `named_weight(prefix + PyTorch name)`, through the converter."""
  state_dict = {}
  for name, value in convert.to_torch(jax.tree.map(lambda x: np.empty(x.shape), shapes)).items():
    for pattern, replacement in rename.items():
      name = re.sub(pattern, replacement, name)
    state_dict[prefix + name] = named_weight(prefix + name, value.shape)
  return cast(convert.from_torch(state_dict, shapes, prefix=prefix, rename=rename), dtype)


def cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def views(names, shape, dtype):
  return (jnp.stack([named_images(name, shape) for name in names]).astype(dtype),)


def make_step(method, optimizer):
  """(params, state, opt_state, views, keys, step) -> the same after a step, and the Aux."""

  @jax.jit
  def step(params, state, opt_state, drawn, keys, i):
    (_, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, drawn, keys, i)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, method.update(params, state, aux, i), opt_state, aux

  return step


# Trajectories were run in float64; float32 drifts from them as PyTorch's own does: batch norm on 16 images amplifies.
PRECISIONS = [("float64", 1e-5, 1e-5), ("float32", 1e-3, 1e-2)]  # dtype, losses, probes
