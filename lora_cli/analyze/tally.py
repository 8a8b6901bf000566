"""What operations hold and compute while they run: bytes alive, floating-point operations, bytes moved, launches.

Sees every operation of PyTorch's that is called within it, on real tensors or on fake ones.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operations
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
LOOKUPS = {aten.embedding, aten.index_select, aten.gather, aten.index, aten.scatter_add_, aten.index_copy}
"""They read as much as they write, not all of what they are given."""
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten.alias}
"""They touch no memory."""


@dataclass(frozen=True)
class Work:
    """What a device has to do."""

    products: float = 0.0
    """Floating-point operations of matrix products, two for a multiplication with its addition."""
    attention: float = 0.0
    """The same within attention; of what is causal, only what is computed."""
    moved: float = 0.0
    """Bytes that everything else reads and writes."""
    launches: float = 0.0
    """Operations, whatever their size."""

    def __add__(self, other: "Work") -> "Work":
        """One after the other."""
        return Work(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    def __sub__(self, other: "Work") -> "Work":
        """Without the other."""
        return self + other * -1

    def __mul__(self, times: float) -> "Work":
        """So many times."""
        return Work(*(each * times for each in self.numbers))

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """In order."""
        return self.products, self.attention, self.moved, self.launches

    @property
    def flops(self) -> float:
        """Of both kinds."""
        return self.products + self.attention


@dataclass(frozen=True)
class Phase:
    """What happened between two marks."""

    high: int
    """Bytes at the highest point, above those that were there when it began."""
    left: int
    """Bytes at its end, above the same."""
    work: Work


class Tally(TorchDispatchMode):
    """Counts as long as it is entered."""

    def __init__(self) -> None:
        """Nothing is alive, nothing was done."""
        super().__init__()
        self.live = self.peak = self.began = 0
        self.work = Work()
        """Since the last mark."""
        self.times = 1
        """How often what is seen once is done."""
        self.known: dict[int, int] = {}
        """Storage -> its bytes."""
        self.answers: Iterator[int] = iter(())
        """What tensors without numbers say when they are asked for their only one."""
        self.seen: list[Any] = []
        """Operations, in order."""
        self.experts = 0
        """Among how many a mixture that was taken apart shares out its tokens."""
        self.lengths: Sequence[int] = ()
        """Tokens of each document in the row at hand; a kernel for all of them is given that in a tensor."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let it run, then count."""
        kwargs = kwargs or {}
        if operation is aten._local_scalar_dense.default and (answer := next(self.answers, None)) is not None:
            return float(answer) if args[0].is_floating_point() else answer
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        for tensor in given:  # was there before, if it was not seen to be made
            self._hold(tensor.untyped_storage(), 0)
        packet = operation._overloadpacket
        made = self._without_numbers(packet, args, kwargs)
        if made is None:
            made = operation(*args, **kwargs)
        self.seen.append(packet)
        got = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
        for tensor in got:
            self._hold(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        if packet in VARLEN:
            done = Work(attention=VARLEN[packet](self.lengths, operation, args, kwargs), launches=1)
        else:
            done = _work(operation, args, kwargs, made, given, got)
        if done is not None:
            self.work += done if self.times == 1 else done * self.times
        return made

    def _without_numbers(self, packet: Any, args: Any, kwargs: Any) -> Tensor | None:
        """What comes of fake tensors where PyTorch has no rule for its shape; None where it has."""
        if not isinstance(args[0] if args else None, FakeTensor):
            return None
        if packet is aten._grouped_mm:  # its rule is for 16 bits alone
            a, b = args[:2]
            groups = kwargs.get("offs", args[2] if len(args) > 2 else None)
            return a.new_empty(*([len(groups)] if b.ndim == 2 else []), a.shape[-2], b.shape[-1])
        if packet is aten.nonzero and self.experts:  # which tokens an expert is given: as many as every other
            return args[0].new_empty(-(-args[0].numel() // self.experts), args[0].ndim, dtype=torch.int64)
        return None

    def mark(self) -> Phase:
        """End a phase and begin the next; returns the one that is over."""
        done = Phase(self.peak - self.began, self.live - self.began, self.work)
        self.began = self.peak = self.live
        self.work = Work()
        return done

    def _hold(self, storage: torch.UntypedStorage, count: int) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = count
        self.live += count
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._let_go, key).atexit = False

    def _let_go(self, key: int) -> None:
        self.live -= self.known.pop(key)


def _work(
    operation: Any, args: Any, kwargs: Any, made: Any, given: list[Tensor], got: list[Tensor]
) -> Work | None:
    """Of one operation; None of one that only looks at its tensors in another way."""
    packet = operation._overloadpacket
    if packet in FREE or _is_view(operation, given, got):
        return None
    if packet in ATTENTION:
        return Work(attention=ATTENTION[packet](operation, args, kwargs), launches=1)
    if packet in PRODUCTS:
        flops = PRODUCTS[packet](*args, **kwargs, out_val=made)
        return Work(attention=flops, launches=1) if packet is aten.bmm else Work(products=flops, launches=1)
    read = sum(_bytes(tensor) for tensor in (got if packet in LOOKUPS else given))
    return Work(moved=read + sum(_bytes(tensor) for tensor in got), launches=1)


def _is_view(operation: Any, given: list[Tensor], got: list[Tensor]) -> bool:
    if operation._schema.is_mutable:
        return False
    sources = {tensor.untyped_storage()._cdata for tensor in given}
    return all(tensor.untyped_storage()._cdata in sources for tensor in got)


def _bytes(tensor: Tensor) -> int:
    """As much as there is to read: what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _attention(backward: bool) -> Any:
    """Scores and values, 2 products of s × s × width a head, half of them where causal; backward 2.5 times that.

    That backward computes the scores again is what flash attention does. arXiv:2205.14135
    """

    def flops(operation: Any, args: Any, kwargs: Any) -> float:
        named = _named(operation, args, kwargs)
        query, key = named["query"], named["key"]
        pairs = query.shape[-2] * key.shape[-2] / (2 if named.get("is_causal") else 1)
        return (2.5 if backward else 1.0) * 4 * math.prod(query.shape[:-2]) * pairs * query.shape[-1]

    return flops


def _named(operation: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name."""
    names = (argument.name for argument in operation._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _kernels() -> Iterator[tuple[Any, Any]]:
    """The attention kernels that `scaled_dot_product_attention` picks from."""
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        yield getattr(aten, f"_scaled_dot_product_{kind}"), _attention(backward=False)
        yield getattr(aten, f"_scaled_dot_product_{kind}_backward"), _attention(backward=True)


ATTENTION = dict(_kernels())


def _varlen(backward: bool) -> Any:
    """The same over documents of several lengths, of which a window may let each token see a part only."""

    def flops(lengths: Sequence[int], operation: Any, args: Any, kwargs: Any) -> float:
        named = _named(operation, args, kwargs)
        tokens, heads, width = named["query"].shape
        assert sum(lengths) == tokens, "whoever asks for it has told which documents there are"
        behind = named["window_size"][0] + 1 or tokens
        pairs = sum(n**2 / 2 - max(n - behind, 0) ** 2 / 2 for n in lengths)
        return (2.5 if backward else 1.0) * 4 * heads * pairs * width

    return flops


VARLEN = {
    torch.ops.torch_attn._varlen_attn: _varlen(backward=False),
    torch.ops.torch_attn._varlen_attn_backward: _varlen(backward=True),
}
"""The kernels behind `torch.nn.attention.varlen`."""


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of experts: each row of a with the matrix of its own."""
    return 2 * a.numel() * b.shape[-1]


PRODUCTS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm], aten._grouped_mm: _grouped}
"""Operation -> its cost; with what the table of PyTorch lacks."""
