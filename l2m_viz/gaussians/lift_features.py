"""Give 3D Gaussians the features that a 2D network sees: in closed form, or by optimisation as in FiT3D.

Closed form: a pixel is sum_i w_i f_i, with w = alpha times transmittance; its adjoint, normalised, gives each Gaussian
the mean of the pixels that it helped to make, f_i = sum_p w_ip F_p / sum_p w_ip. One pass over the views.

Optimisation (Yue et al., "Improving 2D Feature Representations by 3D-Aware Fine-Tuning" (FiT3D), 2024, section 3.1):
narrow features and one 3x3 convolution up to the network's width, learned together with the Gaussians from images and
features of many views. The feature loss reaches features and convolution only; geometry learns from colour.
"""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.files import Saved, load_npz, save_npz
from l2m_viz.errors import FileFormatError, L2MError, ShapeError
from l2m_viz.gaussians import cpu
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.gaussians.rasterize import rasterize
from l2m_viz.geometry import Camera, normalized_grid, sample_image, transform_points

Method = Literal["closed-form", "optimise"]
_LIMITS = (0.01, 1e10, 0.3)  # near, far, eps2d: the rasterizer's own
_SSIM_WINDOW = 11  # px, as in 3D Gaussian Splatting
_MIN_WEIGHT = 1e-4  # of a pixel; a Gaussian that has less of all pixels together was not seen
_ADAM = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FeatureView:
    """What one camera sees: features of a 2D network, the photo, or both.

    Attributes:
        camera: The camera; its size is that of the photo.
        features: Feature cells that tile the image, sampled bilinearly (align_corners=False), or None.
        mask: True where a cell is to be believed; a pixel counts if all cells it is interpolated from are. None: all.
        image: RGB in [0, 1] of the camera's size, for ``optimise``, or None.
        image_mask: True where the photo is to be believed, or None: everywhere.

    Raises:
        ShapeError: shapes do not fit each other or the camera, or there is neither features nor image.
        L2MError: a believed value is NaN or infinite.
    """

    camera: Camera
    features: Float[Tensor, "h w d"] | None = None
    mask: Bool[Tensor, "h w"] | None = None
    image: Float[Tensor, "H W 3"] | None = None
    image_mask: Bool[Tensor, "H W"] | None = None

    def __post_init__(self) -> None:
        if self.features is None and self.image is None:
            raise ShapeError("FeatureView", expected="features, an image, or both", got="neither")
        if self.image is not None and tuple(self.image.shape) != (*self.camera.hw, 3):
            got = str(tuple(self.image.shape))
            raise ShapeError("FeatureView.image", expected=f"the camera's {(*self.camera.hw, 3)}", got=got)
        for values, mask, what in (
            (self.features, self.mask, "features"),
            (self.image, self.image_mask, "image"),
        ):
            if mask is not None and (values is None or mask.shape != values.shape[:2]):
                got = f"mask {tuple(mask.shape)}, {what} {None if values is None else tuple(values.shape)}"
                raise ShapeError(f"FeatureView {what}", expected="a mask of the same size", got=got)
            believed = values if values is None or mask is None else values[mask]
            if believed is not None and not torch.isfinite(believed).all():
                todo = "leave such places out with a mask"
                raise L2MError(
                    f"FeatureView.{what}", expected="finite values", got="NaN or infinity", todo=todo
                )


@dataclass(frozen=True)
class LiftedFeatures(Saved):
    """Gaussians that carry the features of some views.

    Attributes:
        gaussians: With ``features``; zero for a Gaussian that no view has seen.
        weights: Sum of each Gaussian's weights over all pixels that counted: how much was seen of it, in pixels.
        up_projection: 3x3 convolution (network's width, width, 3, 3) from rendered to the network's features
            (``optimise``), or None where the Gaussians carry these themselves.
    """

    gaussians: Gaussians
    weights: Float[Tensor, " n"]
    up_projection: Float[Tensor, "c d 3 3"] | None = None

    def decode(self, rendered: Float[Tensor, "H W d"]) -> Float[Tensor, "H W c"]:
        """Features in the network's width from a map rendered with `rasterize`."""
        return _decode(rendered, self.up_projection)


