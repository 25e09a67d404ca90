"""What eval_knn.py, eval_linear.py and judge share: their flags, and the splits that these or the run name."""

import json
import os
import pathlib
import re
import zlib
from typing import Any

import numpy as np
from absl import flags

from ssl_jax import advise, build, data
from ssl_jax import config as configs
from ssl_jax.commands import labelled
from ssl_jax.data import Dataset, look
from ssl_jax.data.folder import files_of
from ssl_jax.errors import UserError
from ssl_jax.evaluation import cache
from ssl_jax.evaluation.features import Extractor
from ssl_jax.run import cluster, whole
from ssl_jax.run.cli import say

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "the run to evaluate")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
DATA = flags.DEFINE_string("data", None, "a prepared data set; by default the run's")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where it is; by default the run's")
FOLDER = flags.DEFINE_string("folder", None, "a folder of images, in place of --data")
TEST_SPLIT = flags.DEFINE_string("test_split", None, "split that is scored; by default the run's")
FEATURES = flags.DEFINE_string(
  "features", None, "what is read off the encoder: cls, mean, cls+mean or flat, of a ResNet pooled or flat"
)
CACHE = flags.DEFINE_bool("cache", False, "keep the features in WORKDIR/features, and use them while nothing changes")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "images encoded at once, on all devices", lower_bound=1)

_TOLD = (  # flags of any command here that say what figures are of
  *("step", "data", "data_dir", "folder", "train_split", "bank_split", "test_split", "split"),
  *("features", "blocks", "labels", "seed"),
)


def load(config: Any, split: str | None, why: str) -> Dataset:
  """A labelled split of the data set that the flags or the run name; `why` says what needs its labels."""
  if not split:
    raise UserError("the run has no test split: name one by --test_split.")
  loaded = find(config, split)
  if not loaded.is_labelled:
    raise UserError(f"{loaded.name} {loaded.split!r} has no labels, and {why}.")
  return loaded


def find(config: Any, split: str) -> Dataset:
  """A split of the data set that the flags or the run name, labelled or not."""
  named = of_flags(config)
  if FOLDER.value:
    split = split.partition("[")[0]  # the run's splits may be slices
  dataset = build.dataset(named, split)
  if named.data.channels == 1 and named.data != config.data:
    if named.data.folder:
      facts = look.look_at_files(files_of(named.data.folder, split))
    else:  # a sample is read, whatever fits in memory
      facts = look.look_at(data.load(named.data.name, split, data_dir=named.data.data_dir, max_bytes=0))
    for line in advise.on_colours(1, facts.coloured, len(facts.sizes)):
      say(f"{dataset.name} {split}: {line}")
  return dataset


def of_flags(config: Any) -> Any:
  """A run's config with the data set that the flags name."""
  if FOLDER.value and (DATA.value or DATA_DIR.value):
    raise UserError("--folder and --data name two data sets: give one of them.")
  named = config.copy_and_resolve_references()
  if FOLDER.value:
    named.data.folder = FOLDER.value
  elif DATA.value:
    named.data.update(folder=None, name=DATA.value, data_dir=DATA_DIR.value)
  elif DATA_DIR.value:
    if named.data.folder:
      raise UserError("--data_dir is for a prepared data set, and the run's images are in a folder: give --data too.")
    named.data.data_dir = DATA_DIR.value
  return named


def facts(config: Any, **sets: tuple[Dataset, int]) -> dict[str, Any]:
  """What figures are of, for their record: the data set, by `role=(dataset, images used)` its splits, the features."""
  found: dict[str, Any] = labelled.place_of(of_flags(config).data)
  for role, (dataset, images) in sets.items():
    found |= {f"{role}_split": dataset.split, f"{role}_images": images}
  return found | {"features": FEATURES.value or config.encoder.get("features")}


def features_of(
  extractor: Extractor, variables: Any, dataset: Dataset, config: Any, role: str, read: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
  """(features float32 [n, d], labels [n]) of the images with a label; with --cache kept, or from what was kept.

  `role` says whose they are, and `read` what is read off the encoder, for the name and the key of a kept file.
  """
  if not CACHE.value:
    return extractor(variables, dataset)
  about = {"config": configs.to_json(config)} | read
  name = "_".join([role, *(str(x) for x in read.values() if x)])
  found = cache.features(extractor, variables, dataset, pathlib.Path(WORKDIR.value) / "features", name, about)
  return found.features[found.labels >= 0], found.labels[found.labels >= 0]


def place(workdir: pathlib.Path, name: str, suffix: str) -> pathlib.Path:
  """WORKDIR/name.suffix where the flags leave all as the run has it; else with what is `differing` behind the name."""
  return workdir / f"{name}{differing()}.{suffix}"


def differing() -> str:
  """The flags that say what is evaluated and are not at their defaults, for the name of a file: "_features-flat".

  A checksum is behind what a file's name cannot have, and behind a path, of which the last part alone is told: other
  values have other names.
  """
  found = ""
  for name in _TOLD:
    if name not in flags.FLAGS or (value := flags.FLAGS[name].value) == flags.FLAGS[name].default:
      continue
    text = ",".join(value) if isinstance(value, list) else str(value)
    if name in ("folder", "data_dir"):
      text = os.path.abspath(os.path.expanduser(text))
    full, text = text.replace("%", "pct").replace(",", "-"), pathlib.PurePath(text).name
    text = re.sub(r"[^A-Za-z0-9.+_-]+", "_", text.replace("%", "pct").replace(",", "-"))[:40].strip("_")
    found += f"_{name}-{text}" + ("" if text == full else f"-{zlib.crc32(os.fsencode(full)):08x}")
  return found


def hand_over(figures: dict[str, Any], workdir: pathlib.Path, name: str) -> None:
  """Writes the figures to a JSON file (see `place`), where one may write there, and prints them as the last line."""
  path = place(workdir, name, "json")
  if cluster.is_main():
    try:
      whole.text(path, json.dumps(figures, indent=2) + "\n")
    except OSError as error:  # another's run, say; the figures are not lost
      say(f"not written: {path} ({error.strerror})")
  say(json.dumps(figures))
