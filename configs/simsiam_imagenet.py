"""SimSiam, ResNet-50, ImageNet-1k, 100 epochs (Chen and He, 2021, arXiv:2011.10566, section 3).

  python train.py --config=configs/simsiam_imagenet.py --config.data.folder=DIR

Learning rate 0.05 * 512 / 256 = 0.1, which falls between epochs, the predictor's too. The official command holds that
one constant (--fix-pred-lr), so its published figure is not this recipe's. DIR holds train/class/** and val/class/**.
"""

from ssl_jax import config as configs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config():
  config = configs.base()
  config.epochs = 100
  config.batch_size = 512
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name="resnet50")
  config.method = dict(name="simsiam", features=2048, hidden=512)
  view = dict(size=224, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)
  view |= dict(blur_p=0.5, blur_kind="pil", mean=MEAN, std=STD)
  config.views = configs.copies(2, view)
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=1e-4)  # on everything
  config.lr = dict(base=0.05, scaling="linear", warmup_epochs=0.0, end=0.0, by_epoch=True)
  config.no_decay = ()
  return config
