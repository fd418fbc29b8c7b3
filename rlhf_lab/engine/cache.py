"""The keys and values of a batch in flight.

Every row ends at the same column, whatever it began with: a new token is then one slice for all rows, a row may start
at any time, and columns left of the oldest row's first token are not read any more.
"""

from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class InPlaceLayer(DynamicLayer):
    """One layer: `keys` and `values` are views of the part in use of buffers that somebody else allocates."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.buffers = (keys, values)  # (slots, heads, columns, D) each
        self.begin = self.end = 0
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    def use(self, rows: int, begin: int, end: int) -> None:
        """Read the first `rows` rows and these columns from now on."""
        self.begin, self.end = begin, end
        self.keys, self.values = (buffer[:rows, :, begin:end] for buffer in self.buffers)

    def append(self, keys: Tensor, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Write one column, of (n, heads, D) keys and values, and return all that are in use."""
        rows = keys.shape[0]
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:rows, :, column] = new
        self.use(rows, self.begin, column + 1)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next columns, and return all that are in use."""
        rows, end = len(key_states), self.end + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, self.end : end] = new
        self.use(rows, self.begin, end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


def _stored(layer: Any) -> tuple[Tensor, Tensor]:
    """(n, heads, columns, D) each: the keys and values of a plain layer that has read something."""
    return layer.keys, layer.values


class InPlaceCache:
    """Memory set aside once, for `slots` rows of at most `columns` columns.

    Attributes:
        cache: what the model reads and writes.
        begin, end: the columns in use; each decoding step of the model moves `end` by one.
    """

    def __init__(self, read: transformers.DynamicCache, slots: int, columns: int) -> None:
        layers = []
        for layer in read.layers:
            pair = [x.new_zeros(slots, x.shape[1], columns, x.shape[3]) for x in _stored(layer)]
            layers.append(InPlaceLayer(*pair))
        self.cache = transformers.Cache(layers=layers)
        self.layers, self.columns = layers, columns
        self.rows, self.begin = 0, 0
        self.prompt_columns = read.get_seq_length()  # of the longest prompt; later ones are no longer
        self._use(0, 0, self.prompt_columns)

    @property
    def end(self) -> int:
        return self.layers[0].end

    def _use(self, rows: int, begin: int, end: int) -> None:
        self.rows, self.begin = rows, begin
        for layer in self.layers:
            layer.use(rows, begin, end)

    def add(self, read: transformers.DynamicCache, samples: int) -> None:
        """New rows, `samples` for each prompt that was read, after those in use; they end at the common column."""
        width = read.get_seq_length()
        rows = self.rows + samples * len(_stored(read.layers[0])[0])
        for layer, prompt in zip(self.layers, read.layers, strict=True):
            for buffer, new in zip(layer.buffers, _stored(prompt), strict=True):
                place = buffer[self.rows : rows, :, self.end - width : self.end]
                place.view(len(new), samples, *place.shape[1:]).copy_(new[:, None])
        self._use(rows, min(self.begin, self.end - width), self.end)

    def keep(self, order: Tensor, begin: int) -> None:
        """Row i becomes what row order[i] was, from column `begin`; only rows that change place are copied."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        if len(moved):
            come = order[moved]
            for layer in self.layers:
                for buffer in layer.buffers:
                    used = buffer[:, :, begin : self.end]
                    used[moved] = used[come]
        self._use(len(order), begin, self.end)

    def shift(self) -> int:
        """Move what is in use towards the first columns, leaving room for prompts; by how many columns it moved."""
        by = min(self.begin, self.end - self.prompt_columns)
        begin, end = self.begin - by, self.end - by
        for layer in self.layers:
            for buffer in layer.buffers:
                # a copy first, since the two places may overlap
                buffer[: self.rows, :, begin:end] = buffer[: self.rows, :, self.begin : self.end].clone()
        self._use(self.rows, begin, end)
        return by


class GrowingCache:
    """The library's own, for layers that are no plain attention (sliding windows, recurrent states).

    It takes one batch of prompts: rows leave it, but none is added later.
    """

    def __init__(self, read: transformers.DynamicCache) -> None:
        self.cache, self.begin = read, 0

    @property
    def end(self) -> int:
        return self.cache.get_seq_length()

    def add(self, read: transformers.DynamicCache, samples: int) -> None:
        """`samples` rows for each prompt."""
        read.batch_repeat_interleave(samples)

    def keep(self, order: Tensor, begin: int) -> None:
        """Row i becomes what row order[i] was."""
        self.cache.batch_select_indices(order)


def is_plain(config: "PretrainedConfig") -> bool:
    """Whether every layer of a model is plain attention over all that was said, which `InPlaceCache` can hold."""
    layers = transformers.DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
