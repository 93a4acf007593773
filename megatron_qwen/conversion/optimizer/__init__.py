"""Optimizer state and progress, which `reshard` carries so that a run goes on from the converted step."""
