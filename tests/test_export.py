"""What a folder for other libraries holds; that they load it is shown by hand (test_weights_libraries.py)."""

import errno
import functools
import importlib.util
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from test_config import by_name, recipe

from ssl_jax import build, convert, load_weights, restore
from ssl_jax.augment import EvaluationView
from ssl_jax.commands import export as command
from ssl_jax.errors import UserError
from ssl_jax.methods import mae
from ssl_jax.models import resnet, vit
from ssl_jax.models.mae import MAEDecoder
from ssl_jax.run import cli, whole
from ssl_jax.weights import export, files, layouts, proof

VIEW = EvaluationView(20, 16, "bilinear", mean=(0.5,), std=(0.2,))
SHAPE = dict(patch_size=4, dim=24, depth=2, heads=3, image_size=16)
FIXED = vit.ViT(**SHAPE, positions="column_first", features="mean")
LEARNED = vit.ViT(**SHAPE)
TINY_RESNET = resnet.ResNet(stages=(1,), width=0.125)


def random(model, channels=1):
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, channels)), train=False))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def make(model, target, view=VIEW, **kwargs):
  variables = random(model, **kwargs)
  return variables, export.make(model, variables, view, target, channels=kwargs.get("channels", 1), facts={})


def test_fixed_positions_are_written_out_and_timm_is_told_where_the_mean_is_taken():
  _, made = make(FIXED, "timm")
  np.testing.assert_array_equal(made.state["pos_embed"], vit.sincos_positions(4, 4, 24, row_first=False))
  want = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4, in_chans=1)
  assert made.config["model_args"] == want | dict(global_pool="avg", fc_norm=False)
  images = made.config["pretrained_cfg"]
  assert (images["input_size"], images["mean"], images["std"]) == ([1, 16, 16], [0.5], [0.2])
  assert (images["interpolation"], math.floor(16 / images["crop_pct"])) == ("bilinear", 20)


def test_a_vit_with_parts_of_its_own_comes_back_as_the_model_card_has_it(tmp_path):
  model = vit.ViT(**SHAPE, registers=2, layer_scale=1e-5, ffn="swiglu", resize="antialiased", mask_token=True)
  variables, made = make(model, "safetensors")
  export.write(made, tmp_path / "out")
  again = eval(export.in_python(model), {"vit": vit})
  loaded = load_weights(tmp_path / "out", again).variables
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize(
  "parts, timm, hf",
  [
    ({}, "vit_base_patch16_224", "ViTModel"),
    (dict(layer_scale=0.1), "vit_base_patch14_dinov2", "Dinov2Model"),
    (dict(layer_scale=0.1, registers=2), "vit_base_patch14_reg4_dinov2", "Dinov2WithRegistersModel"),
    (dict(layer_scale=0.1, ffn="swiglu"), "vit_giant_patch14_dinov2", "Dinov2Model"),
  ],
)
def test_the_encoders_parts_decide_the_class_and_what_it_has_no_place_for_is_named(parts, timm, hf):
  model = vit.ViT(**{**SHAPE, "depth": 1}, mask_token=True, features="mean", **parts)
  variables, made = make(model, "timm")
  args, registers = made.config["model_args"], parts.get("registers", 0)
  assert made.config["architecture"] == timm and made.left_out == ("mask_token",)
  assert (args.get("init_values"), args.get("reg_tokens", 0)) == (parts.get("layer_scale"), registers)
  assert args["mlp_ratio"] == (2 * 64 / 24 if "ffn" in parts else 4)
  made = export.make(model, variables, VIEW, "hf", channels=1, facts={})
  assert made.config["architectures"] == [hf] and made.config.get("num_register_tokens", 0) == registers
  assert made.config.get("use_swiglu_ffn", False) == ("ffn" in parts)
  assert made.left_out == (() if parts else ("mask_token",))
  assert ("embeddings.mask_token" in made.state) == bool(parts)
  assert ("add_pooling_layer" in made.usage) == (not parts) and f"[:, {1 + registers}:].mean(1)" in made.usage


