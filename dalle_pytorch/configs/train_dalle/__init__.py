"""YAML of train_dalle.py alone: models and experiments."""
