"""MAE on the built-in 12,000 Fashion-MNIST images: a few minutes on two CPU cores.

  python train.py --config=configs/mae_quickstart.py

A ViT of four blocks on 4x4 patches, 49 of them, of which 12 are seen. The features are the mean of the patches' tokens:
MAE's k-NN is weak by nature, also where its fine-tuning is strong.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 20
  config.batch_size = 128
  config.data.name = "fashion_mnist_mini"
  config.data.channels = 1
  config.encoder = dict(name="vit", patch_size=4, dim=96, depth=4, heads=3, features="mean")
  config.method = dict(name="mae", mask_ratio=0.75, normalize_target=True, decoder=dict(dim=64, depth=1, heads=4))
  config.views = (dict(size=28, scale=(0.5, 1.0), interpolation="bicubic", flip=0.5),)
  config.optimizer = dict(name="adamw", weight_decay=0.05, b2=0.95)
  config.lr = dict(base=2e-3, scaling="none", warmup_epochs=2.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")
  config.log_every_steps = 93
  config.eval_every_epochs = 5
  return config
