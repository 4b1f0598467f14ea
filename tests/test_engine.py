"""The engine: gradients by calculus, what is saved, what is computed, and that bits repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.block import Block, Norm, Unit, decode, make_plan, use_backend, use_memory
from fastres.functional import residual_block
from fastres.kernels import BACKENDS, Conv, MaxPool, reference, registry
from fastres.testing import BLOCK_CASES, BlockCase, FunctionalBlock, assert_parity

BACKENDS_HERE = [n for n, b in BACKENDS.items() if "cpu" in b.devices and b.why_not() is None]
MODES = ("speed", "balanced", "lean")

#: Small enough for finite differences: a few hundred inputs in all.
_TINY = {"shape": (2, 2, 3, 3), "width": 2, "dtype": torch.float64}
_SHORTCUTS: dict[str, dict[str, Any]] = {
    "identity": {},
    "projection": {"shortcut": "projection"},
    "strided": {"shortcut": "projection", "stride": 2},
    "pooled": {"shortcut": "pooled", "stride": 2},
    "dilated": {"dilation": 2},
    "groups": {"groups": 2},
    "bias, eval": {"conv_bias": True, "training": False},
}


# ---------------------------------------------------------------- calculus


def _function_of(module: FunctionalBlock, names: list[str]) -> Any:
    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return run


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", _SHORTCUTS)
def test_gradcheck(shortcut: str, kind: str, mode: str, backend: str) -> None:
    case = replace(BlockCase(f"gradcheck {shortcut} {kind}", kind), **_TINY)
    module = FunctionalBlock.of(replace(case, **_SHORTCUTS[shortcut]).stock())
    names = [n for n, _ in module.named_parameters()]
    inputs = [case.input(), *(p.detach() for p in module.parameters())]
    with use_backend(backend), use_memory(mode):
        function = _function_of(module, names)
        given = [t.clone().requires_grad_() for t in inputs]
        # fast_mode compares one random projection of the Jacobian, with gradcheck's defaults.
        assert torch.autograd.gradcheck(function, given, fast_mode=True)


# ---------------------------------------------------------------- what is kept


_ACTS = ("relu", "relu", "none")


def _arguments(case: BlockCase, backend: str, mode: str) -> tuple[Any, ...]:
    """Arguments of block_forward for a bottleneck with identity shortcut."""
    module = FunctionalBlock.of(case.stock())
    layers = [module.layer(i)._replace(act=act).layer for i, act in enumerate(_ACTS)]
    units = tuple(layer.unit for layer in layers)
    spec = Block(units, "input", act="relu", save=True, memory=mode, backend=backend)
    return case.input(), None, [t for layer in layers for t in layer.tensors], spec.encode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_saved_statistics_are_those_of_what_was_stored(backend: str, dtype: torch.dtype) -> None:
    case = BlockCase("statistics", dtype=dtype)
    x, _, tensors, text = _arguments(case, backend, "speed")
    _, *saved = torch.ops.fastres.block_forward(x, None, tensors, text)
    raws = saved[4:7]
    for i, raw in enumerate(raws):
        weight, bias = tensors[7 * i + 2 : 7 * i + 4]
        results = []
        for acc in (torch.float64, torch.float32):
            state = reference.channel_stats(raw.to(acc), acc=acc)
            count = raw.numel() // raw.shape[1]
            results.append(reference.finalize_stats(state, count, None, weight, bias, 1e-2))
        sizes = results[0].abs().clone()
        sizes[0] = raw.double().abs().mean((0, 2, 3))
        sizes[4] += sizes[0] * sizes[3]
        for row in range(5):
            found, truth, torchs, size = saved[i][row], results[0][row], results[1][row], sizes[row]
            assert_parity(found, truth, [torchs], what=f"unit {i} row {row}", magnitude=size,
                          precision=torch.float32)  # fmt: skip


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_memory_modes_keep_less_and_less() -> None:
    case = BlockCase("memory", shape=(2, 64, 8, 8), width=16)
    sizes = {}
    for mode in MODES:
        _, *saved = torch.ops.fastres.block_forward(*_arguments(case, "aten", mode))
        sizes[mode] = _bytes(saved)
    y1, y3, mask = 2 * 16 * 64 * 4, 2 * 64 * 64 * 4, 2 * 64 * 64 // 8
    stats = 5 * 4 * (16 + 16 + 64)
    assert sizes["speed"] == 4 * y1 + y3 + mask + stats
    assert sizes["balanced"] == 2 * y1 + y3 + mask + stats
    assert sizes["lean"] == 2 * y1 + mask + stats


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_modes_are_exact(dtype: torch.dtype, backend: str) -> None:
    """Recomputing gives the same bits, and updates no statistics."""
    results = []
    for mode in MODES:
        case = BlockCase("exact", dtype=dtype, shortcut="projection", stride=2)
        module, x = FunctionalBlock.of(case.stock()), case.input().requires_grad_()
        with use_backend(backend), use_memory(mode):
            out = module(x)
            out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# ---------------------------------------------------------------- what is computed


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts calls of every primitive; composites are taken away so that parts show."""
    counts: Counter[str] = Counter()

    def counting(entry: registry.Implementation) -> registry.Implementation:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[entry.primitive] += 1
            return entry.run(*args, **kwargs)

        return registry.Implementation(
            entry.primitive, entry.backend, entry.name, run, entry.why_not
        )

    table = {
        key: [counting(e) for e in entries]
        for key, entries in registry._TABLE.items()
        if key[0] != "conv_backward"
    }
    monkeypatch.setattr(registry, "_TABLE", table)
    make_plan.cache_clear()
    yield counts
    make_plan.cache_clear()


