"""Weights to PyTorch and back: nothing is lost, nothing is taken silently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ssl_jax import convert
from ssl_jax.models import resnet
from ssl_jax.models.heads import Network, SimCLRProjector


@pytest.fixture(scope="module")
def variables():
  """A ResNet-18 with a projector; every entry random, so that no two can be confused."""
  network = Network(resnet.resnet18(), SimCLRProjector(hidden=24, features=16))
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=True))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture
def state_dict(variables):
  return convert.to_torch(variables)


def torchvision_resnet18_names():
  """The keys of torchvision.models.resnet18().state_dict() without fc.*, spelled by their rule."""

  def norm(name):
    return [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]

  names = ["conv1.weight", *norm("bn1")]
  for layer in range(1, 5):
    for block in range(2):
      base = f"layer{layer}.{block}"
      names += [f"{base}.conv1.weight", *norm(f"{base}.bn1"), f"{base}.conv2.weight", *norm(f"{base}.bn2")]
      if layer > 1 and block == 0:
        names += [f"{base}.downsample.0.weight", *norm(f"{base}.downsample.1")]
  return names


def test_the_names_are_torchvisions(state_dict):
  names = torchvision_resnet18_names()
  assert len(names) == 100  # 122 entries, less 20 num_batches_tracked and fc's 2
  assert {name for name in state_dict if name.startswith("encoder.")} == {f"encoder.{name}" for name in names}


def test_the_projectors_names_are_the_places_in_a_sequential(state_dict):
  got = {name: value.shape for name, value in state_dict.items() if name.startswith("projector.")}
  norm = {"weight": (24,), "bias": (24,), "running_mean": (24,), "running_var": (24,)}
  assert got == {
    "projector.0.weight": (24, 512),
    **{f"projector.1.{leaf}": shape for leaf, shape in norm.items()},
    "projector.3.weight": (16, 24),
    **{f"projector.4.{leaf}": (16,) for leaf in norm if leaf != "bias"},
  }


def test_kernels_go_from_hwio_to_oihw_and_matrices_are_transposed(variables, state_dict):
  params = variables["params"]
  kernel, weight = params["encoder"]["layer2_0"]["conv1"]["kernel"], state_dict["encoder.layer2.0.conv1.weight"]
  assert kernel.shape == (3, 3, 64, 128)
  assert weight.shape == (128, 64, 3, 3)
  assert kernel[0, 2, 5, 7] == weight[7, 5, 0, 2]
  matrix, weight = params["projector"]["linear1"]["kernel"], state_dict["projector.0.weight"]
  assert matrix[5, 7] == weight[7, 5]


def test_there_and_back_is_exact(variables, state_dict):
  back = convert.from_torch(state_dict, variables)
  flat, want = (traverse_util.flatten_dict(tree) for tree in (back, variables))
  assert flat.keys() == want.keys()
  for path, value in want.items():
    assert flat[path].dtype == value.dtype
    np.testing.assert_array_equal(flat[path], value, err_msg="/".join(path))


def test_shapes_alone_are_enough_to_fill(variables, state_dict):
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
  jax.tree.map(np.testing.assert_array_equal, convert.from_torch(state_dict, shapes), variables)


def test_the_models_dtype_wins(variables, state_dict):
  wide = {name: value.astype(np.float64) for name, value in state_dict.items()}
  assert {leaf.dtype for leaf in jax.tree.leaves(convert.from_torch(wide, variables))} == {np.dtype(np.float32)}


def test_a_prefix_picks_one_model_out_of_a_checkpoint(variables):
  both = convert.to_torch(variables, prefix="module.encoder_q.")
  assert all(name.startswith("module.encoder_q.") for name in both)
  both |= {name.replace("encoder_q", "encoder_k"): value + 1 for name, value in both.items()} | {"epoch": np.array(3)}
  got = convert.from_torch(both, variables, prefix="module.encoder_q.")
  jax.tree.map(np.testing.assert_array_equal, got, variables)


def test_counters_of_batches_are_ignored(variables, state_dict):
  tracked = {name.replace("running_var", "num_batches_tracked"): np.array(7) for name in state_dict}
  got = convert.from_torch(state_dict | {k: v for k, v in tracked.items() if k not in state_dict}, variables)
  jax.tree.map(np.testing.assert_array_equal, got, variables)


def test_missing_unexpected_and_mismatched_entries_are_all_named(variables, state_dict):
  state_dict["fc.weight"] = np.zeros((10, 512))
  del state_dict["encoder.bn1.bias"]
  state_dict["encoder.conv1.weight"] = np.zeros((64, 3, 3, 3))
  with pytest.raises(ValueError, match="does not fit") as error:
    convert.from_torch(state_dict, variables)
  text = str(error.value)
  assert "1 missing from the state dict: encoder.bn1.bias." in text
  assert "1 unexpected in the state dict: fc.weight." in text
  assert "1 of another shape: encoder.conv1.weight: file (64, 3, 3, 3), model (64, 3, 7, 7)." in text


def test_at_most_ten_of_a_kind_are_named_and_all_are_counted(variables, state_dict):
  with pytest.raises(ValueError, match="does not fit") as error:
    convert.from_torch({f"module.{name}": value for name, value in state_dict.items()}, variables)
  text = str(error.value)
  total = len(state_dict)
  assert f"{total} missing" in text
  assert f"{total} unexpected" in text
  assert text.count(f" and {total - 10} more") == 2
  assert text.count("module.") == 10


def test_one_renamed_key_of_another_size_does_not_load_partially(variables, state_dict):
  state_dict["encoder.layer4.1.bn2.gamma"] = state_dict.pop("encoder.layer4.1.bn2.weight")
  with pytest.raises(ValueError, match=r"missing.*layer4\.1\.bn2\.weight.*unexpected.*layer4\.1\.bn2\.gamma"):
    convert.from_torch(state_dict, variables)


def test_a_matrix_where_a_kernel_belongs_is_of_another_shape(variables, state_dict):
  name = "encoder.layer2.0.downsample.0.weight"
  state_dict[name] = state_dict[name][:, :, 0, 0]
  with pytest.raises(ValueError, match=r"file \(128, 64\), model \(128, 64, 1, 1\)"):
    convert.from_torch(state_dict, variables)
