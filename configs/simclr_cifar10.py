"""SimCLR, ResNet-18 with the small-image stem, CIFAR-10: the official code's command for CIFAR-10.

  python train.py --config=configs/simclr_cifar10.py --config.data.data_dir=D

Chen et al., 2020, arXiv:2002.05709, appendix B.9, and the README of google-research/simclr: 1000 epochs, LARS with
learning rate 1.0 * batch / 256, no blur, colour strength 0.5. Published for it: about 91 % by linear evaluation.
Views are torchvision's; the official ones are TensorFlow's: contrast, saturation and the crop's resize differ a little.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 1000
  config.batch_size = 512
  config.data.name = "cifar10"
  config.encoder = dict(name="resnet18", stem="small")
  config.method = dict(name="simclr", temperature=0.5, projector=dict(layers=3, features=128))
  view = dict(size=32, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
  view |= dict(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)
  config.views = configs.copies(2, view)
  config.optimizer = dict(name="lars", momentum=0.9, weight_decay=1e-4, lr_inside=True)
  config.lr = dict(base=1.0, scaling="linear", warmup_epochs=10.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")  # kept out of LARS's trust ratio too
  config.eval_every_epochs = 10
  config.checkpoint_every_steps = 2000
  return config
