"""What the commands share: one-line error messages and hints, flags, the compilation cache."""

import errno
import glob
import inspect
import os
import pathlib
import platform
import re
import runpy
import signal
import sys
from collections.abc import Callable

import jax
import ml_collections
from absl import app, flags, logging

from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.run import cluster, progress

# ml_collections reads "none" into texts only, and a key without a value is called that.
_NONE = re.compile(r"--?config\.([\w.]+)=none", re.IGNORECASE)
_LARGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def say(line: str) -> None:
  """Prints one line on standard output, from the main process only; flushed, so that a log file is up to date."""
  if cluster.is_main():
    progress.keep(line)


def live(text: Callable[[], str]) -> None:
  """Draws the live line, from the main process only, where and when it is time for it (`progress.live`)."""
  if cluster.is_main():
    progress.live(text)


def large_pages_hint() -> str | None:
  """How a CPU run gets huge pages where Linux gives them only on request (madvise); None: it has them, or cannot.

  XLA allocates a step's temporaries again for each step, and the kernel has to clear them first. glibc (2.35 on)
  requests pages of 2 MiB if an environment variable says so when the program starts.
  """
  glibc, version = platform.libc_ver()
  able = glibc == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
  if not able or jax.default_backend() != "cpu" or "glibc.malloc.hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
    return None
  if not _LARGE_PAGES.exists() or "[madvise]" not in _LARGE_PAGES.read_text():
    return None
  return "1.1 to 1.4 times as fast on a CPU with large pages: set GLIBC_TUNABLES=glibc.malloc.hugetlb=1"


def run(main: Callable[[], int], recipe: str | None = None, joins: bool = False) -> None:
  """Runs `main() -> exit status` with its flags parsed.

  A UserError ends in one line and status 1, Ctrl-C in status 130.

  Args:
    main: what the command does.
    recipe: the default of --config.
    joins: whether the command is started on all hosts of a cluster and works on the devices of all of them.
  """
  if joins:
    address = flags.DEFINE_string(
      "coordinator_address", None, "HOST:PORT of process 0, where JAX does not find it itself"
    )
    count = flags.DEFINE_integer("num_processes", None, "how many processes train together")
    number = flags.DEFINE_integer("process_id", None, "which of them this is, from 0 on")
    timeout = flags.DEFINE_integer("connect_timeout", 300, "seconds to wait for all of them", lower_bound=1)

  def wrapped(argv):
    if len(argv) > 1:
      _fail(f"{argv[1]!r} is not a flag: flags are written --name=value, and a config's keys --config.key=value.")
    _quiet_libraries()
    _use_compilation_cache()
    try:
      if joins:
        cluster.connect(address.value, count.value, number.value, timeout.value)
      if glob.glob("/dev/nvidia[0-9]*") and jax.default_backend() == "cpu":
        say('an NVIDIA GPU is here, but JAX sees only the CPU; to use it: pip install -U "jax[cuda13]"')
      with cluster.ending_together(orderly=UserError):
        return main()
    except UserError as error:
      if isinstance(error.__cause__, Exception) and cluster.refusal(error.__cause__):
        cluster.leave(str(error))  # In an orderly exit TensorStore's threads print their tracebacks after all.
      _fail(str(error))
    except KeyboardInterrupt:
      say("interrupted")
      return 128 + signal.SIGINT

  def parse(argv):
    left = _parse(argv, recipe)
    _check_parsed(argv)
    return left

  app.run(wrapped, flags_parser=parse)


def _quiet_libraries():
  """Leaves out what JAX, TFDS and Orbax log at INFO, and Orbax's pages about an error that it raises anyway."""
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)

  def hook(unraisable):  # TensorStore raises it for each read or write that a failed one leaves behind.
    if str(unraisable.exc_value) != "Event loop is closed":
      sys.__unraisablehook__(unraisable)

  sys.unraisablehook = hook


