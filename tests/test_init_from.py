"""A run starts from weights: every encoder of the method gets them, and a run of the same method gives all it has."""

import json
import pathlib
import runpy
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from test_train import small_config

import train
from ssl_jax import build, optim, restore, training
from ssl_jax import config as configs
from ssl_jax.commands import labelled
from ssl_jax.errors import UserError
from ssl_jax.models import vit
from ssl_jax.run import checkpoint
from ssl_jax.run import workdir as workdirs
from ssl_jax.weights import initial, layouts

ROOT = pathlib.Path(__file__).parents[1]
ENCODERS = {  # where each method keeps one: parameters, batch statistics
  "dinov2_quickstart": [("params.encoder", None), ("state.teacher_params.encoder", None)],
  "dino_quickstart:vit": [("params.encoder", None), ("state.teacher_params.encoder", None)],
  "dino_quickstart": [
    ("params.encoder", "state.batch_stats"),
    ("state.teacher_params.encoder", "state.teacher_batch_stats"),
  ],
  "moco_quickstart": [
    ("params.encoder", "state.batch_stats.encoder"),
    ("state.key_params.encoder", "state.key_batch_stats.encoder"),
  ],
  "byol_quickstart": [
    ("params.encoder", "state.batch_stats.encoder"),
    ("state.target_params.encoder", "state.target_batch_stats.encoder"),
  ],
}
COUNTING = (optax.ScaleByAdamState, optax.ScaleByScheduleState)


def fake_run(config):
  """What `build.first_state` looks at, with a state of random numbers in place of a compiled init."""
  method, encoder = build.method_of(config, 100, 10)
  init = training.make_init(method, optax.adamw(1e-3), configs.views(config), config.data.channels, 0)
  shapes, rng = jax.eval_shape(init), np.random.default_rng(0)
  state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0, 9, x.shape), x.dtype), shapes)
  return types.SimpleNamespace(config=config, encoder=encoder, method=method, init=lambda: state)


def nodes(tree, kind):
  return [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]


def recipe(name):
  name, _, version = name.partition(":")
  return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](*([version] if version else []))


