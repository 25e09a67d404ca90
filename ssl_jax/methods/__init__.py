"""One file a paper's algorithm; `base.py` documents what they have in common."""
