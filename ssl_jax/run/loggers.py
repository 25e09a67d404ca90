"""Where a run's rows and pictures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

metrics.jsonl is the run's record, and the tools have copies of it. A run that goes on brings each of them to what
metrics.jsonl holds then, by what the tool allows: TensorBoard hides later steps, W&B's offline file is written anew,
and MLflow, which takes nothing back, keeps what it has. Nothing leaves the machine unless the tool's own environment
variables say so (WANDB_MODE, MLFLOW_TRACKING_URI).
"""

import importlib.util
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL.Image
from tensorboardX import embedding, event_file_writer, summary
from tensorboardX.proto import event_pb2

from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.run import whole
from ssl_jax.run.cli import say

_EXTRA = ("wandb", "mlflow")  # packages that requirements.txt leaves out
_IDS = "loggers.json"  # in a workdir: the names that W&B and MLflow have for the run
_PARAMS = 100  # that MLflow takes at once
_COMPONENTS = 64  # of the features, for the projector: files of all of thousands would be of tens of megabytes


class About(NamedTuple):
  """What the tools are told of a run beside its rows: its config, what the data decided, and its last step."""

  config: dict[str, Any]
  resolved: dict[str, Any]
  last_step: int


class Logger(Protocol):
  """One of the tools, from the start of a run, or of its going on, to its end."""

  def write(self, row: dict[str, Any]) -> None:
    """Takes a row: "step" and numbers by name."""
    ...

  def show(self, name: str, path: pathlib.Path, step: int) -> None:
    """Takes a picture, a PNG file."""
    ...

  def close(self) -> None: ...


def check_installed(names: Sequence[str]) -> None:
  """Raises UserError unless the packages of these loggers can be imported."""
  # Where W&B has been, a folder of its name lies around, which Python takes for a package without a file.
  missing = [x for x in _EXTRA if x in names and getattr(importlib.util.find_spec(x), "origin", None) is None]
  if missing:
    raise UserError(
      f"loggers={','.join(names)} needs what is not installed here: pip install {' '.join(missing)} "
      "(requirements-loggers.txt has the versions that were tried)."
    )


def begin(
  names: Iterable[str], workdir: pathlib.Path, step: int, rows: list[dict[str, Any]], about: About | None
) -> list[Logger]:
  """Begins with the loggers of a run that has `rows` and goes on at `step`; -1: it starts from nothing."""
  made: list[Logger] = []
  if step < 0:  # another run than the one that the tools know
    (workdir / _IDS).unlink(missing_ok=True)
  for name in names:
    if name == "tensorboard":
      made.append(TensorBoard(workdir, step))
    else:
      made.append(_Guest(name, {"wandb": WandB, "mlflow": MLflow}[name], workdir, step, rows, about))
  return made


class TensorBoard:
  """Event files in WORKDIR/tensorboard."""

  def __init__(self, workdir: pathlib.Path, step: int):
    self.folder = workdir / "tensorboard"
    # Not tensorboardX.SummaryWriter: on a full disk its thread dies, and the next rows would wait for it for ever.
    self.folder.mkdir(exist_ok=True)
    self.board = event_file_writer.EventsWriter(str(self.folder / "events"))
    self._log(step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))  # hides later steps

  def write(self, row: dict[str, Any]) -> None:
    for name, value in row.items():
      if name != "step":
        self._log(row["step"], summary=summary.scalar(name, value))
    self.board.flush()

  def show(self, name: str, path: pathlib.Path, step: int) -> None:
    with PIL.Image.open(path) as picture:
      self._log(step, summary=summary.image(name, np.asarray(picture.convert("RGB")), dataformats="HWC"))

  def _log(self, step: int, **content: Any) -> None:
    self.board.write_event(event_pb2.Event(step=step, wall_time=time.time(), **content))

  def close(self) -> None:
    self.board.close()


