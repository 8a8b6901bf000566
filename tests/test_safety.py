"""Strangers' files run nothing, write nothing elsewhere, never hang a command, and learn no secret.

All of them are opened by our commands in one process under an audit hook (tests/watched.py), without HF_HUB_OFFLINE:
whoever asked the network would be seen.
"""

import ast
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_cli import io_ops
from lora_cli.data import template, template_trial
from lora_cli.errors import ExitCode, UserError
from tests import hostile, on_disk, tiny
from tests.hostile import CANARY

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"{i} plus 2?", "completion": str(i + 2)} for i in range(8)]
SECRETS = {
    "HF_TOKEN": "hf_Zq81secretsecretsecret",
    "WANDB_API_KEY": "Zq82secretsecretsecret",
    "AWS_SECRET_ACCESS_KEY": "Zq83secretsecretsecret",
    "HTTPS_PROXY": "http://user:Zq84secretsecretsecret@127.0.0.1:9",
}
ADDRESS = "https://user:Zq85secretsecretsecret@huggingface.co/a/b"
WORDS = [f"Zq8{number}secret" for number in range(1, 6)]
LARGE = 10**6
"""Bytes of a file that is too large to be worth a hash."""


class World:
    """Strangers' files, the folders that may be written in, and the steps of a plan."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.theirs, self.traces, self.elsewhere = (self._made(n) for n in ("theirs", "traces", "elsewhere"))
        self.out, self.cache, self.scratch = (self._made(name) for name in ("out", "cache", "scratch"))
        self.steps: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.sizes: dict[str, int] = {}
        self.model = on_disk.model(self.theirs / "model")
        self.rows = on_disk.rows(self.theirs / "rows.jsonl", *ROWS)
        self.data = {"train": str(self.rows), "eval": str(self.rows)}
        self.adapter = on_disk.adapter(self.theirs / "run", self.model, 3, self.data, **self.sections())
        self.recipe = self.recipe_for("good", self.model)
        (self.elsewhere / "precious").write_text("precious")

    def _made(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder

    def sections(self) -> dict[str, Any]:
        return {
            "train": {"max_steps": 2, "batch_size": 4, "save_steps": 1},
            "eval": {"metrics": ["loss", "exact_match"], "max_new_tokens": 3},
            "adapter": {"r": 4},
        }

    def recipe_for(self, name: str, model: Path | str, **data: Any) -> Path:
        return on_disk.recipe(self.theirs / f"{name}.yaml", model, {**self.data, **data}, **self.sections())

    def step(self, name: str, *argv: object) -> None:
        """One command; what it writes goes to a place of its own unless it says where."""
        arguments = [str(each) for each in argv]
        if argv[0] in ("train", "eval", "merge", "export") and "--output" not in arguments:
            arguments += ["--output", str(self.out / f"{len(self.steps)}")]
        self.steps.append({"name": name, "argv": arguments, "stdin": "hello\n/base\nhello again\n"})

    def with_model(self, name: str, model: Path, *, weights: bool = True) -> None:
        """All commands that open a model; of a recipe with `name`."""
        recipe = self.recipe_for(name.replace("/", "-"), model)
        self.step(name, "check", recipe)
        self.step(name, "train", recipe)
        self.step(name, "generate", model, "--prompt", "hi", "--max-new-tokens", "2")
        self.step(name, "chat", model, "--max-new-tokens", "2")
        self.step(name, "eval", model, "--recipe", recipe)
        self.step(name, "merge", self.adapter, "--base", model)
        self.step(name, "export", self.adapter, "--base", model)

    def with_adapter(self, name: str, adapter: Path) -> None:
        """All commands that open an adapter."""
        self.step(name, "generate", adapter, "--prompt", "hi", "--max-new-tokens", "2")
        self.step(name, "chat", adapter, "--max-new-tokens", "2")
        self.step(name, "eval", adapter)
        self.step(name, "merge", adapter)
        self.step(name, "export", adapter)

    def with_data(self, name: str, rows: Path) -> None:
        """All commands that open rows."""
        recipe = self.recipe_for(name.replace("/", "-"), self.model, train=str(rows), eval=str(rows))
        self.step(name, "check", recipe)
        self.step(name, "train", recipe)
        self.step(name, "eval", self.model, "--recipe", recipe)
        self.step(name, "generate", self.model, "--input", rows, "--max-new-tokens", "2")

    def copied(self, source: Path, name: str) -> Path:
        folder = self.theirs / name.replace(" ", "_").replace("/", "_")
        shutil.copytree(source, folder)
        return folder

    def run(self) -> None:
        """Carry out the plan, in the middle of the strangers' files."""
        self.before = self.fixed()
        allowed = [str(folder) for folder in (self.out, self.cache, self.scratch)]
        plan = {"allowed": allowed, "hostile": str(self.theirs), "canary": CANARY, "steps": self.steps}
        (self.root / "plan.json").write_text(json.dumps(plan))
        files = [str(self.root / name) for name in ("plan.json", "results.jsonl")]
        subprocess.run(
            [sys.executable, "-P", "-c", "from tests.watched import main; main()", *files],
            env=self._environment(),
            cwd=self.theirs,
            check=True,
        )
        self.control, *results = [json.loads(line) for line in Path(files[1]).read_text().splitlines()]
        self.results = [step | result for step, result in zip(self.steps, results, strict=True)]

    def fixed(self) -> dict[str, str]:
        """What no command may change: names, and the hash of each content."""
        folders = (self.theirs, self.elsewhere, self.traces)
        return {str(path): _hash(path) for folder in folders for path in folder.rglob("*")}

    def _environment(self) -> dict[str, str]:
        mine = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        paths = {"PYTHONPATH": str(ROOT), "LORA_CACHE": str(self.cache), "TMPDIR": str(self.scratch)}
        return mine | SECRETS | paths | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": str(self.scratch / "hf")}


