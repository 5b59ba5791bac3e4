"""The README's links lead somewhere and its Python runs as it is printed."""

import re
from pathlib import Path

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
    block, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert len(names["views"]) == 4
    assert names["where"].shape == (1, 2)
    assert 0 <= names["certainty"].item() <= 1


def test_the_block_about_training_pairs_runs(tmp_path, monkeypatch):
    (tmp_path / "PHOTOS").mkdir()
    for name in ("coffee", "chelsea"):
        write_image(tmp_path / "PHOTOS" / f"{name}.jpg", load_sample(name).image_A)
    _, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block.replace("num_workers=2", "num_workers=0"), "README.md", "exec"), names)
    assert names["image_A"].shape == (8, 192, 256, 3)
    assert names["batch"].covisibility_A_to_B.any()
