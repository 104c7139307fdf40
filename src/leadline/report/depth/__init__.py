"""The page of depth measures: findings, plots, tables."""
