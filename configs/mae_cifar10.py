"""MAE, ViT-Tiny with patches of 4, CIFAR-10.

  python train.py --config=configs/mae_cifar10.py --config.data.data_dir=D

The paper's recipe (He et al., 2021, arXiv:2111.06377, appendix A) on 64 patches; decoder, epochs and warm-up from
public MAE runs on CIFAR-10; no published figure is this recipe's. MAE's k-NN is weak by nature.
"""

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 2000
  config.batch_size = 4096
  config.data.name = "cifar10"
  config.encoder = dict(name="vit_tiny", patch_size=4, features="mean")
  config.method = dict(name="mae", mask_ratio=0.75, normalize_target=True, decoder=dict(dim=192, depth=4, heads=3))
  mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
  config.views = (dict(size=32, scale=(0.2, 1.0), interpolation="bicubic", flip=0.5, mean=mean, std=std),)
  config.eval_view.mean, config.eval_view.std = mean, std
  config.optimizer = dict(name="adamw", weight_decay=0.05, b2=0.95)
  config.lr = dict(base=1.5e-4, scaling="linear", warmup_epochs=200.0, end=0.0)
  config.no_decay = (r".*/bias", r".*/scale")  # class and mask token decay, as in the official code
  config.eval_every_epochs = 100
  return config
