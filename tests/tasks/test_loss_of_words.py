"""The loss of every word of the vocabulary as a target, the first and last of each rank's included, against torch's."""

import pytest
import torch.nn.functional as F
from loss_program import compute, make
from rank_pool import RankPool

from llama.tasks.losses import IGNORED


@pytest.mark.parametrize("ranks", [0, 2, 4])
def test_every_word(pool: RankPool, ranks: int) -> None:
    h, weight, labels = make()
    logits = (h @ weight.T)[:, :-1].flatten(0, 1)
    expected = float(F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED))
    for loss in pool.run(compute, ranks=ranks).results:
        assert loss == pytest.approx(expected, rel=1e-5)
