"""The keys that all recipes share, and the checks that come before anything is compiled."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from ssl_jax import augment
from ssl_jax.data.dataset import Reading
from ssl_jax.errors import UserError
from ssl_jax.optim import ParameterRules

# What may change between the runs of one workdir: it changes no number of the training, but by rounding. What a folder
# holds is compared by itself.
FREE = ("stop_after_steps", "log_every_steps", "eval_every_epochs", "checkpoint_every_steps", "keep_checkpoints")
FREE_PREFIXES = ("parallel.", "data.data_dir", "data.folder", "data.threads", "data.workers", "knn.", "eval_view.")
# What may differ between the processes of one run.
LOCAL = ("data.data_dir", "data.folder", "data.threads", "data.workers")


def base() -> ml_collections.ConfigDict:
  """The shared keys; a recipe starts from them and sets the rest."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.epochs = 100
  config.steps = config_dict.placeholder(int)  # in place of epochs
  config.stop_after_steps = config_dict.placeholder(int)  # ends a run early, leaves every schedule alone
  config.batch_size = 256  # global
  config.microbatch = config_dict.placeholder(int)  # images encoded at once, of the global batch; None: all
  config.dtype = "float32"  # of the computation

  # Optimizer state, teacher and parameters split over the devices: less memory, the same numbers.
  config.parallel = ml_collections.ConfigDict(dict(shard_state=False))

  config.data = ml_collections.ConfigDict()
  config.data.name = "fashion_mnist_mini"
  config.data.data_dir = config_dict.placeholder(str)  # None: built in, or TFDS's own folder
  config.data.folder = config_dict.placeholder(str)  # a folder of images, in place of name
  config.data.split = "train"
  config.data.test_split = "test"
  config.data.channels = 3
  config.data.threads = config_dict.placeholder(int)  # that decode images; None: one a core
  config.data.workers = 0  # processes that decode in place of this one
  # JPEGs with more pixels than crops need are decoded smaller, for training alone: faster, other numbers.
  config.data.reduced_decoding = config_dict.placeholder(bool)

  config.eval_view = ml_collections.ConfigDict()
  config.eval_view.resize = config_dict.placeholder(int)
  config.eval_view.size = config_dict.placeholder(int)
  config.eval_view.mean = ()
  config.eval_view.std = ()
  config.knn = ml_collections.ConfigDict(dict(k=20, temperature=0.07, bank_images=50_000))

  config.log_every_steps = 50
  config.eval_every_epochs = 10
  config.checkpoint_every_steps = 1000
  config.keep_checkpoints = 3
  return config


def views(config: Any) -> tuple[augment.View, ...]:
  """The recipe's views as `augment.View`s."""
  if not isinstance(config.views, tuple | list) or not all(isinstance(view, dict) for view in config.views):
    raise UserError(f"views must be a tuple of dicts with the fields of augment.View, got {config.views!r}.")
  out = []
  for i, view in enumerate(config.views):
    unknown = [key for key in view if key not in augment.View._fields]
    if unknown:
      near = difflib.get_close_matches(unknown[0], augment.View._fields, 1, 0)[0]
      raise UserError(f"views[{i}] has no field {unknown[0]!r}; did you mean {near!r}?")
    out.append(augment.View(**_with_tuples(view)))
    _check_view(f"views[{i}]", out[-1], config.data.channels)
  return tuple(out)


def _check_view(name: str, view: augment.View, channels: int) -> None:
  for key, holds, text in (
    ("interpolation", view.interpolation in ("bilinear", "bicubic"), "bilinear or bicubic"),
    ("blur_kind", view.blur_kind in ("gaussian", "pil"), "gaussian or pil"),
    ("blur_sigma", len(view.blur_sigma) == 2 and min(view.blur_sigma) > 0, "two positive numbers"),
    ("blur_kernel", view.blur_kernel % 2 == 1, "odd"),
    ("jitter", len(view.jitter) == 4, "four strengths: brightness, contrast, saturation, hue"),
    ("std", len(view.std) == len(view.mean) and all(view.std), "as many numbers as mean, none of them 0"),
    ("mean", len(view.mean) in (0, channels), f"one number for each of data.channels={channels}, or empty"),
    ("scale", 0 < view.scale[0] <= view.scale[1] <= 1, "a range in (0, 1]"),
    ("size", view.size >= 1, "at least 1"),
  ):
    if not holds:
      raise UserError(f"{name}.{key} must be {text}, got {getattr(view, key)!r}.")


