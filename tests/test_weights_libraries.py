"""Full-size models to timm, transformers and torchvision and back, features compared; by hand, where these are."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch_files
from named_weights import named_images
from trajectories import error, named_variables

from ssl_jax import load_weights
from ssl_jax.augment import EvaluationView
from ssl_jax.methods import mae
from ssl_jax.models import resnet, vit
from ssl_jax.models.mae import MAEDecoder
from ssl_jax.weights import export, layouts, proof

for library in ("torch", "timm", "transformers", "torchvision"):
  pytest.importorskip(library, reason=f"{library} is not installed: pip install -r requirements-bench.txt")

import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("optimised")]
VIEW = EvaluationView(256, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DINO = vit.vit_small(patch_size=16)
MAE = vit.vit_base(patch_size=16, positions="column_first", features="mean")
DINOV2 = vit.vit_small(patch_size=14, image_size=518, layer_scale=1e-5, mask_token=True)
WITH_REGISTERS = DINOV2.clone(registers=4, resize="antialiased")
TINY = vit.ViT(patch_size=4, dim=96, depth=3, heads=3, image_size=28, layer_scale=1e-5, mask_token=True)
GIANT = TINY.clone(registers=3, ffn="swiglu", resize="antialiased")  # as the giant but for its size
MODELS = {
  "dino_vit_small": DINO,
  "mae_vit_base": MAE,
  "moco_v3_vit_small": vit.vit_small(patch_size=16, heads=12, positions="row_first"),
  "moco_resnet50": resnet.resnet50(),
  "resnet18": resnet.resnet18(),
  "own_vit": vit.ViT(patch_size=4, dim=96, depth=4, heads=3, image_size=28, features="flat", mlp_ratio=2),
  "dinov2_vit_small": DINOV2.clone(image_size=224),
  "dinov2_vit_small_reg4": WITH_REGISTERS.clone(image_size=224),
  "dinov2_swiglu": TINY.clone(ffn="swiglu", features="mean"),
  "dinov2_giant": GIANT.clone(features="flat"),
  "no_layer_scale": GIANT.clone(layer_scale=None),
}
SMALL = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
VIEWS = {224: VIEW, 28: EvaluationView(32, 28)}


def variables_of(model):
  side = getattr(model, "image_size", 64)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))
  return named_variables(shapes, "", {}, jnp.float32)


def features(model, variables, images):
  return np.asarray(jax.jit(functools.partial(model.apply, train=False))(variables, images))


def in_torch(model, images):
  with torch.no_grad():
    return model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


@pytest.mark.parametrize("target", ["timm", "hf", "torchvision"])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_gives_the_same_features_and_comes_back(tmp_path, name, target):
  model = MODELS[name]
  if export.why_not(model, target, 3):
    pytest.skip(export.why_not(model, target, 3))
  variables, view = jax.device_get(variables_of(model)), VIEWS[getattr(model, "image_size", 224)]
  made = export.make(model, variables, view, target, channels=3, facts={})
  export.write(made, tmp_path / "out")
  images = named_images(name, (2, view.size, view.size, 3))
  differences = proof.prove(made, tmp_path / "out", model, variables, images)
  print(name, target, differences)
  assert len(differences) == len(made.readers) and all(x < proof.TOLERANCE for x in differences.values())
  if "mask_token" in made.left_out:
    variables["params"]["mask_token"] = np.zeros_like(variables["params"]["mask_token"])
  if target == "timm" and getattr(model, "registers", 0):  # a position is added to the class token, for good
    first = variables["params"]["pos_embed"][:, :1]
    variables["params"]["cls_token"] = variables["params"]["cls_token"] + first
    variables["params"]["pos_embed"] = np.concatenate([0 * first, variables["params"]["pos_embed"][:, 1:]], axis=1)
  back = load_weights(tmp_path / "out", model).variables
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_mae_with_its_decoder_predicts_the_same_patches(tmp_path):
  model, decoder = vit.vit_base(patch_size=16, positions="column_first"), MAEDecoder(768)
  shapes, _ = jax.eval_shape(mae.mae(model, decoder).init, jax.random.key(0), (jnp.zeros((1, 1, 224, 224, 3)),))
  params = named_variables({"params": shapes}, "", {}, jnp.float32)["params"]
  settings = ml_collections.ConfigDict(dict(mask_ratio=0.75, normalize_target=True))
  export.write(export.make_mae(model, decoder, params, VIEW, settings=settings, channels=3, facts={}), tmp_path / "x")
  images = named_images("mae", (2, 224, 224, 3))
  differences = proof.prove_mae(tmp_path / "x", model, decoder, params, images, 0.75)
  print("mae with decoder", differences)
  assert len(differences) == 1 and all(x < proof.TOLERANCE for x in differences.values())


def random(model):
  torch.manual_seed(0)
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, 0.0, 0.05)
  for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.running_var.uniform_(0.5, 1.5)
      torch.nn.init.uniform_(module.weight, 0.5, 1.5)
  return model


@pytest.mark.parametrize(
  "name, make, model",
  [
    ("timm vit_small", lambda: timm.create_model("vit_small_patch16_224", num_classes=0), DINO),
    ("timm resnet50", lambda: timm.create_model("resnet50", num_classes=0), MODELS["moco_resnet50"]),
    ("torchvision resnet18", torchvision.models.resnet18, MODELS["resnet18"]),
    ("torchvision vit_b_16", torchvision.models.vit_b_16, vit.vit_base(patch_size=16)),
  ],
)
def test_their_models_come_in_with_the_same_features(tmp_path, name, make, model):
  theirs = random(make())
  torch.save({"model": theirs.state_dict(), "epoch": 1}, tmp_path / "x.pth")
  images = named_images(name, (2, 224, 224, 3))
  theirs.fc = theirs.heads = torch.nn.Identity()
  loaded = load_weights(tmp_path / "x.pth", model)
  difference = error(features(model, loaded.variables, images), in_torch(theirs, images).numpy())
  print(name, difference)
  assert difference < 1e-4


@pytest.mark.parametrize("name, model", [("ViTModel", DINO), ("ResNetModel", MODELS["moco_resnet50"])])
def test_transformers_models_come_in_with_the_same_features(tmp_path, name, model):
  config = transformers.ResNetConfig()  # a ResNet-50
  if name == "ViTModel":
    config = transformers.ViTConfig(**SMALL, layer_norm_eps=1e-6)
  theirs = random(getattr(transformers, name)(config))
  theirs.save_pretrained(tmp_path / "hf")
  images = named_images(name, (2, 224, 224, 3))
  output = in_torch(theirs, images)
  want = output.last_hidden_state[:, 0] if name == "ViTModel" else output.pooler_output.flatten(1)
  difference = error(features(model, load_weights(tmp_path / "hf", model).variables, images), want.numpy())
  print(name, difference)
  assert difference < 1e-4


def official_file(path, model):
  """A file as the official ones are, with a mask token."""
  return torch_files.save(path, layouts.whole_state(model, variables_of(model)))


@pytest.mark.parametrize(
  "name, model, sizes",
  [
    ("vit_small_patch14_dinov2", DINOV2, [518]),
    ("vit_small_patch14_reg4_dinov2", WITH_REGISTERS, [518, 224]),  # timm resizes as this model does, and not the other
  ],
)
def test_timm_reads_an_official_file_of_dinov2_as_we_do(tmp_path, name, model, sizes):
  path = official_file(tmp_path / "pretrain.pth", model)
  loaded = load_weights(path, model)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, jax.device_get(variables_of(model)))
  for size in sizes:
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), img_size=size)
    images = named_images(name, (2, size, size, 3))
    difference = error(features(model, loaded.variables, images), in_torch(theirs, images).numpy())
    print(name, size, difference)
    assert difference < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("kind", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_transformers_dinov2_comes_in_with_the_same_tokens(tmp_path, kind, ffn, dtype):
  """Masked patches too, and with registers another size, which the two resize alike."""
  shape = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=4)
  config = getattr(transformers, kind.replace("Model", "Config"))(**shape, use_swiglu_ffn=ffn == "swiglu")
  theirs = random(getattr(transformers, kind)(config))
  theirs.save_pretrained(tmp_path / "hf")
  registers = kind == "Dinov2WithRegistersModel"
  model = TINY.clone(ffn=ffn, dtype=dtype, **(dict(registers=4, resize="antialiased") if registers else {}))
  loaded = load_weights(tmp_path / "hf", model)
  assert f"in the layout of transformers' {kind}" in loaded.report[0] and not loaded.extra
  theirs = theirs.to(getattr(torch, dtype)).eval()
  with jax.enable_x64(dtype == "float64"):
    variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), loaded.variables)
    for size in (28, 20, 40) if registers else (28,):
      images = named_images(kind, (2, size, size, 3)).astype(dtype)
      masked = np.random.default_rng(0).random((2, (size // 4) ** 2)) < 0.3
      got = jax.jit(functools.partial(model.apply, method="tokens"))(variables, images, masked=masked)
      pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
      with torch.no_grad():
        want = theirs(pixels, bool_masked_pos=torch.from_numpy(masked)).last_hidden_state.numpy()
      difference = error(got, want)
      print(kind, ffn, dtype, size, difference)
      assert difference < (1e-4 if dtype == "float32" else 1e-6)


def test_images_are_prepared_as_evaluation_does(tmp_path):
  """timm's transform and transformers' processor on a photograph, against the run's own resize and crop."""
  import PIL.Image
  from photographs import photograph

  from ssl_jax import augment
  from ssl_jax.data.crop import centre_crop

  photograph(tmp_path / "x.png", 0, (300, 400))
  picture = PIL.Image.open(tmp_path / "x.png").convert("RGB")
  want = np.asarray(augment.evaluation_view(centre_crop(np.asarray(picture), VIEW)[None], VIEW))[0]
  variables = variables_of(DINO)
  for target in ("timm", "hf"):
    export.write(export.make(DINO, variables, VIEW, target, channels=3, facts={}), tmp_path / target)
  config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'timm'}"))
  by_timm = timm.data.create_transform(**config)(picture).numpy()
  processors = [transformers.AutoImageProcessor.from_pretrained(tmp_path / target) for target in ("timm", "hf")]
  by_processor = [np.asarray(processor(picture, return_tensors="pt")["pixel_values"])[0] for processor in processors]
  for got in (by_timm, *by_processor):
    assert got.shape == (3, 224, 224)
    assert np.mean(np.abs(got.transpose(1, 2, 0) - want)) < 0.005  # one grey level is 0.017
