"""Attacks: one module per family. Importing a module registers its attacks."""
