import torch
from PIL import Image

from l2m_viz.evaluation import EvalPair
from l2m_viz.geometry import pixel_grid, warp_from_flow
from l2m_viz.matching import Match
from l2m_viz.show.evaluation import ERROR_LIMITS_PX, Sheets, match_panels, sheet

HW_A, HW_B = (40, 64), (48, 80)


def ramp(hw):
    return torch.cat([pixel_grid(hw) / 100, torch.full((*hw, 1), 0.5)], dim=-1)


def shifted(flow_px, hw_from, hw_to):
    return warp_from_flow(torch.tensor(flow_px).expand(*hw_from, 2), hw_to)


def make_pair(covisible_columns=30):
    """B's content lies 6 px right of A's."""
    covisible = torch.zeros(HW_A, dtype=torch.bool)
    covisible[:, :covisible_columns] = True
    known = torch.ones_like(covisible)
    return EvalPair(
        "stereo", "a-b", ramp(HW_A), ramp(HW_B), shifted((6.0, 0.0), HW_A, HW_B), covisible, known
    )


def make_match():
    """Three pixels too far right and four too low, certain in the upper half."""
    certainty = torch.zeros(HW_A)
    certainty[:20] = 0.8
    return Match(
        shifted((9.0, 4.0), HW_A, HW_B), certainty, shifted((-9.0, -4.0), HW_B, HW_A), torch.zeros(HW_B),
        HW_A, HW_B, matcher="told",
    )  # fmt: skip


def test_panels_show_the_warped_picture_the_error_and_the_certainty():
    image, warped, error, certainty = match_panels(make_pair(), make_match())
    assert image.title == "stereo a-b: A"
    # B's colour tells the place in B: pixel (10, 10) of A is matched with (19, 14) of B
    torch.testing.assert_close(warped.values[10, 10, :2], torch.tensor([0.195, 0.145]), atol=1e-5, rtol=0)
    assert warped.mask[:19].all()
    assert not warped.mask[20:].any()
    torch.testing.assert_close(error.values[:30, :30], torch.full((30, 30), 5.0), atol=1e-4, rtol=0)
    assert torch.equal(error.mask, make_pair().covisibility_A_to_B)
    assert error.limits == ERROR_LIMITS_PX
    assert "5.00 px" in error.title
    assert torch.equal(certainty.values, make_match().certainty_A_to_B)
    assert "overlap 0.20" in certainty.title


def test_small_pictures_still_tell_errors_in_pixels_of_the_original():
    panels = match_panels(make_pair(), make_match(), long_side=32)
    assert {tuple(panel.values.shape[:2]) for panel in panels} == {(20, 32)}
    torch.testing.assert_close(panels[2].values[:15, :15], torch.full((15, 15), 5.0), atol=1e-4, rtol=0)


def test_an_unrelated_pair_has_no_error_to_show():
    error = match_panels(make_pair(covisible_columns=0), make_match())[2]
    assert not error.mask.any()
    assert error.title == "no pixel is covisible"


def test_a_sheet_has_a_row_a_pair_and_a_file_a_benchmark(tmp_path):
    row = match_panels(make_pair(), make_match())
    figure = sheet([row, row])
    pictures = [axis for axis in figure.axes if axis.get_title()]
    assert len(pictures) == 8
    sheets = Sheets()
    sheets.add(make_pair(), make_match())
    sheets.add(make_pair(), make_match())
    (path,) = sheets.write(tmp_path)
    assert path == tmp_path / "told_stereo.png"
    with Image.open(path) as picture:
        assert picture.width > 1000
