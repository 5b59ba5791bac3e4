"""Scenes without end for stage 1: a folder of photos in, several views of each photo out.

Scene i is a function of the folder, the settings, the stream's seed and i alone, as in `l2m_viz.training.stream`.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from l2m_viz.data.images import read_image, resize_image
from l2m_viz.errors import ImageError, L2MError
from l2m_viz.geometry import HW
from l2m_viz.lifting import View
from l2m_viz.lifting.synthesis import SynthesisCfg, synthesise_views
from l2m_viz.training.stream import list_photos, use_one_thread


@dataclass(frozen=True)
class SceneCfg:
    """How a photo becomes a scene."""

    # Size (H, W) of every view in pixels; the photo is resized to it.
    hw: HW = (224, 288)
    # Views, the photo itself first; the last one is for the student, the others for the teacher.
    views: int = 4
    synthesis: SynthesisCfg = field(default_factory=lambda: SynthesisCfg(holes="none"))


class SceneStream:
    """An iterable of scenes (lists of `View`) from all photos under a folder; never ends.

    Args:
        folder: Photos, in subfolders too.
        cfg: How a photo becomes a scene.
        seed: Of the whole stream.
        num_workers: Processes that make scenes ahead; 0 makes them in this one.
        start: Number of the first scene.

    Raises:
        ImageError: no such folder, no photo in it, or (while iterating) none that can be read.
    """

    def __init__(
        self, folder: Path, cfg: SceneCfg, *, seed: int = 0, num_workers: int = 0, start: int = 0
    ) -> None:
        if cfg.views < 3:
            expected = "at least 3 views: two for the teacher, one for the student"
            raise L2MError("SceneCfg.views", expected=expected, got=str(cfg.views))
        self._maker, self._workers, self._start = _SceneMaker(folder, cfg, seed), num_workers, start

    def __iter__(self) -> Iterator[list[View]]:
        """Make scenes for ever."""
        loader = DataLoader(
            self._maker,
            batch_size=None,
            sampler=itertools.count(self._start),  # pyright: ignore[reportArgumentType]
            num_workers=self._workers,
            multiprocessing_context="spawn" if self._workers else None,
            worker_init_fn=use_one_thread,
            collate_fn=_as_is,  # pyright: ignore[reportArgumentType]
            generator=torch.Generator(),
        )
        warned: set[str] = set()
        for views, skipped in loader:
            for photo, reason in skipped.items():
                if photo not in warned:
                    warned.add(photo)
                    warnings.warn(f"SceneStream skips {photo}: {reason}", stacklevel=2)
            if views is None:
                raise ImageError("photos", expected="a readable one", got=str(next(iter(skipped.values()))))
            yield views


class _SceneMaker(Dataset[tuple[list[View] | None, dict[str, str]]]):
    def __init__(self, folder: Path, cfg: SceneCfg, seed: int) -> None:
        self.folder, self.cfg, self.seed = folder, cfg, seed
        self.photos = list_photos(folder)

    def __getitem__(self, index: int) -> tuple[list[View] | None, dict[str, str]]:
        turn, place = divmod(index, len(self.photos))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.photos))
        skipped: dict[str, str] = {}
        for k in range(len(order)):
            photo = self.photos[order[(place + k) % len(order)]]
            try:
                image = resize_image(read_image(self.folder / photo), self.cfg.hw)
                draw = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
                return synthesise_views(image, self.cfg.views, self.cfg.synthesis, draw), skipped
            except L2MError as error:
                skipped[photo] = str(error)
        return None, skipped


def _as_is(
    made: tuple[list[View] | None, dict[str, str]],
) -> tuple[list[View] | None, dict[str, str]]:
    return made
