"""What the figures of a run say, in sentences: the run in short, and each monitor now."""

from typing import Any, NamedTuple

from ssl_jax.monitors import COLLAPSED_RANK, COLLAPSED_STD, ONE_PROTOTYPE, UNIFORM_TEACHER

GOOD, WATCH, BAD, PLAIN = "good", "watch", "bad", "plain"  # how a value is judged; PLAIN: it is neither good nor bad
_UNRELATED = 2.0  # alignment of two random directions
_SPREAD, _FEW, _NEAR, _FALLEN, _SPIKE = 0.3, 2.0, 1.0, 0.5, 10.0  # where a value begins to be worth a look


_SHARES = ("input_share", "mfu", "queue_filled")  # told in per cent


class Monitor(NamedTuple):
  """A logged value with what it says now.

  Attributes:
    key: its name in metrics.jsonl.
    title: what it is, in words.
    value: the last one, as text.
    judged: GOOD, WATCH, BAD or PLAIN.
    sentence: what it says.
    points: (step, value) of all rows that have it.
  """

  key: str
  title: str
  value: str
  judged: str
  sentence: str
  points: list[tuple[int, float]]


def monitors(rows: list[dict[str, Any]]) -> list[Monitor]:
  """The monitors of a run's rows, those first that may show a failure; what other methods log comes last."""
  logged = [row for row in rows if "loss" in row]
  if not logged:
    return []
  last, found = logged[-1], []
  left_out = {"step", "epoch", "loss", "not_finite"}
  for key in [*_SAID, *(key for key in last if key not in _SAID)]:
    if key in last and key not in left_out:
      points = [(row["step"], row[key]) for row in logged if key in row]
      title, say = _SAID.get(key, (key.replace("_", " "), _logged))
      judged, sentence = say(last[key], [y for _, y in points], last)
      value = f"{100 * last[key]:.1f} %" if key in _SHARES else brief(last[key])
      found.append(Monitor(key, title, _unbroken(value), judged, _unbroken(sentence), points))
  return found


