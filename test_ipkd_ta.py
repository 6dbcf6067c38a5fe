"""Tests of ipkd_ta.py: against closed forms, reference numbers and independent constructions. No network, no GPU needed.

    pip install torch torchvision pytest && pytest

Set IPKD_TA_IMAGES to a directory with train/<class>/* and test/<class>/* to run the tests on real images as well, and
IPKD_TA_KILLS=200 or IPKD_TA_FUZZ=10000 to kill more processes or damage more files than the usual few.
"""
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

import ipkd_ta
from ipkd_ta import InputError, MSDNet, SlimmableMobileNetV1, ipkd_ta_loss, sandwich_widths

HERE = Path(__file__).parent
METHODS = ("ce", "ipkd", "ipkd-ta", "ipkd-mean")
TINY = {"msdnet": ["--arch", "msdnet", "--exits", "3", "--base", "1", "--step", "1", "--channels", "4", "--growth", "2"],
        "slimmable": ["--arch", "slimmable", "--widths", "0.05", "0.1", "0.15"]}
QUICK = ["--epochs", "1", "--train-size", "40", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    monkeypatch.setattr(ipkd_ta, "SHAPES_TEST", 50)


def run(*args):
    """The command line in this process: its exit status."""
    return ipkd_ta.main([str(a) for a in args])


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def random_logits(k, n=6, classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(k)
    return ([torch.randn(n, classes, generator=generator, dtype=dtype).mul(3).requires_grad_() for _ in range(k)],
            torch.randint(classes, (n,), generator=generator))


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kd_weight, temperature", [(0.0, 1.0), (0.3, 1.0), (0.5, 4.0), (1.0, 0.5)])
def test_gradients_equal_the_closed_form(method, kd_weight, temperature):
    logits, target = random_logits(4)
    ipkd_ta_loss(logits, target, method, kd_weight, temperature).backward()
    n, onehot = len(target), F.one_hot(target, 5).double()
    weight = 0 if method == "ce" else kd_weight
    with torch.no_grad():
        for k, z in enumerate(logits):
            if k == 3:
                expected = (z.softmax(1) - onehot) / n
            else:
                teachers = {"ipkd": [3], "ipkd-mean": range(k + 1, 4)}.get(method, [k + 1])
                teacher = sum((logits[t] / temperature).softmax(1) for t in teachers) / len(teachers)
                soft = (z / temperature).softmax(1) - teacher
                expected = (weight * temperature * soft + (1 - weight) * (z.softmax(1) - onehot)) / n
            torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_value_equals_the_formula_summed_by_hand(method):
    logits, target = random_logits(3, n=2, classes=3)
    weight, tau = 0.4, 2.5

    def p(k, i, temperature):
        e = [math.exp(v / temperature) for v in logits[k][i].tolist()]
        return [v / sum(e) for v in e]

    total = 0
    for i, y in enumerate(target.tolist()):
        total -= math.log(p(2, i, 1)[y])
        for k in (0, 1):
            ce = -math.log(p(k, i, 1)[y])
            teachers = {"ipkd": [2], "ipkd-mean": [1, 2][k:]}.get(method, [k + 1])
            teacher = [sum(column) / len(teachers) for column in zip(*(p(t, i, tau) for t in teachers))]
            kl = sum(t * math.log(t / s) for t, s in zip(teacher, p(k, i, tau)))
            total += ce if method == "ce" else (1 - weight) * ce + weight * tau**2 * kl
    assert ipkd_ta_loss(logits, target, method, weight, tau).item() == pytest.approx(total / 2, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_sub_model_learns_by_plain_cross_entropy(method):
    logits, target = random_logits(1)
    assert ipkd_ta_loss(logits, target, method, 0.7, 3.0).equal(F.cross_entropy(logits[0], target))


def test_with_two_sub_models_all_distillations_are_identical():
    logits, target = random_logits(2, dtype=torch.float32)
    a, b, c = (ipkd_ta_loss(logits, target, method, 0.7, 3.0) for method in METHODS[1:])
    assert a.equal(b) and b.equal(c)


def test_without_kd_weight_all_methods_are_identical():
    logits, target = random_logits(4, dtype=torch.float32)
    a, b, c, d = (ipkd_ta_loss(logits, target, method, 0.0, 2.0) for method in METHODS)
    assert a.equal(b) and b.equal(c) and c.equal(d)


@pytest.mark.parametrize("method", METHODS[1:])
def test_no_gradient_flows_into_a_teacher(method):
    logits, target = random_logits(3)
    distilled = ipkd_ta_loss(logits, target, method, 1.0, 2.0)
    labels_alone = F.cross_entropy(logits[2], target)      # all that the largest may learn from
    gradient, = torch.autograd.grad(distilled, logits[2], retain_graph=True)
    expected, = torch.autograd.grad(labels_alone, logits[2])
    assert gradient.equal(expected)


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_finite_for_logits_of_any_magnitude(method):
    extremes = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 1e4]])
    logits = [(sign * extremes).requires_grad_() for sign in (1, -1, 1)]
    loss = ipkd_ta_loss(logits, torch.tensor([1, 0]), method)
    loss.backward()
    assert loss.isfinite() and all(z.grad.isfinite().all() for z in logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32_also_under_autocast(dtype):
    logits, target = random_logits(3, dtype=torch.float32)
    half = [z.detach().to(dtype) for z in logits]
    expected = ipkd_ta_loss([z.float() for z in half], target, "ipkd-ta", 0.5, 2.0)
    with torch.autocast("cpu", dtype):
        loss = ipkd_ta_loss(half, target, "ipkd-ta", 0.5, 2.0)
    assert loss.dtype == torch.float32 and loss.equal(expected)


@pytest.mark.parametrize("change, message", [
    ({"logits": []}, "non-empty"), ({"logits": [torch.zeros(6, 5), torch.zeros(6, 4)]}, r"\(6, 4\)"),
    ({"logits": [torch.zeros(6)]}, r"\(6,\)"), ({"method": "kd"}, "'kd'"), ({"kd_weight": 1.5}, "1.5"),
    ({"kd_weight": math.nan}, "nan"), ({"temperature": 0.0}, "0.0"), ({"logits": [[0.5]]}, "list"), ({"logits": [torch.zeros(0, 5)]}, r"\(0, 5\)"),
    ({"logits": [torch.zeros(6, 5, dtype=torch.int64)]}, "torch.int64"), ({"logits": [torch.zeros(6, 5, device="meta")]}, "meta"),
    ({"target": [0] * 6}, "list"), ({"target": torch.zeros(6)}, "torch.float32"), ({"target": torch.zeros(6, dtype=torch.int32)}, "torch.int32"),
    ({"target": torch.zeros(5, dtype=torch.int64)}, r"\(5,\)"), ({"target": torch.zeros(6, 5, dtype=torch.int64)}, r"\(6, 5\)"),
    ({"target": torch.zeros(6, dtype=torch.int64, device="meta")}, "meta"), ({"target": torch.arange(6)}, "below 5, got 0 to 5"),
    ({"target": torch.full((6,), -100)}, "got -100 to -100")])          # PyTorch would pass over -100
def test_loss_names_the_wrong_argument(change, message):
    logits, target = random_logits(2)
    with pytest.raises((ValueError, TypeError), match=message):
        ipkd_ta_loss(**{"logits": logits, "target": target, **change})


@pytest.mark.parametrize("thing, use", [
    (ipkd_ta_loss, "ipkd_ta_loss([torch.zeros(2, 3)] * 3, torch.tensor([0, 1])).item()"),
    (sandwich_widths, "sandwich_widths(4, 0.25, 1.0)"),
    (MSDNet, "MSDNet(10, exits=2, base=1)(torch.zeros(2, 3, 32, 32)), MSDNet(10).sub_models()"),
    (SlimmableMobileNetV1, "m = SlimmableMobileNetV1(10); m.sub_models(), m.training_passes(lambda low, high: [high, low]); m(torch.zeros(2, 3, 32, 32), 0.3); "
                           "m.calibrate([torch.zeros(2, 3, 32, 32)], [0.3]); m.eval()(torch.zeros(2, 3, 32, 32), 0.3)")])
def test_copied_source_needs_nothing_but_the_imports(thing, use):
    imports = "\n".join(line for line in (HERE / "ipkd_ta.py").read_text().splitlines() if line.startswith(("import ", "from ")))
    exec(f"{imports}\n{inspect.getsource(thing)}\n{use}", {})


# ------------------------------------------------------------------------------------------------- the sandwich rule


def test_sandwich_has_both_ends_in_descending_order_and_follows_the_seed():
    draw = lambda seed: sandwich_widths(6, 0.25, 1.0, torch.Generator().manual_seed(seed))
    widths = draw(0)
    assert len(widths) == 6 and widths == sorted(widths, reverse=True)
    assert widths[0] == 1.0 and widths[-1] == 0.25
    assert widths == draw(0) != draw(1)
    assert sandwich_widths(2, 0.5, 0.75) == [0.75, 0.5]


def test_drawn_widths_are_uniform_over_the_range():
    drawn = torch.tensor(sandwich_widths(100_002, 0.2, 1.0, torch.Generator().manual_seed(0))[1:-1])
    quantiles = drawn.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(quantiles, 0.2 + 0.8 * torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), atol=0.01, rtol=0)


@pytest.mark.parametrize("args", [(1, 0.25, 1.0), (4, 1.0, 0.25), (4, 0.0, 1.0), (4, 0.5, 0.5), (2.5, 0.25, 1.0), (4, 0.25, math.inf),
                                  (4, math.nan, 1.0)])
def test_sandwich_refuses_an_empty_range_and_a_broken_number(args):
    with pytest.raises(ValueError, match=f"n={args[0]}, low={args[1]}, high={args[2]}"):
        sandwich_widths(*args)


# ------------------------------------------------------------------------------------------- slimmable MobileNet-V1


@pytest.mark.parametrize("bn", ["universal", "switchable"])
@pytest.mark.parametrize("classes, reference", [
    (100, [(3_354_112, 238_772), (12_213_248, 869_892), (26_577_408, 1_893_460), (46_446_592, 3_309_476)]),
    (10, [(3_331_072, 215_642), (12_167_168, 823_722), (26_508_288, 1_824_250), (46_354_432, 3_217_226)])])
def test_slimmable_cost_equals_the_reference_table(bn, classes, reference):
    subs = SlimmableMobileNetV1(classes, bn=bn).sub_models()
    assert [(s.macs, s.params) for s in subs] == reference
    assert [s.name for s in subs] == ["width-0.25", "width-0.5", "width-0.75", "width-1"]


def test_universal_model_holds_no_more_parameters_than_its_largest_width():
    for high in (0.5, 1.0):
        model = SlimmableMobileNetV1(10, widths=(0.25, high))
        assert sum(p.numel() for p in model.parameters()) == model.sub_models()[-1].params


@pytest.mark.parametrize("width, stem_to_last", [
    (0.25, (8, 16, 32, 64, 128, 256)), (0.5, (16, 32, 64, 128, 256, 512)), (0.75, (24, 48, 96, 192, 384, 768)),
    (1.0, (32, 64, 128, 256, 512, 1024)), (0.3, (16, 24, 40, 80, 152, 304)), (0.01, (8, 8, 8, 8, 8, 16))])
def test_channels_are_multiples_of_8_near_the_exact_count_and_never_below_90_percent(width, stem_to_last):
    counts = SlimmableMobileNetV1(10).channels(width)
    assert (counts[0], *dict(zip((64, 128, 256, 512, 1024), (counts[i] for i in (2, 4, 8, 12, 24)))).values()) == stem_to_last
    assert counts[1::2] == counts[:-1:2]         # a depthwise convolution keeps its input's channels


def plain_mobilenet(counts, classes):
    """An ordinary MobileNet-V1 for CIFAR with these numbers of channels: stem, then 13 outputs of blocks."""
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    layers = [nn.Conv2d(3, counts[0], 3, 1, 1, bias=False), nn.BatchNorm2d(counts[0]), nn.ReLU6()]
    for c_in, c_out, stride in zip(counts, counts[1:], strides, strict=False):
        layers += [nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False), nn.BatchNorm2d(c_in), nn.ReLU6(),
                   nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(counts[-1], classes))


def given_sliced_weights(model, width):
    """plain_mobilenet at this width, with the first channels of the weights of the slimmable model, by state_dict."""
    a, b, c, d, e, f = {0.25: (8, 16, 32, 64, 128, 256), 0.3: (16, 24, 40, 80, 152, 304), 0.4: (16, 24, 48, 104, 208, 408),
                        0.55: (16, 32, 72, 144, 280, 560), 0.75: (24, 48, 96, 192, 384, 768),
                        1.0: (32, 64, 128, 256, 512, 1024)}[width]
    plain = plain_mobilenet([a, b, c, c, d, d, e, e, e, e, e, e, f, f], model.classifier.out_features)
    theirs, i = model.state_dict(), 0
    key = "norms." + str(width).replace(".", "_")
    affine = "affine" if model.bn == "universal" else key
    with torch.no_grad():
        for module in plain:
            cut = lambda name, like: theirs[name][tuple(slice(n) for n in like.shape)]
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(cut(f"convs.{i}.weight", module.weight))
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(cut(f"{affine}.{i}.weight", module.weight))
                module.bias.copy_(cut(f"{affine}.{i}.bias", module.bias))
                if f"{key}.{i}.running_mean" in theirs:
                    module.running_mean.copy_(theirs[f"{key}.{i}.running_mean"])
                    module.running_var.copy_(theirs[f"{key}.{i}.running_var"])
                i += 1
            elif isinstance(module, nn.Linear):
                module.weight.copy_(cut("classifier.weight", module.weight))
                module.bias.copy_(theirs["classifier.bias"])
    return plain


