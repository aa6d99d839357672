"""Thin LightningModules, optimiser, schedules and callbacks."""
