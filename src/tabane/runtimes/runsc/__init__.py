"""Class `sandbox` with gVisor: the driver is `tabane.runtimes.runsc.driver`."""
