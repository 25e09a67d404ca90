"""What embed and duplicates share: the encoder of a run or of a file of weights, and the images that it is given."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from absl import flags

from ssl_jax import advise, build, data, parallel, restore
from ssl_jax.augment import EvaluationView
from ssl_jax.data import Dataset, look
from ssl_jax.data.image import Window, read_image
from ssl_jax.errors import UserError
from ssl_jax.evaluation.embeddings import Embeddings
from ssl_jax.evaluation.features import Extractor
from ssl_jax.run import checkpoint
from ssl_jax.run.cli import say
from ssl_jax.weights import export, released

FLAGS = """\
  --workdir=DIR        a run, whose evaluation says what is seen of an image; --step=N: not its newest checkpoint
  --weights=FILE       or a file or folder of weights, such as an export (docs/weights.md)
  --size, --resize, --mean, --std, --heads    of such weights, where no preprocessor_config.json or config.json is there
  --batch_size=256     images encoded at once, on all devices"""


class Source(NamedTuple):
  """An encoder, where it is from and what it sees.

  Attributes:
    name: of it, for people.
    encoder, variables: the module and its variables.
    view: what it sees of an image.
    channels, window: as which images are read, see `read_image`.
    config: the run's; None: there is no run.
  """

  name: str
  encoder: nn.Module
  variables: Any
  view: EvaluationView
  channels: int
  window: Window | None
  config: Any

  def extractor(self, batch_size: int) -> Extractor:
    """What computes features, on all devices; a batch is a multiple of them."""
    mesh = parallel.make_mesh()
    extractor = Extractor(self.encoder, self.view, mesh, -(-batch_size // mesh.size) * mesh.size)
    extractor.trace(self.variables, self.channels)  # what does not fit shows here
    return extractor

  def facts(self) -> dict[str, Any]:
    """What features depend on beside the images, as JSON holds it."""
    encoder: Any = self.encoder
    shape = export.shape_of(encoder) | {"dtype": jnp.dtype(encoder.dtype).name}
    bits = {"weights": f"{int(checkpoint.fingerprint(self.variables)):08x}"}
    return {"encoder": self.name, **bits, "shape": shape, "view": self.view._asdict(), "channels": self.channels}


def of_run(workdir: pathlib.Path, step: int | None = None) -> Source:
  """The encoder that a run evaluates."""
  run = restore.restore_encoder(workdir, step)
  config = run.config
  window = config.data.get("window")
  about = config.data.channels, window and tuple(window)
  return Source(f"{config.method.name}, step {run.step}", run.encoder, run.variables, run.eval_view, *about, config)


def of_weights(path: pathlib.Path, **given: Any) -> Source:
  """The encoder of a file or folder of weights; `given` as for `released.read`."""
  if (path / "checkpoints").is_dir():
    raise UserError(f"{path} is a run: give it as --workdir.")
  found = released.read(path, **given)
  for line in found.report:
    say(line)
  return Source(path.name, found.encoder, found.variables, found.view, found.channels, None, None)


def define_flags() -> tuple[Callable[[], Source], Any]:
  """Defines the flags that name an encoder. Returns what opens it, once they are parsed, and the flag of the batch."""
  workdir = flags.DEFINE_string("workdir", None, "a run")
  step = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  weights = flags.DEFINE_string("weights", None, "a file or folder of weights, in place of a run")
  of_images = {
    "heads": flags.DEFINE_integer("heads", None, "of a ViT, with --weights", lower_bound=1),
    "size": flags.DEFINE_integer("size", None, "of the square that is seen, with --weights", lower_bound=1),
    "resize": flags.DEFINE_integer("resize", None, "of the short side before, with --weights", lower_bound=1),
    "mean": flags.DEFINE_list("mean", [], "one number a channel, with --weights"),
    "std": flags.DEFINE_list("std", [], "one number a channel, with --weights"),
  }
  batch_size = flags.DEFINE_integer("batch_size", 256, "images encoded at once, on all devices", lower_bound=1)

  def load():
    if bool(workdir.value) == bool(weights.value):
      raise UserError("give an encoder: --workdir=RUN, or --weights=FILE_OR_FOLDER.")
    given = {name: flag.value for name, flag in of_images.items() if flag.value}
    if workdir.value:
      if given:
        raise UserError(f"--{next(iter(given))} is for --weights; a run has its own.")
      return of_run(pathlib.Path(workdir.value), step.value)
    if step.value is not None:
      raise UserError("--step is for --workdir.")
    for name in ("mean", "std"):
      if name in given:
        given[name] = _numbers(f"--{name}", given[name])
    return of_weights(pathlib.Path(os.path.expanduser(weights.value)), **given)

  return load, batch_size


def images_of(source: Source, folder: str | None, split: str | None) -> tuple[Dataset, dict[str, Any]]:
  """The images that the flags name, read one by one where they are files, and where they are, as JSON holds it.

  Without a split all images of a folder are meant. Where it has the folders of splits, these are no classes.

  Raises:
    UserError: no images are named, or there are none, or the folder has no folder of that split.
  """
  config = source.config
  if folder is None and config is None:
    raise UserError("give images: --folder=DIR.")
  if folder is None and split is None:
    raise UserError("give images: --folder=DIR, or --split=NAME, one of the run's own.")
  if folder is None and not config.data.folder:
    named = config.copy_and_resolve_references()
    place = {"name": config.data.name, "data_dir": config.data.data_dir, "split": split}
    return build.dataset(named, str(split)), place
  settings: dict[str, Any] = dict(channels=source.channels, max_bytes=0, window=source.window)
  images = data.load_folder(folder or config.data.folder, split or ".", **settings)
  if folder and split and data.folder.split_folder(pathlib.Path(os.path.expanduser(folder)), split) is None:
    raise UserError(f"--split: {folder} has no folder {split!r} of a split; without --split all its images are taken.")
  if folder and source.channels == 1 and (config is None or folder != config.data.folder):
    facts = look.look_at_files(images.images)
    for line in advise.on_colours(1, facts.coloured, len(facts.sizes)):
      say(f"{folder}: {line}")
  if not split and images.classes and not data.folder.SPLITS.isdisjoint(images.classes):
    say(f"{folder} has the folders {', '.join(images.classes)}: all images, without labels; --split names one of them")
    images = _without_labels(images)
  return images, {"folder": os.path.abspath(images.images.root)}


def _without_labels(images):
  return dataclasses.replace(images, labels=images.labels * 0 - 1, num_classes=0, classes=())


def tell_changes(found: Embeddings, folder: str | None) -> None:
  """Says so where the files that the images of embeddings are read from are others than were embedded.

  What tells files apart are their names, sizes and times. Nothing is said where there is no such folder, or where a
  file of somebody else's does not tell what was embedded.

  Args:
    found: the embeddings.
    folder: where the images are; None: where they were.
  """
  root = folder or (found.about.get("data") or {}).get("folder")
  if not root or "images" not in found.about or not os.path.isdir(os.path.expanduser(root)):
    return
  window = found.about.get("window")
  try:
    images = data.load_folder(root, ".", channels=found.about["channels"], max_bytes=0, window=window and tuple(window))
  except UserError:  # no images
    now = []
  else:
    now = [images.contents(), _without_labels(images).contents()]  # of a whole folder with splits they had no labels
  if found.about["images"] not in now:
    what = "the files are not those that were embedded, or were written since (names, sizes or times differ)"
    say(f"note: {root}: {what}; the similarities are of what was embedded, the pictures of what is there now")


def reader_of(found: Embeddings, folder: str | None) -> Callable[[int], np.ndarray]:
  """What reads the image of a row of embeddings, uint8 [H, W, C], as it was read for them.

  Args:
    found: the embeddings.
    folder: where the images are; None: where they were.

  Raises:
    UserError: nobody knows where they are.
  """
  place, channels = found.about.get("data") or {}, found.about.get("channels", 3)
  window = found.about.get("window")
  window = window and tuple(window)
  if root := folder or place.get("folder"):
    return lambda i: read_image(os.path.join(root, str(found.names[i])), channels, window)
  if "name" not in place:
    raise UserError("the embeddings do not say where the images are: give --folder=DIR.")
  dataset = data.load(place["name"], place["split"], data_dir=place["data_dir"], channels=channels, window=window)
  return lambda i: dataset.original(int(found.indices[i]))


def _numbers(name: str, given: Sequence[str]) -> tuple[float, ...]:
  try:
    return tuple(float(x) for x in given)
  except ValueError:
    raise UserError(f"{name} must be numbers with commas between, got {','.join(given)!r}.") from None
