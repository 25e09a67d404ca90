"""report.html: one page that shows what came of a run, or of a few beside each other."""
