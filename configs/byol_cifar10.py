"""BYOL, ResNet-18 with the small-image stem, CIFAR-10, close to solo-learn's published settings.

  python train.py --config=configs/byol_cifar10.py --config.data.data_dir=D

1000 epochs, batch 256, LARS, asymmetric views without blur. solo-learn's LARS also clips the ratio, which the official
one, used here with the same eta of 0.02, does not: solo-learn's figure is not this recipe's.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 1000
  config.batch_size = 256
  config.data.name = "cifar10"
  config.encoder = dict(name="resnet18", stem="small")
  config.method = dict(name="byol", target_momentum=0.99, mlp=dict(hidden=4096, features=256))
  view = dict(size=32, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
  view |= dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)
  view |= dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
  config.views = (view, {**view, "solarize_p": 0.2})
  config.eval_view.mean, config.eval_view.std = view["mean"], view["std"]
  config.optimizer = dict(name="lars", momentum=0.9, weight_decay=1e-5, lr_inside=False, trust_coefficient=0.02)
  config.lr = dict(base=1.0, scaling="linear", warmup_epochs=10.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")
  return config
