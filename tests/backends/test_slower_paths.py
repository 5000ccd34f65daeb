"""What the CUDA backend's kernels do not know, and what keeps them from running, is found before anything runs."""

import importlib.util

import pytest
import torch

from backends.cuda.kernels.tile_shapes import decode_tile, fit_tiles, head_columns, prefill_tile
from backends.cuda.operator_kernels import unknown_to_kernels, why_no_kernels
from sagellm.models.known_models import known_model_ids, load_model_config

why = why_no_kernels.__wrapped__


@pytest.mark.parametrize("model", known_model_ids())
def test_the_heads_of_every_known_model_are_known(model: str) -> None:
    shape = load_model_config(model).shape
    assert unknown_to_kernels(shape.head_dim, shape.num_heads // shape.num_kv_heads) == ()


@pytest.mark.parametrize(("head_dim", "group"), [(512, 1), (257, 1), (128, 128), (256, 48), (64, 200)])
def test_heads_too_large_for_a_tile_are_not(head_dim: int, group: int) -> None:
    assert unknown_to_kernels(head_dim, group) == ("attention",)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_what_fits_is_no_larger_than_the_tiles_that_were_compiled_for_a_card(element_bytes: int) -> None:
    for head_dim in (8, 12, 64, 80, 96, 128, 160, 192, 256):
        for group in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 71, 128):
            if fit_tiles(head_dim, group):
                for tile in (
                    decode_tile(head_dim, group, element_bytes),
                    prefill_tile(head_dim, group, element_bytes, 100_000, True),
                ):
                    assert tile.num_rows * head_columns(head_dim) <= 128 * 128
                    assert tile.num_rows >= group


def test_a_device_that_is_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert why(0) == "the device is older than compute capability 8.0"


def test_a_triton_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why(0) == "triton is not installed"
