"""`ssl_jax.byol` around an encoder of your own: any linen module that is called as `encoder(images, train=...)`.

PYTHONPATH=. python examples/own_encoder.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import ssl_jax
from ssl_jax import augment, data, monitors
from ssl_jax.models.heads import Projector


class MyEncoder(nn.Module):
  """Two convolutions, which need not know of ssl_jax."""

  @nn.compact
  def __call__(self, images, *, train):
    x = nn.relu(nn.Conv(16, (5, 5), (2, 2))(images))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return jnp.mean(nn.relu(nn.Conv(32, (3, 3), (2, 2))(x)), axis=(1, 2))


VIEWS = 2 * (augment.View(size=28, scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.0, 0.0)),)


def main(steps=100):
  images = data.load("fashion_mnist_mini", "train", channels=1).images
  head = dict(hidden=64, features=32)
  method = ssl_jax.byol(
    MyEncoder(), Projector(**head), Projector(**head), target_momentum=ssl_jax.constant_momentum(0.99)
  )
  optimizer = optax.adam(1e-3)

  def draw(step, batch):
    keys = augment.example_keys(0, step, jnp.arange(len(batch)))
    return keys, augment.make_views(keys, batch, VIEWS)

  @jax.jit
  def init():
    params, state = method.init(jax.random.key(0), draw(0, images[:1])[1])
    return params, state, optimizer.init(params)

  @jax.jit
  def train_step(params, state, opt_state, i, batch):
    keys, views = draw(i, batch)
    (loss, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, views, keys, i)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    std = monitors.measure(*aux.monitored)["feature_std"]  # a loss of 0 may be a collapse
    return params, method.update(params, state, aux, i), opt_state, loss, std

  params, state, opt_state = init()
  losses = []
  for i in range(steps):
    batch = images[i * 64 % 11_000 :][:64]
    params, state, opt_state, loss, std = train_step(params, state, opt_state, i, batch)
    losses.append(float(loss))
  features = MyEncoder().apply(method.encoder(params, state), images[:4] / 255.0, train=False)
  print(f"byol: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps; features {features.shape}")
  print(f"feature_std {std:.2f} (about 1 where embeddings spread evenly, 0 where all are one point)")
  return losses


if __name__ == "__main__":
  main()
