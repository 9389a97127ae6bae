"""What differs between model families, one file each."""
