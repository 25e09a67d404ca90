"""Fine-tuning of configs/mae_quickstart.py's encoder with the labels of the built-in images: minutes on two CPU cores.

  python finetune.py --from=runs/mae_quickstart --workdir=runs/finetuned
  python finetune.py --from=scratch --workdir=runs/from_scratch               the line to beat

MAE's recipe (configs/finetune_mae.py) for a small network and 28 pixels: without RandAugment and random erasing.
"""

from ml_collections import config_dict

from ssl_jax import config as configs


def get_config():
  config = configs.base()
  config.epochs = 10
  config.batch_size = 128
  config.data.name = "fashion_mnist_mini"
  config.data.channels = 1
  config.encoder = dict(name="vit", patch_size=4, dim=96, depth=4, heads=3)
  config.encoder.update(features="pooled", positions="learned", drop_path=0.1)
  head = dict(init_std=2e-5)
  config.method = dict(name="supervised", train_encoder=True, label_smoothing=0.1, mixup=0.8, cutmix=1.0, head=head)
  config.method.classes = 10
  config.method.labels = config_dict.placeholder(str)  # how many images have one, such as 10%; none: all
  config.views = (dict(size=28, scale=(0.5, 1.0), interpolation="bicubic", flip=0.5),)
  config.optimizer = dict(name="adamw", weight_decay=0.05, layer_decay=0.75)
  config.lr = dict(base=2e-3, scaling="none", warmup_epochs=1.0, end=1e-6)
  config.no_decay = (r".*/bias", r".*/scale", r".*/cls_token", r".*/pos_embed")
  config.log_every_steps = 93
  config.eval_every_epochs = 2
  return config