def test_timm_computes_the_width_of_a_swiglu_from_its_ratio_and_is_told_of_no_layer_scale():
  for dim in range(8, 2000, 8):
    for ratio in (2, 3.3, 4):
      _, args = export._timm_vit(vit.ViT(14, dim, 1, 1, mlp_ratio=ratio, ffn="swiglu"))
      assert int(dim * json.loads(json.dumps(args["mlp_ratio"]))) == 2 * vit.swiglu_width(dim, ratio)
  assert args["init_values"] == 0.0  # transformers reads None as the function's own


def test_a_norm_behind_the_pooling_is_timms_fc_norm_and_nothing_of_transformers():
  pooled = vit.ViT(**SHAPE, features="pooled")
  _, made = make(pooled, "timm")
  assert made.config["model_args"]["fc_norm"] and made.config["model_args"]["global_pool"] == "avg"
  assert "fc_norm.weight" in made.state and "norm.weight" not in made.state
  assert "before the pooling" in export.why_not(pooled, "hf", 3)


def test_positions_are_those_of_the_images_that_evaluation_sees():
  view = VIEW._replace(size=24, resize=24)
  variables, made = make(LEARNED, "hf", view)
  want = vit.interpolate_positions(jnp.asarray(variables["params"]["pos_embed"]), 6, 6)
  np.testing.assert_array_equal(made.state["embeddings.position_embeddings"], want)
  assert made.config["image_size"] == 24


