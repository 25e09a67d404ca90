"""The one exception that the commands print as a line of text."""


class UserError(ValueError):
  """A mistake that the person at the keyboard can mend: a command prints it without a traceback."""
