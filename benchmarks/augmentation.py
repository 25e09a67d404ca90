"""Augmentation from pixels in memory: images a CPU second, ours against torchvision's transforms on Pillow images.

  pip install -r requirements.txt -r requirements-bench.txt
  PYTHONPATH=. taskset -c 0 python benchmarks/augmentation.py --json=augmentation.json

simclr   two views of images of 32 pixels, `configs/simclr_cifar10.py`.
dino     two crops of 224 and eight of 96 of 500 x 375 photographs, `configs/dino_imagenet.py`.

"device" is `augment.make_views` on the whole images, jitted. "host + device" cuts the crops on the host
(`crop.cut_views`, as streamed data is) and finishes them on the device; "host" is its first part, which is all that
a machine with an accelerator has to do on its CPU. The peer does all of a view on the host, with Pillow's blur.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import torch
from input import peer_complete, photographs

from configs import dino_imagenet, simclr_cifar10
from ssl_jax import augment, config
from ssl_jax.data import crop

RECIPES = dict(simclr=simclr_cifar10, dino=dino_imagenet)


def pixels(recipe, count):
  size = (32, 32) if recipe == "simclr" else (500, 375)
  images = [np.asarray(image) for image in photographs(size)]
  return np.stack([images[i % len(images)] for i in range(count)])


def sides(images, views):
  """Functions that make the views of all `images` once, by name."""
  keys = augment.example_keys(0, 0, jnp.arange(len(images)))

  @jax.jit
  def finish(keys, images):
    return augment.make_views(keys, images, views)

  def host():
    crops = [crop.cut_views(image, views, (0, i)) for i, image in enumerate(images)]
    return tuple(np.stack(x) for x in zip(*crops, strict=True))

  transforms = [peer_complete(view) for view in views]

  def peer():
    done = [[transform(image) for transform in transforms] for image in map(PIL.Image.fromarray, images)]
    return [torch.stack(view) for view in zip(*done, strict=True)]

  return {
    "device": lambda: jax.block_until_ready(finish(keys, images)),
    "host + device": lambda: jax.block_until_ready(finish(keys, host())),
    "host": host,
    "torchvision": peer,
  }


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
  parser.add_argument("--batch", type=int, nargs=2, default=[256, 32], help="of simclr and of dino")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  common.introduce()
  print("images per CPU second; the ratio to torchvision")
  rows = []
  for recipe in args.recipes:
    batch = args.batch[list(RECIPES).index(recipe)]
    views = config.views(RECIPES[recipe].get_config())
    seconds = common.take_turns(sides(pixels(recipe, batch), views), args.repeats)
    rows.append(dict(recipe=recipe, batch=batch, images_per_second={k: batch / s for k, s in seconds.items()}))
    for side, rate in rows[-1]["images_per_second"].items():
      print(f"{recipe:>7} {side:>14} {rate:>8.1f} {seconds['torchvision'] / seconds[side]:>6.2f}", flush=True)
  common.write_json(args, rows)


if __name__ == "__main__":
  main()
