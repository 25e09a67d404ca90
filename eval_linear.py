"""What a linear classifier makes of a run's features.

  python eval_linear.py --workdir=runs/quickstart
  python eval_linear.py --workdir=runs/quickstart --labels=1% --draws=5
  python eval_linear.py --workdir=runs/quickstart --C=0.01,0.1,1,10
  python eval_linear.py --workdir=runs/quickstart --protocol=linear --config=configs/linear.py:simclr

--protocol=logreg is logistic regression with an L2 penalty, as DINOv2's evaluation does it: on the features as the
encoder gives them, the penalty chosen on a held-out tenth of the training images, never on the test images, and the
classifier refitted on all of them. The same is done with the raw pixels and with the encoder that the run began with.
The last line is JSON; the same figures are in WORKDIR/linear.json, those of other data in WORKDIR/linear_NAME.json.

--protocol=linear is the papers' own, with random crops and flips, the encoder at each step: train.py's loop with a
recipe of configs/linear.py, by default that of the run's method. It goes on where it was stopped.
"""

import functools
import math
import pathlib
import runpy
import warnings

import numpy as np
from absl import flags
from ml_collections import config_flags

import train
from ssl_jax import build, parallel
from ssl_jax.commands import evaluate, labelled
from ssl_jax.commands.evaluate import BATCH_SIZE, DATA, DATA_DIR, FOLDER, STEP, TEST_SPLIT, WORKDIR, load
from ssl_jax.data import Dataset
from ssl_jax.errors import UserError
from ssl_jax.evaluation import probe
from ssl_jax.evaluation.accuracy import LARGEST, guessing
from ssl_jax.evaluation.features import Extractor
from ssl_jax.run import cli
from ssl_jax.run.cli import say

PROTOCOLS = ("logreg", "linear")
RECIPE = pathlib.Path(__file__).parent / "configs" / "linear.py"

PROTOCOL = flags.DEFINE_string("protocol", "logreg", "how the classifier is trained")
TRAIN_SPLIT = flags.DEFINE_string("train_split", None, "split that it is trained on; by default the run's")
LABELS = flags.DEFINE_string("labels", "all", "how many training images have one: all, 1%, 10% or N-per-class")
DRAWS = flags.DEFINE_integer("draws", None, "how often these are drawn; by default 5 times, or once where it is all")
SEED = flags.DEFINE_integer("seed", 0, "of the draws and of the held-out images", lower_bound=0)
C = flags.DEFINE_list("C", None, "inverse penalties to choose from; by default DINOv2's 45, 10^-6 to 10^5")
CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe of --protocol=linear")
flags.adopt_module_key_flags(evaluate)  # so that --help shows them