@dataclass(frozen=True)
class FitCfg:
    """Settings of ``optimise``: FiT3D's, for hundreds of steps from a good start instead of 30,000 from a bad one."""

    num_steps: int = 300
    # Channels that a Gaussian carries; at most the network's.
    width: int = 64
    # Where the features start: "closed-form" from the principal components of the views' features, "zeros" as FiT3D.
    init: Literal["closed-form", "zeros"] = "closed-form"
    # Share of D-SSIM in the colour loss; the rest is L1.
    ssim_share: float = 0.2
    # Learning rates. That of the means is in units of the scene (the median depth seen) and falls exponentially.
    means_lr: float = 1.6e-4
    means_lr_final: float = 1.6e-6
    quats_lr: float = 1e-3
    log_scales_lr: float = 5e-3
    logit_opacities_lr: float = 5e-2
    colors_lr: float = 2.5e-3
    features_lr: float = 2.5e-3
    up_projection_lr: float = 6.25e-5
    # Order of the views.
    seed: int = 0
    # Seconds between writes of the checkpoint, if there is one.
    checkpoint_every_s: float = 60.0


@dataclass(frozen=True)
class FitStep:
    """State of a lifting after a step: a view in closed form, an update of the optimiser.

    Attributes:
        step: Steps done, 1 to ``num_steps``.
        num_steps: Steps in all.
        losses: Terms by name ("color", "features"), empty in closed form.
        lifted: Gives the result as it is now; call it before the next step is taken.
    """

    step: int
    num_steps: int
    losses: Mapping[str, float]
    lifted: Callable[[], LiftedFeatures]


def lift_features(
    gaussians: Gaussians,
    views: list[FeatureView],
    method: Method = "closed-form",
    cfg: FitCfg | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Callable[[FitStep], None] | None = None,
) -> LiftedFeatures:
    """Attach the features of views to Gaussians.

    Args:
        gaussians: In the cameras' world; their own features are replaced.
        views: Cameras with features (``closed-form``); with features, images or both (``optimise``).
        method: "closed-form" or "optimise"; see the module.
        cfg: Settings of ``optimise``.
        checkpoint: File to write the state to, now and then and when stopped; if it exists, work goes on from there.
        progress: Called after each step; an exception of it stops the work, and the checkpoint is kept.

    Raises:
        ShapeError: no views, or views whose features differ in width.
        L2MError: an unknown method, nothing to learn from, or a loss that is not finite.
        FileFormatError: the checkpoint is damaged or of another lifting.
    """
    last = None
    for last in lift_features_steps(gaussians, views, method, cfg, checkpoint=checkpoint):
        if progress is not None:
            progress(last)
    assert last is not None  # there is at least one view and one step
    return last.lifted()


def lift_features_steps(
    gaussians: Gaussians,
    views: list[FeatureView],
    method: Method = "closed-form",
    cfg: FitCfg | None = None,
    *,
    checkpoint: str | Path | None = None,
) -> Iterator[FitStep]:
    """Do what `lift_features` does, step by step: to draw it live, and to stop by not asking for more."""
    cfg = cfg or FitCfg()
    widths = {view.features.shape[2] for view in views if view.features is not None}
    if not views or len(widths) > 1:
        got = f"{len(views)} views with features of {sorted(widths)} channels"
        raise ShapeError("lift_features", expected="at least one view, features of one width", got=got)
    if method == "closed-form":
        if any(view.features is None for view in views):
            raise ShapeError("lift_features", expected="views with features", got="a view without")
        state: _State = _ClosedForm(gaussians, views)
    elif method == "optimise":
        if cfg.num_steps < 1:
            raise L2MError("lift_features", expected="at least one step", got=f"num_steps {cfg.num_steps}")
        state = _Fit(gaussians, views, cfg)
    else:
        raise L2MError("lift_features", expected="method 'closed-form' or 'optimise'", got=repr(method))
    return _run(state, cfg.checkpoint_every_s, None if checkpoint is None else Path(checkpoint))


class _State(ABC):
    """What both methods have: arrays to be saved, and a step."""

    num_steps: int

    def __init__(self, gaussians: Gaussians, views: list[FeatureView]) -> None:
        self.gaussians, self.views, self.step = (
            replace(gaussians, features=None, pca=None, backbone=None),
            views,
            0,
        )

    def identity(self) -> str:
        """A digest of everything that the result depends on."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for view in self.views:
            parts = (view.camera.K, view.camera.w2c, view.features, view.mask, view.image, view.image_mask)
            for value in parts:
                digest.update(b"-" if value is None else _bytes(value))
        for value in _parameters(self.gaussians).values():
            digest.update(_bytes(value))
        return digest.hexdigest()

    @abstractmethod
    def advance(self) -> dict[str, float]:
        """Take one step and return its losses."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; written to in place when one is read."""

    @abstractmethod
    def lifted(self) -> LiftedFeatures:
        """The result so far."""