def _use_compilation_cache():
  """Keeps compiled programs between runs; JAX_COMPILATION_CACHE_DIR says where, if it is set."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if caches.startswith("~"):  # a user without a home, as in many containers
      return
    jax.config.update("jax_compilation_cache_dir", f"{caches}/ssl_jax/xla")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _parse(argv, recipe):
  """Parses flags with absl; a mistake is reported in one line."""
  for i, arg in enumerate(argv[:-1]):
    if arg in ("--config", "-config"):  # ml_collections reads `--config FILE`, and then refuses its keys
      argv = [*argv[:i], f"--config={argv[i + 1]}", *argv[i + 2 :]]
      break
  given = [arg.partition("=")[2] for arg in argv if re.match(r"--?config=", arg)]
  if recipe and not given:
    given, argv = [recipe], [argv[0], f"--config={recipe}", *argv[1:]]
  if empty := next((match[1] for arg in argv if (match := re.fullmatch(r"--?(\w+)=", arg))), None):
    _fail(f"--{empty} is empty: is a variable of the shell not set?")
  file = given[-1].partition(":")[0] if given else ""
  if file and not pathlib.Path(file).is_file():
    _fail(f"there is no config file {file!r}.")
  if file and not os.access(file, os.R_OK):
    _fail(f"{file}: {os.strerror(errno.EACCES)}")
  try:
    return flags.FLAGS([arg for arg in argv if not _NONE.fullmatch(arg)])
  except (AttributeError, KeyError) as error:  # ml_collections: a key that the config does not have
    if file:
      config = _recipe(given[-1])
      keys = [match[1] for arg in argv if (match := re.match(r"--?config\.([\w.]+)", arg))]
      for key in keys:
        if not configs.has_key(config, key):
          _fail(f"there is no config key {key!r}; did you mean {configs.nearest_key(config, key)!r}?")
    raise error
  except (flags.Error, TypeError, ValueError) as error:
    if "Error whilst parsing config file" in str(error):  # ml_collections' text, with the traceback inside
      _recipe(given[-1])
    if not given and any(re.match(r"--?config\.", arg) for arg in argv):
      _fail("keys of a config need one: --config=FILE")
    if wrong := next((arg for arg in argv if re.match(r"--?config\.[\w.]*\.\d", arg)), None):
      _fail(f"{wrong}: the parts of a list are numbered in brackets, as --config.views[0].size=28.")
    _fail(str(error))


def _check_parsed(argv):
  """Takes the values of keys that are to be none, and ends with a line where flags were parsed not as meant."""
  for name in flags.FLAGS:
    value = flags.FLAGS[name].value
    if isinstance(value, str) and value.startswith("--"):
      _fail(f"--{name} has no value, but {value} behind it: is a variable of the shell not set?")
  config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  given = [arg.partition("=")[2] for arg in argv if re.match(r"--?config=", arg)]
  if given and not isinstance(config, ml_collections.ConfigDict):
    config = _recipe(given[-1])
  for found in filter(None, map(_NONE.fullmatch, argv)):
    with config.ignore_type():
      config.update_from_flattened_dict({found[1]: None})
  views = (config and config.get("views")) or ()
  if any(re.match(r"--?config\.views\[", arg) for arg in argv) and len({id(x) for x in views}) < len(views):
    file = given[-1] if given else "the recipe"
    _fail(f"{file} has one dict as several views, and a key of one would change all: see config.copies.")


def _recipe(given):
  """The config of FILE or FILE:VERSION. What is no recipe ends in a line, and a bug in one in its own traceback."""
  file, _, version = given.partition(":")
  get_config = runpy.run_path(file).get("get_config")
  if get_config is None:
    _fail(f"{file} has no function get_config, so it is no recipe.")
  if version and not inspect.signature(get_config).parameters:
    _fail(f"{file} has no versions, got {version!r}.")
  try:
    config = get_config(*([version] if version else []))
  except UserError as error:
    _fail(str(error))
  if not isinstance(config, ml_collections.ConfigDict):
    _fail(f"{file}: get_config must return an ml_collections.ConfigDict, got {config!r}.")
  return config


def _fail(text):
  first, *others = (" ".join(line.split()) for line in text.splitlines() if line.strip())
  sys.exit("\n  ".join([f"{pathlib.Path(sys.argv[0]).name}: error: {first}", *others]))
