"""Each method's whole steps against the official code's (or a PyTorch reference's) recorded trajectories."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from named_weights import named_images, named_weight
from trajectories import PRECISIONS, cast, error, make_step, named_variables, views

from ssl_jax import convert, optim, random_streams
from ssl_jax.losses import mae_loss, patchify
from ssl_jax.methods import byol, dino, mae, moco, moco_v3, simsiam
from ssl_jax.methods.base import Momentum, OneNetworkState, constant_momentum, cosine_momentum
from ssl_jax.models import heads, resnet, vit
from ssl_jax.models.mae import MAEDecoder

# They compile for long; test_trajectories takes the same kind of steps on tiny networks.
SLOW_PRECISIONS = [pytest.param(*precision, marks=pytest.mark.slow) for precision in PRECISIONS]
KEYS = jax.random.split(jax.random.key(0), 16)


@pytest.fixture(autouse=True)
def precise(request, optimised):
  """float64 where the test asks for it; XLA's optimisations on: these compute longer than they compile."""
  with jax.enable_x64("float64" in request.node.name):
    yield


def no_decay(params):
  return optim.decayed(params, (".*/bias", ".*/scale"))


@pytest.mark.parametrize("dtype, losses, probes", SLOW_PRECISIONS, ids=str)
def test_moco_v2_is_the_official_codes(golden, dtype, losses, probes):
  g, dtype = golden("moco_v2_trajectory"), jnp.dtype(dtype)
  network = heads.Network(resnet.resnet18(bn_group_size=16, dtype=dtype), heads.MoCoHead(features=32, dtype=dtype))
  method = moco.moco(
    network.encoder, network.projector, queue_size=64, temperature=0.2, momentum=constant_momentum(0.9)
  )
  params, state = jax.eval_shape(method.init, KEYS[0], (jnp.zeros((2, 1, 64, 64, 3)),))
  shapes = {"params": params, "batch_stats": state.batch_stats}
  start = named_variables(shapes, "moco_v2/", {r"^(encoder|projector)\.": ""}, dtype)
  params, stats = start["params"], start["batch_stats"]
  queue = jnp.asarray(named_weight("moco_v2/queue", (32, 64)).T, dtype)
  queue /= jnp.linalg.norm(queue, axis=1, keepdims=True)
  state = moco.MoCoState(params, stats, stats, queue, jnp.int32(0), jnp.int32(0))
  optimizer = optim.sgd(lambda _: 0.003, None, weight_decay=1e-4)
  opt_state, step = optimizer.init(params), make_step(method, optimizer)
  for i, want in enumerate(g["losses"]):
    drawn, before = views((f"moco_v2/query{i}", f"moco_v2/key{i}"), (16, 64, 64, 3), dtype), state
    params, state, opt_state, aux = step(params, state, opt_state, drawn, KEYS, i)
    np.testing.assert_allclose(aux.metrics["loss"], want, rtol=losses)
  assert error(state.queue, g["queue"]) < probes
  assert state.queue_pointer == g["queue_pointer"][0] and state.queue_written == 64
  probe = named_images("moco_v2/probe", (4, 64, 64, 3)).astype(dtype)
  query = network.apply({"params": params, "batch_stats": state.batch_stats}, probe, train=False)
  # The official key network is moved before its next use; ours after the last.
  keys = {"params": before.key_params, "batch_stats": state.key_batch_stats}
  assert error(query, g["query_probe"]) < probes
  assert error(network.apply(keys, probe, train=False), g["key_probe"]) < probes


