"""The commands of the package, and the hint at what a CPU run lacks."""

import re
import subprocess
import sys

import pytest
from absl.testing import flagsaver

from runs import ROOT
from ssl_jax import __main__, data
from ssl_jax.data import dataset
from ssl_jax.errors import UserError
from ssl_jax.run import cli


@pytest.mark.parametrize(
  "pages, tunables, libc, hinted",
  [
    ("always [madvise] never", "", ("glibc", "2.36"), True),
    ("always [madvise] never", "glibc.malloc.check=1", ("glibc", "2.36"), True),
    ("always [madvise] never", "glibc.malloc.hugetlb=1", ("glibc", "2.36"), False),  # taken already
    ("[always] madvise never", "", ("glibc", "2.36"), False),  # had anyway
    ("always madvise [never]", "", ("glibc", "2.36"), False),  # not to be had
    (None, "", ("glibc", "2.36"), False),
    ("always [madvise] never", "", ("glibc", "2.31"), False),  # cannot ask
    ("always [madvise] never", "", ("", ""), False),  # another C library
  ],
)
def test_large_pages_are_hinted_at_where_they_can_be_had(monkeypatch, tmp_path, pages, tunables, libc, hinted):
  file = tmp_path / "enabled"
  if pages:
    file.write_text(pages)
  monkeypatch.setattr(cli, "_LARGE_PAGES", file)
  monkeypatch.setattr(cli.platform, "libc_ver", lambda: libc)
  monkeypatch.setenv("GLIBC_TUNABLES", tunables)
  hint = cli.large_pages_hint()
  assert bool(hint) == hinted
  if hinted:
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in hint
    monkeypatch.setattr(cli.jax, "default_backend", lambda: "gpu")
    assert not cli.large_pages_hint()  # whose steps do not use this memory


