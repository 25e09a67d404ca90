"""`mae_loss` in a plain JAX loop: a two-layer network fills in the patches that it cannot see.

PYTHONPATH=. python examples/mae_loss.py
"""

import jax
import jax.numpy as jnp
import optax

from ssl_jax import data, mae_loss, patchify


def init(key, sizes=(784, 256, 784)):
  keys = jax.random.split(key, len(sizes) - 1)
  return [jax.random.normal(k, (m, n)) / m**0.5 for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def main(steps=200):
  images = data.load("fashion_mnist_mini", "train", channels=1).images / 255.0
  optimizer = optax.adam(1e-3)
  params = init(jax.random.key(0))
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, opt_state, key, x):
    patches = patchify(x, 4)  # [b, 49, 16]
    mask = jax.random.bernoulli(key, 0.75, patches.shape[:2])  # True: removed

    def loss(params):
      visible = jnp.where(mask[..., None], 0, patches)
      prediction = jax.nn.relu(visible.reshape(len(x), -1) @ params[0]) @ params[1]
      return mae_loss(prediction.reshape(patches.shape), patches, mask)

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, value

  losses = []
  for i in range(steps):
    x = jnp.asarray(images[i * 128 % 11_000 :][:128], jnp.float32)
    params, opt_state, value = step(params, opt_state, jax.random.key(i), x)
    losses.append(float(value))
  print(f"mae_loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
  return losses


if __name__ == "__main__":
  main()
