"""Instances that containerd keeps, each with a shim of its class."""
