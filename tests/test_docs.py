"""The pages of docs/: links and commands name what exists, tables hold what the code holds, and Sphinx builds them."""

import dataclasses
import functools
import inspect
import pathlib
import re
import runpy
import subprocess
import sys

import optax
import pytest

from ssl_jax import config as configs
from ssl_jax import optim
from ssl_jax.augment import EvaluationView, View
from ssl_jax.models import SETTINGS, resnet, vit

ROOT = pathlib.Path(__file__).parents[1]
DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *DOCS]}
METHODS = [path for path in DOCS if path.parent.name == "methods"]
COMMAND = re.compile(r"\bpython (-m ssl_jax \w+|[\w/]+\.py)([^\n&;|]*)")
WITHOUT_FLAG = {"train.py": "configs/quickstart.py", "finetune.py": "configs/finetune_quickstart.py"}


@functools.cache
def recipe(name):
  """All values of a recipe, by their dotted keys."""
  path, _, version = name.partition(":")
  config = runpy.run_path(str(ROOT / path))["get_config"](*([version] if version else [])).to_dict()
  views = config.pop("views")
  by_view = {f"views[{i}].{key}": x for i, view in enumerate(views) for key, x in view.items()}
  return configs.flattened(config) | by_view | {"number of views": len(views)}


def prose(text):
  return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def tables(text):
  """The tables of a page: headings, and rows of cells, without their backticks."""
  for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
    head, _, *rows = ([cell.strip(" `") for cell in line[1:-1].split(" | ")] for line in block.splitlines())
    yield head, rows


def test_every_link_to_a_file_leads_to_one():
  links = [
    (path, link)
    for path, text in PAGES.items()
    for link in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", prose(text))
    if "://" not in link
  ]
  assert len(links) > 100
  assert not [(path.name, link) for path, link in links if not (path.parent / link).exists()]


def test_every_link_to_a_heading_leads_to_one():
  def anchors(path):
    headings = re.findall(r"^#+ (.*)$", prose(PAGES[path]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

  links = [
    (path, (path.parent / link).resolve() if link else path, anchor)
    for path, text in PAGES.items()
    for link, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", prose(text))
  ]
  assert len(links) > 3 and not [(path.name, anchor) for path, to, anchor in links if anchor not in anchors(to)]


@functools.cache
def flags_of(script):
  """The flags of a script or command: those that it defines, and the modules that it has from commands/ and run/."""
  path = ROOT / "ssl_jax" / "commands" / f"{script.split()[-1]}.py" if script.startswith("-m") else ROOT / script
  text = path.read_text()
  imports = " ".join(re.findall(r"^from ssl_jax\.(?:commands|run)[^(\n]*", text, re.MULTILINE))
  shared = [x for x in (ROOT / "ssl_jax").glob("[cr]*/*.py") if x.stem in re.findall(r"\w+", imports)]
  text = "\n".join([text, *(x.read_text() for x in shared)])
  return set(re.findall(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?([\w-]+)"', text))


def test_every_command_has_scripts_flags_recipes_and_keys_that_exist():
  found = [
    (path.name, *command)
    for path, text in PAGES.items()
    for block in re.findall(r"```(?:bash|yaml)\n(.*?)```", text, re.DOTALL)
    for command in COMMAND.findall(re.sub(r"\\\n\s*|\s# .*", " ", block))
  ]
  assert len(found) > 80
  for where, script, arguments in found:
    allowed, given = flags_of(script), re.findall(r"(?<=--)[\w.\[\]-]+", arguments)
    named = re.findall(r"--config=([\w/.:]+)", arguments) or [WITHOUT_FLAG.get(script)]
    if named[0]:
      keys = [name.removeprefix("config.") for name in given if name.startswith("config.")]
      missing = [key for key in keys if key not in recipe(named[0])]
      assert not missing, (where, script, arguments, missing)
    unknown = [name for name in given if not name.startswith("config.") and name not in allowed]
    assert not unknown, (where, script, arguments, unknown)


def in_cell(value):
  if isinstance(value, tuple) and value and all(isinstance(x, str) for x in value):
    return "`, `".join(value)
  return str(value)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_the_page_of_a_method_has_the_recipes_numbers(path):
  ((_, *columns), rows), *others = [(head, rows) for head, rows in tables(PAGES[path]) if head[0] == "key"]
  assert not others and len(rows) > 20
  file = ""
  for i, column in enumerate(columns, 1):
    file = column.partition(":")[0] or file  # `:v2` is a version of the recipe to its left
    values = recipe(file + column.removeprefix(file))
    wrong = [row for row in rows if row[i] != (in_cell(values[row[0]]) if row[0] in values else "-")]
    assert not wrong, (column, wrong)
    of_sections = {key for key in values if re.match(r"(method|encoder|optimizer|lr)\.", key)} - {"method.name"}
    assert not of_sections - {row[0] for row in rows}, column


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_the_page_of_a_method_names_what_is_in_its_file(path):
  files = re.findall(r"literalinclude\} (\S+)", PAGES[path])
  code = "".join((path.parent / file).read_text() for file in files)
  (rows,) = [rows for head, rows in tables(PAGES[path]) if head[-1] == "here"]
  names = {name for row in rows for name in re.findall(r"`(\w+)`", f"`{row[-1]}`")}
  assert len(names) > 1 and not [name for name in names if name not in code]


def test_the_page_on_defaults_has_all_of_them():
  lars, sgd, adamw = (inspect.signature(f).parameters for f in (optim.lars, optim.sgd, optax.adamw))
  optimizer = {key: x.default for key, x in {**adamw, **sgd, **lars}.items()}
  special = {"weight_decay_end": None, "clip": None, "clip_part": None, "layer_decay": 1.0, "rates": ()}
  keys = {key for table in optim.SETTINGS.values() for key in table} - {"name"}
  wanted = configs.flattened(configs.base().to_dict())
  wanted |= {f"eval_view.{key}": x for key, x in EvaluationView._field_defaults.items()}
  wanted |= {f"optimizer.{key}": (optimizer | special)[key] for key in keys}
  wanted |= {"lr.inclusive": False, "lr.by_epoch": False, "lr.milestones": None}
  wanted |= optim.ParameterRules._field_defaults
  wanted |= {f"view {key}": x for key, x in View._field_defaults.items()}
  for family, module in (("resnet", resnet.ResNet), ("vit", vit.ViT)):
    given = {x.name: x.default for x in dataclasses.fields(module) if x.default is not dataclasses.MISSING}
    wanted |= {f"{family} encoder.{key}": given[key] for key in SETTINGS[family].keys() & given.keys() - {"name"}}
  shown = {}
  for section in re.split(r"^## ", PAGES[ROOT / "docs" / "defaults.md"], flags=re.MULTILINE)[1:]:
    kind = {"Views": "view ", "ResNets": "resnet ", "Vision transformers": "vit "}.get(section.splitlines()[0], "")
    for head, rows in tables(section):
      assert head == ["key", "default", "why"]
      assert all(len(row) == 3 and row[2] for row in rows)  # each has a reason
      shown |= {kind + row[0]: row[1] for row in rows}
  assert shown == {key: in_cell(x) for key, x in wanted.items()}


@pytest.mark.slow
def test_sphinx_builds_the_pages_without_a_warning(tmp_path):
  pytest.importorskip("sphinx", reason="pip install -r requirements-docs.txt")
  command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path / "site")]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0 and (tmp_path / "site" / "index.html").exists(), done.stderr
