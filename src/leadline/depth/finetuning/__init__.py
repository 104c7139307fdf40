"""Fine-tuning attacks: train on a few examples, and evaluate after some of the steps."""
