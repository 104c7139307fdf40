"""How deep safety goes: along an answer, under sampling, against suffix search and fine-tuning.

`run.measure_depth` runs every measure of `measures/`, which are plug-ins; `kl/`, `gcg/` and
`finetuning/` hold what can also be used alone.
"""
