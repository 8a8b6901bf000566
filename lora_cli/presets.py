"""Presets: a paper's name -> the parts it is made of. An axis named in the recipe wins over the preset."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.parts import AXES, Part

if TYPE_CHECKING:
    from lora_cli.recipe.schema import AdapterRecipe


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One method: what it is called in the literature, and how it differs from plain LoRA."""

    title: str
    paper: str
    when: str
    """When to use it, for `lora methods NAME`."""
    parts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Axis -> `Part`; of the lifecycle a tuple."""
    keys: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keys of `adapter` that have another default with this method."""


PRESETS: dict[str, Preset] = {
    "lora": Preset(
        title="LoRA: W = W0 + (alpha/r)·B·A, A random, B zero",
        paper="arXiv:2106.09685",
        when="The default. Start here; r 8 to 64 on all linear layers, learning rate 1e-4 to 1e-3.",
    ),
    "rslora": Preset(
        title="Rank-stabilised LoRA: LoRA with s = alpha/√r",
        paper="arXiv:2312.03732",
        when="With r of 32 and more, where plain LoRA's alpha/r holds a large rank back. At the same alpha its "
        "steps are √r times LoRA's: lower alpha or the learning rate when you switch.",
        parts={"scale": Part(name="rslora")},
    ),
    "lora_plus": Preset(
        title="LoRA+: B learns 16 times as fast as A",
        paper="arXiv:2402.12354",
        when="When LoRA learns slowly, in wide models above all. Take a lower learning rate than LoRA's, because it is "
        "that of A; `train.optimizer: {lora_plus: {ratio: 8}}` sets the ratio.",
        parts={"optimizer": Part(name="lora_plus")},
    ),
    "lora_fa": Preset(
        title="LoRA-FA: LoRA with A frozen at its random start",
        paper="arXiv:2308.03303",
        when="When activations, not weights, fill the memory: half the trainable numbers, and the inputs of the "
        "adapted layers need not be kept for the backward pass. Often wants twice the rank.",
        parts={"trainable": Part(name="lora_fa"), "optimizer": Part(name="lora_fa")},
    ),
    "asymmetric": Preset(
        title="Asymmetric LoRA: A frozen at random orthonormal rows, B trained",
        paper="arXiv:2402.16842",
        when="As lora_fa, with a start in which no two directions overlap; at twice the r it has as many trained "
        "numbers as LoRA, and generalises at least as well.",
        parts={"trainable": Part(name="lora_fa"), "init": Part(name="orthogonal")},
    ),
    "init_b": Preset(
        title="LoRA started from the other side: A zero, B random",
        paper="arXiv:2406.08447",
        when="To compare starts. The paper recommends the default start over this one.",
        parts={"init": Part(name="zero_a")},
    ),
    "dora": Preset(
        title="DoRA: LoRA with a trained length for every row of W",
        paper="arXiv:2402.09353",
        when="When quality at a small r matters more than the time of a step. Half of LoRA's r often does; take a "
        "learning rate slightly below LoRA's.",
        parts={"combine": Part(name="dora")},
    ),
    "qlora": Preset(
        title="QLoRA: LoRA over a base that is kept in 4 bits",
        paper="arXiv:2305.14314",
        when="When the base does not fit in memory in 16 bits. The paper adapts all linear layers, r 64 and alpha 16. "
        "Merged, it is the quantised base in 16 bits; `lora merge --onto original` is another model.",
        parts={"base": Part(name="nf4")},
    ),
    "qdora": Preset(
        title="QDoRA: DoRA over a base that is kept in 4 bits",
        paper="arXiv:2402.09353",
        when="As qlora, when quality at a small r matters more than the time of a step.",
        parts={"base": Part(name="nf4"), "combine": Part(name="dora")},
    ),
    "loftq": Preset(
        title="LoftQ: QLoRA whose A and B start as what quantising took",
        paper="arXiv:2310.08659",
        when="As qlora, above all with a large r and few steps: the model starts closer to the one that is on disk. "
        "Saved on the same base as qlora's with one iteration, on one of its own with more.",
        parts={"base": Part(name="nf4"), "init": Part(name="loftq")},
    ),
    "lq_lora": Preset(
        title="LQ-LoRA: W0 as a quantised matrix and a thin one, which trains",
        paper="arXiv:2311.12023",
        when="As loftq. The thin matrix is taken off W0 first and the rest is quantised. With `model: {quantize: nf, "
        "bits: 2.75}` each layer gets its own bits, as in the paper; without, all have 4.",
        parts={"base": Part(name="nf4"), "init": Part(name="lq")},
    ),
    "lq_lora_fisher": Preset(
        title="LQ-LoRA whose thin matrix makes up first for what the loss feels most",
        paper="arXiv:2311.12023",
        when="As lq_lora, when the rows that are trained on are like those that matter: 32 of them are looked at "
        "before the first step, with a gradient of every W. With `model.bits` the choice of bits counts them, too.",
        parts={"base": Part(name="nf4"), "init": Part(name="lq_fisher")},
    ),
    "qa_lora": Preset(
        title="QA-LoRA: LoRA on sums of 32 inputs each, so that it merges into the zero points of a 4-bit base",
        paper="arXiv:2309.14717",
        when="When the merged model is to stay in 4 bits: `lora merge` writes plain weights, and "
        "`model.quantize: int4` makes the trained codes and scales of them again; llama.cpp's Q4_1 finds these codes, "
        "too. A has a 32nd of LoRA's numbers, so more r is affordable.",
        parts={"base": Part(name="int4"), "delta": Part(name="pooled"), "init": Part(name="own")},
    ),
    "lqer": Preset(
        title="LQER: A and B start as what quantising took, weighted by what the layer's inputs use",
        paper="arXiv:2402.02446",
        when="As loftq. The paper's own use is without training: `train: {max_steps: 1, learning_rate: 0}`.",
        parts={"base": Part(name="nf4"), "init": Part(name="lqer")},
    ),
    "pissa": Preset(
        title="PiSSA: A and B start as the principal part of W0",
        paper="arXiv:2404.02948",
        when="When few steps have to do: it usually learns faster than LoRA. The paper sets alpha = r.",
        parts={"init": Part(name="pissa")},
    ),
    "milora": Preset(
        title="MiLoRA: A and B start as the least part of W0",
        paper="arXiv:2406.09044",
        when="When what the model knows should suffer little. The paper sets alpha = r.",
        parts={"init": Part(name="milora")},
    ),
    "olora": Preset(
        title="OLoRA: A and B start as the QR decomposition of W0",
        paper="arXiv:2406.01775",
        when="As pissa, at the price of a QR instead of an SVD before the first step.",
        parts={"init": Part(name="olora")},
    ),
    "eva": Preset(
        title="EVA: A starts along the directions in which the inputs vary most, and ranks follow",
        paper="arXiv:2410.07170",
        when="With data that differs from what the base was trained on. 256 training rows are looked at before the "
        "first step.",
        parts={"init": Part(name="eva", settings={"rho": 2.0})},
    ),
    "corda": Preset(
        title="CorDA: PiSSA (or MiLoRA) in the geometry of the layer's inputs",
        paper="arXiv:2406.05223",
        when="`init: {corda: {mode: ipm}}` for a new task, `kpm` to keep what the model knows.",
        parts={"init": Part(name="corda")},
    ),
    "lora_ga": Preset(
        title="LoRA-GA: A and B start along the gradient of full fine-tuning",
        paper="arXiv:2407.05000",
        when="When few steps have to do. The paper uses it with `scale: rslora`.",
        parts={"init": Part(name="lora_ga"), "scale": Part(name="rslora")},
    ),
    "adalora": Preset(
        title="AdaLoRA: starts with a larger rank and closes the least important components",
        paper="arXiv:2303.10512",
        when="When the number of parameters matters, and layers differ in how much they have to learn. "
        "`r` is what is left on average.",
        parts={"delta": Part(name="gated"), "init": Part(name="small"), "rank": Part(name="adalora")},
    ),
    "trilora": Preset(
        title="TriLoRA: LoRA with a trained gate for each of its r components, all closed at first",
        paper="arXiv:2405.11236",
        when="As LoRA; to see which components are used, and how much. r numbers a layer more than LoRA.",
        parts={"delta": Part(name="gated"), "init": Part(name="closed")},
    ),
    "flora_core": Preset(
        title="FLoRA: LoRA with a full r×r core between its factors",
        paper="arXiv:2405.14739",
        when="As LoRA; the core mixes all of its directions, at r² numbers a layer more.",
        parts={"delta": Part(name="core"), "init": Part(name="closed")},
    ),
    "lora_xs": Preset(
        title="LoRA-XS: r² numbers a layer, between frozen singular vectors of W0",
        paper="arXiv:2405.17604",
        when="When very few numbers are to train: r² a layer, whatever its size; r of 64 and more is affordable. Wants "
        "a higher learning rate than LoRA. Saved as LoRA of rank r, because singular vectors are not the same to the "
        "bit on two machines. Its abstract: over 100 times fewer trained numbers than LoRA in a model of 7B.",
        parts={
            "delta": Part(name="core"),
            "init": Part(name="svd_of_w"),
            "trainable": Part(name="only_core"),
        },
    ),
    "sora": Preset(
        title="SoRA: gates that are pulled to zero in every step, so that the rank of each layer finds itself",
        paper="arXiv:2311.11696",
        when="When the rank is to follow from the data: `r` is the largest one a layer may have, "
        "`rank: {sora: {threshold: ...}}` the price of a component. Set it with the length of the run: about one over "
        "the number of steps closes what nothing holds open.",
        parts={"delta": Part(name="gated", settings={"start": 1.0}), "rank": Part(name="sora")},
    ),
    "dora_dynamic": Preset(
        title="DoRA of dynamic rank: closes the components that contribute least to their layer's ΔW",
        paper="arXiv:2405.17357",
        when="As adalora, by a score that needs no gradient, and with all decisions in the first half of the run.",
        parts={"delta": Part(name="gated"), "init": Part(name="closed"), "rank": Part(name="dora_dynamic")},
    ),
    "bilora": Preset(
        title="BiLoRA: the gates of ΔW learn from one half of the rows, its factors from the other",
        paper="arXiv:2403.13037",
        when="With few rows, which LoRA learns by heart; a step takes twice as long. "
        "`lifecycle: {bilora: {share: 0.2}}` lets the gates have a fifth of the rows.",
        parts={
            "delta": Part(name="gated"),
            "init": Part(name="small"),
            "lifecycle": (Part(name="bilora"),),
        },
    ),
    "dylora": Preset(
        title="DyLoRA: one training for every rank up to r",
        paper="arXiv:2210.07558",
        when="When the rank is to be chosen afterwards: `lora export --r b` cuts the adapter to rank b. At its full r "
        "it is a little behind LoRA trained for that r alone.",
        parts={"delta": Part(name="nested"), "rank": Part(name="dylora")},
    ),
    "alora": Preset(
        title="ALoRA: components move from layers where they do little to layers where they do much",
        paper="arXiv:2403.16187",
        when="When layers differ in how much they have to learn, and the number of parameters is to stay what it is. "
        "Rounds cost two passes over 32 held-out rows for every component of the model: for few layers or a small r.",
        parts={"rank": Part(name="alora")},
        keys={"r": 8},
    ),
    "autolora": Preset(
        title="AutoLoRA: learns on held-out rows which components count, then trains LoRA with these ranks",
        paper="arXiv:2403.09113",
        when="When ranks are to be found in the run itself. `r` is the largest; about half of it is left. The first "
        "part of the run, `rank: {autolora: {search: 0.3}}`, only finds the ranks, in steps of twice the cost.",
        parts={"delta": Part(name="selected"), "rank": Part(name="autolora")},
        keys={"r": 8},
    ),
    "prilora": Preset(
        title="PRILoRA: ranks that rise with depth, and rows of A pruned by weight and input",
        paper="arXiv:2401.11316",
        when="When upper layers have more to learn, as in classification. `r` is the rank in the middle.",
        parts={"rank": Part(name="prilora")},
        keys={"r": 8},
    ),
    "aflora": Preset(
        title="AFLoRA: LoRA between two vectors; A and B are frozen one after the other on the way",
        paper="arXiv:2403.13269",
        when="To train few numbers for most of the run: VeRA's vectors remain when every A and B is frozen.",
        parts={
            "delta": Part(name="scaled"),
            "init": Part(name="own"),
            "scale": Part(name="constant"),
            "lifecycle": (Part(name="aflora"),),
        },
        keys={"r": 4},
    ),
    "dropbp": Preset(
        title="DropBP: LoRA without the backward pass of some residual branches, drawn anew in every step",
        paper="arXiv:2402.17812",
        when="When time is short: at rate 0.5 about half of the backward pass is saved. Goes on top of any method as "
        "`lifecycle: dropbp`.",
        parts={"lifecycle": (Part(name="dropbp"),)},
    ),
    "sparse_adapter": Preset(
        title="SparseAdapter: LoRA with the least important entries pruned after a few steps",
        paper="arXiv:2210.04284",
        when="For a larger r at the same number of parameters that matter: r 64 with sparsity 0.75 against r 16.",
        parts={"lifecycle": (Part(name="sparse_adapter"),)},
    ),
    "roselora": Preset(
        title="RoseLoRA: rows of A and columns of B kept sparse, so that ΔW touches few weights",
        paper="arXiv:2406.10777",
        when="When little of W0 may change, as in editing what a model knows.",
        parts={"lifecycle": (Part(name="roselora"),)},
    ),
    "loraprune": Preset(
        title="LoRAPrune: LoRA that decides on the way which heads and channels of the model go",
        paper="arXiv:2305.18403",
        when="When the model is to do its task with less, and there is no memory for gradients of W. Half of it goes; "
        "`lifecycle: {loraprune: {share: 0.2}}` lets a fifth go, and `layers` spares blocks. Saved beside the base as "
        "it was; merged it has zeros where something is gone, in the old shapes.",
        parts={
            "delta": Part(name="pruned"),
            "init": Part(name="own"),
            "lifecycle": (Part(name="loraprune"),),
        },
    ),
    "lora_drop": Preset(
        title="LoRA-drop: the layers whose ΔW does least share one A and one B",
        paper="arXiv:2402.07721",
        when="To train fewer numbers in a deep model: its abstract says half of LoRA's, at par. Needs several blocks.",
        parts={"lifecycle": (Part(name="lora_drop"),)},
    ),
    "vera": Preset(
        title="VeRA: one random, frozen pair (A, B) for all layers; two vectors a layer train",
        paper="arXiv:2310.11454",
        when="When adapters have to be tiny: r + out numbers a layer. Wants a large r and about ten times LoRA's "
        "learning rate.",
        parts={"delta": Part(name="vera"), "init": Part(name="own"), "scale": Part(name="constant")},
        keys={"r": 256},
    ),
    "tied_lora": Preset(
        title="Tied-LoRA: layers of one kind train one A and one B together, and two vectors each",
        paper="arXiv:2311.09578",
        when="When adapters have to be small, and vera's frozen pair is too little: LoRA's numbers once a kind of "
        "layer, and r + out a layer. `delta: {tied: {share: all}}` for one pair in all. Its abstract: near LoRA with a "
        "fraction of the trained numbers.",
        parts={"delta": Part(name="tied"), "init": Part(name="own")},
    ),
    "lotr": Preset(
        title="LoTR: layers of one shape train one L and one R together, and r² numbers each",
        paper="arXiv:2402.01376",
        when="As tied_lora, where a layer may mix the common directions freely. L and R start at N(0, 1), so steps "
        "are large: begin with `alpha: 1`.",
        parts={"delta": Part(name="lotr"), "init": Part(name="own")},
    ),
    "nola": Preset(
        title="NOLA: A and B are sums of random matrices; 2·K weights a layer train",
        paper="arXiv:2310.02556",
        when="When the file has to be tiny, whatever the size of the layers and r: 2·K numbers a layer, and the seed. "
        "A step takes longer than LoRA's. Its abstract: almost 20 times smaller than LoRA of rank 1 for LLaMA-2 70B.",
        parts={"delta": Part(name="nola"), "init": Part(name="own")},
    ),
    "vb_lora": Preset(
        title="VB-LoRA: A and B are put together from the vectors of one bank, common to all layers",
        paper="arXiv:2405.15179",
        when="When very many adapters are to be kept: some bytes a vector, and one bank. Trains more numbers than it "
        "saves, and wants a higher learning rate than LoRA. `length` has to divide both sides of every layer. Its "
        "abstract: 0.4 % of LoRA's stored numbers with Llama-2 13B.",
        parts={"delta": Part(name="vb_lora"), "init": Part(name="own"), "scale": Part(name="constant")},
        keys={"r": 4},
    ),
    "symmetric": Preset(
        title="Symmetric start: both factors random, W = W0 − s·B0·A0 + s·B·A",
        paper="kexue.fm/archives/9590",
        when="To let both factors learn from the first step on.",
        parts={"init": Part(name="symmetric")},
    ),
    "optimizer_view": Preset(
        title="LoRA as an optimizer: the layer is left alone, its gradient is projected onto A and B",
        paper="kexue.fm/archives/9590",
        when="To study LoRA as an optimizer: its steps are LoRA's, to rounding. Slower than LoRA, because the gradient "
        "of every W is computed, and with a float32 copy of W in memory.",
        parts={"combine": Part(name="optimizer_view")},
    ),
    "random_projection": Preset(
        title="Descent along a random projection of the gradient, drawn anew in every step",
        paper="kexue.fm/archives/9590",
        when="To study what low rank does without Adam and without a fixed subspace. Plain SGD: begin with a learning "
        "rate of 0.1 to 1. That it forgets less is a conjecture; `lora compare` measures it.",
        parts={
            "delta": Part(name="two_sided"),
            "init": Part(name="random_projection"),
            # Two terms add up to 2·G on average; s² = 1/2 halves them.
            "scale": Part(name="constant", settings={"value": 0.5**0.5}),
            "lifecycle": (Part(name="restart", settings={"every": 1}),),
            "optimizer": Part(name="sgd"),
        },
    ),
    "additive": Preset(
        title="Additive decomposition: a sum of repeated blocks instead of a product",
        paper="kexue.fm/archives/9590",
        when="A legal start at zero with nothing random; rank 2r with LoRA's number of parameters. r has to divide "
        "both sides of every layer.",
        parts={"delta": Part(name="additive"), "init": Part(name="own"), "scale": Part(name="constant")},
    ),
    "miss": Preset(
        title="MiSS (Bone): the one-sided half of the additive decomposition",
        paper="arXiv:2409.15371",
        when="The cheapest step of all; better than LoRA in PEFT's own benchmark. r has to divide the inputs of every "
        "layer.",
        parts={"delta": Part(name="miss"), "init": Part(name="own"), "scale": Part(name="constant")},
    ),
    "melora": Preset(
        title="MELoRA: n small LoRAs on the diagonal of ΔW",
        paper="arXiv:2402.17263",
        when="For a high rank with few numbers: rank n·r at the price of r. n has to divide both sides of every layer. "
        "Its abstract: 8 times fewer trained numbers (understanding), 36 times (instructions) than LoRA, and better.",
        parts={"delta": Part(name="melora"), "init": Part(name="own")},
    ),
    "loha": Preset(
        title="LoHa (FedPara): two thin products multiplied entry by entry, rank up to r²",
        paper="arXiv:2108.06098",
        when="For a high rank from a small r, where the longer step does not matter. Its abstract, of federated "
        "learning: 3 to 10 times less to send than whole layers.",
        parts={"delta": Part(name="loha"), "init": Part(name="own")},
        keys={"r": 8},
    ),
    "lokr": Preset(
        title="LoKr: the Kronecker product of two small matrices",
        paper="arXiv:2309.14859",
        when="For a high rank from very few numbers. `delta: {lokr: {factor: 8}}` makes the first matrix smaller and "
        "the second one larger.",
        parts={"delta": Part(name="lokr"), "init": Part(name="own")},
    ),
    "deep_lora": Preset(
        title="Deep LoRA: three small cores in a row, in a frame along the gradient",
        paper="arXiv:2406.04112",
        when="With little data, when r is not to be tuned: the cores use few of the r directions by themselves. Learns "
        "slowly at first, because they start tiny.",
        parts={"delta": Part(name="deep"), "init": Part(name="gradient_frame")},
    ),
    "loretta": Preset(
        title="LoRETTA: A and B as tensor trains",
        paper="arXiv:2402.11417",
        when="When adapters have to be tiny and the layers are large: numbers grow with the logarithm of the layer's "
        "size. Its abstract: up to 100 times fewer trained numbers than LoRA in LLaMA-2 7B.",
        parts={"delta": Part(name="loretta"), "init": Part(name="own")},
    ),
    "serial": Preset(
        title="Serial LoRA: train, merge, start again",
        paper="kexue.fm/archives/9590",
        when="When r has to stay small but ΔW may not: after K pieces its rank is K·r. "
        "`lifecycle: {restart: {every: 100}}` sets the length of a piece.",
        parts={"lifecycle": (Part(name="restart"),)},
    ),
    "relora": Preset(
        title="ReLoRA: serial LoRA with Adam pruned and the learning rate warmed up at every restart",
        paper="arXiv:2307.05695",
        when="For long training, up to pre-training, with large r.",
        parts={
            "lifecycle": (Part(name="restart", settings={"every": 2000, "moments": 0.001, "warmup": 100}),)
        },
        keys={"r": 128},
    ),
    "cola": Preset(
        title="COLA: a chain of LoRAs, each on what the ones before it left over",
        paper="arXiv:2401.04151",
        when="As serial; a short chain, each link with a fresh optimizer and trained until it learns no more.",
        parts={"lifecycle": (Part(name="restart", settings={"every": 200}),)},
    ),
    "xgblora": Preset(
        title="XGBLoRA: many rank-1 boosters, each on a few layers drawn by lot",
        paper="arXiv:2410.19694",
        when="To see how far rank 1 goes. `layers` is how many layers a booster has.",
        parts={"lifecycle": (Part(name="restart", settings={"every": 20, "layers": 11}),)},
        keys={"r": 1},
    ),
    "flora": Preset(
        title="Flora: the gradient compressed by a random projection that is drawn anew now and then",
        paper="arXiv:2402.03293",
        when="High-rank training with the optimizer memory of LoRA. Adam works on the compressed gradient here, where "
        "the paper has Adafactor.",
        parts={
            "init": Part(name="random_projection"),
            "scale": Part(name="constant"),
            "trainable": Part(name="lora_fa"),
            "lifecycle": (Part(name="restart", settings={"every": 1000, "moments": "carry"}),),
        },
    ),
    "galore": Preset(
        title="GaLore: Adam on the gradient's projection on its leading singular vectors",
        paper="arXiv:2403.03507",
        when="Full-rank training with the optimizer memory of LoRA; weights are saved whole once they have moved far.",
        parts={
            "init": Part(name="galore"),
            "scale": Part(name="constant", settings={"value": 0.25}),
            "trainable": Part(name="only_a"),
            "lifecycle": (Part(name="restart", settings={"every": 200, "moments": 1.0}),),
        },
        keys={"r": 128},
    ),
    "delta_lora": Preset(
        title="Delta-LoRA: W0 moves along with B·A, without a gradient of its own",
        paper="arXiv:2309.02411",
        when="As LoRA with larger steps after a while; no dropout.",
        parts={"lifecycle": (Part(name="delta_lora"),)},
    ),
    "fourierft": Preset(
        title="FourierFT: ΔW is the inverse Fourier transform of a few trained entries",
        paper="arXiv:2405.03003",
        when="When adapters have to be tiny: r numbers a layer, whatever its size. Wants about a hundred times LoRA's "
        "learning rate.",
        parts={
            "delta": Part(name="fourierft"),
            "init": Part(name="own"),
            "scale": Part(name="constant", settings={"value": 150.0}),
        },
        keys={"r": 1000},
    ),
    "svdiff": Preset(
        title="SVDiff: the singular values of W0 are shifted, its singular vectors stay",
        paper="arXiv:2303.11305",
        when="When a change should stay within what W0 already does: min(in, out) numbers a layer. The singular "
        "vectors are twice as many numbers as W0, in float32.",
        parts={"delta": Part(name="svdiff"), "init": Part(name="own"), "scale": Part(name="constant")},
    ),
    "sam_parser": Preset(
        title="SAM-PARSER: the singular values of W0 train, its singular vectors stay",
        paper="arXiv:2308.14604",
        when="As svdiff, where singular values may also change their sign.",
        parts={"delta": Part(name="sam_parser"), "init": Part(name="own"), "scale": Part(name="constant")},
    ),
    "spectral": Preset(
        title="Spectral Adapter, additive: the leading singular vectors of W0 are changed",
        paper="arXiv:2405.13952",
        when="As pissa, with a start that is exactly the base. As many numbers as LoRA.",
        parts={"delta": Part(name="spectral"), "init": Part(name="own"), "scale": Part(name="constant")},
    ),
    "spectral_rotate": Preset(
        title="Spectral Adapter, rotating: the leading singular vectors of W0 are turned among themselves",
        paper="arXiv:2405.13952",
        when="When adapters have to be tiny: r·(r − 1) numbers a layer. Wants ten times LoRA's learning rate.",
        parts={
            "delta": Part(name="spectral_rotate"),
            "init": Part(name="own"),
            "scale": Part(name="constant"),
        },
    ),
    "hra": Preset(
        title="HRA: the inputs of W0 are turned by a chain of r reflections",
        paper="arXiv:2405.17484",
        when="When the layer should keep what its rows are to one another: an orthogonal change of rank r, half as "
        "many numbers as LoRA.",
        parts={"delta": Part(name="hra"), "init": Part(name="pairs"), "scale": Part(name="constant")},
        keys={"r": 8},
    ),
    "oft": Preset(
        title="OFT: the inputs of W0 are turned, block by block",
        paper="arXiv:2306.07280",
        when="When the layer should keep what its rows are to one another. r is the size of a block, and has to divide "
        "the inputs of every layer; a step costs more than LoRA's.",
        parts={"delta": Part(name="oft"), "init": Part(name="own"), "scale": Part(name="constant")},
        keys={"r": 32},
    ),
    "boft": Preset(
        title="BOFT: the inputs of W0 are turned by a product of block-diagonal matrices",
        paper="arXiv:2311.06243",
        when="As oft with smaller blocks, which `delta: {oft: {factors: 3}}` joins by threes; r·2^(factors − 1) has "
        "to divide the inputs of every layer.",
        parts={
            "delta": Part(name="oft", settings={"factors": 2}),
            "init": Part(name="own"),
            "scale": Part(name="constant"),
        },
        keys={"r": 8},
    ),
    "ia3": Preset(
        title="(IA)³: every output of W0 gets a factor",
        paper="arXiv:2205.05638",
        when="With very few rows. The paper adapts `target_modules: [k_proj, v_proj, up_proj]` only; wants ten times "
        "LoRA's learning rate.",
        parts={"delta": Part(name="ia3"), "init": Part(name="own"), "scale": Part(name="constant")},
    ),
    "bitfit": Preset(
        title="BitFit: the biases train, and nothing else",
        paper="arXiv:2106.10199",
        when="With models whose layers have biases, such as GPT-2; those of Llama's kind have none.",
        parts={"delta": Part(name="none"), "init": Part(name="own"), "scale": Part(name="constant")},
        keys={"train_also": ("biases",)},
    ),
    "ln_tuning": Preset(
        title="LN-tuning: the norms train, and nothing else",
        paper="arXiv:2211.08682",
        when="When adapters have to be tiny, and to see how little is enough.",
        parts={"delta": Part(name="none"), "init": Part(name="own"), "scale": Part(name="constant")},
        keys={"train_also": ("norms",)},
    ),
    "hydra_lora": Preset(
        title="HydraLoRA: one A, several B, mixed for every token by a router",
        paper="arXiv:2404.19245",
        when="For data of several kinds in one adapter. Cannot be merged, because what it adds depends on the input; "
        "`delta: {hydra: {count: 3}}` sets the number of heads.",
        parts={"delta": Part(name="hydra"), "init": Part(name="own")},
        keys={"r": 8},
    ),
    "molora": Preset(
        title="MoLoRA: several whole LoRAs on one layer, mixed for every token by a router",
        paper="arXiv:2309.05444",
        when="As hydra_lora, where the kinds of data have little in common: every expert has an A of its own. "
        "Cannot be merged.",
        parts={"delta": Part(name="experts", settings={"count": 10}), "init": Part(name="own")},
        keys={"r": 4},
    ),
    "mov": Preset(
        title="MoV: several vectors that stretch the outputs, mixed for every token by a router",
        paper="arXiv:2309.05444",
        when="As molora with far fewer numbers: `r` is how many vectors there are. The paper puts it on keys, values "
        "and the middle of the MLP. Cannot be merged.",
        parts={"delta": Part(name="mov"), "init": Part(name="own"), "scale": Part(name="constant")},
        keys={"r": 10},
    ),
    "malora": Preset(
        title="MALoRA: sparse experts that share their down-projection",
        paper="arXiv:2410.22782",
        when="As molora with fewer numbers for as many experts, of which every token is given two. Cannot be merged.",
        parts={
            "delta": Part(name="malora"),
            "init": Part(name="own"),
            "lifecycle": (Part(name="load_balance"),),
        },
        keys={"r": 8},
    ),
    "mixlora": Preset(
        title="MixLoRA (conditional): for each document r factors of each side, chosen from two pools",
        paper="arXiv:2402.15896",
        when="For prompts of several kinds: each is answered with a LoRA put together for it, from what stands before "
        "the first learned token. Texts that are learned whole have no prompt but their first token. Cannot be merged.",
        parts={"delta": Part(name="factors"), "init": Part(name="own")},
        keys={"r": 4},
    ),
    "mixlora_moe": Preset(
        title="MixLoRA: the MLP of each block becomes sparse experts, each a LoRA of it",
        paper="arXiv:2404.15159",
        when="For data of several kinds, where what is between the layers of the MLP should differ, too. Each expert "
        "that a token is given costs one pass through the MLP. `target_modules` has to name the layers of MLPs. The "
        "paper puts plain LoRA on attention beside it. Cannot be merged.",
        parts={
            "delta": Part(name="ffn_experts"),
            "init": Part(name="own"),
            "lifecycle": (Part(name="load_balance"),),
        },
        keys={"target_modules": r".*\.mlp\.[^.]+"},
    ),
    "hiddenkey": Preset(
        title="HiddenKey: LoRA with dropout of whole keys in attention and inside the MLP, and two passes that should "
        "agree",
        paper="arXiv:2403.00812",
        when="When LoRA learns its few rows by heart. `attention: {key_drop: {key: 0.1, hidden: 0.1}}` sets the rates, "
        "`lifecycle: {r_drop: {weight: 1}}` what disagreeing costs; the paper tunes them for each task. A step takes "
        "half as long again for its second pass: `lifecycle: []` leaves that out (there HiddenKey⁻).",
        parts={"attention": Part(name="key_drop"), "lifecycle": (Part(name="r_drop"),)},
    ),
    "longlora": Preset(
        title="LongLoRA: attention in shifted groups while training, norms and embeddings trained",
        paper="arXiv:2309.12307",
        when="For long documents: a quarter of the cost of attention. Used with full attention afterwards. A model "
        "whose ends are tied needs `model.untie: true`.",
        parts={"attention": Part(name="shifted")},
        keys={"train_also": ("norms", "embeddings")},
    ),
    "full": Preset(
        title="Full fine-tuning: every parameter trains",
        paper="—",
        when="The reference of every comparison; 18 to 20 bytes of memory a parameter.",
        parts={"delta": Part(name="whole"), "init": Part(name="own"), "scale": Part(name="constant")},
        keys={"train_also": ("everything",)},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """The parts of a method, one an axis; of the lifecycle any number."""

    name: str
    base: Part | None = None
    """What W0 is quantised to, after the start; None: it stays as it is."""
    delta: Part = Part(name="lowrank")
    combine: Part = Part(name="add")
    init: Part = Part(name="kaiming")
    scale: Part = Part(name="alpha_over_r")
    trainable: Part = Part(name="all")
    dropout: Part = Part(name="standard")
    attention: Part = Part(name="full")
    rank: Part = Part(name="fixed")
    lifecycle: tuple[Part, ...] = ()
    optimizer: Part = Part(name="adamw")

    def chosen(self) -> dict[str, tuple[Part, ...]]:
        """Axis -> parts."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "name"}
        return {
            axis: part if isinstance(part, tuple) else (part,)
            for axis, part in named.items()
            if part is not None
        }


def resolve(adapter: "AdapterRecipe", optimizer: Part | None = None, quantize: str | None = None) -> Method:
    """The preset's parts with the recipe's own on top.

    Args:
        adapter: the section of the recipe.
        optimizer: `train.optimizer`, where the recipe names one.
        quantize: `model.quantize`, where the recipe names one; `none` takes the preset's back.

    Raises:
        UserError: there is no such method.
    """
    own = {axis: getattr(adapter, axis) for axis in AXES if axis not in ("base", "optimizer")}
    own["optimizer"] = optimizer
    chosen = {axis: part for axis, part in own.items() if part is not None}
    if quantize is not None:
        chosen["base"] = None if quantize == "none" else Part(name=quantize)
    if "dropout" not in adapter.model_fields_set:
        del chosen["dropout"]
    return Method(name=adapter.method, **{**_preset(adapter.method).parts, **chosen})


def with_defaults(adapter: "AdapterRecipe") -> "AdapterRecipe":
    """The section with the preset's values for the keys that the recipe does not set."""
    preset = _preset(adapter.method)
    given = {key for key in adapter.model_fields_set if getattr(adapter, key) is not None}
    left = {key: value for key, value in preset.keys.items() if key not in given}
    return adapter.model_copy(update=left)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        fix = parts.did_you_mean(name, PRESETS)
        raise UserError(f"unknown method '{name}'", where="adapter.method", fix=fix)
    return PRESETS[name]
