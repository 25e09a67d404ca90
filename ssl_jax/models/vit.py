"""Vision transformers (Dosovitskiy et al., 2021, arXiv:2010.11929), named as timm's, with what the papers here changed.

DINOv2's (Oquab et al., 2023, arXiv:2304.07193; models/vision_transformer.py and layers/ of facebookresearch/dinov2) are
`layer_scale`, `ffn="swiglu"`, `mask_token` and `registers` (Darcet et al., 2023, arXiv:2309.16588).
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from ssl_jax.errors import UserError
from ssl_jax.models.cpu import conv_general_dilated, dot_general
from ssl_jax.models.heads import torch_bias, torch_uniform

normal_02 = nn.initializers.normal(0.02)
Dense = functools.partial(nn.Dense, dot_general=dot_general)


def layer_norm(dtype: Any, recompute: bool, name: str | None = None) -> nn.Module:
  """The transformers' layer norm; `recompute`: rematerialised in the backward pass."""
  kind = nn.remat(nn.LayerNorm) if recompute else nn.LayerNorm
  return kind(1e-6, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x):
  """x Phi(x) in float32 by erf, as in PyTorch; JAX's own by erfc takes a CPU two to three times as long."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def patch_xavier(key, shape, dtype=jnp.float32):
  """Xavier-uniform over the patch embedding as a matrix [p p C, dim], as MAE and MoCo v3 do."""
  return nn.initializers.xavier_uniform()(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def qkv_xavier(key, shape, dtype=jnp.float32):
  """Xavier-uniform for query, key and value separately (MoCo v3); MAE's bound is that of the fused matrix."""
  bound = math.sqrt(6 / (shape[0] + shape[1] // 3))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class ViT(nn.Module):
  """A vision transformer with a class token and no classifier.

  It returns what `features` says: "cls", the class token after the last norm; "mean", the mean of the patches' tokens
  after it; "flat", all of those, flattened, which keeps spatial positions apart; or "pooled", the mean of the patches'
  tokens before it, and a norm of its own behind that, in its place (MAE's fine-tuning; timm's `fc_norm`).

  Attributes:
    patch_size, dim, depth, heads, mlp_ratio: its shape.
    image_size: image side, in pixels, that learned positions are for; they are interpolated for other sizes. Fixed
      positions fit any size.
    positions: "learned", or fixed sines and cosines: "row_first" (MoCo v3) or "column_first" (MAE).
    resize: how learned positions are interpolated: "offset" (DINO, DINOv2) or "antialiased" (DINOv2 with registers),
      see `interpolate_positions`.
    registers: how many tokens without a position stand between the class token and the patches.
    mask_token: whether the encoder has one, which takes the place of masked patches before positions are added.
    layer_scale: where the gains of each block's two branches start; None: there are none.
    ffn: "mlp", or "swiglu": a gated unit with two thirds of the width, rounded up to a multiple of 8.
    drop_path: rate in the last block, rising linearly from 0 in the first; in DINOv2 that of every block.
    init_std: standard deviation of the linear layers' normal initialisation. The papers' 0.02 is for their widths: in a
      network of 64 features a class token starts nearly the same for all images, and DINO takes long to separate them.
    kernel_init, qkv_init: of the linear layers, and of the fused query, key and value matrix [dim, 3 dim], in place of
      the normal one.
    patch_init: of the patch embedding [p, p, C, dim].
    patch_bias: whether its bias starts uniform in +-1 / sqrt(p p C), PyTorch's default (DINO, MAE), or at 0 (MoCo v3).
    token_init: of the class token and registers.
    frozen_patch_embed: no gradient to the patch embedding (MoCo v3).
    features: see above.
    recompute: rematerialise layer norms and GELUs in the backward pass, from inputs that are stored anyway. On a CPU
      their other residuals are a third of a training step's memory, and writing and reading them costs about what these
      few elementwise operations cost. For a GPU XLA does so by itself: on an H200 the memory is the same without it,
      and the time 3 to 5 % less.
    norm_dtype: of what the last norm gives; None: the computation's.
    dtype: of the computation; parameters stay float32.
  """

  patch_size: int
  dim: int
  depth: int
  heads: int
  mlp_ratio: float = 4
  image_size: int = 224
  positions: str = "learned"
  resize: str = "offset"
  registers: int = 0
  mask_token: bool = False
  layer_scale: float | None = None
  ffn: str = "mlp"
  drop_path: float = 0.0
  init_std: float = 0.02
  kernel_init: nn.initializers.Initializer | None = None
  qkv_init: nn.initializers.Initializer | None = None
  patch_init: nn.initializers.Initializer = torch_uniform
  patch_bias: bool = True
  token_init: nn.initializers.Initializer = normal_02
  frozen_patch_embed: bool = False
  features: str = "cls"
  recompute: bool = True
  norm_dtype: Any = None
  dtype: Any = jnp.float32

  def setup(self):
    if self.positions not in ("learned", "row_first", "column_first"):
      raise UserError(f"encoder.positions must be learned, row_first or column_first, got {self.positions!r}.")
    if self.resize not in ("offset", "antialiased"):
      raise UserError(f"encoder.resize must be offset or antialiased, got {self.resize!r}.")
    if self.ffn not in ("mlp", "swiglu"):
      raise UserError(f"encoder.ffn must be mlp or swiglu, got {self.ffn!r}.")
    if self.features not in ("cls", "mean", "flat", "pooled"):
      raise UserError(f"encoder.features must be cls, mean, flat or pooled, got {self.features!r}.")
    patch = (self.patch_size, self.patch_size)
    self.patch_embed = PatchEmbed(self.dim, patch, self.patch_init, self.patch_bias, self.dtype)
    self.cls_token = self.param("cls_token", self.token_init, (1, 1, self.dim))
    if self.registers:
      self.register_tokens = self.param("register_tokens", self.token_init, (1, self.registers, self.dim))
    if self.mask_token:  # its attribute is taken
      self.mask = self.param("mask_token", nn.initializers.zeros, (1, self.dim))
    if self.positions == "learned":
      grid = self.image_size // self.patch_size
      self.pos_embed = self.param("pos_embed", normal_02, (1, grid * grid + 1, self.dim))
    normal = nn.initializers.normal(self.init_std)
    inits = self.kernel_init or normal, self.qkv_init or normal
    block = functools.partial(
      Block, self.heads, self.mlp_ratio, *inits, self.dtype, self.recompute, self.layer_scale, self.ffn
    )
    self.blocks = [block() for _ in range(self.depth)]
    last_norm = functools.partial(layer_norm, self.norm_dtype or self.dtype, self.recompute)
    self.norm, self.fc_norm = last_norm(), last_norm()  # one of the two has parameters, by `features`

  def __call__(self, images: jax.Array, *, train: bool, uniforms: jax.Array | None = None) -> jax.Array:
    """Maps float [b, H, W, C] to float32 [b, features].

    `uniforms` [depth, 2, b] in [0, 1) decide which examples skip which branch; None drops none.
    """
    del train  # No batch statistics; the only randomness is `uniforms`.
    tokens = self.outputs(images, uniforms=uniforms)[-1]
    if self.features == "pooled":
      return _wide(self.fc_norm(jnp.mean(_wide(tokens[:, 1 + self.registers :]), axis=1)))
    tokens = _wide(self.norm(tokens))
    if self.features == "cls":
      return tokens[:, 0]
    patches = tokens[:, 1 + self.registers :]
    return jnp.mean(patches, axis=1) if self.features == "mean" else rearrange(patches, "b n d -> b (n d)")

  def tokens(
    self,
    images: jax.Array,
    *,
    keep: jax.Array | None = None,
    masked: jax.Array | None = None,
    factors: jax.Array | None = None,
  ) -> jax.Array:
    """All tokens after the last norm, [b, 1 + registers + n, dim], the class token first and the patches last.

    `keep` int [b, n] picks patches. `masked` bool [b, n] has the mask token in their place. `factors` [depth, 2, b]
    multiply the two branches of each block.
    """
    return self.norm(self.outputs(images, keep=keep, masked=masked, factors=factors)[-1])

  def last_blocks(self, images: jax.Array, n: int) -> list[jax.Array]:
    """The tokens of the last n blocks, oldest first, each through the last norm."""
    return [self.norm(x) for x in self.outputs(images)[-n:]]

  def attention(self, images: jax.Array) -> jax.Array:
    """The attention of the last block, float32 [b, heads, t, t] for t = 1 + registers + n tokens, rows sum to 1."""
    x = self.embed(images)
    for block in self.blocks[:-1]:
      x = block(x)
    return self.blocks[-1].attention(x)

  def outputs(self, images, *, keep=None, masked=None, uniforms=None, factors=None):
    """The tokens after each block."""
    x, out = self.embed(images, keep, masked), []
    for i, block in enumerate(self.blocks):
      rate = self.drop_path * i / max(self.depth - 1, 1)
      if factors is not None:
        x = block(x, factors[i][:, :, None, None])
      else:
        x = block(x) if uniforms is None or rate == 0 else block(x, [drop_mask(u, rate) for u in uniforms[i]])
      out.append(x)
    return out

  def embed(self, images, keep=None, masked=None):
    """Patches with positions, behind the class token and the registers: [b, 1 + registers + n, dim]."""
    height, width = (side // self.patch_size for side in images.shape[1:3])
    if (height * self.patch_size, width * self.patch_size) != images.shape[1:3] or height * width == 0:
      raise UserError(f"images of {images.shape[1]}x{images.shape[2]} do not cut into patches of {self.patch_size}.")
    x = self.patch_embed(images)
    if self.frozen_patch_embed:
      x = jax.lax.stop_gradient(x)
    if masked is not None:
      x = jnp.where(masked[..., None], self.mask.astype(self.dtype)[None], x)
    if self.positions == "learned":
      positions = interpolate_positions(self.pos_embed, height, width, antialias=self.resize == "antialiased")
    else:
      positions = jnp.asarray(sincos_positions(height, width, self.dim, self.positions == "row_first"))
    positions = positions.astype(self.dtype)
    x = x + positions[:, 1:]
    if keep is not None:
      x = jnp.take_along_axis(x, keep[..., None], axis=1)
    first = [self.cls_token.astype(self.dtype) + positions[:, :1]]
    if self.registers:
      first.append(self.register_tokens.astype(self.dtype))
    first = [jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape[1:])) for tokens in first]
    return jnp.concatenate([*first, x], axis=1)


class PatchEmbed(nn.Module):
  """Cuts into patches and projects each: a convolution whose stride and kernel size are the patch size."""

  dim: int
  patch: tuple[int, int]
  kernel_init: nn.initializers.Initializer
  random_bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, images):
    fan_in = math.prod(self.patch) * images.shape[-1]
    bias_init = torch_bias(fan_in) if self.random_bias else nn.initializers.zeros
    init = dict(kernel_init=self.kernel_init, bias_init=bias_init, conv_general_dilated=conv_general_dilated)
    x = nn.Conv(self.dim, self.patch, self.patch, "VALID", dtype=self.dtype, name="proj", **init)(images)
    return rearrange(x, "b h w d -> b (h w) d")


