"""Fine-tuning of a ResNet with few labels of ImageNet-1k, by SimCLR's recipe (arXiv:2002.05709, section 4 and B.5).

  python finetune.py --from=runs/simclr --config=configs/finetune_resnet.py:1pct --workdir=runs/one_percent
  python finetune.py --from=runs/simclr --config=configs/finetune_resnet.py:10pct --workdir=runs/ten_percent

Learning rate 0.05 * 4096 / 256 = 0.8 without warm-up, no weight decay, crops and flips, all layers. Published for
ResNet-50: 48.3 % with 1 % of the labels, 65.6 % with 10 %. These are drawn by class here, with the run's seed; papers
take the lists of SimCLR's authors. BYOL (arXiv:2006.07733, C.1) has batches of 1024 and chooses learning rate and
epochs on held-out images: --config.batch_size=1024 --config.lr.base=0.02 --config.epochs=50.
"""

from ssl_jax import config as configs
from ssl_jax.errors import UserError


def get_config(labels="10pct"):
  if labels not in ("1pct", "10pct"):
    raise UserError(f"configs/finetune_resnet.py knows 1pct and 10pct, got {labels!r}.")
  config = configs.base()
  config.epochs = 60 if labels == "1pct" else 30
  config.batch_size = 4096
  config.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "val"
  config.encoder = dict(name="resnet50")
  config.method = dict(name="supervised", train_encoder=True, classes=1000, head=dict(init_std=0.0))
  config.method.labels = "1%" if labels == "1pct" else "10%"
  config.views = (dict(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip=0.5),)
  config.eval_view.update(resize=256, size=224)
  config.optimizer = dict(name="sgd", momentum=0.9, nesterov=True)
  config.lr = dict(base=0.05, scaling="linear", warmup_epochs=0.0, end=0.0)
  config.no_decay = ()
  config.eval_every_epochs = 5
  return config
