"""Where data sets and base models come from, one file a kind."""
