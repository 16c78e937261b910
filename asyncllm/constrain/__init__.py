"""Constrained output: what JSON schemas, regular expressions and grammars mean,
and following one output."""
