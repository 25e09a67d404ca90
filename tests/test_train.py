"""train.py and eval_knn.py from end to end, killed and resumed, with real processes where it matters."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import ml_collections
import numpy as np
import pytest

import train
from runs import (
  ROOT,
  SMALL,
  assert_same_run,
  checksums,
  command,
  environment,
  finish,
  rows,
  start,
  wait_for_save,
  wait_for_step,
)
from ssl_jax import build, monitors, training
from ssl_jax.errors import UserError
from ssl_jax.run import checkpoint, log

LARGEST_FILE = 60_000  # bytes: more than what is written first, less than a checkpoint
SLOW = pytest.mark.slow


def test_a_run_tells_what_it_does_and_what_it_is_worth(unbroken):
  workdir, out = unbroken
  for text in (
    "devices: 1 x cpu",
    "fashion_mnist_mini train[:512], 512 images of [28, 28, 1]",
    "parameters in the encoder",
    "batch 64, 8 steps an epoch, 20 steps",
    "peak 0.00",
    "GFLOP a step",
    f"loss at chance: {np.log(127):.4f}",
    "images/s",
    "left",
    "encoder, untrained",
    "raw pixels",
    "pixels, centred",
    "pixels, standardised",
  ):
    assert text in out, text
  for name in ("checkpoints", "metrics.jsonl", "tensorboard", "config.json", "curves.png"):
    assert f"wrote {workdir / name}" in out and (workdir / name).exists()
  assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("peak", [8e10, None])
def test_the_utilisation_is_told_where_the_peak_is_known(peak, monkeypatch):
  said, written = [], []
  monkeypatch.setattr(log, "say", said.append)
  config = types.SimpleNamespace(log_every_steps=1, batch_size=10)
  numbers = dict(last_step=9, steps=9, steps_per_epoch=3, learning_rate=lambda step: 0.1 * step, chance=1.0)
  run = types.SimpleNamespace(config=config, flops=2e9, peak=peak, **numbers)
  clock = types.SimpleNamespace(images_per_second=lambda step: 164.0, share=0.0, outlook_from=9)
  row = {"loss": 1.0, "feature_std": 1.0, "effective_rank": 9.0}
  log.write_steps(run, types.SimpleNamespace(write=written.append), clock, [(3, row)], None)
  assert ("MFU 41 %" in said[0], written[0].get("mfu")) == (bool(peak), peak and 0.41)
  assert written[0]["learning_rate"] == 0.2  # of the third step, whose number in the schedule is 2


def test_rows_hold_what_they_promise_each_step_once(unbroken):
  workdir, _ = unbroken
  table = log.read_rows(workdir / "metrics.jsonl")
  training = [row for row in table if "loss" in row]
  assert [row["step"] for row in training] == list(range(2, 21, 2))
  assert [row["step"] for row in table if "knn_top1" in row] == [0, 8, 16, 20]
  for row in training:
    assert {"epoch", "learning_rate", "grad_norm", "images_per_second", "feature_std", "alignment", "uniformity",
            "effective_rank"} <= row.keys()  # fmt: skip
    assert np.float32(row["loss"]) == row["loss"]  # written so that it reads back exactly
    assert row["epoch"] == row["step"] / 8
  assert training[-1]["loss"] < training[0]["loss"] - 0.5  # it learns
  assert all(0 <= row["knn_top1"] <= 100 for row in table if "knn_top1" in row)


def test_the_last_few_checkpoints_and_the_best_are_kept(unbroken):
  workdir, _ = unbroken
  kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
  scores = {row["step"]: row["knn_top1"] for row in rows(workdir) if "knn_top1" in row and row["step"]}
  best = max(scores.values())
  assert {12, 16, 20} <= set(kept) and len(kept) <= 4
  assert any(scores.get(step) == best for step in kept)


def test_the_best_checkpoint_is_still_kept_where_a_run_has_gone_on(tmp_path):
  state = {"params": {"w": jax.numpy.arange(3.0)}}
  rows = [{"step": step, "knn_top1": 50.0 - step / 100} for step in range(1, 10)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for first in (1, 6):
    with checkpoint.manager(tmp_path / "checkpoints", 3) as saver:
      for step in range(first, first + 4):
        checkpoint.save(saver, step, state)
  assert checkpoint.steps(tmp_path / "checkpoints") == [9, 8, 7, 1]


def test_a_finished_run_started_again_says_so_and_changes_nothing(unbroken, cache):
  workdir, _ = unbroken
  before = checksums(workdir)
  assert "complete" in finish(start(cache, "train.py", workdir))
  assert checksums(workdir) == before


def test_another_config_is_refused_with_both_values(unbroken, cache):
  workdir, _ = unbroken
  before = checksums(workdir)
  out = finish(start(cache, "train.py", workdir, **{"lr.base": 0.125}), status=1)
  assert "lr.base: now 0.125, then 0.00" in out and "Traceback" not in out
  assert checksums(workdir) == before


def test_killed_and_terminated_a_run_ends_bit_for_bit_like_an_unbroken_one(unbroken, cache, tmp_path):
  workdir = tmp_path / "run"
  for reached, number in (
    (wait_for_step(0), signal.SIGKILL),
    (wait_for_save(8), signal.SIGKILL),
    (wait_for_step(14), signal.SIGTERM),
  ):
    process = start(cache, "train.py", workdir)
    deadline = time.time() + 120
    while process.poll() is None and not reached(workdir):
      assert time.time() < deadline
      time.sleep(0.0005)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
  assert process.returncode in (0, 143) and "saved" in out, out
  out = finish(start(cache, "train.py", workdir))
  assert "resuming at step" in out or "complete" in out
  assert_same_run(workdir, unbroken[0])


def test_damaged_and_unfinished_checkpoints_are_skipped_with_a_word(unbroken, cache, tmp_path):
  workdir = shutil.copytree(unbroken[0], tmp_path / "run")
  folder = workdir / "checkpoints"
  largest = max((p for p in (folder / "16" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  shutil.rmtree(folder / "20")
  (folder / "20").mkdir()  # a name that promises a checkpoint
  (folder / "24.orbax-checkpoint-tmp-0").mkdir()
  (folder / "24.orbax-checkpoint-tmp-0" / "garbage").write_text("x")
  out = finish(start(cache, "train.py", workdir))
  assert "skipped the checkpoint of step 20" in out and "skipped the checkpoint of step 16" in out
  assert "resuming at step 12" in out
  assert_same_run(workdir, unbroken[0])


@SLOW
@pytest.mark.parametrize("kind", ["half", "flipped", "gone"])
def test_whatever_is_damaged_is_found_or_did_not_matter(unbroken, tmp_path, kind):
  folder, abstract = unbroken[0] / "checkpoints", abstract_state(configs_of(unbroken[0]))
  good = checkpoint.restore(folder, 20, abstract)
  files = [p for p in (folder / "20").rglob("*") if p.is_file() and p.stat().st_size]
  found = 0
  for file in files:
    copy = tmp_path / "checkpoints"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "20", copy / "20")
    shutil.copytree(folder / "16", copy / "16")
    damaged = copy / "20" / file.relative_to(folder / "20")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    if kind == "gone":
      damaged.unlink()
    else:
      damaged.write_bytes(content if kind == "flipped" else content[: len(content) // 2])
    said: list[str] = []
    step, state = checkpoint.restore_newest(copy, abstract, said.append)
    if step == 20:
      assert not said and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(good), strict=True)
      ), file
    else:
      assert step == 16 and "step 20" in said[0]
      found += 1
  assert found >= 3  # the arrays, their index, their names


def configs_of(workdir):
  return ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))


def abstract_state(config):
  return build.program(config, jax.sharding.Mesh(jax.devices()[:1], ("batch",)), 20, 8).state._asdict()


def test_where_no_checkpoint_can_be_read_nothing_is_overwritten(unbroken, cache, tmp_path):
  workdir = tmp_path / "run"
  (workdir / "checkpoints" / "20").mkdir(parents=True)
  shutil.copy(unbroken[0] / "config.json", workdir)
  before = checksums(workdir)
  out = finish(start(cache, "train.py", workdir), status=1)
  assert "none of the 1 checkpoints" in out and "Traceback" not in out
  assert checksums(workdir) == before


@pytest.mark.parametrize("devices", [pytest.param(2, marks=SLOW), 4])
def test_more_devices_give_the_same_run_and_read_its_checkpoints(unbroken, cache, tmp_path, devices):
  workdir = shutil.copytree(unbroken[0], tmp_path / "run")
  for step in (16, 20):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  out = finish(start(cache, "train.py", workdir, devices=devices))
  assert f"devices: {devices} x cpu" in out and "resuming at step 12" in out
  got, want = rows(workdir), rows(unbroken[0])
  assert [row["step"] for row in got] == [row["step"] for row in want]
  for a, b in zip(got, want, strict=True):
    if "loss" in a:
      tolerance = 1e-6 if a["step"] <= 14 else 1e-3  # float32 sums in another order, amplified by Adam step for step
      np.testing.assert_allclose(a["loss"], b["loss"], rtol=tolerance)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(cache, tmp_path, monkeypatch):
  config = small_config(steps=12)
  make_step = training.make_step

  def poisoned(*args):
    gradient, update = make_step(*args)

    def with_nan(state):
      kernel = state.params["encoder"]["layer1_0"]["conv1"]["kernel"]
      state.params["encoder"]["layer1_0"]["conv1"]["kernel"] = jax.numpy.where(state.step == 6, jax.numpy.nan, kernel)
      return state

    return training.Step(
      lambda state, batch: gradient(with_nan(state), batch), lambda state, *given: update(with_nan(state), *given)
    )

  monkeypatch.setattr(training, "make_step", poisoned)
  with pytest.raises(UserError, match=r"step 7 is not finite \(.*loss.*\).*params/encoder/layer1_0/conv1/kernel"):
    train.main(config, tmp_path / "run")
  assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]
  assert rows(tmp_path / "run")[-1] == {"step": 7, "epoch": 7 / 8, "not_finite": 1}


def small_config(**overrides):
  module = {}
  exec((ROOT / "configs" / "quickstart.py").read_text(), module)
  config = module["get_config"]()
  config.update_from_flattened_dict({**SMALL, **overrides})
  return config


def folder_config(root, **overrides):
  given = {"data.folder": str(root), "data.split": "train", "data.test_split": "val", "data.channels": 3}
  return small_config(**{**given, "batch_size": 8, "steps": 9, "log_every_steps": 1, **overrides})


@SLOW
def test_collapsed_features_are_told(cache, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(monitors, "COLLAPSED_STD", 10.0)  # any features are below this
  train.main(small_config(steps=9, stop_after_steps=2), tmp_path / "run")
  assert "warning: the features have collapsed" in capsys.readouterr().out


def test_a_folder_without_labels_trains_without_knn(tmp_path, capsys):
  import PIL.Image

  for i in range(24):
    pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
  folder = {"data.folder": str(tmp_path), "data.split": "train", "batch_size": 8, "steps": 4, "data.channels": 3}
  assert train.main(small_config(**folder), tmp_path / "run") == 0
  out = capsys.readouterr().out
  assert "no labels: the online k-NN is off" in out and "without labels, which is no accuracy" in out
  assert (tmp_path / "run" / "curves.png").exists()
  looks = [row for row in rows(tmp_path / "run") if "loss" not in row]
  assert [row["step"] for row in looks] == [0, 3, 4] and not any("knn_top1" in row for row in looks)
  assert all(1 < row["encoder_rankme"] < 24 and 0 < row["encoder_alignment"] < 2 for row in looks)


def test_eval_knn_agrees_with_the_run_and_ends_in_a_line_to_parse(unbroken, cache, tmp_path):
  workdir = shutil.copytree(unbroken[0], tmp_path / "run")
  out = finish(start(cache, "eval_knn.py", workdir, "--k=5,20"))
  figures = json.loads(out.splitlines()[-1])
  assert figures == json.loads((workdir / "knn.json").read_text())
  names = [f"k{k}_{name}" for k in (5, 20) for name in ("top1", "top5", "balanced")]
  intervals = {f"{name}_{end}" for name in (*names, "guessing_top1") for end in ("low", "high")}
  made_of = {"data", "data_dir", "bank_split", "bank_images", "test_split", "test_images"}
  made_of |= {"features", "temperature", "overlap"}
  assert set(figures) == {"step", "feature_norm", "guessing_top1", *names} | made_of | intervals
  assert (figures["data"], figures["bank_images"], figures["overlap"]) == ("fashion_mnist_mini", 512, False)
  assert all(figures[f"{name}_low"] < figures[name] <= figures[f"{name}_high"] for name in names)
  last = rows(workdir)[-1]
  assert figures["step"] == 20
  assert all(figures[f"k20_{name}"] == last[f"knn_{name}"] for name in ("top1", "top5", "balanced"))


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_what_was_saved(unbroken, cache, tmp_path):
  workdir = tmp_path / "run"
  code = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({LARGEST_FILE}, {LARGEST_FILE}))
sys.argv = {command("train.py", workdir)[1:]}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(cache), cwd=ROOT)
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
  assert re.search(rf"cannot write to {workdir}/.*: File too large, [\d,]+ bytes are free\.", done.stderr)
  finish(start(cache, "train.py", workdir))
  assert_same_run(workdir, unbroken[0])


def test_eval_knn_leaves_an_image_out_of_its_own_neighbours(unbroken, cache, tmp_path):
  workdir = shutil.copytree(unbroken[0], tmp_path / "run")
  out = finish(start(cache, "eval_knn.py", workdir, "--k=1", "--test_split=train[:512]", "--step=16"))
  assert json.loads(out.splitlines()[-1])["k1_top1"] < 95  # each image would find itself: 100


def slow(*case):
  return pytest.param(*case, marks=SLOW)


@pytest.mark.parametrize(
  "script, arguments, text",
  [
    ("train.py", ["--config.sed=1"], "no config key 'sed'; did you mean 'seed'?"),
    slow("train.py", ["--config.optim.lrr=1"], "no config key 'optim.lrr'; did you mean 'optim"),
    slow("train.py", ["--config.method.queue=1"], "no config key 'method.queue'; did you mean"),
    ("train.py", ["--config=configs/none.py"], "no config file"),
    slow("train.py", ["--config.epochs=many"], "invalid literal"),
    ("train.py", ["--config.batch_size=600"], "batch_size=600 is more than the 512 images"),
    slow("train.py", ["--config.lr.warmup_epochs=99"], "the warm-up is 792 steps long and the run 20"),
    slow("train.py", ["--config.data.name=fashion_mnist_min"], "Did you mean 'fashion_mnist_mini'?"),
    slow("train.py", ["--config.method.temperature=-1.0"], "method.temperature must be a positive number"),
    slow("train.py", ["--config.encoder.stem=large"], "encoder.stem must be one of"),
    slow("train.py", ["--config.batch_size=1", "--config.lr.warmup_epochs=0"], "at least two images"),
    ("eval_knn.py", ["--step=3"], "has no checkpoint of step 3; it has"),
    slow("eval_knn.py", ["--k=ten"], "--k must be whole numbers"),
    slow("eval_knn.py", ["--k=10,0"], "--k must be whole numbers"),
  ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_compiled(unbroken, cache, tmp_path, script, arguments, text):
  workdir = unbroken[0] if script == "eval_knn.py" else tmp_path / "run"
  out = finish(start(cache, script, workdir, *arguments), status=1)
  assert text in out.splitlines()[-1] and "Traceback" not in out, out
  assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_names_those_that_do(cache, tmp_path):
  out = finish(start(cache, "train.py", tmp_path / "run", devices=4, batch_size=62), status=1)
  assert "batch_size=62 cannot be split evenly over the 4 devices: batch_size=60 or 64 does" in out.splitlines()[-1]
