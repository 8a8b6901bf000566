"""Which training examples a step reads: epochs over all of them, or over those that are not held out for a method.

What is held out is drawn by lot from the seed; which of it a step reads follows from (seed, step), as everything does
that is drawn: there is nothing to save.
"""

import math

import numpy as np

from lora_cli.data.cache import Examples
from lora_cli.data.pack import epoch_length, epoch_order
from lora_cli.errors import UserError


class Course:
    """Epochs over some examples, one after the other."""

    def __init__(
        self, examples: Examples, seed: int, batch_size: int, among: np.ndarray | None = None
    ) -> None:
        """`among`: of these only, by index, ascending; default: of all."""
        self.examples, self.seed, self.batch_size, self.among = examples, seed, batch_size, among
        self.steps_per_epoch = math.ceil(epoch_length(examples, among) / batch_size)
        """The last step of an epoch may have fewer rows."""
        self.order, self.epoch = np.empty(0, dtype=np.int64), -1

    def rows(self, step: int) -> list[int]:
        """The examples of step 0, 1, ..."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.order = epoch_order(self.examples, self.seed, epoch, self.among)
            self.epoch = epoch
        first = within * self.batch_size
        return [int(row) for row in self.order[first : first + self.batch_size]]

    def split(self, count: int) -> tuple["Course", "Course"]:
        """One that never reads `count` of the examples, and one of these alone.

        Raises:
            UserError: one of both would have none.
        """
        total = len(self.examples)
        if not 0 < count < total:
            what = (
                f"{count} of {total} training rows are to be held out, which has to leave some on either side"
            )
            raise UserError(
                what, where="data.train", fix="give more rows, or change what the method holds out"
            )
        drawn = np.random.default_rng([self.seed, total]).permutation(total)
        parts = (np.sort(drawn[count:]), np.sort(drawn[:count]))
        inner, outer = (Course(self.examples, self.seed, self.batch_size, part) for part in parts)
        return inner, outer
