"""Report pages: `study` for a study's results, `depth` for depth measures; `html` renders both."""
