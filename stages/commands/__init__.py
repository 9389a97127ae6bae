"""After the training: asking the models, merging, serving, releasing."""
