"""Writes steps.npz: six training steps of every method in PyTorch, float64, written from the papers' official codes.

  pip install torch jax numpy
  python tests/golden/make_steps.py

It shares no line with ssl_jax; its random numbers are JAX's own, from the documented streams (shuffle, masks, drop
path). Networks are tiny, and rates are large enough for a mistake to show in the parameters: tests/test_trajectories.py
sets the same numbers in the shipped recipes.

steps.npz has for each run `<run>/loss` [6] and, after the sixth step, `<run>/<tree>/<PyTorch name>` for every
parameter, average, running statistic, queue and centre. All begin with `named_weight("<run>/<PyTorch name>", shape)`.
"""

import math
import pathlib

import jax
import numpy as np
import torch
import torch.nn.functional as F
from named_weights import named_weight

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
torch.set_default_dtype(torch.float64)

BATCH, SIDE, EPOCH, TOTAL, STEPS = 8, 16, 4, 8, 6  # images, pixels, steps of an epoch, of the schedules, and taken
MASK, SHUFFLE, DROP_PATH = 2**16, 2**16 + 1, 2**16 + 2  # the numbers of the random streams
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- inputs


def pixels(step):
  """uint8 [8, 16, 16, 3]: blurred noise, so that neighbours are alike."""
  noise = np.random.default_rng((7, step)).uniform(size=(BATCH, SIDE, SIDE, 3))
  smooth = sum(np.roll(noise, (i, j), (1, 2)) for i in range(3) for j in range(3)) / 9
  return (255 * np.clip(2.5 * smooth - 0.75, 0, 1)).astype(np.uint8)


def view(images, *, size=SIDE, flip=False, solarize=False, normalise=True):
  """One view without chance: resized (bicubic, antialiased), mirrored, solarized at 128, normalised; NCHW."""
  x = torch.tensor(images.astype(np.float32) / np.float32(255)).permute(0, 3, 1, 2)
  if size != SIDE:
    x = F.interpolate(x.double(), (size, size), mode="bicubic", antialias=True, align_corners=False).clip(0, 1)
  if flip:
    x = x.flip(3)
  if solarize:
    x = torch.where(x >= 128 / 255, 1 - x, x)
  x = x.double()
  return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None] if normalise else x


def example_keys(step):
  key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), step)
  return [jax.random.fold_in(key, i) for i in range(BATCH)]


def draw(key, stream, shape=()):
  return np.asarray(jax.random.uniform(jax.random.fold_in(key, stream), shape))


# ---- networks, as functions of a dict of parameters under PyTorch's names


def conv(p, name, x, stride=1):
  weight = p[f"{name}.weight"]
  return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def batch_norm(p, stats, name, x, groups=1):
  """Training mode. `stats` is changed: running statistics as PyTorch's; of several groups, their mean."""
  axes = (0, 2, 3) if x.ndim == 4 else (0,)
  shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
  parts, means, variances = [], [], []
  for part in x.chunk(groups):
    mean, variance = part.mean(axes), part.var(axes, unbiased=False)
    n = part.numel() / part.shape[1]
    means.append(mean.detach())
    variances.append(variance.detach() * n / (n - 1))
    part = (part - mean.view(shape)) / torch.sqrt(variance.view(shape) + 1e-5)
    if f"{name}.weight" in p:
      part = part * p[f"{name}.weight"].view(shape)
    if f"{name}.bias" in p:
      part = part + p[f"{name}.bias"].view(shape)
    parts.append(part)
  for key, values in (("running_mean", means), ("running_var", variances)):
    old = stats[f"{name}.{key}"]
    stats[f"{name}.{key}"] = 0.9 * old + 0.1 * sum(values) / len(values)
  return torch.cat(parts)


