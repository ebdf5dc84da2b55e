"""What a vision encoder costs: its FLOPs and parameters from its shape, without the model.

A family says how its towers are shaped (`VisionTower`) and into what pictures are cut (`VisionCall`); counts
leave. A multiply and an add are two, as in `ep_export.planning.layer_flops`; norms, activations, rotary
tables, softmax and interpolation are left out there and here. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["VisionCall", "VisionTower", "VisionWork"]


@dataclass(frozen=True)
class VisionTower:
    """Shape of a vision encoder: patch embedding, transformer blocks, projector.

    Attributes:
        patch_values: Numbers in a patch: channels x frames x side x side.
        blocks: Transformer blocks that are run; what lies behind the features that are read is not.
        hidden_size: C, width of the blocks.
        heads: Attention heads.
        ffn_size: Width of a block's feed-forward.
        gated: Whether the feed-forward has three matrices (SwiGLU) instead of two.
        joined: Patches that the projector joins into one row.
        projector: Widths behind each of the projector's matrices; the last is the decoder's.
        class_tokens: Tokens in front of a tile's patches.
        class_projected: Whether the projector sees them.
        window_side: Patches along the side of an attention window; None where no block has windows.
        full_blocks: Blocks that attend to all of a tile although others keep to windows.
        towers: How many there are: 2 where videos have one of their own. They share a projector.
        tile_side: Patches along the side of the squares that pictures are cut into; None where a picture is
            encoded as it is.
    """

    patch_values: int
    blocks: int
    hidden_size: int
    heads: int
    ffn_size: int
    gated: bool
    joined: int
    projector: tuple[int, ...]
    class_tokens: int = 0
    class_projected: bool = False
    window_side: int | None = None
    full_blocks: int = 0
    towers: int = 1
    tile_side: int | None = None

    @property
    def parameters(self) -> int:
        """Of all towers and the projector; norms, biases and tables of positions are left out."""
        tower = self.patch_values * self.hidden_size + self.blocks * self._block_parameters
        return self.towers * tower + self._projector_parameters

    def rows(self, call: VisionCall) -> int:
        """Tokens of one tile, class tokens included."""
        return call.grid[0] * call.grid[1] + self.class_tokens

    def flops(self, call: VisionCall) -> int:
        """FLOPs of one call.

        With n tokens a tile, of them P patches, and m the feed-forward's width:

        - patch embedding: 2 P (values of a patch) C
        - a block: 8 n C^2, feed-forward 4 n C m (6 n C m where it is gated), attention 4 n^2 C; within
          windows of w patches each the last is the sum of 4 w^2 C, those at the edges being smaller
        - projector: 2 x rows x inputs x outputs of every matrix
        """
        height, width = call.grid
        patches = height * width
        rows = self.rows(call)
        whole = self.blocks if self.window_side is None else self.full_blocks
        pairs = whole * rows**2
        if self.window_side is not None:
            pairs += (
                (self.blocks - whole) * _squares(height, self.window_side) * _squares(width, self.window_side)
            )
        projected = patches // self.joined + self.class_tokens * self.class_projected
        tile = (
            2 * patches * self.patch_values * self.hidden_size
            + 2 * rows * self.blocks * self._block_parameters
            + 4 * pairs * self.hidden_size
            + 2 * projected * self._projector_parameters
        )
        return call.tiles * tile

    @property
    def _block_parameters(self) -> int:
        matrices = 3 if self.gated else 2
        return 4 * self.hidden_size**2 + matrices * self.hidden_size * self.ffn_size

    @property
    def _projector_parameters(self) -> int:
        widths = (self.joined * self.hidden_size, *self.projector)
        return sum(before * after for before, after in zip(widths, self.projector, strict=False))


@dataclass(frozen=True)
class VisionCall:
    """One call of a vision encoder: a picture, or one part of a video.

    Attributes:
        tiles: Squares that are encoded each for itself, the picture seen whole among them; else 1.
        grid: (height, width) of a tile, or of the picture, in patches.
        visual_tokens: What becomes of it in the prompt.
    """

    tiles: int
    grid: tuple[int, int]
    visual_tokens: int


@dataclass(frozen=True)
class VisionWork:
    """All that a prompt asks of the vision encoder.

    Attributes:
        tower: The encoder.
        calls: One a picture, or part of a video.
    """

    tower: VisionTower
    calls: Sequence[VisionCall]

    @property
    def flops(self) -> int:
        """Of all calls."""
        return sum(self.tower.flops(call) for call in self.calls)

    @property
    def visual_tokens(self) -> int:
        """N: of all calls."""
        return sum(call.visual_tokens for call in self.calls)

    @property
    def largest(self) -> VisionCall:
        """The call with the most tokens, which its working memory follows."""
        return max(self.calls, key=lambda call: call.tiles * self.tower.rows(call))


def _squares(length: int, side: int) -> int:
    """Sum of the squares of a length's parts: whole ones of `side`, and what is left over."""
    return length // side * side**2 + (length % side) ** 2
