"""Depth measures: how far a model's safety extends into its answers, and how well it withstands
other sampling settings, suffix search and fine-tuning.

`run.measure_depth` runs the measures. Each module of `measures/` is a plug-in; `kl/`, `gcg/` and
`finetuning/` implement the computations and can also be used without it.
"""
