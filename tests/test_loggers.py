"""What TensorBoard, Weights & Biases and MLflow get of a run, after a kill too; the last two by their real packages."""

import json
import shutil
import signal
import struct
import time
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import train
from runs import assert_same_run, finish, start, wait_for_step
from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.run import log, loggers

CLOCK = ("images_per_second", "input_share")
PICTURES = {"views": [0], "neighbours": [0, 8, 16, 20]}


def events(folder):
  """What is in the event files of a folder, in their order."""
  for path in sorted(folder.glob("events*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      at += 16 + length


def test_tensorboard_has_the_rows_the_pictures_and_the_features(unbroken):
  workdir, _ = unbroken
  values = [(event.step, value) for event in events(workdir / "tensorboard") for value in event.summary.value]
  scalars = [(step, value.tag, value.simple_value) for step, value in values if not value.HasField("image")]
  want = [
    (row["step"], name, np.float32(x))
    for row in log.read_rows(workdir / "metrics.jsonl")
    for name, x in row.items()
    if name != "step"
  ]
  assert scalars == want
  images = [(value.tag, step) for step, value in values if value.HasField("image")]
  assert sorted(images) == sorted((name, step) for name, steps in PICTURES.items() for step in steps)
  folder = workdir / "tensorboard" / "projector"
  placed = np.loadtxt(folder / "tensors.tsv")
  assert placed.shape == (200, 64) and np.all(np.diff(placed.std(axis=0)) < 1e-3)  # the principal components
  assert (folder / "metadata.tsv").read_text().splitlines()[:2] == ["image\tclass", "image 0 of test[:200]\tAnkle boot"]
  config = (workdir / "tensorboard" / "projector_config.pbtxt").read_text()
  assert "projector/sprite.png" in config and config.count("single_image_dim: 28") == 2


def test_what_is_not_installed_is_told_before_anything_is_built(tmp_path, monkeypatch):
  (tmp_path / "no_such_logger").mkdir()  # as W&B leaves a folder of its name, which can be imported
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(loggers, "_EXTRA", ("no_such_logger",))
  config = configs.base()
  config.loggers = ("tensorboard,no_such_logger",)  # as the command line gives it
  with pytest.raises(UserError, match="not installed here: pip install no_such_logger "):
    train.main(config, tmp_path / "run")  # it has no encoder: more would fail of that


class Tool:
  """In place of W&B: what it is given, and it breaks at step 6."""

  id, where, seen = "an id", "nowhere", []

  def __init__(self, workdir, known, about):
    self.seen.append(("begins", known))

  def write(self, row):
    if row["step"] == 6:
      raise RuntimeError("the server\nis gone")
    self.seen.append(row["step"])

  def show(self, name, path, step):
    self.seen.append((name, step))

  def close(self):
    raise AssertionError("it was given up before")


def test_a_run_that_goes_on_hands_over_what_it_had_and_never_ends_for_a_tool(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(loggers, "WandB", Tool)
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 2, 4, 4, 6)))
  (tmp_path / "loggers.json").write_text('{"wandb": "the id", "mlflow": "another"}')
  (tmp_path / "pictures").mkdir()
  for name in ("00000000", "views_00000000", "00000004", "00000008", "mine"):  # "8" is of a step that comes again
    (tmp_path / "pictures" / f"{name}.png").touch()
  writer = log.Writer(tmp_path, 4, ("wandb",))
  assert Tool.seen == [("begins", "the id"), 0, ("pictures", 0), ("views", 0), 2, 4, 4, ("pictures", 4)]
  assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "an id", "mlflow": "another"}
  for step in (5, 6, 7):
    writer.write({"step": step})
  writer.close()
  assert Tool.seen[8:] == [5] and [row["step"] for row in log.read_rows(writer.path)] == [0, 2, 4, 4, 5, 6, 7]
  assert capsys.readouterr().out.count("wandb failed (RuntimeError: the server is gone); the run goes on") == 1
  log.Writer(tmp_path, -1, ("wandb",)).file.close()
  assert Tool.seen[9:] == [("begins", None)]  # another run, which may have another config
  assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "an id"}  # so mlflow's is not joined later


def test_one_that_cannot_be_closed_leaves_none_of_the_others_open(tmp_path):
  writer, closed = log.Writer(tmp_path, -1, ()), []

  def full():
    raise OSError("the disk is full")

  writer.loggers = [
    types.SimpleNamespace(close=x) for x in (lambda: closed.append("a"), full, lambda: closed.append("b"))
  ]
  with pytest.raises(OSError, match="the disk is full"):
    writer.close()
  assert writer.file.closed and sorted(closed) == ["a", "b"]


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory):
  """A run with all loggers that is killed behind the row of step 14, and started again; and its ids before that."""
  for name in ("wandb", "mlflow"):
    pytest.importorskip(name, reason="pip install -r requirements-loggers.txt", exc_type=ImportError)
  workdir = tmp_path_factory.mktemp("logged") / "run"
  settings = dict(report=True, loggers="tensorboard,wandb,mlflow")
  process = start(cache, "train.py", workdir, **settings)
  deadline = time.time() + 300
  while process.poll() is None and not wait_for_step(14)(workdir):
    assert time.time() < deadline
    time.sleep(0.0005)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  ids = json.loads((workdir / "loggers.json").read_text())
  assert 14 in [row["step"] for row in log.read_rows(workdir / "metrics.jsonl")]  # which will come again
  out = finish(start(cache, "train.py", workdir, **settings))
  assert "resuming at step" in out and "failed" not in out, out
  return workdir, ids