def _run(state: _State, checkpoint_every_s: float, checkpoint: Path | None) -> Iterator[FitStep]:
    if checkpoint is not None and checkpoint.exists():
        _read_checkpoint(checkpoint, state)
    if state.step == state.num_steps:
        yield FitStep(state.step, state.num_steps, {}, state.lifted)
    written_at, written = time.monotonic(), state.step
    try:
        while state.step < state.num_steps:
            losses = state.advance()
            state.step += 1
            yield FitStep(state.step, state.num_steps, losses, state.lifted)
            if checkpoint is not None and time.monotonic() - written_at > checkpoint_every_s:
                _write_checkpoint(checkpoint, state)
                written_at, written = time.monotonic(), state.step
    finally:  # also when the caller stops asking, or an exception ends it
        if checkpoint is not None and written != state.step:
            _write_checkpoint(checkpoint, state)


def _write_checkpoint(path: Path, state: _State) -> None:
    arrays = {name: value.detach().cpu().numpy() for name, value in state.tensors().items()}
    save_npz(path, arrays, {"type": "lift_features", "identity": state.identity(), "step": state.step})


def _read_checkpoint(path: Path, state: _State) -> None:
    arrays, meta = load_npz(path)
    tensors = state.tensors()
    fits = meta.get("type") == "lift_features" and meta.get("identity") == state.identity()
    step = meta.get("step")
    if not fits or not isinstance(step, int) or arrays.keys() != tensors.keys():
        todo = "delete it to start anew, or call with the same Gaussians, views, method and settings"
        got = f"a {meta.get('type')} of other inputs or settings"
        raise FileFormatError(f"cannot resume from {path}", expected="its own checkpoint", got=got, todo=todo)
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(torch.from_numpy(arrays[name]))
    state.step = step


class _ClosedForm(_State):
    """Weighted sums over views; one step a view."""

    def __init__(self, gaussians: Gaussians, views: list[FeatureView]) -> None:
        super().__init__(gaussians, views)
        self.num_steps = len(views)
        # Large and touched once: numpy asks the system for large pages, torch does not and takes twice as long.
        self.sums = torch.from_numpy(np.zeros((len(gaussians), _width(views)), np.float32)).to(
            gaussians.means.device
        )
        self.weights = gaussians.means.new_zeros(len(gaussians))

    def advance(self) -> dict[str, float]:
        _accumulate(self.gaussians, self.views[self.step], self.sums, self.weights)
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "weights": self.weights}

    def lifted(self) -> LiftedFeatures:
        seen = self.weights > _MIN_WEIGHT
        factors = torch.where(seen, 1 / self.weights.clamp(min=_MIN_WEIGHT), 0.0)
        features = torch.from_numpy(np.empty(tuple(self.sums.shape), np.float32)).to(self.sums.device)
        torch.mul(self.sums, factors[:, None], out=features)
        return LiftedFeatures(replace(self.gaussians, features=features), self.weights.clone())


