"""One of the processes that test_cluster.py starts: every method for a few steps, and the views of one batch.

"sharded" is DINO with its state split over the devices.

python cluster_worker.py FOLDER COORDINATOR PROCESSES PROCESS METHOD...
"""

import pathlib
import sys

import jax
import numpy as np
import test_all_methods
from jax import lax

import train
from ssl_jax import augment, data, parallel
from ssl_jax import config as configs
from ssl_jax.methods.base import AXIS
from ssl_jax.run import cluster


def main(folder, coordinator, processes, process, *names):
  cluster.connect(coordinator, int(processes), int(process), 120)
  jax.config.update("jax_disable_most_optimizations", True)
  folder = pathlib.Path(folder)
  parallel.SMALLEST_SPLIT = 1
  for name in names:
    config = test_all_methods.small("dino_quickstart" if name == "sharded" else name)
    config.parallel.shard_state = name == "sharded"
    config.steps, config.lr.warmup_epochs = 3, 0.0
    config.data.name = "fashion_mnist_mini"
    config.data.split, config.data.test_split = "train[:29]", "test[:13]"  # neither divides by anything
    config.knn.k = 3
    config.log_every_steps, config.eval_every_epochs = 1, 1
    train.main(config, folder / name.replace(":", "_"))
  views = configs.views(test_all_methods.small("dino_quickstart"))
  images = data.load("fashion_mnist_mini", "train[:29]", data_dir=None, channels=1).images
  mine = images[data.batch_indices(29, 8, 0, 4, data.Part(jax.process_index(), jax.process_count()))]

  def draw(seed, images):
    b = len(images)
    keys = augment.example_keys(seed, 4, lax.axis_index(AXIS) * b + np.arange(b))
    return [x.swapaxes(0, 1) for x in augment.make_views(keys, images, views)]

  mesh = parallel.make_mesh()
  drawn = parallel.compile_map(draw, mesh)(0, parallel.put_batch(mesh, mine))
  if cluster.is_main():
    np.savez(folder / "views.npz", *[np.asarray(x) for x in drawn])


main(*sys.argv[1:])
