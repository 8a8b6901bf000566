"""Memory and time of `lora merge` on a random model that is made on the disk: python -m scripts.bench.merge [FOLDER]

The model has the shape of a Llama of 1.5 billion parameters in bfloat16 (3 GB), its adapter r = 16 on all linear
layers. Both are made tensor by tensor, so this needs little memory too, but 6.5 GB in FOLDER (default: the system's
own for temporary files), which are removed at the end. It prints the peak resident memory of a process that imports
what the merge imports, that of the one that merges, and its seconds.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from lora_cli import model as models
from lora_cli import stored
from lora_cli.adapter import peft_format, plan
from lora_cli.recipe.schema import AdapterRecipe, ModelRecipe
from lora_cli.stored import Entry
from tests import tiny

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32_000, "tie_word_embeddings": False,
}  # fmt: skip
IMPORTS = "import lora_cli.run.merge"
SAYING = (
    "import atexit, pathlib; atexit.register(lambda: print(pathlib.Path('/proc/self/status').read_text()))\n"
)
"""Not `ru_maxrss`, which counts the process that this one was forked from."""
MERGE = "from lora_cli.cli import main; main()"


def make_base(folder: Path) -> int:
    """Random weights, a tensor at a time; returns their number."""
    folder.mkdir()
    LlamaConfig(**SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    skeleton = models.skeleton(ModelRecipe(name=str(folder)))
    entries = [Entry(name, torch.bfloat16, tuple(p.shape)) for name, p in skeleton.named_parameters()]
    stored.write(folder, entries, lambda each: [torch.randn(each.shape).mul_(0.02).bfloat16()], 10**9)
    return models.size_of(skeleton)


def make_adapter(folder: Path, base: Path) -> None:
    """Random factors, in PEFT's format."""
    folder.mkdir()
    skeleton = models.skeleton(ModelRecipe(name=str(base)))
    made = plan.make(AdapterRecipe(r=16), skeleton, models.ends_of(skeleton))
    shapes = peft_format.shapes(made, skeleton)
    entries = [Entry(name, torch.float32, shape) for name, shape in shapes.items()]
    stored.write(folder, entries, lambda each: [torch.randn(each.shape) * 0.01], 10**12)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = peft_format.config_of(made, skeleton, str(base), None)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peak(code: str, *arguments: str) -> tuple[int, float]:
    """Largest resident memory of a Python process in MB, and its seconds."""
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", SAYING + code, *arguments], check=True, stdout=subprocess.PIPE
    )
    said = re.search(rb"VmHWM:\s+(\d+) kB", run.stdout)
    assert said is not None
    return int(said[1]) // 1024, time.perf_counter() - began


def main() -> None:
    """Make, merge, print, remove."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        numbers = make_base(folder / "base")
        make_adapter(folder / "adapter", folder / "base")
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        print(f"{numbers / 1e9:.2f} billion parameters, {size / 1e9:.2f} GB on the disk", flush=True)
        print(f"imports: {peak(IMPORTS)[0]} MB", flush=True)
        arguments = ("merge", str(folder / "adapter"), "--output", str(folder / "merged"))
        memory, seconds = peak(MERGE, *arguments)
        print(f"merge: {memory} MB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