def _accumulate(gaussians: Gaussians, view: FeatureView, sums: Tensor, weights: Tensor) -> None:
    """Add a view's features, and the weights, to the Gaussians that made its pixels."""
    assert view.features is not None
    known = view.mask
    if known is None:
        known = torch.ones(view.features.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        if gaussians.means.device.type == "cpu":
            cells = view.features.detach().float().cpu()
            cpu.accumulate(gaussians, view.camera, cells, known.cpu(), sums, weights, _LIMITS)
            return
    _by_backward_pass(gaussians, view, sums, weights)


def _by_backward_pass(gaussians: Gaussians, view: FeatureView, sums: Tensor, weights: Tensor) -> None:
    """Do the same on any device: the adjoint is the gradient of rendered features by the features."""
    channels = sums.shape[1]
    device = gaussians.means.device
    carried = torch.zeros(len(gaussians), channels + 1, device=device, requires_grad=True)
    rendered = rasterize(replace(gaussians, features=carried), view.camera).features
    assert rendered is not None
    target, counts = _pixels(view, device)
    ones = torch.ones_like(target[..., :1])
    pulled = torch.where(counts[..., None], torch.cat([target, ones], dim=-1), 0.0)
    (gained,) = torch.autograd.grad(rendered, carried, pulled)
    sums += gained[:, :channels]
    weights += gained[:, channels]


def _pixels(view: FeatureView, device: torch.device) -> tuple[Tensor, Tensor]:
    """A view's features at its camera's pixels, and which of them count."""
    assert view.features is not None
    grid = normalized_grid(view.camera.hw, device=device)
    features = view.features.to(device, torch.float32)
    if view.mask is None:
        return sample_image(features, grid), torch.ones(view.camera.hw, dtype=torch.bool, device=device)
    mask = view.mask.to(device)
    known = sample_image(mask.float(), grid) > 1 - 1e-5
    return sample_image(torch.where(mask[..., None], features, 0.0), grid), known


class _Fit(_State):
    """FiT3D's joint optimisation; one step an update from one view."""

    def __init__(self, gaussians: Gaussians, views: list[FeatureView], cfg: FitCfg) -> None:
        super().__init__(gaussians, views)
        self.cfg, self.num_steps = cfg, cfg.num_steps
        self.photos = [_Photo.of(view, gaussians.means.device) for view in views]
        self.learns_color = any(photo is not None for photo in self.photos)
        self.learns_features = any(view.features is not None for view in views)
        self.leaves = {name: value.detach().clone() for name, value in _parameters(gaussians).items()}
        if self.learns_features:
            self.leaves["features"], self.leaves["up_projection"] = self._start()
        moving = [name for name in self.leaves if self.learns_color or name in ("features", "up_projection")]
        for name in moving:
            self.leaves[name].requires_grad_()
        extent = _extent(gaussians, views[0].camera)
        rates = {name: getattr(cfg, f"{name}_lr") * (extent if name == "means" else 1.0) for name in moving}
        groups = [{"params": [self.leaves[name]], "lr": rate, "name": name} for name, rate in rates.items()]
        self.optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True)
        for name in moving:  # made now, so that a checkpoint always has them
            leaf = self.leaves[name]
            moments = {key: torch.zeros_like(leaf) for key in _ADAM}
            self.optimizer.state[leaf] = {"step": torch.zeros((), device=leaf.device), **moments}
        self.means_rate = rates.get("means", 0.0)

    def identity(self) -> str:
        settings = asdict(self.cfg)
        del settings["checkpoint_every_s"]  # changes nothing
        return hashlib.sha256(f"{super().identity()} {settings}".encode()).hexdigest()

    def _start(self) -> tuple[Tensor, Tensor]:
        """First features and convolution."""
        full, n = _width(self.views), len(self.gaussians)
        width = min(self.cfg.width, full)
        device = self.gaussians.means.device
        generator = torch.Generator().manual_seed(self.cfg.seed)
        bound = 1 / math.sqrt(9 * width)  # torch's own for a convolution
        convolution = (2 * torch.rand(full, width, 3, 3, generator=generator) - 1) * bound
        if self.cfg.init == "zeros":
            return torch.zeros(n, width, device=device), convolution.to(device)
        views = [view for view in self.views if view.features is not None]
        components = _principal(views, width)
        narrow = [replace(view, features=_projected(view, components)) for view in views]
        features = lift_features(self.gaussians, narrow).gaussians.features
        assert features is not None
        convolution = torch.zeros(full, width, 3, 3)
        convolution[:, :, 1, 1] = components
        return features, convolution.to(device)

    def advance(self) -> dict[str, float]:
        number, leaves = self._turn(), self.leaves
        view, photo = self.views[number], self.photos[number]
        share = self.step / max(1, self.num_steps - 1)
        for group in self.optimizer.param_groups:
            if group["name"] == "means":
                group["lr"] = self.means_rate * (self.cfg.means_lr_final / self.cfg.means_lr) ** share
        body = {name: leaves[name] for name in _parameters(self.gaussians)}
        losses: dict[str, Tensor] = {}
        if photo is not None:
            colored = replace(self.gaussians, **body)
            losses["color"] = _color_loss(rasterize(colored, view.camera).color, photo, self.cfg.ssim_share)
        if view.features is not None:
            still = {name: value.detach() for name, value in body.items()}
            rendered = rasterize(
                replace(self.gaussians, **still, features=leaves["features"], sh_rest=None), view.camera
            )
            losses["features"] = _feature_loss(rendered.features, view, leaves["up_projection"])
        values = {name: loss.item() for name, loss in losses.items()}
        if not all(map(math.isfinite, values.values())):
            todo = "lower the learning rates, or check the views"
            raise L2MError(
                f"lift_features, step {self.step}", expected="finite losses", got=str(values), todo=todo
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(list(losses.values()))
        self.optimizer.step()
        return values

    def _turn(self) -> int:
        """Whose turn it is: every view once in a shuffled round; a resumed fit takes the same ones."""
        turn, place = divmod(self.step, len(self.views))
        generator = torch.Generator().manual_seed(self.cfg.seed + 1_000_003 * turn)
        return int(torch.randperm(len(self.views), generator=generator)[place])

    def tensors(self) -> dict[str, Tensor]:
        saved = dict(self.leaves)
        for group in self.optimizer.param_groups:
            moments = self.optimizer.state[group["params"][0]]
            saved |= {f"{group['name']}.{key}": moments[key] for key in ("step", *_ADAM)}
        return saved

    def lifted(self) -> LiftedFeatures:
        kept = {name: value.detach().clone() for name, value in self.leaves.items()}
        up_projection = kept.pop("up_projection", None)
        gaussians = replace(self.gaussians, **kept)
        return LiftedFeatures(gaussians, _seen(gaussians, self.views), up_projection)


@dataclass(frozen=True)
class _Photo:
    """A view's photo, the pixels that count, and those around which a whole SSIM window counts."""

    image: Tensor
    counts: Tensor
    whole: Tensor

    @classmethod
    def of(cls, view: FeatureView, device: torch.device) -> "_Photo | None":
        if view.image is None:
            return None
        counts = view.image_mask
        if counts is None:
            counts = torch.ones(view.camera.hw, dtype=torch.bool)
        outside = F.pad((~counts).float()[None, None], [_SSIM_WINDOW // 2] * 4)
        whole = F.max_pool2d(outside, _SSIM_WINDOW, stride=1)[0, 0] == 0
        return cls(view.image.to(device, torch.float32), counts.to(device), whole.to(device))


def _color_loss(color: Tensor, photo: _Photo, ssim_share: float) -> Tensor:
    """(1 - share) L1 + share (1 - SSIM) over what counts (Kerbl et al. 2023, equation 7)."""
    from kornia.metrics import ssim

    absolute = _mean_where((color - photo.image).abs().mean(dim=-1), photo.counts)
    if ssim_share == 0:
        return absolute
    pair = (value.permute(2, 0, 1)[None] for value in (color, photo.image))
    similarity = ssim(*pair, window_size=_SSIM_WINDOW)[0].mean(dim=0)
    return (1 - ssim_share) * absolute + ssim_share * _mean_where(1 - similarity, photo.whole)


def _feature_loss(rendered: Tensor | None, view: FeatureView, up_projection: Tensor) -> Tensor:
    """L1 between decoded and target features over the pixels that count."""
    assert rendered is not None
    target, known = _pixels(view, rendered.device)
    return _mean_where((_decode(rendered, up_projection) - target).abs().mean(dim=-1), known)


def _mean_where(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of the values that count; zero if none does."""
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp(min=1)


def _decode(rendered: Tensor, up_projection: Tensor | None) -> Tensor:
    if up_projection is None:
        return rendered
    channels_first = rendered.permute(2, 0, 1)[None]
    return F.conv2d(channels_first, up_projection, padding=1)[0].permute(1, 2, 0)


def _principal(views: list[FeatureView], width: int) -> Tensor:
    """Principal directions of all believed features about zero, (network's width, width), orthonormal."""
    total = None
    for view in views:
        assert view.features is not None
        rows = view.features if view.mask is None else view.features[view.mask]
        rows = rows.reshape(-1, rows.shape[-1]).double().cpu()
        total = rows.T @ rows if total is None else total + rows.T @ rows
    assert total is not None
    return torch.linalg.eigh(total).eigenvectors.flip(1)[:, :width].float()


def _projected(view: FeatureView, components: Tensor) -> Tensor:
    assert view.features is not None
    features = view.features if view.mask is None else torch.where(view.mask[..., None], view.features, 0.0)
    return features.float() @ components.to(features.device)


def _seen(gaussians: Gaussians, views: list[FeatureView]) -> Tensor:
    """How much of each Gaussian the views see, in pixels."""
    weights = gaussians.means.new_zeros(len(gaussians))
    for view in views:
        known = view.mask if view.features is not None else view.image_mask
        hw = view.camera.hw if known is None else known.shape
        nothing = replace(view, features=torch.zeros(*hw, 0), mask=known, image=None, image_mask=None)
        _accumulate(gaussians, nothing, gaussians.means.new_zeros(len(gaussians), 0), weights)
    return weights


def _extent(gaussians: Gaussians, camera: Camera) -> float:
    """Median depth of what lies in front of a camera: the scene's size for the means' learning rate."""
    depth = transform_points(camera.w2c.to(gaussians.means), gaussians.means)[:, 2]
    return depth[depth > 0].median().item() if (depth > 0).any() else 1.0


def _width(views: list[FeatureView]) -> int:
    return next(view.features.shape[2] for view in views if view.features is not None)


def _parameters(gaussians: Gaussians) -> dict[str, Tensor]:
    names = ("means", "quats", "log_scales", "logit_opacities", "colors")
    return {name: getattr(gaussians, name) for name in names}


def _bytes(value: Tensor) -> bytes:
    return np.ascontiguousarray(value.detach().cpu().numpy()).tobytes()
