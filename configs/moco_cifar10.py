"""MoCo v1-style training on CIFAR-10, ResNet-18 with the small-image stem: the official CIFAR demo.

  python train.py --config=configs/moco_cifar10.py --config.data.data_dir=D

He et al., 2020, arXiv:1911.05722, in the settings of the authors' CIFAR notebook: 200 epochs, SGD, batch norm in eight
groups of 64 with shuffled keys, a linear head. Published for it, on the 128-d output: k-NN 82.6 % (k=200, T=0.1).
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 200
  config.batch_size = 512
  config.data.name = "cifar10"
  config.encoder = dict(name="resnet18", stem="small")
  config.method = dict(name="moco", version=1, features=128, temperature=0.1)
  config.method.update(queue_size=4096, momentum=0.99, bn_group_size=64)
  view = dict(size=32, scale=(0.08, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)
  view |= dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
  config.views = configs.copies(2, view)
  config.eval_view.mean, config.eval_view.std = view["mean"], view["std"]
  config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=5e-4)
  config.lr = dict(base=0.06, scaling="none", warmup_epochs=0.0, end=0.0, by_epoch=True)
  config.no_decay = ()  # everything decays, batch norm too
  return config
