"""What a token sees while training. A file exports `make(model)`: how to attend, None for the model's own way."""