def shaken(model):
    """The model with BatchNorm parameters that are not their initial ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("bn, width", [("universal", w) for w in (0.25, 0.3, 0.55, 1.0)] + [("switchable", w) for w in (0.25, 0.75)])
def test_logits_equal_those_of_an_ordinary_mobilenet_given_the_sliced_weights(bn, width):
    torch.manual_seed(0)
    model, x = shaken(SlimmableMobileNetV1(10, bn=bn)), torch.randn(8, 3, 32, 32)
    plain = given_sliced_weights(model, width)
    torch.testing.assert_close(model(x, width), plain(x), rtol=1e-4, atol=1e-5)             # batch statistics
    model.calibrate([x, x.flip(0) * 2], [width])
    model.eval()
    torch.testing.assert_close(model(x, width), given_sliced_weights(model, width).eval()(x), rtol=1e-4, atol=1e-5)


def test_calibrated_statistics_equal_those_computed_directly_over_the_same_images():
    torch.manual_seed(0)
    model = shaken(SlimmableMobileNetV1(10))
    batches = [torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32) + 1, 3 * torch.randn(4, 3, 32, 32)]
    plain, seen = given_sliced_weights(model, 0.4), {}
    for module in plain:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0]))
    for x in batches:
        plain(x)
    model.calibrate(batches, [0.4])
    assert len(seen) == 27
    for norm, inputs in zip(model.norms["0_4"], seen.values()):
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)


def test_calibrated_statistics_are_replaced_by_the_next_calibration_and_forgotten_by_training_and_loading():
    torch.manual_seed(0)
    model, x = SlimmableMobileNetV1(10), torch.randn(8, 3, 32, 32)
    state = model.state_dict()
    model.calibrate([x], [0.5])
    once = model.norms["0_5"][3].running_mean.clone()
    model.calibrate([x * 5, x], [0.5])
    model.calibrate(iter([x]), [0.5])
    assert once.equal(model.norms["0_5"][3].running_mean)
    model(x, 0.25)                                         # in training mode, which a new model is in
    assert not model.norms                                 # stale as soon as the weights change
    model.calibrate([x])
    model.load_state_dict(state)                           # saved before any calibration
    assert not model.norms
    with pytest.raises(ValueError, match="at least one batch"):
        model.calibrate([])


def test_state_dict_restores_calibrated_widths_into_a_new_model():
    torch.manual_seed(0)
    model, x = SlimmableMobileNetV1(10), torch.randn(8, 3, 32, 32)
    model.calibrate([x], [0.25, 0.33])
    copied = SlimmableMobileNetV1(10)
    copied.load_state_dict(model.state_dict())
    for width in (0.25, 0.33):
        assert model.eval()(x, width).equal(copied.eval()(x, width))


@pytest.mark.parametrize("width", [0.2, 1.1, -1, math.nan])
def test_a_width_outside_the_trained_range_is_named(width):
    model = SlimmableMobileNetV1(10)
    for use in (lambda: model(torch.zeros(1, 3, 32, 32), width), lambda: model.calibrate([torch.zeros(2, 3, 32, 32)], [width])):
        with pytest.raises(ValueError, match=rf"width {float(width)} is outside the trained range \[0.25, 1.0\]"):
            use()
    assert not model.norms


def test_eval_mode_refuses_a_width_without_statistics():
    with pytest.raises(ValueError, match=r"width 0.5 has no BatchNorm statistics yet: call calibrate"):
        SlimmableMobileNetV1(10).eval()(torch.zeros(1, 3, 32, 32), 0.5)


def test_switchable_model_offers_its_widths_alone_and_keeps_their_statistics_apart():
    torch.manual_seed(0)
    model = SlimmableMobileNetV1(10, widths=(0.25, 0.5), bn="switchable")
    with pytest.raises(ValueError, match="width 0.3 was not trained"):
        model(torch.zeros(1, 3, 32, 32), 0.3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 3, 32, 32), 0.5)
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert changed == {f"norms.0_5.{i}.running_{s}" for i in range(27) for s in ("mean", "var")}


def test_a_smaller_width_trains_the_first_channels_alone():
    torch.manual_seed(0)
    model = SlimmableMobileNetV1(10)
    model(torch.randn(4, 3, 32, 32), 0.5).square().sum().backward()
    for conv, c in zip(model.convs, model.channels(0.5)):
        assert conv.weight.grad[:c].abs().sum() > 0 and conv.weight.grad[c:].abs().sum() == 0


@pytest.mark.parametrize("kwargs, message", [
    ({"widths": (0.5, 0.25)}, r"\[0.5, 0.25\]"), ({"widths": (0.5, 0.5)}, "ascend"), ({"widths": ()}, r"\[\]"),
    ({"widths": (0.0, 1.0)}, "0.0"), ({"widths": (0.5, 1.5)}, "1.5"), ({"widths": (0.5, math.nan)}, "nan"), ({"widths": ("half",)}, "'half'"),
    ({"bn": "batch"}, "'batch'"), ({"num_classes": 0}, "num_classes .* 0"), ({"num_classes": 2.5}, "num_classes .* 2.5")])
def test_slimmable_names_the_wrong_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SlimmableMobileNetV1(**kwargs)


# ------------------------------------------------------------------------------------------------------------ MSDNet


def test_msdnet_cost_equals_the_reference_table():
    model = MSDNet(100)
    assert [(s.macs, s.params) for s in model.sub_models()] == [
        (14_967_296, 433_876), (21_707_264, 531_604), (28_792_320, 529_280), (34_801_152, 627_728),
        (41_694_720, 733_088), (46_337_536, 725_248), (51_891_712, 853_984)]
    assert [s.name for s in model.sub_models()] == [f"exit-{k}" for k in range(1, 8)]
    assert sum(p.numel() for p in model.parameters()) == 3_067_960


@pytest.mark.parametrize("kwargs, scales, coarsest", [
    # 10 layers, one scale fewer after 4 and 8: per block 1, 2, 3, 4 layers; n = 8 12|16 20|24 (28) 14 18|22 26 (30) 15 19
    (dict(exits=4, base=1, step=1, step_mode="lin_grow", channels=8, growth=4), [3, 3, 2, 1], [48, 80, 72, 76]),
    # 2 layers, one scale fewer after the first: n = 3 4|(5) 2
    (dict(exits=2, base=1, step=1, channels=3, growth=1), [3, 2], [16, 8]),
    # 6 layers, after 2 and 4: per block 2 layers; n = 6 9 12|(15) 7 10|(13) 6 9
    (dict(exits=3, base=2, step=2, step_mode="even", channels=6, growth=3), [3, 2, 1], [48, 40, 36])])
def test_other_configurations_have_the_right_shapes_and_scale_reductions(kwargs, scales, coarsest):
    model, x, seen = MSDNet(7, **kwargs).eval(), torch.randn(2, 3, 32, 32), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append([tuple(z.shape) for z in out]))
    logits = model(x)
    assert [tuple(z.shape) for z in logits] == [(2, 7)] * kwargs["exits"]
    assert [len(maps) for maps in seen] == scales
    assert [maps[-1] for maps in seen] == [(2, c, 8, 8) for c in coarsest]
    for maps in seen:      # finer scales: double the pixels, half the channels
        assert [s[2] for s in maps] == [8 * 2**i for i in reversed(range(len(maps)))]
        assert [s[1] * s[2] for s in maps] == [maps[-1][1] * 8] * len(maps)


def test_an_exit_does_not_depend_on_later_blocks():
    torch.manual_seed(0)
    model, x = MSDNet(10, exits=4, base=1, step=1, channels=4, growth=2).eval(), torch.randn(3, 3, 32, 32)
    before = model(x)
    for k in reversed(range(4)):
        with torch.no_grad():
            for p in [*model.blocks[k].parameters(), *model.heads[k].parameters()]:
                p.normal_()
        after = model(x)
        assert all(a.equal(b) for a, b in zip(before[:k], after[:k])) and not before[k].equal(after[k])


def test_weights_start_as_published():
    torch.manual_seed(0)
    for model in (MSDNet(10), SlimmableMobileNetV1(10)):
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000):
            expected = math.sqrt(2 / (conv.kernel_size[0]**2 * conv.out_channels))
            assert conv.bias is None and conv.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert all(m.bias.count_nonzero() == 0 for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("kwargs, message", [({"exits": 0}, "exits must be a positive integer, got 0"), ({"growth": 1.5}, "growth .* 1.5"),
                                             ({"step_mode": "odd"}, "'odd'"), ({"num_classes": 0}, "num_classes .* 0")])
def test_msdnet_names_the_wrong_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MSDNet(**kwargs)


@pytest.mark.parametrize("arch", ["msdnet", "universal"])
@pytest.mark.parametrize("x, message", [
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"torch.uint8 \(2, 3, 32, 32\)"), (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
    (torch.zeros(2, 1, 32, 32), r"\(2, 1, 32, 32\)"), ([[0.5]], "list")])
def test_networks_name_what_is_no_batch_of_images(arch, x, message):
    with pytest.raises(TypeError, match=message):
        tiny_model(arch)(x, *([0.1] if arch == "universal" else []))


# ---------------------------------------------------------------------------------------------------------- training


def tiny_model(arch):
    torch.manual_seed(0)
    if arch == "msdnet":
        return MSDNet(10, exits=3, base=1, step=1, channels=4, growth=2)
    return SlimmableMobileNetV1(10, widths=(0.05, 0.1, 0.15), bn=arch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["msdnet", "universal", "switchable"])
def test_gradients_of_a_step_are_those_of_the_whole_loss_at_once(arch, method):
    model, x, y = tiny_model(arch), torch.randn(8, 3, 32, 32), torch.arange(8)
    cfg = SimpleNamespace(method=method, temperature=2.0, amp="off")
    passes = model.training_passes(lambda low, high: sandwich_widths(4, low, high, torch.Generator().manual_seed(3)))
    assert len(passes) == {"msdnet": 1, "universal": 4, "switchable": 3}[arch]
    logits = [z for _, forward in reversed(passes) for z in forward(x)]          # smallest sub-model first
    whole = ipkd_ta_loss(logits, y, method, 0.5, 2.0)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    model = tiny_model(arch)
    loss, _ = ipkd_ta.train_step(model, x, y, cfg, 0.5, torch.amp.GradScaler(enabled=False), torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, whole)
    for p, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)


def test_only_one_widths_activations_are_alive_at_a_time():
    model, alive, most = tiny_model("switchable"), set(), []

    def pack(tensor):
        class Saved:
            pass
        saved = Saved()
        saved.tensor = tensor
        alive.add(id(saved))
        most.append(len(alive))
        weakref.finalize(saved, alive.discard, id(saved))
        return saved

    def most_saved(step):
        alive.clear(), most.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            step()
        return max(most)

    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    cfg = SimpleNamespace(method="ipkd-ta", temperature=1.0, amp="off")
    largest_alone = most_saved(lambda: ipkd_ta_loss([model(x, 0.15)], y).backward())
    whole_step = most_saved(lambda: ipkd_ta.train_step(model, x, y, cfg, 0.5, torch.amp.GradScaler(enabled=False), None))
    assert whole_step < 1.2 * largest_alone


def test_learning_rate_schedules():
    factor = ipkd_ta.lr_factor
    assert [factor("multistep", p) for p in (0, 0.49, 0.5, 0.74, 0.75, 0.99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [factor("cosine", p) for p in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])
    assert [factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [ipkd_ta.ramp(p, 0.5) for p in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 1] and ipkd_ta.ramp(0, 0) == 1


def test_kd_weight_and_learning_rate_follow_the_options(tmp_path):
    run("--out", tmp_path, *TINY["msdnet"], "--epochs", 4, "--train-size", 32, "--batch-size", 32, "--lr", 0.2, "--schedule", "linear",
        "--lr-warmup", 0, "--kd-weight", 0.8, "--kd-warmup", 0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines] == [1, 2, 3, 4]
    assert [r["lr"] for r in lines] == pytest.approx([0.175, 0.125, 0.075, 0.025])       # of the middle of each step
    assert [r["kd_weight"] for r in lines] == pytest.approx([0.2, 0.6, 0.8, 0.8])


def test_eval_every_evaluates_each_nth_and_the_last_epoch_and_changes_no_weight(tmp_path, capsys):
    for name, every in (("each", 1), ("second", 2)):
        assert run("--out", tmp_path / name, *TINY["slimmable"], *QUICK, "--epochs", 3, "--eval-every", every) == 0
    each, second = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("each", "second"))
    assert ["top1" in r for r in each] == [True] * 3 and ["top1" in r for r in second] == [False, True, True]
    assert each[1:] == second[1:] and results(tmp_path / "each")["sub_models"] == results(tmp_path / "second")["sub_models"]
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch") and "top-1" not in line]) == 1


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_trains_and_writes_its_files(arch, method, tmp_path, capfd):
    assert run("--out", tmp_path, "--method", method, *TINY[arch], *QUICK) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "config.json", "metrics.jsonl", "results.json"]
    out, err = capfd.readouterr()
    epoch_line, header, *rows = out.splitlines()[3:]
    subs = results(tmp_path)["sub_models"]
    assert re.fullmatch(rf"epoch 1/1  lr \d\.\d+  loss \d+\.\d+  \d+ images/s  top-1 {subs[0]['name']} \d+\.\d+ %, "
                        rf"{subs[-1]['name']} \d+\.\d+ %", epoch_line)
    assert header.split() == ["sub-model", "MMACs", "params", "top-1", "%", "top-5", "%", "loss"]
    assert [row.split()[0] for row in rows] == [s["name"] for s in subs] and len({len(line) for line in [header, *rows]}) == 1
    assert err == ""                                       # not a terminal: no progress line
    assert all(set(s) == {"name", "macs", "params", "top1", "top5", "loss"} for s in subs)
    assert [s["macs"] for s in subs] == sorted(s["macs"] for s in subs)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == results(tmp_path)["config"] and (config["method"], config["train_size"]) == (method, 40)


@pytest.mark.parametrize("arch", TINY)
def test_same_seed_gives_bit_identical_results_and_another_seed_does_not(arch, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--out", tmp_path / name, "--seed", seed, *TINY[arch], *QUICK)
    a, b, c = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in "abc")
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a) and not all(a[k].equal(c[k]) for k in a)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_training_learns_what_it_is_shown():
    data = ipkd_ta.load_data("shapes", None, 64)
    model = tiny_model("msdnet")
    cfg = training_options(epochs=12, schedule="cosine", lr_warmup=0.1, kd_warmup=1.0)
    shares = []
    losses = [record["loss"] for record, speed in ipkd_ta.train(ipkd_ta.Trainer(model, data, cfg), shares.append)]
    assert losses[-1] < 0.6 * losses[0]
    assert shares == sorted(shares) and len(shares) == 48 and 0 < shares[0] and shares[-1] < 1


@pytest.mark.parametrize("arch", ["msdnet", "universal"])
@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_computes_in_half_and_keeps_float32_weights_and_loss(arch, amp, dtype):
    model, cfg = tiny_model(arch), SimpleNamespace(method="ipkd-ta", temperature=1.0, amp=amp)
    passes, seen = model.training_passes, []
    model.training_passes = lambda draw: [(names, lambda x, f=f: [seen.append(z.dtype) or z for z in f(x)]) for names, f in passes(draw)]
    loss, _ = ipkd_ta.train_step(model, torch.randn(4, 3, 32, 32), torch.arange(4), cfg, 0.5, torch.amp.GradScaler(enabled=False), None)
    assert set(seen) == {dtype} and loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(amp, tmp_path):
    assert run("--out", tmp_path, "--amp", amp, *TINY["msdnet"], *QUICK) == 0
    assert all(math.isfinite(s["loss"]) for s in results(tmp_path)["sub_models"])


def training_options(**changes):
    return SimpleNamespace(**{**dict(seed=0, lr=0.1, batch_size=16, epochs=1, schedule="linear", lr_warmup=0, kd_weight=0.5, kd_warmup=0,
                                     temperature=1.0, method="ipkd-ta", amp="off"), **changes})


def test_a_training_step_is_sgd_with_nesterov_momentum_and_weight_decay_on_the_augmented_batch():
    data, model, reference = ipkd_ta.load_data("shapes", None, 12), tiny_model("msdnet"), tiny_model("msdnet")
    (record, _), = ipkd_ta.train(ipkd_ta.Trainer(model, data, training_options()), lambda share: None)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    images = data.normalise(ipkd_ta.augment(data.train_images[order], torch.Generator().manual_seed(0)))
    loss = ipkd_ta_loss(reference(images), data.train_labels[order])
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5) and record["lr"] == pytest.approx(0.05)
    for after, before, gradient in zip(model.parameters(), reference.parameters(), gradients):
        torch.testing.assert_close(after, before - 0.05 * 1.9 * (gradient + 1e-4 * before), rtol=1e-3, atol=1e-5)


def test_the_loss_of_an_epoch_is_the_mean_over_images(monkeypatch):
    data, losses = ipkd_ta.load_data("shapes", None, 12), iter([1.0, 4.0])
    monkeypatch.setattr(ipkd_ta, "train_step", lambda *args: (torch.tensor(next(losses)), {}))
    trainer = ipkd_ta.Trainer(tiny_model("msdnet"), data, training_options(batch_size=8))
    assert next(ipkd_ta.train(trainer, lambda share: None))[0]["loss"] == pytest.approx((8 * 1 + 4 * 4) / 12)


@pytest.mark.parametrize("looked_at", ["every step", "the end of the epoch"])           # as on the CPU, and as on a GPU
@pytest.mark.parametrize("arch, name", [("msdnet", "exit-3"), ("universal", "width-0.12"), ("switchable", "width-0.1")])
def test_a_loss_that_is_not_finite_is_told_with_epoch_step_learning_rate_and_sub_model(arch, name, looked_at, monkeypatch):
    model, calls = tiny_model(arch), []
    trainer = ipkd_ta.Trainer(model, ipkd_ta.load_data("shapes", None, 12), training_options(batch_size=4, epochs=2))
    passes, check = model.training_passes, trainer.check

    def spoiled(draw):
        now = (trainer.epoch, trainer.steps) == (1, 1)
        spoil = lambda logits, names: [z * math.nan if now and n == name else z for z, n in zip(logits, names)]
        return [(names, lambda x, names=names, f=f: spoil(f(x), names)) for names, f in passes(draw)]
    monkeypatch.setattr(ipkd_ta, "sandwich_widths", lambda *args: [0.15, 0.12, 0.08, 0.05])
    model.training_passes = spoiled
    if looked_at != "every step":
        trainer.check = lambda: calls.append(1) or len(calls) % 4 or check()         # an epoch has 3 steps and an end
    epochs = ipkd_ta.train(trainer, lambda share: None)
    assert math.isfinite(next(epochs)[0]["loss"])
    with pytest.raises(InputError) as error:
        next(epochs)
    assert str(error.value) == (f"diverged: in step 2 of epoch 2, at learning rate 0.025, the loss of {name} is not finite; "
                                "try a lower --lr than 0.1")
    assert trainer.steps == (2 if looked_at == "every step" else 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("arch", ["msdnet", "universal"])
def test_a_training_step_never_waits_for_the_gpu(arch):
    data = ipkd_ta.load_data("shapes", None, 64).to("cuda")
    trainer = ipkd_ta.Trainer(tiny_model(arch).cuda(), data, training_options(amp="bf16"))
    first, *batches = torch.arange(64, device="cuda").split(16)
    trainer.step(first, progress=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            trainer.step(batch, progress=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_amp_auto_is_off_on_the_cpu():
    assert ipkd_ta.pick_amp("auto", torch.device("cpu")) == "off" and ipkd_ta.pick_amp("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_amp_auto_takes_bf16_on_cuda_where_it_is_native_and_fp16_elsewhere(has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert ipkd_ta.pick_amp("auto", torch.device("cuda")) == ("bf16" if has_bf16 else "fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("amp", ["auto", "off", "bf16", "fp16"])
def test_cuda_trains_and_evaluates(arch, amp, tmp_path):
    assert run("--out", tmp_path, "--device", "cuda", "--amp", amp, *TINY[arch], *QUICK) == 0
    assert all(math.isfinite(s["loss"]) for s in results(tmp_path)["sub_models"])


@pytest.mark.parametrize("begun, left", [(0, "30:00:00"), (0.2, "150:00:00")])          # resumed: 5 % took ten hours
def test_a_terminal_sees_a_live_line_with_the_time_left_and_a_file_nothing(begun, left, monkeypatch, capsys):
    clock = iter([0.0, 0.1, 36_000.0])
    monkeypatch.setattr(ipkd_ta.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = ipkd_ta.Progress(begun)
    progress(0.21)                               # too soon after the last line
    assert capsys.readouterr().err == ""
    progress(0.25)
    assert capsys.readouterr().err == "\r\x1b[K 25.0% done, " + left + " left"
    progress.clear()
    assert capsys.readouterr().err == "\r\x1b[K"


# -------------------------------------------------------------------------------------------------------------- data


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_augments_as_the_cpu_does():
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
    expected = ipkd_ta.augment(images, torch.Generator().manual_seed(0))
    assert ipkd_ta.augment(images.cuda(), torch.Generator().manual_seed(0)).cpu().equal(expected)


def test_augmented_images_are_shifted_by_at_most_4_zero_padded_pixels_and_flipped_in_half_of_the_cases():
    images = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = ipkd_ta.augment(images, torch.Generator().manual_seed(0))
    seen = []
    for image, result in zip(images, batch):
        padded = F.pad(image, (4, 4, 4, 4))
        seen += [(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in (False, True)
                 if result.equal(padded[:, dy:dy + 32, dx:dx + 32].flip(2) if flip else padded[:, dy:dy + 32, dx:dx + 32])]
    assert len(seen) == len(images)
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(9)) and 15 < sum(s[2] for s in seen) < 45


def test_normalised_training_images_have_zero_mean_and_unit_variance():
    data = ipkd_ta.load_data("shapes", None, 500)
    x = data.normalise(data.train_images)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_shapes_are_the_same_at_every_call_balanced_and_not_shared_between_splits():
    data, again = ipkd_ta.load_data("shapes", None, 200), ipkd_ta.load_data("shapes", None, 200)
    assert data.train_images.equal(again.train_images) and data.train_images.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [20] * 10 and data.test_labels.bincount().tolist() == [5] * 10
    assert len(data.train_images.flatten(1).unique(dim=0)) == 200
    assert not (data.train_images[:, None] == data.test_images).flatten(2).all(2).any()


def write_cifar(root, name, monkeypatch):
    """A small CIFAR in its own on-disk format, with its checksums made known to torchvision; all images and labels."""
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder, fine = Path(root) / cls.base_folder, name == "cifar100"
    folder.mkdir(parents=True)
    generator, images, labels = torch.Generator().manual_seed(0), {}, {}
    classes = 100 if fine else 10

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    for split, files in (("train_list", cls.train_list), ("test_list", cls.test_list)):
        entries, images[split], labels[split] = [], [], []
        for file, _ in files:
            pixels = torch.randint(256, (8, 3072), dtype=torch.uint8, generator=generator)
            target = torch.randint(classes, (8,), generator=generator).tolist()
            entries.append(write(file, {"data": pixels.numpy(), "fine_labels" if fine else "labels": target}))
            images[split].append(pixels.view(8, 3, 32, 32))
            labels[split] += target
        monkeypatch.setattr(cls, split, entries)
    file, md5 = write(cls.meta["filename"], {cls.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    monkeypatch.setattr(cls, "url", "http://127.0.0.1:9/none")              # a port where nothing answers
    return [torch.cat(images[s]) for s in images], list(labels.values()), cls


@pytest.mark.parametrize("name, n", [("cifar10", 40), ("cifar100", 8)])
def test_cifar_is_read_from_its_own_format(name, n, tmp_path, monkeypatch):
    images, labels, cls = write_cifar(tmp_path, name, monkeypatch)
    data = ipkd_ta.load_data(name, tmp_path)
    assert len(data.train_images) == n and data.train_images.equal(images[0]) and data.test_images.equal(images[1])
    assert [data.train_labels.tolist(), data.test_labels.tolist()] == labels
    assert data.classes[-1] == ("class 9" if name == "cifar10" else "class 99")
    assert data.mean.tolist() == pytest.approx([0.4914, 0.4824, 0.4467] if name == "cifar10" else [0.5071, 0.4867, 0.4408])
    assert data.std.tolist() == pytest.approx([0.2471, 0.2435, 0.2616] if name == "cifar10" else [0.2675, 0.2565, 0.2761])
    assert run("--dataset", name, "--data-dir", tmp_path, "--out", tmp_path / "run", *TINY["msdnet"], "--epochs", 1) == 0


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_or_damaged_cifar_without_network_is_one_clear_error(name, tmp_path, monkeypatch):
    _, _, cls = write_cifar(tmp_path / "damaged", name, monkeypatch)
    file = tmp_path / "damaged" / cls.base_folder / cls.test_list[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    for directory in (tmp_path / "damaged", tmp_path / "nothing"):
        with pytest.raises(InputError) as error:
            ipkd_ta.load_data(name, directory)
        for part in (name, str(directory), cls.filename, "https://www.cs.toronto.edu/~kriz/cifar.html"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


def write_images(root, splits=("train", "test"), classes=("cat", "dog"), n=4, size=(32, 32), suffix="png", mode="RGB"):
    to_image = v2.ToPILImage()
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
                to_image(pixels).convert(mode).save(root / split / c / f"{i} ä.{suffix}")
    return root


def test_folder_gives_images_and_labels_in_the_order_of_the_names(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train/cat/.hidden").write_text("not an image")
    (tmp_path / "train/.hidden").mkdir()
    data = ipkd_ta.load_data("folder", tmp_path)
    assert data.classes == ["cat", "dog"] and data.train_labels.tolist() == [0] * 4 + [1] * 4
    read = lambda path: v2.functional.pil_to_tensor(default_loader(str(path)))
    expected = torch.stack([read(p) for c in data.classes for p in sorted((tmp_path / "test" / c).iterdir())])
    assert data.test_images.equal(expected)
    pixels = data.train_images.double().div(255)
    torch.testing.assert_close(data.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.std.double(), pixels.std((0, 2, 3), unbiased=False), rtol=1e-6, atol=0)


@pytest.mark.parametrize("suffix, mode, size", [("jpg", "L", (48, 20)), ("png", "RGBA", (7, 7)), ("gif", "P", (32, 32)), ("bmp", "RGB", (64, 64)),
                                                ("jpg", "CMYK", (32, 32)), ("webp", "RGB", (1, 1))])
def test_folder_reads_other_formats_sizes_and_val_instead_of_test(suffix, mode, size, tmp_path):
    data = ipkd_ta.load_data("folder", write_images(tmp_path, splits=("train", "val"), suffix=suffix, mode=mode, size=size))
    assert data.train_images.shape == data.test_images.shape == (8, 3, 32, 32)


def wrong_folder(kind, root):
    if kind != "no such folder":
        write_images(root)
    if kind == "no test split":
        os.rename(root / "test", root / "elsewhere")
        return "has no folder 'val'"
    if kind == "empty class":
        for p in (root / "train/dog").iterdir():
            p.unlink()
        return "dog"
    if kind == "no class":
        os.rename(root / "test", root / "old")
        (root / "test").mkdir()
        return "class"
    if kind == "classes differ":
        write_images(root, splits=["test"], classes=["mouse"])
        return "mouse"
    if kind == "undecodable":
        (root / "test/cat/broken.jpg").write_bytes(b"no image")
        return "broken.jpg"
    if kind == "truncated":
        file = root / "train/dog/0 ä.png"
        file.write_bytes(file.read_bytes()[:-1000])
        return "0 ä.png"
    return "has no folder 'train'"


@pytest.mark.parametrize("kind", ["no such folder", "no test split", "empty class", "no class", "classes differ", "undecodable", "truncated"])
def test_wrong_folders_are_one_clear_line_and_status_2(kind, tmp_path, capfd):
    message = wrong_folder(kind, tmp_path / "images")
    assert run("--dataset", "folder", "--data-dir", tmp_path / "images", "--out", tmp_path / "out", *QUICK) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and str(tmp_path / "images") in err


def one_image(root, name, write):
    """A folder data set of two classes and an image each, of which the first is made by write(path)."""
    write_images(root, n=1)
    path = root / "train/cat" / name
    (root / "train/cat/0 ä.png").unlink()
    write(path)
    return path


@pytest.mark.parametrize("name, write, pixel", [
    ("one pixel.png", lambda path: Image.new("RGB", (1, 1), (9, 99, 199)).save(path), (9, 99, 199)),
    ("übers Eck.png", lambda path: Image.new("RGB", (40, 3), (9, 99, 199)).save(path), (9, 99, 199)),
    ("16 bit.png", lambda path: Image.new("I;16", (8, 8), 30_000).save(path), (116, 116, 116)),
    ("16 bit.tiff", lambda path: Image.new("I;16", (8, 8), 65_535).save(path), (255, 255, 255)),
    ("ink.jpg", lambda path: Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path), (255, 0, 0)),
    ("animated.gif", lambda path: Image.new("RGB", (8, 8), (250, 0, 0)).save(
        path, save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 250))]), (250, 0, 0)),
    ("palette.png", lambda path: Image.new("RGB", (8, 8), (9, 99, 199)).quantize(4).save(path, transparency=b"\x00\x80"), (9, 99, 199))])
def test_an_unusual_image_loads_with_its_colours_and_without_a_warning(name, write, pixel, tmp_path, recwarn):
    one_image(tmp_path, name, write)
    image = ipkd_ta.load_data("folder", tmp_path).train_images[0]
    assert (image.int() - torch.tensor(pixel).view(3, 1, 1)).abs().max() <= 1 and not recwarn.list


def bitmap_header(side):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("name, write, message", [
    ("zero bytes.png", lambda path: path.write_bytes(b""), "cannot identify"),
    ("bomb.bmp", lambda path: path.write_bytes(bitmap_header(20_000)), "decompression bomb"),
    ("half a bomb, cut off.bmp", lambda path: path.write_bytes(bitmap_header(10_000)), "truncated"),
    ("32 bit.tiff", lambda path: Image.new("I", (8, 8), 100_000).save(path), "mode I"),
    ("link to itself.png", lambda path: path.symlink_to(path), "not a file"),
    ("link to nowhere.png", lambda path: path.symlink_to(path.parent / "nowhere"), "not a file"),
    ("link to its folder", lambda path: path.symlink_to(path.parent, target_is_directory=True), "not a file"),
    ("link to the root", lambda path: path.symlink_to(path.parents[2], target_is_directory=True), "not a file"),
    ("pipe.png", os.mkfifo, "not a file")])
def test_an_impossible_image_is_named_in_one_line(name, write, message, tmp_path, recwarn, capfd):
    path = one_image(tmp_path / "images", name, write)
    assert run("--dataset", "folder", "--data-dir", tmp_path / "images", "--out", tmp_path / "out", *QUICK) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and f"cannot decode image '{path}' (" in err and message in err
    assert not recwarn.list and not (tmp_path / "out").exists()


def test_train_size_takes_the_same_images_at_every_call_and_no_more_than_there_are(tmp_path):
    write_images(tmp_path)
    a, b = (ipkd_ta.load_data("folder", tmp_path, 5) for _ in range(2))
    assert len(a.train_images) == 5 and a.train_images.equal(b.train_images) and len(a.test_images) == 8
    with pytest.raises(InputError, match="9 training images were asked for, and folder has 8"):
        ipkd_ta.load_data("folder", tmp_path, 9)
    assert run("--dataset", "folder", "--data-dir", tmp_path, "--train-size", 9, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("IPKD_TA_IMAGES" not in os.environ, reason="needs real images: set IPKD_TA_IMAGES to their directory")
@pytest.mark.parametrize("arch", TINY)
def test_real_images_train(arch, tmp_path):
    assert run("--dataset", "folder", "--data-dir", os.environ["IPKD_TA_IMAGES"], "--out", tmp_path, *TINY[arch], *QUICK) == 0


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_counts_top1_top5_and_loss():
    generator = torch.Generator().manual_seed(0)
    labels, logits = torch.randint(10, (33,), generator=generator), torch.randn(2, 33, 10, generator=generator)
    model = nn.Module()
    model.forward = lambda x: [z[x.long()] for z in logits]
    data = SimpleNamespace(test_images=torch.arange(33), test_labels=labels, normalise=lambda x: x)
    found = ipkd_ta.evaluate(model, data, batch_size=10)
    for z, sub in zip(logits, found):
        rank = [sorted(row, reverse=True).index(row[y]) for row, y in zip(z.tolist(), labels.tolist())]
        assert sub["top1"] == pytest.approx(100 * sum(r == 0 for r in rank) / 33)
        assert sub["top5"] == pytest.approx(100 * sum(r < 5 for r in rank) / 33)
        assert sub["loss"] == pytest.approx(F.cross_entropy(z, labels).item(), rel=1e-5)
    assert len(found) == 2


def test_evaluation_takes_the_logits_of_each_width():
    data = ipkd_ta.load_data("shapes", None, 60)
    model = SlimmableMobileNetV1(10, widths=(0.05, 0.1)).to(memory_format=torch.channels_last)
    model.calibrate(ipkd_ta.calibration_batches(data))
    model.eval()
    for width, sub in zip(model.widths, ipkd_ta.evaluate(model, data)):
        with torch.no_grad():
            logits = model(data.normalise(data.test_images), width)
        assert sub["loss"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories of a tiny run of each kind."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipkd_ta, "SHAPES_TEST", 50)
        images = write_images(root / "images", n=150, size=(8, 8))
        everything = ["--dataset", "folder", "--data-dir", images, *TINY["slimmable"], "--batch-size", "64", "--epochs", "1"]
        assert run("--out", root / "all images", *everything) == 0
        for name, options in {**TINY, "switchable": [*TINY["slimmable"], "--bn", "switchable"]}.items():
            assert run("--out", root / name, *QUICK, *options) == 0
    return root


@pytest.mark.parametrize("name", ["msdnet", "slimmable", "switchable", "all images"])
def test_eval_repeats_the_results_of_the_run(name, trained, tmp_path, capsys):
    assert run("--eval", trained / name / "checkpoint.pt", "--out", tmp_path) == 0
    assert results(tmp_path)["sub_models"] == results(trained / name)["sub_models"]
    assert capsys.readouterr().out.strip() == ipkd_ta.results_table(results(tmp_path)["sub_models"])


def test_eval_takes_any_width_of_a_universal_model(trained, tmp_path):
    assert run("--eval", trained / "slimmable/checkpoint.pt", "--out", tmp_path, "--widths", 0.12, 0.07) == 0
    assert [s["name"] for s in results(tmp_path)["sub_models"]] == ["width-0.07", "width-0.12"]
    assert run("--eval", trained / "switchable/checkpoint.pt", "--out", tmp_path, "--overwrite", "--widths", 0.1) == 0
    assert results(tmp_path)["sub_models"] == results(trained / "switchable")["sub_models"][1:2]


@pytest.mark.parametrize("name, options, message", [
    ("slimmable", ["--widths", "0.5"], "width 0.5 is outside the trained range [0.05, 0.15]"),
    ("switchable", ["--widths", "0.12"], "width 0.12 was not trained"),
    ("msdnet", ["--widths", "0.1"], "--widths is an option of --arch slimmable"),
    ("msdnet", ["--lr", "0.1"], "--lr has no meaning with --eval")])
def test_eval_refuses_what_the_checkpoint_does_not_offer(name, options, message, trained, capsys):
    assert run("--eval", trained / name / "checkpoint.pt", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["missing", "garbage", "truncated", "foreign", "code", "other network", "no widths"])
def test_eval_refuses_a_file_that_is_no_checkpoint_and_runs_no_code_from_it(content, trained, tmp_path, capsys):
    file, good = tmp_path / "checkpoint.pt", trained / "msdnet/checkpoint.pt"
    if content == "garbage":
        file.write_bytes(bytes(range(256)) * 10)
    elif content == "truncated":
        file.write_bytes(good.read_bytes()[:-5000])
    elif content == "foreign":
        torch.save({"model": {}}, file)
    elif content == "code":
        class Bomb:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "executed",))
        torch.save({"model": Bomb()}, file)
    elif content == "other network":
        checkpoint = torch.load(good, weights_only=True)
        checkpoint["config"]["channels"] = 6
        torch.save(checkpoint, file)
    elif content == "no widths":
        checkpoint = torch.load(trained / "slimmable/checkpoint.pt", weights_only=True)
        checkpoint["config"]["widths"] = 3
        torch.save(checkpoint, file)
    assert run("--eval", file) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(file) in err and not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("options, message", [
    (["--exits", "3", "--arch", "slimmable"], "--exits is an option of --arch msdnet: it has no meaning for --arch slimmable"),
    (["--widths", "0.5", "--arch", "msdnet"], "--widths is an option of --arch slimmable"),
    (["--bn", "switchable"], "--bn is an option of --arch slimmable"),
    (["--arch", "slimmable", "--widths", "0.5", "0.25"], "widths must ascend within (0, 1], got [0.5, 0.25]"),
    (["--arch", "slimmable", "--widths", "0"], "above 0 and at most 1, got '0'"),
    (["--arch", "slimmable", "--widths", "0.5", "0.5"], "widths must ascend within (0, 1], got [0.5, 0.5]"),
    (["--arch", "slimmable", "--widths", "0.5", "1.5"], "above 0 and at most 1, got '1.5'"),
    (["--arch", "slimmable", "--widths", "nan"], "above 0 and at most 1, got 'nan'"),
    (["--arch", "resnet"], "resnet"), (["--batch-size", "0"], "at least 1 and at most 2147483647, got '0'"), (["--epochs", "1.5"], "whole number"),
    (["--lr", "-1"], "above 0, got '-1'"), (["--lr", "0"], "above 0, got '0'"), (["--lr", "nan"], "nan"), (["--lr", "inf"], "inf"),
    (["--kd-weight", "1.5"], "at least 0 and at most 1, got '1.5'"), (["--kd-weight", "-0.1"], "'-0.1'"), (["--kd-weight", "nan"], "nan"),
    (["--kd-warmup", "-0.1"], "at least 0"), (["--lr-warmup", "nan"], "nan"), (["--temperature", "0"], "at least 0.001"),
    (["--temperature", "-1"], "'-1'"), (["--temperature", "nan"], "nan"), (["--temperature", "inf"], "inf"), (["--seed", "-1"], "at least 0"),
    (["--checkpoint-every", "nan"], "nan"), (["--checkpoint-every", "inf"], "inf"), (["--exits", "0"], "at least 1 and at most 2147483647, got '0'"),
    (["--device", "abacus"], "abacus"), (["--device", "meta"], "meta"), (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
    (["--train-size", "0"], "at least 1"), (["--train-size", "9" * 20], "at most"), (["--nonsense"], "--nonsense"), (["--epoch", "1"], "--epoch"),
    (["--report", "nowhere"], "no results.json of a run below nowhere")])
def test_wrong_options_are_one_clear_line_and_status_2(options, message, tmp_path, capfd):
    mode = [] if "--report" in options else ["--out", tmp_path / "out"]
    assert run(*options, *mode) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ipkd_ta.py: error: ") and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent_is_a_clear_error(tmp_path, capsys):
    assert run("--device", "cuda", "--out", tmp_path) == 2
    assert "--device cuda cannot be used here" in capsys.readouterr().err


def test_a_process_ends_with_status_2_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, "ipkd_ta.py", "--exits", "3", "--arch", "slimmable"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_help_gives_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    text = " ".join(capsys.readouterr().out.split())
    _, defaults = ipkd_ta.build_parser()
    assert end.value.code == 0
    for name in defaults:
        assert re.search(rf"--{name.replace('_', '-')}\b[^()]*(\([^()]*\)[^()]*)*\(default: [^)]+\)", text), name
    assert len(defaults) > 20


@pytest.mark.parametrize("option", [["--plot", "a.svg"], ["--export", "a.pt2"], ["--sub-model", "exit-1"], ["--fold-bn"], ["--kd-warmup", "1"]])
def test_the_benchmark_refuses_what_it_would_not_do(option, capsys):
    assert run("--benchmark", *option) == 2
    assert f"{option[0]} has no meaning with --benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["cifar10", "shapes"])
@pytest.mark.parametrize("arch, kd_weight", [("msdnet", 0.5), ("slimmable", 0.9)])
def test_each_family_has_distillation_defaults_of_its_own_and_the_command_line_wins(arch, dataset, kd_weight):
    options = lambda *more: ipkd_ta.settle(*ipkd_ta.parse(["--arch", arch, "--dataset", dataset, *more]))
    cfg = options()
    assert (cfg.kd_weight, cfg.temperature, cfg.kd_warmup) == (kd_weight, 1, 1)
    cfg = options("--kd-weight", "0", "--temperature", "2", "--epochs", "7", "--schedule", "linear")
    assert (cfg.kd_weight, cfg.temperature, cfg.epochs, cfg.schedule) == (0, 2, 7, "linear")


def test_a_run_is_never_overwritten_unasked(trained, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in (trained / "msdnet").iterdir()}
    assert run("--out", trained / "msdnet", *TINY["msdnet"], *QUICK) == 2
    assert "already holds" in capsys.readouterr().err and before == {p.name: p.read_bytes() for p in (trained / "msdnet").iterdir()}
    assert run("--eval", trained / "msdnet/checkpoint.pt", "--out", trained / "msdnet") == 2
    run("--out", tmp_path, "--seed", 1, *TINY["msdnet"], *QUICK)
    assert run("--out", tmp_path, "--seed", 2, "--overwrite", *TINY["msdnet"], *QUICK) == 0
    assert results(tmp_path)["config"]["seed"] == 2


def test_without_out_every_run_finds_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(*TINY["msdnet"], *QUICK) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["msdnet-shapes-ipkd-ta-seed0", "msdnet-shapes-ipkd-ta-seed0-2"]


@pytest.mark.parametrize("mode", [[], ["--resume"]])
def test_an_out_that_is_a_file_is_a_clear_error(mode, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(*mode, "--out", tmp_path / "file") == 2
    assert f"--out '{tmp_path / 'file'}'" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------------- report


def write_result(root, method, seed, top1, **config):
    directory = root / f"{method}-{seed}-{len(list(root.iterdir()))}"
    directory.mkdir()
    config = {"arch": "msdnet", "dataset": "cifar10", "method": method, "seed": seed, "epochs": 300, "train_size": 50000, "lr": 0.1, **config}
    subs = [{"name": f"exit-{k}", "macs": k * 10**6, "params": k * 1000, "top1": t, "top5": 99.0, "loss": 0.5} for k, t in enumerate(top1, 1)]
    (directory / "results.json").write_text(json.dumps({"config": config, "sub_models": subs}))


def test_report_puts_methods_side_by_side_with_mean_and_deviation_over_seeds(tmp_path, capsys):
    for seed, (ce, ta) in enumerate([(90.0, 91.0), (91.0, 91.5), (92.0, 92.6)]):
        write_result(tmp_path, "ce", seed, [ce, ce + 1])
        write_result(tmp_path, "ipkd-ta", seed, [ta, ta + 2])
    write_result(tmp_path, "ipkd", 0, [89.0, 90.0])
    (tmp_path / "again").mkdir()                                        # by --eval: no run of its own
    (tmp_path / "again/results.json").write_text(json.dumps({**results(tmp_path / "ce-0-0"), "evaluated": "checkpoint.pt"}))
    assert run("--report", tmp_path, tmp_path / "ce-0-0") == 0          # a run named twice counts once
    assert capsys.readouterr().out.strip().splitlines() == [
        "### msdnet on cifar10", "", "300 epochs of 50,000 images; top-1 in %", "",
        "| sub-model | MMACs | params | ce (3 runs) | ipkd (1 run) | ipkd-ta (3 runs) |", "|---|---:|---:|---:|---:|---:|",
        "| exit-1 | 1.00 | 1,000 | 91.00 ± 1.00 | 89.00 | 91.70 ± 0.82 |", "| exit-2 | 2.00 | 2,000 | 92.00 ± 1.00 | 90.00 | 93.70 ± 0.82 |",
        "", "Differences between runs of the same seed, mean ± standard error:", "",
        "| sub-model | ipkd-ta − ce (3 pairs) | ipkd-ta − ipkd (1 pair) |", "|---|---:|---:|",       # 1, 0.5, 0.6; 2, 1.5, 1.6
        "| exit-1 | +0.70 ± 0.15 | +2.00 |", "| exit-2 | +1.70 ± 0.15 | +3.00 |", "| mean of all | +1.20 ± 0.15 | +2.50 |"]


def test_report_pairs_runs_by_seed_and_has_no_differences_without_a_pair(tmp_path, capsys):
    for seed, top1 in ((0, 90.0), (1, 80.0)):
        write_result(tmp_path, "ipkd-ta", seed, [top1])
    write_result(tmp_path, "ce", 2, [50.0])
    assert run("--report", tmp_path) == 0 and "Differences" not in capsys.readouterr().out
    write_result(tmp_path, "ce", 1, [80.5])
    assert run("--report", tmp_path) == 0 and "| exit-1 | -0.50 |" in capsys.readouterr().out


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_plot_draws_a_panel_for_each_setting_and_a_line_for_each_method(suffix, start, tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure", lambda **kwargs: figures.append(figure(**kwargs)) or figures[0])
    for seed, (ce, ta) in enumerate([(90.0, 91.0), (92.0, 95.0)]):
        write_result(tmp_path, "ce", seed, [ce, ce + 1])
        write_result(tmp_path, "ipkd-ta", seed, [ta, ta + 2])
    write_result(tmp_path, "ipkd-mean", 0, [80.0], arch="slimmable")
    path = tmp_path / f"picture.{suffix}"
    assert run("--report", tmp_path, "--plot", path) == 0
    assert path.read_bytes().startswith(start) and "### msdnet on cifar10" in capsys.readouterr().out
    left, right = figures[0].axes
    assert left.get_title().startswith("msdnet") and right.get_title().startswith("slimmable")
    for axes, methods in ((left, ["ce (2 runs)", "ipkd-ta (2 runs)"]), (right, ["ipkd-mean (1 run)"])):
        assert axes.get_legend_handles_labels()[1] == methods and "MACs" in axes.get_xlabel() and "%" in axes.get_ylabel()
    line, _, (bars,) = left.containers[1]
    assert line.get_ydata().tolist() == [93, 95] and line.get_xdata() == pytest.approx([1, 2], rel=0.03)
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [pytest.approx([93 - 8**0.5, 93 + 8**0.5]),       # 91 and 95
                                                                          pytest.approx([95 - 8**0.5, 95 + 8**0.5])]


def test_panels_of_a_sweep_are_told_apart(tmp_path, monkeypatch):
    figure, figures = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr("matplotlib.figure.Figure", lambda **kwargs: figures.append(figure(**kwargs)) or figures[0])
    for lr in (0.1, 0.2):
        write_result(tmp_path, "ce", 0, [90.0], lr=lr)
    assert run("--report", tmp_path, "--plot", tmp_path / "p.svg") == 0
    assert [axes.get_title().split("images")[1] for axes in figures[0].axes] == [", lr 0.1", ", lr 0.2"]


def test_plot_that_cannot_be_is_a_clear_error(tmp_path, capsys, monkeypatch):
    write_result(tmp_path, "ce", 0, [90.0])
    assert run("--plot", tmp_path / "a.svg") == 2 and "--plot needs --report" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert run("--report", tmp_path, "--plot", tmp_path / "a.svg") == 2
        assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    for name in ("a.pixels", "a", "no/a.svg"):
        assert run("--report", tmp_path, "--plot", tmp_path / name) == 2
        assert (err := capsys.readouterr().err).count("\n") == 1 and str(tmp_path / name) in err
        assert not (tmp_path / name).exists() and not (tmp_path / f"{name}.tmp").exists()


def test_report_refuses_two_runs_of_one_setting_and_seed(tmp_path, capsys):
    write_result(tmp_path, "ce", 0, [90.0])
    write_result(tmp_path, "ce", 0, [91.0])
    assert run("--report", tmp_path) == 2
    assert "ce-0-0" in (err := capsys.readouterr().err) and "ce-0-1" in err


def test_report_never_averages_over_different_settings(tmp_path, capsys):
    write_result(tmp_path, "ce", 0, [90.0])
    write_result(tmp_path, "ce", 1, [50.0], lr=0.01)
    write_result(tmp_path, "ce", 2, [60.0, 61.0])
    write_result(tmp_path, "ce", 0, [40.0], dataset="cifar100")
    run("--report", tmp_path)
    out = capsys.readouterr().out
    assert out.count("### ") == 4 and out.count("(1 run)") == 4 and "lr 0.01" in out and "lr 0.1;" in out


SOUND = {"config": {"arch": "msdnet", "dataset": "cifar10", "method": "ce", "seed": 0, "epochs": 3, "train_size": 9},
         "sub_models": [{"name": "exit-1", "macs": 1, "params": 1, "top1": 50.0}]}


@pytest.mark.parametrize("content, reason", [
    (b"", ""), (b"\xff\xfe", ""), (b"[" * 100_000, ""), (b"[]", ""), ({"config": 3}, ""), ({"sub_models": []}, "no sub-models"),
    ({"sub_models": {"name": "exit-1"}}, ""), ({"config": {"arch": "msdnet"}}, "KeyError: 'dataset'"),
    *(({"config": {**SOUND["config"], name: "many"}}, f"its {name} is 'many'") for name in ("seed", "epochs", "train_size")),
    ({"config": {**SOUND["config"], "method": ["ce"]}}, "its method is ['ce']"),
    *(({"sub_models": [{**SOUND["sub_models"][0], name: None}]}, f"its {name} is None") for name in ("name", "macs", "params", "top1"))])
def test_report_names_a_file_that_is_no_result(content, reason, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(SOUND))
    assert run("--report", tmp_path) == 0
    capsys.readouterr()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({**SOUND, **content}).encode())
    assert run("--report", tmp_path) == 2
    err = capsys.readouterr().err
    assert f"'{path}' is not the results.json of a run" in err and reason in err and err.count("\n") == 1


def test_run_cifar_trains_all_skips_what_is_finished_and_names_what_failed(tmp_path):
    def script(archs, methods):
        env = {**os.environ, "PYTHON": sys.executable, "DATASETS": "shapes", "EPOCHS": "1", "SEEDS": "0", "METHODS": methods, "ARCHS": archs,
               "OUT": str(tmp_path), "MSDNET": "--exits 2 --base 1 --step 1", "SLIMMABLE": "--exits 2"}
        return subprocess.run(["bash", "run_cifar.sh", "--train-size", "64"], cwd=HERE, env=env, capture_output=True, text=True)
    done = script("slimmable msdnet", "ce")                             # slimmable fails: it has no --exits
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "run_cifar.sh: failed: slimmable-shapes-ce-seed0"
    assert "| sub-model | MMACs | params | ce (1 run) |" in done.stdout and "| exit-2 |" in done.stdout
    before = (tmp_path / "msdnet-shapes-ce-seed0/results.json").stat().st_mtime_ns

    again = script("msdnet", "ce ipkd-ta")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already finished") == 1 and "| sub-model | MMACs | params | ce (1 run) | ipkd-ta (1 run) |" in again.stdout
    assert before == (tmp_path / "msdnet-shapes-ce-seed0/results.json").stat().st_mtime_ns


# --------------------------------------------------------------------------------------------------------- benchmark


@pytest.mark.parametrize("arch", ["msdnet", "universal", "switchable"])
def test_both_steps_of_the_benchmark_do_the_same_arithmetic(arch, monkeypatch):
    unchanged = lambda *args, **kwargs: lambda image: image
    monkeypatch.setattr(ipkd_ta.transforms, "RandomCrop", unchanged)
    monkeypatch.setattr(ipkd_ta.transforms, "RandomHorizontalFlip", unchanged)
    monkeypatch.setattr(ipkd_ta, "augment", lambda images, generator: images)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ipkd_ta.Data(images, torch.arange(8), None, None, list(range(10)), torch.full((3,), 0.4), torch.full((3,), 0.3))
    cfg = SimpleNamespace(batch_size=8, lr=0.001, lr_warmup=0, schedule="linear", kd_weight=0.5, kd_warmup=0, method="ipkd-ta",
                          temperature=2.0, amp="off", seed=5)
    usual = ipkd_ta.usual_steps(tiny_model(arch), data, cfg, torch.Generator().manual_seed(5))
    trainer = ipkd_ta.Trainer(tiny_model(arch).to(memory_format=torch.channels_last), data, cfg)
    for step in range(3):
        assert next(usual) == pytest.approx(trainer.step(torch.arange(8), progress=0).item(), rel=2e-3), step


@pytest.mark.parametrize("arch", TINY)
def test_benchmark_prints_both_steps_and_the_ratio_of_their_medians(arch, capsys):
    assert run(*TINY[arch], "--benchmark", "--batch-size", 4) == 0
    header, baseline, own, products, ratio = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["training", "step"] and baseline.startswith("baseline ") and own.startswith("this file ")
    ms = [float(re.findall(r"[\d.]+", line)[3]) for line in (baseline, own)]
    assert float(ratio.removeprefix("ratio of medians: ")) == pytest.approx(ms[0] / ms[1], rel=0.2)
    assert re.fullmatch(r"matrix products: float32 \d+ GFLOP/s", products)


def test_both_memory_formats_give_the_same_logits():
    model, x = tiny_model("universal"), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last), 0.1), model(x.contiguous(), 0.1), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_the_convolution_kernels_of_more_than_a_thousand_shapes_are_kept():
    program = """if True:
        import torch, ipkd_ta
        ipkd_ta.main(["--report", "no-such-directory"])
        conv = lambda channels: torch.conv2d(torch.ones(4, channels, 8, 8), torch.ones(1, channels, 3, 3))
        for channels in range(8, 1208):
            conv(channels)
        print("again")
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
            conv(8)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    again = done.stdout.split("again")[1]
    assert "cache_hit" in again and "cache_miss" not in again


