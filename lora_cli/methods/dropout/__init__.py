"""What is dropped from ΔW's input while training. A file exports `make()`, which returns a module or None."""
