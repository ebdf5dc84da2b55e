"""A draw without looking: the same tokens for a seed in PyTorch and in every runtime.

Every visual token's number (its place among the visual tokens that arrive) becomes another number below
2^24 by a permutation that the seed picks; the k largest are kept. The permutation is a Feistel network:
number = 4096 left + right, and in every round

    left, right = right, (left + f(right)) mod 4096,    f(x) = ((a x + b) x + c) mod (2^31 - 1)

with a, b, c of that round drawn from the seed. Products stay below 2^56, so int64 is exact everywhere, and
float32 holds every number below 2^24 exactly. Distinct tokens have distinct numbers: there are no ties.
"""
# ruff: noqa: ARG002 - a form need not look at everything it is given

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from ep_export.choosers.base import Choice, ChooserForm, CutTokens, KeptDifference, PruneInputs
from ep_export.policy import Random

if TYPE_CHECKING:
    import onnx_ir as ir

    from ep_export.graph import Nodes

__all__ = ["RandomForm", "draw_scores", "round_keys"]

_HALF = 1 << 12
"""Two halves make 2^24, the largest range whose integers float32 holds."""

_PRIME = (1 << 31) - 1
"""A polynomial of random coefficients modulo a prime: values at any three tokens are independent."""

_ROUNDS = 4
"""Token numbers below 4096 have left = 0, so the first round only copies; three more mix both halves."""


def round_keys(seed: int) -> list[tuple[int, int, int]]:
    """(a, b, c) of every round, by SHA-256: neighbouring seeds have nothing in common."""
    keys = []
    for number in range(_ROUNDS):
        digest = hashlib.sha256(f"ep-export draw {seed} {number}".encode()).digest()
        a, b, c = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") % _PRIME for i in range(3))
        keys.append((a, b, c))
    return keys


def draw_scores(count: int, seed: int) -> torch.Tensor:
    """The numbers that a seed gives the tokens 0 to count - 1.

    Args:
        count: N, at most 2^24.
        seed: See `ep_export.policy.Random`.

    Returns:
        [N] int64, distinct, from 0 to 2^24 - 1.
    """
    number = torch.arange(count, dtype=torch.int64)
    left, right = number // _HALF, number % _HALF
    for a, b, c in round_keys(seed):
        mixed = (((a * right + b) * right) + c) % _PRIME
        left, right = right, (left + mixed) % _HALF
    return left * _HALF + right


class RandomForm(ChooserForm[Random]):
    """The k largest numbers of the draw."""

    def choose(self, chooser: Random, tokens: CutTokens, k: int) -> Choice:
        """Exact in every runtime: see the module.

        Raises:
            ValueError: k is not 0 to N.
        """
        index = tokens.visual_index
        if not 0 <= k <= len(index):
            raise ValueError(f"cannot keep {k} of {len(index)} tokens")
        numbers = draw_scores(len(index), chooser.seed).to(index.device)
        best = numbers.argsort(descending=True)[:k]
        return Choice(index[best.sort().values], numbers.to(torch.float64))

    def difference(
        self, chooser: Random, tokens: CutTokens, kept: torch.Tensor, k: int, *, tolerance: float
    ) -> KeptDifference:
        """Equal or different: integers have no near-ties."""
        ours = self.choose(chooser, tokens, k).kept.cpu()
        same = torch.equal(ours, kept.cpu().sort().values)
        return KeptDifference.EQUAL if same else KeptDifference.DIFFERENT

    def body(self, nodes: Nodes, chooser: Random, inputs: PruneInputs) -> tuple[ir.Value, ir.Value]:
        """The same integers, then TopK."""
        half, prime = nodes.whole(_HALF), nodes.whole(_PRIME)
        number = nodes.indices(nodes.length(inputs.visual_index))
        left, right = nodes.op("Div", number, half), nodes.op("Mod", number, half)
        for a, b, c in round_keys(chooser.seed):
            mixed = nodes.op("Add", nodes.op("Mul", right, nodes.whole(a)), nodes.whole(b))
            mixed = nodes.op("Add", nodes.op("Mul", mixed, right), nodes.whole(c))
            mixed = nodes.op("Mod", mixed, prime)
            left, right = right, nodes.op("Mod", nodes.op("Add", left, mixed), half)
        number = nodes.op("Add", nodes.op("Mul", left, half), right)
        scores = nodes.to_float(number)
        best = nodes.ops("TopK", (scores, inputs.count(nodes)), 2, axis=0, largest=1, sorted=1)[1]
        return nodes.op("Gather", inputs.visual_index, best, axis=0), scores
