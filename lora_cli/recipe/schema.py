"""The recipe: the one place where a key, its type, bounds, default, unit and meaning stand.

Everything is frozen and strict: no unknown key, no silent conversion. `load.py` reads the files and turns what
pydantic says into messages with file and line. Imports nothing heavy.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from lora_cli import parts
from lora_cli.errors import short
from lora_cli.parts import Part

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
NotEmpty = Annotated[str, Field(min_length=1)]

EXCLUSIVE = (
    ("train.epochs", "train.max_steps"),
    ("train.warmup_ratio", "train.warmup_steps"),
    ("data.eval", "data.eval_fraction"),
)
"""Keys that cannot both be set in one file; in a file that extends another, setting one takes the other back."""


def _compiles(pattern: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "[[a]": a set that Python will read differently one day
            re.compile(pattern)
    except (re.error, Warning, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {short(str(error))}") from error
    return pattern


Pattern = Annotated[NotEmpty, AfterValidator(_compiles)]


class Section(BaseModel):
    """A mapping in the recipe: frozen, strict, closed to unknown keys, and free of contradictions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def contradictions(self) -> Iterator[str]:
        """Yield `what; what to do` for keys that do not go together.

        Each key is named in single quotes, dotted from here: the loader finds its line by that name.
        """
        yield from ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = list(self.contradictions())
        if found:
            raise ValueError("\n".join(found))
        return self


@dataclass(frozen=True)
class Axis:
    """Marks a key that names a part of one axis: `pissa`, or `{pissa: {niter: 16}}`."""

    name: str
    expected = "the name of a part, or {name: {setting: value}}"

    def read(self, value: Any) -> Any:
        """Turn what was written into a `Part`; its settings are checked when the part is used."""
        if isinstance(value, Part):
            return value
        settings: Any = {}
        if isinstance(value, dict) and len(value) == 1:
            value, settings = next(iter(value.items()))
            settings = {} if settings is None else settings
        if not isinstance(value, str) or not isinstance(settings, dict):
            raise ValueError(f"expected {self.expected}")
        known = parts.names(self.name)
        if value not in known:
            raise ValueError(f"unknown {self.name} '{short(value)}'; {parts.did_you_mean(value, known)}")
        return Part(name=value, settings=settings)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Only `read` decides; a part is written out as what it consists of."""
        written = core_schema.plain_serializer_function_ser_schema(asdict)
        return core_schema.no_info_plain_validator_function(self.read, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """A name out of the registry, alone or with settings under it."""
        known = {"enum": list(parts.names(self.name))}
        with_settings = {"type": "object", "minProperties": 1, "maxProperties": 1, "propertyNames": known}
        return {"anyOf": [{"type": "string", **known}, with_settings]}


@dataclass(frozen=True)
class DropoutAxis(Axis):
    """The dropout axis, where `0.05` is short for `{standard: {p: 0.05}}`."""

    name: str = "dropout"
    expected = f"a number ≥ 0 and < 1, or {Axis.expected}"

    def read(self, value: Any) -> Any:
        """Turn a number, a name, or a name with settings into a `Part`."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return super().read(value)
        if not 0 <= value < 1:
            raise ValueError(f"expected {self.expected}, got {value}")
        return Part(name="standard", settings={"p": float(value)})

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """A number, or what any axis takes."""
        known = super().__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, *known["anyOf"]]}


@dataclass(frozen=True)
class RankAxis(Axis):
    """The rank axis; other tools call r so."""

    name: str = "rank"

    def read(self, value: Any) -> Any:
        """Turn a name, or a name with settings, into a `Part`; a number is meant as r."""
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"'rank' names what controls r over time; set 'r: {value}' instead")
        return super().read(value)


