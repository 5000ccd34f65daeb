"""Operators but attention: each of the backend's kernels against the exact result, in each type it claims."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from backends.conformance import oracle
from backends.conformance.check import Check, Subject, expect
from backends.conformance.closeness import expect_close

_EPSILON = 1e-6
_HEADS = ((28, 4, 128), (14, 2, 64), (5, 5, 80), (32, 8, 128), (4, 2, 8), (6, 1, 12))
_Make = Callable[[torch.Generator, torch.dtype], tuple[tuple[torch.Tensor, ...], dict[str, Any]]]


def operator_checks(dtypes: tuple[str, ...]) -> tuple[Check, ...]:
    """Names of types as torch has them."""
    return tuple(check for name in dtypes for check in _checks_of(name, getattr(torch, name)))


def _checks_of(dtype_name: str, dtype: torch.dtype) -> list[Check]:
    checks = []
    for operator, title, make in _cases():
        run = partial(_against_oracle, operator=operator, make=make, dtype=dtype)
        checks.append(Check("operators", f"{dtype_name} {operator} {title}", run))
    for num_heads, num_kv_heads, head_dim in (
        (28, 4, 128),
        (14, 2, 64),
        (5, 5, 80),
        (32, 8, 128),
        (4, 2, 8),
        (6, 1, 12),
    ):
        title = f"{num_heads}/{num_kv_heads} heads of {head_dim}"
        for operator in ("kv_write", "rotary_kv_write", "head_norm_rotary_kv_write"):
            run = partial(_kv_operator, operator=operator, heads=(num_heads, num_kv_heads, head_dim), dtype=dtype)
            checks.append(Check("operators", f"{dtype_name} {operator} {title}", run))
    checks.append(Check("operators", f"{dtype_name} moe_router and moe_experts", partial(_experts, dtype=dtype)))
    checks.append(Check("operators", f"{dtype_name} no operator changes its inputs", partial(_pure, dtype=dtype)))
    return checks


def _cases() -> list[tuple[str, str, _Make]]:
    """(operator, what is special, arguments)."""
    return [
        ("linear", "7x512 by 384", partial(_linear, rows=7, inputs=512, outputs=384, bias=False)),
        ("linear", "33x256 by 96 with bias", partial(_linear, rows=33, inputs=256, outputs=96, bias=True)),
        ("linear", "one row", partial(_linear, rows=1, inputs=1024, outputs=128, bias=True)),
        ("linear", "32x3584 by 4608 with bias", partial(_linear, rows=32, inputs=3584, outputs=4608, bias=True)),
        ("linear", "19x3608 by 2402", partial(_linear, rows=19, inputs=3608, outputs=2402, bias=False)),
        ("linear", "one row of 9480 by 1000", partial(_linear, rows=1, inputs=9480, outputs=1000, bias=False)),
        ("rms_norm", "5x3584", partial(_norm, rows=5, width=3584)),
        ("rms_norm", "rows of a wider tensor, width 100", partial(_norm, rows=9, width=100, strided=True)),
        ("layer_norm", "6x768", partial(_layer_norm, rows=6, width=768)),
        ("add_rms_norm", "5x3584", partial(_add_norm, rows=5, width=3584)),
        ("add_rms_norm", "130x200", partial(_add_norm, rows=130, width=200)),
        ("head_rms_norm", "32 heads of 128", partial(_head_norm, rows=7, heads=32, head_dim=128)),
        ("head_rms_norm", "5 heads of 80", partial(_head_norm, rows=3, heads=5, head_dim=80)),
        ("silu_multiply", "3x2x18944", partial(_gate, rows=3, width=18944)),
        ("silu_multiply", "65x2x100", partial(_gate, rows=65, width=100)),
        ("rotary", "28 heads of 128", partial(_rotary, rows=19, heads=28, head_dim=128)),
        ("rotary", "3 heads of 80", partial(_rotary, rows=4, heads=3, head_dim=80)),
        ("embedding", "11 of 1000x384", partial(_embedding, options={})),
        ("embedding", "of a shard", partial(_embedding, options={"first_row": -400, "sharded": True})),
        ("select_rows", "out of order and twice", _rows),
    ]


def _against_oracle(subject: Subject, operator: str, make: _Make, dtype: torch.dtype) -> None:
    device = subject.backend.torch_device()
    arguments, options = make(torch.Generator().manual_seed(0), dtype)
    exact_of = getattr(oracle, operator) if operator != "select_rows" else lambda x, rows: x[rows].double()
    exact = exact_of(*arguments, **options)
    run = subject.registry.kernel(subject.backend.name, operator).run
    found = run(*(moved(argument, device) for argument in arguments), **options)
    if isinstance(exact, torch.Tensor):
        expect_close(found, exact, dtype, operator)
        return
    for index, (part, exact_part) in enumerate(zip(found, exact, strict=True)):
        expect_close(part, exact_part, dtype, f"{operator}, result {index}")


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, with rows as far apart as they were."""
    if tensor.is_contiguous():
        return tensor.to(device)
    storage = torch.empty(tensor.shape[0], tensor.stride(0), dtype=tensor.dtype, device=device)
    return storage[:, : tensor.shape[1]].copy_(tensor)