def test_a_compiled_run_learns_as_an_eager_one_and_says_where_it_cannot(tmp_path, monkeypatch, capsys):
    options = [*TINY["msdnet"], *QUICK, "--exits", 1, "--train-size", 24]            # one full batch and a smaller one
    assert run(*options, "--out", tmp_path / "eager") == 0
    compile, calls = nn.Module.compile, []               # the same graphs, without a minute of C++ compiler for a CPU's kernels
    monkeypatch.setattr(nn.Module, "compile", lambda model, mode: calls.append(mode) or compile(model, backend="aot_eager"))
    assert run(*options, "--compile", "--out", tmp_path / "compiled") == 0
    eager, compiled = (json.loads((tmp_path / d / "metrics.jsonl").read_text()) for d in ("eager", "compiled"))
    assert calls == ["default"] and compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)

    def absent(function):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", absent)
    capsys.readouterr()
    assert run(*options, "--compile", "--out", tmp_path / "without") == 0
    assert capsys.readouterr().err == "--compile does not work here, going on without (no compiler)\n"
    assert (tmp_path / "without" / "metrics.jsonl").read_text() == (tmp_path / "eager" / "metrics.jsonl").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_cuda_graphs_learn_as_eager_mode(amp, tmp_path):
    options = [*TINY["msdnet"], *QUICK, "--exits", 2, "--train-size", 88, "--device", "cuda", "--amp", amp]      # the last batch is smaller
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert run(*options, *more, "--out", tmp_path / name) == 0
    eager, compiled = ([json.loads(line)["loss"] for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=0.02)


# ------------------------------------------------------------------------------------------------ interruption, resume


class Killed(BaseException):
    """Ends a run on the spot, as SIGKILL does: no handler of the program's catches it."""


LONG = ["--epochs", "3", "--train-size", "40", "--batch-size", "16", "--method", "ipkd-ta"]            # 9 steps


def same_outcome(a, b):
    weights = [torch.load(d / "checkpoint.pt", weights_only=True)["model"] for d in (a, b)]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert results(a)["sub_models"] == results(b)["sub_models"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(ipkd_ta, "SHAPES_TEST", 50)
    root = tmp_path_factory.mktemp("uninterrupted")
    for arch, options in TINY.items():
        assert run(*options, *LONG, "--out", root / arch) == 0
    patch.undo()
    return root


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("every, steps", [("0", 2), ("0", 5), ("0.000001", 3), ("0.000001", 5)])     # an epoch has 3 steps
def test_a_killed_run_resumes_to_the_same_bits(arch, every, steps, uninterrupted, tmp_path, monkeypatch):
    step, left = ipkd_ta.Trainer.step, [steps]

    def mortal(self, *args):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return step(self, *args)
    options = [*TINY[arch], *LONG, "--checkpoint-every", every, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(ipkd_ta.Trainer, "step", mortal)
        with pytest.raises(Killed):
            run(*options)
    assert run("--resume", *options) == 0
    same_outcome(tmp_path / "run", uninterrupted / arch)


@pytest.mark.parametrize("call", [0, 3, 4, 9])      # config, the first checkpoint made the previous one, the second checkpoint, results
def test_a_run_killed_while_it_puts_a_file_in_place_resumes_to_the_same_bits(call, uninterrupted, tmp_path, monkeypatch):
    replace, left = os.replace, [call]

    def mortal(*args):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return replace(*args)
    options = [*TINY["slimmable"], *LONG, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal)
        with pytest.raises(Killed):
            run(*options)
    assert run("--resume", *options) == 0
    same_outcome(tmp_path / "run", uninterrupted / "slimmable")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number, uninterrupted, tmp_path, monkeypatch, capsys):
    step, count = ipkd_ta.Trainer.step, []

    def signalled(self, *args):
        count.append(1)
        if len(count) == 5:
            os.kill(os.getpid(), number)
        return step(self, *args)
    options = [*TINY["msdnet"], *LONG, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(ipkd_ta.Trainer, "step", signalled)
        with pytest.raises(SystemExit) as exit:
            run(*options)
    assert exit.value.code == 128 + number and len(count) == 5
    assert capsys.readouterr().err == f"stopped by {number.name}; go on with --resume --out {tmp_path / 'run'}\n"
    assert run("--resume", "--out", tmp_path / "run") == 0
    assert "resuming after 1 epochs and 2 steps" in capsys.readouterr().out
    same_outcome(tmp_path / "run", uninterrupted / "msdnet")


@pytest.mark.parametrize("function, call", [("evaluate", 3), ("finish", 1)])              # of the last of three epochs
def test_a_signal_during_the_last_evaluation_ends_the_run(function, call, uninterrupted, tmp_path, monkeypatch, capsys):
    original, count = getattr(ipkd_ta, function), []

    def signalled(*args, **kwargs):
        count.append(1)
        if len(count) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(ipkd_ta, function, signalled)
        with pytest.raises(SystemExit) as exit:
            run(*TINY["msdnet"], *LONG, "--out", tmp_path / "run")
    assert exit.value.code == 130 and (tmp_path / "run" / "results.json").exists() == (function == "finish")
    assert capsys.readouterr().err == f"stopped by SIGINT; go on with --resume --out {tmp_path / 'run'}\n"
    assert run("--resume", "--out", tmp_path / "run") == 0
    same_outcome(tmp_path / "run", uninterrupted / "msdnet")


def test_resuming_needs_a_run_or_options_to_begin_one(tmp_path, capfd):
    assert run("--resume", "--out", tmp_path / "typo", "--device", "cpu", "--overwrite") == 2
    assert "holds no run" in capfd.readouterr().err and not (tmp_path / "typo").exists()


def test_a_process_killed_at_random_moments_ends_with_the_same_weights(uninterrupted, tmp_path):
    out, generator, kills = tmp_path / "run", torch.Generator().manual_seed(0), 0
    options = [*TINY["slimmable"], *LONG, "--checkpoint-every", "0.01", "--resume", "--out", str(out)]
    program = "import sys, ipkd_ta; ipkd_ta.SHAPES_TEST = 50; sys.exit(ipkd_ta.main(sys.argv[1:]))"
    duration = results(uninterrupted / "slimmable")["seconds"]
    while kills < int(os.environ.get("IPKD_TA_KILLS", 2)):
        process = subprocess.Popen([sys.executable, "-c", program, *options], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:                                    # the start, then a while at random
            if line.startswith("writing to"):
                break
        time.sleep(duration * torch.rand((), generator=generator).item())
        number = (signal.SIGKILL, signal.SIGTERM)[kills % 2]
        process.send_signal(number)
        error = process.communicate()[1]
        assert process.returncode in (0, -number, 128 + number) and "Traceback" not in error, error
        if process.returncode:
            kills += 1
        else:                                                          # it came to its end first: from the start again
            same_outcome(out, uninterrupted / "slimmable")
            shutil.rmtree(out)
    assert run(*options) == 0
    same_outcome(out, uninterrupted / "slimmable")


@pytest.fixture(scope="module")
def killed_in_the_third_epoch(tmp_path_factory):
    out, step, left = tmp_path_factory.mktemp("killed") / "run", ipkd_ta.Trainer.step, [7]

    def mortal(self, *args):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return step(self, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipkd_ta, "SHAPES_TEST", 50)
        patch.setattr(ipkd_ta.Trainer, "step", mortal)
        with pytest.raises(Killed):
            run(*TINY["msdnet"], *LONG, "--out", out)
    return out


@pytest.fixture
def interrupted(killed_in_the_third_epoch, tmp_path):
    """A copy of a run of msdnet that was killed in its third epoch."""
    return Path(shutil.copytree(killed_in_the_third_epoch, tmp_path / "run"))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "one byte"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(damage, interrupted, uninterrupted, capsys):
    path = interrupted / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    content = {"truncated": content[:-1000], "garbage": b"garbage" * 100, "one byte": content}[damage]
    path.write_bytes(content)
    capsys.readouterr()
    assert run("--resume", "--out", interrupted) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"cannot read checkpoint '{path}'") and "going on from" in err and err.count("\n") == 1
    assert "resuming after 1 epochs" in out
    same_outcome(interrupted, uninterrupted / "msdnet")
    assert (interrupted / "checkpoint.damaged.pt").read_bytes() == content


def test_a_half_written_line_of_metrics_is_repaired(interrupted, uninterrupted):
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lr": 0.0')
    assert run("--resume", "--out", interrupted) == 0
    same_outcome(interrupted, uninterrupted / "msdnet")


def test_without_a_sound_checkpoint_nothing_is_touched(interrupted, capfd):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (interrupted / name).write_bytes(b"garbage")
    before = {path: path.read_bytes() for path in interrupted.iterdir()}
    capfd.readouterr()
    assert run("--resume", "--out", interrupted) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in interrupted.iterdir()}


@pytest.mark.parametrize("options, message", [
    (["--lr", "0.2", "--epochs", "4"], "has --epochs 3, not 4; --lr 0.1, not 0.2"), (["--exits", "4"], "has --exits 3, not 4"),
    (["--widths", "0.5", "1"], "has --widths None, not")])
def test_resuming_with_other_options_names_them(options, message, interrupted, capfd):
    capfd.readouterr()
    assert run("--resume", *options, "--out", interrupted) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_default_widths_given_at_resuming_are_no_other_option(tmp_path, capsys):
    assert run("--arch", "slimmable", *QUICK, "--train-size", 16, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("--resume", "--widths", 0.125, 0.25, 0.375, 0.5, "--out", tmp_path / "run") == 0
    assert "is finished" in capsys.readouterr().out


def test_a_finished_run_says_so_and_does_nothing(uninterrupted, capsys):
    before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "msdnet").iterdir()}
    assert run("--resume", "--out", uninterrupted / "msdnet") == 0
    assert capsys.readouterr().out == f"the run in '{uninterrupted / 'msdnet'}' is finished\n"
    assert before == {path: path.stat().st_mtime_ns for path in (uninterrupted / "msdnet").iterdir()}


def test_amp_auto_at_resuming_is_what_it_was_when_the_run_began(interrupted, monkeypatch):
    monkeypatch.setattr(ipkd_ta, "pick_amp", lambda name, device: "bf16" if name == "auto" else name)     # as on another machine
    assert run("--resume", "--amp", "auto", "--out", interrupted) == 0
    assert results(interrupted)["config"]["amp"] == "off"


def test_a_file_system_without_locks_is_no_hindrance(interrupted, monkeypatch):
    def flock(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", flock)
    assert run("--resume", "--out", interrupted) == 0


def test_a_directory_in_use_by_another_process_is_refused(interrupted, capfd):
    with ipkd_ta.locked(interrupted):
        capfd.readouterr()
        assert run("--resume", "--out", interrupted) == 2
    assert "in use by another process" in capfd.readouterr().err
    assert run("--resume", "--out", interrupted) == 0


def test_resume_needs_its_directory_and_the_images_of_the_run(interrupted, capfd, monkeypatch):
    assert run("--resume") == 2 and "--resume needs --out" in capfd.readouterr().err
    monkeypatch.setattr(ipkd_ta, "SHAPES_NOISE", 0.3)
    assert run("--resume", "--out", interrupted) == 2
    assert "the images are not those" in capfd.readouterr().err


@pytest.mark.parametrize("function, error", [("fsync", OSError(28, "No space left on device")), ("open", PermissionError(13, "Permission denied"))])
def test_a_full_or_read_only_disk_is_a_clear_error_and_leaves_the_checkpoint_intact(function, error, interrupted, uninterrupted, capfd, monkeypatch):
    owner, left = (os, [2]) if function == "fsync" else (ipkd_ta, [2])        # two writes of metrics.jsonl, then of the checkpoint
    real = getattr(owner, function, open)

    def failing(*args):
        if left[0] == 0:
            raise error
        left[0] -= 1
        return real(*args)
    before = (interrupted / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, failing, raising=False)
        capfd.readouterr()
        assert run("--resume", "--out", interrupted) == 2
        err = capfd.readouterr().err
        assert f"cannot write '{interrupted / 'checkpoint.pt'}'" in err and error.strerror in err and err.count("\n") == 1
    assert before == (interrupted / "checkpoint.pt").read_bytes() and not (interrupted / "checkpoint.pt.tmp").exists()
    assert run("--resume", "--out", interrupted) == 0
    same_outcome(interrupted, uninterrupted / "msdnet")


def test_a_resumed_run_holds_its_directory_before_it_reads_the_checkpoint(interrupted, capfd, monkeypatch):
    def load_checkpoint(path):
        with pytest.raises(InputError, match="in use by another process"), ipkd_ta.locked(interrupted):
            pass
        raise InputError("enough")
    monkeypatch.setattr(ipkd_ta, "load_checkpoint", load_checkpoint)
    assert run("--resume", "--out", interrupted) == 2 and capfd.readouterr().err == "ipkd_ta.py: error: enough\n"


@pytest.mark.parametrize("mode", [[], ["--resume"]])
def test_a_run_leaves_alone_what_another_process_wrote_while_it_began(mode, tmp_path, capfd, monkeypatch):
    load_data = ipkd_ta.load_data

    def slowly(*args):
        (tmp_path / "results.json").write_text("of another run")
        return load_data(*args)
    monkeypatch.setattr(ipkd_ta, "load_data", slowly)
    assert run(*mode, *TINY["msdnet"], *QUICK, "--out", tmp_path) == 2
    assert "already holds results.json" in capfd.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("part, content", [("trainer", {"epoch": 1}), ("model", {}), ("config", {"exits": 2})])
def test_a_checkpoint_that_does_not_fit_is_named_at_resuming(part, content, interrupted, capfd):
    checkpoint = torch.load(interrupted / "checkpoint.pt", weights_only=True)
    checkpoint[part] = {**checkpoint[part], **content} if part == "config" else content
    torch.save(checkpoint, interrupted / "checkpoint.pt")
    capfd.readouterr()
    assert run("--resume", "--out", interrupted) == 2
    err = capfd.readouterr().err
    assert f"the checkpoint in '{interrupted}' does not fit" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ damage


FUZZ = int(os.environ.get("IPKD_TA_FUZZ", 200))          # damaged files of each kind


def damaged(content, draw):
    """The bytes cut off somewhere, or with some of them replaced, as drawn."""
    content = bytearray(content)
    if draw.random() < 0.2:
        return content[:draw.randrange(len(content))]
    for _ in range(draw.choice((1, 1, 2, 10))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return content


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def refused_or_same(load, original):
    """Whether load() gives `original`; it may refuse in one line instead."""
    try:
        loaded = load()
    except InputError as error:
        assert "\n" not in str(error)
        return False
    assert same(loaded, original)
    return True


def test_a_damaged_checkpoint_is_refused_or_gives_the_same_content(tmp_path):
    assert run("--arch", "slimmable", "--widths", "0.01", *QUICK, "--out", tmp_path) == 0
    path, draw = tmp_path / "checkpoint.pt", random.Random(0)
    content, original = path.read_bytes(), ipkd_ta.load_checkpoint(path)
    accepted = 0
    for _ in range(FUZZ):
        path.write_bytes(damaged(content, draw))
        accepted += refused_or_same(lambda: ipkd_ta.load_checkpoint(path), original)
    assert accepted < FUZZ / 2


def test_a_checkpoint_whose_parts_are_marked_as_directories_gives_the_same_content(trained, tmp_path):
    good = trained / "slimmable" / "checkpoint.pt"                  # torch.load itself returns unset memory for such parts
    content = bytearray(good.read_bytes())
    for entry in re.finditer(b"PK\x01\x02", content):
        content[entry.start() + 38] |= 0x10
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert same(ipkd_ta.load_checkpoint(tmp_path / "checkpoint.pt"), ipkd_ta.load_checkpoint(good))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_damaged_cifar_is_refused(name, tmp_path, monkeypatch):
    *_, cls = write_cifar(tmp_path, name, monkeypatch)
    monkeypatch.setattr(cls, "download", lambda self: (_ for _ in ()).throw(RuntimeError("no network")))
    original, draw, accepted = vars(ipkd_ta.load_data(name, tmp_path)), random.Random(0), 0
    files = sorted((tmp_path / cls.base_folder).iterdir())
    for _ in range(FUZZ // 2):
        file = draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(damaged(content, draw))
        accepted += refused_or_same(lambda: vars(ipkd_ta.load_data(name, tmp_path)), original)
        file.write_bytes(content)
    assert accepted < FUZZ / 10                          # a byte may be replaced by itself


# ------------------------------------------------------------------------------------------ found by review, kept found


def test_a_step_skipped_by_the_gradient_scaler_changes_nothing():
    data = ipkd_ta.Data(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8), None, None, list(range(10)),
                        torch.full((3,), 0.5), torch.full((3,), 0.5))
    cfg = SimpleNamespace(batch_size=8, lr=0.01, lr_warmup=0, schedule="linear", kd_weight=0.5, kd_warmup=0, method="ipkd-ta",
                          temperature=1.0, amp="fp16", seed=0, epochs=1)
    trainer = ipkd_ta.Trainer(tiny_model("msdnet"), data, cfg)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)          # overflows: the first steps are skipped
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.step(torch.arange(8), progress=0)
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))
    assert all(state["momentum_buffer"] is None or not state["momentum_buffer"].any() for state in trainer.optimizer.state.values())
    (record, _), = ipkd_ta.train(trainer, lambda share: None)
    assert math.isfinite(record["loss"])                                       # and is no divergence


