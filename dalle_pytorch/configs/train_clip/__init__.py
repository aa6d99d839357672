"""YAML of train_clip.py alone: models and experiments."""
