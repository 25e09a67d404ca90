"""MAE, ImageNet-1k, 800 epochs (He et al., 2021, arXiv:2111.06377, appendix A).

  python train.py --config=configs/mae_imagenet.py:base --config.data.folder=DIR     base, large or huge

Learning rate 1.5e-4 * 4096 / 256 = 2.4e-3. Published at 1600 epochs (--config.epochs=1600): fine-tuning 83.6 / 85.9 /
86.9 %, linear 67.8 / 76.0 / 77.2 %. DIR holds train/class/** and val/class/**.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(size="base"):
  if size not in ("base", "large", "huge"):
    raise UserError(f"configs/mae_imagenet.py knows base, large and huge, got {size!r}.")
  config = configs.base()
  config.epochs = 800
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name=f"vit_{size}", patch_size=14 if size == "huge" else 16)
  config.method = dict(name="mae", mask_ratio=0.75, normalize_target=True, decoder=dict(dim=512, depth=8, heads=16))
  config.views = (dict(size=224, scale=(0.2, 1.0), interpolation="bicubic", flip=0.5, mean=MEAN, std=STD),)
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.optimizer = dict(name="adamw", weight_decay=0.05, b2=0.95)
  config.lr = dict(base=1.5e-4, scaling="linear", warmup_epochs=40.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")  # class and mask token decay, as in the official code
  return config