def test_timm_resizes_to_the_same_side_from_its_share():
  for resize in range(1, 600):
    for size in {resize, max(1, resize * 7 // 8), max(1, resize // 3)}:
      share = export._crop_share(EvaluationView(resize, size))
      assert math.floor(size / json.loads(json.dumps(share))) == resize


def test_hugging_faces_names_and_shape(golden):
  _, made = make(LEARNED, "hf", channels=3)
  g = golden("hf_models")
  want = {k.removeprefix("vit/"): g[k].shape for k in g.files if k.startswith("vit/") and "pooler" not in k}
  assert {name: x.shape for name, x in made.state.items()} == want
  shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
  assert [made.config[key] for key in shape] == [24, 2, 3, 96, 1e-6]
  crop = made.preprocessor["size"], made.preprocessor["crop_size"], made.preprocessor["resample"]
  assert crop == ({"shortest_edge": 20}, {"height": 16, "width": 16}, 2)
  _, made = make(resnet.ResNet(stages=(1, 2), width=0.125), "hf", channels=3)
  assert made.state.keys() == {k.removeprefix("resnet/") for k in g.files if k.startswith("resnet/")}
  assert (made.config["hidden_sizes"], made.config["depths"], made.config["layer_type"]) == ([8, 16], [1, 2], "basic")


def test_torchvisions_names_there_and_back():
  variables, made = make(LEARNED, "torchvision", VIEW, channels=3)
  assert "encoder.layers.encoder_layer_1.self_attention.in_proj_weight" in made.state
  back = layouts.vit_from_torchvision(made.state)
  want = convert.to_torch(variables)
  assert back.keys() == want.keys() and all(np.array_equal(back[name], want[name]) for name in want)


@pytest.mark.parametrize(
  "model, target, text",
  [
    (resnet.resnet18(stem="small"), "timm", "a ResNet with the stem 'small'"),
    (resnet.resnet18(project_first=True), "hf", "project_first"),
    (resnet.resnet50(width=2), "timm", r"timm has no ResNet of stages=\(3, 4, 6, 3\), width=2"),
    (resnet.resnet50(), "torchvision", "take 3 channels, and the images have 1"),
    (FIXED, "torchvision", "gives the class token, and the features are 'mean'"),
    (LEARNED.clone(registers=2, ffn="swiglu"), "torchvision", "VisionTransformer has no registers or ffn"),
    (LEARNED.clone(registers=2), "hf", "Dinov2Model has layer_scale, and this encoder has none"),
    (LEARNED.clone(layer_scale=1.0, mlp_ratio=3.5), "hf", r"Dinov2Model takes a whole mlp_ratio, .* has 3\.5"),
  ],
)
def test_what_a_library_has_no_class_for_is_refused_with_the_reason(model, target, text):
  with pytest.raises(UserError, match=f"{text}.*--to=safetensors"):
    export.make(model, {}, VIEW, target, channels=1, facts={})
  assert not export.why_not(model, "safetensors", 1)


@pytest.mark.parametrize("target", export.TARGETS)
def test_a_folder_comes_back_as_it_was(tmp_path, target):
  variables, made = make(LEARNED, target, VIEW, channels=3)
  export.write(made, tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "out", LEARNED).variables, variables)


def test_a_mae_goes_out_with_its_decoder(tmp_path):
  decoder = MAEDecoder(16, dim=12, depth=1, heads=2)
  shapes = jax.eval_shape(mae.mae(FIXED, decoder).init, jax.random.key(0), (jnp.zeros((1, 1, 16, 16, 1)),))[0]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
  settings = ml_collections.ConfigDict(dict(mask_ratio=0.6, normalize_target=True))
  made = export.make_mae(FIXED, decoder, params, VIEW, settings=settings, channels=1, facts={})
  names = {name for name in made.state if name.startswith("decoder.") and "layers" not in name}
  parts = [f"decoder.decoder_{part}.{leaf}" for part in ("embed", "norm", "pred") for leaf in ("weight", "bias")]
  assert names == {"decoder.mask_token", "decoder.decoder_pos_embed", *parts}
  value = made.state["decoder.decoder_layers.0.attention.attention.value.weight"]
  np.testing.assert_array_equal(value, params["decoder"]["decoder_blocks_0"]["attn"]["qkv"]["kernel"].T[24:])
  assert (made.config["decoder_hidden_size"], made.config["mask_ratio"], made.config["norm_pix_loss"]) == (
    12,
    0.6,
    True,
  )
  export.write(made, tmp_path / "out")
  back = load_weights(tmp_path / "out", FIXED)
  jax.tree.map(np.testing.assert_array_equal, back.variables["params"], params["encoder"])
  assert "decoder.mask_token" in back.extra


def test_another_number_of_heads_than_the_exports_is_refused(tmp_path):
  for target in export.TARGETS:
    export.write(make(LEARNED, target, VIEW, channels=3)[1], tmp_path / target)
    with pytest.raises(UserError, match="heads"):
      load_weights(tmp_path / target, LEARNED.clone(heads=6))


def test_the_command_writes_what_a_run_evaluates_and_says_that_nothing_was_proven(unbroken, tmp_path, capsys):
  assert command.run(unbroken[0], tmp_path / "mine", None, None) == 0
  printed = capsys.readouterr().out
  assert "a ResNet with the stem 'patch': the arrays alone are written" in printed
  assert "nothing was proven: ssl_jax alone loads these arrays" in printed
  run = restore.restore_encoder(unbroken[0])
  jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "mine", run.encoder).variables, run.variables)
  text = (tmp_path / "mine" / "README.md").read_text()
  assert "by simclr on fashion_mnist_mini (train[:512], 512 images)" in text
  assert "the encoder, without the projector, after step 20 of 20 of 64 images" in text and "k-NN top-1" in text
  assert json.loads((tmp_path / "mine" / "config.json").read_text())["ssl_jax"]["figures"]["loss"] > 0
  assert files.read(tmp_path / "mine" / "model.safetensors")["conv1.weight"].dtype == np.float32


def test_a_folder_that_cannot_be_written_is_told_before_the_work(unbroken, tmp_path, monkeypatch):
  monkeypatch.setattr(export, "make", None)  # the work
  (tmp_path / "file").touch()
  for out in (pathlib.Path("/proc/x"), tmp_path / "file"):
    with pytest.raises(UserError, match=f"--out: {out}.* cannot be written: "):
      command.run(unbroken[0], out, None, None)


def test_features_that_differ_are_an_error(unbroken, tmp_path, monkeypatch):
  monkeypatch.setattr(cli, "say", lambda line: None)
  monkeypatch.setattr(proof, "prove", lambda *args: {"timm 1": float("nan")})
  with pytest.raises(UserError, match=r"outputs of timm 1 differ by more than 0\.0001: do not use"):
    command.run(unbroken[0], tmp_path / "mine", None, None)
  with pytest.raises(UserError, match="mine is not empty: take another --out"):
    command.run(unbroken[0], tmp_path / "mine", None, None)


