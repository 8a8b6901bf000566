"""Models as other programs store them quantised, packed from the definitions of the formats: an oracle, not fast.

Every packer takes W [out, in] and gives the tensors of a layer and, in float64, what they say.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is in each place of a word, from the lowest bits on."""


def words(numbers: list[int], bits: int) -> list[int]:
    """One long number, cut into words of 32 bits with a sign."""
    whole = sum(number << bits * place for place, number in enumerate(numbers))
    count = math.ceil(len(numbers) * bits / 32)
    return [signed(whole >> 32 * place) for place in range(count)]


def signed(word: int) -> int:
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def steps(
    W: Tensor, group: Tensor, bits: int, even: bool, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], scales and zero points [out, groups], as of a program that rounds to the nearest."""
    codes, scales, zeros = torch.empty(W.shape, dtype=torch.int64), [], []
    top = 2**bits - 1
    for number in range(int(group.max()) + 1):
        inside = W[:, group == number].double()
        low, high = inside.amin(1).clamp(max=0), inside.amax(1).clamp(min=0)
        if even:
            high, low = torch.maximum(high, -low), -torch.maximum(high, -low)
        scale = ((high - low) / top).to(kind)
        zero = torch.full_like(scale, (top + 1) // 2) if even else (-low / scale.double()).round()
        codes[:, group == number] = (
            (inside / scale.double()[:, None] + zero.double()[:, None]).round().clamp(0, top).long()
        )
        scales.append(scale)
        zeros.append(zero.long())
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def dense(codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    return scales.double()[:, group] * (codes - zeros[:, group])


def gptq(
    W: Tensor, bits: int = 4, size: int = 32, act_order: bool = False, form: str = "gptq", even: bool = False
) -> Packed:
    out, inputs = W.shape
    group = torch.arange(inputs) // (inputs if size == -1 else size)
    if act_order:
        group = group[torch.randperm(inputs)]
    codes, scales, zeros = steps(W, group, bits, even, torch.float16)
    columns = [words(codes[row].tolist(), bits) for row in range(out)]
    stored = zeros - int(bits == 3 and form == "gptq")
    rows = [words((stored[:, number] % 2**bits).tolist(), bits) for number in range(zeros.shape[1])]
    if bits != 3 and form == "gptq":  # one less each, taken off whole words, as GPTQModel does
        ones = sum(1 << place for place in range(0, 32, bits))
        rows = [[signed(word - ones) for word in row] for row in rows]
    made = {
        "qweight": torch.tensor(columns, dtype=torch.int32).t(),
        "qzeros": torch.tensor(rows, dtype=torch.int32),
        "scales": scales.t(),
        "g_idx": group.int(),
    }
    return made, dense(codes, scales, zeros, group)


def awq(W: Tensor, size: int = 32) -> Packed:
    inputs = W.shape[1]
    group = torch.arange(inputs) // (inputs if size == -1 else size)
    codes, scales, zeros = steps(W, group, 4, False, torch.float16)

    def interleaved(numbers: Tensor) -> Tensor:
        eights = [numbers[start : start + 8].tolist() for start in range(0, len(numbers), 8)]
        return torch.tensor([words([each[i] for i in AWQ_ORDER], 4)[0] for each in eights])

    made = {
        "qweight": torch.stack([interleaved(codes[:, i]) for i in range(inputs)]).int(),
        "qzeros": torch.stack([interleaved(each) for each in zeros.t()]).int(),
        "scales": scales.t(),
    }
    return made, dense(codes, scales, zeros, group)


def fp8(
    W: Tensor,
    block: tuple[int, int] | None = (16, 24),
    name: str = "weight_scale_inv",
    kind: torch.dtype = torch.float32,
) -> Packed:
    """`block`: None for one scale of the whole layer."""
    rows, columns = block or W.shape
    codes, scales = torch.empty(W.shape, dtype=torch.float8_e4m3fn), []
    found = torch.empty(W.shape, dtype=torch.float64)
    for top in range(0, W.shape[0], rows):
        for left in range(0, W.shape[1], columns):
            place = slice(top, top + rows), slice(left, left + columns)
            scale = (W[place].abs().max() / 448).to(kind)
            codes[place] = (W[place] / scale.float()).to(torch.float8_e4m3fn)
            found[place] = codes[place].double() * scale.double()
            scales.append(scale)
    grid = torch.stack(scales).reshape(math.ceil(W.shape[0] / rows), -1)
    return {"weight": codes, name: grid if block else grid.reshape(())}, found


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            }
        },
    },
}
PACKERS: dict[str, Callable[[Tensor], Packed]] = {
    "gptq": lambda W: gptq(W, act_order=True),
    "awq": awq,
    "fp8": lambda W: fp8(W, (16, 16)),
    "compressed-tensors": lambda W: fp8(W, (1, W.shape[1]), "weight_scale", torch.bfloat16),
}


def store(
    plain: Path,
    folder: Path,
    config: Mapping[str, Any],
    pack: Callable[[Tensor], Packed],
    wanted: Callable[[str], bool] = lambda name: ".layers." in name and "norm" not in name,
    shards: int = 1,
) -> dict[str, Tensor]:
    """A model with the weights that are `wanted` packed; what all its weights are, in float64."""
    shutil.copytree(plain, folder)
    path, found, made = folder / "model.safetensors", {}, {}
    for name, tensor in load_file(path).items():
        made[name], found[name] = tensor, tensor.double()
        if name.endswith(".weight") and wanted(name):
            del made[name]
            tensors, found[name] = pack(tensor.float())
            made |= {f"{name.removesuffix('weight')}{key}": each for key, each in tensors.items()}
    about = json.loads((folder / "config.json").read_text()) | {"quantization_config": dict(config)}
    (folder / "config.json").write_text(json.dumps(about))
    save(path, made, shards)
    return found


def save(path: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """In one file, or in several with an index, whatever belongs together in which."""
    path.unlink(missing_ok=True)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    names = {
        name: f"model-{place % shards + 1:05}-of-{shards:05}.safetensors" for place, name in enumerate(whole)
    }
    if shards == 1:
        save_file(whole, path, metadata={"format": "pt"})
        return
    for file in set(names.values()):
        mine = {name: tensor for name, tensor in whole.items() if names[name] == file}
        save_file(mine, path.parent / file, metadata={"format": "pt"})
    (path.parent / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )
