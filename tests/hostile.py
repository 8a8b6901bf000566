"""Files as somebody might make them who wants our commands to run his code, never end, or write where they should not.

Everything that could run does the same: it makes an empty file with the word CANARY in its name.
"""

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

CANARY = "a_canary_that_was_let_out"
"""A word that stands in all of their code."""


def code(folder: Path) -> str:
    """Python that leaves a trace in `folder`."""
    return f"open({str(folder / CANARY)!r}, 'w').close()"


class Running:
    """Pickles to a call of exec."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, (self.source,)


def pickled(source: str) -> bytes:
    return pickle.dumps(Running(source))


def zipped(source: str) -> bytes:
    """As torch.save writes it."""
    out = io.BytesIO()
    torch.save({"weight": Running(source)}, out)
    return out.getvalue()


def legacy(source: str) -> bytes:
    """As torch.save wrote it before the zip archives."""
    out = io.BytesIO()
    torch.save({"weight": Running(source)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def archived(source: str) -> bytes:
    """As the first versions of torch wrote it: a tar archive of pickles."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled(source))
            archive.addfile(member, io.BytesIO(pickled(source)))
    return out.getvalue()


def array(source: str) -> bytes:
    """A NumPy file of objects."""
    out = io.BytesIO()
    np.save(out, np.array([Running(source)], dtype=object), allow_pickle=True)
    return out.getvalue()


WAYS = (pickled, zipped, legacy, archived)
BINARIES = (
    "pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.bin", "model.pt", "model.pth", "model.ckpt",
    "adapter_model.bin", "adapter_model.pt", "adapter.pt", "training_args.bin", "rng_state.pth", "rng_state_0.pth",
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", ".metadata", "__0_0.distcp", "data.pkl",
    "random_states_0.pkl", "custom_checkpoint_0.pkl", "new_embeddings.bin", "tokenizer.pkl", "lora.pt",
)  # fmt: skip
MODULES = (
    "modeling_theirs.py", "configuration_theirs.py", "tokenization_theirs.py", "processing_theirs.py",
    "custom_generate/generate.py", "handler.py", "hubconf.py", "dataset.py", "rows.py", "setup.py", "conftest.py",
    "__init__.py", "sitecustomize.py", "usercustomize.py", "json.py", "torch.py", "random.py", "jinja2.py",
    "lora_cli.py", "numpy/__init__.py", "theirs.py",
)  # fmt: skip


def litter(folder: Path, traces: Path) -> None:
    """Everything that some program would run, beside what is there."""
    for number, name in enumerate(BINARIES):
        _write(folder / name, WAYS[number % len(WAYS)](code(traces)))
    for name in MODULES:
        _write(folder / name, f"{code(traces)}\nclass Theirs: pass\n".encode())
    _write(folder / "embeddings.npy", array(code(traces)))
    _write(folder / "custom_generate/requirements.txt", b"")
    _write(folder / "pytorch_model.bin.index.json", b'{"weight_map": {"a": "pytorch_model.bin"}}')


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def twice(path: Path, key: str, value: Any) -> None:
    """Give a key of a JSON file a second time, with another value."""
    path.write_text(
        path.read_text().rstrip().removesuffix("}") + f", {json.dumps(key)}: {json.dumps(value)}}}"
    )


# A model or adapter that wants its own code

AUTO = {
    "AutoConfig": "configuration_theirs.Theirs",
    "AutoModelForCausalLM": "modeling_theirs.Theirs",
    "AutoTokenizer": ["tokenization_theirs.Theirs", "tokenization_theirs.Theirs"],
    "AutoProcessor": "processing_theirs.Theirs",
}


def with_own_code(folder: Path) -> None:
    """Wherever transformers looks for code of the model's own; what it would replace is there as well."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        change(
            folder / name,
            auto_map=AUTO,
            custom_generate="custom_generate",
            custom_pipelines={"x": {"impl": "theirs.Theirs"}},
        )
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": AUTO, "processor_class": "Theirs"}))


# safetensors: 8 bytes with the length of the header, the header, the tensors


def header(content: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(start: int, end: int, shape: tuple[int, ...] = (2, 2), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "a header of 2^63 bytes": lambda: header({}, length=2**63),
    "a header of 2^64-1 bytes": lambda: header({}, length=2**64 - 1),
    "a header longer than the file": lambda: header({"a": tensor(0, 16)}, bytes(16), length=10_000),
    "a header of 100 MB of nothing": lambda: header(b"{" + b" " * 100_000_000 + b"}"),
    "a header of 99 MB of nothing": lambda: header(b"{" + b" " * 99_000_000 + b"}"),
    "a header of 10 MB of names": lambda: header({f"layer.{i}": tensor(0, 16) for i in range(150_000)}, bytes(16)),
    "a header that nests": lambda: header(b'{"a":' * 50_000),
    "a header that is no JSON": lambda: header(b"\xff\xfe\x00"),
    "a header that is a list": lambda: header([]),
    "offsets beyond the end": lambda: header({"a": tensor(0, 2**40)}, bytes(16)),
    "offsets of 2^64": lambda: header({"a": tensor(0, 2**64)}, bytes(16)),
    "offsets below zero": lambda: header({"a": tensor(-16, 0)}, bytes(16)),
    "offsets the wrong way round": lambda: header({"a": tensor(16, 0)}, bytes(16)),
    "offsets that overlap": lambda: header({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
    "offsets that leave a hole": lambda: header({"a": tensor(0, 16), "b": tensor(32, 48)}, bytes(48)),
    "a shape that does not fill its bytes": lambda: header({"a": tensor(0, 16, (3, 3))}, bytes(16)),
    "a shape whose product overflows": lambda: header({"a": tensor(0, 16, (2**62, 8))}, bytes(16)),
    "a shape below zero": lambda: header({"a": tensor(0, 16, (-2, -2))}, bytes(16)),
    "an unknown type": lambda: header({"a": tensor(0, 16, dtype="O")}, bytes(16)),
    "the same name twice": lambda: header(
        b'{"a":' + json.dumps(tensor(0, 16)).encode() + b',"a":' + json.dumps(tensor(16, 32)).encode() + b"}", bytes(32)
    ),
    "a pickle": lambda: pickled(f"{CANARY} = 1"),
    "an archive of torch": lambda: zipped(f"{CANARY} = 1"),
    "nothing": lambda: b"",
}  # fmt: skip

# Chat templates

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch TRACE') }}",
    "{{ lipsum.__globals__['os'].popen('touch TRACE').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
    "{% set x = namespace(__class__=1) %}{{ x.__class__.__mro__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ ('{0.__class__.__base__}' | attr('format'))(messages) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ raise_exception.__globals__['os'].system('touch TRACE') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ tojson.__globals__ }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch TRACE') }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.__setitem__(0, 1) }}{{ messages.append(1) }}",
    "{% for f in [].__class__.__base__.__subclasses__() %}{{ f }}{% endfor %}",
)
BOMBS = {
    "longer than 2 seconds": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = i * j %}{% endfor %}{% endfor %}",
        "{{ 7 ** 99999999 }}",
    ),
    "256 MB of memory": (
        "{{ 'x' * 600000000 }}",
        "{{ '%599999999d' % 1 }}",
        "{{ '{:>600000000}'.format(1) }}",
        "{% set ns = namespace(x='xxxxxxxxxx') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ),
    "more than 1 MB": ("{% for i in range(99999) %}{{ messages[0].content ~ messages[0].content }}{% endfor %}",),
}  # fmt: skip
