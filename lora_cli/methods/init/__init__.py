"""The first ΔW. A file exports `init(delta, start)`, which fills the factors in place, in float32."""
