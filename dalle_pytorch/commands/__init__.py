"""The entry points, one module per command."""
