"""The datasets: one module for each, and `tables` to read them from files or the hub."""
