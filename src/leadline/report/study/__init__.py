"""The page of a study: attack success rates, findings, examples."""
