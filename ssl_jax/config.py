"""The keys that all recipes share, and the checks that come before anything is compiled.

`settings.problems` refuses an unknown key of a recipe, `run/cli.py` an unknown flag --config.KEY.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from ssl_jax import augment, decide, methods, models, optim
from ssl_jax.data.dataset import Reading
from ssl_jax.errors import UserError
from ssl_jax.optim import LR_SETTINGS, RULE_SETTINGS, ParameterRules
from ssl_jax.settings import AUTO, Setting, each, flag, number, one_of, optional, positive, problems, span, text, whole

# Keys that may change when a workdir's run is resumed: they change no number of the training, except by rounding. The
# contents of a folder of images are compared separately.
FREE = ("stop_after_steps", "log_every_steps", "eval_every_epochs", "checkpoint_every_steps", "keep_checkpoints")
FREE_PREFIXES = ("parallel.", "data.data_dir", "data.folder", "data.threads", "data.workers", "knn.", "eval_view.")
ASIDE = ("report", "profile_steps", "loggers")  # these may change too: what is written beside the training
# Keys that may differ between the processes of one run.
LOCAL = ("data.data_dir", "data.folder", "data.threads", "data.workers")
LOGGERS = ("tensorboard", "wandb", "mlflow")  # what rows go to beside metrics.jsonl


_NUMBERS = each(Setting(number(-math.inf).holds, "numbers"))
_SIDE = optional(whole())
_PROFILED = "two steps, the first at least 1 and not after the last"
SETTINGS: dict[str, Any] = {  # the shared keys; the other sections' tables stand beside what reads them
  "seed": whole(0, 2**31 - 1, required=True),
  "init_from": optional(Setting(text().holds, "a workdir, an export or a file of weights to start from")),
  "init_optimizer": optional(flag()),
  "heads_first_steps": optional(whole()),
  "guard": optional(flag()),
  "epochs": whole(required=True),
  "steps": optional(whole()),
  "stop_after_steps": optional(whole()),
  "batch_size": whole(required=True),
  "microbatch": optional(whole()),
  "dtype": one_of("float32", "bfloat16", required=True),
  "parallel": dict(shard_state=flag()),
  "data": dict(
    name=text(required=True),
    data_dir=optional(text()),
    folder=optional(text()),
    split=text(required=True),
    test_split=optional(Setting(lambda x: isinstance(x, str), "a string")),  # an empty one: no k-NN
    channels=whole(required=True),
    window=optional(Setting(lambda x: span(-math.inf, math.inf).holds(x) and x[0] < x[1], "two numbers, low < high")),
    threads=optional(whole(0)),
    workers=optional(whole(0)),
    reduced_decoding=optional(flag()),
  ),
  "eval_view": dict(
    resize=_SIDE, size=_SIDE, interpolation=one_of("bilinear", "bicubic"), mean=_NUMBERS, std=each(positive())
  ),
  "knn": dict(k=whole(required=True), temperature=positive(required=True), bank_images=whole(required=True)),
  "lr": LR_SETTINGS,
  **RULE_SETTINGS,
  "log_every_steps": whole(required=True),
  "eval_every_epochs": whole(required=True),
  "checkpoint_every_steps": whole(required=True),
  "keep_checkpoints": whole(required=True),
  "report": optional(flag()),
  "loggers": Setting(lambda x: _are_loggers(x), f"names out of {', '.join(LOGGERS)}, or ()"),
  "profile_steps": optional(Setting(lambda x: each(whole(), (2,)).holds(x) and x[0] <= x[1], _PROFILED)),
}
# What a recipe may leave to `decide`, by `auto()`; in a view, whose keys are plain values, by "auto".
_OPEN = re.compile(
  r"data\.channels|dtype|epochs|batch_size|microbatch|eval_every_epochs|log_every_steps|lr\.warmup_epochs"
  r"|encoder\.(name|stem|width|patch_size|dim|depth|heads|bn_group_size)"
  r"|method\.(queue_size|bn_group_size|(mlp|projector)\.bn_group_size)"
  r"|views\[\d+\]\.(size|scale|blur_p|mean|std)|eval_view\.(mean|std)"
)
VIEW_SETTINGS = dict(  # the fields of augment.View
  size=Setting(whole().holds, "a whole number of pixels, at least 1: views are square", required=True),
  scale=span(0, 1, "(]"),
  ratio=span(0, math.inf, "(]"),
  interpolation=one_of("bilinear", "bicubic"),
  flip=number(0, 1),
  jitter=each(number(), (4,)),
  jitter_p=number(0, 1),
  gray_p=number(0, 1),
  blur_p=number(0, 1),
  blur_kind=one_of("gaussian", "pil"),
  blur_sigma=span(0, math.inf, "(]"),
  blur_kernel=Setting(lambda x: whole().holds(x) and x % 2 == 1, "an odd whole number"),
  solarize_p=number(0, 1),
  solarize_threshold=number(0, 1),
  mean=_NUMBERS,
  std=each(positive()),
  rand_augment=number(0, 10),
  erase_p=number(0, 1),
)


def base() -> ml_collections.ConfigDict:
  """The shared keys; a recipe starts from them and sets the rest."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.init_from = config_dict.placeholder(str)  # a workdir, an export or a file of weights to start from
  config.heads_first_steps = config_dict.placeholder(int)  # the encoder stays as it is for at most this many steps
  config.guard = config_dict.placeholder(bool)  # whether the result is the best evaluated state, the start included
  config.init_optimizer = config_dict.placeholder(bool)  # whether to take the moments of init_from's run too
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
  config.data.window = config_dict.placeholder(tuple)  # which values of over 8 bits become 0 and 255; None: measured
  config.data.threads = config_dict.placeholder(int)  # how many decode images; None: one per core
  config.data.workers = 0  # how many processes decode, in place of this one
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
  config.report = True  # report.html, at evaluations and at the end
  config.loggers = ("tensorboard",)  # also "wandb" and "mlflow": docs/logging.md
  config.profile_steps = config_dict.placeholder(tuple)  # first and last step to record for TensorBoard and Perfetto
  return config


