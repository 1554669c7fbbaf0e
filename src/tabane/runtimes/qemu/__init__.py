"""Machines with QEMU: the classes `microvm` and `vm`."""
