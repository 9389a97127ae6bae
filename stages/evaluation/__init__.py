"""Metrics, and the statistics behind them."""
