"""Tabane: one operating system over many small data centers."""

__version__ = "0.1.0"