@pytest.mark.parametrize("change", [{"config": []}, {"config": {"arch": "vgg", "dataset": "shapes"}}, {"mean": (0.5, 0.5, 0.5)}, {"model": []}])
def test_eval_refuses_a_checkpoint_with_other_content(change, trained, tmp_path, capfd):
    checkpoint = torch.load(trained / "msdnet" / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, **change}, tmp_path / "checkpoint.pt")
    capfd.readouterr()
    assert run("--eval", tmp_path / "checkpoint.pt") == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
@pytest.mark.parametrize("moment, message", [
    ("before", "in step 2 of epoch 2, at learning rate 0.05, the loss of exit-1, exit-2, exit-3 is not finite"),
    ("after", "after 1 epochs and 2 steps weights are not finite")])
def test_a_divergence_keeps_the_last_good_checkpoint(moment, message, device, tmp_path, monkeypatch, capfd):
    step, count = ipkd_ta.Trainer.step, []

    def spoiled(self, *args):
        count.append(1)
        for when in ("before", "after"):
            if when == "after":
                loss = step(self, *args)
            if moment == when and len(count) == 5:
                next(self.model.parameters()).data.fill_(math.inf)
        return loss
    monkeypatch.setattr(ipkd_ta.Trainer, "step", spoiled)
    options = [*TINY["msdnet"], *LONG, "--checkpoint-every", "0.000001", "--out", tmp_path / "run", "--schedule", "linear"]
    assert run(*options, "--lr-warmup", 0, "--device", device) == 2
    err = capfd.readouterr().err
    assert f"diverged: {message}" in err and err.count("\n") == 1
    good = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert (good["trainer"]["epoch"], good["trainer"]["steps"]) == (1, 1)
    assert all(value.isfinite().all() for value in good["model"].values())


