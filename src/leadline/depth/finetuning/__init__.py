"""Fine-tuning attacks: train on a little data, evaluate after each few steps."""
