"""What to show where the photo saw nothing: fill the holes of a rendered view.

A filled pixel has a colour and no truth: it is marked in ``View.inpainted_mask``, stays a hole, and never counts as
covisible. The fillings teach different things: black says "nothing here", a smear looks nearly right, another photo is
sharp and wrong, and diffusion is what a camera might have seen.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.images import cut_to, require_image, resize_image, to_uint8
from l2m_viz.errors import FileFormatError, L2MError, MissingError, ShapeError
from l2m_viz.lifting.networks import (
    INSTALL,
    NetworkFiles,
    load_complete,
    load_once,
    network_device,
    network_hw,
)
from l2m_viz.lifting.scene import View

PROMPT = "a realistic photo"  # the official script's
SHORT_SIDE = 512  # px, what Stable Diffusion 2 was trained on

_MULTIPLE = 64  # px: 8 of the image a cell of the latent, 8 cells a step of the deepest level
_INPAINTING_CHANNELS = 9  # the latent, the mask, the latent of the picture without what the mask hides
_TELEA_RADIUS = 3.0  # px
_FILES = (
    "model_index.json",
    "scheduler/",
    "tokenizer/",  # its files changed with the versions of transformers
    *(f"{part}/config.json" for part in ("text_encoder", "unet", "vae")),
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
DIFFUSION_NETWORKS = {
    "diffusion": NetworkFiles("L2M-Inpainting", ("Liangyingping/L2M-Inpainting",), _FILES),
    "diffusion-sd2": NetworkFiles(
        "stable-diffusion-2-inpainting",
        # Stability AI withdrew its repository in November 2025; the community keeps the same files
        ("sd2-community/stable-diffusion-2-inpainting", "stabilityai/stable-diffusion-2-inpainting"),
        _FILES,
    ),
}
_PAINTING = threading.Lock()  # a pipeline's scheduler keeps the state of one run
FILL_METHODS = ("none", "telea", "background", *DIFFUSION_NETWORKS)


def fill_holes(
    view: View,
    method: str = "telea",
    *,
    background: Float[Tensor, "h2 w2 3"] | None = None,
    generator: torch.Generator | None = None,
    num_steps: int = 50,
) -> View:
    """Give the holes of a view a colour; all other pixels, the depth and ``hole_mask`` stay exactly as they are.

    Args:
        view: A render.
        method: "none" leaves the view alone. "telea" continues the surroundings (Telea 2004). "background" shows
            another photo through the holes. "diffusion" invents with the authors' network, "diffusion-sd2" with the
            Stable Diffusion 2 that it was trained from; their weights have to be on this machine, see
            `l2m_viz.lifting.networks`, and without a GPU each view takes minutes.
        background: The other photo, for "background" only; its middle is cropped and resized to cover the view.
        generator: Randomness of diffusion.
        num_steps: Denoising steps of diffusion.

    Raises:
        ShapeError: image and masks of the view differ in size.
        ImageError: the view's or the other photo's values are not finite or leave [0, 1].
        MissingError: a package or the weights of the network are not here; the message says how to get them.
        FileFormatError: the weights are damaged or another network's.
        L2MError: no such method, no background where one is needed, no step, or nothing but holes to continue.
    """
    _check(view, method, background, num_steps)
    if method == "none" or not view.hole_mask.any():
        return view
    if method == "telea":
        invented = _continued(view.image, view.hole_mask)
    elif method == "background":
        assert background is not None
        invented = cut_to(background.float(), (view.image.shape[0], view.image.shape[1]))
    else:
        invented = _diffused(view, DIFFUSION_NETWORKS[method], num_steps, generator)
    image = torch.where(view.hole_mask[..., None], invented.to(view.image), view.image)
    return replace(view, image=image, inpainted_mask=view.inpainted_mask | view.hole_mask)


def _check(view: View, method: str, background: Tensor | None, num_steps: int) -> None:
    if method not in FILL_METHODS:
        expected = "one of " + ", ".join(f'"{name}"' for name in FILL_METHODS)
        raise L2MError("fill_holes method", expected=expected, got=repr(method))
    require_image("fill_holes", view.image)
    sizes = tuple(view.image.shape[:2]), tuple(view.hole_mask.shape), tuple(view.inpainted_mask.shape)
    if len(set(sizes)) != 1:
        raise ShapeError("fill_holes", expected="image and masks of one size", got=f"{sizes}")
    if (background is None) == (method == "background"):
        expected = "another photo" if background is None else 'none but for "background"'
        raise L2MError(f'fill_holes "{method}": background', expected=expected, got=_name(background))
    if background is not None:
        require_image("fill_holes background", background)
    if num_steps < 1:
        raise L2MError("fill_holes num_steps", expected="at least 1", got=str(num_steps))


def _name(background: Tensor | None) -> str:
    return "none" if background is None else str(tuple(background.shape))


def _continued(image: Float[Tensor, "h w 3"], hole_mask: Bool[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    if hole_mask.all():
        todo = 'use "background" or look from another camera'
        raise L2MError('fill_holes "telea"', expected="a pixel to continue from", got="only holes", todo=todo)
    holes = hole_mask.numpy().astype(np.uint8)
    smear = cv2.inpaint(to_uint8(image), holes, _TELEA_RADIUS, cv2.INPAINT_TELEA)
    return torch.from_numpy(smear).float() / 255


def _diffused(
    view: View, network: NetworkFiles, num_steps: int, generator: torch.Generator | None
) -> Float[Tensor, "h w 3"]:
    """Let the network paint the holes at its own size, and bring the picture back to the view's."""
    folder = network.find()
    pipeline = _load(network, folder)
    height, width = network_hw((view.image.shape[0], view.image.shape[1]), SHORT_SIDE, _MULTIPLE)
    holes = view.hole_mask[None, None].float()  # [1 1 h w]
    holes = F.interpolate(holes, (height, width), mode="bilinear", antialias=True) > 1e-3  # [1 1 h' w']
    with _PAINTING, torch.inference_mode():
        painted = pipeline(
            prompt=PROMPT,
            image=resize_image(view.image.float(), (height, width)).permute(2, 0, 1)[None],
            mask_image=holes.float(),  # 1 where any hole has a share: no black of a hole seeps in
            height=height,
            width=width,
            num_inference_steps=num_steps,
            generator=generator,
            output_type="pt",
        ).images  # [1 3 h' w']
    picture = painted[0].float().cpu().clone().permute(1, 2, 0)  # [h' w' 3], not an inference tensor
    return resize_image(picture.clamp(0, 1), (view.image.shape[0], view.image.shape[1]))


