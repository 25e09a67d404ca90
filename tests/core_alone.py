"""What the library does with its core dependencies alone: tests/test_packaging.py runs it where nothing else is.

With --compile it is calculated, else traced, which imports the same and is soon over.
"""

import contextlib
import functools
import io
import re
import sys

import jax
import numpy as np

import ssl_jax
from ssl_jax import __main__
from ssl_jax.models.heads import SimCLRProjector
from ssl_jax.models.vit import ViT

compiled = "--compile" in sys.argv


def call(function, *args):
  return jax.jit(function)(*args) if compiled else jax.eval_shape(function, *args)


told = {}
for name in dir(ssl_jax):
  try:
    getattr(ssl_jax, name)
  except ImportError as error:
    told[name] = "train", f"ssl_jax.{name}", str(error)
assert told.keys() == {"data", "load_weights", "read_image", "restore_encoder"}, told
for command, extra in __main__.COMMANDS.items():
  sys.argv = ["ssl_jax", command, "--help"]
  with contextlib.redirect_stderr(io.StringIO()) as text:
    assert __main__.main() == 1
  told[command] = extra, f"python -m ssl_jax: error: {command}", text.getvalue().removesuffix("\n")
for extra, wanted, line in told.values():
  assert re.fullmatch(rf'{wanted} needs \w+, which is not installed: pip install "ssl_jax\[{extra}\]"', line), line

rng = np.random.default_rng(0)
z1, z2 = rng.normal(size=(2, 4, 3)).astype(np.float32)
loss = call(ssl_jax.nt_xent, z1, z2)

encoder = ViT(patch_size=4, dim=4, depth=1, heads=1, image_size=8)
method = ssl_jax.simclr(encoder, SimCLRProjector(features=4), temperature=0.2)
views = 2 * (ssl_jax.View(size=8, flip=0.5),)
optimizer = ssl_jax.optim.sgd(lambda _: 0.1, mask=True)
start = call(ssl_jax.training.make_init(method, optimizer, views, channels=1, seed=0))
step = ssl_jax.training.make_step(method, optimizer, views, seed=0)
images = rng.integers(0, 256, (4, 8, 8, 1), np.uint8)
batch = {"image": images[None]}
if compiled:  # an optimizer and the monitors, which take as long again to trace as the gradient
  state, metrics = call(jax.vmap(step, axis_name="batch", in_axes=(None, 0)), start, batch)
  assert state.step == 1 and metrics["update_norm"] > 0
else:
  gradient, _ = call(jax.vmap(step.gradient, axis_name="batch", in_axes=(None, 0)), start, batch)
  assert gradient["encoder"].keys() == start.params["encoder"].keys()
variables = {"params": start.params["encoder"]}
features = call(functools.partial(encoder.apply, train=False), variables, images / np.float32(255))
shares = call(functools.partial(ssl_jax.knn_predict, k=1, num_classes=4), features, np.arange(4), features)
assert (loss.shape, features.shape, shares.shape) == ((), (4, 4), (4, 4))
if compiled:
  assert np.isfinite(loss)
  np.testing.assert_array_equal(shares, np.eye(4))
  assert ssl_jax.convert.to_torch(variables)
  assert ssl_jax.logistic_regression(np.asarray(features), np.arange(4), C=1.0).gap < 1e-2
print("works")
