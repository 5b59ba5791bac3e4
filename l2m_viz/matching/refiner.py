"""One refinement step: look at both images where the warp points now, and say how to move it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz._simd import LANES
from l2m_viz.encoders.folding import conv_norm, fold
from l2m_viz.encoders.linear import affine, packed
from l2m_viz.errors import L2MError
from l2m_viz.geometry import HW, normalized_grid
from l2m_viz.matching.depthwise import KERNEL, DepthwiseConv2d, convolve
from l2m_viz.matching.local_correlation import local_correlation
from l2m_viz.matching.propagation import PropagationCfg
from l2m_viz.parallel import is_traced, large_empty

_BATCH_NORM_MOMENTUM = 0.01  # RoMa's
# RoMa embeds the displacement in units of a 32nd of the coarsest training size, 40 cells of 14 px.
_DISPLACEMENT_SCALE = 40 / 32
_BAND_BYTES = 8 * 2**20  # in 2 MB, a core's own cache, the matrix products have too few rows: a tenth slower


@dataclass(frozen=True)
class RefinerCfg:
    """One refiner.

    Attributes:
        stride: Pixels of the network's input to a cell.
        displacement_dim: Channels that the present displacement is embedded in.
        radius: Of the local correlation in cells of B; None: there is none.
        hidden: Width of the blocks; None: that of the input, as in RoMa.
        blocks: Number of blocks after the first.
        kernel: Side of the depth-wise convolutions.
        reach: An output of 1 moves the warp by reach / 8 px of the network's input; None: the stride. RoMa counts its
            grid of 14 px as 16.
        iterations: How often it runs in a pass, each time from where it came to before, as in RAFT (Teed and Deng, ECCV
            2020); RoMa: once.
        propagation: What happens to the warp before each of its runs in a second pass; None: nothing, as in RoMa.
    """

    stride: int
    displacement_dim: int
    radius: int | None = None
    hidden: int | None = None
    blocks: int = 8
    kernel: int = 5
    reach: int | None = None
    iterations: int = 1
    propagation: PropagationCfg | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise L2MError("RefinerCfg iterations", expected="1 or more", got=str(self.iterations))


class Refiner(nn.Module):
    """Depth-wise and 1x1 convolutions over both images' features, the displacement and the local correlation."""

    def __init__(self, cfg: RefinerCfg, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        window = 0 if cfg.radius is None else (2 * cfg.radius + 1) ** 2
        width_in = 2 * width + cfg.displacement_dim + window
        hidden = cfg.hidden or width_in
        self.displacement = nn.Conv2d(2, cfg.displacement_dim, 1)
        self.blocks = nn.Sequential(
            RefinerBlock(width_in, hidden, cfg.kernel),
            *(RefinerBlock(hidden, hidden, cfg.kernel) for _ in range(cfg.blocks)),
        )
        self.head = nn.Conv2d(hidden, 3, 1)

    def forward(
        self,
        features_A: Float[Tensor, "b c h w"],
        features_B: Float[Tensor, "b c h2 w2"],
        warp: Float[Tensor, "b 2 h w"],
        scale_factor: float = 1.0,
    ) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b 1 h w"]]:
        """Return the move (x, y) of every cell's target, in units of reach / 8 px, and a certainty logit to be added.

        Args:
            features_A: Features at this stride.
            features_B: Features at this stride.
            warp: Present target of every cell, normalised; a constant.
            scale_factor: Side of the network's input to the side that the network was trained at.
        """
        inputs = self._inputs(features_A, features_B, warp, scale_factor)
        learns = torch.is_grad_enabled() or self.training
        in_bands = warp.device.type == "cpu" and not learns and not is_traced()
        run = self._run_in_bands if in_bands else self._run
        x = run(inputs, _working_dtype(features_A))
        with torch.autocast(x.device.type, enabled=False):
            out = self.head(x.float())
        return out[:, :2], out[:, 2:]

    def _inputs(
        self,
        features_A: Float[Tensor, "b c h w"],
        features_B: Float[Tensor, "b c h2 w2"],
        warp: Float[Tensor, "b 2 h w"],
        scale_factor: float,
    ) -> list[Tensor]:
        """What the blocks see, (B, ., h, w) each: A, B where the warp points, the displacement, the correlation."""
        # Places in float32 whatever the features are: in bfloat16 they would be off by up to a pixel at fine strides.
        dtype = torch.promote_types(features_B.dtype, torch.float32)
        with torch.autocast(warp.device.type, enabled=False):
            places = warp.permute(0, 2, 3, 1).to(dtype)
            sampled = F.grid_sample(features_B.to(dtype), places, align_corners=False)
        inputs = [features_A, sampled, self._embed(warp, scale_factor)]
        if self.cfg.radius is not None:
            inputs.append(local_correlation(features_A, features_B, warp, self.cfg.radius))
        return inputs

    def _run(self, inputs: list[Tensor], dtype: torch.dtype) -> Float[Tensor, "b d h w"]:
        x = torch.cat([part.to(dtype) for part in inputs], dim=1)
        return self.blocks(x.contiguous(memory_format=torch.channels_last))

    def _run_in_bands(self, inputs: list[Tensor], dtype: torch.dtype) -> Float[Tensor, "b d h w"]:
        """The same without gradients on a CPU: two buffers for all blocks, and nothing else that is large.

        A fresh map of tens of megabytes costs more in page faults than the convolution that fills it. Buffers are
        channels last, with a rim of zero rows that the convolutions reach into.
        """
        rim = self.cfg.kernel // 2
        widths = [part.shape[1] for part in inputs]
        b, _, h, w = inputs[0].shape
        width_in = sum(widths)
        x = _buffer((b, h, w, _filled(width_in)), rim, dtype)
        x[..., width_in:] = 0
        for part, place in zip(inputs, x[:, rim:-rim, :, :width_in].split(widths, dim=-1), strict=True):
            place.copy_(part.permute(0, 2, 3, 1))
        inputs.clear()  # together they are as large as a buffer, and nobody needs them any more
        out = None
        for block in self.blocks:
            assert isinstance(block, RefinerBlock)
            if out is None or out.shape[-1] != _filled(block.width_out):
                out = _buffer((b, h, w, _filled(block.width_out)), rim, dtype)
            block.run_in_bands(x, out)
            x, out = out, x
        return x[:, rim:-rim, :, : self.head.in_channels].permute(0, 3, 1, 2)

    def _embed(self, warp: Float[Tensor, "b 2 h w"], scale_factor: float) -> Float[Tensor, "b d h w"]:
        """Embed how far each cell's target is from its own place."""
        hw: HW = (warp.shape[-2], warp.shape[-1])
        with torch.autocast(warp.device.type, enabled=False):  # bfloat16 has three digits, a warp needs more
            displacement = warp - normalized_grid(hw, device=warp.device).permute(2, 0, 1)
            return self.displacement(_DISPLACEMENT_SCALE * scale_factor * displacement)


class RefinerBlock(nn.Sequential):
    """Depth-wise convolution, batch norm, ReLU, 1x1 convolution."""

    def __init__(self, width_in: int, width_out: int, kernel: int) -> None:
        super().__init__(
            DepthwiseConv2d(width_in, kernel),
            nn.BatchNorm2d(width_in, momentum=_BATCH_NORM_MOMENTUM),
            nn.ReLU(inplace=True),
            nn.Conv2d(width_in, width_out, 1),
        )
        self.width_out = width_out

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Run the block; in evaluation the norm is part of the convolution."""
        depthwise, norm, relu, pointwise = self
        return pointwise(relu(conv_norm(input, depthwise, norm)))  # pyright: ignore[reportArgumentType]

    def run_in_bands(self, x: Float[Tensor, "b h w c"], out: Float[Tensor, "b h w d"]) -> None:
        """The block from one buffer (see `Refiner`) to another, a few rows at a time, which stay in the cache."""
        depthwise, norm, _, pointwise = self
        assert isinstance(depthwise, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(pointwise, nn.Conv2d)
        assert pointwise.bias is not None
        width_in, width_out, channels = depthwise.in_channels, self.width_out, x.shape[-1]
        more_in, more_out = channels - width_in, out.shape[-1] - width_out
        weight, bias = fold(depthwise, norm)
        weight, bias = F.pad(weight, (0, 0) * 3 + (0, more_in)), F.pad(bias, (0, more_in))
        matrix = F.pad(pointwise.weight.flatten(1), (0, more_in, 0, more_out))
        weight, bias, matrix, shift = (
            parameter.to(x.dtype)
            for parameter in (weight, bias, matrix, F.pad(pointwise.bias, (0, more_out)))
        )
        rim, width = weight.shape[-1] // 2, x.shape[2]
        rows = max(1, _BAND_BYTES // (width * channels * x.element_size()))
        exact = x.dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            matrix = packed(matrix, rows * width) if exact else matrix.T
            # an image at a time, its axis kept: without it torch does not see that the maps are channels last
            for source, target in zip(x.split(1), out[:, rim:-rim].split(1), strict=True):
                for top in range(0, target.shape[1], rows):
                    band = target[0, top : top + rows].view(-1, target.shape[-1])  # [n d]
                    y = _convolved(source, top, len(band) // width, weight, bias).view(-1, channels)
                    if exact:
                        band.copy_(affine(y, matrix, shift))
                    else:
                        torch.addmm(shift, y, matrix, out=band)


def _convolved(
    source: Float[Tensor, "1 h w c"], top: int, rows: int, weight: Tensor, bias: Tensor
) -> Float[Tensor, "1 {rows} w c"]:
    """ReLU of the depth-wise convolution of some rows, the first of which begins rim rows above."""
    rim, channels = weight.shape[-1] // 2, len(weight)
    if source.dtype == torch.float32 and weight.shape[-1] == KERNEL:
        out = large_empty((1, rows, *source.shape[2:]), source.dtype)
        convolve(source, top + rim, weight, bias, out, relu=True)
        return out
    reached = source[:, top : top + rows + 2 * rim].permute(0, 3, 1, 2)
    y = F.conv2d(reached, weight, bias, padding=(0, rim), groups=channels).relu_()
    return y.permute(0, 2, 3, 1)


def _filled(width: int) -> int:
    """Channels of a buffer: products with a multiple of eight are a third faster. The others are zero all along."""
    return -(-width // LANES) * LANES


def _buffer(shape: tuple[int, int, int, int], rim: int, dtype: torch.dtype) -> Tensor:
    """A map (B, rim + H + rim, W, C) whose rims are zero and the rest is not yet anything."""
    b, h, w, c = shape
    buffer = large_empty((b, h + 2 * rim, w, c), dtype)
    buffer[:, :rim] = buffer[:, h + rim :] = 0
    return buffer


def _working_dtype(features: Tensor) -> torch.dtype:
    kind = features.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
