"""After a fit layers are what they were before it: the user's own, copies, and those that training has added."""

import copy

import pytest
from ghost_runs import Net, data, ghosts, net, trainer
from lightning.pytorch import Callback
from torch import nn

from lightning_gap.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostNorm


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_layers_come_back_after_an_exception(error):
    class Failing(Net):
        def on_train_batch_end(self, *_):
            raise error

    model, callback = net(Failing), GhostBatchNorm(4)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(callback).fit(model, data())
    assert ghosts(model) == []
    healthy = net()
    trainer(callback).fit(healthy, data())
    assert int(healthy.net[1].num_batches_tracked) == 16


def test_ghosts_of_the_users_own_come_back_as_they_were():
    model = net()
    model.net[1] = GhostBatchNorm1d(8, ghost_batch_size=8, running_stats="per_step")
    trainer(GhostBatchNorm(4)).fit(model, data())
    assert ghosts(model) == [model.net[1]]
    assert (model.net[1].ghost_batch_size, model.net[1].running_stats) == (8, "per_step")
    assert int(model.net[1].num_batches_tracked) == 16


def test_two_callbacks_share_a_model():
    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen = [layer.ghost_batch_size for layer in ghosts(pl_module)]

    for skips, expected in ((("net.4", "net.1"), [4, 8]), (((), "net.1"), [4, 8]), (((), ()), [8, 8])):
        model, sizes = net(), Sizes()
        trainer(GhostBatchNorm(4, skip=skips[0]), GhostBatchNorm(8, skip=skips[1]), sizes).fit(model, data())
        assert sizes.seen == expected
        assert ghosts(model) == []


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_copy_made_in_training_is_handed_back_too(error):
    class MeanTeacher(Net):
        def on_train_start(self):
            self.teacher = copy.deepcopy(self.net)

        def training_step(self, batch, batch_idx):
            self.seen = [type(layer) for layer in self.teacher if isinstance(layer, GhostNorm)]
            self.rows = {layer.rows_per_sample for layer in (*self.teacher, *self.net) if isinstance(layer, GhostNorm)}
            if error and batch_idx == 2:
                raise error
            return super().training_step(batch, batch_idx) + self.teacher(batch[0]).mean()

    model = net(MeanTeacher)
    model.own = GhostBatchNorm1d(3, ghost_batch_size=8)  # of the user's own, and a copy of it
    model.own_copy = copy.deepcopy(model.own)
    if error:
        with pytest.raises(error):
            trainer(GhostBatchNorm(4)).fit(model, data())
    else:
        trainer(GhostBatchNorm(4)).fit(model, data())
        assert int(model.teacher[1].num_batches_tracked) == 16
    assert model.seen == [GhostBatchNorm1d] * 2
    assert len(model.rows) == 1  # it counts the samples of the same batch
    assert ghosts(model) == [model.own, model.own_copy]
    assert [type(model.teacher[i]) for i in (1, 4)] == [nn.BatchNorm1d] * 2


def test_layers_added_in_training_become_ghosts_at_the_next_epoch():
    class Growing(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net.append(nn.BatchNorm1d(4))
                self.other = nn.BatchNorm1d(4)

    model = net(Growing)
    trainer(GhostBatchNorm(4, skip="net.4"), max_epochs=3).fit(model, data())
    assert ghosts(model) == []
    assert int(model.net[5].num_batches_tracked) == 4 + 16  # plain for an epoch
    assert int(model.net[4].num_batches_tracked) == 3 * 4  # held back

    class Unfit(Growing):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.other = nn.SyncBatchNorm(4)

    with pytest.warns(UserWarning, match="added during training as it is: layer 'other' is a SyncBatchNorm") as caught:
        trainer(GhostBatchNorm(4), max_epochs=4).fit(net(Unfit), data())
    assert len([w for w in caught if "added during training" in str(w.message)]) == 1
