"""Scenes without end for stage 1: a folder of photos in, several views of each photo out.

Scene i is a function of the folder, the settings, the stream's seed and i alone, as in `l2m_viz.training.stream`.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from l2m_viz.data.images import cut_to
from l2m_viz.errors import ImageError, L2MError
from l2m_viz.geometry import HW
from l2m_viz.lifting import View
from l2m_viz.lifting.synthesis import SynthesisCfg, synthesise_views
from l2m_viz.training.pairs import PairCfg, Range, read_photo, scaled
from l2m_viz.training.stream import list_photos, use_one_thread


@dataclass(frozen=True)
class SceneCfg:
    """How a photo becomes a scene."""

    # Size (H, W) of every view in pixels; the middle of the photo is cut to this shape.
    hw: HW = (192, 256)
    # Views, the photo itself first; the last one is new to the teacher, the others are what it sees.
    views: int = 4
    # Invented geometry: any is consistent across views, this one takes 30 ms, and no two scenes of a photo are alike.
    synthesis: SynthesisCfg = field(
        default_factory=lambda: SynthesisCfg(depth="random-planes", holes="background")
    )
    # Of each scene, drawn: 0 hardly moves the cameras, 1 is the sampler's range. See `l2m_viz.training.pairs.scaled`.
    difficulty: Range = (0.2, 1.2)


class SceneStream:
    """An iterable of scenes (lists of `View`) from all photos under a folder; never ends.

    Args:
        folder: Photos, in subfolders too.
        cfg: How a photo becomes a scene.
        seed: Of the whole stream.
        num_workers: Processes that make scenes ahead; 0 makes them in this one.
        start: Number of the first scene.
        step: From the number of a scene to that of the next: several processes that share the scenes take every n-th.

    Raises:
        ImageError: no such folder, no photo in it, or (while iterating) none that can be read.
    """

    def __init__(
        self,
        folder: Path,
        cfg: SceneCfg,
        *,
        seed: int = 0,
        num_workers: int = 0,
        start: int = 0,
        step: int = 1,
    ) -> None:
        if cfg.views < 3:
            expected = "at least 3 views: two for the teacher, one for the student"
            raise L2MError("SceneCfg.views", expected=expected, got=str(cfg.views))
        self._maker, self._workers, self._numbers = _SceneMaker(folder, cfg, seed), num_workers, (start, step)

    def __iter__(self) -> Iterator[list[View]]:
        """Make scenes for ever."""
        loader = DataLoader(
            self._maker,
            batch_size=None,
            sampler=itertools.count(*self._numbers),  # pyright: ignore[reportArgumentType]
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
        if cfg.synthesis.holes == "background" and len(self.photos) < 2:
            todo = 'add photos or choose holes="telea"'
            what = f'SceneStream: holes="background" in {folder}'
            raise L2MError(what, expected="at least 2 photos", got=str(len(self.photos)), todo=todo)

    def __getitem__(self, index: int) -> tuple[list[View] | None, dict[str, str]]:
        turn, place = divmod(index, len(self.photos))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.photos))
        photos = [self.photos[order[(place + k) % len(order)]] for k in range(len(order))]
        skipped: dict[str, str] = {}
        for k, photo in enumerate(photos):
            image = self._read(photo, skipped)
            if image is None:
                continue
            try:
                behind = self._background([*photos[k + 1 :], *photos[:k]], skipped)
                return self._scene(
                    image, behind, torch.Generator().manual_seed(self.seed * 1_000_003 + index)
                ), skipped
            except L2MError as error:
                skipped[photo] = str(error)
        return None, skipped

    def _scene(self, image: Tensor, behind: Tensor | None, draw: torch.Generator) -> list[View]:
        low, high = self.cfg.difficulty
        views = scaled(self.cfg.synthesis.views, low + (high - low) * torch.rand((), generator=draw).item())
        synthesis = replace(self.cfg.synthesis, views=views)
        return synthesise_views(
            cut_to(image, self.cfg.hw), self.cfg.views, synthesis, draw, background=behind
        )

    def _background(self, photos: list[str], skipped: dict[str, str]) -> Tensor | None:
        """The first of these that can be read, to be seen through the holes."""
        if self.cfg.synthesis.holes != "background":
            return None
        for photo in photos:
            image = self._read(photo, skipped)
            if image is not None:
                return image
        raise ImageError(f"photos in {self.folder}", expected="a second readable one", got="one")

    def _read(self, photo: str, skipped: dict[str, str]) -> Tensor | None:
        try:
            return read_photo(self.folder / photo, PairCfg(hw=self.cfg.hw))
        except ImageError as error:
            skipped[photo] = str(error)
            return None


def _as_is(
    made: tuple[list[View] | None, dict[str, str]],
) -> tuple[list[View] | None, dict[str, str]]:
    return made
