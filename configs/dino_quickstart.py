"""DINO on the built-in 12,000 Fashion-MNIST images: less than ten minutes on two CPU cores.

  python train.py --config=configs/dino_quickstart.py        a small ResNet, pooled features
  python train.py --config=configs/dino_quickstart.py:vit    a small ViT on 7x7 patches, its class token

Two global and two local crops, 1,024 prototypes. The recipes were chosen on the last 2,000 training images.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError


def get_config(version="resnet"):
  if version not in ("resnet", "vit"):
    raise UserError(f"configs/dino_quickstart.py knows resnet and vit, got {version!r}.")
  vit = version == "vit"
  config = configs.base()
  config.epochs = 16 if vit else 40
  config.batch_size = 64 if vit else 128
  config.data.name = "fashion_mnist_mini"
  config.data.channels = 1
  config.encoder = dict(name="resnet", stages=(1, 1), width=0.5, stem="patch", features="pooled")
  if vit:
    config.encoder = dict(name="vit", patch_size=7, dim=64, depth=3, heads=4, init_std=0.1, features="cls")
  head = dict(hidden=256, bottleneck=64, prototypes=1024)
  config.method = dict(name="dino", head=head, student_temperature=0.1, center_momentum=0.9, teacher_momentum=0.99)
  config.method.update(teacher_temperature=0.04, teacher_temperature_start=0.04, teacher_temperature_warmup_epochs=0)
  look = dict(flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=0.8)
  large = dict(size=28, scale=(0.3, 1.0), **look)
  small = dict(size=14 if vit else 20, scale=(0.08, 0.3), **look)
  config.views = configs.copies(2, large) + configs.copies(2, small)
  config.optimizer = dict(name="adamw", weight_decay=0.04, clip=3.0)
  config.lr = dict(base=1e-3 if vit else 3e-3, scaling="none", warmup_epochs=1.0, end=1e-6, inclusive=True)
  config.no_decay = (r".*/bias", r".*/scale")
  config.frozen = (r"head/last_layer/weight_g",)
  config.late = (r"head/last_layer/weight_v",)  # not trained in the first epoch
  config.late_epochs = 1
  config.log_every_steps = 187 if vit else 93
  config.eval_every_epochs = 4 if vit else 5
  return config
