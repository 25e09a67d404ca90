"""`nt_xent` in a plain JAX loop: a two-layer network learns to tell noisy copies of one image from other images.

PYTHONPATH=. python examples/simclr_loss.py
"""

import jax
import jax.numpy as jnp
import optax

from ssl_jax import data, nt_xent


def init(key, sizes=(784, 256, 64)):
  keys = jax.random.split(key, len(sizes) - 1)
  return [jax.random.normal(k, (m, n)) / m**0.5 for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def project(params, x):
  return jax.nn.relu(x @ params[0]) @ params[1]


def two_views(key, x):
  """The images twice, each time with other pixels removed."""
  return x * jax.random.bernoulli(key, 0.7, (2, *x.shape))


def main(steps=200):
  images = data.load("fashion_mnist_mini", "train", channels=1).images.reshape(-1, 784) / 255.0
  optimizer = optax.adam(1e-3)
  params = init(jax.random.key(0))
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, opt_state, key, x):
    def loss(params):
      z1, z2 = project(params, two_views(key, x))
      return nt_xent(z1, z2, temperature=0.2)

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, value

  losses = []
  for i in range(steps):
    x = jnp.asarray(images[i * 128 % 11_000 :][:128])
    params, opt_state, value = step(params, opt_state, jax.random.key(i), x)
    losses.append(float(value))
  print(f"nt_xent: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps (chance {jnp.log(255.0):.3f})")
  return losses


if __name__ == "__main__":
  main()
