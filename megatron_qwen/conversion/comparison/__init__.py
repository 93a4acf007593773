"""Compares two checkpoints: every bit, every digest, or what both compute from the same tokens."""
