"""Presets of few-shot runs, each a script, and the training of the pocket's networks in `pocket`."""
