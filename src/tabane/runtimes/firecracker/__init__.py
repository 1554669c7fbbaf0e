"""MicroVMs of Firecracker's: its API as a contract, its jailer, and the driver."""
