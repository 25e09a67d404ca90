"""What a recipe leaves open: decided from facts, told, kept on resume. And what other recipes are told."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import types

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest
from photographs import photograph

import train
from runs import assert_same_run
from ssl_jax import advise, build, decide, microbatch, restore
from ssl_jax import config as configs
from ssl_jax.data import folder, look
from ssl_jax.errors import UserError
from ssl_jax.run import log, workdir

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CPU, GPU = decide.DeviceFacts("cpu", 1), decide.DeviceFacts("gpu", 1)
VERSIONS = ("simclr", "moco", "byol", "dino", "dino_vit", "mae")


def recipe(name, *arguments):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


def facts(images=1500, side=128, channels=3, coloured=10, width=None):
  mean = (0.5, 0.4, 0.3, 0.2, 0.1)[:channels]
  return look.DataFacts(images, ((side, width or side),) * 10, channels, coloured, mean, (0.25,) * channels)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("images, side", [(2, 20), (12, 64), (40, 28), (1500, 128), (60_000, 32), (2_000_000, 375)])
def test_any_number_and_size_of_images_gets_a_whole_recipe_that_can_run(version, images, side):
  for device in (CPU, GPU, decide.DeviceFacts("tpu", 8)):
    if images < device.devices:
      with pytest.raises(UserError, match="fewer than one for each of the 8 devices"):
        decide.decide(facts(images, side), device, recipe("own_images", version))
      continue
    config, made = decide.decide(facts(images, side), device, recipe("own_images", version))
    configs.check_values(config)
    configs.check(config, images=images, devices=device.devices)
    assert not decide.open_keys(config) and all(reason for _, _, reason in made)
    steps = configs.schedule_length(config, images)
    build.method_of(config, *steps)
    build.optim.make_schedule(config.lr, config.batch_size, *steps)
    group = config.method.get("bn_group_size") or config.encoder.get("bn_group_size") or 1
    assert config.batch_size % (group * device.devices) == 0
    assert config.views[0]["size"] in range(32, 225) and min(view["size"] for view in config.views) >= 16


def decided(data, device, version="simclr", **given):
  config = recipe("own_images", version)
  config.update_from_flattened_dict(given)
  return decide.decide(data, device, config)[0]


def test_the_decisions_follow_the_images_and_the_device():
  small, large, many = decided(facts(side=32), GPU), decided(facts(side=375), GPU), decided(facts(10**6, 375), GPU)
  assert [c.views[0]["size"] for c in (small, large)] == [32, 224]
  assert [c.views[0]["scale"] for c in (small, large)] == [(0.2, 1.0), (0.08, 1.0)]
  assert [c.views[0]["blur_p"] for c in (small, large)] == [0.0, 0.5]
  assert [c.encoder.stem for c in (small, large)] == ["small", "imagenet"]
  assert [c.encoder.name for c in (large, many)] == ["resnet18", "resnet50"]
  assert [c.epochs for c in (large, many)] == [400, 20]
  assert [c.batch_size for c in (large, many)] == [128, 256]
  assert many.dtype == "bfloat16" and large.lr.warmup_epochs == 10 and many.lr.warmup_epochs == 2
  cpu = decided(facts(side=375), CPU)
  assert (cpu.dtype, cpu.views[0]["size"], cpu.batch_size, cpu.epochs) == ("float32", 64, 64, 40)
  grey, bands = decided(facts(channels=1), CPU), decided(facts(channels=5), CPU)
  assert grey.data.channels == 1 and grey.views[1]["mean"] == grey.eval_view.mean == (0.5,)
  assert bands.data.channels == 5 and bands.views[0]["mean"] == (0.5, 0.4, 0.3, 0.2, 0.1)
  vit = decided(facts(), GPU, "dino_vit")
  assert [view["size"] for view in vit.views] == [128, 128, 48, 48] and vit.encoder.patch_size == 16
  assert decided(facts(), CPU, "moco").method.bn_group_size == 32
  for batch, groups in ((33, (33, 11)), (64, (64, 32)), (99, (33, 11)), (250, (50, 25)), (134, (134, 2)), (5, (5, 1))):
    got = [decided(facts(), CPU, version, batch_size=batch) for version in ("simclr", "moco")]
    assert (got[0].encoder.bn_group_size, got[1].method.bn_group_size) == groups
  few = decide.decide(facts(images=3), CPU, recipe("own_images", "moco"))[1]
  reasons = {line.key: line.reason for line in few}
  assert "normalised by itself" in reasons["method.bn_group_size"] and "about one batch" in reasons["method.queue_size"]


def test_what_is_given_by_its_key_stays_and_the_rest_follows_it():
  config = recipe("own_images", "dino_vit")
  config.update_from_flattened_dict({"batch_size": 32, "encoder.patch_size": 14, "data.channels": 1})
  config.views[1]["size"] = "98"  # as the flags give it
  got, made = decide.decide(facts(), CPU, config)
  assert got.batch_size == 32 and got.encoder.patch_size == 14 and got.views[0]["mean"] == (pytest.approx(0.4),)
  assert [view["size"] for view in got.views] == [98, 98, 42, 42]
  assert not {"batch_size", "encoder.patch_size", "data.channels", "views[1].size"} & {key for key, _, _ in made}
  assert config.batch_size == 32 and "auto" in json.dumps(config.to_dict()["views"])  # the recipe itself is left alone


def test_the_length_of_a_run_is_that_of_its_steps_where_they_are_given():
  config = recipe("own_images")
  config.steps = 3
  got, made = decide.decide(facts(), CPU, config)  # 23 steps per epoch
  configs.check_values(got)
  reasons = {key: reason for key, _, reason in made}
  assert "epochs" not in reasons and got.epochs == 1 and got.lr.warmup_epochs == pytest.approx(0.3 / 23, abs=0.005)
  assert (got.eval_every_epochs, reasons["eval_every_epochs"]) == (1, "the run's end")
  assert (got.log_every_steps, reasons["log_every_steps"]) == (1, "each step of a short run")
  longer = decided(facts(), CPU, steps=4600)
  assert (longer.epochs, longer.eval_every_epochs, longer.log_every_steps) == (200, 20, 46)


def test_a_wrong_value_and_a_key_that_nothing_decides_are_told_before_the_images_are_looked_at():
  config = recipe("own_images")
  config.data.folder = "/nowhere"
  for key, value in (("batch_size", "many"), ("seed", "auto"), ("encoder.stem", "big"), ("method.temperature", -1.0)):
    wrong = decide.plain(config)
    with wrong.ignore_type():
      wrong.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"{key} must be .* got {value!r}"):
      build.run(wrong)
  wrong = decide.plain(config)
  wrong.views[0]["size"] = "(128, 600)"
  with pytest.raises(UserError, match=r"views\[0\]\.size must be a whole number of pixels, .*square, got \(128, 600\)"):
    build.run(wrong)
  with pytest.raises(UserError, match="one image, and nothing to tell it apart from"):
    decide.decide(facts(images=1), CPU, config)


@pytest.mark.parametrize(
  "kind, want", [("grey", 1), ("colours", 3), ("mixed", 3), ("alpha", 3), ("deep", 1), ("bands", 5)]
)
def test_a_look_at_a_folder_finds_its_channels_and_its_numbers(tmp_path, kind, want):
  rng = np.random.default_rng(0)
  for i in range(6):
    shape = 20 + i, 30
    colours = rng.integers(0, 100, (*shape, 3), dtype=np.uint8)
    path = tmp_path / f"{i}.png"
    if kind == "bands":
      np.save(path.with_suffix(".npy"), rng.integers(0, 1000, (*shape, 5), dtype=np.uint16))
    elif kind == "deep":
      PIL.Image.fromarray(rng.integers(500, 1500, shape, dtype=np.uint16)).save(path)
    elif kind == "grey" or (kind == "mixed" and i):
      PIL.Image.fromarray(np.repeat(colours[..., :1], 3, axis=-1)).save(path)  # stored as colours
    else:
      image = PIL.Image.fromarray(colours)
      if kind == "alpha":
        image.putalpha(255)
      image.save(path)
  got = look.look_at_files(folder.files_of(tmp_path, "train"))
  assert got.channels == want == len(got.mean) and got.images == 6
  assert got.sizes == tuple((20 + i, 30) for i in range(6)) and got.short == 22 and got.aspect > 1
  assert got.coloured == {"colours": 6, "alpha": 6, "mixed": 1}.get(kind, 0)
  if kind in ("deep", "bands"):  # uniform over the whole window that was measured
    np.testing.assert_allclose(got.mean, 0.5, atol=0.05)
    np.testing.assert_allclose(got.std, 12**-0.5, atol=0.03)
  else:
    np.testing.assert_allclose(got.mean, 49.5 / 255, atol=0.02)


SMALL = {
  "batch_size": 8,
  "steps": 4,
  "log_every_steps": 1,
  "checkpoint_every_steps": 2,
  "encoder.name": "resnet",
  "encoder.stages": (1,),
  "encoder.width": 0.0625,
  "method.projector.hidden": 8,
}


def small(root, **given):
  config = recipe("own_images")
  with config.ignore_type():
    config.encoder.stages = ()
    config.update_from_flattened_dict({**SMALL, "data.folder": str(root), **given})
  for view in config.views:
    view.update(jitter=(0.0, 0.0, 0.0, 0.0), gray_p=0.0)  # which take long to compile
  return config


def start(root, path, **given):
  return train.main(small(root, **given), path)


@pytest.mark.slow
def test_a_resumed_run_decides_nothing_again_and_equals_an_unbroken_one(tmp_path, capsys, monkeypatch):
  root = tmp_path / "pictures"
  for i in range(24):
    photograph(root / f"{i}.png", i, (40, 36))
  monkeypatch.setattr(build.parallel, "make_mesh", lambda make=build.parallel.make_mesh: make(jax.devices()[:1]))
  monkeypatch.setattr(train.plots, "draw_curves", lambda *_: None)
  assert start(root, tmp_path / "whole") == 0
  said = capsys.readouterr().out
  assert "views[0,1].size" in said and "the shorter side of most images is 36" in said
  assert said.index("microbatch: the whole batch at once takes") < said.index("first step done")
  start(root, tmp_path / "parts", stop_after_steps=2)

  def never(*_):
    raise AssertionError

  monkeypatch.setattr(decide, "decide", never)
  monkeypatch.setattr(look, "look_at_files", never)
  monkeypatch.setattr(microbatch, "search", never)
  capsys.readouterr()
  assert start(root, tmp_path / "parts") == 0
  assert "the shorter side of most images is 36" in capsys.readouterr().out
  path = tmp_path / "parts" / "metrics.jsonl"  # without the evaluation where it was stopped
  path.write_text(
    "".join(line for line in path.read_text().splitlines(True) if "loss" in line or '"step": 2,' not in line)
  )
  assert_same_run(tmp_path / "whole", tmp_path / "parts", step=4)
  resolved = [json.loads((tmp_path / name / "resolved.json").read_text()) for name in ("whole", "parts")]
  assert resolved[0] == resolved[1] and ["data.channels", 3] in [row[:2] for row in resolved[0]["decided"]]
  other, saved = small(root, **{"encoder.stem": "imagenet"}), workdir.saved(tmp_path / "parts")
  with pytest.raises(UserError, match=r"encoder\.stem: now 'imagenet', then 'patch'"):
    configs.check_same(decide.completed(other, saved.config), saved.config)
  restored = restore.restore_run(tmp_path / "parts")
  assert restored.config.views[0]["size"] == 32 and restored.config.encoder.stem == "patch"


class Compiled:
  def __init__(self, need):
    sizes = dict(argument_size_in_bytes=10, output_size_in_bytes=10, alias_size_in_bytes=10)
    self.memory_analysis = lambda: types.SimpleNamespace(**sizes, temp_size_in_bytes=need - 10)


@pytest.mark.parametrize(
  "memory, unit, want, words",
  [
    (None, 4, None, "a memory that is not known"),
    (10_000, 4, None, "the whole batch at once"),
    (800 / microbatch.SHARE, 4, 8, "twice as many do not fit"),
    (799 / microbatch.SHARE, 4, 4, "twice as many do not fit"),
    (100, 4, 4, "no fewer than"),
    (100, 16, 16, "no fewer than"),
  ],
)
def test_the_microbatch_is_halved_until_the_step_fits(memory, unit, want, words):
  tried = []

  def compile_with(microbatch):
    tried.append(microbatch)
    return microbatch, Compiled(100 * (microbatch or 32))

  made, (key, value, reason) = microbatch.search(compile_with, 32, unit, memory)
  assert made[0] == value == want and key == "microbatch" and words in reason
  assert tried == [None, 16, 8, 4][: len(tried)]  # nothing is compiled twice, or after one that fits


def test_other_recipes_are_told_what_does_not_suit_them():
  quick = recipe("quickstart")
  assert advise.on_recipe(quick) == []
  quick.data.folder = "D"
  assert "--config=configs/own_images.py" in advise.on_recipe(quick)[0]
  quick.init_from = "weights"  # which that recipe would not adapt
  assert advise.on_recipe(quick) == []
  (line,) = advise.on_data(quick, facts())
  assert "data.channels=1: 10 of 10 images" in line and "--config.data.channels=3" in line
  cifar = recipe("simclr_cifar10")
  assert advise.on_data(cifar, facts()) == []
  (line,) = advise.on_data(recipe("simclr_imagenet"), facts())
  assert line.startswith("views[0].size=224: the shorter side of most images is 128")
  lines = "\n".join(advise.on_data(cifar, facts(channels=1, coloured=0)))
  assert "--config.data.channels=1 costs less" in lines
  assert "views[0].gray_p, views[0].jitter, views[1].gray_p, views[1].jitter" in lines
  assert advise.on_images(cifar, facts()) == [] and "flip" in advise.on_images(cifar, facts(channels=1))[0]
  (line,) = advise.on_images(cifar, facts(side=128, width=600))
  assert "views are square, and most images are 4.7 times as wide as high" in line


def test_a_step_that_takes_minutes_is_told_with_the_rate_that_it_is_reckoned_with():
  config = recipe("simclr_cifar10")
  assert advise.on_device(config, 10**12, CPU, 2, None) == []
  (line,) = advise.on_device(config, 2_400 * 10**9, CPU, 2, None)
  assert line.startswith("batch_size=512: a step is 2.4 TFLOP, about 2.0 minutes on 2 cores at 10 GFLOP/s each")
  assert advise.on_device(config, 2_400 * 10**9, GPU, 2, 1e14) == advise.on_device(config, 10**18, GPU, 2, None) == []
  assert "a third of the devices' peak" in advise.on_device(config, 10**16, GPU, 2, 1e14)[0]


def test_a_long_run_tells_when_it_ends_and_what_a_quarter_of_it_takes():
  run = types.SimpleNamespace(last_step=400, steps=400, steps_per_epoch=10)
  run.config = ml_collections.ConfigDict(dict(batch_size=64, steps=None, epochs=40))
  now = time.mktime((2026, 11, 27, 12, 0, 0, 0, 0, -1))
  (line,) = log.outlook(run, 100, 16.0, now)
  assert line.startswith("at this rate it ends at 12:20, evaluations aside; ")
  assert line.endswith("--config.epochs=10, in another --workdir, would take 06:40")
  run.config.steps = 400
  assert "--config.steps=100" in log.outlook(run, 100, 16.0, now)[0]
  assert log.outlook(run, 100, 16_000.0, now) == []


def test_every_command_of_the_page_is_one_that_parses_and_decides():
  page = (CONFIGS.parent / "docs" / "own_images.md").read_text()
  lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
  for line in lines:
    script, *words = shlex.split(line)[1:]
    if script != "train.py":
      assert words[:3] == ["ssl_jax", "prepare", "shards"]
      continue
    (version,) = (match[1] or "simclr" for word in words if (match := re.fullmatch(r"--config=.*\.py:?(\w*)", word)))
    config = recipe("own_images", version)
    for key, value in (match.groups() for word in words if (match := re.fullmatch(r"--config\.(.+)=(.+)", word))):
      decide.put(config, key, int(value) if value.isdecimal() else value)
    configs.check_values(decide.decide(facts(), CPU, config)[0])
  assert {
    word.partition(":")[2] or "simclr" for line in lines for word in shlex.split(line) if "own_images" in word
  } == {*VERSIONS}


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path):
  page = (CONFIGS.parent / "docs" / "own_images.md").read_text()
  for i in range(40):
    photograph(tmp_path / "DIR" / f"{i}.png", i)
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    for path in sorted((tmp_path / "DIR").iterdir()):
      tar.add(path, path.name)
  env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(CONFIGS.parent)}
  for line in (line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()):
    words = shlex.split(line)[1:]
    if words[0] == "-m":
      (tmp_path / "DIR" / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes())
    else:
      words = [str(CONFIGS.parent / words[0]), *words[1:], "--config.stop_after_steps=1"]
      words = [word.replace("configs/", f"{CONFIGS}/").replace("batch_size=32", "batch_size=8") for word in words]
      words += [] if "--workdir" in line else [f"--workdir=runs/{len(os.listdir(tmp_path))}"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
