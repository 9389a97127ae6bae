"""Where results came from, and proof of it: dvc.lock, certificates, metadata. No stage uses it."""
