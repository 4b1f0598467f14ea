"""Fused modules against torch's own: numbers, buffers, errors and everything around them."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from module_parity import (
    FusedCalls,
    assert_same,
    assert_two_x,
    buffers,
    raised,
    randomise,
    step,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastres
from fastres.nn import BNAddReLU, BNReLU, ConvBNReLU, stock

BLOCKS = {
    "basic": (fastres.BasicBlock, stock.BasicBlock),
    "bottleneck": (fastres.Bottleneck, stock.Bottleneck),
}
Norm = Callable[[int], nn.Module]


def pair_of(
    kind: str,
    *,
    projection: bool = True,
    pool: bool = False,
    norm: Norm = nn.BatchNorm2d,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> tuple[nn.Module, nn.Module]:
    """A fused block and its stock twin, with the same random state."""
    fused_class, stock_class = BLOCKS[kind]
    planes = 4
    out = planes * fused_class.expansion
    inplanes, stride = (6, 2) if projection else (out, 1)
    downsample = None
    if projection:
        parts = [nn.Conv2d(inplanes, out, 1, 1 if pool else 2, bias=False), norm(out)]
        if pool:
            parts.insert(0, nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False))
        downsample = nn.Sequential(*parts)
    fused = randomise(fused_class(inplanes, planes, stride, downsample, norm_layer=norm, **kwargs))
    twin = stock_class(
        inplanes, planes, stride, copy.deepcopy(downsample), norm_layer=norm, **kwargs
    )
    twin.load_state_dict(fused.state_dict())
    return fused.to(dtype), twin.to(dtype)


def data(module: nn.Module, n: int = 3, size: int = 7) -> Tensor:
    """A random input [n, C, size, size] for a block."""
    weight = module.conv1.weight
    return torch.randn(n, weight.shape[1], size, size, dtype=weight.dtype)


VARIANTS = [
    pytest.param("basic", {"projection": False}, id="basic"),
    pytest.param("basic", {}, id="basic-projection"),
    pytest.param("basic", {"pool": True}, id="basic-pooled"),
    pytest.param("bottleneck", {"projection": False}, id="bottleneck"),
    pytest.param("bottleneck", {}, id="bottleneck-projection"),
    pytest.param("bottleneck", {"pool": True}, id="bottleneck-pooled"),
    pytest.param("bottleneck", {"projection": False, "dilation": 2}, id="dilated"),
    pytest.param("bottleneck", {"groups": 4, "base_width": 32}, id="grouped"),
]


class TestParity:
    @pytest.mark.parametrize("mode", ["train", "eval", "inference"])
    @pytest.mark.parametrize(("kind", "options"), VARIANTS)
    def test_float64(self, kind: str, options: dict[str, Any], mode: str) -> None:
        fused, twin = (m.train(mode == "train") for m in pair_of(kind, **options))
        x = data(fused)
        with FusedCalls() as calls:
            found = step(fused, x, backward=mode != "inference")
        assert (calls.forward, calls.backward) == (1, int(mode != "inference"))
        assert_same(found, step(twin, x, backward=mode != "inference"))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(("kind", "options"), VARIANTS)
    def test_float32(self, kind: str, options: dict[str, Any], layout: torch.memory_format) -> None:
        fused, twin = pair_of(kind, dtype=torch.float32, **options)
        truth = copy.deepcopy(twin).double()
        x = data(fused).contiguous(memory_format=layout)
        assert_two_x(step(fused, x), step(twin, x), step(truth, x.double()))

    @pytest.mark.parametrize("backend", ["aten", "reference"])
    @pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
    def test_backends_and_memory_modes(self, backend: str, memory: str) -> None:
        fused, twin = pair_of("bottleneck")
        x = data(fused)
        with fastres.use_backend(backend), fastres.use_memory(memory):
            found = step(fused, x)
        assert_same(found, step(twin, x))

    def test_several_steps_of_training(self) -> None:
        fused, twin = pair_of("bottleneck")
        x = data(fused)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (fused, twin)]
        for _ in range(5):
            found, expected = step(fused, x), step(twin, x)
            for optimizer in optimizers:
                optimizer.step()
        # Each step of descent amplifies the difference of the last; 2^4 allows for five of them.
        assert_same(found, expected, factor=2**16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        fused, twin = pair_of("bottleneck", dtype=torch.float32)
        truth = copy.deepcopy(twin).double()
        x = data(fused)
        steps = []
        for module in (fused, twin):
            with torch.autocast("cpu", dtype):
                steps.append(step(module, x))
        # The 2x rule is for one operation. A gate that flips in one rounding of the other path
        # moves whole gradients, so a block gets one more rounding of the lower precision.
        found, expected = steps
        assert found["out"].dtype == expected["out"].dtype == dtype
        for name, want in step(truth, x.double()).items():
            if want.is_floating_point():
                assert found[name].dtype == expected[name].dtype, name
                size = want.abs().max()
                slack = 4 * torch.finfo(dtype).eps * size
                bound = 2 * (expected[name].double() - want).abs().max() + slack
                assert (found[name].double() - want).abs().max() <= bound, name

    def test_nan_and_infinity_pass_through_as_in_torch(self) -> None:
        fused, twin = pair_of("basic", projection=False)
        for module in (fused, twin):
            module.eval()
        x = data(fused)
        x[0, 1, 2, 3], x[1, 2, 3, 4] = float("nan"), float("inf")
        assert_same(step(fused, x, backward=False), step(twin, x, backward=False))


class TestLayouts:
    @pytest.mark.parametrize("projection", [True, False])
    @pytest.mark.parametrize("weights_last", [True, False])
    @pytest.mark.parametrize("x_last", [True, False])
    @pytest.mark.parametrize("train", [True, False])
    def test_strides_are_those_of_the_stock_block(
        self, train: bool, x_last: bool, weights_last: bool, projection: bool
    ) -> None:
        strides = []
        for module in pair_of("bottleneck", projection=projection, dtype=torch.float32):
            module.train(train)
            if weights_last:
                module.to(memory_format=torch.channels_last)
            x = data(module)
            if x_last:
                x = x.contiguous(memory_format=torch.channels_last)
            x.requires_grad_()
            out = module(x)
            out.sum().backward()
            # Where a side is 1 its stride says nothing: torch's own differ between its kernels.
            grads = [_meaningful_strides(p.grad) for p in module.parameters()]
            strides.append((out.stride(), x.grad.stride(), grads))
        assert strides[0] == strides[1]

    def test_a_gradient_in_another_layout(self) -> None:
        fused, twin = pair_of("basic")
        x = data(fused).contiguous(memory_format=torch.channels_last)
        grads = []
        for module in (fused, twin):
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = module(given)
            out.backward(torch.linspace(0, 1, out.numel(), dtype=out.dtype).view(out.shape))
            grads.append({"grad": given.grad})
        assert_same(*grads)

    @pytest.mark.parametrize("take", ["sliced", "expanded"])
    def test_inputs_that_are_not_dense(self, take: str) -> None:
        fused, twin = pair_of("basic")
        wide = torch.randn(3, 6, 7, 14, dtype=torch.float64)
        x = wide[..., ::2] if take == "sliced" else wide[:1, ..., :7].expand(3, -1, -1, -1)
        assert_same(step(fused, x), step(twin, x))


class TestBatchNormSemantics:
    NORMS: ClassVar[dict[str, Norm]] = {
        "momentum-none": lambda c: nn.BatchNorm2d(c, momentum=None),
        "momentum-0": lambda c: nn.BatchNorm2d(c, momentum=0.0),
        "momentum-1": lambda c: nn.BatchNorm2d(c, momentum=1.0),
        "momentum-negative": lambda c: nn.BatchNorm2d(c, momentum=-0.5),
        "large-eps": lambda c: nn.BatchNorm2d(c, eps=10.0),
        "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        "untracked-momentum-none": lambda c: nn.BatchNorm2d(
            c, momentum=None, track_running_stats=False
        ),
        "no-affine": lambda c: nn.BatchNorm2d(c, affine=False),
    }

    @pytest.mark.parametrize("name", NORMS)
    def test_settings(self, name: str) -> None:
        fused, twin = pair_of("bottleneck", norm=self.NORMS[name])
        for train in (True, True, False, True):
            x = data(fused)
            with FusedCalls() as calls:
                found = step(fused.train(train), x)
            assert calls.forward == 1
            assert_same(found, step(twin.train(train), x))

    def test_no_bias(self) -> None:
        try:
            pair = pair_of("basic", norm=lambda c: nn.BatchNorm2d(c, bias=False))
        except TypeError:
            pytest.skip("this torch's BatchNorm2d has no keyword bias")
        x = data(pair[0])
        assert_same(step(pair[0], x), step(pair[1], x))

    def _alike(self, change: Callable[[nn.Module], None]) -> None:
        fused, twin = pair_of("bottleneck")
        for module in (fused, twin):
            change(module)
        for _ in range(2):
            x = data(fused)
            with FusedCalls() as calls:
                found = step(fused, x)
            assert calls.forward == 1
            assert_same(found, step(twin, x))
            fused.eval(), twin.eval()

    def test_tracking_switched_off_later(self) -> None:
        def change(block: nn.Module) -> None:
            block.bn2.track_running_stats = False

        self._alike(change)

    def test_running_statistics_removed_later(self) -> None:
        def change(block: nn.Module) -> None:
            block.bn2.running_mean = block.bn2.running_var = None

        self._alike(change)

    def test_counter_removed_later(self) -> None:
        def change(block: nn.Module) -> None:
            block.bn1.num_batches_tracked = None
            block.bn2.num_batches_tracked, block.bn2.momentum = None, None

        self._alike(change)

    def test_one_norm_in_eval_mode(self) -> None:
        self._alike(lambda block: block.bn1.eval() and None)

    def test_one_norm_shared_by_two_convolutions(self) -> None:
        def change(block: nn.Module) -> None:
            block.bn2 = block.bn1

        self._alike(change)

    def test_one_cumulative_norm_shared_by_two_convolutions(self) -> None:
        def change(block: nn.Module) -> None:
            block.bn2 = block.bn1
            block.bn1.momentum = None

        self._alike(change)

    def test_convolutions_with_a_bias(self) -> None:
        fused, twin = pair_of("basic")
        bias = nn.Conv2d(6, 4, 3, 2, 1, dtype=torch.float64)
        fused.conv1, twin.conv1 = bias, copy.deepcopy(bias)
        x = data(fused)
        assert_same(step(fused, x), step(twin, x))
        assert_same(step(fused.eval(), x), step(twin.eval(), x))

    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("tracked", [True, False])
    def test_one_value_per_channel(self, size: int, train: bool, tracked: bool) -> None:
        pair = pair_of("bottleneck", norm=lambda c: nn.BatchNorm2d(c, track_running_stats=tracked))
        x = data(pair[0], n=1, size=size)
        if not train and tracked:
            assert_same(step(pair[0].eval(), x), step(pair[1].eval(), x))
            return
        errors = [raised(lambda m=m: m.train(train)(x)) for m in pair]
        assert errors[0] == errors[1] and errors[0][0] is ValueError
        assert_same(buffers(pair[0]), buffers(pair[1]))

    @pytest.mark.parametrize("train", [True, False])
    def test_empty_batch(self, train: bool) -> None:
        fused, twin = (m.train(train) for m in pair_of("basic"))
        x = data(fused, n=0)
        assert_same(step(fused, x), step(twin, x))

    def test_counters_stay_the_same_tensors(self) -> None:
        fused, _ = pair_of("basic")
        counter, mean = fused.bn1.num_batches_tracked, fused.bn1.running_mean
        fused(data(fused))
        assert fused.bn1.num_batches_tracked is counter and int(counter) == 1
        assert fused.bn1.running_mean is mean

    def test_wrong_inputs_raise_what_torch_raises(self) -> None:
        fused, twin = pair_of("basic")
        wrong = [torch.randn(2, 5, 7, 7), torch.randn(6, 7), torch.ones(2, 6, 7, 7).int()]
        wrong.append(torch.randn(2, 6, 7, 7))
        for x in wrong:
            assert raised(lambda x=x: fused(x)) == raised(lambda x=x: twin(x))
        assert_same(buffers(fused), buffers(twin))


class TestAutograd:
    def test_every_subset_of_frozen_parameters(self) -> None:
        fused, twin = pair_of("basic", projection=False)
        x = data(fused, n=2, size=4)
        for mode, wanted in itertools.product((True, False), _subsets(fused)):
            grads = []
            for module in (fused.train(mode), twin.train(mode)):
                for name, p in module.named_parameters():
                    p.requires_grad_(name in wanted)
                given = x.clone().requires_grad_("x" in wanted)
                module.zero_grad(set_to_none=True)
                out = module(given)
                assert out.requires_grad is bool(wanted)
                if wanted:
                    out.square().sum().backward()
                own = {f"grad {n}": p.grad for n, p in module.named_parameters()}
                grads.append({**own, "grad x": given.grad})
            found, expected = ({n: g for n, g in g.items() if g is not None} for g in grads)
            assert_same(found, expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant: bool) -> None:
        class Checkpointed(nn.Module):
            def __init__(self, block: nn.Module) -> None:
                super().__init__()
                self.block = block

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.block, x, use_reentrant=reentrant)

        fused, twin = (Checkpointed(m) for m in pair_of("bottleneck"))
        x = data(fused.block)
        with FusedCalls() as calls:
            found = step(fused, x)
        assert calls.forward == 2
        assert_same(found, step(twin, x))

    def test_changing_the_input_in_place_raises(self) -> None:
        fused, _ = pair_of("basic")
        x = data(fused)
        out = fused(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_two_forwards_before_a_backward(self) -> None:
        fused, twin = pair_of("basic")
        x = data(fused)
        for module in (fused, twin):
            (module(x).square().sum() + module(2 * x).square().sum()).backward()
        for p, q in zip(fused.parameters(), twin.parameters(), strict=True):
            assert_same({"grad": p.grad}, {"grad": q.grad})
        assert_same(buffers(fused), buffers(twin))

    def test_torch_func_and_forward_mode_take_the_stock_path(self) -> None:
        fused, twin = (m.eval() for m in pair_of("basic"))
        x = data(fused)
        jvps = [torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (fused, twin)]
        assert torch.equal(*jvps)
        batched = [torch.func.vmap(m)(x[None].repeat(2, 1, 1, 1, 1)) for m in (fused, twin)]
        assert torch.equal(*batched)
        parameters = dict(fused.named_parameters())
        call = torch.func.functional_call
        grads = [
            torch.func.grad(lambda p, m=m: call(m, p, (x,)).square().sum())(parameters)
            for m in (fused, twin)
        ]
        assert_same(*({f"grad {n}": g for n, g in found.items()} for found in grads))

    def test_dtype_and_device_moves_after_a_call(self) -> None:
        fused, twin = pair_of("basic")
        fused(data(fused)), twin(data(twin))
        twin.load_state_dict(fused.state_dict())
        x = torch.randn(3, 6, 7, 7, dtype=torch.bfloat16)
        for module in (fused, twin):
            module.bfloat16().eval()
        with FusedCalls() as calls:
            found = fused(x)
        assert calls.forward == 1 and found.dtype == torch.bfloat16


def _meaningful_strides(t: Tensor) -> list[int]:
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _subsets(module: nn.Module) -> list[tuple[str, ...]]:
    names = [name for name, _ in module.named_parameters()] + ["x"]
    return [s for k in range(len(names) + 1) for s in itertools.combinations(names, k)]


class TestFallback:
    """What cannot be fused runs as the stock block does, children called, and says why."""

    def _stock(self, change: Callable[[nn.Module], Any], reason: str) -> None:
        fused, twin = pair_of("bottleneck")
        kept = [change(module) for module in (fused, twin)]
        x = data(fused)
        with FusedCalls() as calls:
            found = step(fused, x)
        assert calls.forward == 0
        expected = step(twin, x)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert reason in str(fused.why_not()), fused.why_not()
        for handle in kept:
            if hasattr(handle, "remove"):
                handle.remove()

    @pytest.mark.parametrize(
        ("child", "register"),
        [
            *itertools.product(
                ("bn3", "relu", "conv2", "downsample", "downsample.1"),
                ("register_forward_hook", "register_forward_pre_hook"),
            ),
            *itertools.product(
                ("conv2", "downsample", "downsample.1"),
                ("register_full_backward_hook", "register_full_backward_pre_hook"),
            ),
        ],
    )
    def test_hooks(self, child: str, register: str) -> None:
        seen: list[str] = []

        def change(block: nn.Module) -> Any:
            target = block.get_submodule(child)
            return getattr(target, register)(lambda module, *_: seen.append(type(module).__name__))

        self._stock(change, f"{child} carries hooks")
        assert seen

    def test_a_hook_that_torch_refuses_is_refused_alike(self) -> None:
        """Autograd forbids the stock block's in-place addition behind such a hook."""
        pair = pair_of("basic")
        for block in pair:
            block.bn2.register_full_backward_hook(lambda *_: None)
        x = data(pair[0]).requires_grad_()
        assert raised(lambda: pair[0](x)) == raised(lambda: pair[1](x))

    def test_fused_again_once_the_hook_is_gone(self) -> None:
        fused, _ = pair_of("basic")
        handle = fused.bn1.register_forward_hook(lambda *_: None)
        assert fused.why_not() == "bn1 carries hooks"
        handle.remove()
        assert fused.why_not() is None
        with FusedCalls() as calls:
            fused(data(fused))
        assert calls.forward == 1

    def test_hooks_of_the_block_itself_run_around_the_fused_path(self) -> None:
        fused, _ = pair_of("basic")
        seen: list[Tensor] = []
        fused.register_forward_hook(lambda module, args, out: seen.append(out))
        fused.register_full_backward_hook(lambda module, *grads: seen.append(grads[0][0]))
        with FusedCalls() as calls:
            out = fused(data(fused).requires_grad_())
            out.sum().backward()
        assert (calls.forward, len(seen)) == (1, 2)

    def test_global_hooks(self) -> None:
        fused, _ = pair_of("basic")
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(type(module).__name__)
        )
        try:
            fused(data(fused))
            assert fused.why_not() == "global module hooks are registered"
        finally:
            handle.remove()
        assert seen.count("BatchNorm2d") == 3

    def test_replaced_forward(self) -> None:
        def change(block: nn.Module) -> None:
            forward = block.conv1.forward
            block.conv1.forward = lambda x: 2 * forward(x)

        self._stock(change, "conv1 has its forward replaced")

    @pytest.mark.parametrize(
        ("child", "make", "reason"),
        [
            ("bn2", lambda: nn.GroupNorm(2, 4), "bn2 is a GroupNorm, not a BatchNorm2d"),
            ("bn2", lambda: _FrozenNorm(4), "bn2 is a _FrozenNorm, not a BatchNorm2d"),
            ("relu", lambda: nn.Mish(), "relu is a Mish, not an activation of a kernel"),
            ("relu", lambda: nn.LeakyReLU(0.2), "relu is a LeakyReLU, not an activation of"),
            (
                "conv2",
                lambda: nn.Conv2d(4, 4, 3, 2, 1, padding_mode="reflect", bias=False),
                "conv2 pads otherwise",
            ),
            ("conv1", lambda: nn.Sequential(nn.Conv2d(6, 4, 1)), "conv1 is a Sequential"),
            ("downsample", lambda: nn.MaxPool2d(2), "downsample is not a Conv2d"),
            (
                "downsample",
                lambda: nn.Sequential(nn.Conv2d(6, 16, 1, 2), nn.GroupNorm(2, 16)),
                "downsample.1 is a GroupNorm",
            ),
            (
                "downsample",
                lambda: nn.Sequential(
                    nn.AvgPool2d(2, divisor_override=3, ceil_mode=True),
                    nn.Conv2d(6, 16, 1),
                    nn.BatchNorm2d(16),
                ),
                "downsample.0 overrides the divisor",
            ),
        ],
    )
    def test_children_replaced_after_building(
        self, child: str, make: Callable[[], nn.Module], reason: str
    ) -> None:
        made = make().double()
        fused, twin = pair_of("bottleneck")
        x = data(fused)
        for module in (fused, twin):
            setattr(module, child, copy.deepcopy(made))
        with FusedCalls() as calls:
            assert outcome(fused, x) == outcome(twin, x)
        assert calls.forward == 0
        assert reason in str(fused.why_not())

    def test_sync_batch_norm(self) -> None:
        fused, _ = pair_of("basic")
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
        assert fused.why_not() == "bn1 is a SyncBatchNorm, not a BatchNorm2d"

    def test_parametrizations(self) -> None:
        class Double(nn.Module):
            def forward(self, w: Tensor) -> Tensor:
                return 2 * w

        def change(block: nn.Module) -> None:
            nn.utils.parametrize.register_parametrization(block.conv1, "weight", Double())

        self._stock(change, "conv1 is a ParametrizedConv2d")

    def test_pruning(self) -> None:
        def change(block: nn.Module) -> None:
            prune.l1_unstructured(block.conv1, "weight", 3)

        self._stock(change, "conv1 carries hooks")

    def test_weights_that_are_more_than_a_tensor(self) -> None:
        class Scaled(nn.Parameter):
            pass

        fused, _ = pair_of("basic")
        fused.conv1.weight = Scaled(fused.conv1.weight.data)
        assert fused.why_not() == "conv1 holds a Scaled, not a plain tensor"

    def test_momentum_that_is_no_number(self) -> None:
        fused, _ = pair_of("basic")
        fused.bn1.momentum = torch.tensor(0.1)
        assert fused.why_not() == "bn1 has a Tensor for momentum"

    def test_an_input_can_be_the_reason(self) -> None:
        fused, _ = pair_of("basic")
        assert fused.why_not() is None and fused.why_not(data(fused)) is None
        assert "[N, C, H, W]" in str(fused.why_not(torch.zeros(3)))
        assert "channels" in str(fused.why_not(torch.zeros(2, 5, 7, 7, dtype=torch.float64)))


