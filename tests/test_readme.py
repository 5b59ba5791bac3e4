"""The README's links lead somewhere and its Python runs as it is printed."""

import re
from pathlib import Path

import pycolmap

from l2m_viz import load_matcher
from l2m_viz.data import load_sample, write_image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_linked_files_and_folders_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    table = re.findall(r"^\|[^|]*\| `([^`]+)` \|", README, re.MULTILINE)
    lessons = [f"notebooks/{name}" for name in re.findall(r"`(\d\d_\w+\.ipynb)`", README)]
    assert len(links) >= 2
    assert len(table) >= 8
    assert len(lessons) >= 3
    for path in [*links, *table, *lessons]:
        assert (ROOT / path).exists(), path


def test_the_first_python_block_runs(tmp_path, monkeypatch):
    sample = load_sample("motorcycle")
    assert sample.image_B is not None
    small = slice(None, None, 4)
    for name, image in (
        ("photo.jpg", sample.image_A),
        ("left.png", sample.image_A),
        ("right.png", sample.image_B),
    ):
        write_image(tmp_path / name, image[small, small].contiguous())
    block, _, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert len(names["views"]) == 4
    assert names["where"].shape == (1, 2)
    assert 0 <= names["certainty"].item() <= 1


def test_the_block_about_reconstruction_runs(tmp_path, monkeypatch):
    (tmp_path / "IMAGES").mkdir()
    photo = load_sample("motorcycle").image_A
    for name, left in (("1.png", 0), ("2.png", 30), ("3.png", 60)):
        write_image(tmp_path / "IMAGES" / name, photo[50:350, left : left + 400][::2, ::2].contiguous())
    _, block, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"load_matcher": load_matcher})
    with pycolmap.Database.open(tmp_path / "scene.db") as database:
        assert database.num_matched_image_pairs() == 3
        assert database.num_matches() > 1000


def test_the_block_about_training_pairs_runs(tmp_path, monkeypatch):
    (tmp_path / "PHOTOS").mkdir()
    for name in ("coffee", "chelsea"):
        write_image(tmp_path / "PHOTOS" / f"{name}.jpg", load_sample(name).image_A)
    _, _, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block.replace("num_workers=2", "num_workers=0"), "README.md", "exec"), names)
    assert names["image_A"].shape == (8, 192, 256, 3)
    assert names["batch"].covisibility_A_to_B.any()
