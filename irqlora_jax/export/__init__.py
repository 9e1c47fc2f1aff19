"""Exports runs for transformers, PEFT and other programs."""
