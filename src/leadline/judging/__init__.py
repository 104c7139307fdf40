"""Judging outside of a run: stored answers again, and a judge against human labels."""