def auto() -> config_dict.FieldReference:
  """A value that the recipe leaves to `decide`; it may be given a value of any type."""
  return config_dict.FieldReference(AUTO, field_type=object)


def copies(count: int, view: dict[str, Any]) -> tuple[dict[str, Any], ...]:
  """`count` equal views, each its own dict: a dict that stands in several places would change in all of them."""
  return tuple(dict(view) for _ in range(count))


def views(config: Any) -> tuple[augment.View, ...]:
  """The recipe's views, each an `augment.View`."""
  return tuple(augment.View(**_with_tuples(view)) for view in config.views)


def eval_view(config: Any) -> augment.EvaluationView:
  """The recipe's evaluation view. By default `size` is that of the first view, and `resize` is `size`: no margin."""
  given = _with_tuples(config.eval_view)
  size = given["size"] or int(config.views[0]["size"])
  return augment.EvaluationView(**{**given, "size": size, "resize": given["resize"] or size})


def parameter_rules(config: Any) -> ParameterRules:
  """Which parameters the recipe's optimizer treats differently."""
  patterns = {key: tuple(config.get(key, ())) for key in ("no_decay", "frozen", "late", "held")}
  return ParameterRules(**patterns, late_epochs=config.get("late_epochs", 0))


def reading(config: Any) -> Reading:
  """How the recipe's images are decoded."""
  section = config.data  # runs of older versions lack some of these keys
  return Reading(section.get("threads"), section.get("workers") or 0, bool(section.get("reduced_decoding")))


def loggers(config: Any) -> tuple[str, ...]:
  """What the recipe's rows go to. ml_collections takes --config.loggers=tensorboard,wandb for one name."""
  given = config.get("loggers", ("tensorboard",))  # runs of older versions lack the key
  return tuple(dict.fromkeys(name for text in given for name in str(text).split(",")))


def _are_loggers(x):
  return isinstance(x, tuple | list) and all(isinstance(y, str) and {*y.split(",")} <= {*LOGGERS} for y in x)


def _with_tuples(mapping: Any) -> dict[str, Any]:
  """The items of a mapping, with each list (JSON has no tuples) as a tuple, which can be hashed."""
  return {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()}


def check_values(config: Any) -> None:
  """Raises UserError with everything that is wrong with a recipe's values, one line per key; no data are needed.

  Keys that `decide` can settle may be open. Whether the values fit together is checked only where no key is open, and
  none is wrong by itself.
  """
  given = config.to_dict()
  apart = {key: given.pop(key, None) for key in ("method", "encoder", "optimizer", "views")}
  found = problems("", given, SETTINGS, _OPEN.fullmatch)
  for section, names, table_of in (
    ("method", methods.names(), lambda name: getattr(methods.find(name), "SETTINGS", None)),  # it need not have any
    ("encoder", models.ENCODERS, lambda name: models.SETTINGS["vit" if name.startswith("vit") else "resnet"]),
    ("optimizer", optim.SETTINGS, optim.SETTINGS.get),
  ):
    values = apart[section]
    name = values.get("name") if isinstance(values, dict) else None
    if section == "encoder" and name == AUTO:
      name = "resnet"  # which of them is open
    if name not in names:
      near = difflib.get_close_matches(str(name), names, 1, 0)[0]
      found.append(f"{section}.name must be one of {', '.join(names)}, got {name!r}; did you mean {near!r}?")
    elif table := table_of(str(name)):
      found += problems(f"{section}.", values, table, _OPEN.fullmatch)
  found += _view_problems(apart["views"], given.get("eval_view"), (given.get("data") or {}).get("channels"))
  found = found or ([] if decide.open_keys(config) else _joint_problems(config))
  if found:
    lines = "".join(f"\n  {text}" for text in found)
    alone = found[0] if found[0].endswith("?") else f"{found[0]}."
    raise UserError(alone if len(found) == 1 else f"{len(found)} keys of the config are wrong:{lines}")


def _view_problems(views, eval_view, channels):
  if not isinstance(views, tuple | list) or not views:
    return [f"views must be a tuple of dicts with the fields of augment.View, got {views!r}"]
  named = {f"views[{i}]": view for i, view in enumerate(views)}
  found = [text for name, view in named.items() for text in problems(f"{name}.", view, VIEW_SETTINGS, _OPEN.fullmatch)]
  for name, view in (named | {"eval_view": eval_view}).items():
    mean, std = ((view.get(key) or ()) if isinstance(view, dict) else () for key in ("mean", "std"))
    if not isinstance(mean, tuple | list) or not isinstance(std, tuple | list):
      continue  # `problems` has reported it already
    if channels != AUTO and len(mean) not in (0, channels):
      found.append(f"{name}.mean must be one number for each of data.channels={channels}, or empty, got {mean!r}")
    elif len(mean) != len(std):
      found.append(f"{name}.std must be as many numbers as mean, got {std!r}")
  return found


def _joint_problems(config):
  found = []
  view, encoder = eval_view(config), config.encoder
  if config.get("init_optimizer") and not config.get("init_from"):
    found.append("init_optimizer=True takes the optimizer of the run that init_from names, and init_from is not set")
  if config.data.get("folder") and config.data.get("data_dir"):
    found.append("data.folder and data.data_dir name two data sets: give one of them")
  if view.size > view.resize:
    found.append(
      f"a centre crop of {view.size} pixels (eval_view.size, else the first view's) does not fit in "
      f"eval_view.resize={view.resize}"
    )
  if encoder.name.startswith("vit"):
    sides = {f"views[{i}].size": v["size"] for i, v in enumerate(config.views)} | {"the evaluation view": view.size}
    for name, side in sides.items():
      if side % encoder.patch_size:
        found.append(f"encoder.patch_size={encoder.patch_size} does not divide {name}={side}")
  for name, shape in (("encoder", encoder), ("method.decoder", config.method.get("decoder") or {})):
    if "dim" in shape and "heads" in shape and shape["dim"] % shape["heads"]:
      found.append(f"{name}.heads={shape['heads']} does not divide {name}.dim={shape['dim']}")
  if config.microbatch and config.batch_size % config.microbatch:
    found.append(f"batch_size={config.batch_size} is not a multiple of microbatch={config.microbatch}")
  return found


def check(config: Any, *, images: int, devices: int) -> None:
  """Raises UserError for settings that cannot run on this many images and devices."""
  if config.batch_size > images:
    raise UserError(
      f"batch_size={config.batch_size} is more than the {images} images of the data set: an epoch would have no step."
    )
  _check_divides("batch_size", config.batch_size, devices, f"the {devices} devices")
  if config.microbatch is not None:
    _check_divides("microbatch", config.microbatch, devices, f"the {devices} devices")


def _check_divides(key, value, parts, what):
  if value < 1 or value % parts:
    below, above = value // parts * parts, -(-value // parts) * parts
    nearest = " or ".join(str(v) for v in dict.fromkeys((below, above)) if v > 0)
    raise UserError(f"{key}={value} cannot be split evenly over {what}: {key}={nearest or parts} does.")


def schedule_length(config: Any, images: int) -> tuple[int, int]:
  """(steps, steps per epoch): each epoch drops its last partial batch."""
  steps_per_epoch = images // config.batch_size
  return config.steps or config.epochs * steps_per_epoch, steps_per_epoch


def to_json(config: Any) -> dict[str, Any]:
  """The config as JSON holds it: plain dicts, lists and numbers."""
  return as_json(config.to_dict())


def as_json(tree: Any) -> Any:
  """A tree of plain values as it comes back from a JSON file."""
  return json.loads(json.dumps(tree))


def check_same(config: Any, saved: dict[str, Any]) -> None:
  """Raises UserError if `config` contradicts the one that a workdir was started with."""
  now, then = flattened(to_json(config)), flattened(saved)
  differ = [
    f"{key}: now {now.get(key)!r}, then {then.get(key)!r}"
    for key in sorted({*now, *then})
    if now.get(key) != then.get(key) and key not in FREE + ASIDE and not key.startswith(FREE_PREFIXES)
  ]
  if differ:
    raise UserError(
      f"this workdir was started with another config ({'; '.join(differ)}). Give the old values to go on with that "
      "run. To begin anew take another --workdir, or delete this folder where --workdir does not name it; with "
      "--config.init_from and the name of this folder, the new run starts from this one's weights."
    )


def facts(config: Any) -> dict[str, str]:
  """The keys that all processes of a run must have alike, dotted, with their values as JSON."""
  return {f"config.{key}": json.dumps(x) for key, x in flattened(to_json(config)).items() if key not in LOCAL}


def has_key(config: Any, key: str) -> bool:
  """Whether a dotted key exists, as a value or as a group of values."""
  return any(f"{name}.".startswith(f"{key}.") for name in flattened(config.to_dict()))


def nearest_key(config: Any, key: str) -> str:
  """The existing dotted key that looks most like `key`."""
  return difflib.get_close_matches(key, flattened(config.to_dict()), 1, 0.0)[0]


def flattened(tree: Any, prefix: Sequence[str] = ()) -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {".".join(prefix): tree}
  return {k: v for name, child in tree.items() for k, v in flattened(child, (*prefix, name)).items()}