def _backward_counts(
    counted: Counter[str], case: BlockCase, wanted: set[str], mode: str = "balanced"
) -> Counter[str]:
    """Primitive calls of a backward in which only these parameters ("x" is the input) matter."""
    module, x = FunctionalBlock.of(case.stock()), case.input()
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanted)
    with use_backend("aten"), use_memory(mode):
        out = module(x.requires_grad_("x" in wanted))
        counted.clear()
        out.sum().backward()
    return Counter(counted)


_ALL = {f"{k}.{i}.weight" for k in ("convs", "norms") for i in range(3)} | {"x"}


def test_full_backward_computes_each_gradient_once(counted: Counter[str]) -> None:
    found = _backward_counts(counted, BlockCase("full"), _ALL)
    assert found["conv_backward_data"] == found["conv_backward_weight"] == 3
    assert found["bn_act_backward_reduce"] == found["bn_act_backward_apply"] == 3
    # Balanced: z1 and z2 are formed again, for the weight gradients of convolutions 2 and 3.
    assert found["scale_shift_act"] == 2
    assert found["conv_forward"] == 0


def test_frozen_front_gets_no_data_gradient(counted: Counter[str]) -> None:
    """conv1 and bn1 frozen, x without gradient: the walk ends at convolution 2."""
    found = _backward_counts(
        counted, BlockCase("front"), _ALL - {"x", "convs.0.weight", "norms.0.weight"}
    )
    assert found["conv_backward_data"] == 1, "only convolution 3's"
    assert found["conv_backward_weight"] == 2
    assert found["bn_act_backward_reduce"] == 2
    assert found["act_backward"] == 0, "nobody wants the residual's gradient"


def test_last_norm_alone_needs_one_reduction(counted: Counter[str]) -> None:
    found = _backward_counts(counted, BlockCase("last"), {"norms.2.weight"})
    assert found == {"bn_act_backward_reduce": 1}


def test_frozen_weights_get_no_weight_gradient(counted: Counter[str]) -> None:
    found = _backward_counts(counted, BlockCase("weights"), {"x"})
    assert found["conv_backward_weight"] == 0 and found["conv_backward_data"] == 3
    assert found["scale_shift_act"] == 0, "nothing is recomputed for nobody"


def test_frozen_batch_norms_in_eval_need_no_reduction(counted: Counter[str]) -> None:
    case = BlockCase("eval", training=False)
    found = _backward_counts(counted, case, {n for n in _ALL if "norms" not in n})
    assert found["bn_act_backward_reduce"] == 0
    assert found["conv_backward_data"] == found["conv_backward_weight"] == 3


