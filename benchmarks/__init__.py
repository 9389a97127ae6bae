"""Measurements that anyone can rerun; results are in RESULTS.md, each with its command."""