def write_projector(workdir: pathlib.Path, features: np.ndarray, names: list[tuple[str, str]], thumbs: np.ndarray):
  """Writes what TensorBoard's projector shows, the features' first principal components, into WORKDIR/tensorboard.

  Args:
    workdir: the run's.
    features: float [n, d].
    names: what each image is called, and its class.
    thumbs: float [n, s, s, 3] in [0, 1], the images.
  """
  folder = workdir / "tensorboard" / "projector"
  folder.mkdir(parents=True, exist_ok=True)
  rows = [[" ".join(x.encode("utf-8", "backslashreplace").decode().split()) for x in row] for row in names]
  u, s, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
  np.savetxt(folder / "tensors.tsv", (u * s)[:, :_COMPONENTS], "%.4g", "\t")
  embedding.make_tsv(rows, str(folder), ["image", "class"])
  embedding.make_sprite(thumbs.transpose(0, 3, 1, 2), str(folder))
  side = thumbs.shape[1]
  entry = "".join(
    f'  {key}: "projector/{file}"\n'
    for key, file in (("tensor_path", "tensors.tsv"), ("metadata_path", "metadata.tsv"))
  )
  sprite = f'  sprite {{ image_path: "projector/sprite.png" single_image_dim: {side} single_image_dim: {side} }}\n'
  text = f'embeddings {{\n  tensor_name: "encoder"\n{entry}{sprite}}}\n'
  whole.text(folder.parent / "projector_config.pbtxt", text)


class _Guest:
  """W&B or MLflow. Whatever fails of it is a line, and the run goes on without it: metrics.jsonl has all rows."""

  def __init__(
    self,
    name: str,
    kind: Callable[..., Any],
    workdir: pathlib.Path,
    step: int,
    rows: list[dict[str, Any]],
    about: About | None,
  ):
    self.name: str | None = name
    self.logger: Any = None

    def start():
      ids = workdir / _IDS
      known = json.loads(ids.read_text()) if ids.is_file() else {}
      self.logger = kind(workdir, known.get(name), about)
      whole.text(ids, json.dumps(known | {name: self.logger.id}) + "\n")
      say(f"{name}: {self.logger.where}")
      self._catch_up(workdir / "pictures", step, rows)

    self._try(start)

  def _catch_up(self, folder, step, rows):
    """Hands over what the run had so far, in the order of its steps. What the tool has already, it leaves out."""
    events: list[tuple[int, Callable, tuple]] = [(row["step"], self.logger.write, (row,)) for row in rows]
    for path in sorted(folder.glob("*.png")):
      name, _, number = path.stem.rpartition("_")
      if number.isdigit() and int(number) <= step:
        events.append((int(number), self.logger.show, (name or "pictures", path, int(number))))
    for _, function, given in sorted(events, key=lambda event: event[0]):
      function(*given)

  def write(self, row: dict[str, Any]) -> None:
    self._try(lambda: self.logger.write(row))

  def show(self, name: str, path: pathlib.Path, step: int) -> None:
    self._try(lambda: self.logger.show(name, path, step))

  def close(self) -> None:
    self._try(lambda: self.logger.close())

  def _try(self, function):
    if self.name is None:
      return
    try:
      function()
    except Exception as error:  # of many types
      why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      say(f"{self.name} failed ({why}); the run goes on without it, and metrics.jsonl has all rows")
      self.name = None


