"""Checkpoints of containers by CRIU: `driver` has the engines with it."""
