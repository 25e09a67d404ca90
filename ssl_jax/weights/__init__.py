"""Weights in and out: files, layouts of other libraries, exports."""
