# SPDX-License-Identifier: Apache-2.0
"""Keys and values in per-row slots, and the masks that make the slots invisible or visible.

The only file that knows transformers' cache API. Row b writes its new tokens at slots
lengths[b], lengths[b] + 1, …, so a rollback is one integer: rejected slots are hidden by the
mask and overwritten later. A new kind of attention layer is one more entry in `REACH`.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from specens.members.capacity import capacity_for, widened

# Of a query at position p, the first position a layer of this type sees, given the size found in
# the config attribute; None sees everything.
REACH: dict[str, tuple[str, Callable[[Tensor, int], Tensor]] | None] = {
    "full_attention": None,
    "sliding_attention": ("sliding_window", lambda p, size: p - (size - 1)),
    "chunked_attention": ("attention_chunk_size", lambda p, size: p - p % size),
}

# Shape of one layer's keys or values, batch and capacity left out: heads, head size, dtype, device.
Signature = tuple[int, int, torch.dtype, torch.device]


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """A host list as an int64 tensor on `device`, without waiting for the device."""
    # A pinned source keeps the copy asynchronous; pageable memory would stall the stream.
    pinned = device.type == "cuda"
    tensor = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
    return tensor.to(device, non_blocking=True) if device.type != "cpu" else tensor


class Plan:
    """Where the tokens of one forward go, shared by all layers and set before each forward.

    `start` is the common first slot, or None for a ragged forward, whose slots are `slots`.
    Rows are a range `first_row`, `num_rows` of the storage, or any list, `rows`. `by_table`:
    whoever attends finds any list of rows by itself, in all of the storage.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self.start: int | None = 0
        self.past = 0
        self.end = 0
        self.first_row = 0
        self.num_rows = 0
        self.rows: Sequence[int] | None = None
        self.by_table = False
        self.layers = 0  # that have written to their slots in this forward
        self.slots: Tensor | None = None
        self._rows_on: dict[torch.device, Tensor] = {}
        self._index: dict[tuple[int, torch.device], Tensor] = {}

    def set(self, starts: Sequence[int], q: int, rows: Sequence[int]) -> None:
        """Plan `q` tokens for each of `rows`, from slot `starts[i]` on."""
        self._index.clear()
        self._rows_on.clear()
        self.layers = 0
        self.by_table = False
        self.past = max(starts)
        self.end = self.past + q
        self.start = self.past if self.past == min(starts) else None
        self.slots = None
        self.first_row, self.num_rows = rows[0], len(rows)
        # A range of rows is read through a view; anything else has to be gathered.
        in_order = all(row == self.first_row + i for i, row in enumerate(rows))
        self.rows = None if in_order else rows

    def rows_on(self, device: torch.device) -> Tensor:
        """(R,) int64. The storage rows of this forward."""
        rows = self._rows_on.get(device)
        if rows is None:
            if self.rows is not None:
                rows = to_device(self.rows, device)
            else:
                rows = torch.arange(self.first_row, self.first_row + self.num_rows, device=device)
            self._rows_on[device] = rows
        return rows

    def index(self, heads: int, q: int, device: torch.device) -> Tensor:
        """(R * heads * q,) int64. Where the new vectors go in a layer seen as (…, E) vectors."""
        index = self._index.get((heads, device))
        if index is None:
            if self.slots is not None:
                slots = self.slots.to(device, non_blocking=True)
            else:
                slots = torch.arange(self.past, self.end, device=device)[None]
            lanes = self.rows_on(device)[:, None] * heads + torch.arange(heads, device=device)
            index = (lanes[:, :, None] * self.capacity + slots[:, None, :]).view(-1)
            self._index[heads, device] = index
        return index


