"""The 3D viewer, ``python -m app.viewer``: viser's fast splats beside what our own rasterizer really sees.

Only the panel and its wiring; the scene is built by `l2m_viz.show.scene`. Every visitor has a scene, a panel and a
drawing thread of their own, so that nobody's clicks change another one's view.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import tyro
import viser
from torch import Tensor

from l2m_viz.data import read_image, to_uint8
from l2m_viz.errors import L2MError
from l2m_viz.gaussians import Gaussians, Picked, feature_similarity, pick
from l2m_viz.geometry import Camera
from l2m_viz.lifting import NEAR
from l2m_viz.photo import PhotoCfg, comparable_gaussians, lift_photo
from l2m_viz.show import scene as scenes
from l2m_viz.show.figures import compositing_table, to_png
from l2m_viz.show.scene import ColorMode, NovelView, Pictures
from l2m_viz.show.viewer_camera import (
    ViewerCamera,
    ViewerUnits,
    camera_from_viewer,
    point_of_ray,
    standpoint,
)

_MODES: dict[str, ColorMode] = {
    "RGB": "rgb",
    "features (PCA)": "features",
    "depth": "depth",
    "similarity": "similarity",
}
_ENCODERS = ("l2m-tiny", "l2m-tiny-2d", "dense-sift")  # to compare, beside the one that was asked for
_NOTHING_PICKED = "Click on the scene: which Gaussians make that pixel, and what else looks like it?"
_EMPTY_CLICK = "Nothing there: no Gaussian reaches that pixel. What was picked before stays."
_TABLE_INCHES = (4.0, 2.1)
_MARK_SIZE = 0.01  # radius of the ball on the picked Gaussian, over its distance
_DRAFT_PX, _FULL_PX = 320, 640  # long side of our render while the camera moves, and when it stands
_STILL_S = 0.3  # a camera that has not moved for this long stands


@dataclass(frozen=True)
class ViewerCfg(PhotoCfg):
    """Settings of the viewer."""

    # Address to listen on; the default is reachable from this machine only.
    host: str = "127.0.0.1"
    # Port; if it is taken, the next free one.
    port: int = 8080
    # Show at most this many splats in the browser, evenly thinned; fewer for a computer without a graphics card.
    # Our own rasterizer always draws all of them.
    max_splats: int = 400_000


@dataclass(frozen=True)
class Shown:
    """A lifted photo, ready for the viewer.

    Attributes:
        title: What it is.
        told_by: By encoder, the Gaussians with its features and their PCA basis, which encoders of one width share; but
            for these all are the same.
        pictures: What cameras see; the first one is the photo itself.
        length_unit: Unit of depth.
        near: Nearest drawn depth, in scene units.
    """

    title: str
    told_by: Mapping[str, Gaussians]
    pictures: Pictures
    length_unit: str
    near: float

    @property
    def gaussians(self) -> Gaussians:
        """Those with the features of the first encoder."""
        return next(iter(self.told_by.values()))

    @property
    def camera(self) -> Camera:
        """The photo's own camera."""
        return next(iter(self.pictures.values()))[0]


def load(cfg: ViewerCfg) -> Shown:
    """Read the photo, its depth and a second view: the real one of a stereo sample, else one of the lifted scene.

    Raises:
        L2MError: the photo, its depth or the sample cannot be read.
    """
    photo = lift_photo(cfg)
    scene, depth = photo.scene, photo.depth
    image_B = scene.render(photo.camera_B).image if photo.image_B is None else photo.image_B
    told_by = comparable_gaussians(
        scene.image, depth, scene.K, list(dict.fromkeys([cfg.encoder, *_ENCODERS]))
    )
    unit = "m" if depth.kind == "metric" else "(relative)"
    near, far = (value.item() for value in depth.depth[depth.valid_mask].aminmax())
    num = len(told_by[cfg.encoder])
    title = f"**{photo.title}**: {num:,} Gaussians, depth {near:.2f} to {far:.2f} {unit}, {depth.method}"
    pictures = {"A": (scene.camera, scene.image), "B": (photo.camera_B, image_B)}
    return Shown(title, told_by, pictures, unit, near=NEAR * scene.unit)


