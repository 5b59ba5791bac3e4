"""The gsplat backend: what it is given and how it gives up; with a GPU (`-m gpu`), values and gradients."""

import inspect
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import l2m_viz.gaussians  # noqa: F401 (the module of `rasterize` hides behind the function)
from l2m_viz.errors import L2MError, MissingError
from l2m_viz.gaussians import Gaussians, gsplat, rasterize, reference
from l2m_viz.geometry import Camera

RASTERIZE = sys.modules["l2m_viz.gaussians.rasterize"]
PARAMETERS = ["means", "quats", "log_scales", "logit_opacities", "colors", "features"]
FIELDS = ["color", "features", "depth", "alpha"]


@pytest.fixture(autouse=True)
def fresh():
    """No test sees what another one found out about the machine."""
    gsplat._extension_problem.cache_clear()
    yield
    gsplat._extension_problem.cache_clear()


def _module(monkeypatch, name: str, **names) -> None:
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


# --- what gsplat is given ---------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """A `gsplat` whose `rasterization` checks what its documentation says and draws with our reference, on the CPU."""
    signature = inspect.signature(pytest.importorskip("gsplat").rasterization)
    calls = []

    def rasterization(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        n, d = given["colors"].shape
        shapes = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,), "colors": (n, d)}
        for name, shape in {**shapes, "viewmats": (1, 4, 4), "Ks": (1, 3, 3)}.items():
            assert tuple(given[name].shape) == shape, name
            assert given[name].dtype == torch.float32, name
        assert (given["scales"] > 0).all()
        assert ((given["opacities"] >= 0) & (given["opacities"] <= 1)).all()
        modes = {"render_mode": "RGB+D", "rasterize_mode": "classic", "camera_model": "pinhole"}
        off = dict.fromkeys(("sh_degree", "backgrounds", "covars", "viewmats_rs"))
        expected = {**modes, **off, "radius_clip": 0.0, "distributed": False, "sparse_grad": False}
        assert {name: given[name] for name in expected} == expected
        calls.append(given)
        values, names = given["colors"], ("means", "quats", "scales", "opacities")
        carriers = Gaussians.from_activated(*(given[name] for name in names), values[:, :3], values)
        camera = Camera(given["Ks"][0], given["viewmats"][0], given["width"], given["height"])
        limits = given["near_plane"], given["far_plane"], given["eps2d"]
        _, blended, depth, alpha = reference.render(carriers, camera, *limits)
        return torch.cat([blended, depth[..., None]], dim=-1)[None], alpha[None, ..., None], {}

    _module(monkeypatch, "gsplat", rasterization=rasterization)
    _module(monkeypatch, "gsplat.cuda._backend", _C=object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(RASTERIZE._BACKENDS, "gsplat", (gsplat.render, "cpu"))
    return calls


@pytest.mark.parametrize("num_features", [0, 1, 7, 35])
def test_layers_are_cut_where_they_were_joined(stand_in, hard_scene, camera_at, num_features):
    scene, options = hard_scene(1, num_features=num_features), {"near": 0.5, "far": 5.0, "eps2d": 0.1}
    options["background"] = torch.tensor([0.1, 0.5, 0.9])
    ours, theirs = (
        rasterize(scene, camera_at(), backend=name, **options) for name in ("reference", "gsplat")
    )
    assert len(stand_in) == 1
    assert (theirs.features is None) == (num_features == 0)
    for name in FIELDS if num_features else ("color", "depth", "alpha"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), atol=1e-4, rtol=1e-4)


def test_gaussians_with_an_empty_feature_vector_keep_it(stand_in, hard_scene, camera_at):
    scene = replace(hard_scene(1), features=torch.zeros(300, 0))
    assert rasterize(scene, camera_at(), backend="gsplat").features.shape == (37, 53, 0)


def test_many_cameras_and_view_dependent_colour(stand_in, hard_scene, camera_at):
    scene, cameras = hard_scene(2, num_rest=8), [camera_at(), camera_at(0.4, 0.2, 0.0)]
    ours, theirs = (rasterize(scene, cameras, backend=name) for name in ("reference", "gsplat"))
    assert [len(call["colors"]) for call in stand_in] == [300, 300]
    torch.testing.assert_close(theirs.color, ours.color, atol=1e-4, rtol=0)


def test_gradients_flow_through_the_plumbing_also_from_double(stand_in, hard_scene, camera_at):
    grads = {}
    for name in ("reference", "gsplat"):
        scene = hard_scene(3)
        leaves = [getattr(scene, field).double().requires_grad_() for field in PARAMETERS]
        render = rasterize(Gaussians(*leaves), camera_at(), backend=name)
        assert (render.color.dtype == torch.float32) == (name == "gsplat")
        loss = render.color.square().sum() + render.features.square().sum() + render.alpha.sum()
        grads[name] = torch.autograd.grad(loss, leaves)
    for name, ours, theirs in zip(PARAMETERS, grads["reference"], grads["gsplat"], strict=True):
        error = (ours - theirs).abs().flatten(1 if ours.ndim > 1 else 0)
        assert (error < 2e-3 * ours.abs().max()).float().mean() > 0.98, name


