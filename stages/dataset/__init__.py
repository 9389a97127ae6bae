"""The table of pairs and the formatted data set: what later stages read."""
