"""Studies and benchmarks of single questions, run from the checkout: `python -m eval.NAME --help`.

The few-shot table itself is `fewshot_diti.evaluation`, run by `fewshot-diti eval`, which `eval.fewshot` calls.
"""
