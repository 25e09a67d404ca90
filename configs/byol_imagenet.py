"""BYOL, ResNet-50, ImageNet-1k (Grill et al., 2020, arXiv:2006.07733, section 3 and appendix J).

  python train.py --config=configs/byol_imagenet.py:300 --config.data.folder=DIR     40, 100, 300 or 1000 epochs

Published, linear evaluation: 72.5 % at 300 epochs, 74.3 % at 1000. Views are torchvision's; the official ones are
TensorFlow's (additive brightness, contrast by channel), and the ResNet pads as torchvision's, not as haiku's. DIR
holds train/class/** and val/class/**.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# epochs: learning rate per 256 images, weight decay, first target momentum (byol/configs/byol.py)
PRESETS = {40: (0.45, 1e-6, 0.97), 100: (0.45, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.2, 1.5e-6, 0.996)}


def get_config(epochs="1000"):
  config = configs.base()
  if epochs not in map(str, PRESETS):
    raise UserError(f"configs/byol_imagenet.py knows {', '.join(map(str, PRESETS))} epochs, got {epochs!r}.")
  config.epochs = int(epochs)
  base, weight_decay, momentum = PRESETS[config.epochs]
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name="resnet50")
  config.method = dict(name="byol", target_momentum=momentum, mlp=dict(hidden=4096, features=256))
  view = dict(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
  view |= dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_kind="gaussian", blur_kernel=23)
  view |= dict(mean=MEAN, std=STD)
  config.views = ({**view, "blur_p": 1.0}, {**view, "blur_p": 0.1, "solarize_p": 0.2})
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.optimizer = dict(name="lars", momentum=0.9, weight_decay=weight_decay, lr_inside=False)
  config.lr = dict(base=base, scaling="linear", warmup_epochs=10.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")  # kept out of LARS's trust ratio too
  return config
