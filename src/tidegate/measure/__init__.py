"""The numbers of a run: percentiles, SLO attainment, its requests and its timeline as columns."""
