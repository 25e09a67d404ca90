"""`dino_loss` and `dino_center` in a plain JAX loop: match a slow teacher's distribution over 256 prototypes.

PYTHONPATH=. python examples/dino_loss.py
"""

import jax
import jax.numpy as jnp
import optax

from ssl_jax import data, dino_center, dino_loss, monitors

PROTOTYPES = 256


def init(key, sizes=(784, 256, 64, PROTOTYPES)):
  keys = jax.random.split(key, len(sizes) - 1)
  return [jax.random.normal(k, (m, n)) / m**0.5 for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def features(params, x):
  z = jax.nn.relu(x @ params[0]) @ params[1]
  return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def logits(params, x):
  prototypes = params[2] / jnp.linalg.norm(params[2], axis=0, keepdims=True)  # of unit norm, as in the paper's head
  return features(params, x) @ prototypes


def main(steps=200):
  images = data.load("fashion_mnist_mini", "train", channels=1).images.reshape(-1, 784) / 255.0
  optimizer = optax.adam(1e-3)
  params = teacher = init(jax.random.key(0))
  opt_state, center = optimizer.init(params), jnp.zeros(PROTOTYPES)

  @jax.jit
  def step(params, teacher, center, opt_state, key, x):
    views = x * jax.random.bernoulli(key, 0.7, (4, *x.shape))  # the teacher sees the first two
    targets = logits(teacher, views[:2])

    def loss(params):
      return dino_loss(logits(params, views), targets, center, student_temperature=0.1, teacher_temperature=0.04)

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    return params, optax.incremental_update(params, teacher, 0.01), dino_center(center, targets), opt_state, value

  losses = []
  for i in range(steps):
    x = jnp.asarray(images[i * 128 % 11_000 :][:128])
    params, teacher, center, opt_state, value = step(params, teacher, center, opt_state, jax.random.key(i), x)
    losses.append(float(value))
  std = monitors.measure(features(teacher, images[:256])[:, None])["feature_std"]  # a small loss may be a collapse
  print(f"dino_loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps (chance {jnp.log(PROTOTYPES):.2f})")
  print(f"feature_std {std:.2f} (about 1 where features spread evenly, 0 where all are one point)")
  return losses


if __name__ == "__main__":
  main()