def eval_view(config: Any) -> augment.EvaluationView:
  """The recipe's evaluation view; where it names no size, that of its first view, and no margin around it."""
  given = _with_tuples(config.eval_view)
  size = given["size"] or int(config.views[0]["size"])
  view = augment.EvaluationView(**{**given, "size": size, "resize": given["resize"] or size})
  if view.size > view.resize:
    raise UserError(
      f"a centre crop of {view.size} pixels (eval_view.size, else the first view's) does not fit in "
      f"eval_view.resize={view.resize}."
    )
  return view


def parameter_rules(config: Any) -> ParameterRules:
  """Which parameters the recipe's optimizer treats differently."""
  patterns = {key: tuple(config.get(key, ())) for key in ("no_decay", "frozen", "late")}
  return ParameterRules(**patterns, late_epochs=config.get("late_epochs", 0))


def reading(config: Any) -> Reading:
  """How the recipe's images are decoded."""
  section = config.data  # runs of older versions lack some of these keys
  return Reading(section.get("threads"), section.get("workers") or 0, bool(section.get("reduced_decoding")))


def _with_tuples(mapping: Any) -> dict[str, Any]:
  """Lists, as JSON gives them, as the tuples that hash."""
  return {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()}


def check(config: Any, *, images: int, devices: int) -> None:
  """Raises UserError for settings that cannot run on this many images and devices."""
  if config.batch_size > images:
    raise UserError(
      f"batch_size={config.batch_size} is more than the {images} images of the data set: an epoch would have no step."
    )
  _check_divides("batch_size", config.batch_size, devices, f"the {devices} devices")
  if config.microbatch is not None:
    _check_divides("microbatch", config.microbatch, devices, f"the {devices} devices")
    if config.batch_size % config.microbatch:
      raise UserError(f"batch_size={config.batch_size} is not a multiple of microbatch={config.microbatch}.")
  for key in ("threads", "workers"):
    if (config.data.get(key) or 0) < 0:
      raise UserError(f"data.{key} must not be negative, got {config.data[key]}.")
  for key in ("log_every_steps", "eval_every_epochs", "checkpoint_every_steps", "keep_checkpoints"):
    if config[key] < 1:
      raise UserError(f"{key} must be at least 1, got {config[key]}.")
  if config.dtype not in ("float32", "bfloat16"):
    raise UserError(f"dtype must be float32 or bfloat16, got {config.dtype!r}.")
  for key in ("steps", "stop_after_steps", "epochs"):
    if config[key] is not None and config[key] < 1:
      raise UserError(f"{key} must be at least 1, got {config[key]}.")


def _check_divides(key, value, parts, what):
  if value < 1 or value % parts:
    below, above = value // parts * parts, -(-value // parts) * parts
    nearest = " or ".join(str(v) for v in dict.fromkeys((below, above)) if v > 0)
    raise UserError(f"{key}={value} does not divide over {what}: {key}={nearest or parts} does.")


def schedule_length(config: Any, images: int) -> tuple[int, int]:
  """(steps, steps per epoch): each epoch drops its last partial batch."""
  steps_per_epoch = images // config.batch_size
  return config.steps or config.epochs * steps_per_epoch, steps_per_epoch


def to_json(config: Any) -> dict[str, Any]:
  """The config as JSON holds it: plain dicts, lists and numbers."""
  return json.loads(json.dumps(config.to_dict()))


def check_same(config: Any, saved: dict[str, Any]) -> None:
  """Raises UserError if `config` contradicts the one that a workdir was started with."""
  now, then = _flatten(to_json(config)), _flatten(saved)
  differ = [
    f"{key}: now {now.get(key)!r}, then {then.get(key)!r}"
    for key in sorted({*now, *then})
    if now.get(key) != then.get(key) and key not in FREE and not key.startswith(FREE_PREFIXES)
  ]
  if differ:
    raise UserError(
      f"this workdir was started with another config ({'; '.join(differ)}). "
      "Give the old values to go on with that run, or another --workdir to start a new one."
    )


def facts(config: Any) -> dict[str, str]:
  """The keys that all processes of a run must have alike, dotted, with their values as JSON."""
  return {f"config.{key}": json.dumps(x) for key, x in _flatten(to_json(config)).items() if key not in LOCAL}


def has_key(config: Any, key: str) -> bool:
  """Whether a dotted key exists, as a value or as a group of values."""
  return any(f"{name}.".startswith(f"{key}.") for name in _flatten(config.to_dict()))


def nearest_key(config: Any, key: str) -> str:
  """The existing dotted key that looks most like `key`."""
  return difflib.get_close_matches(key, _flatten(config.to_dict()), 1, 0.0)[0]


def _flatten(tree: Any, prefix: Sequence[str] = ()) -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {".".join(prefix): tree}
  return {k: v for name, child in tree.items() for k, v in _flatten(child, (*prefix, name)).items()}
