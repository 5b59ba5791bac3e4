"""The match decoder against the official module and its own symmetry."""

import pytest
import torch

from l2m_viz.matching.transformer_decoder import TransformerCfg, TransformerDecoder


@pytest.fixture
def official_decoder(golden):
    """A decoder with the weights of the golden file, and what the file holds."""
    official = {
        key: torch.from_numpy(array) for key, array in golden("match_decoder").items() if key != "meta"
    }
    decoder = TransformerDecoder(TransformerCfg(blocks=2, heads=8), dim=32, num_anchors=4096)
    decoder.load_state_dict({key[2:]: value for key, value in official.items() if key.startswith("w.")})
    return decoder, official


def test_reproduces_the_official_module(official_decoder):
    decoder, official = official_decoder
    logits, certainty = decoder(torch.cat([official["in.gp_posterior"], official["in.features"]], dim=1))
    torch.testing.assert_close(logits, official["out.anchor_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(certainty, official["out.certainty"], atol=1e-4, rtol=0)


def test_moving_the_cells_moves_the_answers():
    """There are no positions: attention sees a set of cells."""
    torch.manual_seed(0)
    decoder = TransformerDecoder(TransformerCfg(blocks=2, heads=2), dim=12, num_anchors=10)
    features = torch.randn(2, 12, 3, 5)
    order = torch.randperm(15)
    shuffled = features.flatten(2)[:, :, order].unflatten(2, (3, 5))
    for out, of_shuffled in zip(decoder(features), decoder(shuffled), strict=True):
        torch.testing.assert_close(out.flatten(2)[:, :, order], of_shuffled.flatten(2), atol=1e-5, rtol=0)


def test_in_bfloat16_it_is_within_two_hundredths_of_the_official_module(official_decoder):
    decoder, official = official_decoder
    inputs = torch.cat([official["in.gp_posterior"], official["in.features"]], dim=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, _ = decoder(inputs)
    expected = official["out.anchor_logits"]
    assert (logits - expected).norm() / expected.norm() < 2e-2
    assert (logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean() >= 0.9
