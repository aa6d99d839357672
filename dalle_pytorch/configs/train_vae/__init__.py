"""YAML of train_vae.py alone: models and experiments."""
