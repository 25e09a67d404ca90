"""The programs that each platform gets, lowered here from one trace: for a CPU, for CUDA and for a TPU.

Lowering needs no card and no compiler, and finds what JAX refuses for a platform, such as a shape that cuDNN does not
serve. Nothing is run.
"""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssl_jax import augment, build
from ssl_jax import config as configs
from ssl_jax.evaluation import knn
from ssl_jax.losses import info_nce, nt_xent
from ssl_jax.models import cpu, vit

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PLATFORMS = ("cpu", "cuda", "tpu")
FUSED = "__cudnn$fmha"  # cuDNN's attention, in a program's text
BARRIER = "stablehlo.optimization_barrier"


@pytest.fixture
def cudnn(monkeypatch):
  """JAX and `vit.attention` are told that cuDNN is there, as it is beside JAX's plugin for CUDA."""
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(vit, "traces_cudnn", lambda: True)


def lowered(function, *shapes):
  """{platform: the program's text}, all from one trace."""
  traced = jax.jit(function).trace(*shapes)
  return {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS}


def of_attention(dtype, tokens, width):
  attention = vit.Attention(3, jax.nn.initializers.zeros, jax.nn.initializers.zeros, dtype)
  x = jax.ShapeDtypeStruct((2, tokens, width), jnp.float32)
  params = jax.eval_shape(attention.init, jax.random.key(0), x)
  return lowered(jax.grad(lambda params, x: jnp.sum(attention.apply(params, x))), params, x)


@pytest.mark.parametrize("tokens", [37, 49, 50, 197, 257])
def test_attention_takes_any_number_of_tokens_under_a_gradient_on_a_gpu(tokens, cudnn):
  texts = of_attention(jnp.bfloat16, tokens, 192)
  assert f"{FUSED}Softmax(" in texts["cuda"] and f"{FUSED}SoftmaxBackward" in texts["cuda"]
  assert FUSED not in texts["cpu"] + texts["tpu"]


@pytest.mark.parametrize("dtype, width", [(jnp.float32, 192), (jnp.bfloat16, 3 * 12)], ids=["float32", "heads of 12"])
def test_what_cudnn_does_not_serve_takes_xlas_attention(dtype, width, cudnn):
  assert FUSED not in of_attention(dtype, 37, width)["cuda"]


def test_without_jaxs_plugin_for_cuda_attention_is_xlas_everywhere(monkeypatch):
  if vit.traces_cudnn():  # It is installed: as if it were not.
    monkeypatch.setattr(vit, "traces_cudnn", lambda: False)
  assert all(FUSED not in text for text in of_attention(jnp.bfloat16, 37, 192).values())


@pytest.mark.parametrize("argument", [0, 1], ids=["input", "kernel"])
@pytest.mark.parametrize("precision", [None, "highest"])
def test_the_convolutions_gradients_are_jaxs_own_where_the_program_is_not_for_a_cpu(argument, precision):
  def gradient(convolution):
    def loss(x, kernel):
      with jax.default_matmul_precision(precision):  # around the forward pass alone
        y = convolution(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
      return jnp.sum(jnp.sin(y))

    return jax.grad(loss, argument)

  def convolutions(text):
    return re.findall(r"stablehlo.convolution.*", re.sub(r"%\w+", "", text))

  shapes = jnp.ones((2, 9, 8, 3)), jnp.ones((3, 3, 3, 5))
  got, want = (lowered(gradient(f), *shapes) for f in (cpu.conv_general_dilated, lax.conv_general_dilated))
  for platform in PLATFORMS:
    assert len(convolutions(got[platform])) == 2
    assert (sorted(convolutions(got[platform])) == sorted(convolutions(want[platform]))) == (platform != "cpu")


@pytest.mark.parametrize("d, f", [(4, 9), (9, 4)])
def test_the_linear_layers_gradients_are_jaxs_own_where_the_program_is_not_for_a_cpu(d, f):
  def gradient(product):
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel, (((2,), (0,)), ((), ()))))), (0, 1))

  def products(text):
    return re.findall(r"stablehlo.dot_general.*", re.sub(r"%\w+", "", text))

  shapes = jnp.ones((2, 3, d)), jnp.ones((d, f))
  got, want = (lowered(gradient(product), *shapes) for product in (cpu.dot_general, lax.dot_general))
  for platform in ("cuda", "tpu"):
    assert sorted(products(got[platform])) == sorted(products(want[platform])) and BARRIER not in got[platform]
  assert (sorted(products(got["cpu"])) == sorted(products(want["cpu"]))) == (BARRIER in got["cpu"]) == (d > f)


