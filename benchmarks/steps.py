"""Training steps on a CPU: images a second, ours against the same model, heads and loss in PyTorch.

  pip install -r requirements.txt -r requirements-bench.txt
  export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736
  PYTHONPATH=. taskset -c 0 python benchmarks/steps.py --json=steps.json

One step is: the views' forward passes, loss, backward pass, optimizer, and the slow network's average where there is
one. The views are drawn already; --augment times ours once more with `augment.make_views` inside. Both sides are
float32, with equal shapes and numbers of parameters. Backbones are torchvision's and timm's, losses and heads lightly's
where it has the same. PyTorch runs as it is and, ResNets, in channels-last too: the faster one counts.

The variables let glibc keep what either side frees. Without them XLA, which takes a step's memory anew each time, waits
for the kernel to clear it: a sixth of the time, and any amount on a virtual machine whose host takes freed memory back.
"""

import copy
import functools
import os
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timm
import torch
import torchvision
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import DINOProjectionHead
from torch import nn

from ssl_jax import augment, byol, constant_momentum, dino, mae, moco, simclr
from ssl_jax.augment import View
from ssl_jax.models import ENCODERS
from ssl_jax.models.heads import DINOHead, MoCoHead, Projector, SimCLRProjector
from ssl_jax.models.mae import MAEDecoder

JITTER = dict(jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0.2)
PROTOTYPES = 2048
LOCAL = 4  # DINO's local crops
QUEUE = 4096
DECODER = dict(dim=192, depth=4, heads=3)


class Nets(NamedTuple):
  """The names of the backbones, and the features that they give."""

  resnet: str
  resnet_dim: int
  vit: str
  vit_dim: int


SMALL = Nets("resnet18", 512, "vit_tiny", 192)
LARGE = Nets("resnet50", 2048, "vit_small", 384)  # for accelerators: benchmarks/accelerator.py


# ---- ours


def our_case(name, size, patch, nets=SMALL, dtype=jnp.float32):
  """(method, views) of a case."""
  stem = "small" if size == 32 else "imagenet"
  momentum = constant_momentum(0.99)
  two = 2 * (View(size, **JITTER),)
  resnet = functools.partial(ENCODERS[nets.resnet], stem=stem, dtype=dtype)
  if name == "simclr":
    return simclr(resnet(), SimCLRProjector(features=128, dtype=dtype)), two
  if name == "moco":
    run = dict(queue_size=QUEUE, temperature=0.2, momentum=momentum)
    return moco(resnet(), MoCoHead(features=128, dtype=dtype), **run), two
  if name == "byol":
    mlp = functools.partial(Projector, hidden=4096, features=256, hidden_bias=True, dtype=dtype)
    return byol(resnet(), mlp(), mlp(), target_momentum=momentum), two
  encoder = functools.partial(ENCODERS[nets.vit], patch_size=patch, image_size=size, dtype=dtype)
  if name == "mae":
    decoder = MAEDecoder(3 * patch**2, **DECODER, dtype=dtype)
    return mae(encoder(positions="column_first"), decoder), (View(size, scale=(0.2, 1.0)),)
  head = DINOHead(prototypes=PROTOTYPES, dtype=dtype)
  large, small = View(size, scale=(0.4, 1.0), **JITTER), View(size // 2, scale=(0.05, 0.4), **JITTER)
  return dino(encoder(), head, teacher_temperature=optax.constant_schedule(0.04), teacher_momentum=momentum), (
    *(2 * (large,)),
    *(LOCAL * (small,)),
  )


def our_step(name, size, patch, batch, inside, nets=SMALL, dtype=jnp.float32):
  """(a function that makes one step, number of trained parameters); `inside`: the views are drawn in the step."""
  method, views = our_case(name, size, patch, nets, dtype)
  optimizer = optax.adamw(1e-4) if patch else optax.sgd(0.01, momentum=0.9)
  images = jnp.asarray(pixels(batch, size))
  keys = augment.example_keys(0, 0, jnp.arange(batch))
  drawn = jax.jit(augment.make_views, static_argnums=2)(keys, images, views)
  params, state = jax.jit(method.init)(jax.random.key(0), jax.tree.map(lambda x: x[:, :2], drawn))

  def step(carry, given):
    params, state, opt_state, i = carry
    keys = augment.example_keys(0, i, jnp.arange(batch))
    drawn = augment.make_views(keys, given, views) if inside else given
    (_, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, drawn, keys, i)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, method.update(params, state, aux, i), opt_state, i + 1), aux.metrics["loss"]

  carry, given = (params, state, optimizer.init(params), jnp.int32(0)), images if inside else drawn
  program = jax.jit(step, donate_argnums=0).lower(carry, given).compile()

  def call():
    nonlocal carry
    carry, loss = jax.block_until_ready(program(carry, given))
    assert jnp.isfinite(loss)

  trained = sum(x.size for path, x in jax.tree.leaves_with_path(params) if "weight_g" not in str(path))
  return call, trained