class WandB:
  """A run of Weights & Biases in WORKDIR/wandb, offline unless WANDB_MODE says otherwise.

  W&B holds back some tens of kilobytes of an offline file until the run ends, and a kill loses them. The file is
  therefore written anew by a run that goes on, under the same id. An online run goes on behind the last step that the
  server has.
  """

  def __init__(self, workdir: pathlib.Path, known: str | None, about: About):
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of W&B's own errors, to a server, offline too
    import wandb

    self.picture = wandb.Image
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    offline = mode == "offline"
    for old in (workdir / "wandb").glob(f"offline-run-*-{known}") if known and offline else ():
      shutil.rmtree(old)
    self.run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "ssl_jax"),
      name=os.environ.get("WANDB_NAME", workdir.absolute().name),
      id=known,
      resume="allow" if known and not offline else None,
      dir=workdir,
      mode=mode,
      config={**about.config, "resolved": about.resolved},
      allow_val_change=True,
      settings=wandb.Settings(silent=offline, console="off"),  # The live line is not W&B's.
    )
    self.id, self.first = self.run.id, self.run.step  # It ignores, and warns of, earlier steps.
    folder = pathlib.Path(self.run.dir).parent
    self.where = f"offline; to upload it: wandb sync {folder}" if offline else str(self.run.url or mode)

  def write(self, row: dict[str, Any]) -> None:
    if row["step"] >= self.first:
      self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

  def show(self, name: str, path: pathlib.Path, step: int) -> None:
    if step >= self.first:
      self.run.log({name: self.picture(str(path))}, step=step)

  def close(self) -> None:
    self.run.finish(exit_code=int(sys.exc_info()[0] is not None))


class MLflow:
  """A run of MLflow in WORKDIR/mlflow.db, or where MLFLOW_TRACKING_URI says.

  It cannot take a row back: values that it has already stay as they were written first.
  """

  def __init__(self, workdir: pathlib.Path, known: str | None, about: About):
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # It tells of each table that it makes.
    import mlflow

    self.metric, self.last_step, self.step = mlflow.entities.Metric, about.last_step, -1
    own = os.environ.get("MLFLOW_TRACKING_URI")
    uri = own or f"sqlite:///{workdir.absolute() / 'mlflow.db'}"
    self.client, self.where = mlflow.MlflowClient(uri), f"mlflow ui --backend-store-uri={uri}"
    self.sent: dict[str, int] = {}  # the last step of each metric
    found = self._find(known, mlflow.MlflowException) if known else None
    if found:
      self.id = known
      for name in found.data.metrics:
        self.sent[name] = max(x.step for x in self.client.get_metric_history(self.id, name))
      self.client.update_run(self.id, status="RUNNING")
    else:
      files = None if own else (workdir.absolute() / "mlartifacts").as_uri()
      self.id = self.client.create_run(self._experiment(files), run_name=workdir.absolute().name).info.run_id
      params = configs.flattened(about.config)
      texts = [(key, x if isinstance(x, str) else json.dumps(x)) for key, x in params.items()]
      for i in range(0, len(texts), _PARAMS):
        self.client.log_batch(self.id, params=[mlflow.entities.Param(*x) for x in texts[i : i + _PARAMS]])
    self.client.log_dict(self.id, about.config, "config.json")
    self.client.log_dict(self.id, about.resolved, "resolved.json")

  def _find(self, known, missing):
    try:
      return self.client.get_run(known)
    except missing:  # The person has changed the store since, say: then all of the run comes into the new one.
      return None

  def _experiment(self, files):
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ssl_jax")
    found = self.client.get_experiment_by_name(name)
    return found.experiment_id if found else self.client.create_experiment(name, artifact_location=files)

  def write(self, row: dict[str, Any]) -> None:
    self.step, now = row["step"], int(1000 * time.time())
    values = {name: x for name, x in row.items() if name != "step" and self.sent.get(name, -1) < self.step}
    if values:
      self.client.log_batch(self.id, metrics=[self.metric(key, float(x), now, self.step) for key, x in values.items()])

  def show(self, name: str, path: pathlib.Path, step: int) -> None:
    del step  # which the file's name has: one that comes again takes the first one's place
    self.client.log_artifact(self.id, str(path), name)

  def close(self) -> None:
    ended = "FINISHED" if self.step >= self.last_step else "KILLED"
    self.client.set_terminated(self.id, "FAILED" if sys.exc_info()[0] else ended)
