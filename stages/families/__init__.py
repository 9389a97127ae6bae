"""What differs between families of models, one file for each; ``registry`` lists them."""