def _hash(path: Path) -> str:
    """Nothing of links, folders, and what is too large."""
    small = path.is_file() and not path.is_symlink() and path.stat().st_size < LARGE
    return hashlib.sha256(path.read_bytes()).hexdigest() if small else ""


# The corpus


def _littered(world: World) -> None:
    """Pickles and modules lie beside everything that is opened; all of it works, and nothing of them runs."""
    model, run = world.copied(world.model, "littered"), world.copied(world.adapter, "littered_run")
    rows = world.theirs / "littered_rows"
    rows.mkdir()
    shutil.copy(world.rows, rows / "data.jsonl")
    for folder in (model, run, run / "adapter", run / "checkpoints" / "step-000001", rows, world.theirs):
        hostile.litter(folder, world.traces)
    for name in (
        "pytorch_model.bin.index.json",
        "custom_generate/requirements.txt",
    ):  # would be read as data, and are none
        (rows / name).unlink()
    for folder in (run, run / "adapter"):
        on_disk.recipe(folder / "recipe.yaml", model, world.data, **world.sections())
    hostile.change(run / "adapter" / "adapter_config.json", base_model_name_or_path=str(model))
    world.with_model("littered model", model)
    world.with_adapter("littered adapter", run)
    world.with_data("littered rows", rows)
    again = world.out / "again"
    world.step("littered run", "train", world.recipe, "--output", again)
    world.step("littered run", "train", world.recipe, "--output", again, "--resume")
    # As if it had been killed before it saved its adapter, and then somebody had been there.
    copies = [str(folder) for folder in (again, again / "checkpoints" / "step-000002")]
    litter = world.theirs / "litter"
    hostile.litter(litter, world.traces)
    world.steps[-1] |= {"remove": str(again / "adapter"), "copy": str(litter), "to": copies}


def _own_code(world: World) -> None:
    model = world.copied(world.model, "own_code")
    hostile.litter(model, world.traces)
    hostile.with_own_code(model)
    world.with_model("own code that ours replaces", model)
    for name, change in {
        "a type of its own": {"model_type": "theirs"},
        "no type": {"model_type": None},
        "weights in a pickle": {"transformers_weights": "adapter_model.bin"},
        "weights elsewhere": {"transformers_weights": "../model/model.safetensors"},
        "attention from the Hub": {"attn_implementation": "theirs/attention"},
        "experts from the Hub": {"experts_implementation": "theirs/experts"},
        "weights of another kind": {"quantization_config": {"quant_method": "theirs"}},
        "a number that is none": {"hidden_size": "many"},
        "a number that is null": {"num_attention_heads": None},
    }.items():
        changed = world.copied(model, name)
        hostile.change(changed / "config.json", **change)
        world.with_model(f"refused: {name}", changed)