def test_a_divergence_in_the_last_step_is_told(tmp_path, capfd):
    assert run(*TINY["msdnet"], *QUICK, "--batch-size", 40, "--lr", "1e30", "--lr-warmup", 0, "--out", tmp_path / "run") == 2
    assert "diverged: the test loss of exit-1" in capfd.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("options", [["--out", "a" * 300], ["--dataset", "folder", "--data-dir", "a" * 300], ["--channels", 2**31 - 1],
                                     ["--temperature", "1e200"]])
def test_what_no_system_can_hold_is_one_clear_line(options, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run(*QUICK, *options) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_eval_never_replaces_the_results_of_a_run(trained, capfd):
    before = (trained / "msdnet" / "results.json").read_bytes()
    assert run("--eval", trained / "msdnet" / "checkpoint.pt", "--out", trained / "msdnet", "--overwrite") == 2
    assert "already holds config.json" in capfd.readouterr().err
    assert before == (trained / "msdnet" / "results.json").read_bytes()


def test_calibration_keeps_the_number_format_of_the_model():
    model = tiny_model("universal").double()
    model.calibrate([torch.randn(4, 3, 32, 32, dtype=torch.float64)])
    assert model.eval()(torch.randn(2, 3, 32, 32, dtype=torch.float64), 0.1).dtype == torch.float64


# ------------------------------------------------------------------------------------------------ sub-models in use


def brief_msdnet(exits=7, **options):
    """A small MSDNet in eval mode whose BatchNorm statistics are those of some images."""
    torch.manual_seed(0)
    model = MSDNet(10, exits=exits, channels=4, growth=2, **options)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))
    return model.eval()


