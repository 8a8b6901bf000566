"""Which tensors of ΔW train. A file exports `trains(name)`."""
