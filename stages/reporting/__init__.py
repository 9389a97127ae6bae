"""The page, the model card and the words on them."""
