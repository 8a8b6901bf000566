"""The first ΔW. A file exports `init(delta, generator)`, which fills the factors in place, in float32 on the CPU."""
