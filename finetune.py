"""Trains an encoder further with labels, or one from nothing, and scores it on the test images.

  python finetune.py --from=runs/mae_quickstart --workdir=runs/finetuned
  python finetune.py --from=scratch --like=runs/mae_quickstart --workdir=runs/from_scratch    the line to beat
  python finetune.py --from=FILE --config=configs/finetune_mae.py --config.data.folder=DIR --workdir=runs/finetuned
  python finetune.py --from=runs/simclr --config=configs/finetune_resnet.py:10pct --workdir=runs/ten_percent

It is train.py with another recipe: the same loop and step, the same checkpoints, and any number of devices and hosts.
Started again with the same workdir, it goes on from the last checkpoint, exactly. Of a run it takes images, sizes and
network, where no key of the config is given for them; with a file of weights (docs/weights.md) the recipe has to name
the network. The figures of the last evaluation are the last line, and in WORKDIR/finetune.json.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

import train
from ssl_jax.commands import labelled
from ssl_jax.errors import UserError
from ssl_jax.run import cli, cluster

CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe; by default configs/finetune_quickstart.py")
FROM = flags.DEFINE_string("from", None, "a run's workdir, a file or folder of weights, or scratch")
LABELS = flags.DEFINE_string("labels", None, "how many training images have one: all, 1%, 10% or N-per-class")
LIKE = flags.DEFINE_string("like", None, "a run whose images, sizes and network are taken; by default that of --from")
WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written")


def main() -> int:
  source, like = FROM.value, LIKE.value
  if not source or not WORKDIR.value:
    raise UserError("give --from, a run or a file of weights or scratch, and --workdir, a new folder.")
  if like is None and (pathlib.Path(source).expanduser() / "config.json").is_file():
    like = source
  config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
  if "classes" not in config.method:
    raise UserError(f"the recipe is of {config.method.name}, which takes no labels: see configs/finetune_*.py.")
  if like:
    config = labelled.fitted(
      config, pathlib.Path(like).expanduser(), config_flags.get_override_values(flags.FLAGS["config"])
    )
  if LABELS.value:
    with config.unlocked():
      config.method.labels = LABELS.value
  config.init_from = None if source == "scratch" else source
  if config.data.split and config.data.test_split:
    cluster.together(lambda: labelled.check_apart(config, config.data.split, config.data.test_split))
  status = train.main(config, workdir)
  if status == 0:
    labelled.hand_over(config, workdir, workdir / "finetune.json", **{"from": source})
  return status


if __name__ == "__main__":
  cli.run(main, recipe=str(pathlib.Path(__file__).parent / "configs" / "finetune_quickstart.py"), joins=True)
