"""Makes report.html: while a run trains, at its end, and of the folders of finished ones."""

import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jinja2
import numpy as np

from ssl_jax import config as configs
from ssl_jax.data.dataset import usable_cores
from ssl_jax.errors import UserError
from ssl_jax.page import drawings, look, words
from ssl_jax.run import cluster, loggers, messages, whole
from ssl_jax.run.cli import say
from ssl_jax.run.log import read_rows
from ssl_jax.run.workdir import read_json, read_resolved

PAGE, LOOK = "report.html", "report.json"  # in a workdir: the page, and what it shows beside the rows
MOST_RUNS = 4  # beside each other: more would not fit in `MOST_BYTES`
MOST_BYTES = 3_000_000
_NAMED = 50  # skipped files that are named
_COLOURED, _MATRIX = 10, 20  # classes that have a colour of their own, and that a confusion matrix has a cell for
_FIGURES = ("linear", "knn", "probe", "finetune")  # files that evaluations write: linear.json, linear_pets.json
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Pages:
  """Writes a run's page. A failure of it, of whatever kind, is a line: a run never ends for its page.

  Nothing here changes a number of the run. All processes call `write`, since all of them compute features; the first
  one writes, and hands pictures of what it has made to the `writer` of the run's rows.
  """

  def __init__(self, run: Any, workdir: pathlib.Path, writer: Any):
    self.run, self.workdir, self.writer, self.on = run, workdir, writer, run.config.get("report", True)
    self.seen: look.Gallery | None = None
    self.still: dict[str, Any] = {}  # what of the look stays the same

  def write(self, train: Any, step: int, drawn: Any = None) -> None:
    """Looks at the encoder and writes the page; t-SNE, where it can be had, at the run's last step only.

    `drawn` are the method's pictures.
    """
    if not self.on:
      return
    problem = ""
    try:
      self.seen = self.seen or look.gallery(self.run)
    except Exception as error:
      problem = _in_a_line(error)
    # What one process cannot read keeps all of them from what they compute together.
    problem = next(filter(None, cluster.exchange(problem)), "")
    if problem or self.seen is None:
      self._give_up(problem)
      return
    try:
      features = look.features(self.run, train, self.seen)
    except Exception as error:
      if jax.process_count() > 1:  # The others wait for this one.
        raise
      self._give_up(_in_a_line(error))
      return
    if not cluster.is_main():
      return
    try:
      found = look.take(features, self.seen, step, drawn, thorough=step == self.run.last_step)
      if not self.still:
        views = look.views(self.run)
        self.still = look.still(self.seen, views) | facts(self.run)
        if step == 0:
          self._show("views", list(zip(*(pictures for _, pictures in views), strict=True)), step)
      whole.text(self.workdir / LOOK, json.dumps(found | self.still))
      write_page([self.workdir], self.workdir / PAGE)
      self._show("neighbours", look.beside_neighbours(found, self.seen), step)
      if step == self.run.last_step and "tensorboard" in configs.loggers(self.run.config):
        loggers.write_projector(self.workdir, features, look.told(self.seen), look.thumbnails(self.seen))
    except Exception as error:
      self._give_up(_in_a_line(error))

  def end(self) -> None:
    """Writes the page of a run that is stopped early: its rows, and the look of the last evaluation."""
    if not self.on or not cluster.is_main():
      return
    try:
      write_page([self.workdir], self.workdir / PAGE)
    except Exception as error:
      self._give_up(_in_a_line(error))

  def _show(self, name, rows, step):
    path = self.workdir / "pictures" / f"{name}_{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    with whole.file(path) as scratch:
      look.tiles(rows).save(scratch, "PNG")
    self.writer.show(name, path, step)

  def _give_up(self, why):
    say(f"{self.workdir / PAGE} is not written ({why}); the run goes on without it")


def _in_a_line(error):
  return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def facts(run: Any) -> dict[str, Any]:
  """What a page tells of a run beside its config and rows, as JSON."""
  versions = {"python": platform.python_version()}
  for name in ("ssl_jax", *_PACKAGES):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
      continue
  device = run.mesh.devices.flat[0].device_kind
  return {
    "described": messages.describe(run),
    "last_step": run.last_step,
    "chance": run.chance,
    "labelled": run.test_set is not None,
    "environment": {
      "devices": f"{run.mesh.size} x {device}, in {jax.process_count()} process(es)",
      "system": f"{platform.system()} {platform.machine()}, {usable_cores()} cores",
      **versions,
    },
    "command": shlex.join(["python", *sys.argv]) if pathlib.Path(sys.argv[0]).name == "train.py" else None,
  }