@dataclass(frozen=True)
class PartsAxis(Axis):
    """An axis of which there may be several parts: one, or a list."""

    expected = f"{Axis.expected}, or a list of them"

    def read(self, value: Any) -> Any:
        """Turn one or a list into a tuple of `Part`."""
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(super(PartsAxis, self).read(each) for each in values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Only `read` decides."""
        written = core_schema.plain_serializer_function_ser_schema(
            lambda found: [asdict(each) for each in found]
        )
        return core_schema.no_info_plain_validator_function(self.read, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """What any axis takes, or a list of it."""
        one = super().__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [*one["anyOf"], {"type": "array", "items": one}]}


class ModelRecipe(Section):
    """Which language model, and how its weights are kept in memory."""

    name: NotEmpty = Field(
        description="Folder with a transformers model, or its id on the Hub.",
        examples=["models/smollm2-135m-instruct"],
    )
    revision: NotEmpty | None = Field(
        default=None, description="Branch, tag or commit of a Hub id; default: its main branch."
    )
    dtype: Dtype = Field(
        default="auto",
        description="How the base is stored in memory; auto: bfloat16 on GPUs that have it, and on CPUs that have it "
        "where the model's files are bfloat16 too; else float32.",
    )
    quantize: Literal["none", "nf4", "nf", "int4", "int8"] | None = Field(
        default=None,
        description="Keep the weights of linear layers, but the output head, in few bits: nf4 (4.13 bits a weight), "
        "nf (as many as `bits` says), int4 (5.5, with zero points) or int8; they are quantised after the start of A "
        "and B. Default: the method's, none for most.",
        examples=["nf4"],
    )
    bits: Annotated[float, Field(ge=2.127, le=9)] | None = Field(
        default=None,
        description="With `quantize: nf`, how many bits a weight takes on average, all included: each layer gets 2, 3, "
        "4 or 8 of its own, such that the squared errors of all sum up to the least. Default: 4.13, each layer the "
        "same.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto",
        description="Attention implementation of transformers; auto: its own choice, sdpa for most.",
    )
    add_tokens: tuple[NotEmpty, ...] = Field(
        default=(),
        description="New tokens: the embedding grows and only the new rows are trained.",
        examples=[["<|think|>", "<|answer|>"]],
    )
    untie: bool = Field(
        default=False,
        description="Give the output head its own copy of tied embeddings, so that one end can be adapted.",
    )
    split_experts: bool = Field(
        default=False,
        description="In mixtures of experts whose weights are one tensor, make a linear layer of each expert's, so "
        "that they can be adapted; they are then part of all-linear, and computed one after the other.",
    )


class WeightedSource(Section):
    """One source among several, and how often its rows are seen."""

    path: NotEmpty = Field(description="File, folder, or id on the Hub.")
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0,
        description="How often each row is seen per epoch: 2 is twice, 0.5 is every second row (seeded).",
    )
    split: NotEmpty | None = Field(
        default=None, description="Split of a Hub id; default: the one it is used as."
    )


def _read_sources(value: Any) -> Any:
    """A path, a mapping, or a list of either, always kept as a tuple of `WeightedSource`."""
    if value is None:
        return value
    items = value if isinstance(value, tuple | list) else (value,)
    if not items:
        raise ValueError("expected a path, or a list of at least one, got an empty list")
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


SOURCE_SCHEMA = WeightedSource.model_json_schema()
PATH_SCHEMA = SOURCE_SCHEMA["properties"]["path"]
Sources = Annotated[
    tuple[WeightedSource, ...],
    BeforeValidator(_read_sources),
    WithJsonSchema(
        {
            "anyOf": [
                PATH_SCHEMA,
                SOURCE_SCHEMA,
                {"type": "array", "minItems": 1, "items": {"anyOf": [PATH_SCHEMA, SOURCE_SCHEMA]}},
            ]
        }
    ),
]


def _unweighted(sources: tuple[WeightedSource, ...]) -> tuple[WeightedSource, ...]:
    if any(source.weight != 1 for source in sources):
        raise ValueError("a weight has no effect here, every row is measured once; leave it out")
    return sources


class PromptFormat(Section):
    """Prompt and completion written as templates over the columns of a row: `{column}`, `{{` for a brace."""

    prompt: str = Field(description='Template of what is read, such as "Review: {text}\\nSentiment:".')
    completion: str = Field(description='Template of what is learned, such as " {label}".')


class DataRecipe(Section):
    """Which rows, how they become text, and which tokens of them are learned."""

    train: Sources = Field(
        description="jsonl, json, csv, txt or parquet file, folder, Hub id, or a list of them.",
        examples=["data/reviews/train.jsonl", [{"path": "a.jsonl", "weight": 2}, "b.csv"]],
    )
    eval: Annotated[Sources, AfterValidator(_unweighted)] | None = Field(
        default=None,
        description="Held-out rows; the same forms as `train`, without weights.",
        examples=["data/reviews/test.jsonl"],
    )
    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="Share of the training rows held out (seeded) when `eval` is not given."
    )
    format: Literal["auto", "messages", "alpaca", "sharegpt", "text"] | PromptFormat = Field(
        default="auto",
        description="What a row looks like; auto: told from its columns. A mapping gives templates.",
        examples=[{"prompt": "Review: {text}\nSentiment:", "completion": " {label}"}],
    )
    chat_template: NotEmpty = Field(
        default="auto",
        description="auto: the tokenizer's own when it has one; none: plain text; or the path of a file.",
    )
    system: str | None = Field(
        default=None, description="System message put in front of rows that have none."
    )
    max_length: Positive = Field(default=1024, description="Longest example, in tokens.")
    overflow: Literal["error", "drop", "truncate"] = Field(
        default="error", description="What to do with longer examples; truncate cuts the end."
    )
    train_on: Literal["completion", "assistant", "all"] = Field(
        default="completion",
        description="Tokens that are learned; completion: the answer (in a chat, every assistant turn); "
        "assistant: the same, for chat rows only; all: every token.",
    )
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="Join examples into long rows instead of padding them; they do not see each other. "
        "auto: where the model keeps them apart, and attention skips what lies between them.",
    )

    def contradictions(self) -> Iterator[str]:
        """Held-out rows come from one place."""
        if self.eval is not None and self.eval_fraction > 0:
            yield "'eval' and 'eval_fraction' exclude each other; keep the one that held-out rows come from"


class AdapterRecipe(Section):
    """What is added to the model: a preset, and any axis of it set differently."""

    method: NotEmpty = Field(default="lora", description="Name of a method, see `lora methods`.")
    r: Positive | None = Field(
        default=16,
        description="Columns of B and rows of A; trainable parameters grow linearly with it. "
        "null is as if it was not written, which some methods ask for.",
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Numerator of the scale; lora: s = alpha / r. Default: 32; none where s is the method's own.",
        examples=[32],
    )
    dropout: Annotated[Part, DropoutAxis()] = Field(
        default=Part(name="standard", settings={"p": 0.0}),
        description="Share of the inputs of A that is dropped while training; "
        "0.05 is short for {standard: {p: 0.05}}.",
        json_schema_extra={"default": 0.0},
    )
    target_modules: Pattern | Annotated[tuple[NotEmpty, ...], Field(min_length=1)] = Field(
        default="all-linear",
        description="Modules to adapt: all-linear (every linear layer but the output head), a list of names or "
        "endings of names, or one regular expression for the whole name.",
        examples=[["q_proj", "v_proj"]],
    )
    exclude_modules: tuple[NotEmpty, ...] = Field(
        default=(), description="Names or endings of names that are left alone.", examples=[["down_proj"]]
    )
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Adapt only these blocks, counted from 0; negative numbers count from the end; "
        "default: all.",
        examples=[[-2, -1]],
    )
    rank_pattern: dict[Pattern, Positive] = Field(
        default={},
        description="Other r for some modules: regular expression for the end of a name → r; first match wins.",
        examples=[{"down_proj": 32}],
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Other alpha for some modules: regular expression for the end of a name → alpha; "
        "first match wins.",
        examples=[{"down_proj": 64}],
    )
    lora_bias: bool = Field(
        default=False, description="Give B a trained bias; merging then needs layers with a bias."
    )
    train_also: tuple[NotEmpty, ...] = Field(
        default=(),
        description="Trained in full beside the adapter: norms, embeddings, head, biases, everything, or names of "
        "modules.",
        examples=[["norms"]],
    )
    init: Annotated[Part, Axis("init")] | None = Field(
        default=None, description="First values of A and B; default: the method's."
    )
    scale: Annotated[Part, Axis("scale")] | None = Field(
        default=None, description="Rule for s; default: the method's."
    )
    delta: Annotated[Part, Axis("delta")] | None = Field(
        default=None, description="What ΔW is made of; default: the method's."
    )
    combine: Annotated[Part, Axis("combine")] | None = Field(
        default=None, description="How W0 and ΔW combine; default: the method's."
    )
    trainable: Annotated[Part, Axis("trainable")] | None = Field(
        default=None, description="Which factors train; default: the method's."
    )
    attention: Annotated[Part, Axis("attention")] | None = Field(
        default=None, description="What a token sees while training; default: the method's."
    )
    rank: Annotated[Part, RankAxis()] | None = Field(
        default=None, description="How r is shared out among the layers, and when; default: the method's."
    )
    lifecycle: Annotated[tuple[Part, ...], PartsAxis("lifecycle")] | None = Field(
        default=None, description="What happens between steps: one part, or a list; default: the method's."
    )


class TrainRecipe(Section):
    """How long, how fast, and in which steps."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Passes over the training rows; 1 when neither this nor max_steps is given."
    )
    max_steps: Positive | None = Field(default=None, description="Optimizer steps, instead of epochs.")
    batch_size: Positive = Field(default=16, description="Examples per optimizer step, over all processes.")
    micro_batch_size: Positive | Literal["auto"] = Field(
        default="auto",
        description="Examples in memory at once; auto: by number of tokens. Never changes what is learned.",
    )
    learning_rate: Annotated[float, Field(ge=0)] = Field(default=2e-4, description="Peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine", "inverse_sqrt"] = Field(
        default="linear", description="Course of the learning rate after the warm-up."
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Share of all steps over which the learning rate rises from 0; default: no warm-up.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(default=None, description="The same in steps.")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Floor that the learning rate never falls below after the warm-up."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Decoupled weight decay of AdamW."
    )
    optimizer: Annotated[Part, Axis("optimizer")] | None = Field(
        default=None,
        description="How gradients become steps; default: the method's, adamw for most.",
        json_schema_extra={"default": "adamw"},
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay rates of Adam's two moments."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0,
        description="Gradients are scaled down to this norm over all trained tensors; null: never.",
    )
    precision: Dtype = Field(
        default="auto",
        description="How the model is computed; auto: bfloat16 on GPUs that have it, else float32.",
    )
    gradient_checkpointing: bool | Positive = Field(
        default=False,
        description="Recompute activations instead of keeping them: less memory, about a third slower. true: in all "
        "blocks; a number: in so many, from the bottom.",
        examples=[12],
    )
    compile: bool = Field(
        default=False,
        description="Compile the pieces of each block by torch.compile when they are first used, which takes minutes; "
        "evaluation and generation run without. For LoRA and DoRA over a base that is not quantised. Needs a C++ "
        "compiler, on a GPU Triton; numbers differ by rounding.",
    )
    on_no_fit: Literal["adapt", "warn", "error"] = Field(
        default="adapt",
        description="Where the run would need more memory than is free; adapt: recompute as many blocks as it takes, "
        "then take fewer tokens at once, which changes the speed and never what is learned; warn: say so; "
        "error: stop before the first step.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Start of every random number: init, order of rows, dropout."
    )
    deterministic: bool = Field(
        default=False,
        description="Also on a GPU only kernels that always give the same bits, and sums over micro-batches in an "
        "order that does not depend on the number of processes; slower.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="What each of several processes keeps; ddp: the whole base; fsdp: its share of it, for a base that "
        "does not fit on one GPU: every block is gathered when it computes, which is slower. The adapter is whole in "
        "each, and what is learned is the same.",
    )
    log_steps: Positive = Field(
        default=1, description="Steps between lines on a plain screen and points in trackers."
    )
    eval_steps: Positive | None = Field(
        default=None, description="Steps between evaluations; default: at each epoch's end."
    )
    save_steps: Positive | None = Field(
        default=None, description="Steps between checkpoints; default: at each epoch's end."
    )
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(
        default=2, description="Newest checkpoints that are kept; the best one is kept besides."
    )
    early_stopping_patience: Positive | None = Field(
        default=None,
        description="Stop after this many evaluations without a better eval loss, and keep the best adapter.",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "swanlab"], ...] = Field(
        default=(), description="Experiment trackers fed through accelerate; each needs its own package."
    )

    def contradictions(self) -> Iterator[str]:
        """One length, one warm-up, and a floor below the peak."""
        if self.epochs is not None and self.max_steps is not None:
            yield "'epochs' and 'max_steps' exclude each other; keep one of them"
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            yield "'warmup_ratio' and 'warmup_steps' exclude each other; keep one of them"
        if self.min_learning_rate > self.learning_rate:
            yield "'min_learning_rate' is above 'learning_rate'; lower the floor or raise the peak"


