"""Splits, normalisation, whole batches, the order of an epoch."""

import pytest
import torch
import torchvision
from conftest import REPOSITORY

from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datamodule import MNISTDataModule


def ready(**settings):
    data = MNISTDataModule(**{"name": "digits", **settings})
    data.setup()
    return data


def test_digits_are_scikit_learns_in_mnists_form():
    data = ready(validation=0)
    assert data.train.images.shape == (1437, 1, 28, 28)
    assert data.test.images.shape == (360, 1, 28, 28)
    assert data.train.images.dtype == torch.uint8
    both = torch.cat([data.train.images, data.test.images])
    assert both.max() == 255
    ink = both.amax(dim=(0, 1)).nonzero()
    assert ink.min() >= 4
    assert ink.max() <= 23
    counts = torch.bincount(data.test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert torch.equal(ready(validation=0, seed=99).test.images, data.test.images)


@pytest.mark.parametrize(("validation", "count"), [(0, 0), (0.0, 0), (0.1, 144), (100, 100), (0.5, 719)])
def test_validation_is_the_last_training_digits(validation, count):
    """Keras: floor of the training share, the last ones, before any shuffling."""
    whole, data = ready(validation=0).train, ready(validation=validation)
    assert len(data.validation.labels) == count
    cut = 1437 - count
    assert torch.equal(data.train.images, whole.images[:cut])
    assert torch.equal(data.validation.images, whole.images[cut:])
    assert len(data.test.labels) == 360


def test_a_random_validation_part_is_stratified_and_follows_the_seed():
    first, again, other = (ready(validation=300, validation_from="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    counts = torch.bincount(first.validation.labels)
    assert counts.max() - counts.min() <= 2
    assert len(first.train.labels) + len(first.validation.labels) == 1437


@pytest.mark.parametrize("settings", [{"validation": 1437}, {"validation": 5, "validation_from": "random"}])
def test_a_validation_part_that_cannot_be_is_refused(settings):
    with pytest.raises(UserError, match=f"data.validation={settings['validation']}"):
        ready(**settings)


def test_standard_normalisation_is_of_the_training_part():
    data = ready(normalization="standard", validation=437)
    pixels = data.train.images.double()
    normalised = (pixels - data.mean) / data.standard_deviation
    assert abs(normalised.mean()) < 1e-9
    assert abs(normalised.std(correction=0) - 1) < 1e-9
    assert (ready().mean, ready().standard_deviation) == (0.0, 255.0)


def test_batches_are_whole_and_the_last_short_one_is_kept():
    data = ready(batch_size=100, validation=37)
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [100] * 14
    assert batches[0][0].shape == (100, 1, 28, 28)
    assert batches[0][0].dtype == torch.uint8
    assert batches[0][1].dtype == torch.int64
    data = ready(batch_size=64, validation=0)
    assert [len(labels) for _, labels in data.train_dataloader()] == [64] * 22 + [29]
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 360
    seen = torch.cat([labels for _, labels in data.train_dataloader()])
    assert torch.equal(torch.bincount(seen), torch.bincount(data.train.labels))


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, position=0):
        data = ready(seed=seed)  # of batches of 64
        data.resumed = (epoch, position)
        torch.manual_seed(torch.seed())
        return torch.cat([labels for _, labels in data.train_dataloader()])

    assert torch.equal(order(1, 0), order(1, 0))
    assert torch.equal(order(1, 3)[5 * 64 :], order(1, 3, position=5))
    assert not torch.equal(order(1, 0), order(1, 1))
    assert not torch.equal(order(1, 0), order(2, 0))


def test_real_mnist(mnist_root):
    data = MNISTDataModule("mnist", str(mnist_root), validation=0.1)
    data.setup()
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (54_000, 6_000, 10_000)
    raw = torchvision.datasets.MNIST(str(mnist_root), train=False)
    assert torch.equal(data.test.images[:, 0], raw.data)
    assert torch.equal(data.test.labels, raw.targets)
    assert int(data.test.labels[0]) == 7  # as tutorial 002 says
    assert "(54000, 1, 28, 28)" in data.shapes()


def test_no_mnist_is_in_the_repository():
    assert not list(REPOSITORY.glob("[!.]*/**/*idx3-ubyte*"))