def test_projection_alone(counted: Counter[str]) -> None:
    case = BlockCase("side", shortcut="projection")
    found = _backward_counts(counted, case, {"convs.3.weight"})
    assert found["conv_backward_weight"] == 1 and found["conv_backward_data"] == 0
    assert found["bn_act_backward_reduce"] == found["bn_act_backward_apply"] == 1


def test_lean_runs_the_last_convolution_again(counted: Counter[str]) -> None:
    found = _backward_counts(counted, BlockCase("lean"), _ALL, "lean")
    assert found["conv_forward"] == 1


def test_speed_recomputes_nothing(counted: Counter[str]) -> None:
    found = _backward_counts(counted, BlockCase("speed"), _ALL, "speed")
    assert found["conv_forward"] == found["scale_shift_act"] == 0


def test_inference_folds_every_convolution(counted: Counter[str]) -> None:
    case = BlockCase("folds", training=False)
    with use_backend("aten"), torch.no_grad():
        FunctionalBlock.of(case.stock())(case.input())
    assert counted["conv_bn_act"] == 3
    assert counted["conv_forward"] == counted["channel_stats"] == 0


# ---------------------------------------------------------------- bits


def _bits(case: BlockCase, backend: str) -> list[Tensor]:
    module, x = FunctionalBlock.of(case.stock()), case.input().requires_grad_()
    with use_backend(backend):
        out = module(x)
        out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize(
    "case", [c for c in BLOCK_CASES if "nan" not in c.name and "inf" not in c.name][::4], ids=str
)
def test_two_runs_give_the_same_bits(case: BlockCase, backend: str) -> None:
    for a, b in zip(_bits(case, backend), _bits(case, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="fastres._cpu was not built")
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Around the convolutions: what oneDNN does inside them with threads is its own business."""
    case = BlockCase("threads", shape=(8, 64, 14, 14), dtype=dtype)
    x, grad = case.input(), torch.randn(8, 64, 14, 14).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_around(x, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def _around(x: Tensor, grad: Tensor) -> list[Tensor]:
    from fastres.functional import bn_add_relu

    mean, var = torch.zeros(64), torch.ones(64)
    given, w = x.clone().requires_grad_(), torch.linspace(0.5, 2, 64).requires_grad_()
    with use_backend("cpu"):
        out = bn_add_relu(given, x.flip(0), mean, var, w, training=True)
        out.backward(grad)
    return [out.detach(), given.grad, w.grad, mean, var]


# ---------------------------------------------------------------- specification


def test_specification_round_trip() -> None:
    unit = Unit(Conv((2, 1), (1, 0), (1, 2), 4), Norm(1e-5, "running"), "relu", True)
    alone = Unit(None, Norm(1 / 3))
    pool = MaxPool((3, 2), (2, 1), (1, 0), (1, 2), True)
    spec = Block((unit, alone), "activated", unit, None, "relu", pool, True, True, "lean", "aten")
    assert decode(spec.encode()) == spec


def test_statistics_survive_a_large_mean() -> None:
    """mean 1e4, std 1: E[x^2] - E[x]^2 would give a variance of about -8 in float32."""
    case = BlockCase("mean", values="large_mean", shape=(8, 4, 16, 16))
    x = case.input()
    for backend in BACKENDS_HERE:
        mean, var = torch.zeros(4), torch.zeros(4)
        with use_backend(backend):
            from fastres.functional import bn_relu

            bn_relu(x, mean, var, training=True, momentum=1.0)
        torch.testing.assert_close(var, x.double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), rtol=2**-22, atol=0)


def test_running_statistics_are_torchs() -> None:
    x, w = torch.randn(3, 4, 5, 5), torch.randn(4, 4, 3, 3)
    from fastres.functional import ConvNorm

    pairs = []
    for fused in (True, False):
        mean, var = torch.zeros(4), torch.ones(4)
        if fused:
            residual_block(x, [ConvNorm(w, mean, var, padding=1, training=True, momentum=0.3)])
        else:
            F.batch_norm(F.conv2d(x, w, padding=1), mean, var, training=True, momentum=0.3)
        pairs.append((mean, var))
    for a, b in zip(*pairs, strict=True):
        # Two float32 sums of 75 terms and three roundings.
        torch.testing.assert_close(a, b, rtol=2**-18, atol=2**-20)