class EvalRecipe(Section):
    """What is measured on the held-out rows."""

    metrics: tuple[Literal["loss", "perplexity", "choice_accuracy", "exact_match", "bleu", "chrf"], ...] = (
        Field(
            default=("loss",),
            min_length=1,
            description="What `lora eval` computes; training measures the loss only.",
            examples=[["loss", "choice_accuracy"]],
        )
    )
    choices: Annotated[tuple[NotEmpty, ...], Field(min_length=2)] | None = Field(
        default=None,
        description="Answers that choice_accuracy picks from; default: the distinct completions, at most 20.",
        examples=[[" positive", " negative"]],
    )
    references: NotEmpty | None = Field(
        default=None, description="Column with a list of right answers, for exact_match, bleu and chrf."
    )
    forgetting: NotEmpty | None = Field(
        default=None,
        description="txt or jsonl file of general text; its loss before and after tells what training made the model "
        "forget. Default: not measured.",
        examples=["data/general.txt"],
    )
    max_rows: Positive | None = Field(default=None, description="Use only the first rows; default: all.")
    batch_size: Positive = Field(default=16, description="Answers generated at once.")
    max_new_tokens: Positive = Field(default=128, description="Longest generated answer, in tokens.")
    samples: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Answers generated and shown at each evaluation while training."
    )


