"""How Sphinx makes a site of these pages and of the docstrings: sphinx-build -W docs SITE."""

import dataclasses
import pathlib
import re
import sys

import flax.linen as nn
from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "ssl_jax"
copyright = "the authors of ssl_jax; Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings are written as GitHub writes them
default_role = "code"  # in docstrings `x` is code
suppress_warnings = ["ref.python"]  # names of attributes that several classes have
highlight_options = {"python": {"stripnl": True}}  # parts of files end in blank lines

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # a class's attributes are in its docstring, as a list

html_theme = "furo"
html_title = "ssl_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False


def setup(app):
  app.connect("autodoc-skip-member", lambda app, what, name, member, skip, options: skip or is_field(name, member))
  app.connect("autodoc-process-signature", signature)
  app.connect("autodoc-process-docstring", join_names, priority=600)  # after Napoleon
  app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))


def is_field(name, member):
  """Whether it is a field of a NamedTuple or module, which the docstring of its class describes."""
  if str(getattr(member, "__doc__", "")).startswith("Alias for field number"):
    return True
  return name in ("dtype", "setup") or name.endswith("_init")


def signature(app, what, name, member, options, given, returned):
  """A module's fields with their plain defaults; nothing for a protocol, whose `__call__` has the signature."""
  if what == "class" and issubclass(member, nn.Module):
    own = [x for x in dataclasses.fields(member) if x.name not in ("parent", "name")]
    plain = [f"={x.default!r}" if isinstance(x.default, str | int | float | None) else "" for x in own]
    return f"({', '.join(x.name + default for x, default in zip(own, plain, strict=True))})", None
  return ("", None) if getattr(member, "_is_protocol", False) else None


def join_names(app, what, name, member, options, lines):
  """Several attributes of one description: Sphinx would take the first for the type of the last."""
  for i, line in enumerate(lines):
    if found := re.match(r":ivar (\w+(?:, \w+)+):", line):
      lines[i] = line.replace(found[1], found[1].replace(" ", ""))


# Formulas become MathML, which browsers draw themselves: the site loads nothing from elsewhere.
def mathml(node, **settings):
  text = tex2mathml(node.astext(), **settings)
  # Docutils lets these stretch to the height of the whole line, and puts an accented letter's index below the letter.
  text = re.sub(r"<mo( class=.\w+.)?>(?=[\u2016\u27e8\u27e9])", r'<mo\1 stretchy="false">', text)
  accented = r"<munderover>\s*(<mi>\w</mi>)(.*?)(<mo stretchy=.false.>[\u02c9\u02c6]</mo>)\s*</munderover>"
  return re.sub(accented, r"<msub><mover>\1\3</mover>\2</msub>", text, flags=re.DOTALL)


def inline_formula(writer, node):
  writer.body.append(mathml(node))
  raise SkipNode


def formula(writer, node):
  writer.body.append(f'<div class="formula">{mathml(node, as_block=True)}</div>')
  raise SkipNode