def write_page(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> None:
  """Writes the page of some runs, beside each other, from what their folders hold."""
  text = page([folder(x) | {"figures": figures(x)} for x in workdirs])
  whole.text(out, text.encode("utf-8", "backslashreplace").decode())


def folder(workdir: pathlib.Path) -> dict[str, Any]:
  """What a run's folder tells, whatever of it there is, but for the figures of evaluations.

  Raises:
    UserError: it is not a run, or a file in it is damaged.
  """
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} is not a run: it has no config.json.")
  shown = read_json(workdir / LOOK) if (workdir / LOOK).is_file() else {}
  shown = shown if shown.get("format") == look.FORMAT else {}
  rows = read_rows(workdir / "metrics.jsonl")
  resolved = read_resolved(workdir)
  lists = [path.read_text(encoding="utf-8", errors="replace") for path in workdir.glob("skipped*.txt")]
  skipped = sorted({name for text in lists for name in text.splitlines()})
  return {
    "workdir": str(workdir),
    "config": read_json(workdir / "config.json"),
    "images": resolved.get("images"),
    "steps": resolved.get("steps"),
    "rows": rows,
    "look": shown,
    "skipped": skipped,
  }


def figures(workdir: pathlib.Path) -> dict[str, Any]:
  """What evaluations of a run wrote, by the names of their files; a damaged one is told and left out."""
  found = {}
  for path in sorted(path for path in workdir.glob("*.json") if path.stem.startswith(_FIGURES)):
    try:
      found[path.stem] = read_json(path)
    except UserError:
      say(f"{path} is damaged and left out: delete it, or evaluate again")
  return found


def page(runs: list[dict[str, Any]]) -> str:
  """The page of some runs (`folder` and `figures`), as HTML that loads nothing."""
  titles = _titles([run["workdir"] for run in runs])
  shown = [_shown(i, title, run) for i, (title, run) in enumerate(zip(titles, runs, strict=True))]
  written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
  looks = [_for_script(run["look"]) for run in runs]
  return _template().render(
    runs=shown,
    looks=looks,
    curves=_curves(titles, runs),
    monitors=_monitors(titles, runs),
    differences=_differences(runs),
    coloured=_COLOURED,
    written=written,
  )


