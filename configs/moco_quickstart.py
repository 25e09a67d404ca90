"""MoCo v2 on the built-in 12,000 Fashion-MNIST images: a few minutes on two CPU cores.

  python train.py --config=configs/moco_quickstart.py

The encoder and the views are those of `quickstart.py`. Queue and momentum fit the small data set: a queue as long as an
epoch would hold the query's own image.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 20
  config.batch_size = 128
  config.data.name = "fashion_mnist_mini"
  config.data.channels = 1
  config.encoder = dict(name="resnet", stages=(1,), width=1.0, stem="patch", features="flat")
  config.method = dict(name="moco", version=2, hidden=256, features=128, temperature=0.2)
  config.method.update(queue_size=4096, momentum=0.99, bn_group_size=32)
  view = dict(size=28, scale=(0.5, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=0.8)
  config.views = configs.copies(2, view)
  config.optimizer = dict(name="adamw", weight_decay=1e-4)
  config.lr = dict(base=2e-3, scaling="none", warmup_epochs=1.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")
  config.log_every_steps = 93
  config.eval_every_epochs = 5
  return config
