"""What is computed: numbers that are not finite, too little memory, a batch in pieces."""

from pathlib import Path
from typing import Any

from scripts.faults.lab import Finding, Lab, Outcome, adapter, tally
from scripts.faults.task import Fault, Task

MARK = "~"
"""The character whose embedding is not a number."""
CLOSE = 1e-3
"""Weights that are less apart, as a share of the largest, come of the same steps; Adam enlarges what is rounded."""
STOPPED = "stopped, nothing saved that is not a number"


def not_a_number(lab: Lab, system: str) -> Finding:
    """P8: a row makes the loss NaN; nothing that was trained on it may be saved."""
    model, happened = _poisoned(lab), []
    for at in range(lab.draws(3, 12)):
        rows = [{"prompt": f"{a}+{a}{MARK if a == at else '='}", "completion": str(2 * a)} for a in range(12)]
        task = lab.task(model=str(model), rows=str(lab.write_rows("poisoned", rows)), save_steps=1)
        outcome = lab.run(system, task, f"P8 row {at}")
        spoiled = [path for path in Path(task.out).rglob("adapter*.safetensors") if not _is_finite(path)]
        happened.append(_seen(outcome, spoiled))
    return tally("P8", system, happened, {each for each in happened if each.startswith(STOPPED)})


def _seen(outcome: Outcome, spoiled: list[Path]) -> str:
    if not spoiled:
        return f"{STOPPED} ({outcome.reason})" if outcome.code else "finished, all numbers"
    how = "trained to the end" if outcome.code == 0 else f"ended with {outcome.reason}"
    shown = "its log shows nan" if "nan" in outcome.said.lower() else "its log shows no nan"
    return f"{how}, saved an adapter of NaN, {shown}"


def _poisoned(lab: Lab) -> Path:
    """A copy of the model in which one byte has no embedding."""
    from transformers import AutoModelForCausalLM

    from tests import tiny

    folder, tokenizer = lab.folder / "poisoned", tiny.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(lab.model)
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(MARK)] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def out_of_memory(lab: Lab, system: str) -> Finding:
    """P12: from some step on only half a batch fits; the adapter is that of the whole batches all the same."""
    task, happened = lab.task(dropout=0.0), []
    expected = _trained(lab, system, task, "P12 enough")
    _, outcome = lab.undisturbed(system, task)
    bound = max(rows * tokens for rows, tokens in _shapes(outcome))
    for start in range(0, task.steps, lab.draws(3, 1)):
        lab.clear(task)
        fault = Fault(most_tokens=int(bound * 0.7), from_forward=start)
        outcome = lab.run(system, task, f"P12 from {start}", fault)
        if outcome.code:
            happened.append(f"ended with {outcome.reason}")
            continue
        apart = _apart(_weights(adapter(system, task)), expected)
        rows = _shapes(outcome)[-1][0]
        other = f"finished with other weights, {rows} rows at a time in place of {task.batch_size}"
        happened.append("same weights" if apart < CLOSE else other)
    return tally("P12", system, happened, {"same weights"})


def _shapes(outcome: Outcome) -> list[tuple[int, int]]:
    """Rows and tokens of each training pass."""
    noted = Path(f"{outcome.log}.forwards").read_text(encoding="utf-8").split()
    return [(int(rows), int(tokens)) for rows, tokens in (shape.split("x") for shape in noted)]


def in_pieces(lab: Lab, system: str) -> Finding:
    """P13: eight rows at once, or one by one: the same weights."""
    rows = [{"prompt": f"{a}+{a * a * a}=", "completion": str(a + a**3) * (1 + a % 4)} for a in range(16)]
    found = []
    for at_once in (8, 1, 2):
        changes: dict[str, Any] = {"batch_size": 8, "at_once": at_once, "dropout": 0.0, "steps": 4}
        task = lab.task(rows=str(lab.write_rows("pieces", rows)), **changes)
        found.append(_trained(lab, system, task, f"P13 {at_once} at once"))
    apart = [_apart(each, found[0]) for each in found[1:]]
    said = ", ".join(f"apart by {each:.1e}" for each in apart)
    return Finding(
        "P13", system, len(apart), sum(each < CLOSE for each in apart), f"{said} of the largest weight"
    )


def _trained(lab: Lab, system: str, task: Task, about: str) -> dict[str, Any]:
    outcome = lab.run(system, task, about)
    if outcome.code:
        raise SystemExit(f"{system} does not train: see {outcome.log}")
    return _weights(adapter(system, task))


def _weights(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _is_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _weights(path).values())


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference, as a share of the largest weight."""
    largest = max(float(tensor.abs().max()) for tensor in other.values())
    return max(float((one[name] - tensor).abs().max()) for name, tensor in other.items()) / largest
