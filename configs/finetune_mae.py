"""Fine-tuning of a ViT on ImageNet-1k by the official MAE's recipe (He et al., 2021, arXiv:2111.06377, FINETUNE.md).

  python finetune.py --from=runs/mae --config=configs/finetune_mae.py:base --workdir=runs/finetuned
  python finetune.py --from=mae_pretrain_vit_base.pth --config=configs/finetune_mae.py:base --workdir=runs/finetuned \\
    --config.data.folder=DIR                                                        base, large or huge

Learning rate 5e-4 * 1024 / 256 = 2e-3 in the last layer, 0.65 times that in each one before it. Published, of encoders
that were pre-trained for 1600 epochs: 83.6 / 85.9 / 86.9 %; from nothing, by other recipes: 82.3 / 82.6 / 83.1 %.
"""

from ml_collections import config_dict

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Epochs, learning rate, layer decay, drop path.
SIZES = {"base": (100, 5e-4, 0.65, 0.1), "large": (50, 1e-3, 0.75, 0.2), "huge": (50, 1e-3, 0.75, 0.3)}


def get_config(size="base"):
  if size not in SIZES:
    raise UserError(f"configs/finetune_mae.py knows {', '.join(SIZES)}, got {size!r}.")
  epochs, rate, layer_decay, drop_path = SIZES[size]
  config = configs.base()
  config.epochs = epochs
  config.batch_size = 1024
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name=f"vit_{size}", patch_size=14 if size == "huge" else 16)
  config.encoder.update(features="pooled", positions="learned", drop_path=drop_path)
  head = dict(init_std=2e-5)
  config.method = dict(name="supervised", train_encoder=True, label_smoothing=0.1, mixup=0.8, cutmix=1.0, head=head)
  config.method.classes = 1000
  config.method.labels = config_dict.placeholder(str)  # how many images have one, such as 10%; none: all
  view = dict(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5, mean=MEAN, std=STD)
  view |= dict(rand_augment=9.0, erase_p=0.25)
  config.views = (view,)
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.optimizer = dict(name="adamw", weight_decay=0.05, layer_decay=layer_decay)
  config.lr = dict(base=rate, scaling="linear", warmup_epochs=5.0, end=1e-6)
  config.no_decay = (r".*/bias", r".*/scale", r".*/cls_token", r".*/pos_embed")
  config.eval_every_epochs = 5
  return config
