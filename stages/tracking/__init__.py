"""MLflow, and what a result came from. Nothing here changes an output."""