def images_of(n):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("k", range(1, 8))
def test_an_extracted_exit_gives_the_same_logits_with_every_batchnorm_folded_too(k):
    model, x = brief_msdnet(), images_of(5)
    torch.testing.assert_close(ipkd_ta.extract(model, k)(x), model(x)[k - 1], rtol=1e-5, atol=1e-5)
    folded = ipkd_ta.fold_bn(ipkd_ta.extract(model, k))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x)[k - 1], rtol=1e-4, atol=1e-4)


def test_lazy_evaluation_saves_macs_at_every_exit_from_which_a_finer_scale_is_left_over():
    model, macs = MSDNet(100), []
    for k in range(1, 8):
        with FlopCounterMode(display=False) as counter:
            ipkd_ta.extract(model, k)(torch.zeros(1, 3, 32, 32))
        macs.append(counter.get_total_flops() // 2)
    alone = [sub.macs for sub in model.sub_models()]
    assert all(lazy < whole for lazy, whole in zip(macs[:5], alone)) and macs[5:] == alone[5:]     # one scale at 6 and 7


@pytest.mark.parametrize("k", range(1, 8))
def test_every_weight_of_an_extracted_exit_takes_part_in_its_answer(k):
    exit_k = ipkd_ta.extract(brief_msdnet(), k)
    for parameter in exit_k.parameters():
        parameter.requires_grad_()
    exit_k(images_of(8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in exit_k.parameters())


@torch.no_grad()
@pytest.mark.parametrize("bn, which, width", [("universal", 1, 0.05), ("universal", 3, 0.15), ("universal", 0.12, 0.12), ("switchable", 2, 0.1),
                                              ("switchable", 0.15, 0.15)])
def test_an_extracted_width_gives_the_same_logits_from_its_own_weights_alone(bn, which, width):
    model, x = tiny_model(bn), images_of(5)
    model([model(x, w) for w in (0.05, 0.1, 0.15)] and x, width)                   # statistics other than 0 and 1
    model.calibrate([images_of(9)], [width])
    extracted, expected = ipkd_ta.extract(model.eval(), which), model(x, width)
    torch.testing.assert_close(extracted(x), expected, rtol=1e-5, atol=1e-5)
    model.widths = (width,)
    assert sum(p.numel() for p in extracted.parameters()) == model.sub_models()[0].params
    torch.testing.assert_close(ipkd_ta.fold_bn(extracted)(x), expected, rtol=1e-4, atol=1e-4)


def test_extraction_leaves_the_model_as_it_was():
    model = brief_msdnet(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extracted = ipkd_ta.fold_bn(ipkd_ta.extract(model, 2))
    for parameter in extracted.parameters():
        parameter.data.zero_()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model, which", [("msdnet", 0), ("msdnet", 4), ("msdnet", 1.5), ("msdnet", 1.0), ("universal", 0), ("universal", 4), ("universal", 0.9),
                                          ("universal", 0.1), ("switchable", 0.12), ("universal", None), ("msdnet", "exit-1")])
def test_a_sub_model_that_there_is_not_is_refused(model, which):
    with pytest.raises(ValueError, match="k must be|width"):
        ipkd_ta.extract(tiny_model(model), which)


def test_extraction_keeps_every_bit_of_float64_and_the_random_state():
    model = tiny_model("universal").double()
    model.calibrate([images_of(9).double()], [0.12])
    state = torch.get_rng_state()
    extracted = ipkd_ta.extract(model.eval(), 0.12)
    assert torch.get_rng_state().equal(state)
    torch.testing.assert_close(extracted(images_of(3).double()), model(images_of(3).double(), 0.12), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"exits": 1, "base": 1, "step": 1}, {"exits": 3, "base": 2, "step": 3}, {"exits": 4, "base": 1, "step": 1, "step_mode": "lin_grow"},
                                     {"exits": 5, "base": 4, "step": 1}])
