"""`info_nce` with a queue in a plain JAX loop: keys from a slow copy of the network, old keys as negatives.

PYTHONPATH=. python examples/moco_loss.py
"""

import jax
import jax.numpy as jnp
import optax

from ssl_jax import data, info_nce

QUEUE = 1024


def init(key, sizes=(784, 256, 64)):
  keys = jax.random.split(key, len(sizes) - 1)
  return [jax.random.normal(k, (m, n)) / m**0.5 for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def project(params, x):
  z = jax.nn.relu(x @ params[0]) @ params[1]
  return z / jnp.linalg.norm(z, axis=1, keepdims=True)  # the queue holds unit rows


def main(steps=200):
  images = data.load("fashion_mnist_mini", "train", channels=1).images.reshape(-1, 784) / 255.0
  optimizer = optax.adam(1e-3)
  params = slow = init(jax.random.key(0))
  opt_state = optimizer.init(params)
  queue = jax.random.normal(jax.random.key(1), (QUEUE, 64))
  queue /= jnp.linalg.norm(queue, axis=1, keepdims=True)

  @jax.jit
  def step(params, slow, queue, opt_state, key, x):
    view1, view2 = x * jax.random.bernoulli(key, 0.7, (2, *x.shape))
    keys = project(slow, view2)
    value, grads = jax.value_and_grad(lambda p: info_nce(project(p, view1), keys, queue, temperature=0.2))(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    slow = optax.incremental_update(params, slow, 0.01)
    return params, slow, jnp.concatenate([keys, queue[: -len(keys)]]), opt_state, value

  losses = []
  for i in range(steps):
    x = jnp.asarray(images[i * 128 % 11_000 :][:128])
    params, slow, queue, opt_state, value = step(params, slow, queue, opt_state, jax.random.key(i), x)
    losses.append(float(value))
  filled = QUEUE // 128  # the loss rises until real keys have replaced the random ones
  print(f"info_nce: {losses[filled]:.3f} when the queue is full, {losses[-1]:.3f} after {steps} steps")
  return losses[filled:]


if __name__ == "__main__":
  main()
