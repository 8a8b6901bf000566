"""Shapes of well-known models, as their config.json has them: what their cost depends on, without their weights."""

import json
from pathlib import Path
from typing import Any


def _llama(
    hidden: int, inner: int, blocks: int, heads: int, kv_heads: int, *, vocabulary: int = 128256, **rest: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
        **rest,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, vocabulary=49152, tie_word_embeddings=True),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, tie_word_embeddings=True, head_dim=64),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, tie_word_embeddings=True, head_dim=128),
    "Qwen2.5-7B": _llama(3584, 18944, 28, 28, 4, vocabulary=152064, model_type="qwen2"),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8),
    "Qwen2.5-14B": _llama(5120, 13824, 48, 40, 8, vocabulary=152064, model_type="qwen2"),
    "Qwen2.5-32B": _llama(5120, 27648, 64, 40, 8, vocabulary=152064, model_type="qwen2"),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8),
    "Llama-3.1-405B": _llama(16384, 53248, 126, 128, 8),
}


def write(name: str, folder: Path) -> str:
    """A folder with the config.json of a model and nothing else; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return str(folder)
