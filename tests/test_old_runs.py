"""A run that an older version wrote goes on and is evaluated: tests/golden/old_run.tar.gz is one of ac000a1.

MoCo v2 on 256 images, stopped after step 5 of 16. whole.jsonl has the rows of the same run without a stop.
"""

import json
import pathlib
import shutil
import tarfile

import ml_collections
import numpy as np
import pytest

import train
from ssl_jax import build, parallel, restore
from ssl_jax.errors import UserError
from ssl_jax.evaluation import accuracy, features
from ssl_jax.run import log


@pytest.fixture
def old_run(tmp_path, mesh, monkeypatch):
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(1))
  with tarfile.open(pathlib.Path(__file__).parent / "golden" / "old_run.tar.gz") as file:
    file.extractall(tmp_path, filter="data")
  config = ml_collections.ConfigDict(json.loads((tmp_path / "config.json").read_text()))
  config.stop_after_steps = None
  return tmp_path, config


def test_it_goes_on_as_it_would_have_then(old_run):
  workdir, config = old_run
  assert train.main(config, workdir) == 0
  got, want = (log.read_rows(workdir / name) for name in ("metrics.jsonl", "whole.jsonl"))
  got = [row for row in got if row["step"] != 5 or "loss" in row]  # evaluated where it stopped
  assert [row["step"] for row in got] == [row["step"] for row in want]
  for a, b in zip(got, want, strict=True):
    for name in ("loss", "grad_norm", "learning_rate"):  # another machine, whose sums have another order
      np.testing.assert_allclose(a.get(name, 0), b.get(name, 0), rtol=1e-3, err_msg=f"{name} of step {a['step']}")
  assert json.loads((workdir / "resolved.json").read_text())["steps"] == 16


def test_its_encoder_is_evaluated(old_run):
  workdir, config = old_run
  restored = restore.restore_encoder(workdir)
  assert restored.step == 5
  extractor = features.Extractor(restored.encoder, restored.eval_view, parallel.make_mesh(), 64)
  sets = [build.dataset(config, split) for split in (config.data.split, config.data.test_split)]
  found = [x for dataset in sets for x in extractor(restored.variables, dataset)]
  scores = accuracy.knn_accuracy(*found, k=config.knn.k, temperature=config.knn.temperature)
  then = log.read_rows(workdir / "metrics.jsonl")[-1]["knn_top1"]
  assert abs(scores["top1"] - then) <= 1  # one of a hundred images


def test_files_that_somebody_has_damaged_are_told_by_their_path(old_run):
  workdir, config = old_run
  for name, content in (("config.json", '{"a":'), ("config.json", "[]"), ("resolved.json", "x")):
    kept = (workdir / "config.json").read_text()
    (workdir / name).write_text(content)
    for use in (lambda: restore.restore_encoder(workdir), lambda: train.main(config, workdir)):
      with pytest.raises(UserError, match=rf"{workdir / name} is damaged.*put it back"):
        use()
    (workdir / "config.json").write_text(kept)
  (workdir / "config.json").write_text(kept.replace('"batch_size": ', '"batch_size": -'))
  with pytest.raises(UserError, match=rf"{workdir / 'config.json'} is damaged: batch_size must be a whole number"):
    restore.restore_encoder(workdir)
  (workdir / "config.json").write_text(kept)
  shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(UserError, match="has no checkpoint yet"):
    restore.restore_encoder(workdir)
  (workdir / "resolved.json").unlink()
  (workdir / "checkpoints").touch()
  with pytest.raises(UserError, match=rf"{workdir / 'checkpoints'} is a file, where a run has a folder"):
    train.main(config, workdir)


def test_its_encoder_reads_values_of_more_than_8_bits_as_the_run_did(old_run, tmp_path):
  workdir, _ = old_run
  (workdir / "resolved.json").write_text(json.dumps({"window": [0, 510]}))
  config = restore.restore_encoder(workdir).config
  config.data.folder = str(tmp_path / "images")
  pathlib.Path(config.data.folder).mkdir()
  np.save(tmp_path / "images" / "0.npy", np.arange(256, dtype=np.uint16).reshape(16, 16))
  dataset = build.dataset(config, "train")
  assert dataset.window == (0, 510) and dataset.original(0).max() == 128  # 255 by a window of its own