def at(state, path):
  tree = state._asdict()
  for name in path.split("."):
    tree = tree[name] if isinstance(tree, dict) else getattr(tree, name)
  return tree


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(map(np.array_equal, *map(jax.tree.leaves, (a, b))))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_of_a_method_starts_with_the_weights_and_nothing_else_changes(tmp_path, name):
  run = fake_run(recipe(name))
  before = run.init()
  encoder, variables = restore.with_mask_token(types.SimpleNamespace(**vars(run), **before._asdict()))  # DINOv2's
  variables = jax.tree.map(lambda x: x + 1, variables)
  safetensors.numpy.save_file(layouts.whole_state(encoder, variables), tmp_path / "x.safetensors")
  run.config.init_from = str(tmp_path / "x.safetensors")
  after, told = build.first_state(run)
  for params, stats in ENCODERS[name]:
    assert same({part: at(after, params)[part] for part in variables["params"]}, variables["params"]), params
    assert stats is None or same(at(after, stats), variables["batch_stats"]), stats
  changed = sum(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
  assert changed == len(ENCODERS[name]) * len(jax.tree.leaves(variables))
  (left,) = (line for line in told if "initialised at random, as without weights: " in line)
  assert "encoder" not in left
  assert ("mask_token" in after.params["encoder"]) == (name == "dinov2_quickstart")


def test_without_weights_a_run_starts_as_it_did():
  run = fake_run(recipe("mae_quickstart"))
  assert build.first_state(run) == (run.init(), [])


def test_weights_of_another_image_size_and_other_channels_are_made_to_fit(tmp_path):
  run = fake_run(recipe("dino_quickstart:vit"))
  other = run.encoder.clone(image_size=56)
  shapes = jax.eval_shape(lambda: other.init(jax.random.key(0), jnp.zeros((1, 56, 56, 3)), train=False))
  variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  safetensors.numpy.save_file(layouts.whole_state(other, variables), tmp_path / "x.safetensors")
  run.config.init_from = str(tmp_path / "x.safetensors")
  after, told = build.first_state(run)
  assert {"channels: 3 made into 1 by timm's rule", "positions: interpolated from 8x8 to 4x4 patches"} <= set(told)
  np.testing.assert_allclose(after.params["encoder"]["pos_embed"], 1, rtol=1e-5)
  np.testing.assert_array_equal(after.state.teacher_params["encoder"]["patch_embed"]["proj"]["kernel"], 3)


def test_a_run_of_the_same_method_gives_all_but_its_optimizer(unbroken):
  run, there = fake_run(small_config(init_from=str(unbroken[0]))), restore.restore_run(unbroken[0])
  before, (after, told) = run.init(), build.first_state(run)
  assert same(after.params, there.params) and same(after.state, there.state)
  assert same((after.step, after.opt_state), (before.step, before.opt_state))
  assert f"step 20 of {unbroken[0]}, a run of the same method: params.encoder, params.projector" in told[0]
  run = fake_run(small_config(init_from=str(unbroken[0]), **{"method.projector.features": 4}))
  with pytest.raises(
    UserError, match=r"params\.projector\.linear2\.kernel: there \(16, 8\), here \(16, 4\).*export it"
  ):
    build.first_state(run)


@pytest.mark.parametrize("resize", ["offset", "antialiased"])
def test_a_run_of_the_same_method_at_another_size_resizes_positions_as_its_encoder_does(tmp_path, monkeypatch, resize):
  positions = np.random.default_rng(0).normal(size=(1, 17, 8)).astype(np.float32)
  method = types.SimpleNamespace(name="dinov2", get=lambda key: None)
  tree = lambda x: {"encoder": {"pos_embed": jnp.asarray(x)}}  # noqa: E731
  there = types.SimpleNamespace(params=tree(positions), state={}, step=1, config=types.SimpleNamespace(method=method))
  monkeypatch.setattr(restore, "restore_run", lambda path: there)
  (tmp_path / "checkpoints").mkdir()
  begun = training.TrainState(0, tree(np.zeros((1, 10, 8))), {}, None)
  after, told = initial.start_from(tmp_path, begun, vit.ViT(4, 8, 1, 1, image_size=12, resize=resize), method, 3)
  want = vit.interpolate_positions(jnp.asarray(positions), 3, 3, antialias=resize == "antialiased")
  np.testing.assert_array_equal(after.params["encoder"]["pos_embed"], want)
  assert "params.encoder.pos_embed: interpolated for 3x3 patches" in told


def test_moments_are_taken_along_where_that_is_asked_and_schedules_begin_anew(unbroken):
  config = small_config(init_from=str(unbroken[0]), init_optimizer=True)
  run, there = fake_run(config), restore.restore_optimizer(unbroken[0], 20)
  optimizer = optim.make(config.optimizer, configs.parameter_rules(config), lambda step: 0.1, 20, 8)
  params = restore.restore_run(unbroken[0]).params
  begun = run.init()._replace(opt_state=optimizer.init(params))
  run.init = lambda: begun
  after, told = build.first_state(run)
  assert told[-1] == "the optimizer's moments too; schedules begin anew"
  adams, schedules = ([nodes(state, kind)[0] for state in (after.opt_state, there)] for kind in COUNTING)
  assert same(*adams) and adams[0].count == 20 and any(x.any() for x in jax.tree.leaves(adams[0].mu))
  assert [x.count for x in schedules] == [0, 20]
  run.init = lambda: begun._replace(opt_state=optax.sgd(1e-3, momentum=0.9).init(params))
  with pytest.raises(UserError, match=r"has other moments.*Leave init_optimizer out"):
    build.first_state(run)
  config.init_from = "weights.pth"
  with pytest.raises(UserError, match=r"for a run of the same method, and init_from=weights\.pth is none"):
    build.first_state(run)


def test_a_run_of_another_method_gives_its_encoder(unbroken):
  config = recipe("byol_quickstart")
  config.encoder.width = 0.125
  config.init_from = str(unbroken[0])
  run, there = fake_run(config), restore.restore_encoder(unbroken[0])
  after, _ = build.first_state(run)
  assert same(after.params["encoder"], there.variables["params"])
  assert same(after.state.target_params["encoder"], there.variables["params"])


@pytest.mark.slow
def test_a_run_started_so_goes_on_without_reading_the_weights_again(unbroken, tmp_path, capsys):
  weights = tmp_path / "weights"
  shutil.copytree(unbroken[0], weights)
  config = small_config(init_from=str(weights), stop_after_steps=1)
  assert train.main(config, tmp_path / "run") == 0
  assert "a run of the same method" in capsys.readouterr().out
  shutil.rmtree(weights)
  config.stop_after_steps = 2
  assert train.main(config, tmp_path / "run") == 0
  assert "resuming at step 1" in capsys.readouterr().out


def test_weights_that_cannot_be_taken_leave_nothing_in_the_workdir(tmp_path, monkeypatch, capsys):
  def refuse(run):
    raise UserError("x is damaged")

  monkeypatch.setattr(build, "first_state", refuse)
  monkeypatch.setattr(train.messages, "describe", lambda run: [])
  monkeypatch.setattr(train.workdirs, "write_start", lambda run, workdir, source: (workdir / "config.json").touch())
  run = types.SimpleNamespace(config=None, last_step=4, state=training.TrainState(0, {}, {}, ()), source=lambda: None)
  with pytest.raises(UserError, match="x is damaged"):
    train.go_on(run, tmp_path, lambda: 0)
  assert not list(tmp_path.iterdir()) and "starting" not in capsys.readouterr().out


def test_what_a_run_of_labels_began_with_is_known_when_the_run_or_file_has_other_weights(tmp_path, monkeypatch):
  encoder = vit.ViT(patch_size=4, dim=12, depth=1, heads=3, image_size=8)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False))
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(layouts.whole_state(encoder, variables), path)
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  monkeypatch.setattr(restore, "restore_encoder", lambda path: types.SimpleNamespace(step=5, variables=variables))
  of_file, of_run = initial.source(path, encoder), initial.source(tmp_path / "run", encoder)
  assert of_file == initial.source(path, encoder) and of_file["step"] is None and of_run["step"] == 5
  bias = variables["params"]["norm"]["bias"]
  bias[3] = np.nextafter(bias[3], 9)
  safetensors.numpy.save_file(layouts.whole_state(encoder, variables), path)
  assert initial.source(path, encoder)["weights"] not in (of_file["weights"], of_run["weights"])

  workdir = tmp_path / "labelled"
  workdir.mkdir()
  config = small_config(init_from=str(path))
  method = types.SimpleNamespace(takes_labels=True)
  run = types.SimpleNamespace(config=config, method=method, encoder=encoder, state=training.TrainState(0, 0, 0, 0))
  run.source, run.resolved, run.last_step = lambda: build.Run.source(run), lambda: {"images": 4}, 8
  monkeypatch.setattr(workdirs, "check_resumable", lambda *_: None)
  monkeypatch.setattr(checkpoint, "restore_newest", lambda *_: (8, {}))
  goes_on = lambda: train.go_on(run, workdir, lambda: 0)  # noqa: E731
  assert goes_on() == 0  # an older version wrote nothing
  workdirs.write_start(run, workdir, workdirs.source(run, workdir, 0, begins=True))
  assert goes_on() == 0
  for then, text in (
    (of_file, rf"{of_file['weights'][:8]} then, \w{{8}} now\): delete {workdir} .* or take another --workdir"),
    (of_run, r"step 5 then, \w{8} now"),
  ):
    workdirs.write_start(run, workdir, then)
    with pytest.raises(UserError, match=text):
      goes_on()
  config.init_from = str(tmp_path / "run")
  workdirs.write_start(run, workdir, of_run | {"weights": "x"})
  with pytest.raises(UserError, match="step 5 then, other ones of step 5 now"):
    goes_on()
  shutil.rmtree(tmp_path / "run" / "checkpoints")  # which cannot be compared, or is gone: not needed any more
  assert goes_on() == 0
  config.init_from = str(tmp_path / "none")
  assert goes_on() == 0
  method.takes_labels = False
  assert run.source() is None


def test_figures_tell_the_step_of_the_encoder_and_are_not_lost_where_one_may_only_read(tmp_path, capsys):
  (tmp_path / "metrics.jsonl").write_text('{"step": 2, "test_top1": 11.5}\n')
  (tmp_path / "resolved.json").write_text('{"init_from": {"step": 7, "weights": "x"}}')
  (tmp_path / "figures.json").mkdir()
  labelled.hand_over(recipe("linear"), tmp_path, tmp_path / "figures.json")
  *_, told, figures = capsys.readouterr().out.splitlines()
  figures = json.loads(figures)
  assert (figures["encoder_step"], figures["data"], figures["test_split"]) == (7, "imagenet2012", "val")
  assert told.endswith("figures.json (Is a directory)")