# ---- PyTorch


class TorchMAE(nn.Module):
  """The official MAE's model on timm's blocks, with fixed positions."""

  def __init__(self, size, patch, nets):
    super().__init__()
    self.patch, length = patch, (size // patch) ** 2
    self.encoder = timm.create_model(
      f"{nets.vit}_patch16_224", patch_size=patch, img_size=size, num_classes=0, global_pool=""
    )
    self.encoder.pos_embed.requires_grad_(False)
    dim = DECODER["dim"]
    self.embed, self.token = nn.Linear(nets.vit_dim, dim), nn.Parameter(torch.zeros(1, 1, dim))
    self.register_buffer("positions", torch.randn(1, 1 + length, dim) * 0.02)
    block = functools.partial(timm.models.vision_transformer.Block, dim, DECODER["heads"], qkv_bias=True)
    self.blocks = nn.Sequential(*(block() for _ in range(DECODER["depth"])))
    self.norm, self.predict = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 3 * patch**2)

  def forward(self, images):
    b, p = len(images), self.patch
    encoder = self.encoder
    tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    length, d = tokens.shape[1:]
    shuffle = torch.rand(b, length, device=images.device).argsort(dim=1)
    restore, keep = shuffle.argsort(dim=1), length // 4
    visible = tokens.gather(1, shuffle[:, :keep, None].expand(-1, -1, d))
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(b, -1, -1)
    x = self.embed(encoder.norm(encoder.blocks(torch.cat([cls, visible], dim=1))))
    filled = torch.cat([x[:, 1:], self.token.expand(b, length - keep, -1)], dim=1)
    filled = filled.gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
    x = self.blocks(torch.cat([x[:, :1], filled], dim=1) + self.positions)
    prediction = self.predict(self.norm(x))[:, 1:]
    side = images.shape[-1] // p
    target = images.reshape(b, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    error = ((prediction - (target - mean) / (var + 1e-6).sqrt()) ** 2).mean(-1)
    mask = (restore >= keep).float()
    return (error * mask).sum() / mask.sum()


def torch_resnet(size, nets):
  net = getattr(torchvision.models, nets.resnet)()
  net.fc = nn.Identity()
  if size == 32:
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
  return net


def torch_mlp(features, hidden, out):
  return nn.Sequential(
    nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False)
  )


def frozen_copy(net):
  return copy.deepcopy(net).requires_grad_(False)


def follow(slow, net, rate=0.01):
  with torch.no_grad():
    torch._foreach_lerp_(list(slow.parameters()), list(net.parameters()), rate)


def torch_simclr(size, nets):
  d = nets.resnet_dim
  last_norm = nn.BatchNorm1d(128)
  last_norm.bias.requires_grad_(False)
  head = nn.Sequential(
    nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, 128, bias=False), last_norm
  )
  net, criterion = nn.Sequential(torch_resnet(size, nets), head), NTXentLoss(0.1)

  def loss(views):
    return criterion(*net(torch.cat(views)).chunk(2))

  return net, loss, lambda: None


def torch_moco(size, nets):
  d = nets.resnet_dim
  head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 128))
  net = nn.Sequential(torch_resnet(size, nets), head)
  slow, criterion = frozen_copy(net), NTXentLoss(0.2, memory_bank_size=(QUEUE, 128))

  def loss(views):
    with torch.no_grad():
      order = torch.randperm(len(views[1]), device=views[1].device)
      key = slow(views[1][order])[order.argsort()]
    return criterion(net(views[0]), key)

  return net, loss, lambda: follow(slow, net)


def torch_byol(size, nets):
  online = nn.Sequential(torch_resnet(size, nets), torch_mlp(nets.resnet_dim, 4096, 256))
  predictor, target, criterion = torch_mlp(256, 4096, 256), frozen_copy(online), NegativeCosineSimilarity()

  def loss(views):
    with torch.no_grad():
      z = [target(view) for view in views]
    p = [predictor(online(view)) for view in views]
    return criterion(p[0], z[1]) + criterion(p[1], z[0])

  return nn.ModuleList([online, predictor]), loss, lambda: follow(target, online)


def torch_mae(size, nets, patch):
  net = TorchMAE(size, patch, nets)
  return net, lambda views: net(views[0]), lambda: None