def test_gradients_by_the_calibration_are_refused_and_by_the_pose_are_not(stand_in, hard_scene, camera_at):
    camera = camera_at()
    with pytest.raises(L2MError, match=r"no gradients by the camera's K\. Use backend='reference'"):
        rasterize(hard_scene(0), replace(camera, K=camera.K.clone().requires_grad_()), backend="gsplat")
    moving = replace(camera, w2c=camera.w2c.clone().requires_grad_())
    rasterize(hard_scene(0), moving, backend="gsplat").color.sum().backward()
    assert moving.w2c.grad[:3].abs().max() > 0


# --- how it gives up --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_seen(monkeypatch):
    """PyTorch says that there is a GPU; gsplat's package is there, its extension is up to the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _module(monkeypatch, "gsplat", rasterization=None)


def _failing_build(monkeypatch, error: Exception) -> list[str]:
    """Let the import of gsplat's extension raise; return the list of attempts."""
    attempts = []

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "gsplat.cuda._backend":
                attempts.append(name)
                raise error

    _module(monkeypatch, "gsplat.cuda", __path__=[])
    monkeypatch.delitem(sys.modules, "gsplat.cuda._backend", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    return attempts


def test_without_a_gpu(monkeypatch, hard_scene, camera_at):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match=r"needs a CUDA GPU, and PyTorch finds none\. Use backend='cpu'"):
        rasterize(hard_scene(0), camera_at(), backend="gsplat")


def test_without_gsplat(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(MissingError, match=r"gsplat is not installed\. Run `pip install 'l2m-viz\[gpu\]'`"):
        gsplat.require()


def test_with_a_gsplat_that_cannot_be_imported(gpu_seen, monkeypatch):
    monkeypatch.delitem(sys.modules, "gsplat")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "gsplat":
                raise ModuleNotFoundError("No module named 'jaxlib'", name="jaxlib")

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(MissingError, match="gsplat cannot be imported: No module named 'jaxlib'"):
        gsplat.require()


def test_without_a_compiler(gpu_seen, monkeypatch):
    _module(monkeypatch, "gsplat.cuda._backend", _C=None)
    with pytest.raises(MissingError, match=r"there is no nvcc \(CUDA toolkit\) to do it\. Use backend='cpu'"):
        gsplat.require()


def test_when_the_compiler_fails_its_errors_are_told_once(gpu_seen, monkeypatch):
    noise = "\n".join(f"[{i}/20] nvcc " + 500 * "-I/include " for i in range(20))
    output = (
        f"Error building extension 'gsplat_cuda': {noise}\nCommon.h(12): fatal error: cuda.h: No such file"
    )
    attempts = _failing_build(monkeypatch, RuntimeError(f"{output}\nninja: build stopped.\n"))
    with pytest.raises(MissingError) as told:
        gsplat.require()
    message = str(told.value)
    assert message.startswith("gsplat's CUDA extension failed to build:\n")
    assert "Common.h(12): fatal error: cuda.h: No such file" in message
    assert "nvcc -I" not in message
    assert len(message) < 1000
    with pytest.raises(MissingError, match="No such file"):
        gsplat.require()
    assert len(attempts) == 1  # minutes each: not tried again


def test_when_the_output_names_no_error_its_end_is_told(gpu_seen, monkeypatch):
    _failing_build(monkeypatch, RuntimeError("\n".join(f"line {i}" for i in range(50))))
    with pytest.raises(MissingError, match=r"failed to build:\nline 44\n(.*\n)*line 49\. Use"):
        gsplat.require()


def test_when_gsplat_hides_why_the_reason_is_told(gpu_seen, monkeypatch):
    """It answers any OSError of the build by loading a library that is not there."""
    error = ImportError("gsplat_cuda.so: cannot open shared object file")
    error.__context__ = OSError("CUDA_HOME environment variable is not set")
    _failing_build(monkeypatch, error)
    with pytest.raises(MissingError, match="failed to build:\nCUDA_HOME environment variable is not set"):
        gsplat.require()


def test_auto_is_gsplat_on_a_gpu_where_it_works_else_cpu_with_a_warning(gpu_seen, monkeypatch):
    assert RASTERIZE._choose(torch.device("cpu")) == "cpu"
    _module(monkeypatch, "gsplat.cuda._backend", _C=object())
    assert RASTERIZE._choose(torch.device("cuda")) == "gsplat"
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.warns(UserWarning, match="drawn on the CPU: gsplat is not installed"):
        assert RASTERIZE._choose(torch.device("cuda")) == "cpu"


def test_an_unknown_backend_is_refused_with_the_list(unchecked, hard_scene, camera_at):
    with pytest.raises(L2MError, match=r"'auto' or one of \['reference', 'cpu', 'gsplat'\], got 'opengl'"):
        rasterize(hard_scene(0), camera_at(), backend="opengl")


# --- with a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu():
    """Where `gsplat` can draw; a machine that has a GPU but no compiler skips, too, and says why."""
    try:
        gsplat.require()
    except MissingError as error:
        pytest.skip(str(error))
    return "cuda"


def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, name: str) -> None:
    """Nearly everywhere: a pixel may end one Gaussian earlier when T meets its limit within rounding."""
    difference = (ours.cpu() - theirs.cpu()).abs()
    assert (difference < tolerance).float().mean() > 0.998, name
    assert difference.median() < tolerance / 100, name


