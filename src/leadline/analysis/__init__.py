"""Statistics on a store: rates, intervals, agreement of judges, and correction for judge errors."""