def torch_dino(size, nets, patch):
  def network():  # weight_norm cannot be copied
    shape = dict(patch_size=patch, img_size=size, num_classes=0, dynamic_img_size=True)
    backbone = timm.create_model(f"{nets.vit}_patch16_224", **shape)
    return nn.Sequential(backbone, DINOProjectionHead(nets.vit_dim, 2048, 256, PROTOTYPES, norm_last_layer=True))

  student, teacher, criterion = network(), network().requires_grad_(False), DINOLoss(PROTOTYPES)
  teacher.load_state_dict(student.state_dict())
  backbone, head = student

  def loss(views):
    with torch.no_grad():
      targets = teacher(torch.cat(views[:2])).chunk(2)
    features = [backbone(torch.cat(part)) for part in (views[:2], views[2:])]
    return criterion(list(targets), list(head(torch.cat(features)).chunk(len(views))), teacher_temp=0.04)

  return student, loss, lambda: follow(teacher, student)


PEERS = dict(simclr=torch_simclr, moco=torch_moco, byol=torch_byol, mae=torch_mae, dino=torch_dino)


def torch_step(name, size, patch, batch, channels_last, nets=SMALL, device="cpu"):
  """(a function that makes one step, number of trained parameters).

  On a GPU the loss is compiled, in bfloat16 by autocast, and what autocast leaves in float32 may use TF32.
  """
  gpu = device != "cpu"
  with torch.device(device):
    net, loss, after = PEERS[name](size, nets, patch) if patch else PEERS[name](size, nets)
  if gpu:
    torch.set_float32_matmul_precision("high")
    loss = torch.compile(loss)
  layout = torch.channels_last if channels_last else torch.contiguous_format
  net.to(memory_format=layout)
  parameters = [p for p in net.parameters() if p.requires_grad]
  sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
  optimizer = (functools.partial(torch.optim.AdamW, lr=1e-4) if patch else sgd)(
    parameters, **({"fused": True} if gpu else {"foreach": True})
  )
  sizes = dict(mae=[size], dino=2 * [size] + LOCAL * [size // 2]).get(name, 2 * [size])
  views = [torch.rand(batch, 3, s, s, device=device).to(memory_format=layout) for s in sizes]

  def call():
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=gpu):
      value = loss(views)
    value.backward()
    optimizer.step()
    after()
    assert torch.isfinite(value)

  return call, sum(p.numel() for p in parameters)


# ---- the table

CASES = {  # method, side of the images, patch, batch
  "SimCLR ResNet-18 32": ("simclr", 32, None, 128),
  "MoCo v2 ResNet-18 32": ("moco", 32, None, 128),
  "BYOL ResNet-18 32": ("byol", 32, None, 128),
  "MAE ViT-Ti/4 32": ("mae", 32, 4, 128),
  "DINO ViT-Ti/4 2x32+4x16": ("dino", 32, 4, 32),
  "MAE ViT-Ti/16 224": ("mae", 224, 16, 8),
  "SimCLR ResNet-18 224": ("simclr", 224, None, 8),
}


def pixels(batch, size):
  return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
  parser.add_argument("--augment", action="store_true", help="ours once more, with the augmentation")
  parser.add_argument("--batch", type=int, help="in place of the cases' own")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  common.introduce()
  kept = {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
  print(f"glibc: {kept or 'as it is'}")
  print("images per CPU second; augmented: ours with the augmentation")
  print(
    f"{'':>23} {'batch':>5} {'parameters':>10} {'ours':>7} {'PyTorch':>7} {'ratio':>6} {'layout':>13} {'augmented':>9}"
  )
  rows = []
  for case in args.cases:
    name, size, patch, batch = CASES[case]
    batch = args.batch or batch
    shape = name, size, patch, batch
    ours, count = our_step(*shape, False)
    calls = dict(ours=ours)
    if args.augment:
      calls["augmented"] = our_step(*shape, True)[0]
    for layout in ("contiguous",) if patch else ("contiguous", "channels_last"):
      calls[layout], peer_count = torch_step(*shape, layout == "channels_last")
      if peer_count != count:
        print(f"{case}: ours has {count:,} parameters, the peer {peer_count:,}")
    rate = {side: batch / seconds for side, seconds in common.take_turns(calls, args.repeats, warm=4).items()}
    layout = max((side for side in rate if side in ("contiguous", "channels_last")), key=rate.get)
    line = f"{case:>23} {batch:>5} {count:>10,} {rate['ours']:>7.2f} {rate[layout]:>7.2f}"
    augmented = f"{rate['augmented']:>9.2f}" if args.augment else ""
    print(f"{line} {rate['ours'] / rate[layout]:>6.2f} {layout:>13} {augmented}", flush=True)
    rows.append(
      dict(case=case, batch=batch, glibc=kept, parameters=count, peer_parameters=peer_count, images_per_second=rate)
    )
  common.write_json(args, rows)


if __name__ == "__main__":
  main()
