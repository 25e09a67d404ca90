"""What the page shows of an encoder: a few hundred images, how it places them, and which it finds similar.

A `Look` is plain JSON with its pictures inside, which is written beside the page: pages of several runs are made from
these, without their data. Its size is bounded, whatever the images.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import PIL.Image
import scipy.linalg

from ssl_jax.commands import show
from ssl_jax.data import Dataset
from ssl_jax.data.memory import Cut

FORMAT = 1  # of a look's JSON: one of another is made anew
IMAGES = 500  # that are shown and placed
_MOST_BYTES = 64 << 20  # of these in memory, on every process
_SHEET, _GRID = 280_000, 100_000  # bytes of the sheet of thumbnails, and of the views or a method's pictures
_ASKED, _NEAREST = 12, 6  # images whose neighbours are shown, and how many neighbours each
_VIEWED = 6  # images whose views are shown
_TILE, _THUMB = 96, 32  # pixels of a picture's side for loggers, and of one in TensorBoard's projector


class Gallery(NamedTuple):
  """The images that the page shows.

  Attributes:
    images: in memory on every process, all of them, as evaluation sees them.
    names: what each image is called.
    classes: names of the classes; their numbers as text where they have none.
    of: the data set and split that they are from, and how many images that has.
  """

  images: Cut
  names: list[str]
  classes: list[str]
  of: tuple[str, str, int]


def gallery(run: Any) -> Gallery:
  """Reads images of the test set, or of the training set where there is no test set, evenly over all of it.

  Every process reads all of them.
  """
  source: Dataset = run.test_set or run.train_set
  most = max(1, _MOST_BYTES // (run.eval_view.size**2 * source.channels))
  some = source.thinned(min(IMAGES, most))
  read = [(x[keep], labels[keep], keep) for x, labels, keep in some.in_order(run.eval_view, min(64, len(some)))]
  pixels, labels = (np.concatenate([batch[i] for batch in read]) for i in (0, 1))
  there = np.flatnonzero(np.concatenate([keep for *_, keep in read])[: len(some)])
  count = max(source.num_classes, int(labels.max(initial=-1)) + 1)
  classes = [_printable(x) for x in source.classes or source.class_names] or [str(i) for i in range(count)]
  about: dict[str, Any] = dict(num_classes=count, name=source.name, split=source.split)
  images = Cut(images=pixels, labels=labels.astype(np.int32), **about)
  names = [source.image_name(int(i) * len(source) // len(some)) for i in there]  # as `thinned` takes them
  return Gallery(images, names, classes, (_printable(source.name), source.split, len(source)))


def features(run: Any, train: Any, seen: Gallery) -> np.ndarray:
  """The features [n, d] of the images, by the run's extractor. All processes come here."""
  return run.extractor.all(run.method.encoder(train.params, train.state), seen.images).features


def take(features: np.ndarray, seen: Gallery, step: int, drawn: Any, *, thorough: bool) -> dict[str, Any]:
  """The look of an encoder as JSON, without what stays the same in a run (`still`).

  Args:
    features: float [n, d], of the images.
    seen: the images.
    step: after which it is.
    drawn: the method's pictures of some images (`during_training.pictures`), or None.
    thorough: whether to take the seconds that t-SNE needs.
  """
  unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
  columns = pictured(drawn)
  found = {"step": step, "maps": maps(unit, thorough), **neighbours(unit, seen.images.labels)}
  return found | {"pictures": columns and grid(columns)}


def still(seen: Gallery, views: Sequence[tuple[str, Sequence[np.ndarray]]]) -> dict[str, Any]:
  """What of a look stays the same in a run: the images and the views of its first batch."""
  name, split, count = seen.of
  labels = seen.images.labels
  return {
    "format": FORMAT,
    "name": name,
    "split": split,
    "count": count,
    "names": seen.names,
    "labels": labels.tolist(),
    "classes": seen.classes if labels.max(initial=-1) >= 0 else [],
    "sheet": sheet(seen.images.images),
    "views": grid(views),
  }


def views(run: Any) -> list[tuple[str, Sequence[np.ndarray]]]:
  """The views of a few images of the first batch, as the network gets them, colours put back: columns of `grid`."""
  config, channels = run.config, run.train_set.channels
  originals, found = show.first_views(config, run.train_set, _VIEWED)
  columns: list[tuple[str, Any]] = [("as it is", [x / 255 for x in originals])]
  for i, (view, x) in enumerate(zip(run.views, found, strict=True), 1):
    columns.append((show.caption(i, view, channels), show.shown(x, view.mean, view.std)))
  return columns


