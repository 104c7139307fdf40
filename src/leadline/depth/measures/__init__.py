"""The depth measures. Each module is a plug-in: measurement, findings, plot and tables."""
