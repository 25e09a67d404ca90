"""`byol_loss` in a plain JAX loop: predict what a slow copy of the network says of the other view.

PYTHONPATH=. python examples/byol_loss.py
"""

import jax
import jax.numpy as jnp
import optax

from ssl_jax import byol_loss, data, monitors


def init(key):
  """Network 784-256-64 and predictor 64-64."""
  keys = jax.random.split(key, 3)
  shapes = {"hidden": (784, 256), "out": (256, 64), "predictor": (64, 64)}
  return {n: jax.random.normal(k, s) / s[0] ** 0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def project(params, x):
  h = x @ params["hidden"]
  h = (h - h.mean(axis=0)) / (h.std(axis=0) + 1e-5)  # without batch norm BYOL collapses more easily
  return jax.nn.relu(h) @ params["out"]


def main(steps=200):
  images = data.load("fashion_mnist_mini", "train", channels=1).images.reshape(-1, 784) / 255.0
  optimizer = optax.adam(1e-2)
  params, target = init(jax.random.key(0)), init(jax.random.key(1))
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, target, opt_state, key, x):
    view1, view2 = x * jax.random.bernoulli(key, 0.7, (2, *x.shape))

    def loss(params):
      p1, p2 = (project(params, view) @ params["predictor"] for view in (view1, view2))
      return byol_loss(p1, project(target, view2)) + byol_loss(p2, project(target, view1))

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    return params, optax.incremental_update(params, target, 0.05), opt_state, value

  losses = []
  for i in range(steps):
    x = jnp.asarray(images[i * 128 % 11_000 :][:128])
    params, target, opt_state, value = step(params, target, opt_state, jax.random.key(i), x)
    losses.append(float(value))
  std = monitors.measure(project(params, images[:256])[:, None])["feature_std"]  # a loss of 0 may be a collapse
  print(f"byol_loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps (4 if nothing fits, 0 if all does)")
  print(f"feature_std {std:.2f} (about 1 where features spread evenly, 0 where all are one point)")
  return losses


if __name__ == "__main__":
  main()
