"""Writes PyTorch's zip format without PyTorch, whatever is to be in it."""

import collections
import io
import pickle
import zipfile
from typing import NamedTuple

import numpy as np

_TYPES = {"float32": "FloatStorage", "int64": "LongStorage"}


class Global(NamedTuple):
  """Stands for a name that the pickle asks for; it is not imported here."""

  module: str
  name: str

  def __call__(self):  # the pickler asks whether it could be called
    raise AssertionError


class Tensor(NamedTuple):
  """A tensor that looks at a storage as it likes."""

  storage: np.ndarray
  offset: int
  shape: tuple
  strides: tuple


class Call(NamedTuple):
  """A call that opening the file would make."""

  function: Global
  arguments: tuple


class _Pickler(pickle._Pickler):
  def __init__(self, file, storages):
    super().__init__(file, 2)
    self.storages = storages

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Global):
      self.write(f"c{obj.module}\n{obj.name}\n".encode())
    elif isinstance(obj, Call):
      self.save_reduce(*obj)
    elif isinstance(obj, np.ndarray):
      steps = tuple(step // obj.itemsize for step in np.ascontiguousarray(obj).strides) if obj.ndim else ()
      self.save(Tensor(np.ascontiguousarray(obj).reshape(-1), 0, obj.shape, steps))
    elif isinstance(obj, Tensor):
      key = str(len(self.storages))
      self.storages[key] = obj.storage
      kind = Global("torch", _TYPES[obj.storage.dtype.name])
      arguments = (_Key(key, kind, obj.storage.size), *obj[1:], False, collections.OrderedDict())
      self.save_reduce(Global("torch._utils", "_rebuild_tensor_v2"), arguments)
    else:
      super().save(obj, save_persistent_id)

  def persistent_id(self, obj):
    return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, _Key) else None


class _Key(NamedTuple):
  key: str
  kind: Global
  count: int


def save(path, tree):
  """Writes a tree of dicts, arrays, `Tensor`s and `Call`s; returns the path."""
  text, storages = io.BytesIO(), {}
  _Pickler(text, storages).dump(tree)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("archive/data.pkl", text.getvalue())
    file.writestr("archive/version", "3\n")  # PyTorch opens none without it
    for key, values in storages.items():
      file.writestr(f"archive/data/{key}", values.tobytes())
  return path
