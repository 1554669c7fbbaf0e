"""The contenders of the benchmark of middlecon: each one's server, and its clients in Python."""
