"""What a linear classifier makes of a run's features.

  python eval_linear.py --workdir=runs/quickstart
  python eval_linear.py --workdir=runs/quickstart --labels=1% --draws=5
  python eval_linear.py --workdir=runs/quickstart --C=0.01,0.1,1,10 --per_class
  python eval_linear.py --workdir=runs/mae_quickstart --protocol=heads --blocks=1,4 --cache
  python eval_linear.py --workdir=runs/quickstart --protocol=linear --config=configs/linear.py:simclr

--protocol=logreg is logistic regression with an L2 penalty, as DINOv2's evaluation does it: on the features as the
encoder gives them, the penalty chosen on a held-out tenth of the training images, never on the test images, and the
classifier refitted on all of them. --protocol=heads trains DINOv2's linear heads, one for each learning rate and each
choice of blocks and pooling, and chooses among them in the same way. Either is done with the raw pixels, with the
standardised pixels, and with the encoder that the run began with too.
The last line is JSON; the same figures are in WORKDIR/linear.json (heads: linear_heads.json), and those
that other flags ask for have names of their own, such as WORKDIR/linear_labels-1pct.json (docs/evaluation.md).

--protocol=linear is the papers' own, with random crops and flips, the encoder at each step: train.py's loop with a
recipe of configs/linear.py, by default that of the run's method. It goes on where it was stopped.
"""

import csv
import functools
import math
import pathlib
import runpy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

import train
from ssl_jax import parallel, restore
from ssl_jax.commands import evaluate, labelled
from ssl_jax.commands.evaluate import (
  BATCH_SIZE,
  DATA,
  DATA_DIR,
  FEATURES,
  FOLDER,
  STEP,
  TEST_SPLIT,
  WORKDIR,
  features_of,
  load,
)
from ssl_jax.data import Dataset
from ssl_jax.errors import UserError
from ssl_jax.evaluation import heads, intervals, probe, scores
from ssl_jax.evaluation.accuracy import LARGEST, guessing
from ssl_jax.evaluation.features import Extractor, Read, reading
from ssl_jax.models.vit import ViT
from ssl_jax.run import cli, cluster, whole
from ssl_jax.run.cli import say

PROTOCOLS = ("logreg", "heads", "linear")
ONLY_FOR = {  # flags that are not for all of them
  **dict.fromkeys(("C", "features"), ("logreg",)),
  **dict.fromkeys(("rates", "head_steps", "head_batch"), ("heads",)),
  **dict.fromkeys(("blocks", "draws", "per_class", "cache", "batch_size", "step", "pixels"), ("logreg", "heads")),
  "config": ("linear",),
}
RECIPE = pathlib.Path(__file__).parent / "configs" / "linear.py"

PROTOCOL = flags.DEFINE_string("protocol", "logreg", "how the classifier is trained: logreg, heads or linear")
TRAIN_SPLIT = flags.DEFINE_string("train_split", None, "split that it is trained on; by default the run's")
LABELS = flags.DEFINE_string("labels", "all", "how many training images have one: all, 1%, 10% or N-per-class")
DRAWS = flags.DEFINE_integer("draws", None, "how often these are drawn; by default 5 times, or once where it is all")
SEED = flags.DEFINE_integer("seed", 0, "of the draws and of the held-out images", lower_bound=0)
PER_CLASS = flags.DEFINE_bool("per_class", False, "write each class's accuracy and the confusion matrix beside it")
PIXELS = flags.DEFINE_bool("pixels", True, "logreg, heads: try the pixels too, which can take longer than the encoder")
C = flags.DEFINE_list("C", None, "logreg: inverse penalties to choose from; by default DINOv2's 45, 10^-6 to 10^5")
BLOCKS = flags.DEFINE_list(
  "blocks", None, "the last blocks of a ViT that are read; heads: numbers to choose from, by default 1,4"
)
RATES = flags.DEFINE_list("rates", None, "heads: learning rates to choose from; by default DINOv2's 13, 10^-5 to 0.1")
HEAD_STEPS = flags.DEFINE_integer(
  "head_steps", None, "heads: steps of their training; by default 10 epochs, and at least 1,000", lower_bound=1
)
HEAD_BATCH = flags.DEFINE_integer("head_batch", heads.BATCH, "heads: images of a step", lower_bound=1)
CONFIG = config_flags.DEFINE_config_file("config", None, "linear: its recipe")
flags.adopt_module_key_flags(evaluate)  # so that --help shows them

Score = Callable[..., scores.Scored]  # (features, labels, test_features, test_labels, rng=)


