"""A process that is killed, or asked to stop, or that is not alone."""

import signal

from scripts.faults.lab import SAME, Finding, Lab, forwards, tally
from scripts.faults.task import Fault

PACE = 0.5
"""Seconds of a step where a stop is asked for: transformers waits three seconds before it answers."""


def control(lab: Lab, system: str) -> Finding:
    """P0: nothing happens, and the same command gives the same bytes again."""
    happened = []
    for _ in range(lab.draws(2, 10)):
        task = lab.task()
        lab.undisturbed(system, task)
        happened.append(lab.judged(system, task, lab.run(system, task, "P0")))
    return tally("P0", system, happened, {SAME})


def random_kills(lab: Lab, system: str) -> Finding:
    """P1: kill it at a random time of its life, then run the same command again."""
    rng, happened = lab.rng("P1"), []
    while len(happened) < lab.draws(60, 200):
        task = lab.task()
        seconds = lab.undisturbed(system, task)[1].seconds
        if lab.run(system, task, "P1 killed", Fault(after=rng.uniform(0, seconds))).code == 0:
            continue  # it was faster
        happened.append(lab.judged(system, task, lab.run(system, task, "P1 again")))
    return tally("P1", system, happened, {SAME})


def stops(lab: Lab, system: str) -> Finding:
    """P7: SIGTERM at a random time; then the same command, and no more than a step is computed twice."""
    rng, happened = lab.rng("P7"), []
    task = lab.task(save_steps=4)
    steps = task.steps
    seconds = lab.undisturbed(system, task)[1].seconds + steps * PACE
    for _ in range(lab.draws(8, 100)):
        lab.clear(task)
        fault = Fault(after=rng.uniform(0.2, 0.9) * seconds, signal=signal.SIGTERM, pace=PACE)
        first = lab.run(system, task, "P7 stopped", fault)
        second = lab.run(system, task, "P7 again") if first.code else None
        judged = lab.judged(system, task, second or first)
        lost = forwards(first) + (forwards(second) if second else 0) - steps
        happened.append(f"{judged}, {lost} steps lost" if judged == SAME and lost > 1 else judged)
    return tally("P7", system, happened, {SAME})


def together(lab: Lab, system: str) -> Finding:
    """P16: the same command twice at once, in one folder: the second is refused, and the first not disturbed."""
    happened = []
    for _ in range(lab.draws(3, 20)):
        task = lab.task()
        lab.undisturbed(system, task)
        first, second = lab.run_all(system, task, "P16", Fault(beside=0.5, pace=0.3))
        judged = lab.judged(system, task, first)
        other = "second refused" if second.code else "second ran, too"
        happened.append(f"{other}, first {judged}")
    return tally("P16", system, happened, {f"second refused, first {SAME}"})


def in_a_save(lab: Lab, system: str) -> Finding:
    """P2: kill it before each operation on a file of its run, one after the other, then run the command again."""
    task, happened = lab.task(), []
    log = lab.undisturbed(system, task)[1].log
    operations = len((log.parent / f"{log.name}.operations").read_text().splitlines())
    every = max(1, operations // lab.draws(30, operations))
    for number in range(every - 1, operations, every):
        lab.clear(task)
        lab.run(system, task, f"P2 at {number}", Fault(operation=number))
        happened.append(lab.judged(system, task, lab.run(system, task, "P2 again")))
    return tally("P2", system, happened, {SAME})
