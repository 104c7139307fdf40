"""Judging outside of a run: re-judge stored responses, and check a judge against human labels."""
