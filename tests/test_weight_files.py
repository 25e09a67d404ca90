"""Weight files are read without PyTorch, as PyTorch wrote them, and none of their code runs."""

import json
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_files import Call, Global, Tensor, save

from ssl_jax.errors import UserError
from ssl_jax.weights import files

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = ("torch_zip.pth", "torch_legacy.pth")  # torch.save of PyTorch 2.13, in both of its formats


@pytest.mark.parametrize("name", FILES)
def test_tensors_of_every_type_and_stride_are_pytorchs(golden, name):
  want, got = golden("torch_tensors"), files.read(GOLDEN / name)["state_dict"]
  assert got.keys() == set(want.files)
  for key in want.files:
    np.testing.assert_array_equal(np.asarray(got[key], np.float32), want[key], err_msg=key, strict=True)
  types = {key: got[key].dtype.name for key in ("f16", "bf16", "f64", "i64", "i32", "i16", "i8", "u8", "b")}
  assert list(types.values()) == ["float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("name", FILES)
def test_plain_values_beside_the_tensors_are_read(name):
  got = files.read(GOLDEN / name)
  assert vars(got["args"]) == {"lr": 0.1, "name": "x"}  # an argparse.Namespace, as DINO and MAE save it
  assert (got["epoch"], got["best"], got["n"], got["lst"], got["size"]) == (3, 1.5, 7, [1, (2, 3.0)], (1, 2))


def test_safetensors_are_read_and_put_together_from_shards(tmp_path):
  given = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int64)}
  safetensors.numpy.save_file({"a": given["a"]}, tmp_path / "1.safetensors")
  safetensors.numpy.save_file({"b": given["b"]}, tmp_path / "2.safetensors")
  index = tmp_path / "model.safetensors.index.json"
  index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
  got = files.read(index)
  for key, value in given.items():
    np.testing.assert_array_equal(got[key], value, strict=True)
  index.write_text('{"weight_map": {"a": "../1.safetensors"}}')
  with pytest.raises(UserError, match="shard outside its folder"):
    files.read(index)


@pytest.mark.parametrize("length", [0x80, 0x3C, 0x4B50, 0x200A])
def test_safetensors_may_begin_with_any_bytes(tmp_path, length):
  value = np.array([1.5, -2], ml_dtypes.bfloat16)
  header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
  header += b" " * (length - len(header) if length > len(header) else 0)
  (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + value.tobytes())
  np.testing.assert_array_equal(files.read(tmp_path / "x")["x"], value, strict=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_call_a_function_is_refused_with_its_name_and_calls_nothing(tmp_path, legacy):
  call = Call(Global("os", "mkdir"), (str(tmp_path / "called"),))
  path = save(tmp_path / "evil.pth", {"state_dict": {"w": np.zeros(2, np.float32)}, "extra": call})
  if legacy:
    path.write_bytes(b"\x80\x02cos\nmkdir\n" + pickle.dumps((str(tmp_path / "called"),), 2)[2:-1] + b"R.")
  with pytest.raises(UserError, match=r"evil\.pth wants os\.mkdir.*torch\.save"):
    files.read(path)
  assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
  "tensor",
  [(1, (3, 2), (2, 1)), (0, (2, 2), (5, 1)), (0, (2,), (-1,)), (-1, (2,), (1,)), (0, (2, 2), (1,))],
  ids=["offset", "stride", "negative stride", "negative offset", "too few strides"],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, tensor):
  path = save(tmp_path / "x.pth", {"w": Tensor(np.zeros(6, np.float32), *tensor)})
  with pytest.raises(UserError, match=r"x\.pth cannot be read as weights"):
    files.read(path)


def test_a_file_gets_no_more_memory_than_its_size_asks_for(tmp_path):
  path = save(tmp_path / "x.pth", {"w": Tensor(np.zeros(2, np.float32), 0, (1 << 20, 1 << 20), (0, 1))})
  with pytest.raises(UserError, match=r"tensor of \[1048576, 1048576\] out of 2 values"):
    files.read(path)
  with zipfile.ZipFile(path, "w") as file:  # an entry of the memo with a number for which Python gets 64 GiB
    file.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\xff.")
  with pytest.raises(UserError, match="an entry 4294967295 after"):
    files.read(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_file_is_told_to_be_one(tmp_path, name, share):
  content = (GOLDEN / name).read_bytes()
  (tmp_path / "x.pth").write_bytes(content[: int(share * len(content))])
  with pytest.raises(UserError, match=r"x\.pth cannot be read as weights, it may be truncated"):
    files.read(tmp_path / "x.pth")


def test_a_flipped_bit_is_found(golden, tmp_path):
  content = bytearray((GOLDEN / FILES[0]).read_bytes())
  content[content.index(golden("torch_tensors")["f32"].tobytes())] ^= 1
  (tmp_path / "x.pth").write_bytes(content)
  with pytest.raises(UserError, match="cannot be read as weights"):
    files.read(tmp_path / "x.pth")


@pytest.mark.parametrize(
  "content, text",
  [
    (b"<!DOCTYPE html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    (b"", "neither a .safetensors nor a PyTorch file"),
    (pickle.dumps([1], 2), "not one of PyTorch's"),
    (None, "No such file"),
  ],
)
def test_other_files_are_told_apart(tmp_path, content, text):
  if content is not None:
    (tmp_path / "x").write_bytes(content)
  with pytest.raises(UserError, match=text):
    files.read(tmp_path / "x")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
  with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("archive/data.pkl", pickle.dumps({}, 2))
    file.writestr("archive/data/0", bytes(1 << 20))
  with pytest.raises(UserError, match="is compressed"):
    files.read(tmp_path / "x.pth")


def test_a_file_without_a_dict_says_how_to_save_one(tmp_path):
  with pytest.raises(UserError, match=r"holds a list .*model\.state_dict\(\)"):
    files.read(save(tmp_path / "x.pth", [np.zeros(2, np.float32)]))
