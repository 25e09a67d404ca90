"""What a recipe leaves open, by "auto" in place of a value, is decided here from the data and the device, once a run.

`decide` is a pure function; `build` calls it, tells the reasons and keeps them with the run. Every decision can be
overridden by its key, and what is decided later follows what was given.
"""

import ast
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections

from ssl_jax.data.look import DataFacts
from ssl_jax.errors import UserError
from ssl_jax.settings import AUTO

# Images seen in a run, and at most so many epochs: on a CPU some half an hour for two cores, else some hours.
BUDGET = {"cpu": (60_000, 100), "accelerator": (20_000_000, 400)}
LARGEST_VIEW = {"cpu": 64, "accelerator": 224}
LARGEST_BATCH = {"cpu": 64, "accelerator": 256}  # a device
GROUP = 64  # images that batch norm normalises together
FEW, MANY = 20_000, 500_000  # images, for the size of the encoder


class DeviceFacts(NamedTuple):
  """What a run computes on.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    devices: how many there are.
  """

  platform: str
  devices: int

  @property
  def kind(self) -> str:
    return "cpu" if self.platform == "cpu" else "accelerator"

  @property
  def words(self) -> str:
    return "a CPU" if self.kind == "cpu" else f"{self.devices} {self.platform.upper()}{'s' if self.devices > 1 else ''}"


class Decision(NamedTuple):
  """A key, the value that it got, and why."""

  key: str
  value: Any
  reason: str


def open_keys(config: Any) -> list[str]:
  """The dotted keys that a recipe leaves open, those of views as "views[0].size"."""
  return [key for key, value in _leaves(config) if isinstance(value, str) and value == AUTO]


def is_open(config: Any) -> bool:
  """Whether a recipe leaves anything open, or did so until a flag set a key of a view (which then is a text)."""
  return bool(open_keys(config)) or any(
    _literal(*item) is not item[1] for view in config.views for item in view.items()
  )


def plain(config: Any) -> Any:
  """A copy of plain values, its views too. Flags give the open keys of views as texts: here these are parsed."""
  copied = ml_collections.ConfigDict(config.to_dict())
  copied.views = tuple({key: _literal(key, value) for key, value in view.items()} for view in copied.views)
  return copied


def completed(config: Any, saved: Any) -> Any:
  """A recipe whose open keys have the values that a run of it was saved with."""
  config, saved = plain(config), ml_collections.ConfigDict(saved)
  for key in open_keys(config):
    put(config, key, _get(saved, key))
  return config


def decide(data: DataFacts, device: DeviceFacts, config: Any) -> tuple[Any, list[Decision]]:
  """Fills in what a recipe leaves open; `microbatch` becomes None, since finding one takes the compiled step.

  Args:
    data: what the images are like.
    device: what computes.
    config: the recipe, which is left as it is.

  Returns:
    (a config whose every key has a value, the decisions).

  Raises:
    UserError: there are too few images to train on, or a key is left open that nothing decides.
  """
  if data.images < 2:
    raise UserError("there is one image, and nothing to tell it apart from: a run needs at least two, better hundreds.")
  config = plain(config)
  made: list[Decision] = []

  def settle(pattern: str, choose: Callable[[str], tuple[Any, str]]) -> None:
    for key in open_keys(config):
      if re.fullmatch(pattern, key):
        value, reason = choose(key)
        put(config, key, value)
        made.append(Decision(key, value, reason))

  for rule in (_images, _views, _encoder, _batch, _length):
    rule(data, device, config, settle)
  if config.microbatch == AUTO:
    put(config, "microbatch", None)
  if left := open_keys(config):
    raise UserError(f"nothing decides {', '.join(left)}: give a value in place of {AUTO!r}.")
  return config, made


def _images(data, device, config, settle):
  settle(r"data\.channels", lambda key: (data.channels, _of_channels(data)))
  measured = f"measured on {len(data.sizes):,} images"
  # The user may have set another number of channels than was measured: colours are made grey then, or grey repeated.
  count, (mean, std) = config.data.channels, (data.mean, data.std)
  if len(mean) != count:
    mean, std = ((sum(x) / len(x),) * count for x in (mean, std))
  settle(r".*\.mean", lambda key: (tuple(mean), measured))
  settle(r".*\.std", lambda key: (tuple(std), measured))
  settle(r"dtype", lambda key: _by_kind(device, ("float32", "a CPU computes in it"), ("bfloat16", "half the memory")))


def _of_channels(data):
  sample = len(data.sizes)
  if data.channels == 1:
    return f"all of the {sample:,} images looked at are grey"
  if data.channels == 3:
    return f"{data.coloured:,} of the {sample:,} images looked at have colours"
  return "what most of the files hold"


