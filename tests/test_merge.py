"""Merged models on disk compute what base and adapter compute, and say what rounding cost; or there is none."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_cli import model as models
from lora_cli.adapter import files, inject
from lora_cli.adapter.plan import Plan
from lora_cli.adapter.portable import saved_form
from lora_cli.errors import ExitCode, UserError
from lora_cli.methods.delta import lowrank
from lora_cli.presets import Method
from lora_cli.recipe.schema import ModelRecipe
from lora_cli.run import export as export_story
from lora_cli.run import merge as merge_story
from lora_cli.run import probe, rewrite
from lora_cli.run.merge import merge
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import CASES, adapted, base, ids

SCREEN = Screen()
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
"""Of logits: what rounding the weights may do to them. A mistake moves them by what the adapter learned, or by all."""
ALIKE = (
    "lora_fa",
    "some layers",
    "rslora",
    "norms",
    "biases",
    "norms, biases",
    "head in full",
    "both ends in full",
)
MERGED = [name for name in CASES if name not in ALIKE]


def on_disk(folder: Path, kind: str = "llama", dtype: str = "float32", **settings: Any):
    """A base, an adapter of it, and the two folders; the live pair computes from the base as it is stored."""
    plain = base(kind, settings).to(models.DTYPES[dtype])
    plain.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    model, adapter = adapted(kind, **settings)
    files.save(folder / "adapter", adapter, str(folder / "base"), None)
    return model, adapter


def reloaded(folder: Path):
    """The merged model, read by transformers alone, computing in float32."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def refused(path: Path, output: Path, code: ExitCode, dtype: str | None = None, **more: Any) -> UserError:
    """The error of a merge that leaves nothing behind."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        merge(path, output, dtype, SCREEN, **more)
    assert error.value.code == code, error.value
    assert sorted(output.parent.rglob("*")) == before
    return error.value


@pytest.mark.parametrize(("kind", "settings"), [CASES[name] for name in MERGED], ids=MERGED)
def test_the_merged_model_on_disk_computes_what_base_and_adapter_compute(tmp_path, kind, settings):
    live, _ = on_disk(tmp_path, kind, **settings)
    report = merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    x = ids()
    found, expected = reloaded(tmp_path / "merged")(x).logits, live(x).logits
    assert probe.distance(found, expected) <= 1e-5
    assert probe.distance(base(kind, settings)(x).logits, expected) > 1e-3
    assert report["layer_error"] <= report["tolerance"] == 1e-5
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["norms, biases", "new rows, tied, scaled"])
def test_every_type_keeps_its_bound_and_reports_what_rounding_took(tmp_path, name, stored, dtype):
    kind, settings = CASES[name]
    live, adapter = on_disk(tmp_path, kind, stored, **settings)
    report = merge(tmp_path / "adapter", tmp_path / "merged", dtype, SCREEN)
    assert report["dtype"] == dtype
    assert report["layer_error"] <= report["tolerance"]
    x, bound = ids(), TOLERANCES[dtype] + (TOLERANCES[stored] if stored != "float32" else 0)
    assert probe.distance(reloaded(tmp_path / "merged")(x).logits, live(x).logits) <= bound
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    layer = adapter.plan.layers[3]
    W0 = base(kind, settings).to(models.DTYPES[stored]).float().get_parameter(f"{layer.name}.weight")
    delta = adapter.deltas[layer.name]
    W = W0 + (delta.weight() if layer.base == "linear" else delta.weight().t())
    lost = (W.to(models.DTYPES[dtype]).float() - W).norm() / (W - W0).norm()
    assert report["layer_losses"][layer.name] == pytest.approx(lost.item(), rel=1e-4, abs=1e-7)


def test_new_rows_of_a_head_with_a_bias_keep_it():
    model = tiny.model("phi")
    torch.nn.init.normal_(model.lm_head.bias)
    x = ids()
    expected = model(x).logits
    adapter = inject.inject(
        model, Plan(Method(name="lora"), (), new_rows=(7, 200), ends=models.ends_of(model))
    )
    torch.testing.assert_close(model(x).logits, expected)
    torch.nn.init.normal_(adapter.rows["lm_head"].values)
    live = model(x).logits
    inject.merge(model, adapter)
    torch.testing.assert_close(model(x).logits, live)


def test_an_adapter_that_is_not_active_is_merged_all_the_same():
    model, adapter = adapted("gpt2", train_also=("norms",))
    x = ids()
    live = model(x).logits
    adapter.deactivate()
    inject.merge(model, adapter)
    torch.testing.assert_close(model(x).logits, live, rtol=1e-4, atol=1e-5)


def test_without_a_dtype_the_merged_model_is_stored_as_the_base_is(tmp_path):
    on_disk(tmp_path, dtype="bfloat16")
    assert merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)["dtype"] == "bfloat16"
    assert reloaded(tmp_path / "merged").config.dtype == torch.float32  # as it was asked for
    assert models.dtype_on_disk(ModelRecipe(name=str(tmp_path / "merged"))) == "bfloat16"


def test_a_change_that_rounding_swallows_is_warned_of(tmp_path, capsys):
    on_disk(tmp_path, size=0.003)
    lost = merge(tmp_path / "adapter", tmp_path / "narrow", "bfloat16", SCREEN)["median_layer_loss"]
    assert lost > 0.5
    assert f"{lost:.0%} of what the adapter moves them" in capsys.readouterr().err.replace("\n", " ")
    assert merge(tmp_path / "adapter", tmp_path / "wide", None, SCREEN)["median_layer_loss"] < 0.05
    assert "--dtype float32" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("conv1d", True),
        ("new rows, tied", True),
        ("both ends in full, tied", True),
        ("lookup, untied", False),
        ("head, untied", False),
        ("head in full, untied", False),
        ("both ends in full, untied", False),
        ("new rows, untied", False),
    ],
)
def test_the_config_says_whether_the_ends_are_still_one_tensor(tmp_path, name, tied):
    kind, settings = CASES[name]
    on_disk(tmp_path, kind, **settings)
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    model = reloaded(tmp_path / "merged")
    assert model.config.tie_word_embeddings is tied
    assert models.ends_of(model).tied is tied
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        ends = [
            key
            for key in file.keys()  # noqa: SIM118
            if key.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight"))
        ]
    assert len(ends) == (1 if tied else 2)


def test_added_tokens_template_and_generation_settings_come_along(tmp_path):
    tokens = ("<|think|>", "<|answer|>")
    base("gpt2", {}).save_pretrained(tmp_path / "base")
    tiny.tokenizer(chat_template="{{ messages[0]['content'] }}!").save_pretrained(tmp_path / "base")
    settings = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.9, max_new_tokens=7, eos_token_id=[2, 4]
    )
    (tmp_path / "base" / "generation_config.json").write_text(settings.to_json_string(use_diff=False))
    recipe = ModelRecipe(name=str(tmp_path / "base"), dtype="float32", add_tokens=tokens)
    language = models.load(recipe)
    model, adapter = _with_new_rows(language)
    (tmp_path / "adapter").mkdir()
    files.save(tmp_path / "adapter", adapter, recipe.name, None, tokens)
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    x = torch.tensor([tokenizer("a<|answer|>b<|think|>c")["input_ids"]])
    assert {261, 262} <= set(x[0].tolist())
    assert any(row.tolist() == [[261, 262]] for row in probe.rows_for(language, None)), (
        "they are compared too"
    )
    merged = reloaded(tmp_path / "merged")
    assert merged.config.vocab_size == 263
    assert probe.distance(merged(x).logits, model(x).logits) <= 1e-5
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "Hi!"
    carried = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (carried.temperature, carried.top_p, carried.max_new_tokens) == (0.3, 0.9, 7)
    assert carried.eos_token_id == [2, 4]

    export_story.export(tmp_path / "adapter", "peft", tmp_path / "exported", SCREEN)
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.convert_tokens_to_ids(list(tokens)) == [261, 262]


def test_the_template_that_the_adapter_learned_comes_along(tmp_path, capsys):
    on_disk(tmp_path)
    learned = tmp_path / "learned.jinja"
    learned.write_text("{{ messages[0]['content'] }}?")
    (tmp_path / "adapter" / "recipe.yaml").write_text(
        f"model: {{name: {tmp_path / 'base'}}}\ndata: {{train: gone.jsonl, chat_template: {learned}}}\n"
    )
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == learned.read_text()
    learned.unlink()
    merge(tmp_path / "adapter", tmp_path / "without", None, SCREEN)
    assert "the merged model has its base's" in capsys.readouterr().err.replace("\n", " ")
    assert AutoTokenizer.from_pretrained(tmp_path / "without").chat_template == tiny.CHATML


def _with_new_rows(language: models.LanguageModel):
    from lora_cli.adapter import plan
    from lora_cli.recipe.schema import AdapterRecipe

    made = plan.make(AdapterRecipe(r=4), language.model, language.ends, language.new_rows)
    adapter = inject.inject(language.model, made)
    with torch.no_grad():
        for parameter in adapter.named_tensors().values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return language.model, adapter


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    live, _ = on_disk(tmp_path)
    monkeypatch.setattr(rewrite, "SHARD", 20_000)
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 3
    x = ids()
    assert probe.distance(reloaded(tmp_path / "merged")(x).logits, live(x).logits) <= 1e-5


def test_no_model_is_ever_loaded(tmp_path, monkeypatch):
    """Memory grows with the largest layer; what it comes to is measured by scripts/bench/merge.py."""
    on_disk(tmp_path)

    def never(*arguments: Any) -> None:
        raise AssertionError("a whole model was loaded")

    monkeypatch.setattr(models, "load", never)
    monkeypatch.setattr(models, "_weights", never)
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)


def test_rows_of_the_recipe_are_compared_where_they_can_be_read(tmp_path, rows_file):
    from lora_cli.recipe.load import load

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {tmp_path / 'base'}}}\n"
        f"data: {{train: {rows_file}, chat_template: none, "
        "format: {prompt: '{question}', completion: '{answer}'}}\n"
    )
    on_disk(tmp_path)
    language = models.load(ModelRecipe(name=str(tmp_path / "base")))
    rows = probe.rows_for(language, load(recipe).recipe)
    text = [language.tokenizer.decode(row[0], skip_special_tokens=True) for row in rows]
    assert text[0].startswith("What is 3 plus 1?")
    assert len(rows) == probe.MAX_ROWS
    rows_file.unlink()
    fixed = probe.rows_for(language, load(recipe).recipe)
    assert language.tokenizer.decode(fixed[0][0]).endswith(probe.TEXTS[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mixtral", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_computes_in_float32_without_being_one(kind, dtype):
    model, x = tiny.model(kind).to(dtype), ids()
    found = probe.logits(model, list(x.split(1)))
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = probe.logits(model.float(), list(x.split(1)))
    assert torch.equal(found, expected)


# What is refused


def test_an_existing_folder_is_never_written_to(tmp_path):
    on_disk(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "kept").write_text("mine")
    assert "already exists" in str(refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.DISK))
    for inside in ("base", "base/merged", "adapter/merged", "base/../adapter/x"):
        refused(tmp_path / "adapter", tmp_path / inside, ExitCode.DISK)


def test_what_holds_no_adapter_has_nothing_to_merge(tmp_path):
    on_disk(tmp_path)
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    for path, reason in (
        ("merged", "holds no adapter"),
        ("base", "holds no adapter"),
        ("nowhere", "no such folder"),
    ):
        assert reason in str(refused(tmp_path / path, tmp_path / "twice", ExitCode.MODEL))
    error = refused(tmp_path / "adapter", tmp_path / "twice", ExitCode.MODEL, base=str(tmp_path / "merged"))
    assert "other weights" in str(error)


def test_an_adapter_of_a_base_that_is_gone_says_which(tmp_path):
    on_disk(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert str(tmp_path / "base") in error.what
    assert error.where == str(tmp_path / "adapter" / files.CONFIG)
    gone = str(tmp_path / "base")
    assert refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL, base=gone).where == "--base"
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN, base=str(tmp_path / "moved"))


@pytest.mark.parametrize("name", ["", None])
def test_an_adapter_that_does_not_name_its_base_needs_to_be_told(tmp_path, name):
    on_disk(tmp_path)
    path = tmp_path / "adapter" / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert "--base" in error.fix
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN, base=str(tmp_path / "base"))


def test_what_no_weight_can_stand_for_is_refused_with_the_reason(tmp_path, monkeypatch):
    on_disk(tmp_path)
    monkeypatch.setattr(lowrank, "mergeable", False, raising=False)
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert "depends on the input" in str(error)
    assert error.where == str(tmp_path / "adapter")


def test_a_bias_that_the_layer_cannot_take_is_refused(tmp_path):
    live, adapter = on_disk(tmp_path)
    for key, delta in adapter.deltas.items():
        delta.bias = torch.nn.Parameter(torch.randn(live.get_submodule(key).base.out_features))
    from safetensors.torch import save_file

    save_file(saved_form(adapter).tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert "lora_bias" in str(error)


def test_a_weight_too_large_for_the_type_is_named(tmp_path):
    _, adapter = on_disk(tmp_path)
    with torch.no_grad():
        adapter.deltas["model.layers.1.mlp.up_proj"].B[3, 0] = 1e6
    files.save(tmp_path / "adapter", adapter, str(tmp_path / "base"), None)
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.VERIFICATION, "float16")
    assert error.where == "model.layers.1.mlp.up_proj"
    assert "float16" in str(error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_computes_something_else_is_not_done(tmp_path, monkeypatch, dtype):
    on_disk(tmp_path)
    right = inject.merge

    def without_one_layer(model: Any, adapter: Any, into: Any) -> dict[str, float]:
        for name, delta in adapter.deltas.items():
            delta.scale = 0.0 if name == "model.layers.1.mlp.down_proj" else delta.scale
        return right(model, adapter, into)

    monkeypatch.setattr(inject, "merge", without_one_layer)
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.VERIFICATION, dtype)
    assert "model.layers.1.mlp.down_proj is" in str(error)
    assert "away from what base and adapter compute" in str(error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_that_holds_something_else_is_not_done(tmp_path, monkeypatch, dtype):
    on_disk(tmp_path)
    write = rewrite.write

    def damaged(work: Any, made: Path) -> Any:
        written = write(work, made)
        file = made / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-random.randint(1, 2000)] ^= 1
        file.write_bytes(content)
        return written

    monkeypatch.setattr(rewrite, "write", damaged)
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.VERIFICATION, dtype)
    assert "read back" in str(error)


def test_a_tokenizer_that_was_not_carried_along_is_not_done(tmp_path, monkeypatch):
    on_disk(tmp_path)
    save = merge_story._save_the_rest

    def without_template(work: Any, made: Path, dtype: str) -> None:
        save(work, made, dtype)
        tiny.tokenizer(chat_template=None).save_pretrained(made)
        (made / "chat_template.jinja").unlink()

    monkeypatch.setattr(merge_story, "_save_the_rest", without_template)
    assert "read back" in str(refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.VERIFICATION))


# Export


@pytest.mark.parametrize(
    "name", ["linear", "conv1d", "both ends in full, untied", "new rows, tied", "rslora"]
)
def test_an_exported_adapter_is_the_adapter(tmp_path, name):
    kind, settings = CASES[name]
    on_disk(tmp_path, kind, **settings)
    (tmp_path / "adapter" / "README.md").write_text("a card")
    report = export_story.export(tmp_path / "adapter", "peft", tmp_path / "out", SCREEN)
    assert report["logit_error"] <= 1e-5
    for name in ("adapter_model.safetensors", "adapter_config.json", "lora.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes(), name


def test_an_export_that_computes_something_else_is_not_done(tmp_path, monkeypatch):
    on_disk(tmp_path)
    right = export_story.as_lora

    def wrong(adapter: Any) -> Any:
        form = right(adapter)
        return replace(form, tensors={key: t * 1.01 for key, t in form.tensors.items()})

    monkeypatch.setattr(export_story, "as_lora", wrong)
    with pytest.raises(UserError, match="away from the adapter's") as error:
        export_story.export(tmp_path / "adapter", "peft", tmp_path / "out", SCREEN)
    assert error.value.code == ExitCode.VERIFICATION
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_export_that_cannot_be_is_refused(tmp_path):
    on_disk(tmp_path)
    for path, format, output, reason in (
        ("adapter", "pefd", "out", "did you mean 'peft'"),
        ("base", "peft", "out", "holds no adapter"),
        ("adapter", "peft", "adapter/out", "never written to"),
        ("adapter", "peft", "base", "already exists"),
    ):
        with pytest.raises(UserError) as error:
            export_story.export(tmp_path / path, format, tmp_path / output, SCREEN)
        assert reason in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
