"""The depth report: schema of depth.json, findings in sentences, and the page with plots and
tables."""
