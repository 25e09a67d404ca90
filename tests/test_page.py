"""report.html: what it tells, that it loads nothing, that everybody can read it, and that a run never ends for it."""

import contextlib
import gzip
import html
import html.parser
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from runs import ROOT, assert_same_run, finish, rows, start
from ssl_jax.commands import report
from ssl_jax.methods.dino import DINOPictures
from ssl_jax.methods.mae import MAEPictures
from ssl_jax.page import drawings, look, pages, words
from ssl_jax.run import profile

NASTY = '</script><img src=x onerror="alert(1)">&\udcff'
SOURCE = (ROOT / "ssl_jax" / "page" / "page.html").read_text()
HEALTHY = dict(feature_std=0.97, effective_rank=31.0, alignment=0.4, uniformity=-3.1, grad_norm=2.0, input_share=0.01)


def gallery(n=30, classes=("cat", "dog"), side=16, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, len(classes), n).astype(np.int32) if classes else np.full(n, -1, np.int32)
  pixels = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
  images = look.Cut(images=pixels, labels=labels, num_classes=len(classes), name="pets", split="test")
  return look.Gallery(images, [f"{i}.png" for i in range(n)], list(classes), ("pets", "test", 10 * n))


def looked_at(seen, step=20, views=2, drawn=None):
  """A look without a run: its features are random."""
  features = np.random.default_rng(1).normal(size=(len(seen.names), 8)).astype(np.float32)
  pixels = seen.images.images[:6] / 255
  run = dict(described=["batch 64"], last_step=20, chance=4.8, labelled=bool(seen.classes), command=None)
  drawn_views = look.grid([("as it is", pixels), *((f"view {i}: 16 px\ncrop", pixels) for i in range(views))])
  found = look.take(features, seen, step, drawn, thorough=False)
  still = dict(name="pets", split="test", count=seen.of[2], names=seen.names, labels=seen.images.labels.tolist())
  still |= dict(classes=seen.classes, sheet=look.sheet(seen.images.images), views=drawn_views, format=look.FORMAT)
  return found | still | run | {"environment": {"jax": "0.10.2"}}


