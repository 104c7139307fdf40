"""Datasets of prompts: the embedded one, the public ones, and files of the user."""