def _randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _weight(generator: torch.Generator, dtype: torch.dtype, width: int) -> torch.Tensor:
    return (1 + 0.2 * torch.randn(width, generator=generator)).to(dtype)


def _linear(g: torch.Generator, dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool) -> Any:
    weight = (torch.randn(outputs, inputs, generator=g) / math.sqrt(inputs)).to(dtype)
    arguments = (_randn(g, dtype, rows, inputs), weight)
    return ((*arguments, _randn(g, dtype, outputs)) if bias else arguments), {}


def _norm(g: torch.Generator, dtype: torch.dtype, rows: int, width: int, strided: bool = False) -> Any:
    x = _randn(g, dtype, rows, 2 * width if strided else width)[:, :width]
    return (x, _weight(g, dtype, width)), {"epsilon": _EPSILON}


def _layer_norm(g: torch.Generator, dtype: torch.dtype, rows: int, width: int) -> Any:
    return (_randn(g, dtype, rows, width), _weight(g, dtype, width), _randn(g, dtype, width)), {"epsilon": _EPSILON}


def _add_norm(g: torch.Generator, dtype: torch.dtype, rows: int, width: int) -> Any:
    x, residual = _randn(g, dtype, rows, width), _randn(g, dtype, rows, width)
    return (x, residual, _weight(g, dtype, width)), {"epsilon": _EPSILON}


def _head_norm(g: torch.Generator, dtype: torch.dtype, rows: int, heads: int, head_dim: int) -> Any:
    return (_randn(g, dtype, rows, heads * head_dim), _weight(g, dtype, head_dim)), {"epsilon": _EPSILON}


def _gate(g: torch.Generator, dtype: torch.dtype, rows: int, width: int) -> Any:
    return (_randn(g, dtype, rows, 2 * width),), {}


def _rotary(g: torch.Generator, dtype: torch.dtype, rows: int, heads: int, head_dim: int) -> Any:
    positions = torch.randint(0, 100, (rows,), generator=g)
    return (_randn(g, dtype, rows, heads * head_dim), positions, cos_sin_table(100, head_dim)), {}


