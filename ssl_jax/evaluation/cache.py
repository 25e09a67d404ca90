"""Features that are computed once: kept in a folder, and used again only where nothing that made them has changed."""

import hashlib
import json
import pathlib
import re
import zipfile
from typing import Any

import jax
import numpy as np

import ssl_jax
from ssl_jax.data import Dataset
from ssl_jax.evaluation.features import Extractor, Features
from ssl_jax.run import checkpoint, cluster, whole
from ssl_jax.run.cli import say


def features(
  extractor: Extractor, variables: Any, dataset: Dataset, folder: pathlib.Path, role: str, about: dict[str, Any]
) -> Features:
  """What `extractor.all` gives, from a file of `folder`, or computed and kept there. All processes come here.

  A file is used if its key says that these are the same weights, images, labels, view, code, version of JAX and kind of
  device, and `about` the same; otherwise it is written anew. So there is one file for each `role` and split.

  Args:
    extractor: computes them.
    variables: the encoder's.
    dataset: the images.
    folder: which all processes share.
    role: begins the file's name: whose features they are.
    about: whatever else they depend on: the encoder's config, what is read off it. As JSON has it.
  """
  key = json.dumps(
    {
      "weights": checkpoint.digest(variables),
      "images": [dataset.name, dataset.split, dataset.channels, dataset.window, dataset.contents()],
      "view": extractor.view,
      "about": about,
      "code": _code(),
      "jax": [jax.__version__, jax.devices()[0].device_kind],
    }
  )
  name = f"{role}_{pathlib.Path(dataset.name).name}_{dataset.split}"
  path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.npz"
  kept = _read(path, key)
  if all(cluster.exchange("" if kept is None else "kept")):
    assert kept is not None
    say(f"features of {dataset.name} {dataset.split} from {path}")
    return kept
  found = extractor.all(variables, dataset)
  if cluster.is_main():
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with whole.file(path) as scratch, scratch.open("wb") as file:
        np.savez(file, key=np.array(key), **found._asdict())
    except OSError as error:  # another's run, or a full disk
      say(f"not kept: {path} ({error.strerror})")
  return found


def _read(path, key):
  """The features of a file of this key; None: there is none."""
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
      return Features(*(kept[name] for name in Features._fields)) if str(kept["key"]) == key else None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or damaged
    return None


def _code():
  root, digest = pathlib.Path(ssl_jax.__file__).parent, hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
  return digest.hexdigest()
