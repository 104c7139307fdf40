"""What matters for the safety of the models in a study (after arXiv 2601.03868).

subjects.py reads models with their cards and trials, matched.py compares pairs of models that
differ in one characteristic, factors.py regresses over all models, external.py measures attack
techniques, ranking.py ranks models, answers.py puts it together, in sentences.
"""
