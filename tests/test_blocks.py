"""The blocks of a transformer are found in models of every build, adapted or not, with experts in them or not."""

import pytest
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli import experts
from lora_cli.blocks import blocks
from tests import tiny
from tests.adapters import adapted


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "gemma3_text", "gpt_oss"])
def test_blocks_are_what_transformers_recomputes_from_the_bottom(kind):
    """Its own mark for them is the oracle; more experts than blocks are no blocks."""
    model = tiny.model(kind)
    experts.split(model)
    found = blocks(model)
    assert found == [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert found == [*(model.transformer.h if kind == "gpt2" else model.model.layers)]


def test_the_blocks_of_an_adapted_model_are_those_of_the_plain_one():
    model, _ = adapted("llama", method="hydra_lora")
    assert blocks(model) == [*model.model.layers]
