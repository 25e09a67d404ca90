"""finetune.py and the linear protocol: a recipe made to fit a run, the weights that it starts with, the commands."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import eval_linear
import runs
from ssl_jax import build
from ssl_jax import config as configs
from ssl_jax.commands import labelled
from ssl_jax.errors import UserError
from ssl_jax.models import vit
from ssl_jax.run import workdir as workdirs
from ssl_jax.weights import layouts, load

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def recipe(name):
  file, _, version = name.partition(":")
  return runpy.run_path(str(CONFIGS / f"{file}.py"))["get_config"](*([version] if version else []))


def run_of(tmp_path, name, **resolved):
  (tmp_path / "config.json").write_text(json.dumps(configs.to_json(recipe(name))))
  (tmp_path / "resolved.json").write_text(json.dumps(resolved))
  return tmp_path


def test_a_recipe_takes_images_sizes_and_network_of_a_run_and_keeps_its_own_augmentation(tmp_path):
  source = run_of(tmp_path, "mae_quickstart", window=[0, 4095])
  given = {"encoder.drop_path": 0.2, "views[0].scale": (0.4, 1.0), "method.labels": "10%"}
  config = labelled.fitted(recipe("finetune_mae"), source, given)
  configs.check_values(config)
  assert config.data.name == "fashion_mnist_mini" and config.data.channels == 1 and config.data.window == [0, 4095]
  want = dict(name="vit", patch_size=4, dim=96, depth=4, heads=3, features="pooled", positions="learned", drop_path=0.2)
  assert config.encoder.to_dict() == want
  view, evaluation = configs.views(config)[0], configs.eval_view(config)
  assert (view.size, view.mean, view.scale, view.rand_augment, view.erase_p) == (28, (), (0.4, 1.0), 9.0, 0.25)
  assert (evaluation.size, evaluation.resize, evaluation.mean) == (28, 28, ())
  assert config.method.labels == "10%" and config.method.classes is None and config.optimizer.layer_decay == 0.65
  assert recipe("finetune_mae").encoder.name == "vit_base"


def test_what_a_method_adds_to_its_network_comes_along_and_other_data_do_not_mix_with_the_runs(tmp_path):
  source = run_of(tmp_path, "simclr_imagenet")
  config = labelled.fitted(recipe("linear:simclr"), source, {"data.folder": "D", "data.test_split": "test"})
  configs.check_values(config)
  assert config.encoder.project_first and config.encoder.name == "resnet50"  # SimCLR's own shortcut
  assert (config.data.folder, config.data.split, config.data.test_split) == ("D", "train", "test")
  config = labelled.fitted(recipe("linear:moco_v3_vit"), run_of(tmp_path, "moco_imagenet:v3_vit"), {})
  assert config.encoder.positions == "row_first"
  with pytest.raises(UserError, match=r"encoder\.features must be pooled or flat, got 'cls'"):
    configs.check_values(labelled.fitted(recipe("linear:mae"), run_of(tmp_path, "simclr_imagenet"), {}))
  with pytest.raises(UserError, match="is not a run: it has no config"):
    labelled.fitted(recipe("linear:mae"), tmp_path / "none", {})


def test_a_recipe_for_a_vit_is_refused_for_a_resnet_with_the_one_to_take(tmp_path):
  source = run_of(tmp_path, "quickstart")
  with pytest.raises(UserError, match=r"for a ViT, and .* has a ResNet: .*--config=configs/finetune_resnet\.py"):
    labelled.fitted(recipe("finetune_quickstart"), source, {})
  configs.check_values(labelled.fitted(recipe("finetune_resnet"), source, {"batch_size": 256}))


def test_figures_tell_steps_where_the_run_was_given_them(tmp_path, capsys):
  (tmp_path / "metrics.jsonl").write_text('{"step": 2, "epoch": 0.5, "test_top1": 11.5}\n')
  config = recipe("linear:simclr")
  for given, told, untold in (({}, ("epochs", 90), "steps"), ({"steps": 2}, ("steps", 2), "epochs")):
    config.update(given)
    labelled.hand_over(config, tmp_path, tmp_path / "linear.json")
    figures = json.loads(capsys.readouterr().out)
    assert figures[told[0]] == told[1] and untold not in figures and figures["top1"] == 11.5


def test_every_method_has_the_protocol_of_its_paper():
  names = ["simclr_imagenet", "moco_imagenet:v2", "moco_imagenet:v3", "moco_imagenet:v3_vit", "byol_imagenet"]
  versions = [eval_linear.version_for(recipe(name)) for name in [*names, "mae_imagenet", "dino_imagenet"]]
  assert versions == ["simclr", "moco", "moco_v3", "moco_v3_vit", "byol", "mae", "dino"]
  for version in versions:  # learning rates as the papers and codes state them, of the whole batch
    config = recipe(f"linear:{version}")
    build.method_of(config, 100, 10)
    scale = {"linear": config.batch_size / 256, "none": 1}[config.lr.scaling]
    peak = dict(simclr=1.6, moco=30, moco_v3=0.4, moco_v3_vit=12, byol=0.8, mae=6.4, dino=0.001)[version]
    assert config.lr.base * scale == pytest.approx(peak)
  with pytest.raises(UserError, match="simsiam has no protocol of its own here: take one"):
    eval_linear.version_for(recipe("simsiam_imagenet"))


def test_a_norm_behind_the_pooling_begins_anew_and_fixed_positions_become_learned_ones(tmp_path):
  shape = dict(patch_size=4, dim=12, depth=1, heads=3, image_size=8)
  fixed = vit.ViT(**shape, positions="column_first")
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
  shapes = jax.eval_shape(lambda: fixed.init(jax.random.key(0), images, train=False))
  rng = np.random.default_rng(1)
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(layouts.whole_state(fixed, variables), path)
  pooled = vit.ViT(**shape, features="pooled")
  loaded = load.load_weights(path, pooled)
  assert any("fc_norm, begins anew" in line for line in loaded.report)
  tokens = fixed.apply(variables, images, method="outputs")[-1]
  mean = np.mean(np.asarray(tokens[:, 1:], np.float64), axis=1)
  want = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
  got = pooled.apply(loaded.variables, images, train=False)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  safetensors.numpy.save_file(layouts.whole_state(pooled, loaded.variables), path)  # a fine-tuned one has its own
  again = load.load_weights(path, pooled)
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
  with pytest.raises(UserError, match="give the model features='pooled'"):
    load.load_weights(path, vit.ViT(**shape))


@pytest.mark.slow
def test_commands_score_what_a_run_learnt_and_are_resumed(unbroken, cache, tmp_path):
  workdir, _ = unbroken
  small = ["--config.steps=6", "--config.batch_size=64", "--config.checkpoint_every_steps=2"]

  def command(*arguments, status=0, **overrides):
    return runs.finish(runs.start(cache, *arguments, *small, **overrides), status)

  scripts = ["finetune.py", "eval_linear.py"]
  arguments = {
    "finetune.py": [f"--from={workdir}", f"--config={CONFIGS}/finetune_resnet.py:10pct", "--config.method.labels=50%"],
    "eval_linear.py": ["--protocol=linear", f"--config={CONFIGS}/linear.py:simclr"],
  }
  target = {"finetune.py": tmp_path / "tuned", "eval_linear.py": workdir}
  for script in scripts:
    stopped = command(script, target[script], *arguments[script], "--config.stop_after_steps=3")
    assert "initialised at random, as without weights: params.head" in stopped
    out = command(script, target[script], *arguments[script])
    figures = json.loads(out.splitlines()[-1])
    assert "resuming at step 3" in out and figures["step"] == 6 and figures["images"] == 200
    assert figures["top1_low"] < figures["top1"] < figures["top1_high"] and figures["learning_rate"] > 0
    written = tmp_path / "tuned" / "finetune.json" if script == "finetune.py" else workdir / "linear_simclr.json"
    assert workdirs.read_json(written) == figures
  command("finetune.py", tmp_path / "whole", *arguments["finetune.py"])
  states = [runs.final_state(tmp_path / name, 6) for name in ("tuned", "whole")]
  jax.tree.map(np.testing.assert_array_equal, *states)
  rows = [[row for row in runs.rows(tmp_path / name) if row["step"] == 6] for name in ("tuned", "whole")]
  assert rows[0] == rows[1]
  told = command("finetune.py", tmp_path / "x", "--from=scratch", f"--config={CONFIGS}/quickstart.py", status=1)
  assert "the recipe is of simclr, which takes no labels" in told