@pytest.mark.parametrize("loss, columns", [(nt_xent, 2**14), (info_nce, 2**13)], ids=["nt_xent", "info_nce"])
def test_a_block_of_similarities_suits_the_platform_in_both_passes(loss, columns):
  x = jax.ShapeDtypeStruct((2**13, 16), jnp.float32)
  texts = lowered(jax.grad(loss), x, x)
  for platform, text in texts.items():
    on_cpu, elsewhere = (f"tensor<{most // columns}x{columns}xf32>" for most in (2**20, 2**24))
    assert (on_cpu in text, elsewhere in text) == ((platform == "cpu"), (platform != "cpu"))


def test_a_chunk_of_the_bank_suits_the_platform():
  def predict(bank, labels, queries):
    return knn.knn_predict(bank, labels, queries, k=5, num_classes=3)

  bank, queries = (jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (2**15, 7))
  texts = lowered(predict, bank, jax.ShapeDtypeStruct((2**15,), jnp.int32), queries)
  for platform, text in texts.items():
    assert (f"tensor<7x{2**10}xf32>" in text, f"tensor<7x{2**14}xf32>" in text) == (
      platform == "cpu",
      platform != "cpu",
    )


@pytest.mark.parametrize("tokens", [36, 37])
def test_the_added_token_changes_no_output_and_no_gradient(tokens, monkeypatch):
  plain = jax.nn.dot_product_attention
  asked = []

  def by_xla(*args, implementation, **lengths):  # cuDNN's arguments, on a CPU
    asked.append(implementation)
    return plain(*args, **lengths)

  q, k, v, c = (jax.random.normal(key, (2, tokens, 3, 8)) for key in jax.random.split(jax.random.key(0), 4))

  @functools.partial(jax.jit, static_argnums=0)
  def both_ways(attention, q, k, v, c):
    out, back = jax.vjp(attention, q, k, v)
    return out, *back(c)

  want = both_ways(plain, q, k, v, c)
  monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
  got = both_ways(vit.fused_attention, q, k, v, c)
  assert asked == ["cudnn"]
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def recipe(name):
  """A shipped recipe as it is, but with fewer blocks: lowering costs as much for any batch."""
  file, _, version = name.partition(":")
  spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([version] if version else []))
  if config.encoder.name.startswith("vit"):
    config.encoder.depth = 2
  elif "stages" not in config.encoder:
    bottleneck = config.encoder.name not in ("resnet18", "resnet34")
    config.encoder = dict(config.encoder, name="resnet", stages=(1, 1), bottleneck=bottleneck)
  if "decoder" in config.method:
    config.method.decoder.depth = 1
  return config


VERSIONS = {
  "simclr_imagenet": ["v1", "v2"],
  "moco_imagenet": ["v1", "v2", "v3", "v3_vit"],
  "mae_imagenet": ["base", "large", "huge"],
  "dino_imagenet": ["vanilla", "boost", "vit_base"],
  "dino_quickstart": ["resnet", "vit"],
  "linear": ["simclr", "dino_vit_base"],
}
RECIPES = [
  f"{file.stem}:{version}"
  for file in sorted(CONFIGS.glob("*.py"))
  for version in VERSIONS.get(file.stem, [""])
  if file.stem not in ("own_images", "adapt")  # whose programs are those of others
]


# Their programs are those of dinov2_imagenet and finetune_mae, but for sizes and for an encoder that is frozen.
LIKE_OTHERS = ("dinov2_quickstart:", "finetune_quickstart:", "linear:dino_vit_base")


@pytest.mark.parametrize(
  "name", [pytest.param(x, marks=pytest.mark.slow) if x in LIKE_OTHERS else x for x in RECIPES], ids=RECIPES
)
def test_every_recipes_step_is_lowered_for_every_platform(name, cudnn, mesh):
  config = recipe(name)
  made = build.program(config, mesh(2), 100 * config.epochs, 100)
  images = augment.crop_shapes(configs.views(config), config.batch_size, config.data.channels)
  labels = {"label": jax.ShapeDtypeStruct((config.batch_size,), np.int32)} if made.method.takes_labels else {}
  texts = lowered(made.train_step, made.state, {"image": images, **labels})
  fused = config.encoder.name.startswith("vit") and config.dtype == "bfloat16"
  assert {platform for platform, text in texts.items() if FUSED in text} == ({"cuda"} if fused else set())
  for text in texts.values():
    assert "callback" not in text
    # The largest constants are a ViT's fixed positions, 1.3 MB for the huge one's 257 x 1,280. Two digits are a byte.
    assert max((len(x) for x in re.findall(r'dense<"0x(\w+)"', text)), default=0) < 2 * 1.5e6
