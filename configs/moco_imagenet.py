"""MoCo on ImageNet-1k, versions 1, 2 and 3.

  python train.py --config=configs/moco_imagenet.py:v2 --config.data.folder=DIR     v1, v2 (the default), v3, v3_vit

v1, v2 (arXiv:1911.05722, arXiv:2003.04297): ResNet-50, 200 epochs, batch 256 as 8 groups of 32. Published, linear
evaluation of v2: 67.5 %. v3 (arXiv:2104.02057): ResNet-50, 100 epochs, batch 4096, LARS, 68.9 %; v3_vit: ViT-S/16 with
12 heads, 300 epochs, AdamW, 73.2 %.

The learning rate of v1 and v2 is not scaled with the batch. In v1's official transform gray comes before the jitter and
the jitter is never left out; here it comes after, so v1's published figure is not this recipe's. DIR holds
train/class/** and val/class/**.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(version="v2"):
  config = configs.base()
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.dtype = "bfloat16"
  config.no_decay = ()
  if version in ("v1", "v2"):
    _queue(config, version)
  elif version == "v3":
    _version3(config)
    config.epochs = 100
    config.encoder = dict(name="resnet50")
    config.method.temperature = 1.0
    config.views = _byol_views(scale=(0.2, 1.0))
    config.optimizer = dict(name="lars", momentum=0.9, weight_decay=1e-6, lr_inside=False)
    config.lr = dict(base=0.6, scaling="linear", warmup_epochs=10.0, end=0.0)
    config.no_decay = (r".*/bias", r".*/scale")
  elif version == "v3_vit":
    _version3(config)
    config.epochs = 300
    config.encoder = dict(name="vit_small", patch_size=16, heads=12)
    config.views = _byol_views(scale=(0.08, 1.0))
    config.optimizer = dict(name="adamw", weight_decay=0.1)  # on everything that is trained
    config.lr = dict(base=1.5e-4, scaling="linear", warmup_epochs=40.0, end=0.0)
    config.frozen = (r"encoder/patch_embed/.*",)  # neither trained nor decayed: against instability
  else:
    raise UserError(f"configs/moco_imagenet.py knows v1, v2, v3 and v3_vit, got {version!r}.")
  return config


def _queue(config, version):
  config.epochs = 200
  config.batch_size = 256
  config.encoder = dict(name="resnet50")
  config.method = dict(name="moco", version=int(version[1]), features=128, temperature=0.07)
  config.method.update(queue_size=65536, momentum=0.999, bn_group_size=32)
  config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=1e-4)
  config.lr = dict(base=0.03, scaling="none", warmup_epochs=0.0, end=0.0)
  view = dict(size=224, scale=(0.2, 1.0), flip=0.5, gray_p=0.2, mean=MEAN, std=STD)
  if version == "v1":
    config.lr.milestones = (120, 160)
    view |= dict(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0)
  else:
    config.method.temperature = 0.2
    config.lr.by_epoch = True
    view |= dict(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, blur_p=0.5, blur_kind="pil")
  config.views = configs.copies(2, view)


def _version3(config):
  config.batch_size = 4096
  config.method = dict(name="moco", version=3, hidden=4096, features=256, temperature=0.2, momentum=0.99)


def _byol_views(scale):
  view = dict(size=224, scale=scale, flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)
  view |= dict(blur_kind="pil", mean=MEAN, std=STD)
  return ({**view, "blur_p": 1.0}, {**view, "blur_p": 0.1, "solarize_p": 0.2})
