"""A run of train.py: its checkpoints, processes, rows, pictures and what it tells people."""
