"""The depth measures, one plug-in a file: the measurement, its sentence, its plot and tables."""