class Painter(threading.Thread):
    """Calls ``paint(long_side)`` when asked: small while questions keep coming, full size once they stop.

    Questions that come during a paint are answered by one paint, of the newest state. An exception goes to ``complain``
    and ends nothing.
    """

    def __init__(self, paint: Callable[[int], None], complain: Callable[[Exception], None]) -> None:
        super().__init__(name="painter", daemon=True)
        self._paint, self._complain = paint, complain
        self._asked, self._stopped = threading.Event(), threading.Event()

    def ask(self) -> None:
        """Something has changed: paint."""
        self._asked.set()

    def stop(self) -> None:
        """End the thread after the paint that is running."""
        self._stopped.set()
        self._asked.set()

    def run(self) -> None:
        """Paint until stopped."""
        sharp = True
        while True:
            asked = self._asked.wait(None if sharp else _STILL_S)
            if self._stopped.is_set():
                return
            self._asked.clear()
            sharp = not asked
            try:
                self._paint(_DRAFT_PX if asked else _FULL_PX)
            except Exception as error:  # whatever it is, the visitor reads it and the server lives on
                self._complain(error)


class Visitor:
    """One browser: its scene, its panel, and the thread that draws for it."""

    def __init__(self, client: viser.ClientHandle, shown: Shown, max_splats: int) -> None:
        self.client, self.shown = client, shown
        self.scene = scenes.build_scene(
            client, shown.gaussians, pictures=shown.pictures, max_gaussians=max_splats
        )
        self._complaint = ""
        self._picked: Picked | None = None  # last
        self._similarity: Tensor | None = None  # of each Gaussian to it
        self._turn = threading.Lock()  # viser calls from many threads: the last value must win
        self._painter = Painter(self._paint, self._complain)
        self._add_display_controls()
        self._add_pick_panel()
        self._add_render_panel()
        for name, picture in self.scene.pictures.items():
            picture.on_click(lambda _, name=name: self._click_picture(name))
        client.camera.on_update(lambda _: self._painter.ask())
        self._painter.start()
        self._painter.ask()

    def leave(self) -> None:
        """End the drawing thread."""
        self._painter.stop()

    def go_to(self, name: str) -> None:
        """Put this visitor's camera where camera ``name`` is."""
        camera = self.client.camera
        there = self.shown.pictures[name][0]
        stand = standpoint(there, self.shown.gaussians, self.scene.units, camera.aspect)
        with self.client.atomic():
            camera.up_direction = stand.up
            camera.position = stand.position
            camera.look_at = stand.look_at
            camera.fov = stand.fov

    def _add_display_controls(self) -> None:
        gui = self.client.gui
        gui.add_markdown(self.shown.title)
        self._colors = gui.add_dropdown("Colours", tuple(_MODES), hint="Of the splats and of our view")
        self._colors.on_update(lambda _: self._recolor())
        hint = "l2m-tiny is 3D-aware, l2m-tiny-2d is not; both are shown in one PCA basis"
        self._encoder = gui.add_dropdown("Features of", tuple(self.shown.told_by), hint=hint)
        self._encoder.on_update(lambda _: self._ask_encoder())
        hint = "Times the true size; display only"
        self._size = gui.add_slider("Splat size", 1.0, 4.0, 0.2, scenes.DISPLAY_SIZE, hint=hint)
        self._size.on_update(lambda _: self._resize())
        frusta = gui.add_checkbox("Cameras", True, hint="With picking off, click a picture to stand there")
        frusta.on_update(lambda _: self.scene.show_frusta(frusta.value))
        buttons = gui.add_button_group("Go to camera", tuple(self.shown.pictures))
        buttons.on_click(lambda _: self.go_to(buttons.value))

    def _add_pick_panel(self) -> None:
        gui = self.client.gui
        with gui.add_folder("Inside one pixel"):
            # A camera's picture is in the way of most clicks of a visitor who stands there, unseen: it is not for both.
            hint = "A drag turns the scene as ever; camera pictures do not react"
            self._picking = gui.add_checkbox("Pick with a click", True, hint=hint)
            self._pick_text = gui.add_markdown(_NOTHING_PICKED)
            self._table = gui.add_image(to_uint8(scenes.hatch(3, 4)), format="png", visible=False)
        self.client.scene.on_click()(self._pick)

    def _add_render_panel(self) -> None:
        gui = self.client.gui
        with gui.add_folder("Our rasterizer, from this camera"):
            # Above what changes its height with every paint, and would move it from under the mouse.
            self._large = gui.add_checkbox("In main view", False, hint="In place of the splats")
            self._large.on_update(lambda _: self._switch_view())
            blank = to_uint8(scenes.hatch(9 * 16, 14 * 16))
            self._picture = gui.add_image(blank, format="jpeg", jpeg_quality=90)
            self._numbers = gui.add_markdown("drawing ...")

    def _click_picture(self, name: str) -> None:
        if not self._picking.value:
            self.go_to(name)

    def _pick(self, event: viser.SceneClickEvent) -> None:
        """Take apart the clicked pixel of our rasterizer's picture, and show what else has its feature."""
        if not self._picking.value:
            return
        shown = self.shown
        with self._turn:
            gaussians = self._gaussians()
            seen = ViewerCamera.of(self.client.camera)
            camera = camera_from_viewer(seen, self.scene.units, _FULL_PX)
            picked = pick(gaussians, camera, point_of_ray(camera, event.ray_direction), near=shown.near)
            if picked.strongest is None or picked.feature is None:
                self._pick_text.content = _EMPTY_CLICK
                return
            self._picked, self._similarity = picked, feature_similarity(gaussians, picked.feature)
            place = gaussians.means[picked.strongest]
            to_eye = camera.center - place
            self.scene.mark(
                place + _MARK_SIZE * to_eye, _MARK_SIZE * to_eye.norm().item()
            )  # rests on the surface
            unit = shown.length_unit
            table = compositing_table(
                picked.weights, picked.depths, picked.colors, unit=unit.strip("()"), size=_TABLE_INCHES
            )
            self._table.image = to_uint8(read_image(to_png(table)))
            self._table.visible = True
            self._pick_text.content = _describe_pick(picked, unit)
        if _MODES[self._colors.value] == "similarity":
            self._recolor()
        else:
            self._colors.value = "similarity"  # which calls _recolor

    def _gaussians(self) -> Gaussians:
        """With the features of the encoder that is chosen."""
        return self.shown.told_by[self._encoder.value]

    def _ask_encoder(self) -> None:
        """Show the features of another encoder, or what it says is like that which was picked."""
        with self._turn:
            gaussians = self._gaussians()
            if self._picked is not None and gaussians.features is not None:
                picked = replace(self._picked, features=gaussians.features[self._picked.indices])
                assert picked.feature is not None
                self._similarity = feature_similarity(gaussians, picked.feature)
        if self._mode() in ("features", "similarity"):
            self._recolor()
        else:
            self._colors.value = "features (PCA)"  # which calls _recolor

    def _mode(self) -> ColorMode:
        """What colours mean now: before anything is picked, "similarity" means nothing."""
        mode = _MODES[self._colors.value]
        return "rgb" if mode == "similarity" and self._similarity is None else mode

    def _recolor(self) -> None:
        shown = self.shown
        with self._turn:
            gaussians = self._gaussians()
            colors = scenes.gaussian_colors(
                gaussians, self._mode(), gaussians.pca, shown.camera, self._similarity
            )
            self.scene.set_colors(colors)
        self._painter.ask()

    def _resize(self) -> None:
        with self._turn:
            self.scene.set_size(self._size.value)
        self._painter.ask()

    def _switch_view(self) -> None:
        with self._turn:
            self.scene.show_gaussians(not self._large.value)
            if not self._large.value:
                self.client.scene.set_background_image(None)
        self._painter.ask()

    def _paint(self, long_side: int) -> None:
        eye, units = self.client.camera, self.scene.units
        seen = ViewerCamera.of(eye)
        self.scene.see_from(camera_from_viewer(seen, units, max(eye.image_width, eye.image_height, 1)))
        camera = camera_from_viewer(seen, units, long_side)
        gaussians, mode, similarity = self._gaussians(), self._mode(), self._similarity
        start = time.perf_counter()
        view = scenes.novel_view(gaussians, camera, mode, gaussians.pca, self.shown.near, similarity)
        milliseconds = 1000 * (time.perf_counter() - start)
        image = to_uint8(view.image)
        self._picture.image = image
        with self._turn:
            if self._large.value:
                self.client.scene.set_background_image(image, format="jpeg", jpeg_quality=90)
        self._numbers.content = _describe(view, camera, milliseconds, mode, self.shown.length_unit)
        self._complaint = ""

    def _complain(self, error: Exception) -> None:
        """Tell the visitor, once for each kind of trouble."""
        text = f"{type(error).__name__}: {error}"
        if text != self._complaint:
            self._complaint = text
            self.client.add_notification("Our rasterizer failed", text, color="red")


