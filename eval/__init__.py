"""Studies and benchmarks, run from the checkout: `python -m eval.NAME --help`."""