def _broken_models(world: World) -> None:
    def variant(name: str) -> Path:
        return world.copied(world.model, f"m_{name}")

    for name, text in {
        "cut": '{"model_type": "lla',
        "list": "[]",
        "deep": "[" * 99_999,
        "nul": "\0",
        "empty": "",
    }.items():
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            folder = variant(f"{file} {name}")
            (folder / file).write_text(text)
            world.step(f"refused: {file} {name}", "check", world.recipe_for(f"{file}-{name}", folder))
            world.step(f"refused: {file} {name}", "generate", folder, "--prompt", "hi")
    for name in ("pytorch_model.bin", "../rows.safetensors", "/etc/x.safetensors", "sub/model.safetensors"):
        folder = variant(f"index {name}")
        weights = json.dumps(
            {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), name)}
        )
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(weights)
        hostile.litter(folder, world.traces)
        world.with_model(f"refused: weights in {name}", folder)
    folder = variant("a pickle alone")
    (folder / "model.safetensors").unlink()
    hostile.litter(folder, world.traces)
    world.with_model("refused: weights in pickles alone", folder)
    folder = variant("an adapter for a base")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "theirs/base", "peft_type": "LORA"})
    )
    world.step("refused: a base that is an adapter", "train", world.recipe_for("adapter-base", folder))
    world.step("refused: a base that is an adapter", "merge", world.adapter, "--base", folder)


def _good(world: World) -> None:
    """What is loaded once, and takes its memory once."""
    world.with_adapter("good", world.adapter)


def _broken_adapters(world: World) -> None:
    def variant(name: str) -> Path:
        return world.copied(world.adapter / "adapter", f"a_{name}")

    for name, content in hostile.SAFETENSORS.items():
        folder = variant(name)
        world.sizes[f"refused: adapter with {name}"] = len(raw := content())
        (folder / "adapter_model.safetensors").write_bytes(raw)
        world.with_adapter(f"refused: adapter with {name}", folder)
    for name, change in {
        "a type of its own": {"peft_type": "theirs.Theirs"},
        "a base that is an address": {"base_model_name_or_path": ADDRESS},
        "a base that is missing": {"base_model_name_or_path": "../nowhere"},
    }.items():
        folder = variant(name)
        hostile.litter(folder, world.traces)
        hostile.change(folder / "adapter_config.json", **change)
        (folder / "recipe.yaml").unlink()
        world.with_adapter(f"refused: adapter with {name}", folder)
    folder = variant("auto_mapping")
    hostile.litter(folder, world.traces)
    mapping = {"base_model_class": "Theirs", "parent_library": "theirs"}
    hostile.change(folder / "adapter_config.json", auto_mapping=mapping)
    world.with_adapter("an adapter that names a module", folder)
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("lora.json", "method")):
        folder = variant(f"{key} twice")
        hostile.twice(folder / file, key, "theirs/base")
        world.with_adapter(f"refused: {file} says {key} twice", folder)
    folder = variant("pickle")
    (folder / "adapter_model.safetensors").unlink()
    hostile.litter(folder, world.traces)
    world.with_adapter("refused: adapter in a pickle", folder)


def _broken_weights(world: World) -> None:
    """A header at a time, each opened by two of the commands in turn; all of them load models in the same way."""
    commands: list[Callable[[Path, str], tuple[object, ...]]] = [
        lambda model, name: ("train", world.recipe_for(name, model)),
        lambda model, name: ("generate", model, "--prompt", "hi"),
        lambda model, name: ("merge", world.adapter, "--base", model),
        lambda model, name: ("chat", model),
        lambda model, name: ("export", world.adapter, "--base", model),
        lambda model, name: ("eval", model, "--recipe", world.recipe_for(name, model)),
    ]
    for number, (name, content) in enumerate(hostile.SAFETENSORS.items()):
        folder = world.copied(world.model, f"w_{name}")
        world.sizes[f"refused: model with {name}"] = len(raw := content())
        (folder / "model.safetensors").write_bytes(raw)
        for turn in (number, number + 3):
            command = commands[turn % len(commands)]
            world.step(f"refused: model with {name}", *command(folder, f"weights-{number}"))