class OutputRecipe(Section):
    """Where the run is written."""

    dir: NotEmpty | None = Field(
        default=None, description="Run folder; default: runs/<name of the recipe>. --output overrides."
    )


class CompareRecipe(Section):
    """Variants for `lora compare`, each a name and the keys that it sets otherwise, dotted or in sections.

    Other commands use the recipe without them.
    """

    model_config = ConfigDict(extra="allow")
    # pydantic checks what is not declared against this type
    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Name -> sections; whether they are right is known once each is laid over the recipe, see `load`."""
        return dict(self.__pydantic_extra__)


class Recipe(Section):
    """A fine-tuning run: model, data, adapter, training, evaluation, output."""

    model: ModelRecipe
    data: DataRecipe
    adapter: AdapterRecipe = AdapterRecipe()
    train: TrainRecipe = TrainRecipe()
    eval: EvalRecipe = EvalRecipe()
    output: OutputRecipe = OutputRecipe()
    compare: CompareRecipe = Field(
        default=CompareRecipe(),
        examples=[{"lora": {}, "dora": {"adapter.method": "dora", "train.learning_rate": 5e-4}}],
    )

    def contradictions(self) -> Iterator[str]:
        """What one section says against another."""
        held_out = self.data.eval is not None or self.data.eval_fraction > 0
        for key in ("eval_steps", "early_stopping_patience"):
            if getattr(self.train, key) is not None and not held_out:
                yield f"'train.{key}' needs held-out rows; set 'data.eval' or 'data.eval_fraction'"
        if self.eval.samples and not held_out:
            yield "'eval.samples' needs held-out rows; set 'data.eval' or 'data.eval_fraction'"
        if self.model.bits is not None and self.model.quantize != "nf":
            yield "'model.bits' are shared out by 'model.quantize' nf only; set that too, or leave 'model.bits' out"
        if self.train.parallel == "fsdp" and "everything" in self.adapter.train_also:
            yield (
                "'train.parallel' fsdp shares out what is frozen, and 'adapter.train_also' everything leaves nothing; "
                "leave one of them out"
            )
        stored, computed = self.model.dtype, self.train.precision
        if stored in ("bfloat16", "float16") and computed not in ("auto", stored):
            yield (
                f"a base stored in {stored} is computed in {stored}, not in {computed}; "
                "set 'model.dtype' to float32, or leave 'train.precision' out"
            )


@cache
def axes() -> dict[str, str]:
    """Every key that names a part, dotted, and the axis that the part is on."""
    found: dict[str, str] = {}
    for section, field in Recipe.model_fields.items():
        for key, inner in field.annotation.model_fields.items():  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            marks = [*inner.metadata, *(m for arg in get_args(inner.annotation) for m in get_args(arg))]
            found |= {f"{section}.{key}": mark.name for mark in marks if isinstance(mark, Axis)}
    return found
