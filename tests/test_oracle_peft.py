"""PEFT as an independent oracle: each reads what the other writes, and both learn the same."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli import model as models
from lora_cli.adapter import files, inject, peft_format, plan
from lora_cli.adapter.portable import saved_form
from lora_cli.errors import UserError
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.run import probe
from lora_cli.run.export import export
from lora_cli.run.merge import merge
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import CASES, TIED, adapted, base, ids, put_on
from tests.training import kept_in_the_shape_of_w

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.oracle,
    # transformers' own, about itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

ABOUT_ITSELF = (
    "Model has `tie_word_embeddings=True`",  # of every adapter at the ends of a tied model
    "fan_in_fan_out is set to",  # of every adapter on a Conv1D and a Linear
    "Adapter 'default': [0-9]+ LoRA tensor",  # of every bias of B: it is 1-D
    "PiSSA changes the base weights",
)
"""What PEFT warns of with its own adapters too; every other warning fails a test."""


@pytest.fixture(autouse=True)
def _peft_speaks_about_itself():
    with warnings.catch_warnings():
        for message in ABOUT_ITSELF:
            warnings.filterwarnings("ignore", message)
        yield


def base_for_peft(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """PEFT cannot take a tie apart where rows of tokens are trained at both ends; its user has to."""
    model = base(kind, settings)
    if settings.get("untie"):
        models._untie(model)
    return model


# Ours -> PEFT


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_peft_computes_what_we_compute_from_our_files(tmp_path, kind, settings):
    live, adapter = adapted(kind, **settings)
    files.save(tmp_path, adapter, "the/base", None)
    model = base_for_peft(kind, settings)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path)
    x = ids()
    assert probe.distance(wrapped(x).logits, live(x).logits) <= 1e-5
    assert probe.distance(base(kind, settings)(x).logits, live(x).logits) > 1e-3
    written = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    ours = saved_form(adapter).tensors
    assert written.keys() >= ours.keys()
    assert all(torch.equal(written[key], ours[key]) for key in ours)


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_transformers_computes_what_we_compute_from_our_files(tmp_path, kind, settings):
    live, adapter = adapted(kind, **settings)
    files.save(tmp_path, adapter, "the/base", None)
    model = base_for_peft(kind, settings)
    info = model.load_adapter(tmp_path)
    x = ids()
    assert probe.distance(model(x).logits, live(x).logits) <= 1e-5
    # The tied end of rows has no tensor of its own; transformers misses it in PEFT's own files as well.
    assert {key for key in info.missing_keys if not key.startswith("lm_head.token_adapter")} == set()
    assert not info.unexpected_keys
    assert not info.mismatched_keys


def test_transformers_opens_our_folder_as_a_model(tmp_path):
    base("llama", {}).save_pretrained(tmp_path / "base")
    live, adapter = adapted("llama", train_also=("norms",))
    (tmp_path / "adapter").mkdir()
    files.save(tmp_path / "adapter", adapter, str(tmp_path / "base"), None)
    x = ids()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert probe.distance(model(x).logits, live(x).logits) <= 1e-5


def test_new_tokens_reach_peft_once_the_vocabulary_has_grown(tmp_path):
    live, adapter = adapted("gpt2", config={"vocab_size": 263}, new_rows=(261, 262))
    grown = tiny.model("gpt2", vocab_size=263)
    files.save(tmp_path, adapter, "the/base", None, ("<|a|>", "<|b|>"))
    x = ids()
    x[0, 3:5] = torch.tensor((262, 261))
    wrapped = peft.PeftModel.from_pretrained(grown, tmp_path)
    assert probe.distance(wrapped(x).logits, live(x).logits) <= 1e-5


def test_peft_refuses_a_type_that_it_would_not_compute(tmp_path):
    _, adapter = adapted("llama")
    files.save(tmp_path, adapter, "the/base", None)
    path = tmp_path / files.CONFIG
    path.write_text(path.read_text().replace('"LORA"', f'"{peft_format.OURS}"'))
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(base("llama", {}), tmp_path)


# PEFT -> ours

THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all-linear": ("llama", {"target_modules": "all-linear"}, {}),
    "regex": ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}, {}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, {}),
    "excluded": (
        "llama",
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}, {}),
    "rslora, patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.0.mlp.*": 3},
            "alpha_pattern": {"layers.1.mlp.*": 3, "q_proj": 5},
        },
        {},
    ),
    "bias all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, {}),
    "bias lora_only": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}, {}),
    "bias all, modules_to_save": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_1"]},
        {},
    ),
    "lora_bias": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}, {}),
    "lora_bias without a bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, {}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "mlp"]}, {}),
    "adapted inside modules_to_save": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
        {},
    ),
    "ends in full": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {},
    ),
    "ends in full, tied base": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        TIED,
    ),
    "head in full, tied base": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        TIED,
    ),
    "embedding in full, tied": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        TIED,
    ),
    "embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}, {}),
    "embedding, saved with its base": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "both ends": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, {}),
    "scaled embedding, tied base": ("gemma3_text", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "both ends, tied": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        TIED,
    ),
    "tokens of the embeddings": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
        {},
    ),
    "tokens, tied": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 200]}, TIED),
    "tokens of the head": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7]}},
        {},
    ),
    "tokens of the head, tied base": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7]}},
        TIED,
    ),
    "tokens of both ends": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]},
        },
        {},
    ),
    "orthogonal start": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, {}),
}


def theirs(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    settings: dict[str, Any],
    dtype: torch.dtype | None = None,
):
    """An adapter that PEFT made, moved away from its start, and saved."""
    model = base(kind, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **config))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                    if dtype is not None:
                        parameter.data = parameter.to(dtype)
        made.eval().save_pretrained(folder)
    return made


@pytest.mark.parametrize(("kind", "config", "settings"), THEIRS.values(), ids=THEIRS)
def test_we_compute_what_peft_computes_from_its_files(tmp_path, kind, config, settings):
    made = theirs(tmp_path, kind, config, settings)
    model, x = base(kind, settings), ids()
    plain = model(x).logits
    adapter = put_on(model, tmp_path)
    expected = made(x).logits
    assert probe.distance(model(x).logits, expected) <= 1e-5
    assert probe.distance(plain, expected) > 1e-3
    in_full = "bias" in config or "modules_to_save" in config
    assert bool(adapter.also) == in_full, (
        "the base's own weights, which PEFT saves too, are not taken for trained ones"
    )
    with inject.without_adapters(adapter):
        assert torch.equal(model(x).logits, plain)


MERGED = ["conv1d", "rslora, patterns", "bias all, modules_to_save", "lora_bias", "ends in full, tied base"]
MERGED += ["lora_bias without a bias", "embedding, saved with its base", "scaled embedding, tied base"]
MERGED += ["both ends, tied", "tokens, tied", "tokens of the head, tied base"]


@pytest.mark.parametrize(("kind", "config", "settings"), [THEIRS[name] for name in MERGED], ids=MERGED)
def test_an_adapter_of_peft_is_merged_and_exported_like_one_of_ours(tmp_path, kind, config, settings):
    base(kind, settings).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    made = theirs(tmp_path / "adapter", kind, config, settings)
    x, where = ids(), {"screen": Screen(), "base": str(tmp_path / "base")}
    expected = made(x).logits
    export(tmp_path / "adapter", "peft", tmp_path / "exported", **where)
    again = base(kind, settings)
    put_on(again, tmp_path / "exported")
    assert probe.distance(again(x).logits, expected) <= 1e-5
    if kind == "llama" and config.get("lora_bias"):
        with pytest.raises(UserError, match="lora_bias"):
            merge(tmp_path / "adapter", tmp_path / "merged", None, **where)
        return
    merge(tmp_path / "adapter", tmp_path / "merged", None, **where)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert probe.distance(merged(x).logits, expected) <= 1e-5


def test_base_weights_beside_an_adapted_embedding_count_only_where_they_differ_from_the_base(tmp_path):
    narrow = base("llama", {}).to(torch.bfloat16)
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    peft.get_peft_model(narrow, config).save_pretrained(tmp_path / "narrow", save_embedding_layers=True)
    assert not put_on(base("llama", {}), tmp_path / "narrow").also

    theirs(tmp_path / "adapter", "llama", {"target_modules": ["embed_tokens", "q_proj"]}, {})
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 0.1
    save_file(tensors, path)
    x, wrapped = ids(), peft.PeftModel.from_pretrained(base("llama", {}), tmp_path / "adapter")
    base("llama", {}).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    where = {"screen": Screen(), "base": str(tmp_path / "base")}
    export(tmp_path / "adapter", "peft", tmp_path / "exported", **where)
    merge(tmp_path / "adapter", tmp_path / "merged", None, **where)
    (tmp_path / "again").mkdir()
    files.save(tmp_path / "again", put_on(base("llama", {}), tmp_path / "adapter"), "the/base", None)
    for folder in ("adapter", "exported", "again"):
        model = base("llama", {})
        put_on(model, tmp_path / folder)
        assert probe.distance(model(x).logits, wrapped(x).logits) <= 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert probe.distance(merged(x).logits, wrapped(x).logits) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_stored_in_16_bits_is_computed_in_32(tmp_path, dtype):
    made = theirs(tmp_path, "llama", {"target_modules": "all-linear"}, {}, dtype)
    model, x = base("llama", {}), ids()
    adapter = put_on(model, tmp_path)
    assert {p.dtype for p in adapter.named_tensors().values()} == {torch.float32}
    wide = peft.PeftModel.from_pretrained(base("llama", {}), tmp_path)
    assert probe.distance(model(x).logits, wide(x).logits) <= 1e-5
    assert probe.distance(made.float()(x).logits, wide(x).logits) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "use_qalora": True}, "uses use_qalora"),
        (
            "llama",
            {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
            "'pissa', which changes the base",
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
            "'olora', which changes the base",
        ),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
            "adapted layers are not in it",
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]},
            "uses layer_replication",
        ),
        (
            "gpt2",
            {"target_modules": ["c_attn"], "trainable_token_indices": {"wpe": [1]}},
            "neither the embeddings nor the",
        ),
    ],
)
def test_what_we_would_not_compute_is_refused(tmp_path, kind, config, reason):
    theirs(tmp_path, kind, config, {})
    with pytest.raises(UserError, match=reason):
        put_on(base(kind, {}), tmp_path)


def test_other_methods_of_peft_are_refused_by_name(tmp_path):
    for config in (
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    ):
        folder = tmp_path / str(config.peft_type.value)
        peft.get_peft_model(base("llama", {}), config).save_pretrained(folder)
        with pytest.raises(UserError, match=f"'{config.peft_type.value}' is not known"):
            put_on(base("llama", {}), folder)


def test_a_pissa_adapter_that_peft_converted_fits_the_original_base(tmp_path):
    model, x = base("llama", {}), ids()
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"
    )
    made = peft.get_peft_model(model, config)
    made.peft_config["default"].init_lora_weights = True
    made.save_pretrained(tmp_path / "start")
    made.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = made.eval()(x).logits
    made.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "start")
    again = base("llama", {})
    put_on(again, tmp_path / "out")
    assert probe.distance(again(x).logits, expected) <= 1e-5


# Both learn the same

TRAINED = {
    "s = 4": ({"alpha": 32.0}, {"lora_alpha": 32}),
    "s = 1.5": ({"alpha": 12.0}, {"lora_alpha": 12}),
    "rslora": ({"alpha": 13.0, "scale": "rslora"}, {"lora_alpha": 13, "use_rslora": True}),
    "patterns": (
        {"rank_pattern": {"q_proj|c_attn": 3}, "alpha_pattern": {".*0.*proj": 5.0}},
        {"lora_alpha": 32, "rank_pattern": {"q_proj|c_attn": 3}, "alpha_pattern": {".*0.*proj": 5.0}},
    ),
}


def pair(kind: str, ours: dict[str, Any], config: dict[str, Any]):
    """The two implementations with the same start: models, and parameters by PEFT's names."""
    model = base(kind, {})
    made = plan.make(AdapterRecipe(r=8, **ours), model, models.ends_of(model))
    mine = peft_format.parameters(inject.inject(model, made, seed=1))
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}[kind]
    fan = kind == "gpt2"
    wrapped = peft.get_peft_model(
        base(kind, {}), peft.LoraConfig(r=8, target_modules=targets, fan_in_fan_out=fan, **config)
    ).eval()
    other = {name.replace(".default", ""): p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert other.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            other[name].copy_(parameter)
    return model, mine, wrapped, other


def steps(model: nn.Module, parameters: list[Tensor], batches: list[Tensor]) -> list[float]:
    """Losses of AdamW on the batches, one step each."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    losses: list[float] = []
    for x in batches:
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("ours", "config"), TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_20_steps_of_adamw_track_peft(kind, ours, config):
    """To rounding: the thin products are added in place, and multiplied by s elsewhere than in PEFT.

    Adam divides a gradient by its own size, so a last digit of one that is nearly zero becomes a visible
    difference in the first steps; both are then equally far from the same steps in float64.
    """
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(5, tiny.VOCABULARY, (4, 17), generator=generator) for _ in range(20)]
    model, mine, wrapped, other = pair(kind, ours, config)
    found = steps(model, list(mine.values()), batches)
    expected = steps(wrapped, [other[name] for name in mine], batches)
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(torch.linalg.norm(parameter) > 0 for parameter in mine.values())
    distances = {name: probe.distance(p.detach(), other[name].detach()) for name, p in mine.items()}
    assert max(distances.values()) <= 1e-6, distances


@pytest.mark.parametrize("name", ["linear", "conv1d", "rslora", "patterns", "bias of B"])
def test_gradients_are_the_definition(name):
    """With G = ∂L/∂W of a plain model that holds W0 + s·B·A: ∂L/∂A = s·BᵀG, ∂L/∂B = s·G·Aᵀ, ∂L/∂b = s·∂L/∂bias.

    In float64.
    """
    kind, settings = CASES[name]
    model, adapter = adapted(kind, **settings)
    x = ids()
    model.double()(x, labels=x).loss.backward()
    plain = base(kind, settings).double()
    for layer, delta in adapter.deltas.items():
        change = delta.scale * delta.B.detach() @ delta.A.detach()
        plain.get_parameter(f"{layer}.weight").data += change.t() if kind == "gpt2" else change
        if delta.bias is not None:
            plain.get_parameter(f"{layer}.bias").data += delta.scale * delta.bias.detach()
    plain(x, labels=x).loss.backward()
    for layer, delta in adapter.deltas.items():
        G, A, B, s = plain.get_parameter(f"{layer}.weight").grad, delta.A, delta.B, delta.scale
        G = G.t() if kind == "gpt2" else G
        torch.testing.assert_close(A.grad, s * B.detach().t() @ G, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(B.grad, s * G @ A.detach().t(), rtol=1e-9, atol=1e-14)
        if delta.bias is not None:
            expected = s * plain.get_parameter(f"{layer}.bias").grad
            torch.testing.assert_close(delta.bias.grad, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["linear", "conv1d", "bias of B", "rslora", "lora_fa"])
def test_no_matrix_of_the_shape_of_w_but_w_itself_is_kept_for_backward(name):
    kind, settings = CASES[name]
    model, adapter = adapted(kind, **settings)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = kept_in_the_shape_of_w(model, adapter, ids(3, 7))
    assert kept, "W0 itself is kept"
    assert not [t.shape for t in kept if t.data_ptr() not in own]
