"""A folder of your own images, by any of six methods; what is "auto" is decided from the images and the device.

  python train.py --config=configs/own_images.py --config.data.folder=DIR             SimCLR, a ResNet
  python train.py --config=configs/own_images.py:dino_vit --config.data.folder=DIR    or moco, byol, dino, mae

The decisions are printed with their reasons; docs/own_images.md has the rules. Any of them can be given by its key, as
--config.batch_size=32, and the others follow it.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.settings import AUTO

VERSIONS = ("simclr", "moco", "byol", "dino", "dino_vit", "mae")


def get_config(version="simclr"):
  if version not in VERSIONS:
    raise UserError(f"configs/own_images.py knows {', '.join(VERSIONS)}, got {version!r}.")
  vit = version in ("dino_vit", "mae")
  auto = configs.auto
  config = configs.base()
  for key in ("epochs", "batch_size", "microbatch", "dtype", "log_every_steps", "eval_every_epochs"):
    del config[key]
    config[key] = auto()
  del config.data.channels
  config.data.channels = auto()
  config.eval_view.update(mean=auto(), std=auto())

  config.encoder = dict(name=auto(), stem=auto(), width=auto(), features="pooled", bn_group_size=auto())
  if vit:
    features = "cls" if version == "dino_vit" else "mean"
    config.encoder = dict(name="vit", patch_size=auto(), dim=auto(), depth=auto(), heads=auto(), features=features)

  # Adam's steps do not depend on the loss's scale: its rate goes with the root of the batch.
  config.optimizer = dict(name="adamw", weight_decay=1e-4)
  config.lr = dict(base=1e-4, scaling="sqrt", warmup_epochs=auto(), end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")

  look = dict(mean=AUTO, std=AUTO, flip=0.5)
  colours = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=AUTO, blur_kind="pil")
  whole = dict(size=AUTO, scale=AUTO, **look, **colours)
  config.views = configs.copies(2, whole)
  if version == "simclr":
    config.method = dict(name="simclr", temperature=0.2)
    config.method.projector = dict(layers=2, hidden=512, features=128, bn_group_size=auto())
  elif version == "moco":
    config.method = dict(name="moco", version=2, hidden=512, features=128, temperature=0.2, momentum=0.99)
    config.method.update(queue_size=auto(), bn_group_size=auto())
    del config.encoder.bn_group_size  # the method's
  elif version == "byol":
    config.method = dict(name="byol", target_momentum=0.98, mlp=dict(hidden=512, features=128, bn_group_size=auto()))
  elif version in ("dino", "dino_vit"):
    head = dict(hidden=512, bottleneck=128, prototypes=4096)
    config.method = dict(name="dino", head=head, student_temperature=0.1, center_momentum=0.9, teacher_momentum=0.99)
    config.method.update(teacher_temperature=0.04, teacher_temperature_start=0.04, teacher_temperature_warmup_epochs=0)
    config.views += configs.copies(2, {**whole, "scale": (0.1, 0.4)})
    config.optimizer = dict(name="adamw", weight_decay=0.04, clip=3.0)
    config.frozen = (r"head/last_layer/weight_g",)
    config.late = (r"head/last_layer/weight_v",)  # not trained in the first epoch
    config.late_epochs = 1
  else:
    config.method = dict(name="mae", mask_ratio=0.75, normalize_target=True, decoder=dict(dim=128, depth=2, heads=4))
    config.views = (dict(size=AUTO, scale=(0.2, 1.0), interpolation="bicubic", **look),)
    config.optimizer = dict(name="adamw", weight_decay=0.05, b2=0.95)
  return config