def test_the_package_lists_its_commands_and_refuses_others(monkeypatch, capsys):
  for arguments in ([], ["--help"]):
    monkeypatch.setattr(sys, "argv", ["ssl_jax", *arguments])
    assert __main__.main() == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in __main__.COMMANDS)
  monkeypatch.setattr(sys, "argv", ["ssl_jax", "shwo"])
  assert __main__.main() == 2
  assert "there is no command 'shwo'; there are check, prepare, show" in capsys.readouterr().err


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_every_command_explains_itself(name):
  done = subprocess.run([sys.executable, "-m", "ssl_jax", name, "--help"], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert f"python -m ssl_jax {name}" in done.stdout and len(done.stdout.splitlines()) < 40


def test_a_bug_in_a_config_file_keeps_its_traceback(tmp_path):
  (tmp_path / "mine.py").write_text("def get_config():\n  return dict() + 1  # a bug\n")
  command = [sys.executable, str(ROOT / "train.py"), f"--config={tmp_path / 'mine.py'}"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 1 and "mine.py" in done.stderr and "# a bug\n" in done.stderr
  assert done.stderr.splitlines()[-1].startswith("TypeError: unsupported operand")


@pytest.mark.parametrize("word", ["seed=7", "lr.base=1", "false"])
def test_words_that_are_no_flags_are_refused_with_the_right_spelling(monkeypatch, capsys, word):
  monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: main(["train.py", word]))
  with pytest.raises(SystemExit, match=rf"error: '{word}' is not a flag: flags are written --name=value"):
    cli.run(lambda: 0)


@pytest.mark.parametrize(
  "script, flag", [("train.py", "--workdir="), ("eval_knn.py", "--folder="), ("eval_knn.py", "--data=")]
)
def test_an_empty_flag_is_refused(capsys, script, flag):
  with pytest.raises(SystemExit, match=rf"error: {flag[:-1]} is empty: is a variable of the shell not set"):
    cli._parse([script, flag], None)


def test_a_flag_without_its_value_takes_none_of_the_next(capsys):
  told = re.escape("--log_dir has no value, but --config.steps=3 behind it: is a variable")
  with flagsaver.flagsaver(log_dir="--config.steps=3"), pytest.raises(SystemExit, match=told):
    cli._check_parsed([])
  with pytest.raises(SystemExit, match="keys of a config need one"):
    cli._parse(["show", "--config.data.folder=D"], None)


@pytest.mark.parametrize(
  "flags, told",
  [
    (["--config.steps=none", "--config.epochs=None"], "epochs must be a whole number, at least 1, got None."),
    (["--config.stepz=none"], "there is no config key 'stepz'; did you mean 'steps'?"),
    (["--config.views.0.size=20"], "the parts of a list are numbered in brackets, as --config.views[0].size=28."),
  ],
)
def test_a_key_may_be_none_and_parts_of_a_list_have_brackets(tmp_path, flags, told):
  command = [sys.executable, str(ROOT / "train.py"), f"--workdir={tmp_path / 'run'}", *flags]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(told), done.stderr


@pytest.mark.parametrize(
  "text, version, told",
  [
    ("", "", "has no function get_config, so it is no recipe"),
    ("def get_config():\n  pass\n", "", "get_config must return an ml_collections.ConfigDict, got None"),
    ("def get_config():\n  pass\n", ":v2", "has no versions, got 'v2'"),
    (None, ":v7", "configs/simclr_imagenet.py knows v1 and v2, got 'v7'"),
  ],
)
def test_what_is_no_recipe_is_told_in_a_line(tmp_path, text, version, told):
  file = ROOT / "configs" / "simclr_imagenet.py" if text is None else tmp_path / "mine.py"
  if text is not None:
    file.write_text(text)
  with pytest.raises(SystemExit, match=re.escape(told)):
    cli._recipe(f"{file}{version}")


def test_a_recipe_that_may_not_be_read_is_told(monkeypatch):
  monkeypatch.setattr(cli.os, "access", lambda path, mode: False)
  with pytest.raises(SystemExit, match=r"error: .*quickstart.py: Permission denied"):
    cli._parse(["train.py", f"--config={ROOT / 'configs' / 'quickstart.py'}"], None)


def test_a_config_file_may_stand_apart_from_its_flag(monkeypatch):
  monkeypatch.setattr(cli.flags, "FLAGS", list)
  file = str(ROOT / "configs" / "quickstart.py")
  got = cli._parse(["train.py", "--config", file, "--config.seed=1"], None)
  assert got == ["train.py", f"--config={file}", "--config.seed=1"]


def test_a_key_of_one_view_is_refused_where_it_would_change_others(tmp_path):
  (tmp_path / "mine.py").write_text(
    f"import sys\nsys.path.insert(0, {str(ROOT / 'configs')!r})\nimport quickstart\n\n\ndef get_config():\n"
    "  config = quickstart.get_config()\n  config.views = 2 * (dict(config.views[0]),)\n  return config\n"
  )
  command = [sys.executable, str(ROOT / "train.py"), f"--config={tmp_path / 'mine.py'}", "--config.views[0].size=20"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
  assert "mine.py has one dict as several views, and a key of one would change all" in done.stderr


def test_a_user_without_a_home_has_no_cache_and_no_traceback(monkeypatch):
  seen = []
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(cli.jax.config, "update", lambda *given: seen.append(given))
  monkeypatch.setattr(cli.os.path, "expanduser", lambda path: path)
  cli._use_compilation_cache()
  assert not seen
  with pytest.raises(UserError, match="there is no folder ~/pictures"):
    data.load_folder("~/pictures", "train")
  monkeypatch.setattr(cli.os.path, "expanduser", lambda path: path.replace("~", "/home/me"))
  cli._use_compilation_cache()
  assert seen[0] == ("jax_compilation_cache_dir", "/home/me/.cache/ssl_jax/xla")


def test_threads_are_those_that_the_process_may_use(monkeypatch):
  monkeypatch.setattr(dataset.os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
  monkeypatch.setattr(dataset.os, "cpu_count", lambda: 128)
  assert dataset.Reading().thread_count == 3 and dataset.Reading(threads=9).thread_count == 9
