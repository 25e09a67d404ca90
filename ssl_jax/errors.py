"""What the commands print as a line of text."""


class UserError(ValueError):
  """A mistake that the person at the keyboard can mend: a command prints it without a traceback."""


class NoSplit(UserError):
  """The data set is there, and has no split of that name."""
