"""What can be asked about an easy-VQA scene."""