def _templates(world: World) -> None:
    for number, text in enumerate(
        (*hostile.ESCAPES, *(each for found in hostile.BOMBS.values() for each in found))
    ):
        text = text.replace("TRACE", str(world.traces / CANARY))
        folder = world.copied(world.model, f"template_{number}")
        (folder / "chat_template.jinja").write_text(text)
        kind = "template" if number < len(hostile.ESCAPES) else "refused: template"
        recipe = world.recipe_for(f"template-{number}", folder)
        world.step(f"{kind} {text[:60]}", "check", recipe)
        world.step(f"{kind} {text[:60]}", "generate", folder, "--prompt", "hi", "--max-new-tokens", "2")
        file = world.theirs / f"template_{number}.jinja"
        file.write_text(text)
        named = world.recipe_for(f"named-{number}", world.model, chat_template=str(file))
        world.step(f"{kind} {text[:60]}", "eval", world.model, "--recipe", named)


def _links(world: World) -> None:
    """Folders of runs in which a link waits to be written through."""
    for name in ("log.jsonl", ".lock", "recipe.yaml", "adapter", "checkpoints", "cache", "loss.png"):
        run = world.out / f"link_{name}"
        run.mkdir()
        target = world.elsewhere / ("precious" if "." in name else "")
        (run / name).symlink_to(target)
        world.step(f"refused: {name} is a link", "train", world.recipe, "--output", run)
        world.step(f"refused: {name} is a link", "train", world.recipe, "--output", run, "--resume")
    for name, target in (("folder", world.elsewhere), ("nowhere", world.elsewhere / "new")):
        (world.out / f"to_{name}").symlink_to(target)
        for command in (("train", world.recipe), ("merge", world.adapter), ("export", world.adapter)):
            world.step(f"refused: output is a link to {name}", *command, "--output", world.out / f"to_{name}")
    for name in ("log.jsonl", ".lock", "cache"):
        run = world.out / f"pipe_{name}"
        run.mkdir()
        os.mkfifo(run / name)
        world.step(f"refused: {name} is a pipe", "train", world.recipe, "--output", run)
    for folder, names in (("twin", ("log.jsonl", "loss.png")), ("locked", (".lock",))):
        (world.out / folder).mkdir()
        for name in names:
            (world.out / folder / name).hardlink_to(world.elsewhere / "precious")
    world.step("files with a second name elsewhere", "train", world.recipe, "--output", world.out / "twin")
    locked = world.out / "locked"
    world.step("refused: a lock with a second name elsewhere", "train", world.recipe, "--output", locked)
    (world.out / "inside").mkdir()
    (world.out / "parent").symlink_to(world.out / "inside")
    world.step("a link on the way", "merge", world.adapter, "--output", world.out / "parent" / "merged")
    world.step("a link on the way", "train", world.recipe, "--output", world.out / "parent" / "run")
    (world.out / "predictions.jsonl").symlink_to(world.elsewhere / "precious")
    world.step(
        "predictions in place of a link", "eval", world.adapter, "--output", world.out / "predictions.jsonl"
    )


def _secrets(world: World) -> None:
    for name in ("check", "train"):
        world.step("refused: an address as a model", name, world.recipe_for("address", ADDRESS))
        world.step("refused: an address as data", name, world.recipe_for("data", world.model, train=ADDRESS))
    world.step("refused: an address as a model", "generate", ADDRESS, "--prompt", "hi")
    world.step("refused: a secret", "check", world.recipe_for("secret", world.model, system="${HF_TOKEN}"))


def opened(root: Path) -> World:
    """The corpus, after all commands have opened it."""
    made = World(root)
    for part in (
        _good,
        _broken_adapters,
        _broken_weights,
        _broken_models,
        _own_code,
        _templates,
        _links,
        _secrets,
        _littered,
    ):
        part(made)
    made.run()
    return made


def the_watcher_sees_what_it_watches_for(world: World) -> None:
    assert all(world.control.values()), world.control
    assert len(world.control) > 8


def no_file_that_a_command_opens_runs_code_or_opens_a_socket_or_writes_elsewhere(world: World) -> None:
    assert [(step["name"], step["argv"], step["seen"]) for step in world.results if step["seen"]] == []
    assert list(world.traces.iterdir()) == []
    assert world.fixed() == world.before
    assert len(world.results) > 300


