"""DINO, ViT-S/16, ImageNet-1k (Caron et al., 2021, arXiv:2104.14294, and the commands of the official README).

  python train.py --config=configs/dino_imagenet.py --config.data.folder=DIR            100 epochs, batch 512
  python train.py --config=configs/dino_imagenet.py:boost --config.data.folder=DIR      300 epochs, batch 1024
  python train.py --config=configs/dino_imagenet.py:vit_base --config.data.folder=DIR   ViT-B/16, 400 epochs

Published, k-NN: 69.3 % and 73.3 %; none beside ViT-B/16, whose official arguments could not be confirmed. DIR holds
train/class/** and val/class/**.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(version="vanilla"):
  config = configs.base()
  config.epochs = 100
  config.batch_size = 512
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name="vit_small", patch_size=16, drop_path=0.1)
  head = dict(hidden=2048, bottleneck=256, prototypes=65536, train_gain=False)
  config.method = dict(name="dino", head=head, student_temperature=0.1, center_momentum=0.9, teacher_momentum=0.996)
  config.method.update(teacher_temperature=0.04, teacher_temperature_start=0.04, teacher_temperature_warmup_epochs=0)

  look = dict(interpolation="bicubic", flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)
  look |= dict(blur_kind="pil", mean=MEAN, std=STD)
  large, small = dict(size=224, scale=(0.4, 1.0), **look), dict(size=96, scale=(0.05, 0.4), blur_p=0.5, **look)
  config.views = ({**large, "blur_p": 1.0}, {**large, "blur_p": 0.1, "solarize_p": 0.2}, *configs.copies(8, small))
  config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)

  config.optimizer = dict(name="adamw", weight_decay=0.04, weight_decay_end=0.4, clip=3.0)
  config.lr = dict(base=5e-4, scaling="linear", warmup_epochs=10.0, end=1e-6, inclusive=True)
  config.no_decay = (r".*/bias", r".*/scale")  # positions, class token and prototypes decay
  config.frozen = (r"head/last_layer/weight_g",)
  config.late = (r"head/last_layer/weight_v",)  # not trained in the first epoch
  config.late_epochs = 1
  if version not in ("vanilla", "boost", "vit_base"):
    raise UserError(f"configs/dino_imagenet.py knows vanilla, boost and vit_base, got {version!r}.")
  if version != "vanilla":
    config.method.update(teacher_temperature=0.07, teacher_temperature_warmup_epochs=30)
  if version == "boost":
    config.epochs, config.batch_size = 300, 1024
    config.method.head.train_gain = True
    config.frozen = ()
    config.late = (r"head/last_layer/.*",)
  elif version == "vit_base":
    config.epochs, config.batch_size = 400, 1024
    config.encoder.name = "vit_base"
  return config
