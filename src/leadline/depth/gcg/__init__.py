"""Greedy coordinate gradient (GCG): search for adversarial suffixes with the model's gradients."""
