"""The front doors: command line, demo and report. Nothing imports this package."""
