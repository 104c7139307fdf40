"""Greedy coordinate gradient: adversarial suffixes from gradients."""
