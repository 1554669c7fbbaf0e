"""How much memory a machine has: pure."""

from __future__ import annotations

KERNEL_BYTES = 96 << 20
"""Beside what the app may use: the kernel's image and tables, the agent."""
ALIGNMENT = 2 << 20
OVERHEAD_BYTES = 96 << 20
"""What runs the machine may use so much itself, on top of the guest's memory."""


def memory_for(app_bytes: int) -> int:
    """A guest's memory, when its app may use that much."""
    return -(-(app_bytes + KERNEL_BYTES) // ALIGNMENT) * ALIGNMENT