class Block(nn.Module):
  """Pre-norm attention and MLP, each around a shortcut; `layer_scale` and `ffn` as in `ViT`."""

  heads: int
  mlp_ratio: float
  kernel_init: nn.initializers.Initializer
  qkv_init: nn.initializers.Initializer
  dtype: Any
  recompute: bool = True
  layer_scale: float | None = None
  ffn: str = "mlp"

  def setup(self):
    self.norm1 = layer_norm(self.dtype, self.recompute)
    self.attn = Attention(self.heads, self.kernel_init, self.qkv_init, self.dtype)
    self.norm2 = layer_norm(self.dtype, self.recompute)
    ffn = MLP if self.ffn == "mlp" else SwiGLU
    self.mlp = ffn(self.mlp_ratio, self.kernel_init, self.dtype, self.recompute)
    if self.layer_scale is not None:
      self.ls1, self.ls2 = LayerScale(self.layer_scale), LayerScale(self.layer_scale)

  def __call__(self, x, masks=(1.0, 1.0)):
    attended = self.attn(self.norm1(x))
    attended = attended if self.layer_scale is None else self.ls1(attended)
    x = x + (masks[0] * attended).astype(x.dtype)  # float32 masks would promote the tokens
    mapped = self.mlp(self.norm2(x))
    mapped = mapped if self.layer_scale is None else self.ls2(mapped)
    return x + (masks[1] * mapped).astype(x.dtype)

  def attention(self, x):
    return self.attn.weights(self.norm1(x))


