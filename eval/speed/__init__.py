"""The speed benchmark: `python -m eval.speed`."""
