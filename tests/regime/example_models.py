"""Models whose examples' gradients torch.func finds one by one."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Attention by linear layers, and two of them more."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Characters(nn.Module):
    """A character transformer, with or without an output layer that is the embedding, positions by numbers."""

    def __init__(self, letters=11, width=8, *, tied=False, positions=0):
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.places = nn.Embedding(positions, width) if positions else None
        self.blocks = nn.Sequential(Block(width), Block(width), nn.LayerNorm(width))
        self.head = nn.Linear(width, letters, bias=False)
        if tied:
            self.head.weight = self.letters.weight

    def forward(self, x):
        y = self.letters(x)
        if self.places is not None:
            y = y + self.places(torch.arange(x.shape[1]))
        return self.head(self.blocks(y)).transpose(1, 2)


class Attention(nn.Module):
    """Attention of torch's own, with masks, to itself or to something else."""

    def __init__(self, *, other=None, cross=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=other, vdim=other, **options)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, other or 8)
        self.cross = cross or other is not None

    def forward(self, x):
        query = self.first(x)
        key = self.second(x[:, :3]) if self.cross else query
        mask = None if self.cross else torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        return self.attention(query, key, key, attn_mask=mask)[0].mean(1)


class Twice(nn.Module):
    """A layer of each kind that runs twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.linear(self.norm(self.linear(x)).tanh()))


class Checkpointed(nn.Module):
    """A part that runs again in the backward pass."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.first, self.part = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        self.reentrant = reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.part, self.first(x), use_reentrant=self.reentrant)


def mlp(norm=None):
    layers = [nn.Linear(12, 16), *([norm(16)] if norm else []), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def _x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _ids(*shape, letters=11):
    return torch.randint(letters, shape, generator=torch.Generator().manual_seed(1))


def _pooled(*layers):
    return nn.Sequential(*layers, nn.Flatten())


# Name: the model, and a batch of 6.
MODELS = {
    "mlp": (mlp, _x(6, 3, 4)),
    "mlp with layer norm": (lambda: mlp(nn.LayerNorm), _x(6, 12)),
    "mlp with rms norm": (lambda: mlp(nn.RMSNorm), _x(6, 12)),
    "cnn": (cnn, _x(6, 3, 8, 8)),
    "transformer": (Characters, _ids(6, 9)),
    "transformer, tied": (lambda: Characters(tied=True), _ids(6, 9)),
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3), nn.Flatten()), _x(6, 20, 4)),
    "rows of examples": (lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 7), nn.Unflatten(0, (-1, 5)),
                                               nn.Flatten(), nn.Linear(35, 3)), _x(6, 5, 4)),
    "twice": (Twice, _x(6, 4, 6)),
    "attention": (Attention, _x(6, 5, 8)),
    "attention without bias": (lambda: Attention(bias=False), _x(6, 5, 8)),
    "attention to others": (lambda: Attention(cross=True), _x(6, 5, 8)),
    "attention to others of another width": (lambda: Attention(other=6), _x(6, 5, 8)),
    "encoder": (lambda: _pooled(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)), _x(6, 4, 8)),
    "1d, dilated": (lambda: _pooled(nn.Conv1d(4, 6, 3, dilation=2, stride=2, padding=3, groups=2)), _x(6, 4, 11)),
    "2d, same": (lambda: _pooled(nn.Conv2d(4, 4, (2, 3), padding="same", dilation=(1, 2), groups=4)), _x(6, 4, 5, 7)),
    "2d, circular": (lambda: _pooled(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular", bias=False)),
                     _x(6, 2, 5, 7)),
    "2d, much": (lambda: _pooled(nn.Conv2d(24, 24, 3, padding="valid")), _x(6, 24, 4, 4)),
    "3d": (lambda: _pooled(nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2)),
           _x(6, 2, 3, 4, 5)),
    "transposed 1d": (lambda: _pooled(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)),
                      _x(6, 4, 5)),
    "transposed 2d": (lambda: _pooled(nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 3), dilation=(2, 1))),
                      _x(6, 2, 4, 5)),
    "group norm": (lambda: _pooled(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU()), _x(6, 3, 6, 6)),
    "instance norm": (lambda: _pooled(nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True)), _x(6, 3, 6)),
    "layer norm of images": (lambda: _pooled(nn.LayerNorm((3, 6))), _x(6, 2, 3, 6)),
    "frozen batch norm": (lambda: _pooled(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval()), _x(6, 3, 6, 6)),
    "padding": (lambda: nn.Sequential(nn.Embedding(11, 4, padding_idx=3), nn.Flatten()), _ids(6, 30)),
    "one each": (lambda: nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), _ids(6)),
    "frozen": (lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)), _x(6, 4)),
    "checkpoint": (lambda: Checkpointed(reentrant=False), _x(6, 6)),
    "reentrant checkpoint": (lambda: Checkpointed(reentrant=True), _x(6, 6)),
}  # fmt: skip
