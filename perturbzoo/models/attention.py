"""The parts of a transformer over gene tokens: blocks, and vectors of expression values. Names of layers are scGPT's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbzoo.errors import PerturbZooError


class Block(nn.Module):
    """Attention over tokens, then two layers for each token.

    Parameters
    ----------
    width, heads, feedforward, dropout
        As in :class:`Transformer`.
    norm_first
        Normalise what goes into each half (pre-norm), rather than what comes out of it (post-norm).
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float = 0.0, norm_first: bool = True) -> None:
        super().__init__()
        self.heads, self.norm_first, self.rate = heads, norm_first, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape ``(N, L, h)`` to the same; `mask` ``(N, 1, 1, L)``, bool, tells which tokens are attended to (None: all)."""
        if self.norm_first:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.transition(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.transition(x))

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n, length, width = x.shape
        # (N, L, 3h) to three of (N, heads, L, h / heads)
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind()
        rate = self.rate if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.dropout(self.out_proj(mixed.transpose(1, 2).reshape(n, length, width)))

    def transition(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(functional.relu(self.linear1(x)))))


class ValueEncoder(nn.Module):
    """Vectors of expression values: ``(...)`` to ``(..., h)``; values are cut at 512, scGPT's bound."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(1, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, values: Tensor) -> Tensor:
        return self.norm(self.linear2(functional.relu(self.linear1(values.clamp(max=512)[..., None]))))


def decoder(width: int, silent: bool) -> nn.Sequential:
    """Three layers from tokens ``(..., h)`` to a number each; 0 for every token at the start if `silent`."""
    last = nn.Linear(width, 1)
    if silent:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), last)


def bin_values(values: Tensor, n_bins: int) -> Tensor:
    """Replace each row's values by the number of the bin they fall in: 0 for 0, else 1 to ``n_bins - 1``, equally filled.

    Equal values share a bin (the last that any of them reaches), where scGPT spreads them at random.

    Parameters
    ----------
    values
        Shape ``(N, G)``, log1p-normalised, not negative.
    n_bins
        Number of bins; scGPT's 51.
    """
    order = values.sort(dim=1).values
    zeros = (values <= 0).sum(dim=1, keepdim=True)
    rank = torch.searchsorted(order, values.contiguous(), right=True) - zeros
    share = rank / (values.shape[1] - zeros).clamp(min=1)
    return torch.where(values > 0, torch.ceil(share * (n_bins - 1)), 0.0)


def add_lora(blocks: nn.ModuleList, rank: int) -> None:
    """Freeze the blocks, and add to each linear layer of theirs a trained product of two matrices of low rank, 0 at the start.

    Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685.

    Raises
    ------
    PerturbZooError
        ``peft`` is not installed. It is no dependency of the package: it brings ``transformers``, which Lightning then imports
        at every start.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise PerturbZooError("lora_rank needs peft: pip install 'perturbzoo[lora]', or set lora_rank to 0") from error
    layers = ["qkv", "out_proj", "linear1", "linear2"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), blocks)
