"""LeJEPA on the built-in 12,000 Fashion-MNIST images, with a small ViT on 4x4 patches.

  python train.py --config=configs/lejepa_quickstart.py

Four views of one size, as in the official minimal listing, with the SimCLR quickstart's augmentation. The features are
the class token, in front of the linear layer to the embedding.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 4
  config.batch_size = 128
  config.data.name = "fashion_mnist_mini"
  config.data.channels = 1
  config.encoder = dict(name="vit", patch_size=4, dim=96, depth=4, heads=3)
  config.method = dict(name="lejepa", weight=0.05, slices=256, embedding=128, hidden=512, features=32)
  view = dict(size=28, scale=(0.3, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=0.8)
  config.views = configs.copies(4, view)
  config.optimizer = dict(name="adamw", weight_decay=0.05)
  config.lr = dict(base=1e-3, scaling="none", warmup_epochs=1.0, end=1e-6)
  config.no_decay = ()
  config.log_every_steps = 93
  config.eval_every_epochs = 1
  return config