def test_every_exit_of_other_networks_can_be_extracted(options):
    torch.manual_seed(0)
    model, x = MSDNet(10, channels=4, growth=2, **options).eval(), images_of(3)
    for k, expected in enumerate(model(x), start=1):
        torch.testing.assert_close(ipkd_ta.extract(model, k)(x), expected, rtol=1e-5, atol=1e-5)


def offline(model, images, thresholds):
    """Prediction and exit of each image, all exits computed for all images."""
    confidence, predictions = torch.stack(model(images)).softmax(2).max(2)
    exits = [next(k for k, pair in enumerate(zip(image, thresholds)) if pair[0] >= pair[1]) for image in confidence.T.tolist()]
    return torch.stack([predictions[k, i] for i, k in enumerate(exits)]), torch.tensor(exits) + 1


@torch.no_grad()
@pytest.mark.parametrize("shares", [[0, 0, 0, 1], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0, 0.25, 0.25]])
def test_early_exit_equals_the_offline_result_and_computes_no_more_than_it_needs(shares):
    model, images, seen = brief_msdnet(4), images_of(64), []
    thresholds = ipkd_ta.exit_thresholds(torch.stack(model(images)).softmax(2).amax(2), shares)
    predictions, exits = offline(model, images, thresholds)
    assert [(exits == k).sum().item() / 64 for k in range(1, 5)] == shares
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    found, taken = ipkd_ta.early_exit(model, images, thresholds)
    assert found.equal(predictions) and taken.equal(exits)
    assert seen == [n for n in ((exits >= k).sum().item() for k in range(1, 5)) if n]


def test_early_exit_takes_any_number_of_images_and_lets_a_tie_leave():
    model, images = brief_msdnet(3), images_of(1)
    with torch.no_grad():
        tie = model(images)[0].softmax(1).max().item()
    for threshold, expected in ((tie, 1), (math.nextafter(tie, 2) + 1e-6, 2)):
        assert ipkd_ta.early_exit(model, images, [threshold, 0, 0])[1].tolist() == [expected]
    assert ipkd_ta.early_exit(model, images, [2, 2, 2])[1].tolist() == [3]           # by the last in any case
    predictions, exits = ipkd_ta.early_exit(model, images[:0], [0, 0, 0])
    assert len(predictions) == len(exits) == 0


@pytest.mark.parametrize("arguments, error, message", [
    (lambda m, x: (m.train(), x, [0, 0]), ValueError, "training mode"), (lambda m, x: (m, x, [0]), ValueError, r"2 thresholds, got eval mode and thresholds \[0\]"),
    (lambda m, x: (m, x, [math.nan, 0]), ValueError, "nan"), (lambda m, x: (tiny_model("universal"), x, [0, 0]), TypeError, "SlimmableMobileNetV1"),
    (lambda m, x: (m, x.byte(), [0, 0]), TypeError, "uint8"), (lambda m, x: (m, x[0], [0, 0]), TypeError, r"\(3, 32, 32\)")])
def test_early_exit_refuses_what_it_cannot_do(arguments, error, message):
    with pytest.raises(error, match=message):
        ipkd_ta.early_exit(*arguments(brief_msdnet(2), images_of(1)))


@pytest.mark.parametrize("shares", [[1], [1, 1, 1], [1.5, -0.5, 0], [math.nan, 0.5, 0.5]])
def test_thresholds_for_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="3 numbers from 0 to 1 with the sum 1"):
        ipkd_ta.exit_thresholds(torch.rand(3, 10), shares)


def test_thresholds_let_the_wanted_shares_leave_the_surest_first():
    confidence = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    first, second, last = ipkd_ta.exit_thresholds(confidence, [0.5, 0.3, 0.2])
    gone = confidence[0] >= first
    assert gone.sum() == 500 and first == confidence[0].sort().values[500].item()
    assert (confidence[1][~gone] >= second).sum() == 300 and last == 0
    assert ipkd_ta.exit_thresholds(confidence, [0, 0, 1]) == [2, 2, 0]


