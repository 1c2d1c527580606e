"""The commands of `fewshot-diti`, a module each."""