def main() -> int:
  workdir = pathlib.Path(WORKDIR.value)
  if PROTOCOL.value == "linear":
    return by_the_papers(workdir)
  penalties, wanted, draws = settings()
  restored = build.restore_encoder(workdir, STEP.value)
  config, why = restored.config, "a classifier is trained and scored by labels"
  train_set = load(config, TRAIN_SPLIT.value or config.data.split, why)
  test_set = load(config, TEST_SPLIT.value or config.data.test_split, why).numbered_as(train_set)
  if train_set.split == test_set.split:
    raise UserError(
      f"--train_split and --test_split are both {test_set.split!r}: score images that are not trained on."
    )
  if train_set.labels is not None and test_set.labels is not None:  # else they are known when all images are read
    probe.check_classes(train_set.labels, test_set.labels, wanted)
  say(f"step {restored.step} of {workdir}")
  for role, x in (("training", train_set), ("test", test_set)):
    say(f"{role}: {x.name} {x.split}, {len(x):,} images")

  mesh = parallel.make_mesh()
  extractor = Extractor(restored.encoder, restored.eval_view, mesh, -(-BATCH_SIZE.value // mesh.size) * mesh.size)

  def encoded(variables):
    return *extractor(variables, train_set), *extractor(variables, test_set)

  found = encoded(restored.variables)
  _, labels, _, test_labels = found
  for role, x, known in (("training", train_set, labels), ("test", test_set, test_labels)):
    if left_out := len(x) - len(known):
      say(
        f"{left_out:,} of the {role} images cannot be read or {'has' if left_out == 1 else 'have'} no label: left out"
      )
  probe.check_classes(labels, test_labels, wanted)
  if unseen := len(np.setdiff1d(labels, test_labels)):
    say(f"{unseen:,} of the {len(np.unique(labels)):,} classes are not among the test images")

  figures: dict[str, float | int | str] = {"step": restored.step, "protocol": PROTOCOL.value, "labels": LABELS.value}
  figures |= {"draws": draws, "guessing_top1": guessing(labels, test_labels)}
  say(f"guessing the most frequent class: {figures['guessing_top1']:.2f} %")
  measured = functools.partial(measure, penalties=penalties, wanted=wanted, draws=draws)
  pixels = pixels_of(train_set, test_set, restored.eval_view)
  if pixels is None:
    say("raw pixels: not tried, since the images are large or not in memory")
  else:
    figures |= {f"pixels_{name}": x for name, x in measured("raw pixels", *pixels).items()}
  untrained = measured("encoder, untrained", *encoded(restored.untrained()))
  figures |= {f"untrained_{name}": x for name, x in untrained.items()}
  figures |= measured("encoder", *found)
  evaluate.hand_over(figures, workdir, "linear")
  return 0


def by_the_papers(workdir: pathlib.Path) -> int:
  """Trains and scores a linear classifier by a paper's protocol, in a folder of its own in the workdir."""
  if STEP.value is not None:
    raise UserError("--protocol=linear takes the newest checkpoint: leave --step out.")
  given = {"data.folder": FOLDER.value, "data.name": DATA.value, "data.data_dir": DATA_DIR.value}
  given |= {"data.split": TRAIN_SPLIT.value, "data.test_split": TEST_SPLIT.value}
  given |= {"method.labels": None if LABELS.value == "all" else LABELS.value}
  given = {key: value for key, value in given.items() if value is not None}
  if CONFIG.value is None:
    version = version_for(build.read_config(workdir))
    config = runpy.run_path(str(RECIPE))["get_config"](version)
  else:
    file, _, version = flags.FLAGS["config"].config_filename.partition(":")
    config, version = CONFIG.value, version or pathlib.Path(file).stem
    given |= config_flags.get_override_values(flags.FLAGS["config"])
  config = labelled.fitted(config, workdir, given)
  config.init_from = str(workdir)
  other = FOLDER.value or DATA.value
  name = f"linear_{version}{f'_{pathlib.Path(other).name}' if other else ''}"
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


def settings() -> tuple[tuple[float, ...], probe.Labels, int]:
  """(penalties, labels, draws) by the flags."""
  if PROTOCOL.value not in PROTOCOLS:
    raise UserError(f"there is no --protocol={PROTOCOL.value}; there is {', '.join(PROTOCOLS)}.")
  try:
    penalties = probe.PENALTIES if C.value is None else tuple(float(c) for c in C.value)
  except ValueError:
    penalties = ()
  if not penalties or not all(c > 0 and math.isfinite(c) for c in penalties):
    raise UserError(f"--C must be positive numbers with commas between, got {','.join(C.value or ())!r}.")
  wanted = probe.parse_labels(LABELS.value)
  draws = DRAWS.value if DRAWS.value is not None else 1 if wanted.share == 1 else 5
  if draws < 1 or (draws > 1 and wanted.share == 1):
    raise UserError(f"--draws must be at least 1, and 1 where all labels are used, got {draws}.")
  return penalties, wanted, draws


def measure(name, features, labels, test_features, test_labels, *, penalties, wanted, draws) -> dict[str, float]:
  """Means over the draws, with standard deviations where there are several, and the interval of the top-1."""
  scores = []
  for i in range(draws):
    rng = np.random.default_rng((SEED.value, i))  # the same images for pixels and encoders
    at = probe.draw_labelled(labels, wanted, rng)
    with warnings.catch_warnings(record=True) as told:
      warnings.simplefilter("always", UserWarning)
      given = features[at], labels[at], test_features, test_labels
      scores.append(probe.score(*given, penalties=penalties, rng=rng))
    for warning in told:
      say(f"note: {warning.message}")
  figures = {key: float(np.mean([x[key] for x in scores])) for key in ("top1", "top5", "balanced")}
  low, high = probe.wilson(figures["top1"], len(test_labels))
  figures |= {"top1_low": low, "top1_high": high, "images": len(at)}
  spread = ""
  if draws > 1:
    figures |= {f"{key}_std": float(np.std([x[key] for x in scores], ddof=1)) for key in ("top1", "top5", "balanced")}
    spread = f" +- {figures['top1_std']:.2f}"
  chosen = sorted(x["C"] for x in scores)
  figures["C"] = chosen[len(chosen) // 2]
  shown = f"{chosen[0]:.3g}" if chosen[0] == chosen[-1] else f"{chosen[0]:.3g} to {chosen[-1]:.3g}"
  say(
    f"{name:<19} top-1 {figures['top1']:6.2f}{spread} % (95 %: {low:.2f} to {high:.2f})  "
    f"balanced {figures['balanced']:6.2f} %  C {shown}"
  )
  return figures


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


if __name__ == "__main__":
  cli.run(main, joins=True)