def _describe(view: NovelView, camera: Camera, milliseconds: float, mode: ColorMode, length_unit: str) -> str:
    size = f"{camera.width} × {camera.height} px"
    text = f"holes (striped) {view.hole_share:.1%}, {size}, {milliseconds:.0f} ms"
    if mode == "depth":
        near, far = view.depth_limits
        ends = f"{near:.2f} {length_unit} (red) to {far:.2f} {length_unit} (blue)"
        text += f"\n\ndepth {ends}, from this camera"
    if mode == "similarity":
        text += "\n\ncosine to the picked feature: 1 red, 0 light grey, −1 blue"
    return text


def _describe_pick(picked: Picked, length_unit: str) -> str:
    strongest = picked.weights.argmax()
    number, share = f"{picked.strongest:,}", f"{picked.weights[strongest]:.0%}"
    count = "One Gaussian makes" if len(picked) == 1 else f"{len(picked)} Gaussians make"
    return (
        f"{count} this pixel: depth {picked.depth:.2f} {length_unit}, alpha {picked.alpha:.3f}. "
        f"The strongest, no. {number}, gives {share} from {picked.depths[strongest]:.2f} {length_unit}."
    )


def serve(cfg: ViewerCfg, shown: Shown) -> None:
    """Serve until interrupted."""
    visitors: dict[int, Visitor] = {}
    with scenes.viser_server(cfg.host, cfg.port) as server:
        units = ViewerUnits.fit(shown.gaussians, shown.camera)
        server.scene.set_up_direction("-y")
        scenes.start_at(server.initial_camera, shown.camera, shown.gaussians, units, aspect=1.0)
        server.gui.main_panel.dock_right()  # beside the scene, not over it

        @server.on_client_connect
        def _(client: viser.ClientHandle) -> None:
            visitors[client.client_id] = visitor = Visitor(client, shown, cfg.max_splats)
            # A visitor may be gone before there was anything to clean up.
            if client.client_id not in server.get_clients():
                visitor.leave()

        @server.on_client_disconnect
        def _(client: viser.ClientHandle) -> None:
            if (visitor := visitors.pop(client.client_id, None)) is not None:
                visitor.leave()

        moved = "" if cfg.port in (0, server.get_port()) else f" (port {cfg.port} is taken)"
        try:
            print(f"viewer: http://{cfg.host}:{server.get_port()}{moved}, Ctrl-C ends it", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("viewer stopped")
        for visitor in visitors.values():
            visitor.leave()


def main() -> None:
    """Entry of ``python -m app.viewer``."""
    # A browser that hangs up while it connects is no trouble of ours.
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    cfg = tyro.cli(ViewerCfg, prog="python -m app.viewer", description="Look at a lifted photo in 3D.")
    try:
        serve(cfg, load(cfg))
    except L2MError as error:
        print(f"viewer: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