def maps(unit: np.ndarray, thorough: bool) -> list[dict[str, Any]]:
  """Places of unit vectors [n, d] on a plane, in [0, 1]: their principal components, and t-SNE if scikit-learn is here.

  Each is {"title", "about", "points": [[x, y], ...]}.
  """
  n = len(unit)
  centred = unit - unit.mean(axis=0)
  gram = (centred @ centred.T).astype(np.float64)  # n is a few hundred, the features may be thousands
  total, kept = np.trace(gram), min(50 if thorough else 2, n)
  values, vectors = scipy.linalg.eigh(gram, subset_by_index=(n - kept, n - 1))
  values = np.maximum(values[::-1], 0)
  scores = vectors[:, ::-1] * np.sqrt(values)
  scores *= np.where(scores[np.abs(scores).argmax(axis=0), np.arange(kept)] < 0, -1, 1)  # else any sign
  plane = np.zeros((n, 2))
  plane[:, : min(2, n)] = scores[:, :2]
  spread = total > 1e-9
  share = 100 * values[:2].sum() / total if spread else 0.0
  found = [{"title": "PCA", "about": f"The two directions in which they differ most: {share:.0f} % of all difference."}]
  planes = [plane]
  if thorough and n >= 10 and spread:
    try:
      import threadpoolctl  # which scikit-learn needs
      from sklearn.manifold import TSNE
    except ImportError:
      pass
    else:
      settings: dict[str, Any] = dict(perplexity=min(30, (n - 1) / 3), init="pca", random_state=0)
      with threadpoolctl.threadpool_limits(1):  # On a busy machine its threads wait for one another for minutes.
        planes.append(TSNE(**settings).fit_transform(scores.astype(np.float32)))
      found.append({"title": "t-SNE", "about": "Near points are alike; distances between groups say little."})
  for entry, plane in zip(found, planes, strict=True):
    span = np.maximum(np.ptp(plane, axis=0).max(), 1e-9)
    middle = (plane.max(axis=0) + plane.min(axis=0)) / 2
    entry["points"] = np.round((plane - middle) / span + 0.5, 3).tolist()  # one scale for both axes
  return found


