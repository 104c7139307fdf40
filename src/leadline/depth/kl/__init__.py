"""KL divergence from the base model along harmful answers."""