@functools.cache  # which takes longer to read than to fill
def _template():
  loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
  settings: dict[str, Any] = dict(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
  return jinja2.Environment(loader=loader, lstrip_blocks=True, **settings).get_template("page.html")


def _for_script(shown):
  """What the script needs of a look, to show the image of a point."""
  if not shown:
    return {}
  sheet = {key: shown["sheet"][key] for key in ("side", "columns", "rows")}
  return {"sheet": sheet, "names": [named(shown, i) for i in range(len(shown["names"]))]}


def _titles(workdirs):
  """The shortest ends of the paths that tell them apart."""
  parts = [pathlib.Path(x).resolve().parts for x in workdirs]
  for count in range(1, max(map(len, parts)) + 1):
    titles = ["/".join(x[-count:]) for x in parts]
    if len(set(titles)) == len(set(parts)):
      break
  return titles


def _shown(number, title, run):
  """What the template takes of a run."""
  config, shown, rows = run["config"], run["look"], run["rows"]
  ends = shown.get("last_step") or config.get("stop_after_steps") or run["steps"]
  known = {"last_step": ends, "method": _method(run)}
  known |= {"chance": shown.get("chance"), "labelled": shown.get("labelled", True)}
  data = config.get("data", {})
  encoder = config.get("encoder", {})
  return {
    "number": number,
    "title": title,
    "workdir": run["workdir"],
    "method": _method(run),
    "encoder": encoder.get("name", "?"),
    "data": data.get("folder") or data.get("name", "?"),
    "split": data.get("split", ""),
    "images": run["images"],
    "in_short": words.in_short(rows, known),
    "look": shown and {**shown, "maps": [_map(shown, x) for x in shown["maps"]], "groups": _groups(shown)[1]},
    "confusions": [_confusion(name, x) for name, x in run["figures"].items() if x.get("confusion")],
    "figures": [(name, _scores(x)) for name, x in run["figures"].items()],
    "skipped": (len(run["skipped"]), run["skipped"][:_NAMED]),
    "config": _flat(config),
    "labelled": known["labelled"],
  }


def _method(run):
  return run["config"].get("method", {}).get("name", "?")


def _curves(titles, runs):
  """The loss and the k-NN accuracy of all runs, each {"title", "drawing", "sentence"}."""
  many = len(runs) > 1
  losses, scores, chances, lines = [], [], [], []
  for i, (title, run) in enumerate(zip(titles, runs, strict=True)):
    rows, shown = run["rows"], run["look"]
    if points := [(row["step"], row["loss"]) for row in rows if "loss" in row]:
      losses.append(drawings.Curve(title if many else "loss", points, i))
    if shown.get("chance") is not None:
      chances.append(drawings.Level("chance", shown["chance"], i if many else None, always=True))
    scored = [row for row in rows if "knn_top1" in row]
    if scored:
      scores.append(drawings.Curve(title if many else "k-NN", [(x["step"], x["knn_top1"]) for x in scored], i))
      first = scored[0]
      loaded = bool(run["config"].get("init_from"))
      lines += [
        drawings.Level(name, first[key], i if many else None)
        for name, key in (
          ("as loaded" if loaded else "untrained", "knn_top1"),
          ("pixels", "pixels_top1"),
          ("centred", "pixels_centred_top1"),
          ("standard.", "pixels_standardised_top1"),
          ("guessing", "guessing_top1"),
        )
        if key in first
      ]
  found = []
  text = "The training loss by step." + (" Chance is the loss of uninformative outputs." if chances else "")
  if len({_method(run) for run in runs}) > 1:  # whose losses are no values of one thing
    for curve in losses:
      found.append((f"Loss of {curve.label}", [curve], [x for x in chances if x.run == curve.run], text))
  elif losses:
    found.append(("Loss", losses, _once(chances), text))
  if scores:
    text = (
      "How many per cent of the test images get the class that their nearest training images have. The dashed lines "
      "are the encoder before its first step, the raw pixels (as they are, centred, standardised) and guessing the "
      "most frequent class."
    )
    found.append(("k-NN accuracy, %", scores, _once(lines), text))
  entries = []
  for title, curves, levels, text in found:
    if far := [x for x in levels if drawings.far_off(x, curves)]:
      text += " Outside of the picture: " + ", ".join(f"{x.label} {x.value:.4g}" for x in far) + "."
    drawing = drawings.chart(curves, levels, f"{title} by step")
    entries.append({"title": title, "drawing": drawing, "sentence": text})
  return entries


def _once(levels):
  """The levels without repetitions: one that several runs share is of all."""
  found: dict[Any, drawings.Level] = {}
  for level in levels:
    key = level.label, round(level.value, 6)
    found[key] = found[key]._replace(run=None) if key in found else level
  return list(found.values())


def _monitors(titles, runs):
  """The monitors of all runs: {"title", "key", "drawing", "said": [(run, value, judged, sentence), ...]}."""
  found = [{m.key: m for m in words.monitors(run["rows"])} for run in runs]
  entries = []
  for key in dict.fromkeys(key for ms in found for key in ms):
    having = [(i, ms[key]) for i, ms in enumerate(found) if key in ms]
    title = having[0][1].title
    curves = [drawings.Curve(titles[i], m.points, i) for i, m in having]
    said = [(i, m.value, m.judged, m.sentence) for i, m in having]
    entries.append(
      {"title": title, "key": key, "drawing": drawings.small_chart(curves, f"{title} by step"), "said": said}
    )
  return entries


def _groups(shown):
  """(the colour of each class number, [(colour, class, count), ...] of the most frequent classes)."""
  labels = np.array(shown["labels"], int)
  if not shown["classes"]:
    return {}, []
  counts = np.bincount(labels[labels >= 0], minlength=len(shown["classes"]))
  most = np.sort(np.argsort(-counts, kind="stable")[:_COLOURED])
  numbers = {int(c): i for i, c in enumerate(most) if counts[c]}
  return numbers, [(i, shown["classes"][c], int(counts[c])) for c, i in numbers.items()]


def _map(shown, entry):
  numbers, _ = _groups(shown)
  groups = [numbers.get(x, -1) for x in shown["labels"]]
  names = [named(shown, i) for i in range(len(shown["names"]))]
  about = f"{entry['title']} of {len(names)} images"
  return entry | {"drawing": drawings.scatter(entry["points"], groups, names, about)}


def named(shown: dict[str, Any], i: int) -> str:
  """What image i of a look is called, with its class."""
  label = shown["labels"][i]
  of = f" ({shown['classes'][label]})" if 0 <= label < len(shown["classes"]) else ""
  return f"{shown['names'][i]}{of}"


def _confusion(name, figures):
  """A confusion matrix for the template: all of it where it has few classes, else its most frequent mistakes.

  `figures` has "confusion", counts [true class][answer], and maybe "classes", their names.
  """
  counts = np.array(figures["confusion"], int)
  classes = [str(x) for x in figures.get("classes", range(len(counts)))]
  totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
  wrong = counts.copy()
  np.fill_diagonal(wrong, 0)
  order = np.argsort(-wrong, axis=None, kind="stable")[:_MATRIX]
  mistakes = [(classes[i // len(counts)], classes[i % len(counts)], int(wrong.flat[i])) for i in order if wrong.flat[i]]
  small = len(counts) <= _MATRIX
  shares = np.round(counts / totals, 2).tolist() if small else []
  return {
    "name": name,
    "classes": classes,
    "counts": counts.tolist() if small else [],
    "shares": shares,
    "mistakes": mistakes,
  }


def _scores(figures):
  """The numbers of an evaluation's JSON as (name, text)."""
  return [
    (key.replace("_", " "), f"{x:.4g}" if isinstance(x, float) else str(x))
    for key, x in figures.items()
    if isinstance(x, int | float | str)
  ]


def _flat(config):
  return [(key, _value(x)) for key, x in configs.flattened(config).items()]


def _value(x):
  return "none" if x is None else x if isinstance(x, str) else json.dumps(x)


def _differences(runs):
  """(key, [value of each run]) where the configs differ."""
  flat = [dict(_flat(run["config"])) for run in runs]
  keys = dict.fromkeys(key for x in flat for key in x)
  rows = [(key, [x.get(key, "-") for x in flat]) for key in keys if key not in configs.FREE + configs.ASIDE]
  return [(key, values) for key, values in rows if len(set(values)) > 1]
