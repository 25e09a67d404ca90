"""Projection and prediction heads between an encoder and a loss."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.norm import BatchNorm


class Projector(nn.Module):
  """Linear layers, each but the last followed by batch norm and ReLU.

  Attributes:
    layers: number of linear layers.
    hidden: width of all but the last; None: the input's.
    features: width of the last.
    hidden_bias: whether all but the last have a bias.
    last_bias: how the bias of the last starts; None: it has none.
    last_norm: after the last layer: None, "scale" (batch norm without offset) or "plain" (without gain and offset).
    kernel_init: of the linear layers.
    axis_name: mapped axis over which the batch statistics are averaged.
    bn_group_size: examples that are normalised together, in place of all (see `BatchNorm`).
    dtype: of the computation.
  """

  layers: int = 2
  hidden: int | None = None
  features: int = 128
  hidden_bias: bool = False
  last_bias: nn.initializers.Initializer | None = None
  last_norm: str | None = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  axis_name: str | None = None
  bn_group_size: int | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps float [b, d] to float [b, features]."""
    norm = functools.partial(BatchNorm, self.axis_name, self.bn_group_size, dtype=self.dtype)
    hidden = self.hidden or x.shape[-1]
    for i in range(1, self.layers):
      x = self.linear(hidden, nn.initializers.zeros if self.hidden_bias else None, f"linear{i}")(x)
      x = nn.relu(norm(name=f"bn{i}")(x, train))
    x = self.linear(self.features, self.last_bias, f"linear{self.layers}")(x)
    if self.last_norm is None:
      return x
    return norm(use_bias=False, use_scale=self.last_norm == "scale", name=f"bn{self.layers}")(x, train)

  def linear(self, features, bias, name):
    init = dict(kernel_init=self.kernel_init, bias_init=bias or nn.initializers.zeros)
    return nn.Dense(features, use_bias=bias is not None, dtype=self.dtype, name=name, **init)


# The official SimCLR's (`projection_head` in model_util.py): the paper's text has no norm after the last layer.
SimCLRProjector = functools.partial(Projector, last_norm="scale", kernel_init=nn.initializers.normal(0.01))


class EmbeddingProjector(nn.Module):
  """LeJEPA's: a linear layer to the embedding, which starts as timm's classifier does, then an MLP of three layers.

  The official biases before batch norms, which remove them, are left out.
  """

  embedding: int
  hidden: int
  features: int
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps float [b, d] to float [b, features]."""
    init = nn.initializers.normal(0.02)
    x = nn.Dense(self.embedding, use_bias=False, kernel_init=init, dtype=self.dtype, name="embedding")(x)
    mlp = dict(hidden=self.hidden, features=self.features, kernel_init=torch_uniform, dtype=self.dtype)
    mlp |= dict(last_bias=torch_bias(self.hidden), axis_name=self.axis_name)
    return Projector(layers=3, name="mlp", **mlp)(x, train=train)


class MoCoHead(nn.Module):
  """MoCo v1's single linear layer, or v2's two with ReLU between; with biases and without norms.

  The hidden width is the input's unless `hidden` is given.
  """

  layers: int = 2
  hidden: int | None = None
  features: int = 128
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps float [b, d] to float [b, features]."""
    del train
    if self.layers == 1:
      return self.linear(self.features, x, "fc")
    x = nn.relu(self.linear(self.hidden or x.shape[-1], x, "fc_0"))
    return self.linear(self.features, x, "fc_2")

  def linear(self, features, x, name):
    init = dict(kernel_init=torch_uniform, bias_init=torch_bias(x.shape[-1]))
    return nn.Dense(features, dtype=self.dtype, name=name, **init)(x)


