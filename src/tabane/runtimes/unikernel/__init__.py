"""Unikernels: a program and what it needs of a system, in a process of a few host calls."""