class Attention(nn.Module):
  """Multi-head self-attention with one fused projection, [q; k; v] in timm's order."""

  heads: int
  kernel_init: nn.initializers.Initializer
  qkv_init: nn.initializers.Initializer
  dtype: Any

  @nn.compact
  def __call__(self, x, weights_only=False):
    dim = x.shape[-1]
    if dim % self.heads:
      raise UserError(f"heads={self.heads} does not divide the width {dim}.")
    qkv = Dense(3 * dim, kernel_init=self.qkv_init, dtype=self.dtype, name="qkv")(x)
    q, k, v = (rearrange(x, "b n (h d) -> b n h d", h=self.heads) for x in jnp.split(qkv, 3, axis=-1))
    if weights_only:
      scores = jnp.einsum("bqhd,bkhd->bhqk", _wide(q), _wide(k)) / math.sqrt(dim // self.heads)
      return jax.nn.softmax(scores)
    out = rearrange(attention(q, k, v), "b n h d -> b n (h d)")
    return Dense(dim, kernel_init=self.kernel_init, dtype=self.dtype, name="proj")(out)

  def weights(self, x):
    return self(x, weights_only=True)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Softmax attention, [b, n, heads, d] each: in a program for CUDA by cuDNN where it serves that, else by XLA."""
  # cuDNN's fused kernel has to be requested; it supports only half precision and these head widths.
  fused = q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and traces_cudnn()
  on_platform = functools.partial(lax.platform_dependent, cuda=fused_attention, default=jax.nn.dot_product_attention)
  return on_platform(q, k, v) if fused else jax.nn.dot_product_attention(q, k, v)


@functools.cache
def traces_cudnn() -> bool:
  """Whether JAX's plugin for CUDA is installed. Without it JAX compiles nothing for CUDA, and refuses to trace this."""
  x = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
  try:
    jax.eval_shape(fused_attention, x, x, x)
  except RuntimeError:
    return False
  return True


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Softmax attention by cuDNN's fused kernel, at any number of tokens.

  JAX gives the gradient of that kernel for even lengths only, and a class token makes most lengths odd: 197 at 224
  pixels. So one token is added, which no other token attends to and whose own output is cut off.

  Args:
    q, k, v: bfloat16 or float16 [b, n, heads, d], where 8 divides d.

  Returns:
    [b, n, heads, d] of the same type.
  """
  b, n = q.shape[:2]
  if n % 2 == 0:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
  lengths = jnp.full(b, n, jnp.int32)
  return jax.nn.dot_product_attention(
    q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
  )[:, :n]


class MLP(nn.Module):
  """Linear, exact GELU, linear."""

  ratio: float
  kernel_init: nn.initializers.Initializer
  dtype: Any
  recompute: bool

  @nn.compact
  def __call__(self, x):
    dim = x.shape[-1]
    dense = functools.partial(Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    activation = jax.checkpoint(gelu) if self.recompute else gelu
    return dense(dim, name="fc2")(activation(dense(int(dim * self.ratio), name="fc1")(x)))


class SwiGLU(nn.Module):
  """Two linear layers, the first through SiLU and times the second, and a linear layer."""

  ratio: float
  kernel_init: nn.initializers.Initializer
  dtype: Any
  recompute: bool

  @nn.compact
  def __call__(self, x):
    dim = x.shape[-1]
    dense = functools.partial(Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    gate = lambda x: nn.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]  # noqa: E731
    hidden = swiglu_width(dim, self.ratio)
    gated = (jax.checkpoint(gate) if self.recompute else gate)(dense(2 * hidden, name="w12")(x))
    return dense(dim, name="w3")(gated)


def swiglu_width(dim: int, ratio: float) -> int:
  """Features of each of the two parts, which together have as many values as an MLP of this ratio has."""
  return -(-int(int(dim * ratio) * 2 / 3) // 8) * 8


class LayerScale(nn.Module):
  """A gain for each feature (Touvron et al., 2021, arXiv:2103.17239)."""

  start: float

  @nn.compact
  def __call__(self, x):
    gamma = self.param("gamma", nn.initializers.constant(self.start), (x.shape[-1],))
    return x * gamma.astype(x.dtype)[None, None]


def drop_mask(uniforms: jax.Array, rate: float) -> jax.Array:
  """Stochastic depth for one branch: 0 for a share `rate` of the examples, 1 / (1 - rate) for the rest, [b, 1, 1]."""
  return (jnp.floor(uniforms + 1 - rate) / (1 - rate))[:, None, None]


def sincos_positions(height: int, width: int, dim: int, row_first: bool) -> np.ndarray:
  """Fixed positions float32 [1, 1 + height width, dim]; the class token's is 0.

  Half of the features belong to the row and half to the column, each a block of sines and one of cosines of frequencies
  10000^(-4 k / dim). The official MAE writes the column's half first, the official MoCo v3 the row's.
  """
  if dim % 4:
    raise UserError(f"sin-cos positions need a width that 4 divides, got {dim}.")
  omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
  rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
  halves = [rows, columns] if row_first else [columns, rows]
  angles = [half.reshape(-1, 1) * omega for half in halves]
  table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
  return np.concatenate([np.zeros((1, dim)), table])[None].astype(np.float32)


def interpolate_positions(positions: jax.Array, height: int, width: int, *, antialias: bool = False) -> jax.Array:
  """Learned positions [1, 1 + g g, d] for a grid of height x width patches, as `interpolate_pos_encoding` of DINO.

  Bicubic with a = -0.75 and no antialias, edges repeated. The official code adds 0.1 to the target sides before it
  computes the scale, and PyTorch samples with that scale. So does this, since released weights are used that way.
  `antialias` is for DINOv2's models with registers: a = -0.5, widened where the grid shrinks, cut off at the edges, and
  the exact scale.
  """
  grid = math.isqrt(positions.shape[1] - 1)
  if (height, width) == (grid, grid):
    return positions
  patches = rearrange(positions[0, 1:], "(h w) d -> h w d", h=grid)
  weights = _antialiased_weights if antialias else _cubic_weights
  rows, columns = (jnp.asarray(weights(n, grid)) for n in (height, width))
  patches = jnp.einsum("yh,xw,hwd->yxd", rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
  return jnp.concatenate([positions[:, :1], rearrange(patches, "y x d -> 1 (y x) d")], axis=1)


def _cubic_weights(size, grid):
  source = (np.arange(size) + 0.5) * grid / (size + 0.1) - 0.5
  first = np.floor(source).astype(int)
  weights = np.zeros((size, grid))
  for tap in range(-1, 3):
    at = np.clip(first + tap, 0, grid - 1)
    np.add.at(weights, (np.arange(size), at), _cubic(source - (first + tap), -0.75))
  return weights.astype(np.float32)


def _antialiased_weights(size, grid):
  distance = np.arange(grid) + 0.5 - (np.arange(size)[:, None] + 0.5) * grid / size
  weights = _cubic(distance / max(grid / size, 1), -0.5)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(x, a):
  """Keys' cubic convolution kernel, 0 from a distance of 2 on."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((x - 5) * x + 8) * x * a - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _wide(x):
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


vit_tiny = functools.partial(ViT, dim=192, depth=12, heads=3)
vit_small = functools.partial(ViT, dim=384, depth=12, heads=6)
vit_base = functools.partial(ViT, dim=768, depth=12, heads=12)
vit_large = functools.partial(ViT, dim=1024, depth=24, heads=16)
vit_huge = functools.partial(ViT, dim=1280, depth=32, heads=16)
