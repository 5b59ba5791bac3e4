"""The yardstick of `bench_matcher`: RoMa's network written down from its description, with no thought of cost.

Parameters have the official names. Maps are channels first and contiguous, batch norms run on their own, attention
writes its weights out, the Gaussian process inverts its kernel, both maps of a pair are projected for each direction,
and every channel is sampled at every place of every correlation window: what the released code does, and costs.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SCALES = (16, 8, 4, 2, 1)  # the official labels; the first one is really 14
FINE_SCALES = (8, 4, 2, 1)
PROJECTED = {16: (1024, 512), 8: (512, 512), 4: (256, 256), 2: (128, 64), 1: (64, 9)}
RADIUS = {16: 7, 8: 3, 4: 2, 2: 0, 1: 0}
EMBEDDED = {16: 128, 8: 64, 4: 32, 2: 16, 1: 6}
ANCHORS = 64
GP_DIM = 512


def identity_warp(batch, h, w):
    y, x = torch.meshgrid(
        torch.linspace(-1 + 1 / h, 1 - 1 / h, h), torch.linspace(-1 + 1 / w, 1 - 1 / w, w), indexing="ij"
    )
    return torch.stack([x, y])[None].expand(batch, 2, h, w)


def naive_local_correlation(features_A, features_B, warp, radius):
    """Sample every channel at (2r+1)^2 places around each target, then take the dot products."""
    batch, channels, h, w = features_A.shape
    side = 2 * radius + 1
    dy, dx = torch.meshgrid(
        torch.linspace(-2 * radius / h, 2 * radius / h, side),
        torch.linspace(-2 * radius / w, 2 * radius / w, side),
        indexing="ij",
    )
    window = torch.stack([dx, dy], dim=-1).reshape(1, 1, 1, side**2, 2)
    places = (warp.permute(0, 2, 3, 1)[:, :, :, None] + window).reshape(batch, h, w * side**2, 2)
    out = torch.empty(batch, side**2, h, w)
    for i in range(batch):
        sampled = F.grid_sample(features_B[i : i + 1], places[i : i + 1], align_corners=False)
        sampled = sampled.reshape(channels, h, w, side**2)
        out[i] = (features_A[i, ..., None] / channels**0.5 * sampled).sum(dim=0).permute(2, 0, 1)
    return out


class Vgg(nn.Module):
    def __init__(self):
        super().__init__()
        layers, width_in = [], 3
        for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4)):
            for _ in range(depth):
                layers += [
                    nn.Conv2d(width_in, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                width_in = width
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        maps = {}
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                maps[2 ** len(maps)] = x
            x = layer(x)
        return maps


class Attention(nn.Module):
    def __init__(self, dim, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, *, official_vit):
        super().__init__()
        eps = 1e-6 if official_vit else 1e-5
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn, self.mlp = Attention(dim, heads, bias=official_vit), Mlp(dim)
        self.ls1, self.ls2 = (LayerScale(dim) if official_vit else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 1024, 14, stride=14)


class Dino(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 1024))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, 1024))
        self.mask_token = nn.Parameter(torch.zeros(1, 1024))
        self.patch_embed = PatchEmbedding()
        self.blocks = nn.ModuleList(Block(1024, 16, official_vit=True) for _ in range(24))
        self.norm = nn.LayerNorm(1024, eps=1e-6)

    def forward(self, images):
        h, w = images.shape[-2] // 14, images.shape[-1] // 14
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        positions = self.pos_embed[:, 1:].reshape(1, 37, 37, 1024).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, scale_factor=((h + 0.1) / 37, (w + 0.1) / 37), mode="bicubic")
        positions = torch.cat([self.pos_embed[:, :1], positions.flatten(2).transpose(1, 2)], dim=1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:].transpose(1, 2).reshape(len(x), 1024, h, w)


class Refiner(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.radius = RADIUS[scale]
        window = (2 * self.radius + 1) ** 2 if self.radius else 0
        width = 2 * PROJECTED[scale][1] + EMBEDDED[scale] + window
        self.block1 = self._block(width)
        self.hidden_blocks = nn.Sequential(*(self._block(width) for _ in range(8)))
        self.out_conv = nn.Conv2d(width, 3, 1)
        self.disp_emb = nn.Conv2d(2, EMBEDDED[scale], 1)

    @staticmethod
    def _block(width):
        depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        return nn.Sequential(
            depthwise, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1)
        )

    def forward(self, a, b, warp, scale_factor):
        sampled = F.grid_sample(b, warp.permute(0, 2, 3, 1), align_corners=False)
        embedded = self.disp_emb(40 / 32 * scale_factor * (warp - identity_warp(len(a), *a.shape[-2:])))
        parts = [a, sampled, embedded]
        if self.radius:
            parts.append(naive_local_correlation(a, b, warp, self.radius))
        out = self.out_conv(self.hidden_blocks(self.block1(torch.cat(parts, dim=1))))
        return out[:, :2], out[:, 2:]


class GaussianProcess(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_conv = nn.Conv2d(2, GP_DIM, 1)

    @staticmethod
    def kernel(x, y):
        lengths = x.norm(dim=-1)[..., None] * y.norm(dim=-1)[:, None]
        return ((x @ y.transpose(1, 2) / (lengths + 1e-6) - 1) / 0.2).exp()

    def forward(self, a, b):
        h, w = a.shape[-2:]
        f = torch.cos(8 * math.pi * self.pos_conv(identity_warp(len(b), *b.shape[-2:])))
        x, y, f = (m.flatten(2).transpose(1, 2) for m in (a, b, f))
        self.kernel(x, x)  # the released code computes it and does not use it
        K_yy = self.kernel(y, y) + 0.1 * torch.eye(y.shape[1])
        inverse = torch.stack(
            [torch.linalg.inv(K) for K in K_yy]
        )  # a batched one fails in this torch on a CPU
        return (self.kernel(x, y) @ (inverse @ f)).transpose(1, 2).reshape(len(a), GP_DIM, h, w)


class MatchDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(1024, 8, official_vit=False) for _ in range(5)))
        self.to_out = nn.Linear(1024, ANCHORS**2 + 1)

    def forward(self, gp, features):
        x = torch.cat([gp, features], dim=1)
        out = self.to_out(self.blocks(x.flatten(2).transpose(1, 2)))
        out = out.transpose(1, 2).reshape(len(x), -1, *x.shape[-2:])
        return out[:, :-1], out[:, -1:]


def warp_from_anchors(logits):
    probs = logits.softmax(dim=1)
    best = probs.argmax(dim=1)
    index = torch.stack([best - 1, best, best + 1, best - ANCHORS, best + ANCHORS], dim=1).clamp(
        0, ANCHORS**2 - 1
    )
    weights = probs.gather(1, index)[..., None]
    places = identity_warp(1, ANCHORS, ANCHORS)[0].flatten(1).T[index]
    return ((weights * places).sum(dim=1) / weights.sum(dim=1)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn, self.vit = Vgg(), Dino()


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_decoder = MatchDecoder()
        self.gps = nn.ModuleDict({"16": GaussianProcess()})
        self.proj = nn.ModuleDict(
            {
                str(scale): nn.Sequential(nn.Conv2d(wide, narrow, 1), nn.BatchNorm2d(narrow))
                for scale, (wide, narrow) in PROJECTED.items()
            }
        )
        self.conv_refiner = nn.ModuleDict({str(scale): Refiner(scale) for scale in SCALES})

    def forward(self, maps_A, maps_B, scales, warp, certainty, scale_factor):
        h, w = maps_A[1].shape[-2:]
        results = {}
        for scale in scales:
            a, b = self.proj[str(scale)](maps_A[scale]), self.proj[str(scale)](maps_B[scale])
            if scale == 16:
                logits, certainty = self.embedding_decoder(self.gps["16"](a, b), a)
                warp = warp_from_anchors(logits)
            else:
                warp, certainty = (
                    F.interpolate(x, size=a.shape[-2:], mode="bilinear", align_corners=False)
                    for x in (warp, certainty)
                )
            delta, delta_certainty = self.conv_refiner[str(scale)](a, b, warp, scale_factor)
            moved = torch.stack([delta[:, 0] / (4 * w), delta[:, 1] / (4 * h)], dim=1)
            warp, certainty = warp + scale * moved, certainty + delta_certainty
            results[scale] = warp, certainty
        return results


class Yardstick(nn.Module):
    """Both passes and both directions; returns warp (2, 2, H, W) and certainty (2, 1, H, W), A to B first."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, pair, larger_pair):
        """``pair`` and ``larger_pair`` are images (2, 3, H, W), A and B."""
        maps = self.encoder.cnn(pair) | {16: self.encoder.vit(pair)}
        coarse = self.decoder(maps, self._swapped(maps), SCALES, None, None, 1.0)
        low = coarse[16][1]
        maps = self.encoder.cnn(larger_pair)
        scale_factor = math.sqrt(math.prod(larger_pair.shape[-2:]) / math.prod(pair.shape[-2:]))
        warp, logit = self.decoder(maps, self._swapped(maps), FINE_SCALES, *coarse[1], scale_factor)[1]
        low = F.interpolate(low, size=logit.shape[-2:], mode="bilinear", align_corners=False)
        certainty = (logit - 0.5 * low * (low < 0)).sigmoid()
        certainty[(warp.abs() > 1).any(dim=1, keepdim=True)] = 0
        return warp.clamp(-1, 1), certainty

    @staticmethod
    def _swapped(maps):
        return {scale: torch.cat(list(features.chunk(2))[::-1]) for scale, features in maps.items()}
