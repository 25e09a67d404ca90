"""python -m ssl_jax COMMAND: what there is to do beside training and evaluation.

  check      reads every image of a folder and says what training will find
  prepare    writes a data set on disk, ready to train on
  show       draws the views that a recipe makes of its first images
  judge      tells what a run's features are like without labels, and draws nearest neighbours
  export     writes a run's encoder for timm, transformers or torchvision
  embed      writes the features of many images, with their names
  neighbours finds the most similar images, by their features
  duplicates finds images that are there more than once, by their features
  report     writes a page that shows what came of a run, or of a few side by side

python -m ssl_jax COMMAND --help tells what a command takes.
"""

import sys

from ssl_jax import extras

COMMANDS = {  # the extra of pyproject.toml that brings what each imports
  "check": "train",
  "prepare": "train",
  "show": "train",
  "judge": "eval",
  "export": "export",
  "embed": "eval",
  "neighbours": "eval",
  "duplicates": "eval",
  "report": "train",
}


def main() -> int:
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help", "help"):
    print(__doc__.strip())
    return 0
  if name not in COMMANDS:
    print(f"python -m ssl_jax: error: there is no command {name!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
    return 2
  try:
    command = extras.load(f"commands.{name}", name, COMMANDS[name])
  except extras.MissingPackage as error:
    print(f"python -m ssl_jax: error: {error}", file=sys.stderr)
    return 1
  sys.argv = [f"python -m ssl_jax {name}", *sys.argv[2:]]
  return command.main() or 0


if __name__ == "__main__":
  sys.exit(main())