def resnet(p, stats, x, groups=1):
  """A 3x3 stem and two stages of one basic block, 4 and 8 channels; pooled."""
  norm = lambda name, x: batch_norm(p, stats, f"encoder.{name}", x, groups)  # noqa: E731
  x = F.relu(norm("bn1", conv(p, "encoder.conv1", x)))
  for stage, stride in (("layer1.0", 1), ("layer2.0", 2)):
    y = F.relu(norm(f"{stage}.bn1", conv(p, f"encoder.{stage}.conv1", x, stride)))
    y = norm(f"{stage}.bn2", conv(p, f"encoder.{stage}.conv2", y))
    if f"encoder.{stage}.downsample.0.weight" in p:
      x = norm(f"{stage}.downsample.1", conv(p, f"encoder.{stage}.downsample.0", x, stride))
    x = F.relu(x + y)
  return x.mean((2, 3))


def linear(p, name, x):
  return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def mlp(p, stats, name, x):
  """A Sequential of [linear, batch norm, ReLU] triples; behind the last one a norm alone, or nothing."""
  layers = sorted({int(key.split(".")[1]) // 3 for key in p if key.startswith(f"{name}.")})
  layers = [i for i in layers if f"{name}.{3 * i}.weight" in p]
  for i in layers:
    x = linear(p, f"{name}.{3 * i}", x)
    if f"{name}.{3 * i + 1}.running_mean" in stats:
      x = batch_norm(p, stats, f"{name}.{3 * i + 1}", x)
    if i != layers[-1]:
      x = F.relu(x)
  return x


def layer_norm(p, name, x):
  return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def block(p, name, x, heads, keep=(1.0, 1.0)):
  b, n, d = x.shape
  qkv = linear(p, f"{name}.attn.qkv", layer_norm(p, f"{name}.norm1", x))
  q, k, v = qkv.reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
  weights = ((q @ k.transpose(-2, -1)) * (d // heads) ** -0.5).softmax(-1)
  out = (weights @ v).transpose(1, 2).reshape(b, n, d)
  x = x + keep[0] * linear(p, f"{name}.attn.proj", out)
  hidden = F.gelu(linear(p, f"{name}.mlp.fc1", layer_norm(p, f"{name}.norm2", x)))
  return x + keep[1] * linear(p, f"{name}.mlp.fc2", hidden)


def sincos(grid, dim, row_first):
  """Fixed positions [1, 1 + grid^2, dim], zero for the class token."""
  omega = 1 / 10000 ** (torch.arange(dim // 4) / (dim / 4))
  row, column = torch.meshgrid(torch.arange(grid).double(), torch.arange(grid).double(), indexing="ij")
  out = []
  for place in (row, column) if row_first else (column, row):
    angle = place.reshape(-1, 1) * omega
    out += [angle.sin(), angle.cos()]
  return torch.cat([torch.zeros(1, dim), torch.cat(out, 1)])[None]


def embed(p, x, positions, frozen=False):
  x = F.conv2d(x, p["encoder.patch_embed.proj.weight"], p["encoder.patch_embed.proj.bias"], stride=4)
  x = x.flatten(2).transpose(1, 2)
  x = (x.detach() if frozen else x) + positions[:, 1:]
  return x, (p["encoder.cls_token"] + positions[:, :1]).expand(len(x), -1, -1)


def learned_positions(p, grid):
  """DINO's interpolation: scale factors (grid + 0.1) / own, bicubic, no antialias."""
  table = p["encoder.pos_embed"]
  own = math.isqrt(table.shape[1] - 1)
  if grid == own:
    return table
  patches = table[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
  patches = F.interpolate(patches, scale_factor=((grid + 0.1) / own,) * 2, mode="bicubic")
  assert patches.shape[-1] == grid
  return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], 1)


def vit(p, x, positions, frozen=False, keep=None):
  """Two blocks of three heads; the class token after the last norm."""
  x, token = embed(p, x, positions, frozen)
  x = torch.cat([token, x], 1)
  for i in range(2):
    x = block(p, f"encoder.blocks.{i}", x, 3, (1.0, 1.0) if keep is None else keep[i])
  return layer_norm(p, "encoder.norm", x)[:, 0]


def unit(x):
  return x / x.norm(dim=-1, keepdim=True)


# ---- optimizers


def vector(name, x):
  """What the official rules keep out of decay: biases and the parameters of norms."""
  del name
  return x.ndim <= 1


def nothing(name, x):
  del name, x
  return False


class LARS:
  """g' = g + wd p and ratio = 0.001 |p| / |g'| but for vectors; the rate inside or outside of the momentum."""

  def __init__(self, rate, weight_decay, inside):
    self.rate, self.weight_decay, self.inside, self.v = rate, weight_decay, inside, {}

  def __call__(self, params, grads, t):
    for name, g in grads.items():
      p = params[name]
      if p.ndim > 1:
        g = g + self.weight_decay * p
        g = g * (0.001 * p.norm() / g.norm())
      step = self.rate(t) * g if self.inside else g
      self.v[name] = 0.9 * self.v.get(name, 0) + step
      params[name] = p - (self.v[name] if self.inside else self.rate(t) * self.v[name])


class SGD:
  """PyTorch's, with decay on everything."""

  def __init__(self, rate, weight_decay):
    self.rate, self.weight_decay, self.v = rate, weight_decay, {}

  def __call__(self, params, grads, t):
    for name, g in grads.items():
      self.v[name] = 0.9 * self.v.get(name, 0) + g + self.weight_decay * params[name]
      params[name] = params[name] - self.rate(t) * self.v[name]


class AdamW:
  """PyTorch's; a parameter that is left out of `grads` is neither decayed nor counted."""

  def __init__(self, rate, weight_decay, betas, spared):
    self.rate, self.weight_decay, self.betas, self.spared, self.state = rate, weight_decay, betas, spared, {}

  def __call__(self, params, grads, t):
    for name, g in grads.items():
      n, m, v = self.state.get(name, (0, 0.0, 0.0))
      n, m, v = n + 1, self.betas[0] * m + (1 - self.betas[0]) * g, self.betas[1] * v + (1 - self.betas[1]) * g * g
      self.state[name] = n, m, v
      p = params[name]
      if not self.spared(name, p):
        p = p * (1 - self.rate(t) * self.weight_decay(t))
      params[name] = p - self.rate(t) * (m / (1 - self.betas[0] ** n)) / ((v / (1 - self.betas[1] ** n)).sqrt() + 1e-8)


def half_cosine(t):
  return 0.5 * (1 + math.cos(math.pi * t))


def warmup_cosine(peak, end=0.0, inclusive=False):
  """Linear over the first epoch, then a half cosine; DINO's warm-up reaches the peak in its last step."""

  def rate(t):
    if t < EPOCH:
      return peak * t / (EPOCH - 1 if inclusive else EPOCH)
    return end + (peak - end) * half_cosine((t - EPOCH) / (TOTAL - EPOCH))

  return rate


# ---- runs


def shapes_resnet(first_projection):
  shapes = {"conv1.weight": (4, 3, 3, 3), "bn1": 4}
  for stage, before, after in (("layer1.0", 4, 4), ("layer2.0", 4, 8)):
    shapes |= {f"{stage}.conv1.weight": (after, before, 3, 3), f"{stage}.bn1": after}
    shapes |= {f"{stage}.conv2.weight": (after, after, 3, 3), f"{stage}.bn2": after}
    if before != after or first_projection:
      shapes |= {f"{stage}.downsample.0.weight": (after, before, 1, 1), f"{stage}.downsample.1": after}
  return {f"encoder.{name}": shape for name, shape in shapes.items()}


def shapes_blocks(prefix, count, dim):
  shapes = {}
  for i in range(count):
    for name, (out, inner) in {
      "attn.qkv": (36, 12),
      "attn.proj": (12, 12),
      "mlp.fc1": (48, 12),
      "mlp.fc2": (12, 48),
    }.items():
      shapes |= {f"{prefix}.{i}.{name}.weight": (out, inner), f"{prefix}.{i}.{name}.bias": (out,)}
    for name in ("norm1", "norm2"):
      shapes |= {f"{prefix}.{i}.{name}.weight": (dim,), f"{prefix}.{i}.{name}.bias": (dim,)}
  return shapes


def shapes_vit(learned):
  shapes = {"patch_embed.proj.weight": (12, 3, 4, 4), "patch_embed.proj.bias": (12,), "cls_token": (1, 1, 12)}
  shapes |= {"norm.weight": (12,), "norm.bias": (12,)} | ({"pos_embed": (1, 17, 12)} if learned else {})
  return {f"encoder.{name}": shape for name, shape in (shapes | shapes_blocks("blocks", 2, 12)).items()}


def shapes_mlp(name, layers, inner, hidden, out, *, bias=False, last=None):
  """`last`: None, "scale" or "plain", the norm behind the last layer."""
  shapes = {}
  for i in range(layers):
    width = out if i == layers - 1 else hidden
    shapes[f"{name}.{3 * i}.weight"] = (width, inner)
    if i < layers - 1:
      shapes |= {f"{name}.{3 * i + 1}": width} | ({f"{name}.{3 * i}.bias": (width,)} if bias else {})
    elif last:
      shapes[f"{name}.{3 * i + 1}:{last}"] = width
    inner = width
  return shapes


def start(run, shapes):
  """(parameters, running statistics) by `named_weight`; an entry whose shape is a number is a batch norm."""
  params, stats = {}, {}

  def value(name, shape):
    return torch.tensor(named_weight(f"{run}/{name}", shape)).double()

  for entry, shape in shapes.items():
    if not isinstance(shape, int):
      params[entry] = value(entry, shape)
      continue
    name, _, kind = entry.partition(":")
    if kind != "plain":
      params[f"{name}.weight"] = value(f"{name}.weight", (shape,))
    if not kind:
      params[f"{name}.bias"] = value(f"{name}.bias", (shape,))
    for key in ("running_mean", "running_var"):
      stats[f"{name}.{key}"] = value(f"{name}.{key}", (shape,))
  return params, stats


def gradients(params, loss_of, without=()):
  """(loss, gradients) of the parameters but `without`."""
  leaves = {name: x.detach().requires_grad_() for name, x in params.items()}
  loss = loss_of(leaves)
  wanted = [name for name in leaves if name not in without]
  grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
  return loss.item(), dict(zip(wanted, grads, strict=True))


def blend(slow, fast, m):
  """m slow + (1 - m) fast, of what the slow network has."""
  return {name: m * x + (1 - m) * fast[name] for name, x in slow.items()}


def slow_part(tree):
  return {name: x for name, x in tree.items() if not name.startswith("predictor.")}


def simclr(run):
  """Both views in one batch norm batch; twice the paper's loss; LARS with the rate inside."""
  params, stats = start(run, shapes_resnet(True) | shapes_mlp("projector", 2, 8, 8, 6, last="scale"))
  optimizer, losses = LARS(warmup_cosine(0.05), 1e-2, inside=True), []
  for t in range(STEPS):
    images = torch.cat([view(pixels(t), normalise=False), view(pixels(t), flip=True, solarize=True, normalise=False)])

    def loss_of(p, images=images):
      z = unit(mlp(p, stats, "projector", resnet(p, stats, images)))
      a, b = z[:BATCH], z[BATCH:]
      masked = -1e9 * torch.eye(BATCH)
      labels = torch.arange(BATCH)
      ab, aa, bb = a @ b.T / 0.1, a @ a.T / 0.1 + masked, b @ b.T / 0.1 + masked
      return F.cross_entropy(torch.cat([ab, aa], 1), labels) + F.cross_entropy(torch.cat([ab.T, bb], 1), labels)

    loss, grads = gradients(params, loss_of)
    losses.append(loss / 2)
    optimizer(params, grads, t)
  return losses, {"params": params, "batch_stats": stats}


def moco(run, version):
  """Keys of a slow copy, which moves first, shuffled between batch norm's groups of 2; 20 old keys."""
  head = {"fc.weight": (6, 8), "fc.bias": (6,)}
  if version == 2:
    head = {"fc.0.weight": (8, 8), "fc.0.bias": (8,), "fc.2.weight": (6, 8), "fc.2.bias": (6,)}
  params, stats = start(run, shapes_resnet(False) | {f"projector.{name}": shape for name, shape in head.items()})
  keys, key_stats = dict(params), dict(stats)
  queue = unit(torch.tensor(named_weight(f"{run}/queue", (20, 6))).double())
  temperature, pointer, losses = (0.07, 0.2)[version - 1], 0, []
  if version == 1:
    rate = lambda t: 0.03 * 0.1 ** (t // EPOCH >= 1)  # noqa: E731  a milestone after the first epoch
  else:
    rate = lambda t: 0.03 * half_cosine((t // EPOCH) / (TOTAL / EPOCH))  # noqa: E731  by whole epochs
  optimizer = SGD(rate, 1e-2)

  def network(p, s, x):
    h = resnet(p, s, x, groups=BATCH // 2)
    if version == 1:
      return unit(linear(p, "projector.fc", h))
    return unit(linear(p, "projector.fc.2", F.relu(linear(p, "projector.fc.0", h))))

  for t in range(STEPS):
    order = np.argsort([float(draw(key, SHUFFLE)) for key in example_keys(t)])
    with torch.no_grad():
      keys = blend(keys, params, 0.9)
      shuffled = network(keys, key_stats, view(pixels(t), flip=True, solarize=True)[order.copy()])
      k = torch.empty_like(shuffled)
      k[order.copy()] = shuffled

    def loss_of(p, t=t, k=k, queue=queue):
      q = network(p, stats, view(pixels(t)))
      logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
      return F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))

    loss, grads = gradients(params, loss_of)
    losses.append(loss)
    queue = queue.clone()
    queue[(pointer + torch.arange(BATCH)) % 20] = k
    pointer = (pointer + BATCH) % 20
    optimizer(params, grads, t)
  keys = blend(keys, params, 0.9)  # what the next step would begin with
  trees = {"params": params, "batch_stats": stats, "key_params": keys, "key_batch_stats": key_stats}
  return losses, trees | {"queue": {"": queue}}


def moco_v3(run, encoder):
  """Both directions, keys of the batch, a momentum network that moves before its keys; one pass a view."""
  if encoder == "resnet":
    shapes = shapes_resnet(False) | shapes_mlp("projector", 2, 8, 16, 6, last="plain")
    shapes |= shapes_mlp("predictor", 2, 6, 16, 6)
    optimizer, temperature, frozen = LARS(warmup_cosine(0.25), 1e-2, inside=False), 1.0, ()
  else:
    shapes = shapes_vit(False) | shapes_mlp("projector", 3, 12, 16, 6, last="plain")
    shapes |= shapes_mlp("predictor", 2, 6, 16, 6, last="plain")
    optimizer = AdamW(warmup_cosine(1e-3), lambda t: 0.1, (0.9, 0.999), nothing)
    temperature, frozen = 0.2, ("encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias")
  params, stats = start(run, shapes)
  slow, slow_stats, losses = slow_part(params), slow_part(stats), []
  positions = sincos(4, 12, row_first=True)

  def project(p, s, x):
    h = resnet(p, s, x) if encoder == "resnet" else vit(p, x, positions, frozen=True)
    return mlp(p, s, "projector", h)

  def contrast(q, k):
    return 2 * temperature * F.cross_entropy(unit(q) @ unit(k).T / temperature, torch.arange(BATCH))

  for t in range(STEPS):
    x1, x2 = view(pixels(t)), view(pixels(t), flip=True, solarize=True)
    with torch.no_grad():
      slow = blend(slow, params, 1 - (1 - 0.9) * half_cosine(t / TOTAL))
      k1, k2 = project(slow, slow_stats, x1), project(slow, slow_stats, x2)

    def loss_of(p, x1=x1, x2=x2, k1=k1, k2=k2):
      q1 = mlp(p, stats, "predictor", project(p, stats, x1))
      q2 = mlp(p, stats, "predictor", project(p, stats, x2))
      return contrast(q1, k2) + contrast(q2, k1)

    loss, grads = gradients(params, loss_of, frozen)
    losses.append(loss)
    optimizer(params, grads, t)
  slow = blend(slow, params, 1 - (1 - 0.9) * half_cosine(STEPS / TOTAL))
  return losses, {"params": params, "batch_stats": stats, "momentum_params": slow, "momentum_batch_stats": slow_stats}


def byol(run):
  """The target starts elsewhere, has statistics of its own and follows after the optimizer's step."""
  head = dict(layers=2, hidden=16, out=6, bias=True)
  shapes = shapes_resnet(True) | shapes_mlp("projector", inner=8, **head) | shapes_mlp("predictor", inner=6, **head)
  params, stats = start(f"{run}/online", shapes)
  target, target_stats = (slow_part(tree) for tree in start(f"{run}/target", shapes))
  optimizer, losses = LARS(warmup_cosine(0.25), 1e-2, inside=False), []

  def project(p, s, x):
    return mlp(p, s, "projector", resnet(p, s, x))

  for t in range(STEPS):
    x1, x2 = view(pixels(t)), view(pixels(t), flip=True, solarize=True)
    with torch.no_grad():
      z1, z2 = project(target, target_stats, x1), project(target, target_stats, x2)

    def loss_of(p, x1=x1, x2=x2, z1=z1, z2=z2):
      p1 = mlp(p, stats, "predictor", project(p, stats, x1))
      p2 = mlp(p, stats, "predictor", project(p, stats, x2))
      return ((unit(p1) - unit(z2)) ** 2).sum(1).mean() + ((unit(p2) - unit(z1)) ** 2).sum(1).mean()

    loss, grads = gradients(params, loss_of)
    losses.append(loss)
    optimizer(params, grads, t)
    target = blend(target, params, 1 - (1 - 0.9) * half_cosine(t / TOTAL))
  trees = {"params": params, "batch_stats": stats, "target_params": target, "target_batch_stats": target_stats}
  return losses, trees


def redundancy(run, loss_of_features):
  """One pass a view through three layers and a loss of the whole batch, whose statistics take the gradient."""
  params, stats = start(run, shapes_resnet(False) | shapes_mlp("projector", 3, 8, 16, 6))
  optimizer, losses = LARS(warmup_cosine(0.25, end=1.6e-3), 1e-2, inside=False), []
  scale = 1.0 if run == "vicreg" else 0.024
  for t in range(STEPS):
    images = view(pixels(t)), view(pixels(t), flip=True, solarize=True)

    def loss_of(p, images=images):
      z1, z2 = (mlp(p, stats, "projector", resnet(p, stats, x)) for x in images)
      return scale * loss_of_features(z1, z2)

    loss, grads = gradients(params, loss_of)
    losses.append(loss / scale)
    optimizer(params, grads, t)
  return losses, {"params": params, "batch_stats": stats}


def off_diagonal(matrix):
  return matrix - torch.diag(torch.diag(matrix))


def vicreg(z1, z2):
  value = 25 * F.mse_loss(z1, z2)
  for z in (z1, z2):
    covariance = torch.cov(z.T)
    value = value + 25 * F.relu(1 - (torch.diag(covariance) + 1e-4).sqrt()).mean() / 2
    value = value + off_diagonal(covariance).square().sum() / z.shape[1]
  return value


def barlow_twins(z1, z2):
  a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z1, z2))
  c = a.T @ b / BATCH
  return (torch.diag(c) - 1).square().sum() + 0.0051 * off_diagonal(c).square().sum()


def simsiam(run):
  """One network; the projection that is predicted takes no gradient; rates fall by whole epochs."""
  shapes = shapes_resnet(False) | shapes_mlp("projector", 3, 8, 8, 6, last="plain")
  shapes |= shapes_mlp("predictor", 2, 6, 16, 6) | {"predictor.3.bias": (6,)}
  params, stats = start(run, shapes)
  optimizer, losses = SGD(lambda t: 0.01 * half_cosine((t // EPOCH) / (TOTAL / EPOCH)), 1e-2), []
  for t in range(STEPS):
    images = view(pixels(t)), view(pixels(t), flip=True, solarize=True)

    def loss_of(p, images=images):
      z1, z2 = (mlp(p, stats, "projector", resnet(p, stats, x)) for x in images)
      p1, p2 = (mlp(p, stats, "predictor", z) for z in (z1, z2))
      return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2

    loss, grads = gradients(params, loss_of)
    losses.append(loss)
    optimizer(params, grads, t)
  return losses, {"params": params, "batch_stats": stats}


def mae(run):
  """Four of 16 patches stay; normalised pixels of the removed ones."""
  shapes = shapes_vit(False) | {"decoder.decoder_embed.weight": (12, 12), "decoder.decoder_embed.bias": (12,)}
  shapes |= {"decoder.mask_token": (1, 1, 12)} | shapes_blocks("decoder.decoder_blocks", 1, 12)
  shapes |= {"decoder.decoder_norm.weight": (12,), "decoder.decoder_norm.bias": (12,)}
  shapes |= {"decoder.decoder_pred.weight": (48, 12), "decoder.decoder_pred.bias": (48,)}
  params, _ = start(run, shapes)
  optimizer, losses = AdamW(warmup_cosine(1e-3), lambda t: 0.5, (0.9, 0.95), vector), []
  positions = sincos(4, 12, row_first=False)

  for t in range(STEPS):
    x = view(pixels(t))
    noise = torch.tensor(np.stack([draw(key, MASK, (16,)) for key in example_keys(t)]))

    def loss_of(p, x=x, noise=noise):
      patches, token = embed(p, x, positions)
      order = noise.argsort(1)
      back = order.argsort(1)
      kept = torch.gather(patches, 1, order[:, :4, None].expand(-1, -1, 12))
      h = torch.cat([token, kept], 1)
      for i in range(2):
        h = block(p, f"encoder.blocks.{i}", h, 3)
      h = linear(p, "decoder.decoder_embed", layer_norm(p, "encoder.norm", h))
      filled = torch.cat([h[:, 1:], p["decoder.mask_token"].expand(BATCH, 12, -1)], 1)
      filled = torch.gather(filled, 1, back[:, :, None].expand(-1, -1, 12))
      h = torch.cat([h[:, :1], filled], 1) + positions
      h = layer_norm(p, "decoder.decoder_norm", block(p, "decoder.decoder_blocks.0", h, 3))
      predicted = linear(p, "decoder.decoder_pred", h)[:, 1:]
      target = x.reshape(BATCH, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(BATCH, 16, 48)
      target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
      removed = (back >= 4).double()
      return (((predicted - target) ** 2).mean(-1) * removed).sum() / removed.sum()

    loss, grads = gradients(params, loss_of)
    losses.append(loss)
    optimizer(params, grads, t)
  return losses, {"params": params}


def dino(run):
  """Two global views of 16 and three local ones of 8; centre, late last layer, clipping by parameter, drop path."""
  shapes = shapes_vit(True) | {"head.last_layer.weight_v": (32, 8), "head.last_layer.weight_g": (32, 1)}
  for i, (out, inner) in enumerate(((16, 12), (16, 16), (8, 16))):
    shapes |= {f"head.mlp.{2 * i}.weight": (out, inner), f"head.mlp.{2 * i}.bias": (out,)}
  params, _ = start(run, shapes)
  teacher, center, losses = dict(params), torch.zeros(32), []
  decay = lambda t: 4 + (0.4 - 4) * half_cosine(t / TOTAL)  # noqa: E731
  optimizer = AdamW(warmup_cosine(1e-3, end=1e-4, inclusive=True), decay, (0.9, 0.999), vector)
  temperatures = [0.04, 0.055, 0.07]  # by epoch, from 0.04 to 0.07 over three

  def head(p, x):
    x = F.gelu(linear(p, "head.mlp.0", x))
    x = unit(linear(p, "head.mlp.4", F.gelu(linear(p, "head.mlp.2", x))))
    v = p["head.last_layer.weight_v"]
    return x @ (p["head.last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T

  for t in range(STEPS):
    large = [view(pixels(t)), view(pixels(t), flip=True, solarize=True)]
    small = [view(pixels(t), size=8), view(pixels(t), size=8, flip=True), view(pixels(t), size=8, solarize=True)]
    kept = np.stack(
      [[draw(jax.random.fold_in(key, DROP_PATH), v, (2, 2)) for key in example_keys(t)] for v in range(5)]
    )

    def keep(first, count, kept=kept):
      """For each block a factor a branch: rate 0 in the first, 0.5 in the last."""
      u = torch.tensor(kept[first : first + count].reshape(count * BATCH, 2, 2))
      factors = torch.floor(0.5 + u) / 0.5
      return [(1.0, 1.0), (factors[:, 1, 0, None, None], factors[:, 1, 1, None, None])]

    with torch.no_grad():
      raw = head(teacher, vit(teacher, torch.cat(large), learned_positions(teacher, 4)))
      targets = ((raw - center) / temperatures[t // EPOCH]).softmax(-1).chunk(2)

    def loss_of(p, large=large, small=small, keep=keep, targets=targets):
      features = [vit(p, torch.cat(large), learned_positions(p, 4), keep=keep(0, 2))]
      features.append(vit(p, torch.cat(small), learned_positions(p, 2), keep=keep(2, 3)))
      logits = (head(p, torch.cat(features)) / 0.1).chunk(5)
      terms = [
        (-target * F.log_softmax(student, -1)).sum(-1).mean()
        for i, target in enumerate(targets)
        for v, student in enumerate(logits)
        if v != i
      ]
      return sum(terms) / len(terms)

    late = ("head.last_layer.weight_v",) if t < EPOCH else ()
    loss, grads = gradients(params, loss_of, ("head.last_layer.weight_g",))
    losses.append(loss)
    grads = {name: g * min(1, 0.3 / (g.norm() + 1e-6)) for name, g in grads.items() if name not in late}
    center = 0.9 * center + 0.1 * raw.mean(0)
    optimizer(params, grads, t)
    teacher = blend(teacher, params, 1 - (1 - 0.9) * half_cosine(t / TOTAL))
  return losses, {"params": params, "teacher_params": teacher, "center": {"": center}}


RUNS = {
  "simclr": simclr,
  "moco_v1": lambda run: moco(run, 1),
  "moco_v2": lambda run: moco(run, 2),
  "moco_v3": lambda run: moco_v3(run, "resnet"),
  "moco_v3_vit": lambda run: moco_v3(run, "vit"),
  "byol": byol,
  "mae": mae,
  "dino": dino,
  "vicreg": lambda run: redundancy(run, vicreg),
  "barlow_twins": lambda run: redundancy(run, barlow_twins),
  "simsiam": simsiam,
}


if __name__ == "__main__":
  out = {f"pixels{t}": pixels(t) for t in range(STEPS)}
  for run, function in RUNS.items():
    losses, trees = function(run)
    out[f"{run}/loss"] = np.array(losses)
    for tree, entries in trees.items():
      out |= {f"{run}/{tree}/{name}": x.detach().numpy() for name, x in entries.items()}
    print(run, *(f"{loss:.6f}" for loss in losses))
  np.savez_compressed(pathlib.Path(__file__).with_name("steps.npz"), **out)
