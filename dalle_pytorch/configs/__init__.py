"""The YAML of all entry scripts; a package, so that a wheel holds it and Hydra finds it."""
