"""Devices, by what they can do. GPUs' rates are shares of their data sheets; this CPU is measured, see `calibrate`."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from lora_cli.errors import UserError

SUSTAINED, COPIED = 0.80, 0.90
"""Share of the data sheet that large matrix products and copies reach on an H100: 798 of 989 TFLOP/s, 3.0 of
3.35 TB/s. The others are taken to be alike, unmeasured."""
CPU_BANDWIDTH, CPU_LAUNCH = 31e9, 23.6e-6
"""Of two cores of an AMD EPYC, fitted on the fifteen runs of scripts/bench/growth.py that vary tokens, lengths and
rank, none of which is a workload that predictions are scored on. A launch holds all that costs the same whatever the
number of tokens, such as laying out weights for a product."""


@dataclass(frozen=True)
class Device:
    """What a device holds and does."""

    name: str
    memory: float
    """Bytes there are."""
    products: Mapping[str, float]
    """Type -> FLOP/s that its matrix products reach."""
    attention: float
    """FLOP/s that attention reaches."""
    bandwidth: float
    """Bytes/s that all else reads and writes."""
    launch: float
    """Seconds that an operation costs whatever its size."""
    overlaps: bool
    """Whether launches go on while it computes."""
    query_block: int
    key_block: int
    """Attention skips what is not causal in blocks of this size, not one by one."""
    floor: float
    """Bytes that a process takes before it holds a tensor."""
    gaps: float
    """Bytes that the allocator holds without use for each byte that activations take where all are kept: what is
    computed again comes and goes all the same."""

    def rate(self, dtype: str) -> float:
        """FLOP/s of matrix products in a type."""
        return self.products.get(dtype, self.products["float32"])


def _gpu(name: str, gigabytes: float, tera16: float, tera32: float, terabytes: float) -> Device:
    """From a data sheet: memory, dense TFLOP/s in 16 bits and in float32, and TB/s."""
    fast, slow = SUSTAINED * tera16 * 1e12, SUSTAINED * tera32 * 1e12
    products = {"bfloat16": fast, "float16": fast, "float32": slow}
    return Device(
        name=name,
        memory=gigabytes * 2**30,
        products=products,
        attention=0.45 * fast,  # FlashAttention 2 on an H100 at 8,192 tokens: 333 TFLOP/s
        bandwidth=COPIED * terabytes * 1e12,
        launch=6e-6,
        overlaps=True,
        query_block=128,
        key_block=128,
        floor=0.6 * 2**30,
        gaps=0.05,
    )


GPUS = {
    "H100": _gpu("H100", 79, 989, 67, 3.35),
    "H200": _gpu("H200", 139, 989, 67, 4.8),
    "A100": _gpu("A100", 79, 312, 19.5, 2.04),
    "4090": _gpu("4090", 23.5, 165, 83, 1.01),
    "L4": _gpu("L4", 22, 121, 30, 0.3),
}
"""Name -> device. Float32 without TF32."""
CPU_FLOOR, CPU_GAPS = 397e6, 0.916
"""Bytes of a process that has imported all that training needs, and the gaps in glibc's heap. Fitted on the sixteen
runs of scripts/bench/memory.py, none of which is a workload that predictions are scored on."""


def named(name: str) -> Device:
    """A GPU of the table.

    Raises:
        UserError: there is none of that name.
    """
    found = {each.lower(): device for each, device in GPUS.items()}.get(name.lower())
    if found is None:
        what, fix = f"no device '{name}' is known", f"one of {', '.join(GPUS)}, or cpu for this machine"
        raise UserError(what, where="--device", fix=fix)
    return found


def this_cpu(products: Mapping[str, float] | None = None, bandwidth: float = CPU_BANDWIDTH) -> Device:
    """The CPU of this machine; without measured rates of products it has memory only."""
    rates = products or {"float32": 0.0}
    return Device(
        name="this CPU",
        memory=_limit() or psutil.virtual_memory().total,
        products=rates,
        attention=rates[
            "float32"
        ],  # PyTorch's CPU kernels for 16 bits are passed over, see lora_cli/attention.py
        bandwidth=bandwidth,
        launch=CPU_LAUNCH,
        overlaps=False,
        query_block=64,
        key_block=512,
        floor=CPU_FLOOR,
        gaps=CPU_GAPS,
    )


def of_machine(device: torch.device) -> Device:
    """What the run would be on: the GPU that there is, as a device of the table if it is one, else this CPU."""
    if device.type != "cuda":
        return this_cpu()
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    known = next((gpu for key, gpu in GPUS.items() if key in name.replace("-", " ").split()), None)
    if known is None:  # how fast it is, `calibrate` finds out
        return replace(GPUS["L4"], name=name, memory=memory, products={"float32": 0.0})
    return replace(known, name=name, memory=memory)


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still have: of the GPU, or of the machine and of the group it is limited to."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available, limit = psutil.virtual_memory().available, _limit()
    return available if limit is None else min(available, limit - _used())


GROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
"""Where the second and the first version of control groups are, as a container sees its own."""


def _limit() -> float | None:
    """Bytes that the control group of this process allows; None where it allows all there are."""
    found = [*_numbers("memory.max"), *_numbers("memory.limit_in_bytes")]
    return min((each for each in found if each < psutil.virtual_memory().total), default=None)


def _used() -> float:
    """Bytes that the group has, without files in memory that make room when asked to."""
    used = [*_numbers("memory.current"), *_numbers("memory.usage_in_bytes")]
    stated = [line.split() for group in GROUPS for line in _lines(group / "memory.stat")]
    files = [float(line[1]) for line in stated if line[0] in ("inactive_file", "total_inactive_file")]
    return max(used, default=0.0) - max(files, default=0.0)


def _numbers(name: str) -> list[float]:
    """`max` is no number."""
    return [float(line) for group in GROUPS for line in _lines(group / name) if line.isdigit()]


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text(encoding="ascii").split("\n")[:-1]
    return []
