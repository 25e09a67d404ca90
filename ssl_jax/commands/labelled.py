"""What finetune.py and eval_linear.py --protocol=linear share: a recipe for labels, made to fit a run's encoder."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_flags import config_path

from ssl_jax import build, restore
from ssl_jax.errors import NoSplit, UserError
from ssl_jax.run import cluster, log, whole
from ssl_jax.run import workdir as workdirs
from ssl_jax.run.cli import say

_OWN = ("features", "positions", "drop_path")  # keys of `encoder` that a recipe for labels may have an opinion on


def fitted(config: Any, source: pathlib.Path, given: Mapping[str, Any]) -> Any:
  """A recipe for labels with the images, the sizes and the encoder of a run.

  Its own stay the augmentation, the optimizer and the head, and what it says of the encoder's `features`, `positions`
  and `drop_path`.

  Args:
    config: the recipe.
    source: the run's workdir.
    given: keys that the user set, which hold in any case: dotted, with their values.

  Raises:
    UserError: the folder is not a run, or the recipe is for a ViT and the run has a ResNet.
  """
  there = restore.read_config(source)
  there.data.window = there.data.get("window") or workdirs.read_resolved(source).get("window")  # as the run measured it
  alien = {"positions", "drop_path"} & set(config.encoder)
  if alien and not there.encoder.name.startswith("vit"):
    raise UserError(
      f"the recipe is for a ViT, and {source} has a ResNet: give the one for ResNets, with a batch for fewer images "
      "than ImageNet's, as --config=configs/finetune_resnet.py --config.batch_size=256 --labels=all."
    )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    if not {"data.name", "data.folder"} & set(given):
      config.data.update(there.data)
    config.data.channels = there.data.channels
    config.method.classes = None  # the data tell it
    own = {key: config.encoder[key] for key in _OWN if key in config.encoder}
    config.encoder = ml_collections.ConfigDict(restore.encoder_section(there) | own)
    seen = {key: there.views[0].get(key, ()) for key in ("mean", "std")} | {"size": there.views[0]["size"]}
    config.views = tuple({**view, **seen} for view in config.views)
    config.eval_view.update(there.eval_view)
    for key, value in given.items():
      config_path.set_value(key, config, value, accept_new_attributes=True)
  return config


def place_of(data: Any) -> dict[str, str | None]:
  """What a config's section `data` names, for a record: the folder's whole path, or the set's name and where it is."""
  path = lambda x: x and os.path.abspath(os.path.expanduser(x))  # noqa: E731
  return {"data": path(data.folder) or data.name, "data_dir": None if data.folder else path(data.data_dir)}


def check_apart(config: Any, train_split: str, test_split: str) -> None:
  """Raises UserError where images of the data that a config names are both trained on and scored."""
  try:
    shared = train_split == test_split or build.overlap(config, train_split, test_split)
  except NoSplit:  # told, or not needed, where it is loaded
    return
  if shared:
    are = "both are" if train_split == test_split else f"{train_split!r} shares images with"
    raise UserError(f"the training and the test split: {are} {test_split!r}. Score images that are not trained on.")


def hand_over(config: Any, workdir: pathlib.Path, path: pathlib.Path, **facts: Any) -> None:
  """Writes the figures of a run's last evaluation to a JSON file, and prints them as the last line."""
  rows = [row for row in log.read_rows(workdir / "metrics.jsonl") if "test_top1" in row]
  if not rows:
    say(f"not scored: data.test_split={config.data.test_split!r} names no images of classes that were trained on")
    return
  last = {key.removeprefix("test_"): x for key, x in rows[-1].items()}
  guessing = {key: x for key, x in rows[0].items() if key == "guessing_top1"}
  length = "steps" if config.get("steps") else "epochs"
  settings = {"learning_rate": config.lr.base, length: config[length], "batch_size": config.batch_size}
  resolved = workdirs.read_resolved(workdir)
  source = resolved.get("init_from") or {}  # none: from scratch, or begun by an older version
  facts |= {"encoder_step": source.get("step")} | place_of(config.data) | {"train_split": config.data.split}
  facts |= {"train_images": resolved.get("images"), "test_split": config.data.test_split, "seed": config.seed}
  figures = facts | {"labels": config.method.get("labels") or "all"} | settings | last | guessing
  if cluster.is_main():
    try:
      whole.text(path, json.dumps(figures, indent=2) + "\n")
    except OSError as error:  # another's run, say; the figures are not lost
      say(f"not written: {path} ({error.strerror})")
  say(json.dumps(figures))
