"""Augmentation of a batch of pairs: two images of 256x256 px each, every one with draws of its own."""

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.training.augment import CROSS_MODAL, AugmentCfg, augment

_NUM_IMAGES = 64  # all effects and their combinations at about the rates that a training meets


@pytest.mark.parametrize("name", ["default", "cross-modal"])
def bench_augment(in_units, name):
    """The floor is one pass over the images: read and written once."""
    cfg = {"default": AugmentCfg(), "cross-modal": CROSS_MODAL}[name]
    image = resize_image(load_sample("astronaut").image_A, (256, 256))
    images, seeds = image.repeat(_NUM_IMAGES, 1, 1, 1), torch.arange(_NUM_IMAGES)
    pairs = _NUM_IMAGES // 2
    in_units(
        f"augment {pairs} pairs of 256^2, {name} (bar {1.5 * pairs:g} units)",
        lambda: augment(images, cfg, seeds=seeds),
        moved=2 * images.nbytes,
    )