@pytest.mark.slow
def test_loggers_change_no_number(killed, unbroken):
  assert_same_run(killed[0], unbroken[0])


def merged(workdir):
  """The rows of each step as one, without what depends on the clock."""
  found: dict[int, dict] = {}
  for row in log.read_rows(workdir / "metrics.jsonl"):
    kept = {name: x for name, x in row.items() if name not in (*CLOCK, "step")}
    found[row["step"]] = found.get(row["step"], {}) | kept
  return found


def records(path):
  """The records of W&B's file, which has the form of LevelDB's log."""
  from wandb.proto import wandb_internal_pb2

  data, at, part = path.read_bytes(), 7, b""
  while at + 7 <= len(data):
    left = 32768 - at % 32768
    if left < 7:
      at += left
      continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
    if kind in (1, 4):  # whole, or a last part
      yield wandb_internal_pb2.Record.FromString(part)
      part = b""


@pytest.mark.slow
def test_wandb_has_each_row_once_in_one_offline_file(killed):
  workdir, ids = killed
  (folder,) = (workdir / "wandb").glob("offline-run-*")
  found = list(records(folder / f"run-{ids['wandb']}.wandb"))
  history = [x.history for x in found if x.WhichOneof("record_type") == "history"]
  rows = [{x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in row.item} for row in history]
  want = merged(workdir)
  assert [row["_step"] for row in rows] == list(want)
  for row in rows:
    assert {name: row[name] for name in want[row["_step"]]} == want[row["_step"]]
  shown = {kind: [(row["_step"], row[f"{kind}.path"]) for row in rows if f"{kind}.path" in row] for kind in PICTURES}
  assert {kind: [step for step, _ in found] for kind, found in shown.items()} == PICTURES
  assert all((folder / "files" / path).is_file() for found in shown.values() for _, path in found)
  (begun,) = (x.run for x in found if x.WhichOneof("record_type") == "run")
  config = {x.key: json.loads(x.value_json) for x in begun.config.update}
  assert config["method"] == json.loads((workdir / "config.json").read_text())["method"]
  assert config["resolved"]["steps"] == 20 and begun.display_name == "run"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what MLflow imports
def test_mlflow_has_each_row_once_in_one_run(killed):
  import mlflow

  workdir, ids = killed
  client = mlflow.MlflowClient(f"sqlite:///{workdir / 'mlflow.db'}")
  (run,) = client.search_runs([client.get_experiment_by_name("ssl_jax").experiment_id])
  assert (run.info.run_id, run.info.status, run.info.run_name) == (ids["mlflow"], "FINISHED", "run")
  want = merged(workdir)
  assert set(run.data.metrics) == {name for row in want.values() for name in row} | {*CLOCK}
  for name in run.data.metrics:
    got = sorted((x.step, x.value) for x in client.get_metric_history(run.info.run_id, name))
    steps = [row["step"] for row in log.read_rows(workdir / "metrics.jsonl") if name in row]
    assert [step for step, _ in got] == steps
    assert name in CLOCK or got == [(step, want[step][name]) for step in steps]
  assert run.data.params["method.name"] == "simclr" and run.data.params["method.projector.hidden"] == "16"
  for kind, steps in PICTURES.items():
    paths = [x.path for x in client.list_artifacts(run.info.run_id, kind)]
    assert paths == [f"{kind}/{kind}_{step:08d}.png" for step in steps]
  files = {x.path for x in client.list_artifacts(run.info.run_id)}
  assert {"config.json", "resolved.json"} <= files


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what MLflow imports
def test_a_store_that_cannot_be_had_is_a_line_and_one_that_is_new_gets_all_rows(killed, tmp_path, monkeypatch, capsys):
  import mlflow

  workdir = shutil.copytree(killed[0], tmp_path / "run")
  about = loggers.About({"seed": 0}, {}, 20)
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"no_such_kind://{tmp_path}")
  log.Writer(workdir, 20, ("mlflow",), about).close()
  assert "mlflow failed (" in capsys.readouterr().out
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/all.db")
  monkeypatch.chdir(tmp_path)  # below which MLflow puts the files of such a store
  log.Writer(workdir, 16, ("mlflow",), about).close()
  said = capsys.readouterr().out
  assert "mlflow: mlflow ui" in said and "failed" not in said
  known = json.loads((workdir / "loggers.json").read_text())["mlflow"]
  run = mlflow.MlflowClient(f"sqlite:///{tmp_path}/all.db").get_run(known)
  assert known != killed[1]["mlflow"] and run.info.status == "KILLED"  # at 16, of 20
  assert run.data.metrics["loss"] == merged(workdir)[16]["loss"]
