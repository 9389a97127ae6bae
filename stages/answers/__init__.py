"""What a model answers, and how it does when the image is changed."""
