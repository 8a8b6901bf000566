"""The model card of an adapter."""

import json
from typing import Any

from lora_cli import __version__
from lora_cli.adapter import rules
from lora_cli.adapter.plan import Plan
from lora_cli.recipe.dump import to_yaml
from lora_cli.recipe.schema import Recipe
from lora_cli.train.loop import Training

OWN = "It is in a format of lora's own: other tools cannot read it."


def card(recipe: Recipe, run: Training, log: list[dict[str, Any]], fits_peft: bool) -> str:
    """README.md: what it is, how it was made, how to use it; only what is known."""
    plan = run.adapter.plan
    steps = [line for line in log if "loss" in line]
    held_out = [line for line in log if "eval_loss" in line]
    trained = sum(p.numel() for p in run.adapter.trainable().values())
    facts = [
        f"- base: `{recipe.model.name}`",
        f"- method: {plan.method.name}{_size(plan)}, {trained:,} trained parameters",
        f"- data: {run.examples.counts.examples:,} examples, {run.examples.counts.trained_tokens:,} trained tokens",
        f"- steps: {run.step:,} of {recipe.train.batch_size} examples",
    ]
    if steps:
        facts.append(
            f"- training loss: {steps[0]['loss']:.4f} at the first step, {steps[-1]['loss']:.4f} at the last"
        )
    if held_out:
        facts.append(f"- held-out loss: {held_out[-1]['eval_loss']:.4f} per trained token")
    return f"""---
base_model: {json.dumps(recipe.model.name)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, {plan.method.name}]
---

# LoRA adapter

{chr(10).join(facts)}

```bash
lora generate . --prompt "..."{_merging(plan)}
```

{_elsewhere(plan, fits_peft)}

Made with lora-cli {__version__} from this recipe:

```yaml
{to_yaml(recipe).rstrip()}
```
"""


def _merging(plan: Plan) -> str:
    """The command, where a weight can stand for what was learned."""
    return "\nlora merge . --output merged" if rules.is_mergeable(plan.method) else ""


def _elsewhere(plan: Plan, fits_peft: bool) -> str:
    """What else can read it, and over which base."""
    if plan.method.base is not None:
        kept = plan.method.base.name
        return f"Its base is kept in {kept}, and made anew from the original files by every command of lora."
    return "It also loads with `peft.PeftModel.from_pretrained(base, folder)`." if fits_peft else OWN


def _size(plan: Plan) -> str:
    """Ranks and scales, where layers have them."""
    if not plan.layers:
        return ""
    ranks, scales = {spec.r for spec in plan.layers}, {spec.scale for spec in plan.layers}
    r = f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    s = f", scale {min(scales):g}" if len(scales) == 1 else ""
    return f", r {r}{s} in {len(plan.layers)} layers"
