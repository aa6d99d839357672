"""YAML of generate.py alone: experiments."""
