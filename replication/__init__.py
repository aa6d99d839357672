"""The paper's claims at small scale: arms, seeds, a verdict, a plot (docs/replication.md)."""