@pytest.mark.parametrize("dtype, losses, probes", SLOW_PRECISIONS, ids=str)
def test_moco_v3_is_the_official_codes(golden, dtype, losses, probes):
  g, dtype = golden("moco_v3_trajectory"), jnp.dtype(dtype)
  shape = dict(patch_size=8, dim=48, depth=2, heads=3, image_size=32)
  encoder = vit.ViT(**shape, positions="row_first", frozen_patch_embed=True, dtype=dtype)
  mlp = dict(hidden=64, features=32, last_norm="plain", dtype=dtype)
  network = heads.PredictorNetwork(encoder, heads.Projector(layers=3, **mlp), heads.Projector(**mlp))
  momentum, rates = jnp.asarray(g["momentum"]), jnp.asarray(g["lr"])
  method = moco_v3.moco_v3(
    encoder,
    network.projector,
    network.predictor,
    temperature=0.2,
    momentum=Momentum(lambda step: 1 - momentum[jnp.minimum(step, 9)]),
  )
  params, state = jax.eval_shape(method.init, KEYS[0], (jnp.zeros((2, 1, 32, 32, 3)),))
  rename = {r"^encoder\.": "base_encoder.", r"^projector\.": "base_encoder.head."}
  start = named_variables({"params": params, "batch_stats": state.batch_stats}, "moco_v3/", rename, dtype)
  params, stats = start["params"], start["batch_stats"]
  state = moco_v3.MoCoV3State(heads.without_predictor(params), stats, heads.without_predictor(stats))

  rules = optim.ParameterRules(frozen=(r"encoder/patch_embed/.*",))
  optimizer = optim.make(dict(name="adamw", weight_decay=0.1), rules, lambda step: rates[step], 10, 10)
  opt_state, step = optimizer.init(params), make_step(method, optimizer)
  for i, want in enumerate(g["losses"]):
    drawn, before = views((f"moco_v3/view1_{i}", f"moco_v3/view2_{i}"), (16, 32, 32, 3), dtype), state
    params, state, opt_state, aux = step(params, state, opt_state, drawn, KEYS, i)
    np.testing.assert_allclose(aux.metrics["loss"], want, rtol=losses)
  probe = named_images("moco_v3/probe", (4, 32, 32, 3)).astype(dtype)

  def project(params, stats):
    return network.apply({"params": params, "batch_stats": stats}, probe, train=False, method="project")

  assert error(project(params, state.batch_stats), g["base_probe"]) < probes
  assert error(project(before.momentum_params, state.momentum_batch_stats), g["momentum_probe"]) < probes
  # Frozen is not decayed either.
  np.testing.assert_array_equal(params["encoder"]["patch_embed"]["proj"]["bias"], g["patch_embed_bias"].astype(dtype))


@pytest.mark.parametrize("dtype, losses, probes", SLOW_PRECISIONS, ids=str)
def test_byol_is_the_pytorch_references(golden, dtype, losses, probes):
  g, dtype = golden("byol_trajectory"), jnp.dtype(dtype)
  mlp = dict(hidden=64, features=32, hidden_bias=True, dtype=dtype)
  network = heads.PredictorNetwork(resnet.resnet18(dtype=dtype), heads.Projector(**mlp), heads.Projector(**mlp))
  parts = network.encoder, network.projector, network.predictor
  method = byol.byol(*parts, target_momentum=cosine_momentum(0.9, 6))
  params, state = jax.eval_shape(method.init, KEYS[0], (jnp.zeros((2, 1, 64, 64, 3)),))
  shapes = {"params": params, "batch_stats": state.batch_stats}
  online = named_variables(shapes, "byol/online.", {}, dtype)
  target = {name: heads.without_predictor(tree) for name, tree in shapes.items()}
  target = named_variables(target, "byol/target.", {}, dtype)
  params, state = online["params"], byol.BYOLState(target["params"], online["batch_stats"], target["batch_stats"])
  optimizer = optim.lars(lambda i: 0.01 * (1 + jnp.cos(jnp.pi * i / 6)), no_decay, weight_decay=1e-2, lr_inside=False)
  opt_state, step = optimizer.init(params), make_step(method, optimizer)
  for i, want in enumerate(g["losses"]):
    drawn = views((f"byol/view1_{i}", f"byol/view2_{i}"), (16, 64, 64, 3), dtype)
    params, state, opt_state, aux = step(params, state, opt_state, drawn, KEYS, i)
    np.testing.assert_allclose(aux.metrics["loss"], want, rtol=losses)
  probe = named_images("byol/probe", (4, 64, 64, 3)).astype(dtype)
  online = {"params": params, "batch_stats": state.batch_stats}
  target = {"params": state.target_params, "batch_stats": state.target_batch_stats}
  assert error(network.apply(online, probe, train=False)[1], g["online_probe"]) < probes
  assert error(network.apply(target, probe, train=False, method="project"), g["target_probe"]) < probes
  features = network.encoder.apply(method.encoder(params, state), probe, train=False)
  assert error(features, g["encoder_probe"]) < probes


