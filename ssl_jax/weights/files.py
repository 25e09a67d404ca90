"""Reads weight files: .safetensors, and PyTorch's .pth, .pt and .bin, without PyTorch and without running their code.

A PyTorch file is a pickle, which may name any function of any module to be called when it is opened. Here it may name
what plain tensors are made of and nothing else: `torch._utils._rebuild_tensor_v2` and storages, `OrderedDict`, NumPy's
scalars, and `argparse.Namespace`, which the training scripts of DINO and MAE save and which comes as a plain record.
"""

import collections
import io
import json
import math
import os
import pathlib
import pickle
import pickletools
import types
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ssl_jax.errors import UserError

_STORAGES = {
  "BFloat16Storage": ml_dtypes.bfloat16,
  "BoolStorage": np.bool_,
  "ByteStorage": np.uint8,
  "CharStorage": np.int8,
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "IntStorage": np.int32,
  "LongStorage": np.int64,
  "ShortStorage": np.int16,
}
_SAFETENSORS = {
  "BF16": ml_dtypes.bfloat16,
  "BOOL": np.bool_,
  "F16": np.float16,
  "F32": np.float32,
  "F64": np.float64,
  "I8": np.int8,
  "I16": np.int16,
  "I32": np.int32,
  "I64": np.int64,
  "U8": np.uint8,
  "U16": np.uint16,
  "U32": np.uint32,
  "U64": np.uint64,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before PyTorch 1.6: the first of several pickles
_MOST_REPEATED = 1 << 24  # values of a tensor that repeats a smaller storage (`torch.Tensor.expand`)
_NOT_WEIGHTS = {
  b"version https://git-lfs": "is a Git LFS pointer in place of the file: run git lfs pull",
  b"<": "is a web page: download the file itself",
}


def read(path: str | os.PathLike) -> dict[str, Any]:
  """Reads a weight file as it is: a dict, nested as the file is, whose tensors are NumPy arrays.

  Args:
    path: a .safetensors file, a PyTorch file of any version, or the index of a file that was cut into shards
      (`*.index.json`). The contents decide, not the name.

  Returns:
    The contents. Arrays may be read-only and may share memory, as the file's tensors do; bfloat16 is `ml_dtypes`'.

  Raises:
    UserError: the file is missing, truncated or something else, or it holds more than tensors and plain values; the
      name of what it wanted is in the text.
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      found = _read(path, file)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error
  except UserError as error:
    raise UserError(f"{path} {error}") from error
  except Exception as error:  # A damaged pickle can raise any exception.
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    raise UserError(f"{path} cannot be read as weights, it may be truncated ({why}): download it again.") from error
  if not isinstance(found, dict):
    raise UserError(
      f"{path} holds a {type(found).__name__} and no dict of tensors. Save a model's tensors alone, where it was made: "
      "torch.save(model.state_dict(), FILE)."
    )
  return found


def _read(path, file):
  head = file.read(512)
  file.seek(0)
  # First, since the length that it begins with can be any bytes, those of the others too.
  if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= os.fstat(file.fileno()).st_size - 8:
    return _read_safetensors(file)
  for start, what in _NOT_WEIGHTS.items():
    if head.lstrip().startswith(start):
      raise UserError(f"{what}.")
  if head[:2] == b"PK":
    return _read_zip(file)
  if head[:1] == b"\x80":
    return _read_legacy(file)
  if head[:1] == b"{" and path.name.endswith(".index.json"):
    return _read_shards(path, json.load(file))
  raise ValueError("it is neither a .safetensors nor a PyTorch file")


def _read_safetensors(file):
  found = {}
  for name, tensor in sorted(safetensors.deserialize(file.read()), key=lambda x: x[0]):  # they come in any order
    if tensor["dtype"] not in _SAFETENSORS:
      raise UserError(f"has {name} of type {tensor['dtype']}; known are {', '.join(_SAFETENSORS)}.")
    found[name] = np.frombuffer(tensor["data"], _SAFETENSORS[tensor["dtype"]]).reshape(tensor["shape"])
  return found


def _read_shards(path, index):
  found = {}
  for name in sorted(set(index["weight_map"].values())):
    if pathlib.PurePath(name).name != name:
      raise UserError(f"names a shard outside its folder: {name!r}.")
    found |= read(path.parent / name)
  return found


def _read_zip(file):
  with zipfile.ZipFile(file) as archive:
    names = archive.namelist()
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise UserError("is a zip file, but not one of PyTorch's: it has no data.pkl.")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names:
      raise UserError("is a TorchScript program: save its tensors alone, torch.save(program.state_dict(), FILE).")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
      raise UserError("is compressed, which PyTorch's own files never are.")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
      raise UserError("was written on a big-endian machine: save it again on another one.")

    def storage(key, dtype, count):
      return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

    return _unpickle(io.BytesIO(archive.read(pickles[0])), storage)


def _read_legacy(file):
  """The format before PyTorch 1.6: pickles one after the other, then the storages in the order of a list of keys."""
  size, storages = os.fstat(file.fileno()).st_size, {}

  def storage(key, dtype, count):  # its bytes come last, after the tensors that look at them
    if count * np.dtype(dtype).itemsize > size:
      raise ValueError(f"storage {key} is larger than the file")
    return storages.setdefault(key, np.zeros(count, dtype))

  if _unpickle(file, storage) != _LEGACY_MAGIC:
    raise UserError("is a pickle, but not one of PyTorch's.")
  _, system = (_unpickle(file, storage) for _ in range(2))  # version, facts of the machine
  if not system.get("little_endian", True):
    raise UserError("was written on a big-endian machine: save it again on another one.")
  found = _unpickle(file, storage)
  for key in _unpickle(file, storage):
    count = int.from_bytes(file.read(8), "little")
    if count != len(storages[key]):
      raise ValueError(f"storage {key} has {count} values in place of {len(storages[key])}")
    storages[key][:] = np.frombuffer(file.read(storages[key].nbytes), storages[key].dtype, count)
  return found


def _unpickle(file, storage):
  """Reads one pickle, after a look at its operations: Python gets as much memory as a damaged one happens to name."""
  start = file.tell()
  for count, (operation, value, _) in enumerate(pickletools.genops(file)):
    if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and value > count:
      raise ValueError(f"it has an entry {value} after {count} operations")
  file.seek(start)
  return _Unpickler(file, storage).load()


class _Unpickler(pickle.Unpickler):
  """Knows what plain tensors are made of; `storage(key, dtype, count)` gives a one-dimensional array."""

  def __init__(self, file, storage):
    super().__init__(file, encoding="utf-8")
    self.storage, self.arrays = storage, {}
    # Made anew for every file: a pickle can set attributes of what it is given.
    known = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("argparse", "Namespace"): type("Namespace", (types.SimpleNamespace,), {}),
      ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
      ("torch._utils", "_rebuild_parameter"): self.parameter,
      ("torch", "Size"): self.size,
      ("_codecs", "encode"): self.encode,  # how protocol 2 writes the bytes of NumPy's scalars
    }
    known[("numpy", "dtype")] = self.dtype
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
      known[(module, "scalar")] = self.scalar
    self.known = known

  def find_class(self, module, name):
    if module == "torch" and name in _STORAGES:
      return name
    if (module, name) not in self.known:
      raise UserError(
        f"wants {module}.{name}, and only tensors and plain values are read: the rest would run code of the file. If "
        "you trust it, save its tensors alone where PyTorch is: torch.save(torch.load(FILE, weights_only=False)"
        "['state_dict'], NEW_FILE), with the name of the part that holds them."
      )
    return self.known[module, name]

  def persistent_load(self, given):
    kind, storage_type, key, _, count, *view = given
    if kind != "storage" or storage_type not in _STORAGES or not isinstance(key, str) or "/" in key:
      raise ValueError(f"it has a storage of the unknown type {storage_type!r}")
    if view and view[0] is not None:
      raise UserError("has storages that are parts of others: load it and save it again with PyTorch 1.6 or later.")
    if key not in self.arrays:
      self.arrays[key] = self.storage(key, _STORAGES[storage_type], count)
    return self.arrays[key]

  def tensor(self, storage, offset, shape, strides, *_):
    """A view of its storage, checked to lie within it."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or len(shape) != len(strides):
      raise ValueError("it has a tensor without a storage")
    if min((offset, *shape, *strides), default=0) < 0:
      raise ValueError("it has a tensor with a negative stride")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > max(len(storage), _MOST_REPEATED):
      raise ValueError(f"it has a tensor of {list(shape)} out of {len(storage)} values")
    if 0 in shape:
      return np.zeros(shape, storage.dtype)
    if last >= len(storage):
      raise ValueError(f"it has a tensor of {list(shape)} beyond its storage of {len(storage)} values")
    steps = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)

  def parameter(self, data, *_):
    return data

  def size(self, shape):
    return tuple(shape)

  def encode(self, text, encoding):
    if encoding not in ("latin1", "latin-1"):
      raise ValueError(f"it has bytes in {encoding!r}")
    return text.encode("latin1")

  def dtype(self, name, *_):
    return _Scalar(name)

  def scalar(self, kind, value):
    return np.frombuffer(value, f"{kind.order}{kind.name}", 1)[0]


class _Scalar:
  """What is kept of a `numpy.dtype`, whose own state a pickle could break."""

  def __init__(self, name):
    if not isinstance(name, str) or name[:1] not in set("biuf") or not name[1:].isdigit():
      raise ValueError(f"it has a NumPy scalar of type {name!r}")
    self.name, self.order = name, "<"

  def __setstate__(self, state):
    self.order = ">" if state[1] == ">" else "<"
