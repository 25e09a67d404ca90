"""DINO, ResNet-18 with the small-image stem, CIFAR-10, two crops, close to lightly's published settings.

  python train.py --config=configs/dino_cifar10.py --config.data.data_dir=D

200 epochs, batch 128, SGD. lightly's head has batch norm and its teacher a constant momentum of 0.99. Here the head is
the official one without, and the momentum rises to 1, so lightly's figure is not this recipe's.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 200
  config.batch_size = 128
  config.data.name = "cifar10"
  config.encoder = dict(name="resnet18", stem="small")
  head = dict(hidden=2048, bottleneck=256, prototypes=2048)
  config.method = dict(name="dino", head=head, student_temperature=0.1, center_momentum=0.9, teacher_momentum=0.99)
  config.method.update(teacher_temperature=0.04, teacher_temperature_start=0.04, teacher_temperature_warmup_epochs=0)
  view = dict(size=32, scale=(0.4, 1.0), interpolation="bicubic", flip=0.5)
  view |= dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)
  view |= dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  config.views = (view, {**view, "solarize_p": 0.2})
  config.eval_view.mean, config.eval_view.std = view["mean"], view["std"]
  config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=5e-4)
  config.lr = dict(base=0.06, scaling="none", warmup_epochs=0.0, end=0.0, by_epoch=True)
  config.no_decay = (r".*/bias", r".*/scale")
  config.frozen = (r"head/last_layer/weight_g",)
  config.late = (r"head/last_layer/weight_v",)  # not trained in the first epoch
  config.late_epochs = 1
  return config
