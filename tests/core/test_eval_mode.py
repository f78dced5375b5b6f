"""A model is in eval mode for a while, and then as it was, module by module."""

import pytest
from torch import nn

from scalabl.core.modules import eval_mode


@pytest.mark.parametrize("training", [True, False])
def test_each_module_is_put_back_into_the_mode_that_it_was_in(training: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()), nn.Dropout())
    model.train(training)
    model[1].train(not training)
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
