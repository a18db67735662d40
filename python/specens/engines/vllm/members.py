# SPDX-License-Identifier: Apache-2.0
"""Further models of one engine: loaded beside the target, they read what the target reads.

Runners of both versions have them. What must be alike of members is compared in `check_member`.
"""

from typing import Any

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, replace
from vllm.model_executor.model_loader import get_model
from vllm.tokenizers.registry import get_tokenizer

from specens_kernels import Refusal

from .settings import DRAFT, OP, TARGET


class Reading(nn.Module):
    """A target whose forward pass is followed by the readers', on the same tokens.

    They run in the target's forward context, which has the metadata and the slots of every layer
    with a KV cache. What profiles or captures the target thus includes the readers.
    """

    def __init__(self, target: nn.Module, readers: list[nn.Module], tokens: Tensor) -> None:
        super().__init__()
        self.target, self.readers, self._tokens = target, nn.ModuleList(readers), tokens
        # A graph that is replayed writes where it wrote when it was captured.
        self._hidden: list[Tensor] = []

    def forward(self, input_ids: Any = None, positions: Any = None, **more: Any) -> Any:
        """The target's output; the readers' hidden states are kept."""
        out = self.target(input_ids=input_ids, positions=positions, **more)
        tokens = self._tokens[: positions.shape[-1]] if input_ids is None else input_ids
        for index, reader in enumerate(self.readers):
            hidden = reader(input_ids=tokens, positions=positions)
            if index == len(self._hidden):
                self._hidden.append(hidden.new_zeros(len(self._tokens), hidden.shape[-1]))
            self._hidden[index][: len(hidden)] = hidden
        return out

    def read(self, rows: Tensor) -> list[Tensor]:
        """The readers' logits at rows of the last batch."""
        pairs: Any = zip(self.readers, self._hidden, strict=True)
        return [reader.compute_logits(hidden[rows]) for reader, hidden in pairs]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("target"), name)


def load_readers(runner: Any, draft: Any) -> list[nn.Module]:
    """The members of a runner's settings but the target, in the order of the weights."""
    readers = []
    for index, name in enumerate(runner.specens.members):
        if name == DRAFT:
            check_member(runner.vllm_config, runner.speculative_config.draft_model_config)
            readers.append(draft)
        elif name != TARGET:
            readers.append(load_member(runner.vllm_config, name, f"member_{index}"))
    return readers


def check_member(vllm_config: Any, config: Any) -> None:
    """Refuse a member whose tokens or whose attention window are not the target's."""
    target, key = vllm_config.model_config, f"members: {config.model}"
    # An attention layer takes its window from the cache's config, which is the target's.
    for what in ("get_vocab_size", "get_sliding_window"):
        expected, got = getattr(target, what)(), getattr(config, what)()
        if expected != got:
            raise Refusal(OP, key, f"the target's {what[4:]}, {expected}", got)
    own, others = (get_tokenizer(name).get_vocab() for name in (target.tokenizer, config.model))
    if own != others:
        raise Refusal(OP, key, "the target's token for every id", "others")


def load_member(vllm_config: Any, model: str, prefix: str) -> Any:
    """A further model, whose attention layers have a KV cache of their own under a prefix."""
    target = vllm_config.model_config
    names = ["tokenizer", "trust_remote_code", "dtype", "seed", "max_model_len", "enforce_eager"]
    config = ModelConfig(model=model, **{name: getattr(target, name) for name in names})
    check_member(vllm_config, config)
    with set_model_tag(prefix):
        own = replace(vllm_config, model_config=config, quant_config=None)
        return get_model(vllm_config=own, prefix=prefix)
