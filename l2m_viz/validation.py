"""A matcher in training on pairs whose truth is known: figures for the log, and a sheet for the eye."""

from collections.abc import Sequence
from pathlib import Path

from l2m_viz.evaluation import EvalPair, evaluate
from l2m_viz.matching.network import DenseNetwork
from l2m_viz.matching.tiny import tiny_dense_matcher
from l2m_viz.show.evaluation import Sheets


class Validation:
    """To be given to `train_matcher`: called with the averaged weights at each evaluation.

    Args:
        pairs: What is matched, see `load_dev_pairs` and `photo_pairs`.
        folder: One PNG a benchmark is written here, over the last one.
    """

    def __init__(self, pairs: Sequence[EvalPair], folder: Path) -> None:
        self._pairs, self._folder = pairs, folder

    def __call__(self, network: DenseNetwork) -> dict[str, float]:
        """Return the benchmarks' figures by name; those that a benchmark does not have are left out."""
        sheets = Sheets()
        report = evaluate(tiny_dense_matcher(network), self._pairs, on_match=sheets.add)
        sheets.write(self._folder)
        found: dict[str, float] = {}
        for row in report.benchmarks():
            figures = {"epe_px": row.epe_px, "pck1": row.pck1, "pck5": row.pck5, "ap": row.ap}
            figures |= {"overlap": row.overlap, "auc5": row.auc[0] if row.auc else None}
            found |= {f"{row.benchmark}/{k}": value for k, value in figures.items() if value is not None}
        return found
