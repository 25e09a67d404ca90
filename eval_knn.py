"""k-NN accuracy of a run's encoder, by the protocol of the official DINO code (eval_knn.py).

  python eval_knn.py --workdir=runs/quickstart
  python eval_knn.py --workdir=runs/quickstart --step=500 --k=20 --data=fashion_mnist --data_dir=D

The last line is JSON; the same figures are in WORKDIR/knn.json.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from ssl_jax import augment, checkpoint, data, evaluate, methods, parallel
from ssl_jax import config as configs
from ssl_jax.cli import run, say
from ssl_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "the run to evaluate")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
K = flags.DEFINE_list("k", ["10", "20", "100", "200"], "numbers of neighbours")
TEMPERATURE = flags.DEFINE_float("temperature", 0.07, "of the votes exp(similarity / T)", lower_bound=1e-6)
DATA = flags.DEFINE_string("data", None, "a prepared data set; by default the run's")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where it is; by default the run's")
FOLDER = flags.DEFINE_string("folder", None, "a folder of images, in place of --data")
BANK_SPLIT = flags.DEFINE_string("bank_split", None, "split of the labelled bank; by default the run's training split")
TEST_SPLIT = flags.DEFINE_string(
  "test_split", None, "split of the queries; by default the run's; the bank itself may be"
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "images encoded at once, on all devices", lower_bound=1)


def main() -> int:
  workdir = pathlib.Path(WORKDIR.value)
  try:
    ks = [int(k) for k in K.value]
  except ValueError:
    raise UserError(f"--k must be numbers with commas between, got {','.join(K.value)!r}.") from None
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} is not a run: it has no config.json.")
  config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
  bank = load(config, BANK_SPLIT.value or config.data.split)
  queries = load(config, TEST_SPLIT.value or config.data.test_split)
  step, variables, encoder = restore_encoder(workdir, config, bank.images.shape[1:])
  say(f"step {step} of {workdir}")
  for role, x in (("bank", bank), ("queries", queries)):
    say(f"{role}: {x.name} {x.split}, {len(x.images):,} images")

  mesh = parallel.make_mesh()
  batch_size = -(-BATCH_SIZE.value // mesh.size) * mesh.size
  extractor = evaluate.make_extractor(encoder, configs.eval_view(config), mesh)
  bank_features = evaluate.features(extractor, variables, bank.images, batch_size, mesh)
  same = bank.split == queries.split  # each image is its own nearest neighbour then, and must not count
  query_features = bank_features if same else evaluate.features(extractor, variables, queries.images, batch_size, mesh)
  exclude = np.arange(len(bank.images)) if same else None

  figures: dict[str, float | int] = {"step": step}
  for k in ks:
    score = evaluate.knn_accuracy(
      bank_features, bank.labels, query_features, queries.labels, k=k, temperature=TEMPERATURE.value, exclude=exclude
    )
    say(f"k={k:<4} top-1 {score['top1']:6.2f} %  top-5 {score['top5']:6.2f} %")
    figures |= {f"k{k}_{name}": value for name, value in score.items()}
  (workdir / "knn.json").write_text(json.dumps(figures, indent=2) + "\n")
  say(json.dumps(figures))
  return 0


def load(config, split: str) -> data.Dataset:
  """A labelled split of the data set that the flags or the run name."""
  channels = config.data.channels
  if FOLDER.value or (config.data.folder and not DATA.value):
    loaded = data.load_folder(FOLDER.value or config.data.folder, split, channels=channels)
  else:
    name, data_dir = DATA.value or config.data.name, DATA_DIR.value or (None if DATA.value else config.data.data_dir)
    loaded = data.load(name, split, data_dir=data_dir, channels=channels)
  if not loaded.num_classes:
    raise UserError(f"{loaded.name} {split!r} has no labels, and k-NN classifies by labels.")
  return loaded


def restore_encoder(workdir: pathlib.Path, config, image_shape):
  """Returns (step, the encoder's variables, its module) from a checkpoint of any number of devices."""
  folder = workdir / "checkpoints"
  found = checkpoint.steps(folder)
  step = STEP.value if STEP.value is not None else next(iter(found), None)
  if step not in found:
    raise UserError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}.")
  module = methods.find(config.method.name)
  method = module.from_config(config, 1)
  views = configs.views(config)

  def init():
    keys = augment.example_keys(config.seed, jnp.int32(0), jnp.arange(1))
    return method.init(jax.random.key(0), augment.make_views(keys, jnp.zeros((1, *image_shape), jnp.uint8), views))

  params, state = parallel.abstract(jax.eval_shape(init), parallel.replicated(parallel.make_mesh()))
  try:
    restored = checkpoint.restore(folder, step, {"params": params, "state": state})
  except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
    raise UserError(f"the checkpoint of step {step} cannot be read: {error}") from error
  return step, method.encoder(restored["params"], restored["state"]), module.make_encoder(config)


if __name__ == "__main__":
  run(main)