class DINOHead(nn.Module):
  """DINO's head: GELU layers, a unit-norm bottleneck, and prototypes of unit norm.

  `DINOHead` in vision_transformer.py of facebookresearch/dino.

  Attributes:
    layers, hidden, bottleneck: of the MLP.
    prototypes: K, the outputs.
    train_gain: whether the prototypes' gains are parameters (the official `norm_last_layer=False`) or fixed at 1.
    dtype: of the computation.
  """

  layers: int = 3
  hidden: int = 2048
  bottleneck: int = 256
  prototypes: int = 65536
  train_gain: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float [b, d] to logits [b, K]."""
    for i in range(self.layers):
      last = i == self.layers - 1
      features = self.bottleneck if last else self.hidden
      init = nn.initializers.normal(0.02)
      x = nn.Dense(features, kernel_init=init, dtype=self.dtype, name=f"mlp_{2 * i}")(x)
      x = x if last else nn.gelu(x, approximate=False)
    return Prototypes(self.prototypes, self.train_gain, self.dtype, name="last_layer")(unit(x))


class Prototypes(nn.Module):
  """A linear layer without bias whose columns are `g v / |v|` (PyTorch's weight_norm)."""

  features: int
  train_gain: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    v = self.param("weight_v", torch_uniform, (x.shape[-1], self.features))
    g = self.param("weight_g", nn.initializers.ones, (1, self.features))
    g = g if self.train_gain else jax.lax.stop_gradient(g)
    weight = g * v / jnp.linalg.norm(v, axis=0, keepdims=True)
    return x.astype(self.dtype) @ weight.astype(self.dtype)


class LinearClassifier(nn.Module):
  """A linear layer, behind a batch norm without gain and offset where `batch_norm` says so (MAE's probe).

  Attributes:
    classes: its outputs.
    init_std: standard deviation of its weights at the start; its biases start at 0.
    batch_norm: see above.
    axis_name: mapped axis over which the batch statistics are averaged.
    dtype: of the computation.
  """

  classes: int
  init_std: float = 0.01
  batch_norm: bool = False
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps float [b, d] to float32 logits [b, classes]."""
    if self.batch_norm:
      x = BatchNorm(self.axis_name, epsilon=1e-6, use_bias=False, use_scale=False, name="bn")(x, train)
    logits = nn.Dense(self.classes, kernel_init=nn.initializers.normal(self.init_std), dtype=self.dtype, name="linear")(
      x
    )
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class ClassifierNetwork(nn.Module):
  """An encoder, then a classifier.

  Attributes:
    encoder, head: see above.
    blocks: how many of a ViT's last blocks give their class tokens, each through the last norm, oldest first
      (`eval_linear.py` of facebookresearch/dino); None: the head takes the encoder's own output.
    mean_patches: whether the mean of the last block's patches is appended to these.
    train_encoder: whether training trains the encoder too: its batch norms then use the batch's statistics.
  """

  encoder: nn.Module
  head: nn.Module
  blocks: int | None = None
  mean_patches: bool = False
  train_encoder: bool = True

  def __call__(self, images: jax.Array, *, train: bool, **dropped: jax.Array) -> jax.Array:
    return self.classify(images, train=train, **dropped)[0]

  def classify(self, images, *, train, **dropped):
    """Returns (logits [b, classes], the features [b, d] that they are made of)."""
    if self.blocks is None:
      x = self.encoder(images, train=train and self.train_encoder, **dropped)
    else:
      tokens = self.encoder.last_blocks(images, self.blocks)
      patches = tokens[-1][:, 1 + self.encoder.registers :]
      last = [jnp.mean(patches, axis=1)] if self.mean_patches else []
      x = jnp.concatenate([*(x[:, 0] for x in tokens), *last], axis=-1).astype(jnp.float32)
    return self.head(x, train=train), x


class Network(nn.Module):
  """An encoder, then a projector."""

  encoder: nn.Module
  projector: nn.Module

  def __call__(self, images, *, train):
    return self.projector(self.encoder(images, train=train), train=train)


class PredictorNetwork(nn.Module):
  """An encoder, a projector and a predictor (BYOL, MoCo v3); the momentum copy only calls `project`."""

  encoder: nn.Module
  projector: nn.Module
  predictor: nn.Module

  def __call__(self, images, *, train):
    """Returns (projection, prediction)."""
    z = self.project(images, train=train)
    return z, self.predictor(z, train=train)

  def project(self, images, *, train):
    return self.projector(self.encoder(images, train=train), train=train)


def train_pass(
  network: nn.Module, params: Any, batch_stats: Any, images: jax.Array, method: str | None = None, **kwargs: Any
) -> tuple[Any, Any]:
  """Applies a network in training mode. Returns (outputs, the running statistics after it, {} where it has none)."""
  variables = {"params": params, "batch_stats": batch_stats}
  output, changed = network.apply(variables, images, train=True, mutable=["batch_stats"], method=method, **kwargs)
  return output, changed.get("batch_stats", {})


def view_by_view(
  network: nn.Module, params: Any, batch_stats: Any, views: jax.Array, method: str | None = None
) -> tuple[Any, Any]:
  """Applies a network to [v, b, h, w, c] in one training pass per view: batch norm normalises each view separately.

  Returns:
    (outputs [v, b, ...], the running statistics after the last view).
  """
  outputs = []
  for view in views:
    output, batch_stats = train_pass(network, params, batch_stats, view, method)
    outputs.append(output)
  return jax.tree.map(lambda *x: jnp.stack(x), *outputs), batch_stats


def without_predictor(tree):
  """The part of parameters or batch statistics that the momentum copy has."""
  return {name: part for name, part in tree.items() if name != "predictor"}


def unit(x):
  """Rows of unit norm in float32; a zero row stays zero."""
  x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


# PyTorch's default for linear layers and convolutions: uniform in +-1 / sqrt(fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in):
  """PyTorch's default for the bias of a layer with this many inputs."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5
