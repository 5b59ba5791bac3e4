import pytest
import torch

from l2m_viz.data import read_image
from l2m_viz.evaluation import EvalPair
from l2m_viz.geometry import normalized_grid
from l2m_viz.matching.network import DenseNetwork
from l2m_viz.matching.tiny import tiny_cfg
from l2m_viz.validation import Validation

HW = (48, 64)


def _pair(benchmark, image_B, covisible):
    image = torch.rand(*HW, 3, generator=torch.Generator().manual_seed(1))
    seen = torch.full(HW, covisible)
    return EvalPair(
        benchmark, "one", image, image if image_B is None else image_B, normalized_grid(HW), seen, seen | True
    )


def test_figures_by_benchmark_and_a_sheet_for_each(tmp_path):
    torch.manual_seed(0)
    other = torch.rand(*HW, 3, generator=torch.Generator().manual_seed(2))
    validation = Validation([_pair("same", None, True), _pair("unrelated", other, False)], tmp_path)
    network = DenseNetwork(tiny_cfg())
    for parameter in network.parameters():
        torch.nn.init.zeros_(
            parameter
        )  # then all pixels have one answer, which is right for those around it only
    found = validation(network)
    assert found["same/pck1"] <= 5 / (HW[0] * HW[1])
    assert found["same/epe_px"] > 10
    assert found["unrelated/overlap"] == pytest.approx(0.5, abs=0.01)  # a logit of zero
    assert "unrelated/epe_px" not in found
    assert "same/auc5" not in found
    for name in ("same", "unrelated"):
        assert read_image(tmp_path / f"l2m-tiny_{name}.png").shape[1] > 400
