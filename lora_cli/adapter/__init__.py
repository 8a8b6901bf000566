"""The core: W0 + ΔW. Imports torch, nothing of transformers."""
