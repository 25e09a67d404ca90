"""A recipe's training step compiled ahead of time, and what its collectives send: for scaling.py and pods.py."""

import re

import common
import numpy as np

from ssl_jax import augment, build, parallel
from ssl_jax import config as configs

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shapes>.*?) (?P<kind>{KINDS})(?P<start>-start)?\(")


def trace_step(config, mesh):
  """The training step for streamed images, traced as train.py's; nothing is allocated."""
  made = build.program(config, mesh, *configs.schedule_length(config, common.IMAGENET))
  crops = augment.crop_shapes(configs.views(config), config.batch_size, config.data.channels)
  return made.train_step.trace(made.state, parallel.abstract({"image": crops}, parallel.split(mesh)))


def collectives(text, devices):
  """{kind: (count, bytes that a device sends)}; a ring sends (n - 1) / n of what is gathered or reduced.

  Kinds that end in "-start" are asynchronous: the program goes on until their "-done".
  """
  found = {}
  for line in text.splitlines():
    if not (match := COLLECTIVE.search(line)):
      continue
    kind = match["kind"]
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", match["shapes"])
    size = sum(SIZES[t] * int(np.prod([int(x) for x in dims.split(",") if x])) for t, dims in arrays if t in SIZES)
    if match["start"]:  # an asynchronous one lists its operands as well
      size //= 2
    sent = {"all-reduce": 2 * size, "reduce-scatter": size * devices}.get(kind, size)
    sent = size if kind == "collective-permute" else sent * (devices - 1) / devices
    name = kind + (match["start"] or "")
    count, total = found.get(name, (0, 0))
    found[name] = count + 1, total + sent
  return found
