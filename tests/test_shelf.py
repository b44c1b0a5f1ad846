"""shelf.py: tensors in files come back as they were put there, and change in place."""
import errno
import os

import pytest
import torch

from nanolost.shelf import Shelf

TENSORS = {
    "float32": torch.randn(3, 5),
    "float64": torch.randn(7, dtype=torch.float64),
    "bfloat16": torch.randn(2, 3, 4).bfloat16(),
    "bool": torch.tensor([[True, False, True], [False, False, True]]),
    "int64": torch.tensor([[-1], [1 << 40]]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
}

@pytest.fixture
def shelf(tmp_path):
    return Shelf(str(tmp_path))

def bytes_of(tensor) -> list:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()

@pytest.mark.parametrize("name", TENSORS)
def test_what_was_put_there_comes_back_with_its_shape_and_dtype(name, shelf):
    tensor = TENSORS[name]
    shelf[name] = tensor
    found = shelf[name]
    assert found.shape == tensor.shape and found.dtype == tensor.dtype
    assert bytes_of(found) == bytes_of(tensor)

def test_every_name_has_a_tensor_of_its_own(shelf):
    for name, tensor in TENSORS.items():
        shelf[name] = tensor
    for name, tensor in TENSORS.items():
        assert bytes_of(shelf[name]) == bytes_of(tensor)

def test_a_change_in_place_stays(shelf):
    given = torch.zeros(4, 3)
    shelf["a"] = given
    shelf["a"][1] += 2
    shelf["a"][2].copy_(torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.tensor([[0.0] * 3, [2.0] * 3, [1.0, 2.0, 3.0], [0.0] * 3])
    assert torch.equal(shelf["a"], expected)
    # what was put there was copied
    assert torch.equal(given, torch.zeros(4, 3))
    given.fill_(9)
    assert torch.equal(shelf["a"], expected)

def test_a_look_taken_before_sees_a_change(shelf):
    shelf["a"] = torch.zeros(5)
    look = shelf["a"]
    shelf["a"].fill_(3)
    assert torch.equal(look, torch.full((5,), 3.0))

def test_the_values_lie_in_the_folder(shelf, tmp_path):
    shelf["C.0.qkv.values"] = torch.tensor([1.0, 2.0])
    shelf["C.0.qkv.values"][1] = 5
    (path,) = tmp_path.iterdir()
    assert torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).tolist() == [1, 5]

def test_what_is_put_again_takes_the_old_one_s_place(shelf):
    shelf["a"] = torch.ones(100)
    for tensor in (torch.arange(3), torch.zeros(7, 2, dtype=torch.bool), torch.ones(500)):
        shelf["a"] = tensor
        assert shelf["a"].dtype == tensor.dtype and torch.equal(shelf["a"], tensor)

def test_a_shelf_knows_what_is_on_it(shelf):
    assert "a" not in shelf
    shelf["a"] = torch.ones(1)
    assert "a" in shelf and "b" not in shelf
    with pytest.raises(KeyError):
        shelf["b"]

def test_room_is_taken_before_anything_is_written(shelf, tmp_path, monkeypatch):
    taken = []
    def full(file, start, length):
        taken.append((start, length))
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        shelf["a"] = torch.ones(10, dtype=torch.float64)
    assert taken == [(0, 80)]
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]

def test_a_tensor_for_which_there_was_no_room_is_not_on_the_shelf(shelf, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError):
            shelf["a"] = torch.ones(10)
    assert "a" not in shelf
    shelf["a"] = torch.ones(10)
    assert torch.equal(shelf["a"], torch.ones(10))
