"""The folder of a run: writes and reads its configuration, base and checkpoints."""
