"""Decoding of several requests: each has a slot, and a step feeds one token to every slot it names.

`open_decoder` chooses by the bundle: caches of fixed capacity are decoded in one batch, in place; growing
ones slot by slot. The requests keep their own lengths in every span (what a cut dropped is missing only
behind it) and their own positions, and get the tokens they get alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Component
from ep_export.errors import UserError
from ep_export.runtime.base import Bound, Buffer, Feed, Filled
from ep_export.runtime.components import (
    Components,
    bind_span,
    cache_names,
    length_feeds,
    past_feeds,
    run_span,
)
from ep_export.runtime.prefill import Prefill

__all__ = ["BatchedDecoder", "SerialDecoder", "SlotDecoder", "open_decoder"]


class SlotDecoder(ABC):
    """Slots of one bundle's decoder.

    Attributes:
        slots: How many there are, numbered from 0.
    """

    slots: int

    @property
    @abstractmethod
    def capacity(self) -> tuple[int, ...]:
        """Cache rows of a slot, one number a span: as asked for, or less where compiling settled it."""

    @abstractmethod
    def admit(self, slot: int, prefilled: Prefill) -> None:
        """Put a request into a free slot: its caches are copied.

        Raises:
            UserError: It is longer than the slot.
        """

    @abstractmethod
    def step(self, tokens: Mapping[int, int]) -> Mapping[int, NDArray[np.float32]]:
        """Append one token to every slot that is named.

        Args:
            tokens: Slot -> token, at least one; each slot holds a request.

        Returns:
            Slot -> [vocab_size], logits of the token after it.

        Raises:
            UserError: A slot is full.
        """

    @abstractmethod
    def release(self, slot: int) -> None:
        """Make a slot free again."""

    @abstractmethod
    def room(self, slot: int) -> int | None:
        """Tokens that a slot with a request still takes; None: as many as memory holds."""

    @abstractmethod
    def grow(self, rows: int) -> None:
        """Give every slot so many rows more, in every span.

        Raises:
            UserError: Compiling settled how many there are.
        """


def open_decoder(components: Components, *, slots: int, capacity: int | Sequence[int]) -> SlotDecoder:
    """The decoder that suits a bundle.

    Args:
        components: The opened bundle.
        slots: Requests at a time.
        capacity: Cache rows a slot has: in every span, or one number for each. A request needs a row for each
            of its tokens, prompt and answer; behind a cut, for each that is kept.
    """
    kind = BatchedDecoder if components.manifest.dialect.fixed_caches else SerialDecoder
    return kind(components, slots=slots, capacity=capacity)


@dataclass
class _Growing:
    """A request whose caches grow."""

    caches: dict[str, Feed]
    position: int


class SerialDecoder(SlotDecoder):
    """Steps slots one by one, each with caches that grow by concatenation; capacity is not reserved."""

    def __init__(self, components: Components, *, slots: int, capacity: int | Sequence[int]) -> None:
        self.slots = slots
        self._components = components
        self._capacity = _of_every_span(components, capacity)
        self._requests: dict[int, _Growing] = {}

    @property
    def capacity(self) -> tuple[int, ...]:
        """See `SlotDecoder.capacity`."""
        return self._capacity

    def admit(self, slot: int, prefilled: Prefill) -> None:
        """See `SlotDecoder.admit`."""
        self._requests[slot] = _Growing(dict(prefilled.caches), prefilled.next_position)

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, NDArray[np.float32]]:
        """See `SlotDecoder.step`."""
        return {slot: self._step(self._requests[slot], token) for slot, token in tokens.items()}

    def release(self, slot: int) -> None:
        """See `SlotDecoder.release`."""
        self._requests.pop(slot, None)

    def room(self, slot: int) -> int | None:  # noqa: ARG002
        """See `SlotDecoder.room`."""
        return None

    def grow(self, rows: int) -> None:
        """See `SlotDecoder.grow`: there is nothing to do."""

    def _step(self, request: _Growing, token: int) -> NDArray[np.float32]:
        manifest = self._components.manifest
        hidden = _embed(self._components, [token])
        position_ids = np.full((manifest.dims.position_axes, 1, 1), request.position, dtype=np.int64)
        for span in manifest.spans:
            outputs = run_span(self._components, span, hidden, position_ids, request.caches)
            request.caches |= past_feeds(outputs)  # in place of the shorter ones, whose memory is free again
            hidden = outputs.get("hidden_states", hidden)
        request.position += 1
        return outputs["logits"].numpy().reshape(-1)


class _Span:
    """The caches of one span: buffers [slots, KVH, C, D], and how many rows every slot has filled.

    C is the capacity, or where compiling settled it what it settled, of which no more than that is used.
    """

    def __init__(self, components: Components, span: Component, slots: int, capacity: int) -> None:
        dims, runner = components.manifest.dims, components.runner(span)
        rows = runner.capacity or capacity
        shape = (slots, dims.kv_heads, rows, dims.head_dim)
        self.span, self.capacity = span, min(capacity, rows)
        self.buffers: dict[str, Buffer] = {
            name: runner.buffer(name, shape) for name in cache_names(span.layer_range)
        }
        self.lengths = np.zeros(slots, dtype=np.int64)
        self._components, self._inputs = components, runner.input_names
        self._last = span.layer_range.stop == dims.layers
        self._bound: dict[tuple[int, int], Bound] = {}  # a request alone steps with the same memory each time

    def step(self, hidden: Feed, position_ids: NDArray[np.int64], first: int, stop: int) -> Feed:
        """Append one row to consecutive slots.

        Args:
            hidden: [B, 1, d], what enters its first layer.
            position_ids: [A, B, 1].
            first: The first slot.
            stop: first + B.

        Returns:
            [B, 1, d], what enters the next span; logits [B, 1, V] on the host behind the last one.
        """
        if (first, stop) not in self._bound:
            caches = {name: buffer.rows(first, stop) for name, buffer in self.buffers.items()}
            self._bound[first, stop] = bind_span(self._components, self.span, caches)
        # a slot that is full is over: its last row may go
        lengths = length_feeds(np.minimum(self.lengths[first:stop], self.capacity - 1), 1)
        feeds: dict[str, Feed] = {"inputs_embeds": hidden, "position_ids": position_ids}
        feeds |= {name: array for name, array in lengths.items() if name in self._inputs}
        output = "logits" if self._last else "hidden_states"
        return self._bound[first, stop](feeds, {output: not self._last})[output]


class BatchedDecoder(SlotDecoder):
    """Steps slots together, in caches of fixed capacity.

    A step computes all slots between the first and the last it names; it writes one row behind what a slot
    has filled, which a slot that was not named overwrites later. So low numbers are to be used first.
    """

    def __init__(self, components: Components, *, slots: int, capacity: int | Sequence[int]) -> None:
        """Reserve the caches; see `open_decoder`.

        Raises:
            UserError: Compiling settled that fewer answers are continued at once.
        """
        most = components.max_batch
        if most is not None and slots > most:
            raise UserError(
                f"{slots} slots are more than the {most} that the engines were compiled for",
                hint=f"give --slots {most} or fewer, or compile with --max-batch {slots}",
            )
        self.slots = slots
        self._components = components
        pairs = zip(components.manifest.spans, _of_every_span(components, capacity), strict=True)
        self._spans = [_Span(components, span, slots, rows) for span, rows in pairs]
        self._positions = np.zeros(slots, dtype=np.int64)

    @property
    def capacity(self) -> tuple[int, ...]:
        """See `SlotDecoder.capacity`."""
        return tuple(here.capacity for here in self._spans)

    def admit(self, slot: int, prefilled: Prefill) -> None:
        """See `SlotDecoder.admit`."""
        for here in self._spans:
            length = prefilled.caches[next(iter(here.buffers))].shape[2]
            if length > here.capacity:
                raise UserError(
                    f"the request has {length} tokens for {here.span.name}, its caches hold {here.capacity}",
                    hint="keep fewer visual tokens, or reserve more capacity",
                )
            for name, buffer in here.buffers.items():
                buffer.write(slot, prefilled.caches[name])
            here.lengths[slot] = length
        self._positions[slot] = prefilled.next_position

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, NDArray[np.float32]]:
        """See `SlotDecoder.step`."""
        for slot in tokens:
            if not self.room(slot):
                raise UserError(
                    f"slot {slot} is full", hint="ask for a shorter answer, or reserve more capacity"
                )
        first, stop = min(tokens), max(tokens) + 1
        axes = self._components.manifest.dims.position_axes
        hidden = _embed(self._components, [tokens.get(slot, 0) for slot in range(first, stop)])
        position_ids = np.tile(self._positions[first:stop, None], (axes, 1, 1))
        for here in self._spans:
            hidden = here.step(hidden, position_ids, first, stop)
        logits = hidden if isinstance(hidden, np.ndarray) else hidden.numpy()
        for slot in tokens:
            self._positions[slot] += 1
            for here in self._spans:
                here.lengths[slot] += 1
        return {slot: logits[slot - first].reshape(-1) for slot in tokens}

    def release(self, slot: int) -> None:
        """See `SlotDecoder.release`."""
        for here in self._spans:
            here.lengths[slot] = 0

    def room(self, slot: int) -> int:
        """See `SlotDecoder.room`."""
        return int(min(here.capacity - here.lengths[slot] for here in self._spans))

    def grow(self, rows: int) -> None:
        """See `SlotDecoder.grow`: what is filled is copied into larger caches."""
        for number, old in enumerate(self._spans):
            new = _Span(self._components, old.span, self.slots, old.capacity + rows)
            if new.capacity == old.capacity:
                raise UserError(
                    f"the caches of {old.span.name} hold {old.capacity} tokens and are full",
                    hint="ask for a shorter answer, or compile again with a larger --max-new-tokens",
                )
            new.lengths = old.lengths
            for name, buffer in old.buffers.items():
                for slot, length in enumerate(old.lengths):
                    new.buffers[name].write(slot, Filled(buffer.rows(slot, slot + 1), int(length)))
            self._spans[number] = new


def _of_every_span(components: Components, capacity: int | Sequence[int]) -> tuple[int, ...]:
    spans = len(components.manifest.spans)
    return (capacity,) * spans if isinstance(capacity, int) else tuple(capacity)


def _embed(components: Components, tokens: Sequence[int]) -> Feed:
    """[B, 1, d], one token each."""
    embed = components.runner(components.manifest.embed)
    ids = np.array(tokens, dtype=np.int64)[:, None]
    return embed.run({"input_ids": ids}, on_device=("inputs_embeds",))["inputs_embeds"]
