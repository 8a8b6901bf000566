"""The factor in front of ΔW. A file exports `scale(alpha, r)`."""
