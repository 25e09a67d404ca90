"""VICReg, ResNet-50, ImageNet-1k (Bardes et al., 2022, arXiv:2105.04906, section 5 and appendix C).

  python train.py --config=configs/vicreg_imagenet.py --config.data.folder=DIR         1000 epochs, batch 2048
  python train.py --config=configs/vicreg_imagenet.py:100 --config.data.folder=DIR     100 epochs, batch 512

Published, linear evaluation: 73.2 % at 1000 epochs. Views, batch sizes and rates are the official code's, whose two
views differ in blur and solarization as BYOL's do; the paper's text has one description for both. DIR holds
train/class/** and val/class/**.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRESETS = {100: (512, 0.3), 1000: (2048, 0.2)}  # epochs: batch, learning rate per 256 images (the README's commands)


def get_config(epochs="1000"):
  config = configs.base()
  if epochs not in map(str, PRESETS):
    raise UserError(f"configs/vicreg_imagenet.py knows {', '.join(map(str, PRESETS))} epochs, got {epochs!r}.")
  config.epochs = int(epochs)
  config.batch_size, base = PRESETS[config.epochs]
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name="resnet50")
  config.method = dict(name="vicreg", invariance=25.0, variance=25.0, covariance=1.0, hidden=8192, features=8192)
  view = dict(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
  view |= dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_kind="pil", mean=MEAN, std=STD)
  config.views = ({**view, "blur_p": 1.0}, {**view, "blur_p": 0.1, "solarize_p": 0.2})
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.optimizer = dict(name="lars", momentum=0.9, weight_decay=1e-6, lr_inside=False)
  end = 0.001 * base * config.batch_size / 256  # a thousandth of the peak
  config.lr = dict(base=base, scaling="linear", warmup_epochs=10.0, end=end)
  config.no_decay = (r".*/bias", r".*/scale")  # kept out of LARS's trust ratio too
  return config
