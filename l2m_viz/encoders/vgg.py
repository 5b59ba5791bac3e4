"""VGG19 with batch normalisation (Simonyan, Zisserman 2015) as a pyramid of fine features, as RoMa uses it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.encoders.folding import conv_norm


@dataclass(frozen=True)
class VGG19Cfg:
    """Widths and numbers of convolutions of the levels at strides 1, 2, 4 and 8.

    Attributes:
        widths: Channels of each level.
        depths: 3x3 convolutions in each level.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 4, 4)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image to a cell of each level."""
        return tuple(2**level for level in range(len(self.widths)))


class VGG19Pyramid(nn.Module):
    """The maps before each max-pool; ``layers`` is torchvision's ``features[:40]`` under the same numbers.

    Every cell covers its own stride x stride pixels: 3x3 convolutions keep centres and pools halve the grid.
    """

    def __init__(self, cfg: VGG19Cfg | None = None) -> None:
        super().__init__()
        self.cfg = cfg or VGG19Cfg()
        self.strides = self.cfg.strides
        self.channels = dict(zip(self.strides, self.cfg.widths, strict=True))
        self.layers = nn.ModuleList(_layers(self.cfg))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[int, Float[Tensor, "b _ _ _"]]:
        """Return {stride: (B, C, H // stride, W // stride)} of images, normalised if the checkpoint wants it."""
        pyramid: dict[int, Tensor] = {}
        features, stride = images, 1
        layers = iter(self.layers)
        for layer in layers:
            if isinstance(layer, nn.MaxPool2d):
                pyramid[stride] = features
                stride *= 2
                if stride > self.strides[-1]:
                    break  # what the last pool would give is a fifth level that nobody asked for
                features = layer(features)
            else:
                assert isinstance(layer, nn.Conv2d)
                norm, _ = next(layers), next(layers)  # and the ReLU
                features = conv_norm(features, layer, norm, relu=True)  # pyright: ignore[reportArgumentType]
        return pyramid


def _layers(cfg: VGG19Cfg) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in zip(cfg.widths, cfg.depths, strict=True):
        for _ in range(depth):
            layers += [
                nn.Conv2d(channels, width, kernel_size=3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        layers.append(nn.MaxPool2d(kernel_size=2))
    return layers
