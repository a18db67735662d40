# SPDX-License-Identifier: Apache-2.0
"""Do the members mean the same by a token id? Padding may differ; anything else is refused.

A draft that is said to have another vocabulary is compared token by token (`shared_tokens`).
"""

from collections.abc import Sequence
from typing import Any

from specens_kernels import Refusal


def shared_vocabulary(
    models: Sequence[Any], tokenizers: Sequence[Any] | None, num_members: int | None = None
) -> int:
    """Columns of the logits that count: the ids that every model has.

    Args:
        models: causal LMs. Their logits may be padded to different widths.
        tokenizers: one per model, or None if all models have logits of one width; then it is not
            checked that their ids mean the same.
        num_members: the models after these are drafts; None is that there are none.
    Returns:
        The number of shared ids.
    Raises:
        ValueError: widths differ and there are no tokenizers to compare, or two tokenizers disagree
            about an id.
    """
    widths = [int(model.config.get_text_config().vocab_size) for model in models]
    if tokenizers is None:
        if len(set(widths)) > 1:
            sizes = ", ".join(map(str, widths))
            expected = f"one per model, since their vocabulary sizes differ ({sizes})"
            raise Refusal("decoder", "tokenizers", expected, "None")
        return widths[0]
    if len(tokenizers) != len(models):
        raise Refusal("decoder", "tokenizers", f"{len(models)}, one per model", len(tokenizers))
    by_id = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    first = by_id[0]
    for place, other in enumerate(by_id[1:], start=1):
        differing = sorted(i for i in first.keys() | other.keys() if first.get(i) != other.get(i))
        if differing:
            shown = ", ".join(f"{i}: {first.get(i)!r} / {other.get(i)!r}" for i in differing[:5])
            expected = "the same token for every id"
            if num_members is not None and place >= num_members:
                expected += ", or draft_vocabulary='shared' for a draft that has its own"
            elif differing[0] > max(first.keys() & other.keys() - set(differing), default=-1):
                expected += " (add what each tokenizer has added to the other, too, or to none)"
            raise Refusal(
                "decoder",
                "tokenizers",
                expected,
                f"{len(differing)} that differ between models 0 and {place} ({shown})",
            )
    return min([*widths, int(max(first)) + 1])


def shared_tokens(target: Any, draft: Any, target_size: int, draft_size: int) -> dict[int, int]:
    """Of each target id whose string the draft's tokenizer has too, the draft's id.

    Args:
        target, draft: tokenizers. target_size, draft_size: ids from these on do not count.
    Raises:
        ValueError: they share no token.
    """
    ids = {_string(token): i for token, i in draft.get_vocab().items() if i < draft_size}
    strings = {i: _string(token) for token, i in target.get_vocab().items() if i < target_size}
    shared = {i: ids[string] for i, string in strings.items() if string in ids}
    if not shared:
        raise Refusal("decoder", "draft_vocabulary", "tokens that both tokenizers have", "none")
    return shared


def _string(token: str) -> str:
    """A token with the space of byte-level BPE, where it is SentencePiece's."""
    return token.replace("\u2581", "\u0120")