def test_byols_tau_is_the_official_schedule(golden):
  g = golden("byol_tau")
  rate = cosine_momentum(float(g["tau0"]), int(g["total"])).rate
  np.testing.assert_allclose([1 - rate(step) for step in g["step"]], g["tau"], atol=1e-7)


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-6), ("float32", 1e-3)], ids=str)
@pytest.mark.slow
def test_simsiam_is_the_official_model(golden, dtype, rtol):
  g, dtype = golden("simsiam"), jnp.dtype(dtype)
  network = heads.PredictorNetwork(
    resnet.resnet18(dtype=dtype),
    heads.Projector(layers=3, features=24, last_norm="plain", dtype=dtype),
    heads.Projector(hidden=12, features=24, last_bias=heads.torch_bias(12), dtype=dtype),
  )
  method = simsiam.simsiam(network.encoder, network.projector, network.predictor)
  params, state = jax.eval_shape(method.init, KEYS[0], (jnp.zeros((2, 1, 32, 32, 3)),))
  shapes, rename = {"params": params, "batch_stats": state.batch_stats}, {r"^projector\.": "encoder.fc."}
  start = named_variables(shapes, "simsiam/", rename, dtype)
  drawn = views(("simsiam/view1", "simsiam/view2"), (8, 32, 32, 3), dtype)

  @jax.jit
  def step(params, stats):
    outputs, _ = heads.view_by_view(network, params, stats, drawn[0])
    (value, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(
      params, OneNetworkState(stats), drawn, KEYS[:8], 0
    )
    return outputs, value, grads, aux.averages

  (z, p), value, grads, after = step(start["params"], start["batch_stats"])
  np.testing.assert_allclose(value, g["model/loss"], rtol=rtol)
  for i in range(2):
    assert error(p[i], g[f"model/p{i + 1}"]) < rtol and error(z[i], g[f"model/z{i + 1}"]) < rtol

  def official(tree):
    return {re.sub(r"^projector\.", "encoder.fc.", k): v for k, v in convert.to_torch(tree).items()}

  grads, after = official({"params": grads}), official({"batch_stats": after})
  # The official projector's last bias is not trained and goes into the mean that the norm behind it takes away.
  bias = named_weight("simsiam/encoder.fc.6.bias", (24,))
  after["encoder.fc.7.running_mean"] = after["encoder.fc.7.running_mean"] + (1 - 0.9**2) * bias
  for key in (key.split("/", 2)[2] for key in g.files if key.startswith("model/grad/")):
    assert error(grads[key], g[f"model/grad/{key}"]) < rtol, key
  for key in (key.split("/", 2)[2] for key in g.files if key.startswith("model/after/")):
    assert error(after[key], g[f"model/after/{key}"]) < rtol, key
  norms = dict(zip(g["model/param_names"].tolist(), g["model/grad_norms"], strict=True))
  assert norms.pop("encoder.fc.6.bias") == -1 and norms.keys() == grads.keys()
  largest = max(norms.values())
  for key, norm in norms.items():
    assert abs(np.linalg.norm(grads[key]) - norm) < rtol * largest, key


RENAME = {r"^(encoder|decoder)\.": ""}
FIXED = ("pos_embed", "decoder_pos_embed")


@pytest.fixture
def tiny_mae():
  encoder = vit.ViT(patch_size=8, dim=32, depth=2, heads=4, image_size=32, positions="column_first")
  method = mae.mae(encoder, MAEDecoder(192, dim=24, depth=1, heads=4))
  shapes, _ = jax.eval_shape(method.init, KEYS[0], (jnp.zeros((1, 1, 32, 32, 3)),))

  def load(g):
    weights = {name[2:]: g[name] for name in g.files if name.startswith("w/")}
    return convert.from_torch(weights, {"params": shapes}, rename=RENAME, ignore=FIXED)["params"]

  def loss(params, images, noise):
    visible, mask, restore = mae.mask_from_noise(noise, 4)
    tokens = encoder.apply({"params": params["encoder"]}, images, keep=visible, method="tokens")
    decoder = MAEDecoder(192, dim=24, depth=1, heads=4)
    prediction = decoder.apply({"params": params["decoder"]}, tokens, restore, (4, 4))
    return mae_loss(prediction, patchify(images, 8), mask), (visible, mask, restore, tokens, prediction)

  return load, loss, method


def test_mae_masks_encodes_and_decodes_as_the_official_code(golden, tiny_mae):
  g = golden("mae")
  load, loss, _ = tiny_mae
  params = load(g)
  (value, seen), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, g["images"], g["noise"])
  _, mask, restore, tokens, prediction = seen
  np.testing.assert_array_equal(mask, g["mask"])
  np.testing.assert_array_equal(restore, g["ids_restore"])
  assert error(tokens, g["latent"]) < 1e-5 and error(prediction, g["pred"]) < 1e-5
  np.testing.assert_allclose(value, g["loss_norm_pix_True"], rtol=1e-6)
  assert error(grads["decoder"]["mask_token"], g["grad_mask_token_True"]) < 1e-5
  kernel = np.asarray(grads["encoder"]["patch_embed"]["proj"]["kernel"]).transpose(3, 2, 0, 1)
  assert error(kernel, g["grad_patch_embed_True"]) < 1e-5


