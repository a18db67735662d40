# SPDX-License-Identifier: Apache-2.0
"""Forwards whose layers attend through `specens_kernels`, which takes no mask.

transformers looks up an attention function by the name in a model's configuration. While a forward
of ours runs, the name there is one of ours; what the rows see travels as the forward's keyword
`specens` to every layer. Forwards of others that run at the same time, in another thread, have no
such keyword and are attended to as ever. An implementation that transformers' models may have, and
that can be stood in for, is one more entry in `MASKS`.
"""

import sys
import threading
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from specens_kernels import Refusal, dispatch, tree
from specens_kernels.layers import Layers

# Implementations that are stood in for, and the masks that forwards of others get meanwhile.
MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}
# Types of the keys that a kernel is better with than masks; another type runs the reference.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEPT_WORDS = 128  # nodes of a chain whose words are kept; longer ones are made anew


class Slots:
    """What the tokens of one forward see in the slots of their rows.

    Args:
        lengths: (R,) int64. Slots that every token of a row sees.
        count: q, tokens of a row, which lie in the slots behind; padding included.
        rows: (R,) int64. Rows of the cache, where it has more than the forward; None is in order.
        seen: (1, q, q) bool. Which token sees which; None is a chain.
    """

    def __init__(
        self, lengths: Tensor, count: int, rows: Tensor | None = None, seen: Tensor | None = None
    ) -> None:
        self._lengths = lengths
        self._rows = None if rows is None else rows.to(torch.int32)[:, None]
        self._seen = seen
        self._layers: dict[int, Layers] = {}
        self._elsewhere: dict[torch.device, Slots] = {}
        self.count = count
        # Of each layer that has attended, in their order: its window, or 0.
        self.windows: list[int] = []

    def at(self, device: torch.device) -> "Slots":
        """The same where a layer is."""
        if device == self._lengths.device:
            return self
        if device not in self._elsewhere:
            rows = None if self._rows is None else self._rows[:, 0].to(device)
            seen = None if self._seen is None else self._seen.to(device)
            self._elsewhere[device] = Slots(self._lengths.to(device), self.count, rows, seen)
        return self._elsewhere[device]

    def layers(self, window: int) -> Layers:
        """The attention of layers with this window; 0 is none."""
        if window not in self._layers:
            words, depths = self._tree(window)
            near = depths if window else None
            self._layers[window] = Layers(self._lengths, words, near, self._rows)
        return self._layers[window]

    def _tree(self, window: int) -> tuple[Tensor, Tensor]:
        """Words and depths of the tokens."""
        if self._seen is None:
            return _chain(self.count, window, self._lengths.device)
        steps = self._seen.sum(-1)
        near = steps[:, :, None] - steps[:, None, :] < (window or self.count + 1)
        return tree.words(self._seen & near), (steps - 1).to(torch.int32)


