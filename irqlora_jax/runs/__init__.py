"""The folder of a run: configuration, base, checkpoints, and how they are read again."""
