"""Presets of few-shot runs and of representation learning, scripts each, and the training of the pocket in `pocket`."""