def test_24_steps_of_mae_are_the_official_codes(golden, tiny_mae):
  g = golden("mae_trajectory")
  load, loss, _ = tiny_mae
  params, rates = load(g), jnp.asarray(g["lrs"], jnp.float32)
  optimizer = optax.adamw(lambda step: rates[step], mask=no_decay, weight_decay=float(g["weight_decay"]), b2=0.95)
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, opt_state, images, noise):
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, images, noise)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  for i, want in enumerate(g["losses"]):
    params, opt_state, value = step(params, opt_state, g["images"][i % 3], g["noises"][i])
    np.testing.assert_allclose(value, want, rtol=1e-5)
  np.testing.assert_allclose(params["decoder"]["mask_token"], g["final_mask_token"], atol=1e-5)
  kernel = np.asarray(params["encoder"]["patch_embed"]["proj"]["kernel"]).transpose(3, 2, 0, 1)
  np.testing.assert_allclose(kernel, g["final_patch_embed"], atol=1e-5)


@pytest.mark.slow
def test_maes_loss_is_its_parts(tiny_mae):
  """What the tests above put together by hand is what the method does with its keys."""
  _, loss, method = tiny_mae
  drawn = (jax.random.normal(KEYS[1], (1, 4, 32, 32, 3)),)
  params, state = jax.jit(method.init)(KEYS[0], drawn)
  gradient_free = jax.jit(method.loss)
  value, aux = gradient_free(params, state, drawn, KEYS[:4], 0)
  noise = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, random_streams.MASK), (16,)))(KEYS[:4])
  np.testing.assert_allclose(value, jax.jit(loss)(params, drawn[0][0], noise)[0], rtol=1e-6)
  assert aux.monitored.embedding.shape == (4, 1, 32)
  again, _ = gradient_free(params, state, drawn, KEYS[4:8], 0)
  assert again != value  # other keys, other masks


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def test_dino_is_its_algorithm_in_numpy():
  """15 AdamW steps on a linear encoder and head: per-tensor clipping, a late last layer, schedules, centre, EMA."""
  rng = np.random.default_rng(0)
  steps, late_steps, clip = 15, 3, 0.05
  crops = rng.normal(size=(steps, 4, 8, 6))  # per step: two global and two local views of eight examples
  lr, decay = np.linspace(0.01, 0.03, steps), np.linspace(0.04, 0.4, steps)
  rate, temperature = np.linspace(0.1, 0.01, steps), np.where(np.arange(steps) < late_steps, 0.04, 0.07)
  w = {"encoder": rng.normal(size=(6, 5)), "last": rng.normal(size=(5, 7)) / 4}

  method = dino.dino(
    Linear(5),
    LinearHead(7),
    teacher_temperature=lambda step: jnp.asarray(temperature)[step],
    teacher_momentum=Momentum(lambda step: jnp.asarray(rate)[step]),
  )
  with jax.enable_x64(True):
    params = cast({"encoder": {"kernel": w["encoder"]}, "head": {"last_layer": {"kernel": w["last"]}}}, jnp.float64)
    state = dino.DINOState(params, jnp.zeros(7), {}, {})
    late = optax.adamw(
      lambda i: jnp.asarray(lr)[i + late_steps], weight_decay=lambda i: jnp.asarray(decay)[i + late_steps]
    )
    optimizer = optax.chain(
      optim.clip_by_param_norm(clip),
      optax.partition(
        {
          "on": optax.adamw(lambda i: jnp.asarray(lr)[i], weight_decay=lambda i: jnp.asarray(decay)[i]),
          "late": optax.conditionally_mask(late, lambda i: i >= late_steps),
        },
        {"encoder": {"kernel": "on"}, "head": {"last_layer": {"kernel": "late"}}},
      ),
    )
    opt_state, step = optimizer.init(params), make_step(method, optimizer)
    got = []
    for i in range(steps):
      drawn = (jnp.asarray(crops[i][:2, :, None, None]), jnp.asarray(crops[i][2:, :, None, None]))
      params, state, opt_state, aux = step(params, state, opt_state, drawn, KEYS[:8], i)
      got.append(float(aux.metrics["loss"]))

  teacher, center = {k: v.copy() for k, v in w.items()}, np.zeros(7)
  moments = {k: [0.0, 0.0, 0] for k in w}
  for i in range(steps):
    hidden = crops[i] @ w["encoder"]
    logits = hidden @ w["last"] / 0.1
    raw = crops[i][:2] @ teacher["encoder"] @ teacher["last"]
    targets = softmax((raw - center) / temperature[i])
    pairs = [(t, v) for t in range(2) for v in range(4) if t != v]
    log_p = np.log(softmax(logits))
    loss = np.mean([-(targets[t] * log_p[v]).sum(-1).mean() for t, v in pairs])
    np.testing.assert_allclose(got[i], loss, rtol=1e-10)
    d_logits = sum(np.stack([(softmax(logits[v]) - targets[t]) * (u == v) for u in range(4)]) for t, v in pairs) / (
      len(pairs) * 8 * 0.1
    )
    grads = {
      "last": np.einsum("vbd,vbk->dk", hidden, d_logits),
      "encoder": np.einsum("vbi,vbk->ik", crops[i], d_logits @ w["last"].T),
    }
    for k, g in grads.items():
      if k == "last" and i < late_steps:
        continue  # no gradient in PyTorch: no decay, no moments
      g = g * min(1, clip / (np.linalg.norm(g) + 1e-6))
      m = moments[k]
      m[:] = [0.9 * m[0] + 0.1 * g, 0.999 * m[1] + 0.001 * g * g, m[2] + 1]
      update = m[0] / (1 - 0.9 ** m[2]) / (np.sqrt(m[1] / (1 - 0.999 ** m[2])) + 1e-8)
      w[k] = w[k] * (1 - lr[i] * decay[i]) - lr[i] * update
    center = 0.9 * center + 0.1 * raw.mean(axis=(0, 1))
    for k in w:
      teacher[k] += rate[i] * (w[k] - teacher[k])
  np.testing.assert_allclose(params["encoder"]["kernel"], w["encoder"], rtol=1e-9)
  np.testing.assert_allclose(params["head"]["last_layer"]["kernel"], w["last"], rtol=1e-9)
  np.testing.assert_allclose(state.teacher_params["encoder"]["kernel"], teacher["encoder"], rtol=1e-9)
  np.testing.assert_allclose(state.center, center, rtol=1e-9)