def workdir(path, seen=None, table=(), **config):
  path.mkdir()
  settings = {"method": {"name": "simclr"}, "encoder": {"name": "resnet"}, "data": {"name": "pets", "split": "train"}}
  (path / "config.json").write_text(json.dumps(settings | config))
  (path / "resolved.json").write_text('{"images": 512, "steps": 20}')
  (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
  if seen:
    (path / "report.json").write_text(json.dumps(looked_at(seen)))
  return path


def trained(top1=75.0, loss=3.0):
  scores = [{"step": 0, "knn_top1": 60.0, "pixels_top1": 70.0, "guessing_top1": 10.0}, {"step": 20, "knn_top1": top1}]
  return [{"step": i, "loss": loss + 1 / i, **HEALTHY} for i in (10, 20)] + scores


class Read(html.parser.HTMLParser):
  """The text of a page, its elements, and what it would load."""

  def __init__(self, text):
    super().__init__()
    self.text, self.tags, self.loads, self.open = "", [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.text += " "
    self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
    self.open += [tag] if tag in ("script", "style") else []

  def handle_endtag(self, tag):
    self.open = self.open[:-1] if self.open and self.open[-1] == tag else self.open

  def handle_data(self, data):
    self.text += "" if self.open else data


def told(text):
  return " ".join(Read(text).text.replace("\u00a0", " ").split())


def test_a_runs_page_tells_what_it_is_and_what_it_is_worth(unbroken):
  folder, out = unbroken
  text = (folder / "report.html").read_text()
  said = told(text)
  assert f"wrote {folder / 'report.html'}" in out
  last = rows(folder)[-1]
  for part in (
    "simclr with resnet, trained on 512 images of fashion_mnist_mini",
    "The run is complete: 20 steps.",
    f"{last['knn_top1']:.2f} % of the test images get the class",
    "chance 4.844",
    "untrained",
    "guessing",
    "Among 200 of the 200 images of fashion_mnist_mini (test[:200]), after step 20.",
    "Ankle boot",
    "view 2: 28 px crop 0.5-1 of the area flip 50 %",
    "effective_rank",
    f"python eval_knn.py --workdir={folder}",
    "method.projector.features",
    "jaxlib",
  ):
    assert part in said, part
  maps = json.loads((folder / "report.json").read_text())["maps"]
  assert text.count('class="point c') == 200 * len(maps) and text.count('<div><span class="thumb sheet0 asked"') == 12
  points = np.array(maps[0]["points"])
  assert points.min() >= 0 and points.max() == 1 and np.ptp(points, axis=0).min() > 0.2
  assert len(text) < 600_000


@pytest.mark.slow
def test_neither_a_page_nor_a_profile_changes_a_number_of_a_run(unbroken, cache, tmp_path):
  workdir = tmp_path / "run"
  out = finish(start(cache, "train.py", workdir, report=False, profile_steps="10,11"))
  assert not (workdir / "report.html").exists()
  assert_same_run(workdir, unbroken[0])
  assert "wrote a profile of steps 10 to 11" in out
  (folder,) = (workdir / "tensorboard" / "plugins" / "profile").iterdir()  # where TensorBoard looks
  assert list(folder.glob("*.xplane.pb"))
  events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
  assert len(events) > 100


@pytest.mark.parametrize("start, told_of", [(0, False), (9, False), (10, True)])
def test_a_profile_that_no_step_of_a_run_begins_is_told(tmp_path, capsys, start, told_of):
  profile.Profile(tmp_path, (10, 20), start, 12)
  assert ("no profile will be written: profile_steps=10,20" in capsys.readouterr().out) == told_of
  profile.Profile(tmp_path, None, start, 12)
  profile.Profile(tmp_path, (13, 20), start, 12)
  assert capsys.readouterr().out.count(f"begins at step 13, and training goes from step {start + 1} to 12\n") == 1


@pytest.mark.parametrize("runs", [1, 4])
def test_the_largest_page_loads_nothing_and_is_small(tmp_path, runs):
  seen = gallery(look.IMAGES, tuple(f"class {i}" for i in range(300)), side=96)  # noise, which no JPEG makes small
  drawn = MAEPictures(*(np.random.default_rng(i).uniform(size=(8, 96, 96, 3)) for i in range(3)))
  shown = looked_at(seen, views=10, drawn=drawn)
  table = [{"step": i + 1, "loss": 3.0, **HEALTHY} for i in range(3000)] + trained()
  for i in range(runs):
    (workdir(tmp_path / f"{i}", None, table, seed=i) / "report.json").write_text(json.dumps(shown))
  pages.write_page([tmp_path / f"{i}" for i in range(runs)], tmp_path / "page.html")
  text = (tmp_path / "page.html").read_text()
  assert len(text) < pages.MOST_BYTES
  found = Read(text)
  assert found.loads and all(x.startswith("data:") for x in found.loads)
  assert not re.search(r"url\((?!data:)|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
  assert not {"iframe", "object", "embed", "base", "form", "audio", "video"} & set(found.tags)
  assert "default-src 'none'" in text and "http" not in re.sub(r"http-equiv", "", text)


def test_names_are_text_wherever_they_stand(tmp_path):
  seen = gallery(6, (NASTY, "b"))
  seen = seen._replace(names=[f"{NASTY}{i}" for i in range(6)], of=(NASTY, NASTY, 6))
  folder = workdir(tmp_path / "run", seen, trained(), method={"name": NASTY}, data={"folder": NASTY, "split": NASTY})
  (folder / "skipped.txt").write_bytes(f"{NASTY}\n".encode("utf-8", "surrogateescape"))
  (folder / "linear.json").write_text(
    json.dumps({"note": NASTY, "confusion": [[1, 2], [3, 4]], "classes": [NASTY, "b"]})
  )
  pages.write_page([folder], tmp_path / "page.html")
  text = (tmp_path / "page.html").read_text(encoding="utf-8")
  found = Read(text)
  assert "x" not in found.loads and found.tags.count("script") == 1 and "onerror" not in found.tags
  assert found.text.count('<img src=x onerror="alert(1)">') >= 6
  script = text[text.index("<script>") :]
  assert script.count("</script>") == 1 and "<img" not in script


def test_a_page_is_made_of_whatever_there_is(tmp_path):
  nothing = workdir(tmp_path / "nothing")
  killed = workdir(tmp_path / "killed", gallery(), trained()[:1])
  with (killed / "metrics.jsonl").open("a") as file:
    file.write('{"step": 12, "lo')
  single = workdir(tmp_path / "single", gallery(1, ()), trained()[:2])
  alike = gallery(5, ())
  alike.images.images[:] = 7
  same = workdir(tmp_path / "same", alike)
  old = workdir(tmp_path / "old", gallery(), trained())
  (old / "report.json").write_text('{"format": 0}')
  for folder, wanted, unwanted in (
    (nothing, ["Nothing is trained yet", "No evaluation has been written yet"], ["A map of the images", "How it went"]),
    (killed, ["Step 10 of 20 is the last that was written", "the same command goes on"], ["is complete"]),
    (
      single,
      ["There are no labels to score the encoder by", "A single image has no neighbours"],
      ["dashed frame", "Colours are"],
    ),
    (same, ["Among 5 of the 50 images"], ["has the same class"]),
    (old, ["The run is complete"], ["A map of the images"]),
  ):
    pages.write_page([folder], folder / "report.html")
    said = told((folder / "report.html").read_text())
    assert all(x in said for x in wanted) and not any(x in said for x in unwanted), (folder.name, said[:2000])


def test_runs_stand_side_by_side_with_what_differs(tmp_path):
  a = workdir(tmp_path / "a", gallery(), trained(75), lr={"base": 0.1}, seed=0, log_every_steps=1)
  b = workdir(tmp_path / "b", gallery(seed=1), trained(82), lr={"base": 0.2}, seed=0, log_every_steps=2)
  assert report.main([str(a), str(b), f"--out={tmp_path / 'both.html'}"]) == 0
  text = (tmp_path / "both.html").read_text()
  said = told(text)
  assert "1 key" in said and "lr.base 0.1 0.2" in said and "seed" not in said[: said.index("How it went")]
  assert "a 75" in said and "b 82" in said and "untrained 60" in said
  assert text.count('class="curve run1"') == 2 + len(words.monitors(trained()))
  assert ".sheet1 { background-image: url(data:" in text and 'data-run="1"' in text


@pytest.mark.parametrize(
  "arguments, problem",
  [
    (["none"], "is not a run"),
    (["a", "a"], "name the page of several runs"),
    (["a"] * 5, "at most 4 runs"),
    (["damaged"], "report.json is damaged"),
  ],
)
def test_mistakes_of_the_command_are_a_line(tmp_path, monkeypatch, capsys, arguments, problem):
  monkeypatch.chdir(tmp_path)
  workdir(tmp_path / "a", gallery(), trained())
  (workdir(tmp_path / "damaged") / "report.json").write_text("{")
  assert report.main(arguments) == 1
  assert problem in capsys.readouterr().err


def test_damaged_figures_of_an_evaluation_are_told_once_and_left_out(tmp_path, capsys):
  folder = workdir(tmp_path / "run", gallery(), trained())
  (folder / "linear.json").write_text('{"top1": 61.25}')
  (folder / "knn.json").write_text('{"top1": 7')
  assert report.main([str(folder)]) == 0
  told_of = f"{folder / 'knn.json'} is damaged and left out: delete it, or evaluate again\n"
  assert capsys.readouterr().out.count(told_of) == 1
  said = told((folder / "report.html").read_text())
  assert "linear.json" in said and "61.25" in said and "knn.json" not in said


def test_the_command_looks_at_the_newest_checkpoint_where_there_is_no_look(unbroken, tmp_path, capsys):
  folder = shutil.copytree(unbroken[0], tmp_path / "run")
  then = json.loads((folder / "report.json").read_text())
  (folder / "report.json").unlink()
  (folder / "linear.json").write_text(json.dumps({"top1": 71.5, "confusion": [[9, 1], [2, 8]], "classes": ["x", "y"]}))
  assert report.main([str(folder)]) == 0
  now = json.loads((folder / "report.json").read_text())
  assert now["names"] == then["names"] and now["sheet"] == then["sheet"] and now["step"] == 20
  np.testing.assert_allclose(now["maps"][0]["points"], then["maps"][0]["points"], atol=0.02)
  said = told((folder / "report.html").read_text())
  assert "Which classes linear confuses" in said and "top1 71.5" in said and "x 9 1 y 2 8" in said


def test_the_commands_of_the_page_about_it_run(unbroken, tmp_path, monkeypatch, capsys):
  shutil.copytree(unbroken[0], tmp_path / "runs" / "quickstart")
  shutil.copytree(unbroken[0], tmp_path / "runs" / "other")
  monkeypatch.chdir(tmp_path)
  commands = re.findall(r"^python -m ssl_jax report (.*)$", (ROOT / "docs" / "report.md").read_text(), re.MULTILINE)
  assert len(commands) == 2
  for command in commands:
    assert report.main(shlex.split(command)) == 0
  assert "wrote both.html" in capsys.readouterr().out and "quickstart and other" in told(
    (tmp_path / "both.html").read_text()
  )


class Broken:
  """A run whose features cannot be had."""

  config = types.MappingProxyType({"report": True})
  test_set, last_step = None, 9

  @property
  def train_set(self):
    raise OSError("the disk is gone")


def test_whatever_a_page_fails_of_is_a_line(tmp_path, monkeypatch, capsys):
  page = pages.Pages(Broken(), tmp_path, None)
  page.write(None, 0)
  assert "is not written (OSError: the disk is gone); the run goes on without it" in capsys.readouterr().out
  page.seen = gallery()
  page.write(None, 0)  # it has no extractor
  assert "AttributeError" in capsys.readouterr().out
  monkeypatch.setattr(look, "features", lambda *_: np.full((30, 8), np.nan, np.float32))
  page.write(None, 0)
  assert "ValueError" in capsys.readouterr().out
  page.end()
  assert "is not a run" in capsys.readouterr().out
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "change, key, judged, sentence",
  [
    ({}, "feature_std", "good", "spread out"),
    ({"feature_std": 0.05}, "feature_std", "bad", "have collapsed"),
    ({"feature_std": 0.2}, "feature_std", "watch", "close together"),
    ({"feature_std": 0.05, "alignment": None}, "feature_std", "plain", "cannot collapse"),
    ({"effective_rank": 1.05}, "effective_rank", "bad", "on a line"),
    ({"effective_rank": 10.0}, "effective_rank", "watch", "it was 31.0"),
    ({"effective_rank": 1.4}, "effective_rank", "watch", "near a line"),
    ({"alignment": 1.9}, "alignment", "watch", "still far"),
    ({"marginal_entropy": 0.05}, "marginal_entropy", "bad", "few prototypes"),
    ({"marginal_entropy": 0.9}, "marginal_entropy", "good", "90 %"),
    ({"teacher_entropy": 0.999}, "teacher_entropy", "bad", "uniform"),
    ({"queue_filled": 0.5}, "queue_filled", "plain", "50 % of the queue"),
    ({"grad_norm": 50.0}, "grad_norm", "watch", "Far above"),
    ({"input_share": 0.4}, "input_share", "watch", "40 % of the time"),
    ({"my_metric": 3.0}, "my_metric", "plain", "Logged by the method"),
  ],
)
def test_a_monitor_says_what_it_shows_now(change, key, judged, sentence):
  table = [{"step": i, "loss": 3.0, **HEALTHY} for i in (10, 20, 30)]
  table = [row | ({"effective_rank": 1.9} if change.get("effective_rank") == 1.4 else {}) for row in table]
  table[-1] = {name: x for name, x in (table[-1] | change).items() if x is not None}
  found = {m.key: m for m in words.monitors(table)}[key]
  assert found.judged == judged and sentence in found.sentence.replace("\u00a0", " ")
  bad = [text for kind, text in words.in_short(table, {}) if kind == "bad"]
  assert bool(bad) == (judged == "bad")


def test_every_monitor_of_every_method_has_words():
  metrics = "\n".join(path.read_text() for path in (ROOT / "ssl_jax" / "methods").glob("*.py"))
  logged = {*re.findall(r'^      "(\w+)": ', metrics, re.MULTILINE), "invariance", "sigreg", *HEALTHY} - {"loss"}
  assert len(logged) > 8 and logged <= set(words._SAID)


@pytest.mark.parametrize(
  "top1, method, judged, text",
  [
    (75.0, "simclr", "good", "above all of these"),
    (65.0, "simclr", "watch", "the pixels alone still do better"),
    (65.0, "mae", "plain", "eval_linear.py shows more"),
    (55.0, "mae", "watch", "has not raised it"),
    (9.0, "simclr", "watch", "no more than by guessing"),
  ],
)
def test_an_accuracy_is_judged_by_what_stands_beside_it(top1, method, judged, text):
  told = words.in_short(trained(top1), dict(last_step=20, chance=4.8, labelled=True, method=method))
  assert told[-1][0] == judged and text in told[-1][1]


def test_curves_are_where_their_numbers_are():
  points = [(step, 100.0 - step) for step in range(0, 101, 10)]
  drawn = drawings.chart([drawings.Curve("loss", points, 0)], [drawings.Level("chance", 50.0, None)], "loss")
  placed = [tuple(map(float, x.split(","))) for x in re.search(r'curve run0" points="([^"]*)', drawn)[1].split()]
  assert len(placed) == 11 and all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(placed))
  level = float(re.search(r'class="level"[^>]* y1="([\d.]+)', drawn)[1])
  assert level == pytest.approx(placed[5][1], abs=0.1)
  assert "far" not in drawings.chart([drawings.Curve("loss", points, 0)], [drawings.Level("far", 1e4, None)], "loss")
  assert len(drawings.thinned([(i, i) for i in range(10_000)])) == 200
  heights = [float(y) for y in re.findall(r'<text class="[^"]*" x="305" y="([\d.]+)"', str(_crowded()))]
  assert len(heights) == 6 and min(np.diff(sorted(heights))) >= 15.9


def _crowded():
  levels = [drawings.Level(f"level {i}", 50 + i / 10, None) for i in range(5)]
  return drawings.chart([drawings.Curve("k-NN", [(0, 0.0), (9, 50.0)], 0)], levels, "k-NN")


def test_a_methods_pictures_stand_under_their_names_and_maps_over_the_image():
  image = np.random.default_rng(0).uniform(size=(2, 8, 8, 1))
  flat, ramp = np.zeros((2, 8, 8)), np.arange(128.0).reshape(2, 8, 8)
  columns = look.pictured(DINOPictures(image, (flat, ramp)))
  assert [name for name, _ in columns] == ["original", "attention 1", "attention 2"]
  dark, bright = columns[2][1][0][0, 0], columns[2][1][0][7, 7]  # of a map of any scale the least and the most
  np.testing.assert_allclose(dark, 0.3 * image[0, 0, 0, 0] + 0.7 * np.array([0.001462, 0.000466, 0.013866]), atol=1e-5)
  np.testing.assert_allclose(
    bright, 0.3 * image[0, 7, 7, 0] + 0.7 * np.array([0.988362, 0.998364, 0.644924]), atol=1e-5
  )
  drawn = look.grid(columns)
  assert drawn["headings"] == [name for name, _ in columns] and drawn["small"]
  assert len(drawn["rows"]) == 2 and all(len(row) == 3 for row in drawn["rows"])
  assert look.pictured(None) is None


def test_neighbours_are_the_nearest_by_cosine_and_never_the_image_itself():
  angles = np.deg2rad([0, 10, 25, 180, 200, 260])
  unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  found = look.neighbours(unit, np.array([0, 0, 1, 1, 1, -1]))
  assert [[i, [j for j, _ in near][:2]] for i, near in found["neighbours"]][:4] == [
    *([0, [1, 2]], [1, [0, 2]]),
    *([2, [1, 0]], [3, [4, 5]]),
  ]
  assert found["agreement"] == pytest.approx(4 / 5)  # of those that have a class; the third's nearest is of another


def test_the_map_is_that_of_the_principal_components():
  x = np.random.default_rng(0).normal(size=(40, 5)) * [5, 3, 1, 0.1, 0.1]
  (found,) = look.maps(x.astype(np.float32), thorough=False)
  _, _, axes = np.linalg.svd(x - x.mean(axis=0))
  want, got = (x - x.mean(axis=0)) @ axes[:2].T, np.array(found["points"])
  for i in (0, 1):
    assert abs(np.corrcoef(got[:, i], want[:, i])[0, 1]) > 0.999
  assert np.ptp(got[:, 0]) == pytest.approx(1, abs=2e-3) and np.ptp(got[:, 1]) < 1  # one scale for both axes


def test_tsne_is_drawn_at_the_end_where_it_is_installed(monkeypatch):
  unit = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
  monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
  assert [x["title"] for x in look.maps(unit, thorough=True)] == ["PCA"]
  for name in ("sklearn", "sklearn.manifold", "threadpoolctl"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  asked = []
  fit = lambda **settings: types.SimpleNamespace(fit_transform=lambda x: asked.append((settings, x.shape)) or x[:, :2])  # noqa: E731
  monkeypatch.setattr(sys.modules["sklearn.manifold"], "TSNE", fit, raising=False)
  monkeypatch.setattr(sys.modules["threadpoolctl"], "threadpool_limits", contextlib.nullcontext, raising=False)
  assert [x["title"] for x in look.maps(unit, thorough=False)] == ["PCA"] and not asked
  assert [x["title"] for x in look.maps(unit, thorough=True)] == ["PCA", "t-SNE"]
  assert asked == [(dict(perplexity=19 / 3, init="pca", random_state=0), (20, 20))]


def luminance(colour):
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
  low, high = sorted(map(luminance, (a, b)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read_as_wcag_aa_asks(dark):
  sets = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", SOURCE, re.DOTALL)]
  assert len(sets) == 2 and sets[0].keys() == sets[1].keys()
  colours = sets[dark]
  for ground in ("ground", "raised"):
    for name in ("ink", "quiet", "link", "good", "watch", "bad", *(f"run{i}" for i in range(4))):
      assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)  # text
    for i in range(10):
      assert contrast(colours[f"c{i}"], colours[ground]) >= 3, (i, ground)  # what is drawn
  for name in ("run0", "bad"):  # the fullest cell of a confusion matrix, 45 % of it
    mixed = [[int(colours[x][i : i + 2], 16) for i in (1, 3, 5)] for x in (name, "ground")]
    cell = "#" + "".join(f"{round(0.45 * a + 0.55 * b):02x}" for a, b in zip(*mixed, strict=True))
    assert contrast(colours["ink"], cell) >= 4.5, name


PROBE = """
<script>
{
  const map = document.querySelector('.map'), box = map.querySelector('.point').getBoundingClientRect();
  const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true};
  const said = {wide: document.documentElement.scrollWidth - innerWidth, width: innerWidth};
  said.dark = matchMedia('(prefers-color-scheme: dark)').matches;
  map.dispatchEvent(new PointerEvent('pointermove', at));
  said.tip = tip.hidden ? null : tip.textContent;
  document.querySelector('.legend button').click();
  said.chosen = document.querySelectorAll('.chosen').length;
  const sizes = [...document.querySelectorAll('p, li, td, th, figcaption, summary, svg.chart text')].map(x =>
    parseFloat(getComputedStyle(x).fontSize) * (x.ownerSVGElement ? x.ownerSVGElement.clientWidth / 420 : 1));
  said.smallest = Math.min(...sizes);
  parent.postMessage(JSON.stringify(said), '*');
}
</script>
"""
FRAME = """<!doctype html><script>onmessage = e => document.documentElement.dataset.said = e.data;</script>
<iframe src="probed.html" width="{width}" height="900"></iframe>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_an_error_or_a_request(tmp_path, width, dark):
  chromium = shutil.which("chromium") or shutil.which("chromium-browser")
  if not chromium:
    pytest.skip("there is no Chromium")
  seen = gallery()
  pages.write_page([workdir(tmp_path / "run", seen, trained())], tmp_path / "page.html")
  text = (tmp_path / "page.html").read_text()
  (tmp_path / "probed.html").write_text(text.replace("</body>", PROBE + "</body>"))
  (tmp_path / "frame.html").write_text(FRAME.format(width=width))  # a window is never as narrow as a phone
  flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--enable-logging=stderr"]
  flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}", "--no-first-run"]
  flags += ["--virtual-time-budget=5000", "--dump-dom", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
  command = [chromium, *flags, f"file://{tmp_path / 'frame.html'}"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert "CONSOLE" not in done.stderr, done.stderr
  said = json.loads(html.unescape(re.search(r'data-said="([^"]*)"', done.stdout)[1]))
  assert said["width"] == width and said["wide"] <= 0 and said["dark"] == dark  # nothing sticks out to the side
  assert said["tip"] == f"0.png ({seen.classes[seen.images.labels[0]]})"
  assert said["chosen"] == np.sum(seen.images.labels == 0) and said["smallest"] >= 11
  loaded = re.findall(r'"url":"(\w+):[^"]*(?:page|probed)', (tmp_path / "net.json").read_text())
  assert set(loaded) <= {"file"}
