"""lora: fine-tune language models with low-rank adapters, driven by YAML recipes."""

__version__ = "0.1.0"
