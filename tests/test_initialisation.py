"""How every recipe's parameters start: each official code's distribution, by its deviation and its bound."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from test_trajectories import RUNS, recipe

from ssl_jax import build
from ssl_jax import config as configs

CONV = r"encoder/(conv1|layer.*/conv\d|layer.*/downsample_conv)/kernel"
LAST_SCALE = r"encoder/layer\d_\d/bn2/scale"
ONES, ZEROS = r".*/scale", r".*/bias"


def fan_in(shape):
  return math.prod(shape[:-1])


def fan_out(shape):
  return math.prod(shape[:-2]) * shape[-1]


def normal(std):
  """`std` is a number, or a function of the shape."""
  return lambda shape: (std(shape) if callable(std) else std, math.inf)


def uniform(bound):
  return lambda shape: (bound(shape) / 3**0.5, bound(shape))


def constant(value):
  return lambda shape: (0.0, value)


kaiming = normal(lambda shape: math.sqrt(2 / fan_out(shape)))
torch = uniform(lambda shape: fan_in(shape) ** -0.5)
xavier = uniform(lambda shape: math.sqrt(6 / (fan_in(shape) + shape[-1])))
xavier_of_three = uniform(lambda shape: math.sqrt(6 / (fan_in(shape) + shape[-1] / 3)))


def cut_at_two(std):
  """A normal distribution of deviation 1 / sqrt(fan_in) cut at two of them, times `std`."""
  return lambda shape: (std * 0.8796 * fan_in(shape) ** -0.5, 2 * std * fan_in(shape) ** -0.5)


RESNET = [(r"encoder/.*/scale|encoder/bn1/scale", constant(1)), (ZEROS, constant(0))]
TWO_VIEWS = [
  (CONV, kaiming),
  (LAST_SCALE, constant(0)),
  (r"(projector|predictor)/.*/kernel", torch),
  (ONES, constant(1)),
  (ZEROS, constant(0)),
]
# For each run the first expression that matches a parameter's whole path says how it starts.
EXPECTED = {
  "simclr": [
    (CONV, cut_at_two(1 / 0.8796)),
    (LAST_SCALE, constant(0)),
    (r"projector/linear\d/kernel", normal(0.01)),
    (ONES, constant(1)),
    (ZEROS, constant(0)),
  ],
  "moco_v1": [(CONV, kaiming), (r"projector/.*/kernel", torch), (r"projector/.*/bias", None), *RESNET],
  "moco_v2": [(CONV, kaiming), (r"projector/.*/kernel", torch), (r"projector/.*/bias", None), *RESNET],
  "moco_v3": TWO_VIEWS,
  "moco_v3_vit": [
    (r"encoder/patch_embed/proj/kernel", xavier),
    (r"encoder/blocks_\d/attn/qkv/kernel", xavier_of_three),
    (r"encoder/cls_token", normal(1e-6)),
    (r"encoder/.*/kernel", xavier),
    (r"(projector|predictor)/.*/kernel", torch),
    (ONES, constant(1)),
    (ZEROS, constant(0)),
  ],
  "byol": [
    (CONV, cut_at_two(1)),
    (r"(projector|predictor)/.*/kernel", cut_at_two(1)),
    (ONES, constant(1)),
    (ZEROS, constant(0)),
  ],
  "vicreg": TWO_VIEWS,
  "barlow_twins": TWO_VIEWS,
  "simsiam": [(r"predictor/linear2/bias", None), *TWO_VIEWS],
  "mae": [
    (r".*(cls|mask)_token", normal(0.02)),
    (r"encoder/patch_embed/proj/bias", None),
    (r".*/kernel", xavier),
    (ONES, constant(1)),
    (ZEROS, constant(0)),
  ],
  "dino": [
    (r"encoder/patch_embed/proj/kernel|head/last_layer/weight_v", torch),
    (r"encoder/patch_embed/proj/bias", None),
    (r".*/kernel|encoder/(cls_token|pos_embed)", normal(0.02)),
    (r"head/last_layer/weight_g", constant(1)),
    (ONES, constant(1)),
    (ZEROS, constant(0)),
  ],
}


@pytest.mark.parametrize("run", RUNS)
def test_parameters_start_as_in_the_official_code(run):
  config = recipe(run)
  config.dtype = "float32"
  method, _ = build.method_of(config, 8, 4)
  sizes = [view.size for view in configs.views(config)]
  views = tuple(jnp.zeros((sizes.count(size), 1, size, size, 3)) for size in dict.fromkeys(sizes))
  init = jax.jit(jax.vmap(functools.partial(method.init, views=views)))
  params, _ = init(jax.random.split(jax.random.key(0), 8))  # eight draws of small networks
  for path, value in traverse_util.flatten_dict(params, sep="/").items():
    kind = next((kind for pattern, kind in EXPECTED[run] if re.fullmatch(pattern, path)), "nothing")
    assert kind != "nothing", f"{path} is not in the table"
    if kind is None:
      continue  # PyTorch's default for biases, which depends on the layer's inputs: tests of the heads have it
    std, bound = kind(value.shape[1:])
    if std == 0:
      np.testing.assert_array_equal(value, bound, err_msg=path)
      continue
    assert np.std(value) == pytest.approx(std, rel=5 / math.sqrt(2 * value.size)), path  # 5 deviations of the estimate
    assert abs(np.mean(value)) < 5 * std / math.sqrt(value.size), path
    if bound < math.inf:
      assert 0.9 * bound < np.max(np.abs(value)) <= bound * 1.0001, path
