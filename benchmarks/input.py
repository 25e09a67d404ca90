"""The host's input: images a second that are read, cropped and resized, against torchvision with PIL.

  pip install -r requirements.txt -r requirements-bench.txt
  PYTHONPATH=. python benchmarks/input.py --json=input.json

500 x 375 JPEGs, quality 90, made of scikit-image's and scikit-learn's photographs; the views of our recipes.

  ours       `read_image` and `cut_views`: crops alone. Flip, colour, blur and normalisation are the device's.
  crops      PIL and RandomResizedCrop, to uint8 tensors: the same work.
  complete   PIL and the whole transform, to float32 tensors: what the host does in the usual PyTorch input. Its blur
             is Pillow's, as in the official code of MoCo v2 and DINO.

"calls" and "loader" (`Dataset.batches`, DataLoader, both in this process) run on one core, "threads" and "workers" on
all that this process may use; against our threads stand the peer's workers. Numbers are medians over rounds in which
all sides take turns; a loader is started anew for each, and its first batches are not counted.

With --reduced instead: ours alone, JPEGs of 2000 x 1500 decoded whole and as `data.reduced_decoding` has it.
"""

import functools
import os
import random
import statistics
import tempfile
import time

import common
import PIL.features
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import skimage.data
import sklearn.datasets
import torch
from absl import flags
from torchvision import transforms

from configs import dino_imagenet, mae_imagenet, simclr_imagenet
from ssl_jax import config
from ssl_jax.augment import View
from ssl_jax.data import Reading, crop
from ssl_jax.data.folder import Files
from ssl_jax.data.image import read_image
from ssl_jax.data.stream import Streamed

RECIPES = dict(simclr=simclr_imagenet, mae=mae_imagenet, dino=dino_imagenet)


def photographs(size):
  """Pillow images of (width, height): each is cut to the shape first, at its centre."""
  kinds = (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee, skimage.data.rocket)
  arrays = [*(kind() for kind in kinds), *sklearn.datasets.load_sample_images().images]
  return [PIL.ImageOps.fit(PIL.Image.fromarray(a), size, PIL.Image.Resampling.LANCZOS) for a in arrays]


def write_photographs(folder, count, size=(500, 375), quality=90):
  """Writes `count` JPEGs and returns their names."""
  images = photographs(size)
  names = [f"{i}.jpg" for i in range(count)]
  for i, name in enumerate(names):
    images[i % len(images)].save(os.path.join(folder, name), quality=quality)
  return names


class Photographs(torch.utils.data.Dataset):
  """The peer's data set: a list of transforms, one a view, of each image."""

  def __init__(self, paths, views):
    self.paths, self.views = paths, views

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, i):
    with open(self.paths[i], "rb") as file:
      image = PIL.Image.open(file).convert("RGB")
    return [view(image) for view in self.views]


class Blur:
  """Pillow's Gaussian blur with a random radius."""

  def __init__(self, sigma):
    self.sigma = sigma

  def __call__(self, image):
    return image.filter(PIL.ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def peer_crop(view: View):
  """RandomResizedCrop as `view` says."""
  interpolation = transforms.InterpolationMode(view.interpolation)
  return transforms.RandomResizedCrop(view.size, view.scale, view.ratio, interpolation)


def peer_crop_alone(view: View):
  return transforms.Compose([peer_crop(view), transforms.PILToTensor()])


def peer_complete(view: View):
  """All that `view` says, in the order of the official codes."""
  steps = [peer_crop(view), transforms.RandomHorizontalFlip(view.flip)]
  if any(view.jitter):
    steps.append(transforms.RandomApply([transforms.ColorJitter(*view.jitter)], view.jitter_p))
  if view.gray_p:
    steps.append(transforms.RandomGrayscale(view.gray_p))
  if view.blur_p:
    steps.append(transforms.RandomApply([Blur(view.blur_sigma)], view.blur_p))
  if view.solarize_p:
    steps.append(transforms.RandomSolarize(128, view.solarize_p))
  steps.append(transforms.ToTensor())
  if view.mean:
    steps.append(transforms.Normalize(view.mean, view.std))
  return transforms.Compose(steps)


def our_calls(paths, views):
  """An endless iterator that makes one image's views at a time."""
  for i in range(10**9):
    yield crop.cut_views(read_image(paths[i % len(paths)]), views, (0, i, 0))


def reduced_calls(files, views, reduced):
  """The same of `files`, of which large JPEGs may be decoded at a part of their size."""
  least = crop.least_pixels(views, reduced)
  for i in range(10**9):
    pixels, size = files.read_reduced(i % len(files), least)
    yield crop.cut_views(pixels, views, (0, i, 0), size)


def measure_reduced(args):
  """A row a recipe: images a second of one core, whole and reduced."""
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    names = write_photographs(folder, 12, (2000, 1500))
    files = Files(folder, names, 3)
    print(f"{'':>7} {'whole':>7} {'reduced':>8} {'ratio':>6}")
    for recipe in args.recipes:
      views = config.views(RECIPES[recipe].get_config())
      sides = {name: functools.partial(reduced_calls, files, views, name == "reduced") for name in ("whole", "reduced")}
      budget = dict(rounds=args.rounds, seconds=args.seconds / args.rounds)
      rate = take_turns(sides, images=1, skip=3, multiple=len(names), **budget)
      rows.append(dict(recipe=recipe, **rate))
      print(
        f"{recipe:>7} {rate['whole']:>7.1f} {rate['reduced']:>8.1f} {rate['reduced'] / rate['whole']:>6.2f}", flush=True
      )
  return rows


def peer_calls(paths, transform, views):
  images = Photographs(paths, [transform(view) for view in views])
  for i in range(10**9):
    yield images[i % len(images)]


def our_loader(files, views, batch_size, threads, workers):
  """An endless iterator over batches."""
  about = dict(labels=None, num_classes=0, name="photographs", split="train")
  dataset = Streamed(images=files, reading=Reading(threads, workers), **about)
  return dataset.batches(views, batch_size=batch_size, seed=0, start=0, stop=10**6)


def peer_loader(paths, transform, views, batch_size, workers):
  images = Photographs(paths, [transform(view) for view in views])
  order = torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**6 * batch_size)
  context = "spawn" if workers else None  # JAX's threads do not survive a fork.
  loader = torch.utils.data.DataLoader(
    images, batch_size, sampler=order, num_workers=workers, multiprocessing_context=context
  )
  return iter(loader)


