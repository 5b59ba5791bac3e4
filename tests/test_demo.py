"""The main job as a user runs it: the sample, an own photo with and without depth, and bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from l2m_viz import (
    FileFormatError,
    Gaussians,
    ImageError,
    L2MError,
    LiftedScene,
    Match,
    ShapeError,
)
from l2m_viz.cli import main
from l2m_viz.data import load_sample, write_image
from l2m_viz.demo import DemoCfg, run_demo
from l2m_viz.jobs import lift_to_folder
from l2m_viz.photo import PhotoCfg


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(DemoCfg(out=tmp_path_factory.mktemp("demo"), orbit_frames=6))


def test_the_sample_reaches_the_measured_figures(result):
    numbers = result.numbers
    assert numbers["lift_psnr_db"] >= 27.0
    assert numbers["lift_ssim"] >= 0.83
    assert numbers["splat_psnr_db"] >= numbers["lift_psnr_db"] - 0.5
    assert numbers["l2m-tiny_epe_px"] < 1
    assert numbers["l2m-tiny_pck5"] > 0.8
    assert numbers["l2m-tiny_ap"] > 0.95
    assert numbers["l2m-tiny_overlap"] > 0.6
    assert numbers["dis_epe_px"] < 0.5
    assert numbers["dis_pck3"] > 0.85
    assert numbers["dis_ap"] > 0.95
    assert numbers["sift_epe_px"] < 1.5


def test_the_report_holds_every_number_and_picture_and_fetches_nothing(result):
    text = result.report.read_text()
    assert text.count("<img") >= 9
    assert "with features of l2m-tiny" in text
    for name in ("l2m-tiny", "dis", "sift"):
        assert f"{name}: B warped into A, its certainty, and the error" in text
    assert text.index("l2m-tiny: B warped") < text.index("dis: B warped")  # the package's own comes first
    assert "data:image/webp" in text
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    assert f"{result.numbers['lift_psnr_db']:.4g}" in text
    assert (
        json.loads((result.report.parent / "numbers.json").read_text())["dis_pck1"]
        == result.numbers["dis_pck1"]
    )


def test_the_files_load_again(result):
    folder = result.report.parent
    for name in ("l2m-tiny", "dis", "sift"):
        found = Match.load(folder / f"match_{name}.npz")
        assert (found.matcher, found.hw_A) == (name, (500, 741))
    assert LiftedScene.load(folder / "scene.npz").hw == (500, 741)
    gaussians = Gaussians.load(folder / "gaussians.npz")
    assert (gaussians.backbone, gaussians.features.shape[1]) == ("l2m-tiny", 16)
    with Image.open(folder / "orbit.webp") as orbit:
        assert orbit.n_frames == 6


def test_own_photo_without_depth_says_that_it_guesses(tmp_path):
    photo = load_sample("coffee").image_A
    write_image(tmp_path / "cup.jpg", photo)
    seen = []
    cfg = DemoCfg(out=tmp_path / "out", image=tmp_path / "cup.jpg", max_side=160, orbit_frames=2)
    result = run_demo(cfg, lambda share, what: seen.append((share, what)))
    assert "guess" in result.report.read_text()
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert seen[-1][0] == 1.0
    for name in ("l2m-tiny", "dis"):
        assert result.numbers[f"{name}_epe_px"] < 3  # truth is exact here, and the view is near


def test_own_photo_with_depth_of_another_size(tmp_path):
    sample = load_sample("motorcycle")
    write_image(tmp_path / "photo.png", sample.image_A)
    np.save(tmp_path / "depth.npy", torch.where(sample.valid_A, sample.depth_A, torch.nan)[::2, ::2].numpy())
    cfg = DemoCfg(
        out=tmp_path / "out",
        image=tmp_path / "photo.png",
        depth=tmp_path / "depth.npy",
        max_side=200,
        orbit_frames=2,
    )
    result = run_demo(cfg)
    assert "guess" not in result.report.read_text()
    assert 0.5 < result.numbers["lift_filled"] < 1


def test_depth_that_is_not_the_photos_is_refused(tmp_path):
    sample = load_sample("motorcycle")
    write_image(tmp_path / "photo.png", sample.image_A)
    np.save(tmp_path / "turned.npy", sample.depth_A.T.numpy())
    with pytest.raises(FileFormatError, match="does not fit the photo"):
        run_demo(DemoCfg(out=tmp_path / "o", image=tmp_path / "photo.png", depth=tmp_path / "turned.npy"))
    with pytest.raises(L2MError, match="--image"):
        run_demo(DemoCfg(out=tmp_path / "o", depth=tmp_path / "turned.npy"))
    write_image(tmp_path / "strip.png", sample.image_A[:6])
    with pytest.raises(ShapeError, match="too small"):
        run_demo(DemoCfg(out=tmp_path / "o", image=tmp_path / "strip.png"))


def test_a_run_that_fails_leaves_no_older_report(tmp_path):
    (tmp_path / "report.html").write_text("of an earlier run")
    with pytest.raises(ImageError):
        run_demo(DemoCfg(out=tmp_path, image=tmp_path / "absent.jpg"))
    assert not (tmp_path / "report.html").exists()


def test_a_scene_in_millimetres_and_in_kilometres_is_splatted_alike(tmp_path):
    sample = load_sample("motorcycle")
    write_image(tmp_path / "photo.png", sample.image_A[::4, ::4].contiguous())
    depth = torch.where(sample.valid_A, sample.depth_A, torch.nan)[::4, ::4].numpy()
    results = []
    for scale in (1e3, 1e-3):
        np.save(tmp_path / "depth.npy", depth * scale)
        cfg = DemoCfg(
            out=tmp_path / "o", image=tmp_path / "photo.png", depth=tmp_path / "depth.npy", orbit_frames=1
        )
        run_demo(cfg)
        with Image.open(tmp_path / "o" / "orbit.webp") as orbit:
            results.append(np.asarray(orbit.convert("RGB"), np.float32))
    assert results[0].std() > 20
    assert np.abs(results[0] - results[1]).mean() < 2


def _l2m(*args: str, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from l2m_viz.cli import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.jpg").write_text("this is not a picture")
    write_image(tmp_path / "photo.png", load_sample("coffee").image_A[::8, ::8].contiguous())
    for args in (
        ["demo", "--image", str(tmp_path / "absent.jpg"), "--out", str(tmp_path)],
        ["demo", "--image", str(tmp_path / "notes.jpg"), "--out", str(tmp_path)],
        ["match", str(tmp_path / "notes.jpg"), str(tmp_path / "notes.jpg")],
        ["demo", "--out", str(tmp_path / "notes.jpg" / "deeper")],
        ["demo", "--orbit-frames", "0", "--out", str(tmp_path)],
        ["lift", str(tmp_path / "notes.jpg"), "--seed", "99999999999999999999"],
        ["demo", "--sample", "nothing", "--out", str(tmp_path)],
        ["lift", str(tmp_path / "photo.png"), "--encoder", "nothing", "--out", str(tmp_path)],
    ):
        monkeypatch.setattr(sys, "argv", ["l2m", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("l2m: ")
        assert "Traceback" not in message


def test_match_and_lift_commands_write_their_files(tmp_path, monkeypatch, capsys):
    sample = load_sample("motorcycle")
    for name, image in (("a.png", sample.image_A), ("b.png", sample.image_B)):
        write_image(tmp_path / name, image[::3, ::3].contiguous())
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    monkeypatch.setattr(sys, "argv", ["l2m", "match", *paths, "--out", str(tmp_path / "m"), "--num", "50"])
    main()
    assert "overlap" in capsys.readouterr().out
    assert len((tmp_path / "m" / "matches.csv").read_text().splitlines()) == 51
    places = ["--hloc", str(tmp_path / "hloc"), "--colmap", str(tmp_path / "scene.db")]
    monkeypatch.setattr(sys, "argv", ["l2m", "match", *paths, "--out", str(tmp_path / "m"), *places])
    main()
    said = capsys.readouterr().out
    assert "matches for hloc" in said
    assert "geometric_verifier" in said
    with pycolmap.Database.open(tmp_path / "scene.db") as database:
        assert {image.name for image in database.read_all_images()} == {"a.png", "b.png"}
        assert database.num_matches() > 100
    assert Match.load(tmp_path / "m" / "match.npz").hw_A == (167, 247)
    write_image(tmp_path / "lying.png", torch.rot90(sample.image_B[::3, ::3]).contiguous())
    turned = [paths[0], str(tmp_path / "lying.png"), "--turns", "--out", str(tmp_path / "t")]
    monkeypatch.setattr(sys, "argv", ["l2m", "match", *turned])
    main()
    assert "B was turned by 270 degrees counter-clockwise" in capsys.readouterr().out
    assert Match.load(tmp_path / "t" / "match.npz").turns_B == 3
    monkeypatch.setattr(sys, "argv", ["l2m", "lift", paths[0], "--out", str(tmp_path / "l"), "--views", "2"])
    main()
    assert "guess" in capsys.readouterr().out
    assert (tmp_path / "l" / "view_1.png").is_file()
    gaussians = Gaussians.load(tmp_path / "l" / "gaussians.npz")
    assert (len(gaussians), gaussians.backbone) == (167 * 247, "l2m-tiny")


def test_the_lift_command_takes_another_encoder(tmp_path, monkeypatch):
    write_image(tmp_path / "photo.png", load_sample("coffee").image_A[::4, ::4].contiguous())
    command = ["l2m", "lift", str(tmp_path / "photo.png"), "--encoder", "dense-sift", "--views", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    main()
    assert Gaussians.load(tmp_path / "gaussians.npz").backbone == "dense-sift"


def test_help_of_the_real_command():
    shown = _l2m("--help")
    assert shown.returncode == 0
    for command in ("demo", "match", "lift", "matchers"):
        assert command in shown.stdout


@pytest.mark.parametrize("wrong", [{"image": Path("missing.png")}, {"encoder": "nothing"}])
def test_a_lift_that_cannot_be_leaves_the_last_one_alone(tmp_path, wrong):
    (tmp_path / "view_0.png").write_bytes(b"of an earlier run")
    with pytest.raises(L2MError):
        list(lift_to_folder(PhotoCfg(**wrong), tmp_path, views=1, seed=0))
    assert [path.name for path in tmp_path.iterdir()] == ["view_0.png"]
