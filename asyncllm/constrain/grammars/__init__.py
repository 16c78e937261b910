"""Reads JSON schemas, regular expressions, EBNF and tool calls into grammar rules."""