def images_per_second(start, images, skip, multiple, seconds):
  """Times an iterator, of `images` images each, from item `skip` on, for a multiple of `multiple` items."""
  iterator = start()
  for _ in range(skip):
    next(iterator)
  count, began = 0, time.perf_counter()
  while count == 0 or count % multiple or time.perf_counter() - began < seconds:
    next(iterator)
    count += 1
  return count * images / (time.perf_counter() - began)


def take_turns(sides, rounds, **kwargs):
  """The median rate of each side, which are functions that start an iterator."""
  rates = {name: [] for name in sides}
  for _ in range(rounds):
    for name, start in sides.items():
      rates[name].append(images_per_second(start, **kwargs))
  return {name: statistics.median(taken) for name, taken in rates.items()}


def measure(files, views, args, cores):
  """Yields (where, rates of "ours", "crops" and "complete") for one recipe."""
  paths = [os.path.join(files.root, name) for name in files.names]
  peers = dict(crops=peer_crop_alone, complete=peer_complete)
  budget = dict(rounds=args.rounds, seconds=args.seconds / args.rounds)

  os.sched_setaffinity(0, cores[-1:])
  sides = dict(ours=functools.partial(our_calls, paths, views))
  sides |= {name: functools.partial(peer_calls, paths, transform, views) for name, transform in peers.items()}
  yield "calls", take_turns(sides, images=1, skip=3, multiple=1, **budget)

  batch = dict(images=args.batch_size, **budget)
  sides = dict(ours=functools.partial(our_loader, files, views, args.batch_size, 0, 0))
  for name, transform in peers.items():
    sides[name] = functools.partial(peer_loader, paths, transform, views, args.batch_size, 0)
  yield "loader", take_turns(sides, skip=1, multiple=1, **batch)

  os.sched_setaffinity(0, cores)
  n = len(cores)
  sides = dict(threads=functools.partial(our_loader, files, views, args.batch_size, n, 0))
  sides |= dict(workers=functools.partial(our_loader, files, views, args.batch_size, 1, n))
  for name, transform in peers.items():
    sides[name] = functools.partial(peer_loader, paths, transform, views, args.batch_size, n)
  rates = take_turns(sides, skip=3 * n, multiple=n, **batch)  # Three: what a worker may be ahead by.
  for where in ("threads", "workers"):
    yield where, dict(ours=rates[where], crops=rates["crops"], complete=rates["complete"])


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
  parser.add_argument("--seconds", type=float, default=6.0, help="timed, for each number")
  parser.add_argument("--rounds", type=int, default=3, help="in which the sides take turns")
  parser.add_argument("--images", type=int, default=96, help="files that are written")
  parser.add_argument("--batch-size", type=int, default=32)
  parser.add_argument("--reduced", action="store_true", help="what reduced decoding gains, on one core")
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # for Grain's workers
  cores = sorted(os.sched_getaffinity(0))
  common.introduce()
  torch.set_num_threads(1)
  if args.reduced:
    common.write_json(args, measure_reduced(args))
    return
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    names = write_photographs(folder, args.images)
    size = statistics.mean(os.path.getsize(os.path.join(folder, name)) for name in names)
    print(f"libjpeg-turbo {PIL.features.version('libjpeg_turbo')}; ", end="")
    print(f"JPEGs of {size / 1000:.0f} kB on average, batches of {args.batch_size}")
    print("images a second; ours and crops: crop and resize alone, ours leaves the rest to the device")
    print(f"{'':>7} {'':>8} {'ours':>7} {'crops':>7} {'ratio':>6} {'complete':>9} {'ratio':>6}")
    files = Files(folder, names, 3)
    for recipe in args.recipes:
      views = config.views(RECIPES[recipe].get_config())
      for where, rate in measure(files, views, args, cores):
        rows.append(
          dict(recipe=recipe, where=where, cores=len(cores) if where in ("threads", "workers") else 1, **rate)
        )
        line = f"{recipe:>7} {where:>8} {rate['ours']:>7.1f} {rate['crops']:>7.1f} {rate['ours'] / rate['crops']:>6.2f}"
        print(f"{line} {rate['complete']:>9.1f} {rate['ours'] / rate['complete']:>6.2f}", flush=True)
  common.write_json(args, rows)


if __name__ == "__main__":
  main()