@load_once
def _load(network: NetworkFiles, folder: Path) -> Callable[..., Any]:
    try:
        from diffusers import (
            AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
            StableDiffusionInpaintPipeline,  # pyright: ignore[reportPrivateImportUsage]
            UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
        )
        from transformers import CLIPTextModel
    except ImportError as error:
        raise MissingError(f"{network.name} needs diffusers and transformers", todo=INSTALL) from error
    device = network_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    unet = load_complete(UNet2DConditionModel, folder / "unet", dtype=dtype, low_cpu_mem_usage=False)
    if unet.config.in_channels != _INPAINTING_CHANNELS:
        expected, got = f"{_INPAINTING_CHANNELS} input channels", str(unet.config.in_channels)
        todo = "this is Stable Diffusion without inpainting"
        raise FileFormatError(f"{folder / 'unet'}", expected=expected, got=got, todo=todo)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(
        folder,
        unet=unet,
        vae=load_complete(AutoencoderKL, folder / "vae", dtype=dtype, low_cpu_mem_usage=False),
        text_encoder=load_complete(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        safety_checker=None,
        feature_extractor=None,  # the safety checker's
        requires_safety_checker=False,
        local_files_only=True,
        low_cpu_mem_usage=False,  # otherwise it asks for accelerate
    )
    return pipeline.to(device)
