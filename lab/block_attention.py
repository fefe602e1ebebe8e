"""Attention of one block, and where in the picture its tokens lie."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.errors import UserError


@dataclass(frozen=True)
class BlockAttention:
    """Attention of one block: in each group of tokens, what each takes from each.

    A ViT has one group, of all tokens. A Swin has one for each window; `places` puts a window's
    tokens where they lie in the picture, so that shifted windows are shifted back.

    weights: (B, h, G, n, n), G groups of n tokens; rows sum to one.
    places: (G, n), a token's index among the block's tokens: first the prefix (class token,
        registers), then the patches row by row; -1: padding, whose rows and columns are zero (what
        a patch gives to the padding of its window is lost to its row).
    grid: rows and columns of patches.
    """

    weights: Tensor
    places: Tensor
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def slots(self) -> Tensor:
        """`places` with padding sent to one slot behind the last token, (G, n)."""
        return self.places % (self.tokens + 1)

    def dense(self) -> Tensor:
        """(B, h, N, N) over all tokens; zero between tokens that do not see each other."""
        B, h = self.weights.shape[:2]
        out = self.weights.new_zeros(B, h, self.tokens + 1, self.tokens + 1)
        out[:, :, self.slots[:, :, None], self.slots[:, None, :]] = self.weights
        return out[:, :, :-1, :-1]

    def queries(self, which: str = "mean") -> Tensor:
        """A row (N,) of weights on queries: "class" for the class token, "mean" for all patches."""
        row = self.weights.new_zeros(self.tokens)
        if which == "class":
            row[0] = 1
        else:
            row[self.prefix :] = 1 / (self.grid[0] * self.grid[1])
        return row

    def pull(self, rows: Tensor) -> Tensor:
        """Rows of weights on queries times the attention: (B or 1, h or 1, N) -> (B, h, N)."""
        held = F.pad(rows, (0, 1))[..., self.slots]  # (B, h, G, n)
        given = (held[..., None, :] @ self.weights).squeeze(-2)  # (B, h, G, n)
        return self.gather(given)

    def gather(self, values: Tensor) -> Tensor:
        """Values of the groups' tokens (B, h, G, n) to the block's tokens (B, h, N)."""
        out = values.new_zeros(*values.shape[:2], self.tokens + 1)
        return out.index_add_(2, self.slots.flatten(), values.flatten(2))[..., :-1]

    def patches(self, rows: Tensor) -> Tensor:
        """The patches of (..., N) as pictures (..., rows, columns)."""
        return rows[..., self.prefix :].unflatten(-1, self.grid)

    def of(self, queries: Tensor) -> Tensor:
        """Where these queries (N,) look, head by head, as pictures (B, h, rows, columns)."""
        return self.patches(self.pull(queries[None, None]))

    def distance(self, pixels: float) -> Tensor:
        """Mean distance of what patches attend to, (B, h), in units of `pixels` a patch.

        As in Dosovitskiy et al. 2021, fig. 7: over the patches, the distance to every patch,
        weighted by attention; what goes to class token and registers is left out.
        """
        patch = (self.places - self.prefix).clamp(min=0)  # (G, n)
        real = (self.places >= self.prefix).to(self.weights)
        at = torch.stack([patch // self.grid[1], patch % self.grid[1]], -1).to(self.weights)
        apart = torch.cdist(at, at) * pixels  # (G, n, n)
        taken = self.weights * real[:, None, :]
        mean = (taken * apart).sum(-1) / taken.sum(-1).clamp(min=1e-12)  # (B, h, G, n)
        return (mean * real).sum((-2, -1)) / real.sum()


def from_tokens(grid: tuple[int, int], prefix: int, raw: Tensor) -> BlockAttention:
    """A plain ViT's weights (B, h, N, N): every token sees every token."""
    tokens = prefix + grid[0] * grid[1]
    if raw.shape[-2:] != (tokens, tokens):
        raise UserError(f"attention over {raw.shape[-1]} tokens, but {prefix} and a grid of "
                        f"{grid[0]} x {grid[1]} patches make {tokens}")  # fmt: skip
    places = torch.arange(tokens, device=raw.device)[None]
    return BlockAttention(raw[:, :, None], places, grid, prefix)


def from_windows(block: nn.Module, grid: tuple[int, int], raw: Tensor) -> BlockAttention:
    """A Swin block's weights (B * windows, h, n, n): shift, pad and cut an index as timm does."""
    (high, wide), (down, right) = block.window_size, block.shift_size
    index = torch.arange(grid[0] * grid[1], device=raw.device).reshape(grid)
    index = index.roll((-down, -right), (0, 1))
    index = F.pad(index, (0, -grid[1] % wide, 0, -grid[0] % high), value=-1)
    H, W = index.shape
    index = index.reshape(H // high, high, W // wide, wide).transpose(1, 2)
    places = index.reshape(-1, high * wide)  # (G, n)
    weights = raw.unflatten(0, (-1, len(places))).transpose(1, 2)  # (B, h, G, n, n)
    if (places < 0).any():
        real = (places >= 0).to(raw)
        weights = weights * (real[:, :, None] * real[:, None, :])
    return BlockAttention(weights, places, grid)
