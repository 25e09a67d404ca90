"""DINOv2 on the built-in 12,000 Fashion-MNIST images, with a small ViT on 4x4 patches.

  python train.py --config=configs/dinov2_quickstart.py

Two global and four local crops, 1,024 prototypes shared by class tokens and patches. Its numbers are the DINO
quickstart's where that has them, and were not chosen for DINOv2 yet.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 10
  config.batch_size = 64
  config.data.name = "fashion_mnist_mini"
  config.data.channels = 1
  config.encoder = dict(name="vit", patch_size=4, dim=64, depth=3, heads=4, init_std=0.1, registers=1, drop_path=0.1)
  config.method = dict(name="dinov2", targets="centered", center_momentum=0.9, student_temperature=0.1)
  config.method.head = dict(hidden=256, bottleneck=64, prototypes=1024)
  config.method.patch_head = {}  # shared
  config.method.update(mask_share=0.5, mask_ratios=(0.1, 0.5), patch_weight=1.0, koleo_weight=0.1)
  config.method.update(teacher_momentum=0.99, teacher_temperature=0.04, teacher_temperature_start=0.04)
  config.method.teacher_temperature_warmup_epochs = 0.0
  look = dict(flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=0.8)
  large, small = dict(size=28, scale=(0.3, 1.0), **look), dict(size=16, scale=(0.08, 0.3), **look)
  config.views = configs.copies(2, large) + configs.copies(4, small)
  config.optimizer = dict(name="adamw", weight_decay=0.04, clip_part=3.0, layer_decay=0.9)
  config.lr = dict(base=1e-3, scaling="none", warmup_epochs=1.0, end=1e-6, inclusive=True)
  config.no_decay = (r".*/bias", r".*/scale")
  config.held = (r".*head/last_layer/.*",)  # in the first epoch, while their moments run
  config.late_epochs = 1
  config.log_every_steps = 187
  config.eval_every_epochs = 5
  return config
