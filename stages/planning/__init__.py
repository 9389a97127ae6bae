"""What a run takes, by arithmetic, before it runs. Commands use it, no stage does."""