def _chain(count: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Words and depths of tokens in a row."""
    return (_kept_chain if count <= _KEPT_WORDS else _made_chain)(count, window, device)


def _made_chain(count: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Not inference tensors, which a graph that is recorded later may not keep.
    with torch.inference_mode(False):
        ends = torch.arange(1, count + 1, device=device)[:, None]
        firsts = torch.arange(0, count, tree.WORD, device=device)
        # Bits of a word up to and with the token's own, less those that its window has left behind.
        words = _low_bits(ends - firsts)
        if window:
            words = words & ~_low_bits(ends - window - firsts)
        return words[None], torch.arange(count, dtype=torch.int32, device=device)[None]


_kept_chain = lru_cache(maxsize=256)(_made_chain)


def _low_bits(count: Tensor) -> Tensor:
    """int64 whose lowest `count` bits are set; a shift by all 64 is undefined."""
    some = count.clamp(0, tree.WORD - 1)
    return torch.where(count >= tree.WORD, -1, (torch.ones_like(some) << some) - 1)


def serves(model: Any, implementation: str) -> str:
    """Why a model's layers cannot attend through a kernel, or nothing where they may."""
    device, dtype = model.device.type, model.dtype
    chosen = dispatch.first_backend(device)
    if chosen not in dispatch.PREFERRED.get(device, ()):
        return f"attention runs {chosen!r} on {device}"
    if dtype not in DTYPES:
        return f"no kernel takes {dtype}"
    if implementation not in MASKS:
        return f"attention {implementation!r} is not stood in for"
    # A compiled model would be compiled anew for another name.
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return "the model is compiled"
    return ""


def _attend(
    implementation: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    specens: Slots | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The attention of one layer, as transformers calls it: (R, H, q, E) to (R, q, H, F)."""
    if specens is None:
        other = _function(implementation, module)
        result: tuple[Tensor, Any] = other(module, query, key, value, attention_mask, **options)
        return result
    if options.get("dropout"):
        raise Refusal("member", "model", "evaluation mode", f"dropout of {options['dropout']:g}")
    if options.get("position_bias") is not None or options.get("is_causal") is False:
        raise NotImplementedError(f"{type(module).__name__} attends in another way")
    slots = specens.at(key.device)
    if query.shape[2] != slots.count:
        raise NotImplementedError(f"{type(module).__name__} asks for other tokens")
    window, sinks = options.get("sliding_window") or 0, options.get("s_aux")
    specens.windows.append(window)
    scale = options.get("scaling")
    out = slots.layers(window)(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=options.get("softcap") or 0.0,
        window=window,
        sinks=None if sinks is None else sinks.float(),
    )
    return out, None


def _function(implementation: str, module: Any) -> Any:
    """What transformers would have called."""
    if implementation == "eager":  # each file of a model has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return _functions[implementation]


_functions: Any = AttentionInterface()  # type: ignore[no-untyped-call]
_masks: Any = AttentionMaskInterface()  # type: ignore[no-untyped-call]
_NAMES = {implementation: f"specens_{implementation}" for implementation in MASKS}
for _implementation, _name in _NAMES.items():
    _functions.register(_name, partial(_attend, _implementation))
    _masks.register(_name, MASKS[_implementation])

_ENTRY = "_attn_implementation_internal"  # where a configuration keeps the name
_OWN = {name: implementation for implementation, name in _NAMES.items()}
_lock = threading.Lock()
# Of each configuration that has our name now: the forwards that need it.
_forwards: dict[int, set["Attending"]] = {}


class Attending:
    """As a context: layers with this configuration ask us, in all threads, until the last is out.

    A class, for a generator would take longer. One forward at a time enters it. An interrupt may
    come at any place, even before `__exit__` begins: whoever ends the call leaves once more, and
    the user's own name is read from ours.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    def __enter__(self) -> None:
        config = self._config
        try:
            with _lock:
                _forwards.setdefault(id(config), set()).add(self)
                _set(config, _NAMES[_own_name(config)])
        except BaseException:
            self.leave()
            raise

    def __exit__(self, *_: Any) -> None:
        try:
            self.leave()
        except BaseException:  # an interrupt that came just now
            self.leave()
            raise

    def leave(self) -> None:
        """To leave twice is to leave once; whoever never was in leaves nothing."""
        config = self._config
        with _lock:
            others = _forwards.get(id(config), set())
            others.discard(self)
            if others:
                return
            if _name_in(config) in _OWN:
                _set(config, _own_name(config))
            _forwards.pop(id(config), None)


def implementation_of(config: Any) -> str:
    """The user's choice of an attention implementation, whatever forwards are running."""
    with _lock:
        return _own_name(config)


def _own_name(config: Any) -> str:
    name = _name_in(config)
    return _OWN.get(name, name)


def _name_in(config: Any) -> str:
    entries = _entries(config)
    name = entries[_ENTRY] if _ENTRY in entries else config._attn_implementation  # noqa: SIM401
    return str(name)


def _set(config: Any, name: str) -> None:
    entries = _entries(config)
    if _ENTRY in entries:
        entries[_ENTRY] = name
    else:
        # As a dict, or configurations inside would get the name, too.
        config._attn_implementation = {"": name}


def _entries(config: Any) -> dict[str, Any]:
    """Twice a forward the name is read and set: a configuration's own way takes 24 us for that."""
    entries: dict[str, Any] = object.__getattribute__(config, "__dict__")
    return entries