class Linear(heads.nn.Module):
  features: int

  @heads.nn.compact
  def __call__(self, x, *, train):
    kernel = self.param("kernel", heads.nn.initializers.normal(), (x.shape[-1], self.features))
    return x.reshape(x.shape[0], -1) @ kernel


class LinearHead(heads.nn.Module):
  prototypes: int

  @heads.nn.compact
  def __call__(self, x):
    return Last(self.prototypes, name="last_layer")(x)


class Last(heads.nn.Module):
  features: int

  @heads.nn.compact
  def __call__(self, x):
    return x @ self.param("kernel", heads.nn.initializers.normal(), (x.shape[-1], self.features))


def test_dinos_schedules_are_the_official_ones(golden):
  g = golden("dino_schedules")
  per_epoch, epochs = int(g["steps_per_epoch"]), int(g["epochs"])
  steps, (base, final, warmup) = per_epoch * epochs, g["lr_args"]
  lr = optim.warmup_cosine(float(base), int(warmup) * per_epoch, steps, float(final), inclusive=True)
  decay = optim.cosine_between(*map(float, g["wd_args"]), steps)
  momentum = cosine_momentum(float(g["momentum_args"][0]), steps).rate
  at = jnp.arange(steps)
  np.testing.assert_allclose(jax.vmap(lr)(at), g["lr"], rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(jax.vmap(decay)(at), g["weight_decay"], rtol=1e-5)
  np.testing.assert_allclose(1 - jax.vmap(momentum)(at), g["momentum"], rtol=1e-6)


@pytest.mark.parametrize("size, batch", [(64, 16), (40, 16), (24, 16), (10, 16)])
def test_the_queue_holds_the_newest_keys_for_any_size_and_batch(size, batch):
  method = moco.moco(Flat(), Flat(), queue_size=size, temperature=0.2, momentum=constant_momentum(0.99))
  drawn = (jax.random.normal(KEYS[0], (2, batch, 2, 2, 1)),)
  params, state = method.init(KEYS[1], drawn)
  written = []
  for i in range(7):
    keys = jnp.full((batch, 4), float(i)) + jnp.arange(batch)[:, None] / 100
    written += list(np.asarray(keys[:, 0]))
    aux = moco.Aux({}, {"batch_stats": {}, "key_batch_stats": {}}, keys)
    state = method.update(params, state, aux, i)
  assert sorted(np.asarray(state.queue[:, 0])) == pytest.approx(sorted(written[-size:]))
  assert state.queue_pointer == 7 * batch % size and state.queue_written == size


class Flat(heads.nn.Module):
  @heads.nn.compact
  def __call__(self, x, *, train):
    return heads.nn.Dense(4)(x.reshape(x.shape[0], -1))


def test_shuffled_keys_come_back_to_their_queries(mesh):
  images, orders = jnp.arange(16.0)[:, None], []
  for axes in (1, 2, 4):

    def here(keys, images):
      shuffled, mine = moco.shuffle(keys, images, "batch")
      return moco.gather(shuffled, "batch")[mine], shuffled

    mapped = jax.shard_map(here, mesh=mesh(axes), in_specs=jax.P("batch"), out_specs=jax.P("batch"), check_vma=False)
    back, shuffled = jax.jit(mapped)(KEYS, images)
    np.testing.assert_array_equal(back, images)
    assert np.any(shuffled != images) and sorted(shuffled[:, 0]) == list(range(16))
    orders.append(np.asarray(shuffled))
  assert all(np.array_equal(order, orders[0]) for order in orders)  # not a matter of the number of devices


def test_byols_target_starts_from_a_seed_of_its_own_and_other_slow_networks_as_copies():
  images, parts = (jnp.ones((2, 1, 4, 4, 3)),), (Flat(), Flat(), Flat())
  params, state = byol.byol(*parts, target_momentum=constant_momentum(0.9)).init(KEYS[0], images)
  for slow, fast in zip(*map(jax.tree.leaves, (state.target_params, heads.without_predictor(params))), strict=True):
    assert not np.any(slow) or not np.array_equal(slow, fast)  # biases are zeros in both
  assert np.any(state.target_params["encoder"]["Dense_0"]["kernel"])
  params, state = moco_v3.moco_v3(*parts, temperature=1.0, momentum=constant_momentum(0.9)).init(KEYS[0], images)
  jax.tree.map(np.testing.assert_array_equal, state.momentum_params, heads.without_predictor(params))


@pytest.mark.parametrize("m", [-0.1, 1.5, float("nan")])
def test_a_momentum_out_of_range_is_refused_with_its_value(m):
  for make in (constant_momentum, lambda m: cosine_momentum(m, 10)):
    with pytest.raises(ValueError, match=rf"momentum must be in \[0, 1\], got {m}"):
      make(m)
  with pytest.raises(ValueError):
    cosine_momentum(0.9, 0)


def test_a_momentum_near_one_keeps_the_digits_of_its_rate():
  t = 249_500  # The rate is 3.9e-8 there: from m in float32 it would be 6.0e-8.
  want = 0.004 * (1 + np.cos(np.pi * t / 250_000)) / 2
  np.testing.assert_allclose(cosine_momentum(0.996, 250_000).rate(t), want, rtol=1e-2)
