"""The languages of constraints, read into rules: JSON schemas, regular expressions, EBNF, calls."""
