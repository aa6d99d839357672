"""Data sets: shards, the sources they are packed from, and pictures to tensors."""
