"""Barlow Twins, ResNet-50, ImageNet-1k, 1000 epochs (Zbontar et al., 2021, arXiv:2103.03230, section 2.2).

  python train.py --config=configs/barlow_twins_imagenet.py --config.data.folder=DIR

Published, linear evaluation: 73.3 % (official README). The official rates are 0.2 for weights and 0.0048 for biases and
norms; here both are 0.2 and the loss is multiplied by 0.024, as in the official run: LARS takes no notice of it for
weights, but for their decay, and the others are 0.024 times as fast. DIR holds train/class/** and val/class/**.
"""

from ssl_jax import config as configs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config():
  config = configs.base()
  config.epochs = 1000
  config.batch_size = 2048
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name="resnet50")
  config.method = dict(name="barlow_twins", off_diagonal=0.0051, loss_scale=0.024, hidden=8192, features=8192)
  view = dict(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
  view |= dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_kind="pil", mean=MEAN, std=STD)
  config.views = ({**view, "blur_p": 1.0}, {**view, "blur_p": 0.1, "solarize_p": 0.2})
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.optimizer = dict(name="lars", momentum=0.9, weight_decay=1e-6, lr_inside=False)
  config.lr = dict(base=0.2, scaling="linear", warmup_epochs=10.0, end=1.6e-3)  # a thousandth of the peak
  config.no_decay = (r".*/bias", r".*/scale")  # kept out of LARS's trust ratio too
  return config
