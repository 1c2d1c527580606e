"""The few-shot table behind `fewshot-diti eval`: its runs, what each records, and how methods compare.

`config` holds which runs a table has, `grid` runs what is missing, `methods` holds the rows (`class_tokens` those of
this package), `task` what a row gets and gives, `bench` and `kept_errors` what rows share; `metrics`, `comparison`,
`shift` and `table` turn records into figures. Studies of single questions are in `eval/`, beside the package.
"""