def every_command_ends_with_a_published_code_and_never_with_a_traceback(world: World) -> None:
    wrong = [
        (step["name"], step["argv"], step["code"], (step["raised"] or step["said"])[-2000:])
        for step in world.results
        if step["raised"] or step["code"] not in set(ExitCode) or "Traceback" in step["said"]
    ]
    assert wrong == []


def what_is_harmless_works_and_what_is_not_is_refused(world: World) -> None:
    def wrong(step: dict[str, Any]) -> bool:
        if step["name"].startswith("template ") or ("weights" in step["name"] and step["argv"][0] == "check"):
            return False  # a template may refuse a row or write nonsense; `check` opens no weights
        return (step["code"] == 0) == step["name"].startswith("refused: ")

    found = [(step["name"], step["argv"], step["said"]) for step in world.results if wrong(step)]
    assert found == [], "\n".join(map(str, found))


def no_header_takes_more_memory_than_its_file(world: World) -> None:
    opened = [step for step in world.results if step["name"] in world.sizes]
    assert {step["name"] for step in opened} == world.sizes.keys()
    grown = [(step["name"], step["grown"] - world.sizes[step["name"]]) for step in opened]
    assert [each for each in grown if each[1] > 64 * 2**20] == []


def a_template_that_needs_too_much_is_refused_with_what_it_needs(world: World) -> None:
    for reason, texts in hostile.BOMBS.items():
        for text in texts:
            said = [
                step["said"] for step in world.results if step["name"] == f"refused: template {text[:60]}"
            ]
            assert said
            assert all(reason in each and "data.chat_template" in each for each in said), (text, said)


def no_secret_is_in_what_is_written_or_said(world: World) -> None:
    assert any("***@huggingface.co" in step["said"] for step in world.results)
    for step in world.results:
        assert not any(word in step["said"] + (step["raised"] or "") for word in WORDS), step
    for path in (path for folder in (world.out, world.cache, world.scratch) for path in folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            assert not any(word.encode() in content for word in WORDS), path


def test_strangers_files_do_no_harm(tmp_path):
    """One test, so that the corpus is opened once however the tests are shared out among processes."""
    world = opened(tmp_path)
    the_watcher_sees_what_it_watches_for(world)
    no_file_that_a_command_opens_runs_code_or_opens_a_socket_or_writes_elsewhere(world)
    every_command_ends_with_a_published_code_and_never_with_a_traceback(world)
    what_is_harmless_works_and_what_is_not_is_refused(world)
    no_header_takes_more_memory_than_its_file(world)
    a_template_that_needs_too_much_is_refused_with_what_it_needs(world)
    no_secret_is_in_what_is_written_or_said(world)


# What our own code may not say

SOURCES = sorted((ROOT / "lora_cli").rglob("*.py")) + sorted((ROOT / "scripts").glob("*.py"))
RUNNING = {"eval", "exec", "compile", "__import__", "breakpoint"}
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive"),
    *("os.system", "os.popen", "subprocess.getoutput"),
}
FROM_PRETRAINED = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, and what is called, as it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def complaints(path: Path) -> Iterator[str]:
    """What a file does that no file of ours may."""
    for name, call in calls(path):
        where = f"{path}:{call.lineno}: {name}"
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        trust = given.get("trust_remote_code")
        if trust is not None and not (isinstance(trust, ast.Constant) and trust.value is False):
            yield f"{where} trusts remote code"
        loads = name.partition(".")[0] in FROM_PRETRAINED and name.partition(".")[2] in (
            "from_pretrained",
            "from_config",
        )
        if loads and trust is None:  # not said, transformers asks a person at a terminal, who may say yes
            yield f"{where} leaves remote code open"
        if name in RUNNING or name in LOADERS or name.endswith(".extractall"):
            yield f"{where} may run what it reads"
        if "shell" in given:
            yield f"{where} starts a shell"
    for node in ast.walk(ast.parse(path.read_text())):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (
            f"{path}:{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in PICKLES
        )


def test_no_call_trusts_remote_code_or_runs_what_it_reads():
    assert [complaint for path in SOURCES for complaint in complaints(path)] == []
    loaded = [
        name for path in SOURCES for name, _ in calls(path) if name.partition(".")[0] in FROM_PRETRAINED
    ]
    assert len(loaded) >= 4, "the names that are looked for are those that are used"