@pytest.mark.parametrize("target", ["timm", "hf", "safetensors"])
def test_a_dinov2_run_goes_out_with_its_teachers_mask_token_where_that_has_a_place(
  tmp_path, monkeypatch, capsys, target
):
  config = recipe(by_name("dinov2_quickstart"))
  config.encoder.update(dim=12, depth=1, heads=3, layer_scale=1e-5, ffn="swiglu")
  method, encoder = build.method_of(config, 10, 10)
  views = [jax.ShapeDtypeStruct((n, 1, size, size, 1), jnp.float32) for n, size in ((2, 28), (4, 16))]
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(method.init, jax.random.key(0), tuple(views))
  params, state = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
  run = restore.RestoredRun(method, encoder, params, state, 9, config, lambda: None)
  monkeypatch.setattr(restore, "restore_run", lambda *args: run)
  monkeypatch.setattr(command, "real_images", lambda config, view: (np.zeros((0, 28, 28, 1), np.float32), "none"))
  command.run(tmp_path, tmp_path / "out", target, None)
  teacher, model = state.teacher_params["encoder"], encoder.clone(mask_token=target != "timm")
  loaded = load_weights(tmp_path / "out", model).variables["params"]
  told = "left out, since this layout has no place for it: mask_token" in capsys.readouterr().out
  assert told == ("Without mask_token" in (tmp_path / "out" / "README.md").read_text()) == (target == "timm")
  assert ("mask_token" in loaded) == (target != "timm")
  if target == "timm":  # which adds the class token's position to it
    moved = teacher["pos_embed"] * (np.arange(50) == 0)[None, :, None]
    teacher = teacher | dict(cls_token=teacher["cls_token"] + moved[:, :1], pos_embed=teacher["pos_embed"] - moved)
  for name in loaded:
    jax.tree.map(np.testing.assert_array_equal, loaded[name], teacher[name])
  (tmp_path / "checkpoints").mkdir()
  again = load_weights(tmp_path, model).variables["params"]  # of the run itself
  assert again.keys() == loaded.keys()
  jax.tree.map(np.testing.assert_array_equal, again["blocks_0"], loaded["blocks_0"])


@pytest.mark.parametrize(
  "model, channels",
  [(LEARNED.clone(depth=1, registers=1), 1), pytest.param(TINY_RESNET, 3, marks=pytest.mark.slow)],
)
def test_a_program_of_the_features_takes_any_number_of_images_and_is_proven(tmp_path, model, channels):
  variables = jax.tree.map(np.abs, random(model, channels))  # variances too
  made = export.make_program(model, variables, VIEW, channels=channels, facts={})
  export.write(made, tmp_path / "out")
  assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "features.stablehlo"}
  images = np.random.default_rng(1).normal(size=(3, 16, 16, channels)).astype(np.float32)
  (difference,) = proof.prove(made, tmp_path / "out", model, variables, images).values()
  assert difference < 1e-5
  exec(made.usage.replace("FOLDER", str(tmp_path / "out")), given := dict(jax=jax, images=images[:1]))
  want = jax.jit(functools.partial(model.apply, train=False))(variables, images[:1])
  np.testing.assert_allclose(given["features"], want, atol=1e-5 * np.max(np.abs(want)))


def test_a_program_needs_flatbuffers_and_says_so(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install flatbuffers"):
    export.make_program(LEARNED, {}, VIEW, channels=1, facts={})


def test_an_export_that_fails_leaves_nothing_and_goes_on_by_the_same_command(unbroken, tmp_path, monkeypatch):
  monkeypatch.setattr(cli, "say", lambda line: None)
  out = tmp_path / "mine"

  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
    patched.setattr(command, "card", full)  # what is written last
    command.run(unbroken[0], out, None, None)
  assert list(out.iterdir()) == []
  (out / whole._UNFINISHED).mkdir()  # as a kill leaves it
  (out / whole._UNFINISHED / "config.json").touch()
  assert command.run(unbroken[0], out, None, None) == 0
  assert {x.name for x in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}
