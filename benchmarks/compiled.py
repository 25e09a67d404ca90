"""A recipe's training step compiled ahead of time, and what its collectives send: for scaling.py and pods.py."""

import re

import common
import numpy as np

from ssl_jax import augment, build, parallel
from ssl_jax import config as configs

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shapes>.*?) (?P<kind>{KINDS})(?P<start>-start)?\(")
CHANNEL = re.compile(r"channel_id=(\d+)")
KERNEL = re.compile(r'= [^=]*? (?P<op>fusion|copy|sort|custom-call)\(.*?(?:custom_call_target="(?P<target>[^"]*)"|$)')
WITHIN_OTHERS = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
PARTS = {  # of a step, by where in the program an instruction is from; the first that fits
  "attention": r"/attn/",
  "MLP": r"/mlp/",
  "norms": r"/(norm\w*|bn\w*|\w*_bn)/",
  "convolutions": r"/(conv\w*|patch_embed|\w*downsample\w*)/",
  "views": r"vmap\(vmap",
  "rest of the network": r"jvp\(",
  "update": r"^jit\(\w+\)/(?!shard_map)",
  "rest": "",
}


def trace_step(config, mesh):
  """The training step for streamed images, traced as train.py's; nothing is allocated."""
  made = build.program(config, mesh, *configs.schedule_length(config, common.IMAGENET))
  crops = augment.crop_shapes(configs.views(config), config.batch_size, config.data.channels)
  return made.train_step.trace(made.state, parallel.abstract({"image": crops}, parallel.split(mesh)))


def collectives(text, devices):
  """{kind: (count, bytes that a device sends)}; a ring sends (n - 1) / n of what is gathered or reduced.

  Kinds that end in "-start" are asynchronous: the program goes on until their "-done". So are those that the compiler
  for TPUs takes apart: pieces of one, in many fusions, have one channel.
  """
  by_channel = {}
  for number, line in enumerate(text.splitlines()):
    if not (match := COLLECTIVE.search(line)):
      continue
    kind = match["kind"]
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", match["shapes"])
    size = sum(SIZES[t] * int(np.prod([int(x) for x in dims.split(",") if x])) for t, dims in arrays if t in SIZES)
    if match["start"] and kind == "all-gather":  # the start of a gather has its operand, a part of the result, as well
      size = size * devices // (devices + 1)
    elif match["start"] and kind != "all-reduce":
      size //= 2
    sent = {"all-reduce": 2 * size, "reduce-scatter": size * devices}.get(kind, size)
    sent = size if kind == "collective-permute" else sent * (devices - 1) / devices
    late = bool(match["start"] or WITHIN_OTHERS.search(line))
    channel = CHANNEL.search(line)
    key = (kind, channel[1]) if channel and "async_collective_fusion_config" in line else (kind, f"line {number}")
    by_channel[key] = sent, late or by_channel.get(key, (0, False))[1]
  found = {}
  for (kind, _), (sent, late) in by_channel.items():
    name = kind + ("-start" if late else "")
    count, total = found.get(name, (0, 0))
    found[name] = count + 1, total + sent
  return found


def expected_cycles(text):
  """{part of the step: cycles} that the compiler for TPUs expects of a program's text; loops count as one round."""
  found = dict.fromkeys(PARTS, 0)
  for line in text[text.index("\nENTRY ") :].splitlines():
    if match := CYCLES.search(line):
      name = re.search(r'op_name="([^"]*)"', line)
      part = next(part for part, pattern in PARTS.items() if re.search(pattern, name[1] if name else ""))
      found[part] += int(match[1])
  return {part: cycles for part, cycles in found.items() if cycles}


def kernels(text):
  """{kind: number} of what a program for GPUs starts on the card, a loop's own not counted; {} for another's text."""
  found = {}
  if "__cublas" not in text:
    return found
  for line in text[text.index("\nENTRY ") :].splitlines():
    if match := KERNEL.search(line):
      name = match["target"] or match["op"]
      found[name] = found.get(name, 0) + 1
  return found