@pytest.mark.parametrize(
    "line",
    [
        "AutoConfig.from_pretrained('a')",
        "AutoConfig.from_pretrained('a', trust_remote_code=True)",
        "AutoTokenizer.from_pretrained('a', trust_remote_code=flag)",
        "load(trust_remote_code=not False)",
        "torch.load('a')",
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "archive.extractall('.')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_a_line_that_no_file_of_ours_may_have_is_found(tmp_path, line):
    (tmp_path / "a.py").write_text(line)
    assert len(list(complaints(tmp_path / "a.py"))) == 1


# Chat templates, in this process

TEMPLATES = (
    tiny.CHATML,
    "{{ bos_token }}{% generation %}{% for m in messages %}{{ m | tojson }}{% endfor %}{% endgeneration %}"
    "{{ eos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content | trim }}"
    "{% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ strftime_now('%Y')[:0] }}"
    "{% if add_generation_prompt %}A:{% endif %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ dict(role=m.role) | tojson }}{% endfor %}",
)


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_is_tried_out_in_what_transformers_renders_it_in(text):
    tokenizer = tiny.tokenizer(text)
    tokens = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
    }
    for variables in template_trial.conversations():
        tried = template_trial.environment().from_string(text).render(**variables, **tokens)
        given = copy.deepcopy(variables)
        assert tried == tokenizer.apply_chat_template(given.pop("messages"), tokenize=False, **given)


def test_a_template_is_tried_out_once_and_only_where_it_is_used(monkeypatch):
    tried = []

    def run(command, **how):
        tried.append(json.loads(how["input"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(template.subprocess, "run", run)
    text = tiny.CHATML + "{# another one #}"
    tokenizer = tiny.tokenizer(text)
    assert template.use(tokenizer, "none") is False
    assert tried == []
    for _ in range(3):
        template.render(tokenizer, [{"role": "user", "content": "a"}], None, "a:1", generate=True)
    assert tried == [text]


WRONG = (
    "{{ [][3].a.b }}",
    "{{ ''.encode('nonsense') }}",
    "{{ '{1}'.format(0) }}",
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '(' | int",
    "{{ {}.popitem() }}",
)


@pytest.mark.parametrize("text", WRONG)
def test_whatever_goes_wrong_in_a_template_is_an_error_of_the_row(text):
    with pytest.raises(UserError, match=r"does not accept this conversation: .+") as caught:
        template.render(tiny.tokenizer(text), [{"role": "user", "content": "a"}], None, "a:1", generate=True)
    assert caught.value.where == "a:1"


# Links, and what people are told


def test_a_lock_and_a_log_are_never_opened_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "link").symlink_to(precious)
    for act in (
        io_ops.held(tmp_path / "link").__enter__,
        lambda: io_ops.append_line(tmp_path / "link", "x"),
    ):
        with pytest.raises(UserError) as caught:
            act()
        assert caught.value.code == ExitCode.DISK
    io_ops.write_text(tmp_path / "link", "new")
    assert precious.read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()


def test_a_link_put_in_place_of_a_folder_while_it_is_made_is_not_written_through(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(UserError) as caught:
        _make_and_swap(tmp_path / "made", elsewhere)
    assert caught.value.code == ExitCode.DISK
    assert list(elsewhere.iterdir()) == []


def _make_and_swap(folder: Path, elsewhere: Path) -> None:
    with io_ops.new_folder(folder) as made:
        (made / "file").write_text("x")
        folder.symlink_to(elsewhere)


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious").write_text("")
    for name in ("link", ".tmp-link-1-0123abcd"):
        (tmp_path / name).symlink_to(folder)
    io_ops.remove(tmp_path / "link")
    io_ops.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "precious").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot load https://user:pass@host/a: no", "cannot load https://***@host/a: no"),
        ("proxy http://token@127.0.0.1:9 refused", "proxy http://***@127.0.0.1:9 refused"),
        ('{"a": "https://host/a", "b": "x@y"}', '{"a": "https://host/a", "b": "x@y"}'),
        ("mail me@host, see https://host/@me", "mail me@host, see https://host/@me"),
    ],
)
def test_errors_leave_the_passwords_of_addresses_out(text, shown):
    assert str(UserError(text)) == shown
    assert str(UserError.several([UserError(text), UserError("b", where=text)])) == f"{shown}\n{shown}: b"
