"""The report of a study: attack success rates, findings, examples."""