@pytest.mark.gpu
@pytest.mark.parametrize("num_features", [0, 3, 32, 64, 128, 384])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_values_equal_the_other_backends(on_gpu, hard_scene, camera_at, backend, num_features):
    scene = hard_scene(num_features, num_features=num_features, num_rest=15)
    cameras = [camera_at(), camera_at(0.3, -0.1, -0.5), camera_at(-0.4, 0.2, 0.5)]
    background = torch.tensor([0.1, 0.5, 0.9])
    theirs = rasterize(scene.to(on_gpu), cameras, backend="gsplat", background=background)
    ours = rasterize(scene, cameras, backend=backend, background=background)
    assert theirs.color.is_cuda
    for name in FIELDS if num_features else ("color", "depth", "alpha"):
        _close(getattr(ours, name), getattr(theirs, name), 1e-3, name)


@pytest.mark.gpu
@pytest.mark.parametrize("num_features", [3, 32, 64, 128, 384])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_equal_the_other_backends(on_gpu, hard_scene, camera_at, backend, num_features):
    gradients = {}
    for name, device in ((backend, "cpu"), ("gsplat", on_gpu)):
        scene = hard_scene(num_features, num_features=num_features)
        leaves = [getattr(scene, field).to(device).requires_grad_() for field in PARAMETERS]
        render = rasterize(Gaussians(*leaves), camera_at(0.3, -0.1, -0.5), backend=name)
        loss = render.color.square().sum() + render.features.square().mean() + render.alpha.sum()
        loss = loss + (render.depth * render.alpha.detach()).sum()
        gradients[name] = [grad.cpu() for grad in torch.autograd.grad(loss, leaves)]
    for name, ours, theirs in zip(PARAMETERS, gradients[backend], gradients["gsplat"], strict=True):
        scale = ours.abs().amax(dim=-1) if ours.ndim > 1 else ours.abs()
        error = (ours - theirs).abs().amax(dim=-1) if ours.ndim > 1 else (ours - theirs).abs()
        assert (error < 5e-3 * scale + 2e-3).float().mean() > 0.97, name


@pytest.mark.gpu
def test_gaussians_on_the_cpu_are_drawn_on_the_gpu_and_come_back(on_gpu, hard_scene, camera_at):
    scene = hard_scene(1)
    leaf = scene.features.clone().requires_grad_()
    render = rasterize(replace(scene, features=leaf), camera_at(), backend="gsplat")
    assert not render.color.is_cuda
    render.features.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gaussians_on_the_gpu_are_drawn_on_the_cpu_and_come_back(on_gpu, hard_scene, camera_at, backend):
    scene = hard_scene(1).to(on_gpu)
    leaf = scene.features.clone().requires_grad_()
    render = rasterize(replace(scene, features=leaf), camera_at(), backend=backend)
    assert render.color.is_cuda
    render.features.sum().backward()
    assert leaf.grad.is_cuda


@pytest.mark.gpu
def test_auto_is_gsplat_for_gaussians_on_the_gpu(on_gpu, hard_scene, camera_at):
    scene = hard_scene(1).to(on_gpu)
    auto, named = (rasterize(scene, camera_at(), backend=name) for name in ("auto", "gsplat"))
    assert torch.equal(auto.alpha, named.alpha)


@pytest.mark.gpu
def test_nothing_in_sight_is_the_background_on_the_gpu(on_gpu, hard_scene, camera_at):
    behind = hard_scene(1).select(torch.arange(20, 30)).to(on_gpu)
    render = rasterize(behind, camera_at(), backend="gsplat", background=torch.tensor([0.1, 0.2, 0.3]))
    assert render.alpha.abs().max() == 0
    assert torch.isfinite(render.depth).all()
