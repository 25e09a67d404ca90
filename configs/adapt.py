"""DINO on one's own images from a released ViT, carefully: heads first, then everything at a low rate.

  python train.py --config=configs/adapt.py --config.init_from=WEIGHTS --config.data.folder=DIR --workdir=runs/mine
  python train.py --config=configs/adapt.py:vit_base --config.init_from=WEIGHTS --config.data.folder=DIR
  python train.py --config=configs/adapt.py:quickstart --config.init_from=runs/dino_quickstart

The usual way, to go on at the recipe's rate with new heads, has been reported to take a k-NN accuracy from 80 to 10 %
(facebookresearch/dinov2, issue 204). Here the untouched features are judged first. Heads are trained alone until their
loss is flat; then the encoder too, at a twentieth of the recipe's rate, less in earlier layers, the patch embedding as
it is. Each evaluation compares with the start, and the best state, which may be the start, is the result. See
docs/weights.md.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(version="vit_small"):
  if version not in ("vit_small", "vit_base", "quickstart"):
    raise UserError(f"configs/adapt.py knows vit_small, vit_base and quickstart, got {version!r}.")
  quick = version == "quickstart"
  config = configs.base()
  config.init_from = ""  # no weights, which is refused: the command has to name them
  config.epochs = 8 if quick else 20
  config.batch_size = 64 if quick else 256
  config.dtype = "float32" if quick else "bfloat16"
  config.data.channels = 1 if quick else 3
  config.data.test_split = "test" if quick else "val"
  if quick:
    config.encoder = dict(name="vit", patch_size=7, dim=64, depth=3, heads=4, init_std=0.1, features="cls")
    head = dict(hidden=256, bottleneck=64, prototypes=1024)
    large, small = dict(size=28, scale=(0.3, 1.0)), dict(size=14, scale=(0.08, 0.3))
    look = dict(flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=0.8)
    config.views = configs.copies(2, large | look) + configs.copies(2, small | look)
  else:
    config.encoder = dict(name=version, patch_size=16)  # without drop path, which good features do not need
    head = dict(hidden=2048, bottleneck=256, prototypes=65536, train_gain=False)
    look = dict(interpolation="bicubic", flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)
    look |= dict(blur_kind="pil", mean=MEAN, std=STD)
    large, small = dict(size=224, scale=(0.4, 1.0), **look), dict(size=96, scale=(0.05, 0.4), blur_p=0.5, **look)
    config.views = ({**large, "blur_p": 1.0}, {**large, "blur_p": 0.1, "solarize_p": 0.2}, *configs.copies(8, small))
    config.eval_view.update(resize=256, size=224, mean=MEAN, std=STD)
  config.method = dict(name="dino", head=head, student_temperature=0.1, center_momentum=0.9, teacher_momentum=0.999)
  config.method.update(teacher_temperature=0.04, teacher_temperature_start=0.04, teacher_temperature_warmup_epochs=0)

  config.heads_first_steps = 2000
  config.guard = True
  config.optimizer = dict(name="adamw", weight_decay=0.04, clip=3.0, layer_decay=0.75)
  config.optimizer.rates = ((r"encoder/.*", 0.05), (r".*", 1.0))  # a twentieth of what suits random weights
  config.lr = dict(base=1e-3 if quick else 5e-4, scaling="none" if quick else "linear", warmup_epochs=0.5, end=1e-6)
  config.no_decay = (r".*/bias", r".*/scale")
  config.frozen = (r"head/last_layer/weight_g", r"encoder/patch_embed/.*")
  config.log_every_steps = 50
  config.eval_every_epochs = 1
  return config