def _views(data, device, config, settle):
  vit, short = config.encoder.name.startswith("vit"), data.short
  most = LARGEST_VIEW[device.kind]
  patch = config.encoder.get("patch_size")
  given = [view["size"] for view in config.views if not _is_local(view) and view["size"] != AUTO]

  def whole(key):
    if given:
      return given[0], "as the other view's"
    size = min(max(short // 16 * 16, 32), most)
    if isinstance(patch, int):
      size = max(1, size // patch) * patch
    why = f"the shorter side of most images is {short}" if short >= 32 else f"images of {short} pixels are enlarged"
    if size == most and short >= most + 16:
      why += f", and a view of {most} is enough" if device.kind != "cpu" else f"; more than {most} is slow on a CPU"
    return size, why

  def local(key):
    size = max(16, round(3 / 7 * config.views[0]["size"] / 16) * 16)
    if isinstance(patch, int):
      size = max(1, size // patch) * patch
    return size, "3/7 of the whole view, as 96 is of 224"

  for is_local, choose in ((False, whole), (True, local)):
    numbers = [i for i, view in enumerate(config.views) if _is_local(view) == is_local]
    settle(rf"views\[({'|'.join(map(str, numbers)) or 'none'})\]\.size", choose)
  size = config.views[0]["size"]

  small = short < 64

  def scale(key):
    multi = any(map(_is_local, config.views))
    least = (0.4 if small else 0.25) if multi else (0.2 if small else 0.08)
    return (least, 1.0), f"smaller crops of images of {short} pixels show little" if small else "the usual crops"

  settle(r"views\[\d+\]\.scale", scale)
  settle(
    r"views\[\d+\]\.blur_p", lambda key: (0.5, "the usual blur") if size >= 96 else (0.0, f"{size} pixels are coarse")
  )
  if vit:
    side = 4 if size < 64 else 8 if size < 128 else 16
    settle(r"encoder\.patch_size", lambda key: (side, f"{(size // side) ** 2} patches of a view of {size}"))


def _is_local(view):
  """Whether a view is a crop of a part of the image only, as DINO's local ones."""
  return view.get("scale", AUTO) != AUTO and view["scale"][1] < 1


def _encoder(data, device, config, settle):
  size, count, many = config.views[0]["size"], data.images, f"{data.images:,} images"
  cpu = device.kind == "cpu"
  if config.encoder.name.startswith("vit"):
    name, dim, depth, heads = next(
      row[1:]
      for row in (
        (cpu, "small enough for a CPU", 96, 4, 3),
        (count < FEW, f"ViT-Tiny's, for {many}", 192, 12, 3),
        (count < MANY, f"ViT-Small's, for {many}", 384, 12, 6),
        (True, f"ViT-Base's, for {many}", 768, 12, 12),
      )
      if row[0]
    )
    for key, value in (("dim", dim), ("depth", depth), ("heads", heads)):
      settle(rf"encoder\.{key}", lambda key, value=value: (value, name))
    return
  deep = not cpu and count >= FEW
  settle(r"encoder\.name", lambda key: ("resnet50", f"{many} on {device.words}") if deep else ("resnet18", many))
  stems = {
    "patch": "for a CPU: maps of a quarter of the side, without pooling",
    "small": f"views of {size} are kept at their side",
    "imagenet": f"views of {size}: maps of a quarter of the side",
  }
  stem = "patch" if cpu else "small" if size < 64 else "imagenet"
  settle(r"encoder\.stem", lambda key: (stem, stems[stem]))
  narrow = 0.25 if config.encoder.get("stem") == "small" else 0.5
  settle(r"encoder\.width", lambda key: (narrow, "small enough for a CPU") if cpu else (1.0, f"{device.words}"))


def _batch(data, device, config, settle):
  largest, parts = LARGEST_BATCH[device.kind] * min(device.devices, 4), device.devices

  def batch(key):
    least = min(16, 2 ** int(math.log2(data.images)))
    size = max(least, min(largest, 2 ** int(math.log2(max(data.images / 8, 1)))))
    size = max(size // parts, 1) * parts
    if size > data.images:
      raise UserError(f"{data.images:,} images are fewer than one for each of the {parts} devices: use fewer devices.")
    why = f"enough for {device.words}" if size == largest else f"{data.images // size} steps per epoch"
    return size, why

  settle(r"batch_size", batch)
  size = config.batch_size // parts
  group = _divisor(size, GROUP)
  group = group if group >= min(size, GROUP // 4) else size  # 67 images are one group: 67 divides by nothing smaller
  why = "normalised together on any device, by any microbatch"
  settle(r"(encoder|method\.\w+)\.bn_group_size", lambda key: (group, why))
  half = _divisor(size, min(size // 2, 32))
  shuffled = "keys are shuffled between groups: there must be several"
  if half == 1:
    shuffled = "each image is normalised by itself: take another batch_size"
  settle(r"method\.bn_group_size", lambda key: (half, shuffled))

  def queue(key):
    length = min(65_536, 2 ** int(math.log2(max(data.images / 3, config.batch_size))))
    if length > data.images / 3:
      return length, "about one batch: with so few images it holds keys of the query's own image"
    return length, "keys of at most a third of the images: a longer queue would hold keys of the query's own image"

  settle(r"method\.queue_size", queue)


def _divisor(size, most):
  """The largest divisor of `size` that is at most `most`; 1 where that is 0."""
  return max(n for n in range(1, max(most, 1) + 1) if size % n == 0)


def _length(data, device, config, settle):
  budget, most = BUDGET[device.kind]

  def epochs(key):
    count = min(most, max(1, round(budget / data.images)))
    if count == most:
      return count, f"more than {most} rounds of few images help little"
    why = "at least one" if budget < data.images else f"some {budget:,} images seen"
    return count, f"{why} on {device.words}"

  steps_per_epoch = max(1, data.images // config.batch_size)
  given = config.get("steps")
  if given and config.epochs == AUTO:
    put(config, "epochs", math.ceil(given / steps_per_epoch))  # unused where `steps` is given, so no decision
  settle(r"epochs", epochs)
  steps = given or config.epochs * steps_per_epoch
  length = steps / steps_per_epoch
  settle(r"lr\.warmup_epochs", lambda key: (round(min(10.0, length / 10), 2), "a tenth of the run, at most ten epochs"))
  rare = "ten times in a run" if length >= 10 else "each epoch of a short run" if length > 1 else "the run's end"
  settle(r"eval_every_epochs", lambda key: (max(1, round(length / 10)), rare))
  often = "a hundred times in a run, or each 50 steps" if steps >= 100 else "each step of a short run"
  settle(r"log_every_steps", lambda key: (min(50, max(1, steps // 100)), often))


def table(decisions: list[Decision]) -> list[str]:
  """The decisions as lines for people; those that are alike share one."""
  if not decisions:
    return []
  rows: dict[tuple[str, str], list[str]] = {}
  for key, value, reason in decisions:
    rows.setdefault((_shown(value), reason), []).append(key)
  named = [(", ".join(_merged(keys)), *row) for row, keys in rows.items()]
  wide = [max(len(row[i]) for row in named) for i in (0, 1)]
  head = "decided from the data and the device; give any of them by its key, as --config.batch_size=32:"
  return [head, *(f"  {key:<{wide[0]}}  {value:<{wide[1]}}  {reason}" for key, value, reason in named)]


def _merged(keys):
  """'views[0].size', 'views[1].size' as 'views[0,1].size'."""
  parts = [re.fullmatch(r"views\[(\d+)\]\.(\w+)", key) or key for key in keys]
  for name, group in itertools.groupby(parts, lambda part: part if isinstance(part, str) else f"views[].{part[2]}"):
    numbers = [part[1] for part in group if not isinstance(part, str)]
    yield name.replace("[]", f"[{','.join(numbers)}]")


def _shown(value):
  return " ".join(f"{x:g}" for x in value) if isinstance(value, tuple | list) else str(value)


def _by_kind(device, cpu, accelerator):
  return cpu if device.kind == "cpu" else accelerator


def _literal(key, value):
  if not isinstance(value, str) or value == AUTO or key in ("interpolation", "blur_kind"):
    return value
  try:
    return ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return value


def _leaves(config: Any) -> Iterator[tuple[str, Any]]:
  def walk(prefix, tree):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from walk(f"{prefix}{key}.", value)
      elif prefix + key == "views":
        for i, view in enumerate(value):
          yield from walk(f"views[{i}].", view)
      else:
        yield prefix + key, value

  return walk("", config.to_dict())


def _place(config, key):
  """(what holds a key, the key's last part)."""
  if match := re.fullmatch(r"views\[(\d+)\]\.(\w+)", key):
    return config.views[int(match[1])], match[2]
  *groups, last = key.split(".")
  for group in groups:
    config = config[group]
  return config, last


def _get(config, key):
  holder, last = _place(config, key)
  return holder[last]


def put(config: Any, key: str, value: Any) -> None:
  """Sets a dotted key, or one of a view, to a value of any type."""
  with config.ignore_type():
    holder, last = _place(config, key)
    holder[last] = value