def _embedding(g: torch.Generator, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    return (torch.randint(0, 1000, (11,), generator=g), _randn(g, dtype, 1000, 384)), options


def _rows(g: torch.Generator, dtype: torch.dtype) -> Any:
    return (_randn(g, dtype, 20, 130), torch.tensor([19, 0, 7, 7, 3])), {}


def cos_sin_table(num_positions: int, head_dim: int) -> torch.Tensor:
    """float32 [num_positions, head_dim]: cosines, then sines, of the usual frequencies with base 10,000."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(num_positions).double(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def _kv_operator(subject: Subject, operator: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = heads
    num_tokens, num_blocks, block_size = 13, 6, 8
    g = torch.Generator().manual_seed(1)
    widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    query, key, value = torch.split(_randn(g, dtype, num_tokens, sum(widths)), widths, dim=-1)
    key_cache, value_cache = (_randn(g, dtype, num_blocks, block_size, num_kv_heads, head_dim) for _ in range(2))
    slots = torch.randperm(num_blocks * block_size, generator=g)[:num_tokens]
    positions, table = torch.randint(0, 100, (num_tokens,), generator=g), cos_sin_table(100, head_dim)
    norms: tuple[torch.Tensor, ...] = ()
    exact_query, exact_key = query.double(), key.double()
    if operator == "head_norm_rotary_kv_write":
        norms = (_weight(g, dtype, head_dim), _weight(g, dtype, head_dim))
        exact_query = oracle.head_rms_norm(query, norms[0], epsilon=_EPSILON)
        exact_key = oracle.head_rms_norm(key, norms[1], epsilon=_EPSILON)
    if operator != "kv_write":
        exact_query = oracle.rotary(exact_query, positions, table)
        exact_key = oracle.rotary(exact_key, positions, table)
    exact_keys, exact_values = oracle.kv_write(exact_key, value, key_cache, value_cache, slots)

    device = subject.backend.torch_device()
    found_keys, found_values = key_cache.to(device), value_cache.to(device)
    caches = (found_keys, found_values, slots.to(device))
    # Parts of one joined projection stay parts of one tensor on the device.
    parts = torch.split(torch.cat((query, key, value), dim=-1).to(device), widths, dim=-1)
    run = subject.registry.kernel(subject.backend.name, operator).run
    if operator == "kv_write":
        run(*parts[1:], *caches)
    else:
        options = {"epsilon": _EPSILON} if norms else {}
        places = (positions.to(device), *(norm.to(device) for norm in norms), table.to(device))
        expect_close(run(*parts, *places, *caches, **options), exact_query, dtype, "the queries")
    expect_close(found_keys, exact_keys, dtype, "the key cache")
    expect(torch.equal(found_values.cpu().double(), exact_values), "values in the cache are not what was given")
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool)
    untouched[slots] = False
    before, after = (cache.view(num_blocks * block_size, -1)[untouched] for cache in (key_cache, found_keys.cpu()))
    expect(torch.equal(before, after), "keys were written outside the step's slots")


def _experts(subject: Subject, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    device, registry, name = subject.backend.torch_device(), subject.registry, subject.backend.name
    num_tokens, num_experts, hidden, intermediate = 9, 8, 64, 48
    # Logits far enough from each other that rounding them changes no order.
    logits = torch.stack([torch.randperm(num_experts, generator=g) / 4 for _ in range(num_tokens)]).to(dtype)
    for normalise in (False, True):
        exact_ids, exact_shares = oracle.moe_router(logits, experts_per_token=3, normalise=normalise)
        ids, shares = registry.kernel(name, "moe_router").run(
            logits.to(device), experts_per_token=3, normalise=normalise
        )
        expect(torch.equal(ids.cpu().long(), exact_ids), "other experts than the likeliest were chosen")
        expect_close(shares, exact_shares, dtype, "shares")
    x = _randn(g, dtype, num_tokens, hidden)
    gate_up = (torch.randn(num_experts, 2 * intermediate, hidden, generator=g) / math.sqrt(hidden)).to(dtype)
    down = (torch.randn(num_experts, hidden, intermediate, generator=g) * 2 / math.sqrt(intermediate)).to(dtype)
    exact = oracle.moe_experts(x, ids.cpu().long(), shares.cpu(), gate_up, down)
    found = registry.kernel(name, "moe_experts").run(x.to(device), ids, shares, gate_up.to(device), down.to(device))
    expect_close(found, exact, dtype, "the experts' sum")


def _pure(subject: Subject, dtype: torch.dtype) -> None:
    device = subject.backend.torch_device()
    for operator, _, make in _cases():
        arguments, options = make(torch.Generator().manual_seed(3), dtype)
        on_device = [moved(argument, device) for argument in arguments]
        subject.registry.kernel(subject.backend.name, operator).run(*on_device, **options)
        for argument, after in zip(arguments, on_device, strict=True):
            expect(torch.equal(argument, after.cpu()), f"{operator} changed an input")
