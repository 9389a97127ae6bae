"""Tokens, log-probs and answers of a policy."""