def test_budgets_use_validation_thresholds_and_count_all_heads_on_the_way(tmp_path):
    model, data = brief_msdnet(3), ipkd_ta.load_data("shapes", None, 40, val_size=100)
    result = ipkd_ta.budgeted(model, data)
    blocks, heads, x = [], [], torch.zeros(1, 3, 32, 32)
    for block, head in zip(model.blocks, model.heads):
        with FlopCounterMode(display=False) as counter:
            x = block(x)
        blocks.append(counter.get_total_flops() // 2)
        with FlopCounterMode(display=False) as counter:
            head(x[-1])
        heads.append(counter.get_total_flops() // 2)
    cost = torch.tensor([sum(blocks[:k]) + sum(heads[:k]) for k in (1, 2, 3)]).double()
    assert [a["macs"] for a in result["anytime"]] == cost.tolist()
    with torch.no_grad():
        confidence = torch.stack(model(data.normalise(data.val_images))).softmax(2).amax(2)
        for budget in result["budgets"][::6]:
            share = torch.tensor([budget["q"] ** k for k in (1, 2, 3)])
            assert budget["thresholds"] == pytest.approx(ipkd_ta.exit_thresholds(confidence, share / share.sum()), rel=1e-5)
            answers, exits = ipkd_ta.early_exit(model, data.normalise(data.test_images), budget["thresholds"])
            assert budget["top1"] == pytest.approx(100 * (answers == data.test_labels).double().mean().item())
            assert budget["macs"] == pytest.approx(cost[exits - 1].mean().item())
            assert budget["exits"] == pytest.approx([(exits == k).double().mean().item() for k in (1, 2, 3)])


def test_validation_images_are_held_out_from_training_and_the_same_at_every_size(tmp_path):
    folder = write_images(tmp_path, n=30)
    whole = ipkd_ta.load_data("folder", folder)
    n = len(whole.train_images)
    data = ipkd_ta.load_data("folder", folder, val_size=20)
    fewer = ipkd_ta.load_data("folder", folder, 30, 20)
    as_set = lambda images: {image.numpy().tobytes() for image in images}
    assert len(data.train_images) == n - 20 and len(fewer.train_images) == 30
    assert as_set(data.train_images) | as_set(data.val_images) == as_set(whole.train_images) and len(as_set(data.val_images)) == 20
    assert data.val_images.equal(fewer.val_images) and as_set(fewer.train_images) < as_set(data.train_images)
    assert data.test_images.equal(whole.test_images)
    with pytest.raises(InputError, match=f"{n + 1} training images"):
        ipkd_ta.load_data("folder", folder, n - 19, 20)


def test_a_run_with_validation_images_writes_its_budgets_and_eval_repeats_them(tmp_path, capsys):
    assert run(*TINY["msdnet"], *QUICK, "--val-size", 30, "--out", tmp_path / "run") == 0
    budgets = json.loads((tmp_path / "run/budget.json").read_text())
    assert len(results(tmp_path / "run")["validation"]) == 3 and len(budgets["anytime"]) == 3
    assert "thresholds from 30 validation images" in capsys.readouterr().out
    assert run("--eval", tmp_path / "run/checkpoint.pt", "--out", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again/budget.json").read_text()) == budgets


def test_gradient_equilibrium_gives_each_block_the_mean_of_what_the_exits_from_it_on_send():
    x, heads = images_of(4), 4
    torch.manual_seed(0)
    plain = MSDNet(10, exits=heads, channels=4, growth=2).double()
    torch.manual_seed(0)
    balanced = MSDNet(10, exits=heads, channels=4, growth=2, gradient_equilibrium=True).double()
    maps = {}
    for k, block in enumerate(plain.blocks):
        block.register_forward_hook(lambda module, args, out, k=k: maps.update({k: out}))
    losses = [z.square().sum() for z in plain(x.double())]
    logits = balanced(x.double())
    assert all(z.square().sum().equal(loss) for z, loss in zip(logits, losses))             # the answers stay as they are
    sum(z.square().sum() for z in logits).backward()
    for k in range(heads):
        weight = f"blocks.{k}.{'0.convs.0.0' if k == 0 else '0.paths.0.0.0.0'}.weight"
        sent = [torch.autograd.grad(loss, plain.get_parameter(weight), retain_graph=True)[0] for loss in losses[k:]]
        torch.testing.assert_close(balanced.get_parameter(weight).grad, sum(sent) / len(sent), rtol=1e-9, atol=1e-9)


def test_exported_programs_run_without_this_project_and_give_the_same_logits(trained, tmp_path, capfd):
    expected, x = {}, images_of(3)
    for name, file, sub_model, which, options in (("msdnet", "exit-2", "exit-2", 2, ["--fold-bn"]), ("slimmable", "a.pt2", "width-0.12", 0.12, [])):
        _, model = ipkd_ta.restore(ipkd_ta.load_checkpoint(trained / name / "checkpoint.pt"), "")
        if name == "slimmable":
            model.calibrate(ipkd_ta.calibration_batches(ipkd_ta.load_data("shapes", None, 40)), [which])
        with torch.no_grad():
            expected[file] = ipkd_ta.extract(model, which)(x)
        assert run("--eval", trained / name / "checkpoint.pt", "--export", tmp_path / file, "--sub-model", sub_model, *options) == 0
    assert capfd.readouterr().err == ""                                 # none of torch's warnings either
    torch.save((x, expected), tmp_path / "expected.pt")
    program = """import io, json, pathlib, sys, torch
x, expected = torch.load("expected.pt")
for file, z in expected.items():
    about = {"about.json": ""}
    run = torch.export.load(io.BytesIO(pathlib.Path(file).read_bytes()), extra_files=about).module()
    assert max((run(x[:n]) - z[:n]).abs().max() for n in (1, 3)) < 1e-4
    print(json.loads(about["about.json"])["sub-model"], "ipkd_ta" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["exit-2", "False", "width-0.12", "False"], done.stderr


def test_a_width_of_a_checkpoint_inside_an_epoch_is_calibrated_for_its_export(trained, tmp_path, monkeypatch):
    content = torch.load(trained / "slimmable" / "checkpoint.pt", weights_only=True)
    content["model"] = {name: value for name, value in content["model"].items() if not name.startswith("norms")}
    torch.save(content, tmp_path / "checkpoint.pt")
    exported = []
    monkeypatch.setattr(ipkd_ta, "write_program", lambda model, path, about: exported.append(model) or path.touch())
    for checkpoint in (trained / "slimmable" / "checkpoint.pt", tmp_path / "checkpoint.pt"):
        assert run("--eval", checkpoint, "--export", tmp_path / "a.pt2", "--sub-model", "width-0.1", "--overwrite") == 0
    a, b = (model(images_of(3)) for model in exported)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_export_refuses_to_calibrate_on_images_of_other_classes(tmp_path, capsys):
    folder = write_images(tmp_path / "data")
    assert run(*TINY["slimmable"], "--dataset", "folder", "--data-dir", folder, "--epochs", 1, "--out", tmp_path / "run") == 0
    first = sorted((folder / "train").iterdir())[0].name
    for split in ("train", "test"):
        (folder / split / first).rename(folder / split / "another")
    assert run("--eval", tmp_path / "run/checkpoint.pt", "--export", tmp_path / "a.pt2", "--sub-model", "width-0.12") == 2
    assert "are not those that the checkpoint was trained on" in capsys.readouterr().err and not (tmp_path / "a.pt2").exists()


def test_an_onnx_file_gives_the_same_logits(trained, tmp_path):
    pytest.importorskip("onnxscript")
    session = pytest.importorskip("onnxruntime").InferenceSession
    checkpoint, x = trained / "msdnet" / "checkpoint.pt", images_of(3)
    assert run("--eval", checkpoint, "--sub-model", "exit-1", "--export", tmp_path / "a.onnx") == 0
    _, model = ipkd_ta.restore(ipkd_ta.load_checkpoint(checkpoint), "")
    with torch.no_grad():
        expected = ipkd_ta.extract(model.eval(), 1)(x)
    program = session(tmp_path / "a.onnx")
    assert json.loads(program.get_modelmeta().custom_metadata_map["classes"]) == list(ipkd_ta.SHAPES)
    for n in (1, 3):
        found, = program.run(None, {program.get_inputs()[0].name: x[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:n], rtol=1e-4, atol=1e-4)


def test_export_to_onnx_says_which_packages_are_missing(trained, tmp_path, capfd, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'onnxscript'")

    if importlib.util.find_spec("onnxscript"):
        monkeypatch.setattr(torch.onnx, "export", missing)
    assert run("--eval", trained / "msdnet" / "checkpoint.pt", "--sub-model", "exit-1", "--export", tmp_path / "b.onnx") == 2
    assert re.fullmatch(r"ipkd_ta.py: error: --export: 'b.onnx' needs the packages onnx and onnxscript .*\n", capfd.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, message", [
    (["--sub-model", "exit-9"], "--sub-model exit-9: .* offers exit-1, exit-2, exit-3"),
    (["--sub-model", "exit-1", "--epochs", "3"], "--epochs has no meaning with --export")])
def test_export_names_what_it_cannot_do(options, message, trained, tmp_path, capfd):
    assert run("--eval", trained / "msdnet" / "checkpoint.pt", "--export", tmp_path / "a.pt2", *options) == 2
    assert re.search(message, capfd.readouterr().err) and not list(tmp_path.iterdir())


def test_a_program_that_gives_other_logits_is_not_written(trained, tmp_path, capfd, monkeypatch):
    class Wrong:
        def module(self):
            return lambda x: torch.zeros(len(x), 10) + 9
    (tmp_path / "a.pt2").write_text("before")
    monkeypatch.setattr(torch.export, "load", lambda file: Wrong())
    assert run("--eval", trained / "msdnet" / "checkpoint.pt", "--export", tmp_path / "a.pt2", "--overwrite") == 2
    assert "is not written" in capfd.readouterr().err and (tmp_path / "a.pt2").read_text() == "before"


def test_export_never_replaces_the_checkpoint_itself(trained, tmp_path, capfd):
    copied = tmp_path / "c.pt"
    copied.write_bytes((trained / "msdnet" / "checkpoint.pt").read_bytes())
    assert run("--eval", copied, "--export", copied, "--overwrite") == 2
    assert "is the checkpoint itself" in capfd.readouterr().err
    assert copied.read_bytes() == (trained / "msdnet" / "checkpoint.pt").read_bytes()


def test_a_width_that_is_not_offered_is_refused_before_any_image_is_read(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(ipkd_ta, "load_data", lambda *args: pytest.fail("images were read"))
    assert run("--eval", trained / "slimmable" / "checkpoint.pt", "--export", tmp_path / "a.pt2", "--sub-model", "width-9") == 2
    assert "--sub-model width-9" in capfd.readouterr().err


def test_only_a_flexible_network_can_be_extracted_from():
    with pytest.raises(TypeError, match="got Linear"):
        ipkd_ta.extract(torch.nn.Linear(1, 1), 1)


def test_export_needs_a_checkpoint_and_replaces_no_file_unasked(trained, tmp_path, capfd):
    assert run("--export", tmp_path / "a.pt2") == 2 and "need --eval" in capfd.readouterr().err
    assert run("--eval", "c.pt", "--fold-bn") == 2 and "need --export" in capfd.readouterr().err
    assert run("--eval", "c.pt", "--export", "") == 2 and "--export: '.' is a directory" in capfd.readouterr().err
    (tmp_path / "a.pt2").write_text("mine")
    assert run("--eval", trained / "msdnet" / "checkpoint.pt", "--export", tmp_path / "a.pt2") == 2
    assert (tmp_path / "a.pt2").read_text() == "mine"


# -------------------------------------------------------------------------------------------------------- many processes

TOGETHER = """
import os, signal, sys, torch, ipkd_ta, test_ipkd_ta as tests
ipkd_ta.SHAPES_TEST, out = 50, sys.argv[1]
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    ipkd_ta.join_processes()
found = {arch: tests.weights_after_some_steps(arch) for arch in ("msdnet", "universal", "switchable")}
found["evaluation"] = ipkd_ta.evaluate(tests.brief_msdnet(2), ipkd_ta.load_data("shapes", None, 40))
if ipkd_ta.process_rank() == 0:
    torch.save(found, out + "/found.pt")
ipkd_ta.dist.destroy_process_group = lambda: None          # they stay together for a second run
assert ipkd_ta.main([*tests.TINY["msdnet"], *tests.QUICK, "--val-size", "11", "--out", out + "/whole"]) == 0
steps = []
def step(self, *args):
    if len(steps) == 7 and ipkd_ta.process_rank() == 1:      # in the third epoch of 3 steps each
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(0)
    return usual_step(self, *args)
usual_step, ipkd_ta.Trainer.step = ipkd_ta.Trainer.step, step
sys.exit(ipkd_ta.main([*tests.TINY["msdnet"], *tests.LONG, "--out", out + "/run"]))
"""


def weights_after_some_steps(arch):
    """Weights after steps on batches of 8, 7 and 1 images, with BatchNorm by fixed statistics; in float64, for in float32
    rounding moves some outputs of the untrained slimmable network across a kink of ReLU6."""
    torch.set_default_dtype(torch.float64)
    try:
        return float64_weights_after_some_steps(arch)
    finally:
        torch.set_default_dtype(torch.float32)


def float64_weights_after_some_steps(arch):
    data, model = ipkd_ta.load_data("shapes", None, 40), tiny_model(arch)
    cfg = SimpleNamespace(seed=0, lr=0.001, schedule="linear", lr_warmup=0, kd_weight=0.5, kd_warmup=0, temperature=2.0, method="ipkd-ta", amp="off",
                          batch_size=8)
    if arch == "universal":
        draws = torch.Generator().manual_seed(0)
        model.calibrate([images_of(8).double()], {w for _ in range(3) for w in sandwich_widths(4, 0.05, 0.15, draws)})
    trainer = ipkd_ta.Trainer(model.eval(), data, cfg)
    for batch in torch.arange(16).split([8, 7, 1]):
        trainer.step(batch, 0.0)
    return {name: value for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes found by TOGETHER, the second of which died in the end, and their stderr."""
    root = tmp_path_factory.mktemp("together")
    (root / "together.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", root / "together.py", root]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert (root / "found.pt").exists() and (root / "run/checkpoint.pt").exists(), done.stderr
    return root, done


@pytest.mark.parametrize("arch", ["msdnet", "universal", "switchable"])
def test_two_processes_reach_the_weights_of_one(arch, two_processes):
    found = torch.load(two_processes[0] / "found.pt")[arch]
    torch.set_default_dtype(torch.float64)
    start = tiny_model(arch).state_dict()
    torch.set_default_dtype(torch.float32)
    for name, value in weights_after_some_steps(arch).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)
    assert not any(found[name].equal(value) for name, value in start.items() if name.endswith("weight"))


def test_two_processes_share_the_evaluation(two_processes):
    whole = ipkd_ta.evaluate(brief_msdnet(2), ipkd_ta.load_data("shapes", None, 40))
    for sub, expected in zip(torch.load(two_processes[0] / "found.pt")["evaluation"], whole):
        assert sub == pytest.approx(expected, rel=1e-6)


def test_the_results_of_two_processes_are_those_of_their_checkpoint(two_processes, tmp_path):
    whole = two_processes[0] / "whole"
    assert run("--eval", whole / "checkpoint.pt", "--out", tmp_path / "alone") == 0
    together, alone = results(whole), results(tmp_path / "alone")
    for key in ("sub_models", "validation"):
        for sub, expected in zip(together[key], alone[key], strict=True):
            assert (sub["top1"], sub["loss"]) == (pytest.approx(expected["top1"]), pytest.approx(expected["loss"], rel=1e-5))
    assert together["processes"] == 2
    budgets, expected = (json.loads((out / "budget.json").read_text())["budgets"] for out in (whole, tmp_path / "alone"))
    for budget, other in zip(budgets, expected, strict=True):       # split otherwise, and so rounded otherwise
        assert budget["thresholds"] == pytest.approx(other["thresholds"], abs=1e-5)
        assert budget["exits"] == pytest.approx(other["exits"], abs=0.021)       # one of 50 images at a threshold


@pytest.mark.parametrize("rank, printed", [(0, "### msdnet"), (1, "")])
def test_of_several_processes_only_the_first_does_what_is_not_training(rank, printed, tmp_path, capsys, monkeypatch):
    write_result(tmp_path, "ce", 0, [90.0])
    for name, value in (("WORLD_SIZE", "2"), ("RANK", str(rank))):
        monkeypatch.setenv(name, value)
    assert run("--report", tmp_path) == 0 and capsys.readouterr().out.startswith(printed) and rank + bool(printed) == 1
    assert run("--eval", "nothing.pt") == 2 * (not rank)


def test_processes_that_torchrun_did_not_start_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*QUICK, "--out", tmp_path / "run") == 2
    assert "start them by torchrun" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_the_death_of_a_process_ends_the_run_and_one_process_alone_resumes_it(two_processes, tmp_path, capsys):
    root, done = two_processes
    assert done.returncode != 0 and "another process is gone" in done.stderr and not (root / "run/results.json").exists()
    run_directory = shutil.copytree(root / "run", tmp_path / "run")
    assert run("--resume", "--out", run_directory) == 0
    assert "resuming after 2 epochs" in capsys.readouterr().out
    assert results(run_directory)["processes"] == 1


@pytest.mark.parametrize("other", ["labels", "one pixel", "options", "weights"])
def test_processes_that_begin_otherwise_do_not_train_together(other, monkeypatch):
    data = ipkd_ta.load_data("shapes", None, 40)
    cfg = SimpleNamespace(seed=0, lr=0.1, amp="off")
    first = []
    monkeypatch.setattr(ipkd_ta, "process_count", lambda: 2)
    monkeypatch.setattr(ipkd_ta, "process_rank", lambda: 1)
    monkeypatch.setattr(ipkd_ta, "collectively", lambda operation, tensor, source: tensor.copy_(first[0]) if first else first.append(tensor.clone()))
    model = tiny_model("msdnet")
    ipkd_ta.check_agreement(ipkd_ta.Trainer(model, data, cfg))
    ipkd_ta.check_agreement(ipkd_ta.Trainer(model, data, SimpleNamespace(**vars(cfg), out="elsewhere", data_dir="elsewhere")))
    if other == "labels":
        data.train_labels = data.train_labels.flip(0)
    elif other == "one pixel":
        data.test_images[3, 2, 10, 10] ^= 1
    elif other == "options":
        cfg.lr = 0.2
    else:
        nn.init.zeros_(model.heads[0][-1].bias.data[:1]).add_(1e-6)
    with pytest.raises(InputError, match="process 1 begins otherwise than process 0"):
        ipkd_ta.check_agreement(ipkd_ta.Trainer(model, data, cfg))


def test_folding_needs_eval_mode_and_may_be_repeated():
    extracted, x = ipkd_ta.extract(brief_msdnet(2), 1), images_of(3)
    for model in (extracted.train(), tiny_model("universal").eval(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()):
        with pytest.raises(ValueError, match="extracted sub-model in eval mode, got"):
            ipkd_ta.fold_bn(model)
    folded = ipkd_ta.fold_bn(extracted.eval())
    expected = folded(x)
    assert ipkd_ta.fold_bn(folded)(x).equal(expected)
