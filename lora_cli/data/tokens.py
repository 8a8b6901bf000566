"""Text -> ids, as they stand when generation reads a prompt and writes an answer behind it."""

from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]

ANCHORS = ("\n", ".", "a", " ")
"""Texts to put in front of an answer; one of them does not melt into its first token."""


def encode(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[Ids]:
    """Ids of each text, nothing added in front or behind."""
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of long texts, which are counted and handled by us
    )
    return [tuple(ids) for ids in found["input_ids"]]


def join(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[Ids, Ids]:
    """Ids of a prompt, and of the answer behind it.

    Generation reads the ids of the prompt alone. So the two are tokenised as one text only where that leaves the
    prompt's ids as they are; where a token would reach over the boundary, the answer is tokenised for itself.
    """
    before, both = encode(tokenizer, prompt, prompt + answer)
    if both[: len(before)] == before:
        return before, both[len(before) :]
    return before, _for_itself(tokenizer, answer)


def _for_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Ids of a text that something stands before: without the space some tokenizers put at the start of a text."""
    found = encode(tokenizer, text, *ANCHORS, *(anchor + text for anchor in ANCHORS))
    plain, anchors, anchored = found[0], found[1 : 1 + len(ANCHORS)], found[1 + len(ANCHORS) :]
    for anchor, both in zip(anchors, anchored, strict=True):
        if both[: len(anchor)] == anchor:
            return both[len(anchor) :]
    return plain


def leading(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What the tokenizer puts in front of a plain text by its own habit: BOS for many, nothing for others."""
    ids, (bare,) = tuple(tokenizer("a")["input_ids"]), encode(tokenizer, "a")
    starts = [start for start in range(len(ids)) if ids[start : start + len(bare)] == bare]
    return ids[: starts[0]] if starts else ()
