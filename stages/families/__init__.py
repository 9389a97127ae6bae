"""What differs between families of models, a file for each; ``known`` lists them."""
