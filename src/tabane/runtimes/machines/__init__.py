"""What machines of all kinds are made of, whoever runs them: disks, kernel, agent, logs."""
