"""The command line: one binary, one module per verb, nothing decided here."""