def neighbours(unit: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """The nearest of the images to some of them, by cosine, and how often the nearest one has an image's class.

  Args:
    unit: float [n, d] unit vectors.
    labels: int [n], -1 where there is none.

  Returns:
    {"neighbours": [[i, [[j, cosine], ...]], ...], "agreement": a share, None without labels}.
  """
  n = len(unit)
  cosine = unit @ unit.T
  np.fill_diagonal(cosine, -np.inf)
  order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(_NEAREST, n - 1)]
  asked = np.unique(np.arange(_ASKED) * n // _ASKED)
  found = [[int(i), [[int(j), round(float(cosine[i, j]), 3)] for j in order[i]]] for i in asked]
  known = labels >= 0
  agreement = None
  if n > 1 and known.any():
    agreement = float(np.mean(labels[order[known, 0]] == labels[known]))
  return {"neighbours": found, "agreement": agreement}


def pictured(drawn: Any) -> list[tuple[str, Sequence[np.ndarray]]] | None:
  """A method's pictures as columns (heading, pictures [h, w, c]); maps are laid over the first column's."""
  if drawn is None:
    return None
  columns: list[tuple[str, Sequence[np.ndarray]]] = []
  originals = next(iter(drawn))
  for name, value in drawn._asdict().items():
    parts = value if isinstance(value, tuple) else (value,)
    for i, part in enumerate(parts):
      heading = name.replace("_", " ") + (f" {i + 1}" if len(parts) > 1 else "")
      shown = [x if np.ndim(x) == 3 else _overlaid(original, x) for original, x in zip(originals, part, strict=True)]
      columns.append((heading, shown))
  return columns


def _overlaid(image, values):
  """A map [h, w] of any scale as colours over an image [h, w, c]."""
  low, high = values.min(), values.max()
  colours = matplotlib.colormaps["inferno"]((values - low) / max(high - low, 1e-12))[..., :3]
  return 0.3 * _rgb(np.asarray(image)) + 0.7 * colours


def grid(columns: Sequence[tuple[str, Sequence[np.ndarray]]]) -> dict[str, Any]:
  """Columns of pictures, float in [0, 1], as {"headings": [...], "rows": [[address, ...], ...], "small": bool}.

  All are made smaller and coarser until they fit in `_GRID` bytes, or are 24 pixels. "small": they are best drawn with
  sharp pixels.
  """
  pictures = [[_rgb(np.asarray(x)) for x in xs] for _, xs in columns]
  rows = list(zip(*pictures, strict=True))
  for side, quality in ((128, 85), (128, 70), (96, 70), (64, 70), (48, 60), (32, 60), (24, 50)):
    files = [[_jpeg(_shrunk(x, side), quality) for x in row] for row in rows]
    if sum(len(x) for row in files for x in row) <= _GRID:
      break
  small = bool(max(max(x.shape[:2]) for row in rows for x in row) < 64)
  addresses = [[_address(x) for x in row] for row in files]
  return {"headings": [name for name, _ in columns], "rows": addresses, "small": small}


def tiles(rows: Sequence[Sequence[np.ndarray]]) -> PIL.Image.Image:
  """Rows of square pictures [h, w, c], float in [0, 1], on one. All are brought to one size."""
  margin = ((1, 1), (1, 1), (0, 0))
  lines = [[np.pad(_tile(np.asarray(x)), margin, constant_values=255) for x in row] for row in rows]
  return PIL.Image.fromarray(np.concatenate([np.concatenate(line, axis=1) for line in lines]))


def _tile(image):
  pixels = PIL.Image.fromarray(np.uint8(np.round(255 * np.clip(_rgb(image), 0, 1))))
  kind = PIL.Image.Resampling.BOX if image.shape[0] > _TILE else PIL.Image.Resampling.NEAREST
  return np.asarray(pixels.resize((_TILE, _TILE), kind))


def beside_neighbours(found: dict[str, Any], seen: Gallery) -> list[list[np.ndarray]]:
  """Rows of `tiles`: an image first, then those that `neighbours` found, the nearest first."""
  images = seen.images.images
  return [[images[i] / 255, *(images[j] / 255 for j, _ in nearest)] for i, nearest in found["neighbours"]]


def thumbnails(seen: Gallery) -> np.ndarray:
  """The images, small: float [n, s, s, 3] in [0, 1]."""
  return np.stack([_shrunk(_rgb(x / 255), _THUMB) for x in seen.images.images])


def told(seen: Gallery) -> list[tuple[str, str]]:
  """What each image is called, and its class, empty where it has none."""
  labels = seen.images.labels
  return [(name, seen.classes[x] if x >= 0 else "") for name, x in zip(seen.names, labels, strict=True)]


def sheet(images: np.ndarray) -> dict[str, Any]:
  """Images uint8 [n, h, w, c] as thumbnails on one picture: {"address", "side", "columns", "rows"}."""
  n = len(images)
  columns = math.ceil(math.sqrt(n))
  rows = math.ceil(n / columns)
  for side, quality in ((48, 80), (48, 65), (40, 65), (32, 65), (24, 60), (16, 50)):
    side = min(side, images.shape[1])
    page = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for i, image in enumerate(images):
      top, left = i // columns * side, i % columns * side
      small = PIL.Image.fromarray(np.uint8(np.round(255 * _rgb(image / 255)))).resize(
        (side, side), PIL.Image.Resampling.BOX
      )
      page[top : top + side, left : left + side] = small
    file = _jpeg(page / 255, quality)
    if len(file) <= _SHEET:
      break
  return {"address": _address(file), "side": side, "columns": columns, "rows": rows}


def _rgb(image):
  """float [h, w, 3] of [h, w, c]: of channels other than 3 the first, in grey, as in `plots.draw_grid`."""
  return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


def _shrunk(image, side):
  scale = side / max(image.shape[:2])
  if scale >= 1:
    return image
  size = tuple(max(1, round(x * scale)) for x in (image.shape[1], image.shape[0]))
  pixels = PIL.Image.fromarray(np.uint8(np.round(255 * np.clip(image, 0, 1))))
  return np.asarray(pixels.resize(size, PIL.Image.Resampling.BOX)) / 255


def _jpeg(image, quality):
  file = io.BytesIO()
  PIL.Image.fromarray(np.uint8(np.round(255 * np.clip(image, 0, 1)))).save(file, "JPEG", quality=quality, subsampling=0)
  return file.getvalue()


def _address(file):
  return "data:image/jpeg;base64," + base64.b64encode(file).decode()


def _printable(name):
  """A name of a folder, whatever bytes it has."""
  return str(name).encode("utf-8", "backslashreplace").decode()
