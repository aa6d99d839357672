"""YAML of evaluation.replicate alone: the experiments."""