def main() -> int:
  workdir = pathlib.Path(WORKDIR.value)
  check_flags()
  if PROTOCOL.value == "linear":
    return by_the_papers(workdir)
  wanted, draws = labels_and_draws()
  of_pixels, chooses = settings()
  restored = restore.restore_encoder(workdir, STEP.value)
  config, why = restored.config, "a classifier is trained and scored by labels"
  read, score = of_encoder(restored.encoder, of_pixels)
  train_set = load(config, TRAIN_SPLIT.value or config.data.split, why)
  test_set = load(config, TEST_SPLIT.value or config.data.test_split, why).numbered_as(train_set)
  labelled.check_apart(evaluate.of_flags(config), train_set.split, test_set.split)
  say(f"step {restored.step} of {workdir}")
  for role, x in (("training", train_set), ("test", test_set)):
    say(f"{role}: {x.name} {x.split}, {len(x):,} images")
    for note in x.notes:
      say(f"{role}: {note}")
  if train_set.labels is not None and test_set.labels is not None:  # else they are known when all images are read
    probe.check_classes(train_set.labels, test_set.labels, wanted, chooses)

  mesh = parallel.make_mesh()
  batch_size = -(-BATCH_SIZE.value // mesh.size) * mesh.size
  extractor = Extractor(restored.encoder, restored.eval_view, mesh, batch_size, read)

  def encoded(variables, role):
    read = {"protocol": PROTOCOL.value, "features": FEATURES.value, "blocks": BLOCKS.value}
    return [
      x for dataset in (train_set, test_set) for x in features_of(extractor, variables, dataset, config, role, read)
    ]

  found = encoded(restored.variables, f"step_{restored.step}")
  _, labels, _, test_labels = found
  for role, x, known in (("training", train_set, labels), ("test", test_set, test_labels)):
    if left_out := len(x) - len(known):
      say(f"{left_out:,} of the {role} images cannot be read, or have no label that training images have: left out")
  check_classes(labels, test_labels, wanted, chooses)

  figures: dict[str, Any] = {"step": restored.step, "protocol": PROTOCOL.value, "labels": LABELS.value, "draws": draws}
  figures |= evaluate.facts(config, train=(train_set, len(labels)), test=(test_set, len(test_labels)))
  figures |= {"blocks": BLOCKS.value and ",".join(BLOCKS.value), "seed": SEED.value}
  if PROTOCOL.value == "heads" and isinstance(restored.encoder, ViT):
    figures |= {"features": "cls+mean", "blocks": ",".join(map(str, blocks_of(restored.encoder)))}
  figures["guessing_top1"] = guessing(labels, test_labels)
  low, high = intervals.wilson(figures["guessing_top1"], len(test_labels))
  figures |= {"guessing_top1_low": low, "guessing_top1_high": high}
  say(f"guessing the most frequent class: {figures['guessing_top1']:.2f} % (95 %: {low:.2f} to {high:.2f})")
  measured = functools.partial(measure, wanted=wanted, draws=draws)
  pixels = pixels_of(train_set, test_set, restored.eval_view) if PIXELS.value else None
  if not PIXELS.value:
    say("raw pixels: not tried, as --nopixels asks")
  elif pixels is None:
    say("raw pixels: not tried, since the images are large or not in memory")
  else:
    for prefix, name, given in (
      ("pixels_", "raw pixels", pixels),
      ("pixels_standardised_", "pixels, standardised", standardised(*pixels)),
    ):
      figures |= {f"{prefix}{key}": x for key, x in measured(name, of_pixels, *given)[0].items()}
  untrained, _ = measured("encoder, untrained", score, *encoded(restored.untrained(), "untrained"))
  figures |= {f"untrained_{key}": x for key, x in untrained.items()}
  trained, answered = measured("encoder", score, *found)
  name = "linear" if PROTOCOL.value == "logreg" else f"linear_{PROTOCOL.value}"
  if PER_CLASS.value:
    tell_classes(answered, test_labels, int(labels.max()) + 1, train_set.classes, evaluate.place(workdir, name, "csv"))
  evaluate.hand_over(figures | trained, workdir, name)
  return 0


def by_the_papers(workdir: pathlib.Path) -> int:
  """Trains and scores a linear classifier by a paper's protocol, in a folder of its own in the workdir."""
  given: dict[str, Any] = {"data.folder": FOLDER.value, "data.name": DATA.value, "data.data_dir": DATA_DIR.value}
  given |= {"data.split": TRAIN_SPLIT.value, "data.test_split": TEST_SPLIT.value}
  given |= {"method.labels": None if LABELS.value == "all" else LABELS.value}
  given = {key: value for key, value in given.items() if value is not None}
  if CONFIG.value is None:
    version = version_for(restore.read_config(workdir))
    config = runpy.run_path(str(RECIPE))["get_config"](version)
  else:
    file, _, version = flags.FLAGS["config"].config_filename.partition(":")
    config, version = CONFIG.value, version or pathlib.Path(file).stem
    given |= config_flags.get_override_values(flags.FLAGS["config"])
  if is_given("seed"):
    if given.get("seed", SEED.value) != SEED.value:
      raise UserError(f"--seed={SEED.value} and --config.seed={given['seed']} are two seeds: give one of them.")
    given |= {"seed": SEED.value}
  config = labelled.fitted(config, workdir, given)
  config.init_from = str(workdir)
  if config.data.split and config.data.test_split:
    cluster.together(lambda: labelled.check_apart(config, config.data.split, config.data.test_split))
  name = f"linear_{version}{evaluate.differing()}"
  status = train.main(config, workdir / name)
  if status == 0:
    labelled.hand_over(config, workdir / name, workdir / f"{name}.json", protocol="linear", recipe=version)
  return status


def version_for(config) -> str:
  """The version of configs/linear.py that is the protocol of a run's method."""
  name = "moco_v3" if config.method.get("version") == 3 else config.method.name
  if name == "moco_v3" and config.encoder.name.startswith("vit"):
    name = "moco_v3_vit"
  if name not in ("simclr", "moco", "moco_v3", "moco_v3_vit", "byol", "mae", "dino"):
    raise UserError(f"{config.method.name} has no protocol of its own here: take one, as --config={RECIPE}:simclr.")
  return name


def labels_and_draws() -> tuple[probe.Labels, int]:
  """By the flags."""
  wanted = probe.parse_labels(LABELS.value)
  draws = DRAWS.value if DRAWS.value is not None else 1 if wanted.share == 1 else 5
  if draws < 1 or (draws > 1 and wanted.share == 1):
    raise UserError(f"--draws must be at least 1, and 1 where all labels are used, got {draws}.")
  return wanted, draws


def is_given(name: str) -> bool:
  """Whether a flag was given a value."""
  return not flags.FLAGS[name].using_default_value


def check_flags() -> None:
  """Raises UserError for a protocol that there is not, and for flags of other protocols, which would go unheeded."""
  if PROTOCOL.value not in PROTOCOLS:
    raise UserError(f"there is no --protocol={PROTOCOL.value}; there is {', '.join(PROTOCOLS)}.")
  for name, of in ONLY_FOR.items():
    if PROTOCOL.value not in of and is_given(name):
      raise UserError(f"--{name} is for --protocol={' and '.join(of)}, and this is {PROTOCOL.value}.")


def settings() -> tuple[Score, bool]:
  """(how features that are read as they are get their classifier, whether something is chosen for it) by the flags."""
  if PROTOCOL.value == "logreg":
    penalties = positive_numbers(C, probe.PENALTIES)
    return functools.partial(probe.score, penalties=penalties), len(penalties) > 1
  rates = positive_numbers(RATES, heads.RATES)
  trained = functools.partial(heads.score, rates=rates, steps=HEAD_STEPS.value, batch_size=HEAD_BATCH.value)
  return functools.partial(trained, reads={"all": slice(None)}), len(rates) > 1


def positive_numbers(flag: Any, default: tuple[float, ...]) -> tuple[float, ...]:
  """The numbers of a flag with commas between."""
  if flag.value is None:
    return default
  try:
    numbers = tuple(float(x) for x in flag.value)
  except ValueError:
    numbers = ()
  if not numbers or not all(x > 0 and math.isfinite(x) for x in numbers):
    raise UserError(f"--{flag.name} must be positive numbers with commas between, got {','.join(flag.value)!r}.")
  return numbers


def of_encoder(encoder: Any, of_pixels: Score) -> tuple[Read, Score]:
  """(what is read off the encoder, how it gets its classifier) by the flags."""
  blocks = sorted(int(x) if x.isdecimal() else 0 for x in BLOCKS.value or ())
  if BLOCKS.value is not None and (not blocks or blocks[0] < 1):
    raise UserError(f"--blocks must be whole numbers from 1 on with commas between, got {','.join(BLOCKS.value)!r}.")
  if PROTOCOL.value == "logreg":
    if len(blocks) > 1:
      raise UserError(f"--blocks must be one number for --protocol=logreg, got {len(blocks)}.")
    return reading(encoder, FEATURES.value, *blocks), of_pixels
  if not isinstance(encoder, ViT):
    return reading(encoder, None, *blocks[-1:]), of_pixels  # which refuses blocks: there is one input
  blocks = blocks_of(encoder)
  read = reading(encoder, "cls+mean", blocks[-1])
  return read, functools.partial(of_pixels, reads=heads.inputs(blocks, encoder.dim))


def blocks_of(encoder: ViT) -> list[int]:
  """The numbers of last blocks that heads are tried on: those of the flag, by default 1 and 4."""
  return sorted(map(int, BLOCKS.value)) if BLOCKS.value else sorted({1, min(4, encoder.depth)})


def check_classes(labels: np.ndarray, test_labels: np.ndarray, wanted: probe.Labels, chooses: bool) -> None:
  """`probe.check_classes`; and a line about classes without test images, which no accuracy speaks of."""
  probe.check_classes(labels, test_labels, wanted, chooses)
  known = labels[labels >= 0]
  if unseen := len(np.setdiff1d(known, test_labels)):
    say(f"note: {unseen:,} of the {len(np.unique(known)):,} classes have no test image: no figure speaks of them")


def measure(
  name, score, features, labels, test_features, test_labels, *, wanted, draws
) -> tuple[dict[str, Any], list[scores.Scored]]:
  """(figures as of `scores.summarise`, the answers of each draw); says the figures in a line."""
  answered = []
  for i in range(draws):
    rng = np.random.default_rng((SEED.value, i))  # the same images for pixels and encoders
    at = probe.draw_labelled(labels, wanted, rng)
    with warnings.catch_warnings(record=True) as told:
      warnings.simplefilter("always", UserWarning)
      answered.append(score(features[at], labels[at], test_features, test_labels, rng=rng))
    for warning in told:
      say(f"note: {warning.message}")
  norm = float(np.mean(np.linalg.norm(features, axis=1)))
  figures = scores.summarise(answered, test_labels) | {"images": len(at), "feature_norm": norm}

  def shown(key):
    spread = f" +- {figures[f'{key}_std']:.2f}" if draws > 1 else ""
    return f"{figures[key]:6.2f}{spread} % (95 %: {figures[f'{key}_low']:.2f} to {figures[f'{key}_high']:.2f})"

  chosen = []
  for key in answered[0].chosen:
    values = sorted({x.chosen[key] for x in answered})
    texts = values if key == "input" else [f"{value:.3g}" for value in (values[0], values[-1])]
    chosen.append(f"{key.replace('_', ' ')} {(', ' if key == 'input' else ' to ').join(dict.fromkeys(texts))}")
  say(f"{name:<20} top-1 {shown('top1')}  balanced {shown('balanced')}  {'  '.join(chosen)}  norm {norm:.3g}")
  return figures, answered


def pixels_of(train_set: Dataset, test_set: Dataset, view) -> tuple[np.ndarray, ...] | None:
  """(pixels, labels) of both sets, as `measure` takes them; None where they are not to be had cheaply."""
  found: list[np.ndarray] = []
  for dataset in (train_set, test_set):
    pixels = dataset.pixels(view, LARGEST)
    if pixels is None or dataset.labels is None:
      return None
    known = dataset.labels >= 0
    found += [pixels[known].reshape(int(np.sum(known)), -1).astype(np.float32) / 255, dataset.labels[known]]
  return tuple(found)


def standardised(features, labels, test_features, test_labels) -> tuple[np.ndarray, ...]:
  """The same with every number shifted and scaled to mean 0 and deviation 1 over the training images."""
  mean, std = features.mean(axis=0), features.std(axis=0)
  std[std == 0] = 1  # a pixel that never changes
  return (features - mean) / std, labels, (test_features - mean) / std, test_labels


def tell_classes(
  answered: list[scores.Scored], labels: np.ndarray, num_classes: int, names: tuple[str, ...], path: pathlib.Path
) -> None:
  """Writes each class's top-1 and its row of the confusion matrix as CSV, and says the worst ten classes."""
  shares, counts = scores.per_class(answered, labels)
  matrix, classes = scores.confusion(answered, labels, num_classes), np.unique(labels)
  title = [names[c] if names else str(c) for c in range(num_classes)]
  rows = [
    (title[c], n, share, *intervals.wilson(share, n), *matrix[c].tolist())
    for c, share, n in zip(classes, shares.tolist(), counts.tolist(), strict=True)
  ]
  for c, n, share, low, high, *_ in sorted(rows, key=lambda row: row[2])[:10]:
    say(f"class {c:<14} top-1 {share:6.2f} % (95 %: {low:.2f} to {high:.2f}) of {n:,} images")
  if not cluster.is_main():
    return
  try:
    with whole.file(path) as scratch, scratch.open("w", newline="") as file:
      head = ["class", "images", "top1", "top1_low", "top1_high", *(f"answered {x}" for x in title)]
      csv.writer(file).writerows([head, *rows])
    say(f"wrote {path}: the classes, and how often which was answered, summed over {len(answered)} draw(s)")
  except OSError as error:
    say(f"not written: {path} ({error.strerror})")


if __name__ == "__main__":
  cli.run(main, joins=True)
