"""A linear classifier on a frozen encoder, by the papers' own protocols for ImageNet-1k: crops and flips, SGD or LARS.

  python eval_linear.py --protocol=linear --workdir=runs/simclr                               chosen by the run's method
  python eval_linear.py --protocol=linear --workdir=runs/quickstart --config=configs/linear.py:simclr \\
    --config.batch_size=256 --config.epochs=20
  python finetune.py --from=FILE --config=configs/linear.py:dino --config.data.folder=DIR --workdir=runs/linear

Versions: simclr, moco (v1 and v2), moco_v3, moco_v3_vit, byol, mae, dino, dino_vit_base. Of a run its images, sizes,
normalisation and network are taken. MAE's batch norm takes the statistics of the whole batch, where the official code
takes those of each GPU's 512 images; BYOL's learning rate is its code's, and its paper's is the best of five; DINO's
best epoch is reported there, the last one here.
"""

from ml_collections import config_dict

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERSIONS = {  # batch size, epochs, learning rate and how it goes, optimizer, interpolation, head, encoder
  "simclr": (
    4096,
    90,
    dict(base=0.1),
    dict(nesterov=True, weight_decay=1e-6),
    "bicubic",
    dict(init_std=0.0),
    "resnet50",
  ),
  "moco": (256, 100, dict(base=30.0, milestones=(60, 80)), {}, "bilinear", {}, "resnet50"),
  "moco_v3": (1024, 90, dict(base=0.1, by_epoch=True), {}, "bilinear", {}, "resnet50"),
  "moco_v3_vit": (1024, 90, dict(base=3.0, by_epoch=True), {}, "bilinear", {}, "vit_base"),
  "byol": (1024, 80, dict(base=0.2), dict(nesterov=True), "bicubic", {}, "resnet50"),
  "mae": (
    16384,
    90,
    dict(base=0.1, warmup_epochs=10.0),
    dict(lr_inside=False),
    "bicubic",
    dict(batch_norm=True),
    "vit_base",
  ),
  "dino": (256, 100, dict(base=0.001, by_epoch=True), {}, "bilinear", dict(blocks=4), "vit_small"),
  "dino_vit_base": (
    *(256, 100, dict(base=0.001, by_epoch=True), {}, "bilinear", dict(blocks=1, mean_patches=True), "vit_base"),
  ),
}


def get_config(version="simclr"):
  if version not in VERSIONS:
    raise UserError(f"configs/linear.py knows {', '.join(VERSIONS)}, got {version!r}.")
  batch_size, epochs, lr, optimizer, interpolation, head, encoder = VERSIONS[version]
  config = configs.base()
  config.epochs = epochs
  config.batch_size = batch_size
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name=encoder)
  if encoder.startswith("vit"):
    config.encoder.update(patch_size=16, features="cls")
  config.method = dict(name="supervised", train_encoder=False, classes=1000, head=dict(init_std=0.01) | head)
  config.method.labels = config_dict.placeholder(str)  # how many images have one, such as 10%; none: all
  config.views = (dict(size=224, scale=(0.08, 1.0), interpolation=interpolation, flip=0.5, mean=MEAN, std=STD),)
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.optimizer = dict(name="lars" if version == "mae" else "sgd", momentum=0.9) | optimizer
  config.lr = dict(scaling="none" if version == "moco" else "linear", warmup_epochs=0.0, end=0.0) | lr
  config.no_decay = (r".*/bias",) if version == "mae" else ()
  return config