class Storage:
    """Zeroed memory for the layers of one cache: layers of one shape share a tensor.

    `counts` says how many tensors of each signature the model asked for last time; a signature
    it does not know gets a tensor of its own.
    """

    def __init__(self, batch_size: int, counts: dict[Signature, int]) -> None:
        self.batch_size = batch_size
        self.capacity = 0
        self.expected = counts
        self.taken: dict[Signature, int] = {}
        self.slabs: list[Tensor] = []  # each (layers, B, K, S, E)
        self._free: dict[Signature, list[tuple[int, int]]] = {}

    def take(self, like: Tensor) -> tuple[int, int]:
        """A place for one layer's keys or values, of `like`'s heads, size and dtype; see `at`."""
        _, heads, _, size = like.shape
        signature = (heads, size, like.dtype, like.device)
        free = self._free.setdefault(signature, [])
        if not free:
            count = max(self.expected.get(signature, 0) - self.taken.get(signature, 0), 1)
            shape = (count, self.batch_size, heads, self.capacity, size)
            # Zeros, for a hidden slot still enters the softmax's 0 * value, where NaN would spread.
            # Not an inference tensor, or the cache could not be written outside inference mode.
            with torch.inference_mode(False):
                self.slabs.append(torch.zeros(shape, dtype=like.dtype, device=like.device))
            free.extend((len(self.slabs) - 1, layer) for layer in reversed(range(count)))
        self.taken[signature] = self.taken.get(signature, 0) + 1
        return free.pop()

    def at(self, place: tuple[int, int]) -> Tensor:
        """(B, K, S, E): what is at a place, until the storage grows."""
        slab, layer = place
        return self.slabs[slab][layer]

    def grow(self, capacity: int, rows: int) -> None:
        """Give `capacity` slots to each of the first `rows` rows; the others are gone."""
        self.capacity, self.batch_size = capacity, rows
        for i, slab in enumerate(self.slabs):
            self.slabs[i] = widened(slab[:, :rows], 3, capacity)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, (B, K, capacity, E), written where the shared plan says."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, plan: Plan, storage: Storage) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan = plan
        self.storage = storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take storage of the states' shape, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.places = self.storage.take(key_states), self.storage.take(value_states)
        self.bind()
        self.is_initialized = True

    def bind(self) -> None:
        """Look up where the storage has keys and values now."""
        self.keys, self.values = (self.storage.at(place) for place in self.places)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, K, q, E) new states; return (R, K, end, E) with everything up to them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.plan.layers += 1
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, stored: Tensor, states: Tensor) -> Tensor:
        plan = self.plan
        if plan.start is None or plan.rows is not None:
            _, heads, q, size = states.shape
            index = plan.index(heads, q, states.device)
            stored.view(-1, size).index_copy_(0, index, states.reshape(-1, size))
            if plan.rows is not None and plan.by_table:
                return stored.narrow(2, 0, plan.end)
            if plan.rows is not None:
                return stored.narrow(2, 0, plan.end).index_select(0, plan.rows_on(states.device))
            if plan.num_rows != stored.shape[0]:
                stored = stored.narrow(0, plan.first_row, plan.num_rows)
        else:
            if plan.num_rows != stored.shape[0]:
                stored = stored.narrow(0, plan.first_row, plan.num_rows)
            stored.narrow(2, plan.start, states.shape[2]).copy_(states)
        return stored.narrow(2, 0, plan.end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask that a model builds by itself, and their first slot."""
        return self.plan.end, 0

    def get_seq_length(self) -> int:
        """Tokens before this forward's, of the longest row."""
        return self.plan.past

    def get_max_length(self) -> int:
        """Tokens a row can hold before the storage grows."""
        return self.storage.capacity

    # The name of `get_max_length` in transformers 5.0, where it is abstract.
    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    """A transformers cache whose rows have lengths of their own, and slots that grow by doubling.

    Args:
        batch_size: rows.
        counts: tensors per signature, from an earlier cache of the same model; `{}` at first.
    """

    def __init__(self, batch_size: int, counts: dict[Signature, int]) -> None:
        self.plan = Plan()
        self.storage = Storage(batch_size, counts)
        # Layers appear at their first update, so that no config attribute has to be trusted.
        make_layer: Any = partial(SlotLayer, self.plan, self.storage)
        super().__init__(layer_class_to_replicate=make_layer)

    @property
    def slabs(self) -> list[Tensor]:
        """Each (layers, B, K, capacity, E). All keys and values, layers of one shape together."""
        return self.storage.slabs

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.storage.capacity

    def grow(self, size: int, rows: int) -> None:
        """Make room for `size` tokens in each of the first `rows` rows; the others are gone."""
        self.plan.capacity = capacity_for(size)
        self.storage.grow(self.plan.capacity, rows)
        for layer in self.layers:
            if isinstance(layer, SlotLayer) and layer.is_initialized:
                layer.bind()

    def select(self, rows: Sequence[int], used: int) -> None:
        """Move these rows' first `used` slots to the front; later rows become free memory."""
        if list(rows) == list(range(len(rows))):
            return
        for slab in self.storage.slabs:
            index = to_device(rows, slab.device)
            # Layer by layer, so that the copy in flight is one layer's, not the whole cache.
            for layer in slab.unbind(0):
                live = layer.narrow(2, 0, used)
                live.narrow(0, 0, len(rows)).copy_(live.index_select(0, index))


class Masks:
    """Builds the `attention_mask` of a forward from positions, in the form a model wants.

    Args:
        config: the text model's configuration.
        per_type: a dict with one mask per entry of `config.layer_types`, else one tensor.
        additive: float masks to be added to scores (eager attention), else bool (sdpa).
        dtype: of an additive mask.
    Raises:
        NotImplementedError: the layers need a mask that one tensor, or this file, cannot express.
    """

    def __init__(self, config: Any, *, per_type: bool, additive: bool, dtype: torch.dtype) -> None:
        kinds = layer_kinds(config)
        if not per_type and len(kinds) != 1:
            raise NotImplementedError(f"one mask cannot serve layers of types {kinds}")
        self.per_type = per_type
        self.additive = additive
        self._reach: dict[str, tuple[int, Callable[[Tensor, int], Tensor]] | None] = {}
        for kind in kinds:
            if kind not in REACH:
                raise NotImplementedError(f"no mask is known for layers of type {kind!r}")
            entry = REACH[kind]
            size = getattr(config, entry[0], None) if entry else None
            self._reach[kind] = (size, entry[1]) if entry and size else None
        types = getattr(config, "layer_types", None)
        # Of each layer, or of all where one stands for them: the sliding window, or 0.
        self.windows = [self._window(kind) for kind in types or kinds]
        sizes = [limited[0] for limited in self._reach.values() if limited]
        self.window = min(sizes, default=None)
        self._dtype = dtype
        self._nothing: Any = dict.fromkeys(kinds) if per_type else None

    def _window(self, kind: str) -> int | None:
        """The sliding window of a layer of this type, 0 for none; None is what is no window."""
        reach = self._reach[kind]
        if reach is None:
            return 0
        return reach[0] if kind == "sliding_attention" else None

    def skip(self, plan: Plan, q: int) -> bool:
        """Whether plain causal attention needs no mask: one token a row, or rows from slot 0."""
        if self.additive or plan.start is None or not (q == 1 or plan.start == 0):
            return False
        return self.window is None or plan.end <= self.window

    @property
    def nothing(self) -> Any:
        """What to pass as `attention_mask` where `skip` holds."""
        return self._nothing

    def build(
        self, positions: Tensor, keys: Tensor, end: int, visible: Tensor | None = None
    ) -> Any:
        """The masks of queries at `positions` over cached `keys`.

        Args:
            positions: (R, q) or (1, q) int64. Position of each query.
            keys: (kv,) or (R, 1, 1, kv) int64. Position of the token in each slot.
            end: one more than the largest position, known to the host.
            visible: (R, 1, q, kv) bool. A tree's visibility; None is causal.
        Returns:
            (R, 1, q, kv) tensor, or a dict of them by layer type.
        """
        queries = positions[:, None, :, None]
        if visible is None:
            visible = keys <= queries
        full = self._finish(visible)
        masks = {}
        for kind, limited in self._reach.items():
            if limited is None or end <= limited[0]:
                masks[kind] = full
            else:
                size, first = limited
                masks[kind] = self._finish(visible & (keys >= first(queries, size)))
        return masks if self.per_type else next(iter(masks.values()))

    def _finish(self, visible: Tensor) -> Tensor:
        if not self.additive:
            return visible
        hidden = torch.finfo(self._dtype).min
        return torch.zeros_like(visible, dtype=self._dtype).masked_fill_(~visible, hidden)


def layer_kinds(config: Any) -> list[str]:
    """The distinct attention types of a model's layers, in a fixed order."""
    layer_types: Iterable[str] | None = getattr(config, "layer_types", None)
    if layer_types is not None:
        return sorted(set(layer_types))
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        return ["sliding_attention"]
    if getattr(config, "attention_chunk_size", None):
        return ["chunked_attention"]
    return ["full_attention"]


def full_cache() -> Cache:
    """A stock cache that keeps every token of every layer, so that it can be cropped exactly."""
    return DynamicCache()


def native_cache(config: Any) -> Cache:
    """The stock cache of this model: windows cut short, recurrent states where there are some."""
    return DynamicCache(config=config)


def is_filled(cache: Cache) -> bool:
    """Whether any layer holds keys, values or a state of tokens it has seen."""
    # Layers of a static cache have zeroed memory from the start: lengths and flags tell, not sizes.
    layers = getattr(cache, "layers", None)
    if layers is None:  # several caches in one
        return int(cache.get_seq_length()) > 0
    for layer in layers:
        states = getattr(layer, "has_previous_state", False)
        if any(states.values()) if isinstance(states, dict) else states:
            return True
        if isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()) > 0:
            return True
    return False


def crop(cache: Cache, tokens: int) -> None:
    """Drop the last `tokens` tokens of a cache made by `full_cache`."""
    cache.crop(-tokens)


def fork(cache: Cache) -> Cache:
    """An independent copy of a stock cache."""
    # Growing attention layers replace their tensors and never write into them, so copies may
    # share them; recurrent states are overwritten in place and must be copied.
    shared = [
        tensor
        for layer in cache.layers
        if isinstance(layer, DynamicLayer)
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    ]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in shared})
