"""Few-shot tables: which runs a grid has, what a run records, and how methods compare."""
