"""LeJEPA, ViT-S/8, Imagenette at 128 pixels, 800 epochs (Balestriero and LeCun, 2025, arXiv:2511.08544; MINIMAL.md).

  python train.py --config=configs/lejepa_imagenette.py --config.data.folder=DIR

The official repository's minimal listing: four views of one size, all of them global. Not as there: no drop path
(0.1), the learning rate warms up from 0 and not from a hundredth, and evaluation takes the class token in front of the
linear layer to the embedding; the listing's figure is not this recipe's. Paper and README, for ImageNet: weight 0.05,
1024 slices, two views of 224 pixels and six to eight of 96. DIR holds train/class/** and val/class/**.
"""

from ssl_jax import config as configs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config():
  config = configs.base()
  config.epochs = 800
  config.batch_size = 256
  config.dtype = "bfloat16"
  config.data.name = "imagenette"
  config.data.test_split = "val"
  config.encoder = dict(name="vit_small", patch_size=8)
  config.method = dict(name="lejepa", weight=0.02, slices=256, embedding=512, hidden=2048, features=16)
  view = dict(size=128, scale=(0.08, 1.0), flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray_p=0.2)
  view |= dict(blur_p=0.5, blur_kind="gaussian", blur_kernel=7, solarize_p=0.2, mean=MEAN, std=STD)
  config.views = configs.copies(4, view)
  config.eval_view.update(resize=128, size=128, mean=MEAN, std=STD)
  config.optimizer = dict(name="adamw", weight_decay=0.05)  # on everything
  config.lr = dict(base=2e-3, scaling="none", warmup_epochs=1.0, end=1e-3)
  config.no_decay = ()
  return config