def in_short(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[tuple[str, str]]:
  """What a reader wants to know first, as (judged, sentence).

  Args:
    rows: of metrics.jsonl.
    facts: "last_step", "chance", "labelled", "method": what is known of the run, or None.
  """
  told = [_progress(rows, facts)]
  logged = [row for row in rows if "loss" in row]
  if logged:
    told.append(_loss(logged, facts))
    told += [(m.judged, f"{m.title}: {m.sentence}") for m in monitors(rows) if m.judged == BAD]
  told.append(_worth(rows, facts, trained=bool(logged)))
  return [(judged, _unbroken(sentence)) for judged, sentence in told]


def _unbroken(text):
  """With no end of a line between a number and its per cent."""
  return text.replace(" %", "\u00a0%")


def _progress(rows, facts):
  step, last = max((row["step"] for row in rows), default=0), facts.get("last_step")
  if any("not_finite" in row for row in rows):
    return BAD, f"Step {step:,} was not finite, and the run ended there. A lower lr.base, in a new folder, often helps."
  if last and step >= last:
    return GOOD, f"The run is complete: {last:,} steps."
  of = f" of {last:,}" if last else ""
  if not step:
    return PLAIN, f"Nothing is trained yet: step 0{of}. Reload this page after the next evaluation."
  return PLAIN, (
    f"Step {step:,}{of} is the last that was written. If the run still goes, reload this page later; if it has ended, "
    "the same command goes on from the last checkpoint."
  )


def _loss(logged, facts):
  value, chance = logged[-1]["loss"], facts.get("chance")
  first = logged[0]["loss"]
  if chance is None:
    return PLAIN, f"The loss is {value:.4g}; it was {first:.4g} at step {logged[0]['step']:,}."
  if value > 0.98 * chance:
    return WATCH, f"The loss, {value:.4g}, is still that of uninformative outputs, {chance:.4g}."
  return GOOD, f"The loss is {value:.4g}, where uninformative outputs have {chance:.4g}."


def _worth(rows, facts, trained):
  scored = [row for row in rows if "knn_top1" in row]
  if not scored:
    why = (
      "No evaluation has been written yet." if facts.get("labelled") else "There are no labels to score the encoder by."
    )
    return PLAIN, f"{why} The nearest neighbours and the map below show what the encoder finds similar."
  first, value = scored[0], scored[-1]["knn_top1"]
  pixels = max((first[key] for key in first if key.startswith("pixels") and key.endswith("_top1")), default=None)
  start, guess = first["knn_top1"], first.get("guessing_top1")
  text = f"{value:.2f} % of the test images get the class that their nearest training images have"
  lines = {"the best of the raw pixels": pixels, "guessing": guess}
  if not trained or len(scored) == 1:
    return PLAIN, f"{text}, before any training{_beside(lines)}."
  text += _beside({"the encoder before its first step": start} | lines)
  if guess is not None and value <= guess:
    return WATCH, f"{text}: no more than by guessing."
  if value <= start:
    return WATCH, f"{text}: the training has not raised it."
  if pixels is not None and value <= pixels:
    more = " k-NN shows little of what MAE learns; eval_linear.py shows more." if facts.get("method") == "mae" else ""
    return (
      PLAIN if more else WATCH
    ), f"{text}: the training has raised it, and the pixels alone still do better.{more}"
  return GOOD, f"{text}: above all of these."


def _beside(lines):
  known = [f"{name} {x:.2f} %" for name, x in lines.items() if x is not None]
  return f" ({', '.join(known)})" if known else ""


def brief(x: float) -> str:
  """A number in at most four figures."""
  return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _since(values):
  """How a value has moved, in words."""
  first, last = values[0], values[-1]
  if len(values) < 2 or abs(last - first) < 0.02 * max(abs(first), abs(last)):
    return ""
  return f" It was {brief(first)} at first."


def _feature_std(x, values, row):
  about = "1 is an even spread, 0 means that all images have one embedding"
  if "alignment" not in row:
    return PLAIN, f"How far the features spread ({about}). This method cannot collapse, so that no value is wrong."
  if x < COLLAPSED_STD:
    return BAD, f"The features have collapsed: all images have nearly the same embedding ({about})."
  if x < _SPREAD:
    return WATCH, f"The embeddings lie close together ({about}). Should it keep falling, they are collapsing."
  return GOOD, f"The embeddings are spread out ({about}).{_since(values)}"


def _effective_rank(x, values, row):
  if "alignment" in row and x < COLLAPSED_RANK:
    return BAD, "The features have collapsed: the embeddings lie on a line."
  if "alignment" in row and x < _FALLEN * max(values):
    return WATCH, f"About {x:.1f} directions are in use; once it was {max(values):.1f}. This should not keep falling."
  if "alignment" in row and x < _FEW:
    return WATCH, f"The embeddings lie near a line; a line would have the value 1.{_since(values)}"
  return (GOOD if "alignment" in row else PLAIN), f"The embeddings use about {x:.1f} directions.{_since(values)}"


def _alignment(x, values, row):
  if row.get("feature_std", 1) < COLLAPSED_STD:
    return PLAIN, "Says nothing after a collapse."
  about = f"0: they are equal; {_UNRELATED:g}: unrelated"
  if x < _NEAR:
    return GOOD, f"An image's two views are near one another ({about}).{_since(values)}"
  return WATCH, f"An image's two views are still far from one another ({about}).{_since(values)}"


def _uniformity(x, values, row):
  about = "0: all in one point; -4: even over the sphere"
  return PLAIN, f"How evenly the embeddings fill the sphere ({about}).{_since(values)}"


def _marginal_entropy(x, values, row):
  if x < ONE_PROTOTYPE:
    return BAD, "The teacher has collapsed: nearly all images have the same few prototypes. The loss means nothing."
  return GOOD, f"The images share the prototypes out ({100 * x:.0f} % of the most even use).{_since(values)}"


def _teacher_entropy(x, values, row):
  if x > UNIFORM_TEACHER:
    return BAD, "The teacher is uniform and tells nothing. A lower teacher temperature helps."
  return GOOD, f"The teacher decides between prototypes (1: not at all; 0: for a single one).{_since(values)}"


def _queue_filled(x, values, row):
  if x < 1:
    return PLAIN, f"{100 * x:.0f} % of the queue are real keys; while they replace random ones the loss rises."
  return GOOD, "The queue holds nothing but real keys."


def _contrastive_top1(x, values, row):
  return PLAIN, f"In {x:.0f} % of the cases the right key is nearer than every other one.{_since(values)}"


def _kl(x, values, row):
  return PLAIN, f"What the student can still reduce of the loss; the rest is the teacher's own entropy.{_since(values)}"


def _sigreg(x, values, row):
  return (
    PLAIN,
    f"A standard Gaussian has 1.05; a run stays above that, and far above it if embeddings shrink.{_since(values)}",
  )


def _invariance(x, values, row):
  return PLAIN, f"The squared distance of a view to the mean of its image's views.{_since(values)}"


def _grad_norm(x, values, row):
  usual = sorted(values)[len(values) // 2]
  if x > _SPIKE * usual:
    return WATCH, f"Far above what is usual in this run, {brief(usual)}. A single peak does no harm."
  return PLAIN, f"The gradient's size; {brief(usual)} is usual in this run."


def _update_norm(x, values, row):
  return PLAIN, f"How far the parameters move in a step; it follows the learning rate.{_since(values)}"


def _center_norm(x, values, row):
  return PLAIN, f"What is subtracted from the teacher's outputs so that no prototype gets all of them.{_since(values)}"


def _input_share(x, values, row):
  if x > 0.05:
    return WATCH, f"{100 * x:.0f} % of the time goes into waiting for images: data.workers or data.threads may help."
  return GOOD, "Images come as fast as they are used."


def _images_per_second(x, values, row):
  return PLAIN, f"Images that are trained on in a second.{_since(values)}"


def _part(x, values, row):
  return PLAIN, f"A part of the loss.{_since(values)}"


def _koleo(x, values, row):
  return PLAIN, f"Lower where each class token's nearest neighbour is farther away.{_since(values)}"


def _accuracy(x, values, row):
  return PLAIN, f"On the batch's augmented images; the test images tell how good the classifier is.{_since(values)}"


def _feature_norm(x, values, row):
  return PLAIN, f"The mean length of the features that the classifier gets.{_since(values)}"


def _mfu(x, values, row):
  return PLAIN, f"The model's arithmetic takes {100 * x:.0f} % of what the devices can do."


def _schedule(x, values, row):
  return PLAIN, "Follows its schedule."


def _logged(x, values, row):
  return PLAIN, f"Logged by the method.{_since(values)}"


_SAID: dict[str, tuple[str, Any]] = {
  "feature_std": ("Spread of the features", _feature_std),
  "effective_rank": ("Directions in use", _effective_rank),
  "marginal_entropy": ("Use of the prototypes", _marginal_entropy),
  "teacher_entropy": ("The teacher's uncertainty", _teacher_entropy),
  "alignment": ("Distance of two views", _alignment),
  "uniformity": ("Uniformity", _uniformity),
  "contrastive_top1": ("Right keys found", _contrastive_top1),
  "queue_filled": ("Queue", _queue_filled),
  "invariance": ("Distance of the views", _invariance),
  "sigreg": ("Distance to a Gaussian", _sigreg),
  "kl": ("Student to teacher", _kl),
  "dino": ("Loss of the class tokens", _part),
  "ibot": ("Loss of the masked patches", _part),
  "koleo": ("Distance to the nearest neighbour", _koleo),
  "accuracy": ("Right answers", _accuracy),
  "feature_norm": ("Size of the features", _feature_norm),
  "center_norm": ("Size of the centre", _center_norm),
  "grad_norm": ("Gradient", _grad_norm),
  "update_norm": ("Update", _update_norm),
  "images_per_second": ("Speed", _images_per_second),
  "input_share": ("Waiting for images", _input_share),
  "mfu": ("Use of the devices", _mfu),
  "learning_rate": ("Learning rate", _schedule),
  "teacher_temperature": ("Teacher temperature", _schedule),
}
