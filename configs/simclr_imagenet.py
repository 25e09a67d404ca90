"""SimCLR, ResNet-50, ImageNet-1k, 100 epochs (Chen et al., 2020, arXiv:2002.05709, sections 2 and 3).

  python train.py --config=configs/simclr_imagenet.py --config.data.folder=DIR        version 1
  python train.py --config=configs/simclr_imagenet.py:v2 --config.data.folder=DIR     version 2, arXiv:2006.10029

Learning rate 0.3 * 4096 / 256 = 4.8. The paper's other backbones: --config.encoder.name=resnet101 or resnet152,
--config.encoder.width=2. Published, linear evaluation: v1 69.3 % at 1000 epochs (--config.epochs=1000); v2 without its
momentum encoder 71.1 % at 800. Version 2 here is its deeper projector and its schedule; selective kernels and the
momentum encoder are not in it.

DIR holds train/class/** and val/class/**.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError


def get_config(version="v1"):
  config = configs.base()
  config.epochs = 100
  config.batch_size = 4096  # global
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name="resnet50", width=1.0)
  config.method = dict(name="simclr", temperature=0.1, projector=dict(layers=2, features=128))
  view = dict(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
  view |= dict(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray_p=0.2)
  view |= dict(blur_p=0.5, blur_kind="gaussian", blur_kernel=23, blur_sigma=(0.1, 2.0))
  config.views = configs.copies(2, view)
  config.eval_view.resize = 256
  config.eval_view.size = 224
  config.optimizer = dict(name="lars", momentum=0.9, weight_decay=1e-6, lr_inside=True)
  config.lr = dict(base=0.3, scaling="linear", warmup_epochs=10.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")  # kept out of LARS's trust ratio too
  config.eval_every_epochs = 10
  if version not in ("v1", "v2"):
    raise UserError(f"configs/simclr_imagenet.py knows v1 and v2, got {version!r}.")
  if version == "v2":
    config.epochs = 800
    config.method.projector.layers = 3
    config.optimizer.weight_decay = 1e-4
    config.lr = dict(base=0.1, scaling="sqrt", warmup_epochs=40.0, end=0.0)
  return config
