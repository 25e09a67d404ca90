"""Weights of official files, other libraries and our own runs: all of them or an error, with features that agree."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_files
from named_weights import named_images, named_weight
from trajectories import error, named_variables

import ssl_jax
from ssl_jax import convert, load_weights, restore
from ssl_jax.augment import EvaluationView
from ssl_jax.errors import UserError
from ssl_jax.models import resnet, vit
from ssl_jax.models.heads import DINOHead
from ssl_jax.weights import export, layouts

DINO = vit.ViT(patch_size=8, dim=48, depth=3, heads=3, image_size=32)
TINY_RESNET = resnet.ResNet(stages=(1, 2), width=0.125)
TINY_VIT = vit.ViT(patch_size=4, dim=24, depth=2, heads=3, image_size=16)


def weights(g, prefix="w/"):
  return {name.removeprefix(prefix): g[name] for name in g.files if name.startswith(prefix)}


def save(folder, state, **config):
  folder.mkdir(exist_ok=True)
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(x) for name, x in state.items()}, folder / "model.safetensors"
  )
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def features(model, variables, images):
  return jax.jit(functools.partial(model.apply, train=False))(variables, images)


@pytest.fixture
def dino(golden, tmp_path):
  """A checkpoint as main_dino.py saves it, and the recorded features of its teacher."""
  g = golden("dino_vit")
  teacher, head = weights(g), weights(golden("dino_head"))
  tree = {
    "student": {f"module.backbone.{name}": x + 1 for name, x in teacher.items()},
    "teacher": {f"backbone.{name}": x for name, x in teacher.items()} | {f"head.{name}": x for name, x in head.items()},
    "optimizer": {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}},
    "epoch": 100,
    "args": torch_files.Call(torch_files.Global("argparse", "Namespace"), ()),
    "dino_loss": {"center": np.ones((1, 96), np.float32)},
  }
  return torch_files.save(tmp_path / "checkpoint.pth", tree), g


def test_dinos_checkpoint_gives_the_teacher_and_the_rest_beside_it(dino, golden):
  path, g = dino
  loaded = load_weights(path, DINO)
  assert error(features(DINO, loaded.variables, g["images32"]), g["cls32"]) < 1e-5
  student = load_weights(path, DINO, take="student").variables
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), student, loaded.variables)
  assert loaded.extra["dino_loss.center"].shape == (1, 96)
  head, h = DINOHead(hidden=64, bottleneck=24, prototypes=96), golden("dino_head")
  shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), jnp.zeros((1, 48))))
  variables = convert.from_torch(loaded.extra, shapes, prefix="teacher.head.")
  assert error(head.apply(variables, h["x"]), h["y"]) < 1e-5
  text = "\n".join(loaded.report)
  assert "left out: optimizer" in text and "read teacher.backbone.*" in text
  assert "not loaded, in extra: teacher.head.*, 8 arrays" in text


DINOV2 = vit.ViT(patch_size=4, dim=48, depth=3, heads=3, image_size=16, layer_scale=1e-5, mask_token=True)
WITH_REGISTERS = DINOV2.clone(registers=4, resize="antialiased", ffn="swiglu")


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def dinov2_file(folder, g, variant, rename=""):
  """The weights alone, as released, or the teacher of a training run, whose blocks are in chunks."""
  state = {}
  for name, shape in zip(g[f"{variant}/param_names"], g[f"{variant}/param_shapes"], strict=True):
    value = named_weight(f"dinov2_vit/{variant}/{name}", tuple(map(int, re.findall(r"\d+", shape))))
    state[re.sub(r"^blocks\.", rename, str(name)) if rename else str(name)] = value
  if rename:
    head = {"dino_head.last_layer.weight_g": np.ones((8, 1), np.float32)}
    state = {"teacher": {f"backbone.{name}": x for name, x in state.items()} | head, "iteration": 9}
  return torch_files.save(folder / f"{variant}.pth", state)


@pytest.mark.parametrize(
  "variant, model, rename", [slow("plain_mlp", DINOV2, ""), ("reg4_swiglu", WITH_REGISTERS, "blocks.0.")]
)
def test_dinov2s_files_give_the_official_tokens_with_and_without_masks(golden, tmp_path, variant, model, rename):
  g = golden("dinov2_vit")
  path = dinov2_file(tmp_path, g, variant, rename)
  loaded = load_weights(path, model)
  tokens = jax.jit(functools.partial(model.apply, method="tokens"))
  images, want = named_images("dinov2_vit/images_native", (2, 16, 16, 3)), f"{variant}/masked_native"
  got = tokens(loaded.variables, images, masked=g[f"{want}/mask"])
  assert error(got[:, 0], g[f"{want}/cls"]) < 1e-5 and error(got[:, -16:], g[f"{want}/patches"]) < 1e-5
  larger = load_weights(path, model.clone(image_size=24), resize_positions=True)
  resized = larger.variables["params"]["pos_embed"]
  assert error(resized[0, 1:], g[f"{variant}/larger/position_patches"]) < 1e-6
  where = "teacher.backbone.* of " if rename else ""
  assert f"read {where}{path}, in the layout of DINOv2{' with registers' if rename else ''}: " in loaded.report[0]
  assert loaded.extra.keys() == ({"teacher.dino_head.last_layer.weight_g"} if rename else set()), loaded.extra


def test_a_mask_token_is_beside_where_the_model_has_none_and_zeros_where_the_file_has_none(golden, tmp_path):
  path = dinov2_file(tmp_path, golden("dinov2_vit"), "plain_mlp")
  loaded = load_weights(path, DINOV2.clone(mask_token=False))
  assert loaded.extra.keys() == {"mask_token"} and "not loaded, in extra: mask_token" in loaded.report
  state = layouts.whole_state(DINOV2.clone(mask_token=False), loaded.variables)
  safetensors.numpy.save_file(state, tmp_path / "without.safetensors")
  loaded = load_weights(tmp_path / "without.safetensors", DINOV2)
  assert not loaded.variables["params"]["mask_token"].any()
  assert "mask token: there is none, and the model's is zeros, as DINOv2 begins" in loaded.report


@pytest.mark.parametrize(
  "variant, model, wrong", [("plain_mlp", DINOV2, "antialiased"), ("reg4_swiglu", WITH_REGISTERS, "offset")]
)
def test_a_model_that_resizes_positions_otherwise_than_dinov2s_is_told(golden, tmp_path, variant, model, wrong):
  report = load_weights(dinov2_file(tmp_path, golden("dinov2_vit"), variant), model.clone(resize=wrong)).report
  assert f"registers have resize='{model.resize}', and this one has '{wrong}'" in report[0]


LIBRARIES = {  # as make_dinov2_models.py made them
  "dinov2": ("transformers' Dinov2Model", dict(mask_token=True)),
  "dinov2_with_registers": (
    "transformers' Dinov2WithRegistersModel",
    dict(mask_token=True, registers=3, ffn="swiglu", resize="antialiased"),
  ),
  "timm_reg": ("timm's DINOv2 with registers, where", dict(registers=3, ffn="swiglu", resize="antialiased")),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_other_libraries_dinov2_gives_their_features_and_goes_back_bit_for_bit(golden, tmp_path, name):
  g, (layout, parts) = golden("dinov2_models"), LIBRARIES[name]
  model = vit.ViT(patch_size=4, dim=24, depth=1, heads=3, image_size=16, layer_scale=1e-5, **parts)
  state = {
    str(key): named_weight(f"{name}/{key}", tuple(map(int, re.findall(r"\d+", shape))))
    for key, shape in zip(g[f"{name}/names"], g[f"{name}/shapes"], strict=True)
  }
  loaded = load_weights(save(tmp_path / "in", state), model)
  assert f", in the layout of {layout}" in loaded.report[0] and not loaded.extra
  assert error(features(model, loaded.variables, named_images(name, (2, 16, 16, 3))), g[f"{name}/features"]) < 1e-5
  view = EvaluationView(20, 16, mean=(0.5,) * 3, std=(0.2,) * 3)
  target = "timm" if name == "timm_reg" else "hf"
  again = export.make(model, loaded.variables, view, target, channels=3, facts={}).state
  assert again.keys() == state.keys() and all(np.array_equal(again[key], state[key]) for key in state)


def test_maes_file_fits_its_fixed_positions_and_no_other(golden, tmp_path):
  g = golden("mae")
  path = torch_files.save(tmp_path / "mae.pth", {"model": weights(g)})
  shape = dict(patch_size=8, dim=32, depth=int(g["depth"]), heads=int(g["num_heads"]), image_size=32)
  loaded = load_weights(path, vit.ViT(**shape, positions="column_first"))
  assert "pos_embed" not in loaded.variables["params"]
  assert {name.split(".")[1] for name in loaded.extra} >= {"mask_token", "decoder_embed", "decoder_blocks"}
  for positions, text in (("row_first", "fixed column_first"), ("learned", None)):
    model = vit.ViT(**shape, positions=positions)
    if text:
      with pytest.raises(UserError, match=f"positions are {text}: give the model positions='column_first'"):
        load_weights(path, model)
    else:
      np.testing.assert_array_equal(load_weights(path, model).variables["params"]["pos_embed"], g["w/pos_embed"])


def test_learned_positions_do_not_go_into_a_model_of_fixed_ones(dino):
  path, _ = dino
  with pytest.raises(UserError, match="positions are learned: give the model positions='learned'"):
    load_weights(path, DINO.clone(positions="row_first"))


def test_mocos_files_give_the_query_encoder_and_the_queue_beside_it(tmp_path):
  model = TINY_RESNET
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
  names = {name: x.shape for name, x in convert.to_torch(jax.tree.map(lambda x: np.empty(x.shape), shapes)).items()}
  query = {name: named_weight(f"resnet18/{name}", shape) for name, shape in names.items()}
  state = {f"module.encoder_q.{name}": x for name, x in query.items()}
  state |= {f"module.encoder_k.{name}": x + 1 for name, x in query.items()}
  state |= {"module.encoder_q.fc.0.weight": np.ones((2, 2), np.float32), "module.queue": np.ones((8, 4), np.float32)}
  state["module.encoder_q.bn1.num_batches_tracked"] = np.array(7)
  path = torch_files.save(tmp_path / "moco.pth.tar", {"epoch": 200, "arch": "resnet18", "state_dict": state})
  loaded = load_weights(path, model)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, convert.from_torch(query, shapes))
  key = load_weights(path, model, take="encoder_k").variables
  np.testing.assert_array_equal(key["params"]["conv1"]["kernel"], loaded.variables["params"]["conv1"]["kernel"] + 1)
  assert {"state_dict.module.queue", "state_dict.module.encoder_q.fc.0.weight"} <= loaded.extra.keys()


@pytest.mark.parametrize("name, model", [("vit", TINY_VIT), ("resnet", TINY_RESNET)])
def test_hugging_faces_folders_give_their_features(golden, tmp_path, name, model):
  g = golden("hf_models")
  folder = save(tmp_path / "hf", weights(g, f"{name}/"), model_type=name, layer_norm_eps=1e-6)
  loaded = load_weights(folder, model)
  images = named_images(name, (2, 16, 16, 3))
  assert error(features(model, loaded.variables, images), g[f"{name}_features"]) < 1e-5
  assert loaded.extra.keys() == ({"pooler.dense.weight", "pooler.dense.bias"} if name == "vit" else set())


def test_a_folder_may_hold_pytorchs_own_file_and_one_of_two_is_not_guessed(golden, tmp_path):
  state = {name: x for name, x in weights(golden("hf_models"), "vit/").items() if x.ndim}
  torch_files.save(tmp_path / "pytorch_model.bin", state)
  (tmp_path / "training_args.bin").write_bytes(b"")
  loaded = load_weights(tmp_path, TINY_VIT)
  want = state["embeddings.position_embeddings"]
  np.testing.assert_array_equal(loaded.variables["params"]["pos_embed"], want)
  (tmp_path / "pytorch_model.bin").rename(tmp_path / "last.pth")
  with pytest.raises(UserError, match=r"holds last\.pth, training_args\.bin: give one file"):
    load_weights(tmp_path, TINY_VIT)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_hugging_faces_names_there_and_back(golden, name):
  state = {k: v for k, v in weights(golden("hf_models"), f"{name}/").items() if "pooler" not in k and v.ndim}
  there, back = (getattr(layouts, f"{name}_{way}_hf") for way in ("from", "to"))
  again = back(there(state))
  assert again.keys() == state.keys() and all(np.array_equal(again[key], state[key]) for key in state)


def test_what_a_config_says_and_weights_do_not_show_is_compared(golden, tmp_path):
  state = weights(golden("hf_models"), "vit/")
  folder = save(tmp_path / "hf", state, model_type="vit", num_attention_heads=6)
  with pytest.raises(UserError, match="num_attention_heads=6, and the model has 3"):
    load_weights(folder, TINY_VIT)
  assert "layer_norm_eps 1e-12" in load_weights(save(folder, state, model_type="vit"), TINY_VIT).report[0]


def test_positions_of_another_size_say_the_way_out_and_are_resized_on_request(dino):
  path, g = dino
  other = DINO.clone(image_size=48)
  with pytest.raises(UserError, match=r"32 pixels, 4x4 .*image_size=48, 6x6 .*Keep image_size=32.*resize_positions"):
    load_weights(path, other)
  loaded = load_weights(path, other, resize_positions=True)
  assert "positions: interpolated from 4x4 to 6x6 patches" in loaded.report
  assert error(features(other, loaded.variables, g["images48"]), g["cls48"]) < 1e-5


@pytest.mark.parametrize("channels, want", [(1, [0, 1, 2]), (2, [0, 1]), (5, [0, 1, 2, 0, 1])])
def test_other_channels_are_made_by_timms_rule(golden, tmp_path, channels, want):
  g = golden("hf_models")
  folder = save(tmp_path / "hf", weights(g, "resnet/"))
  loaded = load_weights(folder, TINY_RESNET, channels=channels)
  rgb = g["resnet/embedder.embedder.convolution.weight"].transpose(2, 3, 1, 0)[:, :, want]
  rule = rgb.sum(2, keepdims=True) if channels == 1 else rgb * (3 / channels)
  np.testing.assert_allclose(loaded.variables["params"]["conv1"]["kernel"], rule, rtol=1e-6)
  assert f"channels: 3 made into {channels} by timm's rule" in loaded.report
  with pytest.raises(UserError, match="weights of 2 channels cannot be made into 3"):
    layouts.with_channels(np.zeros((8, 2, 7, 7), np.float32), 3)


def test_what_does_not_fit_is_an_error_that_names_it_and_both_models(golden, tmp_path):
  state = weights(golden("dino_vit"))
  path = tmp_path / "x.safetensors"

  def refused(state, model, text):
    safetensors.numpy.save_file(state, path)
    with pytest.raises(UserError, match=text):
      load_weights(path, model)

  both = r"holds ViT\(patch_size=8, dim=48, depth=3, mlp_ratio=4, image_size=32\), and the model is ViT\(patch_size="
  refused(state, DINO.clone(depth=2), both + "8, dim=48, depth=2.*unexpected")
  refused(state, DINO.clone(depth=4), "missing")
  refused(state, DINO.clone(patch_size=4, image_size=16), r"patch_embed.proj.weight: file \(48, 3, 8, 8\), model")
  refused(state, TINY_RESNET, "holds no ResNet that is known here, but a ViT")
  refused({"w": np.zeros(2, np.float32)}, DINO, "holds no ViT that is known here, but names that begin with w")
  refused(state | {"blocks.0.ls1.gamma": np.ones(48, np.float32)}, DINO, "layer_scale=1e-05.*1 unexpected .*ls1.gamma")
  refused({k: v for k, v in state.items() if k != "norm.bias"}, DINO, "1 missing .*norm.bias")
  refused({k: v for k, v in state.items() if k != "pos_embed"}, DINO, "missing.*positions='row_first'")
  refused(state | {"cls_token": np.full((1, 1, 48), np.nan, np.float32)}, DINO, "not finite, in cls_token")
  refused(
    state | {"cls_token": np.zeros((1, 1, 48), np.int64)}, DINO, "whole numbers where weights belong, in cls_token"
  )
  safetensors.numpy.save_file(state, path)
  with pytest.raises(UserError, match="holds one encoder, with nothing in front of its names: leave take out, got 'x'"):
    load_weights(path, DINO, take="x")
  flat = state["patch_embed.proj.weight"].reshape(48, -1)
  refused(state | {"patch_embed.proj.weight": flat}, DINO, r"patch embedding \(48, 192\) is no convolution")
  two = {f"{word}.{name}": x for word in "ab" for name, x in state.items()}
  refused(two, DINO, r"holds the encoders a\.\*, b\.\*: name one")
  with pytest.raises(TypeError, match="must be a ViT or a ResNet"):
    load_weights(path, DINOHead())
  with pytest.raises(UserError, match=r"holds no weight file: give one file, a folder with model\.safetensors"):
    (tmp_path / "empty").mkdir()
    load_weights(tmp_path / "empty", DINO)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, model, part, prefix, images, key",
  [
    ("dino_vit_small16", vit.vit_small(patch_size=16), "teacher", "backbone.", "images224", "cls224"),
    (
      "moco_v3_vit_small",
      vit.vit_small(patch_size=16, heads=12, positions="row_first"),
      "state_dict",
      "module.base_encoder.",
      "images",
      "features",
    ),
    ("resnet50", resnet.resnet50(), "state_dict", "module.encoder_q.", "images", "eval"),
  ],
)
def test_full_size_official_files_give_the_official_features(golden, tmp_path, name, model, part, prefix, images, key):
  side, count = (96, 4) if name == "resnet50" else (224, 2)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))
  state = layouts.whole_state(model, named_variables(shapes, "", {}, jnp.float32))
  tree = {part: {prefix + entry: value for entry, value in state.items()}, "epoch": 1}
  variables = load_weights(torch_files.save(tmp_path / "x.pth", tree), model).variables
  drawn = named_images(f"{name}/{images}", (count, side, side, 3))
  assert error(features(model, variables, drawn), golden("official_models")[f"{name}/{key}"]) < 1e-4


def test_a_runs_encoder_comes_with_the_rest_of_its_checkpoint(unbroken):
  run = restore.restore_run(unbroken[0])
  loaded = ssl_jax.load_weights(unbroken[0], run.encoder)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, run.method.encoder(run.params, run.state))
  head = loaded.extra["params.projector.linear1.kernel"]
  np.testing.assert_array_equal(head, run.params["projector"]["linear1"]["kernel"])
  assert f"the encoder of step 20 of {unbroken[0]}, a run of simclr" in loaded.report[0]