def outcome(module: nn.Module, x: Tensor) -> Any:
    """What a module gives for x: all values, or the error."""
    try:
        return module(x).flatten().tolist()
    except RuntimeError as error:
        return str(error)


class _FrozenNorm(nn.BatchNorm2d):
    """A user's norm: a subclass may compute anything."""


class TestTracing:
    def test_fx_traces_the_stock_path(self) -> None:
        fused, _ = pair_of("bottleneck")
        graph = torch.fx.symbolic_trace(fused)
        targets = [str(node.target) for node in graph.graph.nodes]
        assert {"conv1", "bn3", "downsample.1"} <= set(targets)
        x = data(fused)
        assert torch.allclose(graph.eval()(x), fused.eval()(x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_jit_trace_and_export_hold_torch_operators_only(self) -> None:
        fused, _ = (m.eval() for m in pair_of("basic"))
        x = data(fused)
        traced = torch.jit.trace(fused, x)
        assert "fastres::" not in str(traced.inlined_graph)
        program = torch.export.export(fused, (x,))
        assert not any("fastres" in str(node.target) for node in program.graph.nodes)
        assert torch.allclose(traced(x), program.module()(x))

    def test_dynamo_before_torch_2_13_always_claims_to_export(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A block that believed it would run its stock path wherever it is compiled."""
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert pair_of("basic")[0].why_not() is None

    @pytest.mark.parametrize("train", [True, False])
    def test_compile_in_one_graph(self, train: bool) -> None:
        torch._dynamo.reset()
        fused, twin = (
            m.train(train)
            for m in pair_of("bottleneck", norm=lambda c: nn.BatchNorm2d(c, momentum=None))
        )
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        x = data(fused)
        for _ in range(2):
            found, expected = step(compiled, x), step(twin, x)
            assert_same({k.replace("_orig_mod.", ""): v for k, v in found.items()}, expected)

    def test_the_compiled_graph_holds_the_fused_operator(self) -> None:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        seen: list[str] = []

        def record(graph: torch.fx.GraphModule, _: Any) -> Any:
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        fused, _ = pair_of("basic")
        compiled = torch.compile(fused, fullgraph=True, backend=aot_autograd(fw_compiler=record))
        compiled(data(fused)).sum().backward()
        assert seen.count("fastres.block_forward.default") == 1
        assert seen.count("fastres.block_backward.default") == 1

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        fused, twin = pair_of("basic", projection=False)
        compiled = torch.compile(fused, fullgraph=True)
        x = data(fused)
        try:
            found = step(compiled, x)
        except torch._inductor.exc.InductorError as error:
            if "compiler" in str(error).lower():
                pytest.skip("inductor finds no C++ compiler")
            raise
        expected = step(twin, x)
        assert_same({k.replace("_orig_mod.", ""): v for k, v in found.items()}, expected)


class TestObjects:
    @pytest.mark.parametrize("kind", BLOCKS)
    def test_constructor(self, kind: str) -> None:
        fused_class, stock_class = BLOCKS[kind]
        assert fused_class.expansion == stock_class.expansion
        torch.manual_seed(1)
        fused = fused_class(8, 4, 2, None, 1, 64, 1, nn.BatchNorm2d)
        torch.manual_seed(1)
        twin = stock_class(8, 4, 2, None, 1, 64, 1, nn.BatchNorm2d)
        assert list(fused.state_dict()) == list(twin.state_dict())
        assert all(map(torch.equal, fused.parameters(), twin.parameters()))
        assert repr(fused).split("(", 1)[1] == repr(twin).split("(", 1)[1]

    def test_constructor_errors(self) -> None:
        with pytest.raises(ValueError, match="BasicBlock only supports groups=1"):
            fastres.BasicBlock(4, 4, groups=2)
        with pytest.raises(NotImplementedError, match="Dilation > 1 not supported"):
            fastres.BasicBlock(4, 4, dilation=2)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, how: str) -> None:
        fused, _ = pair_of("bottleneck")
        x = data(fused)
        fused(x)
        if how == "deepcopy":
            twin = copy.deepcopy(fused)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(fused))
        else:
            file = io.BytesIO()
            torch.save(fused, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert type(twin) is type(fused)
        assert_same(step(twin, x), step(fused, x), factor=0)

    def test_a_saved_block_loads_in_a_fresh_process(self, tmp_path: Any) -> None:
        fused, _ = pair_of("bottleneck")
        x = data(fused)
        torch.save((fused, x, fused.eval()(x)), tmp_path / "block.pt")
        code = (
            "import sys, torch; block, x, y = torch.load(sys.argv[1], weights_only=False); "
            "assert torch.allclose(block(x), y); print(type(block).__mro__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "block.pt")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "fastres.nn.blocks.Bottleneck" in done.stdout

    def test_a_subclass_with_other_parts_must_say_so(self) -> None:
        class Widened(fastres.Bottleneck):
            expansion = 2

        block = Widened(8, 4).double()
        assert type(block) is Widened
        with FusedCalls() as calls:
            block(data(block))
        assert calls.forward == 1


class TestParts:
    @pytest.mark.parametrize("train", [True, False])
    def test_conv_bn_relu(self, train: bool) -> None:
        fused = randomise(ConvBNReLU(6, 8, 3, 2, 1, groups=2)).double().train(train)
        twin = nn.Sequential(*copy.deepcopy(list(fused.children())))
        x = torch.randn(3, 6, 7, 7, dtype=torch.float64)
        with FusedCalls() as calls:
            found = step(fused, x)
        assert calls.forward == 1
        expected = {
            key.replace("0.", "conv.").replace("1.", "bn."): value
            for key, value in step(twin, x).items()
        }
        assert_same(found, expected)
        assert [n for n, _ in fused.named_parameters()] == ["conv.weight", "bn.weight", "bn.bias"]

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("train", [True, False])
    def test_norms(self, train: bool, momentum: float | None) -> None:
        class Twin(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm2d(5, momentum=momentum)

            def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
                z = self.bn(x)
                return F.relu(z if residual is None else z + residual)

        for fused_class, count in ((BNReLU, 1), (BNAddReLU, 2)):
            fused = randomise(fused_class(5, momentum=momentum)).double().train(train)
            twin = Twin().double().train(train)
            twin.load_state_dict(fused.state_dict())
            inputs = [torch.randn(3, 5, 4, 4, dtype=torch.float64) for _ in range(count)]
            for _ in range(2):
                with FusedCalls() as calls:
                    found = step(fused, *inputs)
                assert calls.forward == 1
                assert_same(found, step(twin, *inputs))

    def test_norm_errors_are_torch_s(self) -> None:
        norm, twin = BNReLU(5), nn.BatchNorm2d(5)
        for x in (torch.zeros(1, 5, 1, 1), torch.zeros(2, 5), torch.zeros(2, 4, 3, 3)):
            assert raised(lambda x=x: norm(x)) == raised(lambda x=x: twin(x))
        assert_same(buffers(norm.bn), buffers(twin))
        with pytest.raises(RuntimeError):
            BNAddReLU(5)(torch.zeros(2, 5, 3, 3), torch.zeros(2, 5, 4, 4))

    def test_a_residual_that_broadcasts_runs_as_in_torch(self) -> None:
        norm, twin = BNAddReLU(5), nn.BatchNorm2d(5)
        x, residual = torch.randn(2, 5, 3, 3), torch.randn(1, 5, 1, 1)
        assert torch.equal(norm(x, residual), F.relu(twin(x) + residual))
        assert_same(buffers(norm.bn), buffers(twin))
