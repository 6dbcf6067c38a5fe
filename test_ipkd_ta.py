"""Tests of ipkd_ta.py: against closed forms, reference numbers and independent constructions. No network, no GPU.

    pip install torch torchvision pytest && python -m pytest

Tests that need a GPU, matplotlib, or onnx, onnxscript and onnxruntime are skipped where these are missing.
"""
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import ipkd_ta
from ipkd_ta import MSDNet, SlimmableMobileNetV1, early_exit, exit_thresholds, ipkd_ta_loss, sandwich_widths

HERE = Path(__file__).parent
METHODS = ("ce", "ipkd", "ipkd-ta")
TINY = {"msdnet": {"arch": "msdnet", "exits": 3, "base": 1, "step": 1, "step_mode": "even", "channels": 4, "growth": 2},
        "universal": {"arch": "slimmable", "widths": (0.05, 0.1, 0.15)},
        "switchable": {"arch": "slimmable", "widths": (0.05, 0.1, 0.15), "bn": "switchable"}}
QUICK = {"epochs": 1, "train_size": 40, "batch_size": 16, "lr": 0.1, "eval_every": 1}       # two steps an epoch
DRAWN = [0.15, 0.12, 0.08, 0.05]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)

exact = partial(assert_close, rtol=0, atol=0)
rows = pytest.mark.parametrize
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
each_network, each_method = rows("arch", TINY), rows("method", METHODS)


@pytest.fixture(autouse=True, scope="module")
def few_test_shapes_and_no_gpu():
    draw = ipkd_ta.draw_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipkd_ta, "draw_shapes", lambda n, seed: draw(50 if seed else n, seed))       # not 1,000
        patch.setattr(torch.cuda, "is_available", lambda: False)               # but where a test needs one
        yield


def config(arch, **changes):
    return ipkd_ta.make_config({**TINY[arch], **QUICK, "amp": "off", **changes})


def tiny_model(arch):
    torch.manual_seed(0)
    return ipkd_ta.build_model(config(arch), 10)


def flags(options):
    """{"batch_size": 16, "widths": (0.5, 1)} as ["--batch-size", "16", "--widths", "0.5", "1"]."""
    return [word for name, value in options.items() for word in (
        "--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,)))]


def run(*args, **options):
    return ipkd_ta.main([*map(str, args), *flags(options)])              # its exit status


def train_tiny(arch, out, *args, **changes):
    return run("--out", out, *args, **{**TINY[arch], **QUICK, **changes})


def refused(capfd, *args, **options):
    """The one line on stderr of a command that ends with status 2."""
    capfd.readouterr()
    assert run(*args, **options) == 2
    err = capfd.readouterr().err
    assert err.startswith("ipkd_ta.py: error: ") and err.count("\n") == 1, err
    return err


def read(path):
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    text = path.read_text()
    return json.loads(text if path.suffix == ".json" else f"[{','.join(text.splitlines())}]")


class Killed(BaseException):
    """Ends a run on the spot, as SIGKILL does: no handler of the program's catches it."""


@contextmanager
def dying(owner, name, calls, error=Killed):
    """Let owner.name work that many times, and then raise the error instead."""
    real, left = getattr(owner, name), [None] * calls

    def mortal(*args, **kwargs):
        if not left:
            raise error
        left.pop()
        return real(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, mortal)
        yield


@contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images_of(n, seed=1):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def shaken(model):
    """The model with BatchNorm parameters that are not their initial ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn(p.shape, generator=generator) if p.ndim == 1 else 0)
    return model


def brief_msdnet(exits=7, **options):
    """A small MSDNet in eval mode whose BatchNorm statistics are those of some images."""
    torch.manual_seed(0)
    model = MSDNet(10, exits=exits, channels=4, growth=2, **options)
    with torch.no_grad():
        for seed in range(3):
            model(images_of(8, seed))
    return model.eval()


def macs_of(model, *args):
    with FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops() / 2


def random_logits(k, dtype=torch.float64):
    logits = 3 * torch.randn(k, 6, 5, generator=torch.Generator().manual_seed(k), dtype=dtype)
    return [z.requires_grad_() for z in logits], torch.arange(6) % 5


class TestLoss:
    @each_method
    @rows("kd_weight, temperature", [(0.0, 1.0), (0.3, 1.0), (0.5, 4.0), (1.0, 0.5)])
    def test_value_and_gradients_equal_the_closed_form_in_which_teachers_get_none(self, method, kd_weight, temperature):
        logits, target = random_logits(4)
        value, total, n = ipkd_ta_loss(logits, target, method, kd_weight, temperature), 0, len(target)
        value.backward()
        p, soft = ([(z.detach() / tau).softmax(1) for z in logits] for tau in (1, temperature))
        for k, z in enumerate(logits):
            weight = 0 if method == "ce" or k == 3 else kd_weight
            teacher = soft[3 if method == "ipkd" else min(k + 1, 3)]
            ce, kl = -p[k][range(n), target].log().sum() / n, (teacher * (teacher / soft[k]).log()).sum() / n
            total += (1 - weight) * ce + weight * temperature**2 * kl
            gradient = weight * temperature * (soft[k] - teacher) + (1 - weight) * (p[k] - F.one_hot(target, 5))
            assert_close(z.grad, gradient / n, rtol=1e-12, atol=1e-14)
        assert value.item() == pytest.approx(total.item(), rel=1e-12)

    @rows("k, kd_weight, methods", [(1, 0.7, METHODS), (2, 0.7, METHODS[1:]), (4, 0.0, METHODS)])
    def test_methods_are_identical_where_they_have_the_same_teachers(self, k, kd_weight, methods):
        logits, target = random_logits(k, torch.float32)
        values = {ipkd_ta_loss(logits, target, method, kd_weight, 3.0).item() for method in methods}
        assert len(values) == 1
        assert k == 2 or values.pop() == pytest.approx(sum(F.cross_entropy(z, target).item() for z in logits))

    @each_method
    def test_loss_and_gradients_are_finite_for_logits_of_any_magnitude(self, method):
        extremes = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 1e4]])
        logits = [(sign * extremes).requires_grad_() for sign in (1, -1, 1)]
        loss = ipkd_ta_loss(logits, torch.tensor([1, 0]), method)
        loss.backward()
        assert loss.isfinite() and all(z.grad.isfinite().all() for z in logits)

    @rows("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_logits_are_computed_in_float32_also_under_autocast(self, dtype):
        logits, target = random_logits(3, dtype)
        expected = ipkd_ta_loss([z.float() for z in logits], target, "ipkd-ta", 0.5, 2.0)
        with torch.autocast("cpu", dtype):
            loss = ipkd_ta_loss(logits, target, "ipkd-ta", 0.5, 2.0)
        assert loss.dtype == torch.float32 and loss.equal(expected)

    def test_sandwich_has_both_ends_in_descending_order_and_uniform_widths_between_them_by_the_seed(self):
        a, b, c = (sandwich_widths(10_002, 0.25, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert len(a) == 10_002 and a == sorted(a, reverse=True) and (a[0], a[-1]) == (1.0, 0.25) and a == b != c
        assert a[1:-1:1000] == pytest.approx([1 - 0.075 * i for i in range(10)], abs=0.02)

    @rows("room, use", [
        ("The loss", "ipkd_ta_loss([torch.zeros(2, 3)] * 3, torch.tensor([0, 1])), sandwich_widths(4, 0.25, 1.0)"),
        ("Slimmable", "m, x = SlimmableMobileNetV1(10), torch.zeros(2, 3, 32, 32)\n"
                      "next(m.training_passes(x, lambda *a: a))\nm.calibrate([x], [0.3])\n"
                      "m.eval()(x, 0.3), m.extract(0.3), m.sub_models()"),
        ("MSDNet", "m = MSDNet(10, exits=2, base=1)\nm(torch.zeros(2, 3, 32, 32)), m.extract(1), m.sub_models()")])
    def test_a_copied_room_needs_nothing_but_the_imports(self, room, use):
        header, *parts = re.split(r"# ==== (.+) =+\n", (HERE / "ipkd_ta.py").read_text(encoding="utf-8"))
        imports = "\n".join(line for line in header.splitlines() if line.startswith(("import ", "from ")))
        text, = (text for title, text in zip(parts[::2], parts[1::2]) if title.startswith(room))
        exec(f"{imports}\n{text}\n{use}", {"__name__": "copied"})


CHANNELS = {0.01: (8, 8, 8, 8, 8, 16), 0.25: (8, 16, 32, 64, 128, 256), 0.3: (16, 24, 40, 80, 152, 304),
            0.55: (16, 32, 72, 144, 280, 560), 0.75: (24, 48, 96, 192, 384, 768), 1.0: (32, 64, 128, 256, 512, 1024)}
WAYS = {"one batch": lambda x: [x], "uneven batches": lambda x: x.split([50, 3, 67]),
        "a leftover of one image": lambda x: x.split(119), "a generator": lambda x: (part for part in x.split(64)),
        "a DataLoader with labels": lambda x: DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=33)}


def plain_mobilenet(model, width):
    """An ordinary MobileNet-V1 for CIFAR with the first channels of the slimmable model's weights, in training mode;
    its BatchNorm statistics become those of the last batch."""
    a, b, c, d, e, f = CHANNELS[width]
    counts, strides = [a, b, c, c, d, d, e, e, e, e, e, e, f, f], [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    norm = partial(nn.BatchNorm2d, momentum=1.0)
    layers = [nn.Conv2d(3, a, 3, 1, 1, bias=False), norm(a), nn.ReLU6()]
    for c_in, c_out, stride in zip(counts, counts[1:], strides):
        layers += [nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False), norm(c_in), nn.ReLU6(),
                   nn.Conv2d(c_in, c_out, 1, bias=False), norm(c_out), nn.ReLU6()]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(f, 10))
    convs, norms = ([m for m in model.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d))
    norms = norms[27 * model.widths.index(width):] if model.bn == "switchable" else norms
    theirs = [p for conv, norm in zip(convs, norms) for p in (conv.weight, norm.weight, norm.bias)]
    for p, wide in zip(plain.parameters(), [*theirs, model.classifier.weight, model.classifier.bias], strict=True):
        p.data.copy_(wide[tuple(slice(n) for n in p.shape)])
    return plain


class TestSlimmable:
    @rows("bn", ["universal", "switchable"])
    @rows("classes, reference", [
        (100, [(3_354_112, 238_772), (12_213_248, 869_892), (26_577_408, 1_893_460), (46_446_592, 3_309_476)]),
        (10, [(3_331_072, 215_642), (12_167_168, 823_722), (26_508_288, 1_824_250), (46_354_432, 3_217_226)])])
    def test_cost_equals_the_reference_table_and_universal_weights_are_the_largest_s(self, bn, classes, reference):
        model = SlimmableMobileNetV1(classes, bn=bn)
        assert [(s.macs, s.params) for s in model.sub_models()] == reference
        assert [s.name for s in model.sub_models()] == ["width-0.25", "width-0.5", "width-0.75", "width-1"]
        assert bn == "switchable" or sum(p.numel() for p in model.parameters()) == reference[-1][1]

    @torch.no_grad()
    @rows("bn, width, way", [
        *(("universal", w, "one batch") for w in CHANNELS), ("switchable", 0.75, "one batch"),
        *((bn, 0.25, way) for bn in ("universal", "switchable") for way in WAYS)])
    def test_logits_are_an_ordinary_mobilenet_s_with_sliced_weights_and_statistics_of_all_images(self, bn, width, way):
        torch.manual_seed(0)
        model = shaken(SlimmableMobileNetV1(10, (0.01, 0.25, 0.75, 1.0), bn))
        x, plain = images_of(120) * torch.linspace(0.1, 4, 120)[:, None, None, None], plain_mobilenet(model, width)
        assert_close(model(x, width), plain(x), rtol=1e-4, atol=1e-4)
        model.calibrate(WAYS[way](x), [width])
        assert_close(model.eval()(x, width), plain.eval()(x), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_of_more_images_than_a_batch_the_last_one_counts_like_every_other(self):
        model, x = tiny_model("universal"), images_of(257)
        x[-1] += 100
        model.calibrate(x.split(256))
        stem = ipkd_ta.extract(model, 1)[0]
        assert_close(stem[1].running_mean, stem[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_statistics_are_replaced_by_the_next_calibration_and_forgotten_by_training(self):
        model, x, logits = tiny_model("universal"), images_of(8), []
        for images in (x, x * 5, x):
            model.calibrate([images])
            logits.append(model.eval()(x, 0.1))
        assert logits[0].equal(logits[2]) and not logits[0].equal(logits[1])
        model.train()(x, 0.05)                   # of any width: stale as soon as the weights change
        with pytest.raises(ValueError, match="width 0.1 has no BatchNorm statistics yet: call calibrate"):
            model.eval()(x, 0.1)

    @torch.no_grad()
    @rows("arch", ["universal", "switchable"])
    @rows("saved", [True, False])
    @rows("loading", [True, False])
    def test_a_state_dict_loads_strictly_and_restores_statistics_if_calibrated(self, arch, saved, loading, tmp_path):
        model, other, x = tiny_model(arch), shaken(tiny_model(arch)), images_of(8)
        for network in [model] * saved + [other] * loading:
            network.calibrate([x * 3])
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(read(tmp_path / "state.pt"), strict=True)
        if saved or arch == "switchable":
            exact(model.eval().all_logits(x), other.eval().all_logits(x))
        else:
            with pytest.raises(ValueError, match="no BatchNorm statistics"):
                other.eval()(x, 0.05)

    @torch.no_grad()
    @rows("arch", ["universal", "switchable"])
    @rows("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.2)])
    def test_statistics_follow_the_weights_to_another_format_and_no_width_means_the_largest(
            self, arch, dtype, tolerance):
        model, x = tiny_model(arch), images_of(8)
        exact(model(x), model(x, width=0.15))
        model.calibrate([x])
        before, after = model.eval()(x, 0.15), model.to(dtype)(x.to(dtype))
        assert_close(after.float(), before, rtol=0, atol=tolerance)


ALONE = [(14_967_296, 433_876), (21_707_264, 531_604), (28_792_320, 529_280), (34_801_152, 627_728),
         (41_694_720, 733_088), (46_337_536, 725_248), (51_891_712, 853_984)]


class TestMSDNet:
    def test_cost_equals_the_reference_table(self):
        model, names = MSDNet(100), [f"exit-{k}" for k in range(1, 8)]
        assert [(s.name, (s.macs, s.params)) for s in model.sub_models()] == [*zip(names, ALONE)]
        assert sum(p.numel() for p in model.parameters()) == 3_067_960

    @rows("kwargs, scales, coarsest", [
        # 10 layers, one scale fewer after 4 and 8: per block 1, 2, 3, 4; n = 8 12|16 20|24 (28) 14 18|22 26 (30) 15 19
        (dict(exits=4, base=1, step=1, step_mode="lin_grow", channels=8, growth=4), [3, 3, 2, 1], [48, 80, 72, 76]),
        # 2 layers, one scale fewer after the first: n = 3 4|(5) 2
        (dict(exits=2, base=1, step=1, channels=3, growth=1), [3, 2], [16, 8]),
        # 6 layers, after 2 and 4: per block 2 layers; n = 6 9 12|(15) 7 10|(13) 6 9
        (dict(exits=3, base=2, step=2, step_mode="even", channels=6, growth=3), [3, 2, 1], [48, 40, 36])])
    def test_other_configurations_have_the_right_shapes_and_scale_reductions(self, kwargs, scales, coarsest):
        model, seen = MSDNet(7, **kwargs).eval(), []
        for block in model.blocks:
            block.register_forward_hook(lambda m, args, out: seen.append([tuple(z.shape) for z in out]))
        assert [tuple(z.shape) for z in model(images_of(2))] == [(2, 7)] * kwargs["exits"]
        for maps, n, c in zip(seen, scales, coarsest, strict=True):   # finer: twice the pixels, half the channels
            assert maps == [(2, c // 2**i, 8 * 2**i, 8 * 2**i) for i in reversed(range(n))]

    def test_weights_start_from_pytorch_s_own_initialisation_and_those_of_slimmable_as_published(self):
        torch.manual_seed(0)
        for conv in SlimmableMobileNetV1(10).convs[2::2]:
            assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels)**0.5, rel=0.1)
        for module in (m for m in MSDNet(10).modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            bound = module.weight[0].numel()**-0.5     # uniform within +- 1 / sqrt(inputs), also a linear bias
            assert bound * 0.8 < module.weight.std() * 3**0.5 < bound * 1.2 and module.weight.abs().max() <= bound
            assert module.bias is None if isinstance(module, nn.Conv2d) else module.bias.all()

    def test_gradient_equilibrium_gives_each_block_the_mean_of_what_the_exits_from_it_on_send(self):
        plain, balanced = (brief_msdnet(4, gradient_equilibrium=on).double().train() for on in (False, True))
        losses, same = ([z.square().sum() for z in model(images_of(4).double())] for model in (plain, balanced))
        exact(losses, same)                      # the answers stay as they are
        sum(same).backward()
        for name, p in plain.named_parameters():
            if name.startswith("blocks") and p.ndim == 4:
                own = losses[int(name.split(".")[1]):]
                sent = [torch.autograd.grad(z, p, retain_graph=True, allow_unused=True)[0] for z in own]
                if all(gradient is not None for gradient in sent):     # read by its own exit, not only by later ones
                    assert_close(balanced.get_parameter(name).grad, sum(sent) / len(sent), rtol=1e-9, atol=1e-9)


def loss_of(logits=(torch.zeros(6, 5),) * 2, target=torch.zeros(6, dtype=torch.int64), **options):
    return ipkd_ta_loss(list(logits), target, **options)


class TestSubModels:
    @rows("options", [{}, {"exits": 1, "base": 1, "step": 1}, {"exits": 3, "base": 2, "step": 3},
                      {"exits": 4, "base": 1, "step": 1, "step_mode": "lin_grow"}])
    def test_an_extracted_exit_gives_the_same_logits_by_all_of_its_weights_with_batchnorm_folded_too(self, options):
        model, x = brief_msdnet(**options), images_of(8)
        logits = [z.detach() for z in model(x)]
        for k, expected in enumerate(logits, start=1):
            extracted = ipkd_ta.extract(model, k)
            assert_close(found := extracted(x), expected, rtol=1e-5, atol=1e-5)
            found.square().sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in extracted.parameters())
            assert_close(ipkd_ta.fold_bn(extracted)(x), expected, rtol=1e-4, atol=1e-4)
            assert "BatchNorm" not in str(extracted) and "BatchNorm" in str(model)
        assert_close(ipkd_ta.fold_bn(model)(x), logits, rtol=1e-4, atol=1e-4)

    def test_lazy_evaluation_saves_macs_at_every_exit_from_which_a_finer_scale_is_left_over(self):
        model, x = MSDNet(100), torch.zeros(1, 3, 32, 32)
        ratios = [macs_of(ipkd_ta.extract(model, k), x) / macs for k, (macs, _) in enumerate(ALONE, start=1)]
        assert ratios[:5] == pytest.approx([0.886, 0.908, 0.965, 0.966, 0.968], abs=5e-4) and ratios[5:] == [1, 1]

    @torch.no_grad()
    @rows("arch, which, width", [("universal", 1, 0.05), ("universal", 3, 0.15), ("universal", 0.12, 0.12),
                                 ("switchable", 2, 0.1), ("switchable", np.float32(0.15), 0.15)])
    def test_an_extracted_width_gives_the_same_logits_at_the_cost_of_its_own(self, arch, which, width):
        model, x = shaken(tiny_model(arch)).double(), images_of(5).double()
        model.calibrate([images_of(9)], [width])
        extracted, expected = ipkd_ta.extract(model.eval(), which), model(x, width)
        assert_close(extracted(x), expected, rtol=1e-12, atol=1e-12)
        cost, = SlimmableMobileNetV1(10, widths=(width,)).sub_models()
        assert sum(p.numel() for p in extracted.parameters()) == cost.params and macs_of(extracted, x[:1]) == cost.macs
        assert_close(ipkd_ta.fold_bn(extracted)(x), expected, rtol=1e-10, atol=1e-10)
        assert "BatchNorm" not in str(extracted)

    @torch.no_grad()
    @rows("shares", [[0, 0, 0, 1], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0, 0.25, 0.25]])
    def test_early_exit_equals_the_offline_result_and_computes_no_more_than_it_needs(self, shares):
        model, images, seen = brief_msdnet(4), images_of(64), []
        confidence, answers = torch.stack(model(images)).softmax(2).max(2)                 # all exits for all images
        thresholds = exit_thresholds(confidence, shares)
        exits = [next(k for k in range(4) if image[k] >= thresholds[k]) for image in confidence.T.tolist()]
        assert [exits.count(k) / 64 for k in range(4)] == shares
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
        found, taken = early_exit(model, images, thresholds)
        exact(found, answers[exits, range(64)])
        assert taken.tolist() == [k + 1 for k in exits]
        assert seen == [n for n in (sum(e >= k for e in exits) for k in range(4)) if n]

    @rows("call, message", [
        (lambda: loss_of([]), "logits"), (lambda: loss_of([torch.zeros(6, 5), torch.zeros(6, 4)]), r"\(6, 4\)"),
        (lambda: loss_of([torch.zeros(6)]), r"\(6,\)"), (lambda: loss_of([torch.zeros(0, 5)]), r"\(0, 5\)"),
        (lambda: loss_of(target=torch.zeros(5, dtype=torch.int64)), r"\(5,\)"), (lambda: loss_of(method="kd"), "'kd'"),
        *((lambda w=w: loss_of(kd_weight=w), f"{w}") for w in (-0.1, 1.5, math.nan)),
        *((lambda t=t: loss_of(temperature=t), f"{t}") for t in (0.0, math.nan, math.inf)),
        *((lambda a=a: sandwich_widths(*a), "n={}, low={}, high={}".format(*a)) for a in (
            (1, 0.25, 1.0), (4, 1.0, 0.25), (4, 0.0, 1.0), (4, 0.5, 0.5), (2.5, 0.25, 1.0), (4, 0.25, math.inf))),
        *((lambda w=w: SlimmableMobileNetV1(10, widths=w), m) for w, m in (
            ((0.5, 0.25), r"\[0.5, 0.25\]"), ((0.5, 0.5), "ascend"), ((), r"\[\]"), ((0.0, 1.0), "0.0"),
            ((0.5, 1.5), "1.5"), ((0.5, math.nan), "nan"), (("half",), "'half'"))),
        (lambda: SlimmableMobileNetV1(bn="batch"), "'batch'"), (lambda: SlimmableMobileNetV1(0), "num_classes.* 0"),
        *((lambda w=w, use=use: use(tiny_model("universal"), w), f"width {w} ") for w in (0.04, 1.1, -1.0, math.nan)
          for use in (lambda m, w: m(images_of(1), w), lambda m, w: m.calibrate([images_of(2)], [w]), ipkd_ta.extract)),
        (lambda: tiny_model("switchable")(images_of(1), 0.12), "width 0.12"), (lambda: MSDNet(exits=0), "exits"),
        (lambda: ipkd_ta.extract(tiny_model("universal"), 0.1), "width 0.1 has no BatchNorm statistics"),
        (lambda: MSDNet(growth=1.5), "growth.* 1.5"), (lambda: MSDNet(step_mode="odd"), "'odd'"),
        *((lambda k=k: ipkd_ta.extract(brief_msdnet(3), k), f"{k}") for k in (0, 4, 1.5, 1.0)),
        (lambda: early_exit(brief_msdnet(2).train(), images_of(1), [0, 0]), "training"),
        *((lambda t=t: early_exit(brief_msdnet(2), images_of(1), t), "2 thresholds") for t in ([0], [math.nan, 0])),
        *((lambda s=s: exit_thresholds(torch.rand(3, 10), s), "3 numbers from 0 to 1 with the sum 1") for s in (
            [1], [1, 1, 1], [1.5, -0.5, 0], [math.nan, 0.5, 0.5])),
        (lambda: ipkd_ta.fold_bn(brief_msdnet(2).train()), "eval mode"),
        (lambda: ipkd_ta.fold_bn(tiny_model("universal").eval()), "eval mode"),
        (lambda: ipkd_ta.fold_bn(ipkd_ta.fold_bn(brief_msdnet(2))), "eval mode")])
    def test_a_wrong_argument_is_named(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    @torch.no_grad()
    @rows("n", [np.int64, np.uint8])
    def test_numpy_numbers_are_as_good_as_python_s_and_float_noise_makes_no_other_width(self, n):
        model, x = SlimmableMobileNetV1(n(10), np.array([0.25, 0.5], dtype=np.float32)), images_of(4)
        model.calibrate([x], np.arange(0.25, 0.501, 0.05))
        for width in (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, np.float32(0.3), 0.1 + 0.2):
            model.eval()(x, width)
        exits = MSDNet(n(10), exits=n(2), base=n(1)).eval()
        ipkd_ta.extract(exits, n(2)), early_exit(exits, x, np.array([1, 1]))
        loss_of(kd_weight=np.float32(1), temperature=n(2)), sandwich_widths(n(4), np.float32(0.25), np.float64(1))
        exit_thresholds(torch.rand(2, 9), np.array([0.5, 0.5], dtype=np.float32))


def pictures_of(image):
    """Every picture that augmentation may make of an image (3, 32, 32): {its bytes: (dy, dx, flipped)}."""
    padded, shifts = F.pad(image, (4, 4, 4, 4)), [(dy, dx) for dy in range(9) for dx in range(9)]
    crops = {(*s, 0): padded[:, s[0]:s[0] + 32, s[1]:s[1] + 32] for s in shifts}
    crops.update({(*s, 1): crops[(*s, 0)].flip(2) for s in shifts})
    return {crop.numpy().tobytes(): how for how, crop in crops.items()}


def write_cifar(root, name, patch):
    """A small CIFAR in its own on-disk format, packed too, with its checksums made known to torchvision; no network.
    Returns {split: (images, labels)} and torchvision's class."""
    cls, n, generator = getattr(torchvision.datasets, name.upper()), int(name[5:]), torch.Generator().manual_seed(0)
    folder, splits, archive = root / cls.base_folder, {}, root / cls.filename
    folder.mkdir(parents=True)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    for split, files in ("train", cls.train_list), ("test", cls.test_list):
        pixels = torch.randint(256, (len(files), 8, 3072), dtype=torch.uint8, generator=generator)
        target = torch.randint(n, (len(files), 8), generator=generator)
        patch.setattr(cls, f"{split}_list", [
            write(file, {"data": x.numpy(), "fine_labels" if n == 100 else "labels": y.tolist()})
            for (file, _), x, y in zip(files, pixels, target)])
        splits[split] = pixels.view(-1, 3, 32, 32), target.flatten()
    names = write(cls.meta["filename"], {cls.meta["key"]: [f"class {i}" for i in range(n)]})
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, cls.base_folder)
    for key, value in {"meta": {**cls.meta, "md5": names[1]}, "url": "http://127.0.0.1:9/none",      # nothing answers
                       "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest()}.items():
        patch.setattr(cls, key, value)
    return splits, cls


def write_images(root, splits=("train", "test"), classes=("café", "dog"), n=4):
    generator = np.random.default_rng(0)
    for folder in (root / split / c for split in splits for c in classes):
        folder.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{i} ä.png")
    return root


def litter(root):
    for folder in (root, *(root / split for split in ("train", "test", "train/café", "test/dog"))):
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "ehthumbs.db", "THUMBS.DB", "Icon\r"):
            (folder / name).write_bytes(b"litter")
        for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN"):
            write_images(folder, [name], ["a"], n=1)
    (root / "train/readme.txt").write_text("a file beside the classes")


def read_one(root, name, write):
    """The image (32, 32, 3) that training sees of a file made by write(path)."""
    for split in ("train", "test"):
        (root / split / "a").mkdir(parents=True)
        write(root / split / "a" / name)
    return ipkd_ta.load_data("folder", root).splits["train"][0][0].permute(1, 2, 0).numpy().astype(int)


def on_white(color, alpha):
    """color (H, W, 3) with alpha (H, W), both from 0 to 1, on white, as bytes."""
    return 255 * (1 - alpha[..., None] + color * alpha[..., None])


def write_png(path, samples, depth, kind, chunks):
    """A PNG of samples (H, W, channels) of `depth` bits. kind: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA."""
    bits = samples.reshape(len(samples), -1, 1) >> np.arange(depth)[::-1] & 1
    rows = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    size = struct.pack(">IIBBBBB", samples.shape[1], len(samples), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", size), *chunks, (b"IDAT", data), (b"IEND", b""))))


CLEAR_UNKNOWN = [(0, 2), (0, 4), (0, 16), (2, 16)]          # kind and depth of PNGs that Pillow reads wrongly
PIXELS = np.random.default_rng(1).integers(256, size=(32, 32, 4)).astype(np.uint8)
COLORS = np.array([[10, 20, 30], [200, 0, 0], [255, 255, 255], [0, 0, 200]])
FOUR = Image.fromarray(PIXELS[..., 0] % 4).convert("P")
FOUR.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
MORE = {"save_all": True, "append_images": [Image.new("RGBA", (32, 32))]}
CLEAR = on_white(PIXELS[..., :3] / 255, PIXELS[..., 3] / 255)
QUARTERS = np.kron([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]]], np.ones((16, 16, 1))).astype(np.uint8)
TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 1)}


class TestData:
    def test_augmented_images_are_shifted_by_at_most_4_zero_padded_pixels_and_flipped_in_half_of_the_cases(self):
        images = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        batch = ipkd_ta.augment(images, torch.Generator().manual_seed(0))
        seen = [pictures_of(image)[result.contiguous().numpy().tobytes()] for image, result in zip(images, batch)]
        assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(9)) and 15 < sum(s[2] for s in seen) < 45

    def test_calibration_batches_are_augmented_as_in_training_normalised_and_the_same_at_every_call(self):
        data = ipkd_ta.load_data("shapes", train_size=30)
        first, again = (torch.cat(list(ipkd_ta.calibration_batches(data))) for _ in range(2))
        pixels = ((first * data.std.view(1, 3, 1, 1) + data.mean.view(1, 3, 1, 1)) * 255).round().to(torch.uint8)
        known = [pictures_of(image) for image in data.splits["train"][0]]
        pictures = [x.contiguous().numpy().tobytes() for x in pixels]
        found = [(i, known[i][p]) for p in pictures for i in range(30) if p in known[i]]
        assert sorted(i for i, _ in found) == list(range(30)) and len({how for _, how in found}) > 20
        exact(first, again)

    @rows("state, reason", [("unpacked", None), ("packed", None), ("empty", "is not there"), ("cut", "incomplete")])
    @rows("name", ["cifar10", "cifar100"])
    def test_cifar_is_read_from_its_format_or_one_line_says_why_not(
            self, name, state, reason, tmp_path, monkeypatch, capfd):
        splits, cls = write_cifar(tmp_path / "data", name, monkeypatch)
        archive, folder = tmp_path / "data" / cls.filename, tmp_path / "data" / cls.base_folder
        if state != "unpacked":
            shutil.rmtree(folder)
        if state != "packed":
            content = archive.read_bytes()[:-100]
            archive.write_bytes(content) if state == "cut" else archive.unlink()
        if reason:
            err = refused(capfd, dataset=name, data_dir=tmp_path / "data", out=tmp_path / "run")
            assert all(part in err for part in (name, str(archive), reason, "www.cs.toronto.edu/~kriz/cifar.html"))
            assert not (tmp_path / "run").exists()
        else:
            data, figures = ipkd_ta.load_data(name, tmp_path / "data"), {
                "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
                "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}
            exact(data.splits, splits)
            exact(torch.stack([data.mean, data.std]), torch.tensor(figures[name]))
            assert data.classes == [f"class {i}" for i in range(int(name[5:]))]

    @rows("change", [lambda root: None, lambda root: os.rename(root / "test", root / "val"), litter,
        lambda root: os.rename(root / "test/café", root / "test" / unicodedata.normalize("NFD", "café"))])
    def test_a_folder_gives_its_images_in_the_order_of_the_names_whatever_lies_beside_them(self, change, tmp_path):
        splits, labels = {}, torch.tensor([0] * 4 + [1] * 4)
        for split in ("train", "test"):
            files = sorted((write_images(tmp_path, [split]) / split).rglob("*.png"))
            pixels = np.stack([np.array(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
            splits[split] = torch.from_numpy(pixels), labels
        change(tmp_path)
        data, x = ipkd_ta.load_data("folder", tmp_path), splits["train"][0].double() / 255
        exact(data.splits, splits)
        assert data.classes == ["café", "dog"]
        assert_close(data.mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
        assert_close(data.std.double(), x.std((0, 2, 3), unbiased=False), rtol=1e-6, atol=0)

    @rows("kind, depth, transparent", [(kind, depth, clear) for kind, depths in (
        (0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16)))
        for depth in depths for clear in (True, False) if not clear or (kind, depth) not in CLEAR_UNKNOWN])
    def test_a_png_of_every_kind_is_read_as_a_viewer_shows_it_on_white(self, kind, depth, transparent, tmp_path):
        generator, top, alpha, chunks = np.random.default_rng(0), 2**depth - 1, np.ones((32, 32)), []
        samples = generator.integers(2**depth, size=(32, 32, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]))
        if kind in (4, 6):
            alpha = samples[..., -1] / top if transparent else alpha
            samples[..., -1] = (alpha * top).round()
        elif kind != 3 and transparent:          # one value is transparent; one that differs in the last bit is not
            samples[8:16] = key = np.full(samples.shape[-1], max(1, top * 2 // 3))
            samples[16:20] = key ^ 1
            alpha, chunks = 1.0 * (samples != key).any(-1), [(b"tRNS", key.astype(">u2").tobytes())]
        color = samples[..., :-1] / top if kind in (4, 6) else samples / top
        if kind == 3:
            palette = generator.integers(256, size=(2**depth, 4)).astype(np.uint8)
            palette[:, 3] = palette[:, 3] if transparent else 255
            color, alpha = palette[samples[..., 0], :3] / 255, palette[samples[..., 0], 3] / 255
            chunks = [(b"PLTE", palette[:, :3].tobytes()), *[(b"tRNS", palette[:, 3].tobytes())] * transparent]
        image = read_one(tmp_path, "a.png", lambda path: write_png(path, samples, depth, kind, chunks))
        assert np.abs(image - on_white(color * np.ones(3), alpha)).max() < (3 if depth == 16 else 1.1)

    @rows("name, picture, options, expected", [
        *((f"a.{s}", Image.fromarray(PIXELS), {"lossless": True, "exact": 1}, CLEAR) for s in ("webp", "tiff", "tga")),
        ("animated.png", Image.fromarray(PIXELS), MORE, CLEAR),
        ("animated.webp", Image.fromarray(PIXELS[..., :3]), {**MORE, "lossless": True}, PIXELS[..., :3]),
        *(("a.gif", FOUR, {"transparency": 2, **more}, COLORS[np.array(FOUR)]) for more in ({}, MORE)),
        *((f"turned {turn}.{suffix}", Image.fromarray(QUARTERS), {"quality": 100, "exif": turn}, TURNS[turn](QUARTERS))
          for suffix, turn in (*(("png", turn) for turn in TURNS), ("jpg", 6), ("webp", 8), ("tiff", 5))),
        ("1 pixel.png", Image.new("RGB", (1, 1), (9, 99, 199)), {}, (9, 99, 199)),
        ("breit, ü.png", Image.new("RGB", (40, 3), (9, 99, 199)), {}, (9, 99, 199)),
        ("16 bit.tiff", Image.new("I;16", (8, 8), 30_000), {}, (117, 117, 117)),
        ("ink.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, (255, 0, 0)),
        ("ink.tiff", Image.new("CMYK", (8, 8), (51, 0, 102, 51)), {}, (163, 204, 122)),
        ("black and white.tiff", Image.new("1", (8, 8), 1), {}, (255, 255, 255))])
    def test_an_unusual_image_is_read_as_a_viewer_shows_it(self, name, picture, options, expected, tmp_path, recwarn):
        if "exif" in options:
            exif = Image.Exif()
            exif[0x0112] = options["exif"]
            options = {**options, "exif": exif}
        error = np.abs(read_one(tmp_path, name, lambda path: picture.save(path, **options)) - expected)
        assert (error[4:-4:8, 4:-4:8].max() <= 6 if "exif" in options else error.max() <= 2) and not recwarn.list

    @rows("size", [8, 32, 96])
    @rows("name", ["a.png", "a.jpg"])
    @rows("tall", [False, True])
    def test_of_a_photo_the_centre_is_taken_its_shorter_side_at_the_image_size(self, tall, name, size, tmp_path):
        photo = np.zeros((300, 900, 3), np.uint8)
        photo[:, 300:600], photo[120:180, 420:480] = (0, 200, 0), 255      # a green centre with a bright middle
        picture = Image.fromarray(photo.transpose(1, 0, 2) if tall else photo)
        picture.save(tmp_path / name, quality=100, subsampling=0)
        pixels = np.array(ipkd_ta.read_image(tmp_path / name, size)).astype(int)
        assert pixels.shape == (size, size, 3)
        assert np.abs(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] - [0, 200, 0]).max() < (25 if size > 8 else 60)
        assert pixels[size // 2 - 1:size // 2 + 1, size // 2 - 1:size // 2 + 1, 0].min() > (240 if size > 8 else 90)

    @rows("name, write, reason", [("no bytes.png", lambda path: path.write_bytes(b""), "cannot identify"),
        ("pipe.png", os.mkfifo, "not a file"),
        ("cut.png", lambda path: path.write_bytes((path.parents[1] / "dog/0 ä.png").read_bytes()[:-999]), "truncated"),
        ("folder in a class", os.mkdir, "not a file"), *(
            (f"tRNS {kind} {depth}.png", lambda path, depth=depth, kind=kind: write_png(
                path, np.zeros((8, 8, kind + 1), int), depth, kind, [(b"tRNS", bytes(2 * kind + 2))]), "transparent")
            for kind, depth in CLEAR_UNKNOWN), ("32 bit.tiff", Image.new("I", (8, 8), 100_000).save, "mode I"),
        ("float.tiff", Image.new("F", (8, 8), 0.5).save, "mode F"),
        ("link to itself.png", lambda path: path.symlink_to(path), "not a file"),
        ("link to its folder", lambda path: path.symlink_to(path.parent, target_is_directory=True), "not a file")])
    def test_an_impossible_image_is_named_in_one_line(self, name, write, reason, tmp_path, recwarn, capfd):
        path = write_images(tmp_path / "images", n=1) / "train/café" / name
        write(path)
        err = refused(capfd, dataset="folder", data_dir=tmp_path / "images", out=tmp_path / "out")
        assert f"'{path}'" in err and reason in err and not recwarn.list and not (tmp_path / "out").exists()

    @rows("spoil, message", [
        (shutil.rmtree, "has no folder 'train'"), (lambda root: shutil.rmtree(root / "test"), "has no folder 'test'"),
        (lambda root: os.rename(root / "test/dog", root / "test/mouse"), "dog, mouse"),
        (lambda root: shutil.rmtree(root / "test/dog"), "dog"),
        (lambda root: [path.unlink() for path in (root / "train/dog").iterdir()], "dog"),
        (lambda root: [shutil.rmtree(root / "train" / c) for c in ("café", "dog")], "there is none"),
        (lambda root: write_images(root, classes=[unicodedata.normalize("NFD", "café")]), "café"),  # a class twice
        (lambda root: [(root / f"{s}/dog/{i}").write_bytes(b"junk") for s in ("train", "test") for i in range(6)],
         "^ipkd_ta.py: error: 12 files .*test/dog/3' "), (lambda root: None, "folder has 8")])    # and 9 are asked for
    def test_a_wrong_folder_is_one_clear_line(self, spoil, message, tmp_path, capfd):
        spoil(write_images(tmp_path / "images"))
        options = {"train_size": 8, "val_size": 1} if "8" in message else {"epochs": 1}
        options.update(dataset="folder", data_dir=tmp_path / "images", out=tmp_path / "out", **TINY["msdnet"])
        assert re.search(message, refused(capfd, **options)) and not (tmp_path / "out").exists()


class TestOptions:
    @rows("options, reason", [
        *((f"--arch slimmable {o}", f"{o.split()[0]} has no effect .*--arch") for o in ("--exits 3", "--base 1",
            "--step 1", "--step-mode even", "--channels 8", "--growth 4", "--compile", "--gradient-equilibrium")),
        *((f"{o}", f"{o.split()[0]} has no effect .*--arch") for o in ("--widths 1", "--bn universal", "--sandwich 3")),
        ("--arch slimmable --bn switchable --sandwich 3", "--sandwich has no effect .*--bn"),
        *((f"--method ce {o} 1", f"{o} has no effect") for o in ("--kd-weight", "--kd-warmup", "--temperature")),
        ("--data-dir d", "--data-dir has no effect .*--dataset"), ("--resume --overwrite", "--overwrite has no effect"),
        *((f"{mode} {o}", f"{o.split()[0]} has no effect") for mode, options in (
            ("", ("--plot a.svg", "--fold-bn", "--sub-model exit-1")),
            ("--benchmark", ("--plot a.svg", "--data-dir d", "--out o")),
            ("--eval c.pt", ("--lr 0.1", "--val-size 9", "--fold-bn", "--sub-model exit-1", "--out o")),
            ("--report r", ("--seed 1", "--arch msdnet", "--overwrite"))) for o in options),
        ("--arch slimmable --widths 0.5 0.25", r"ascend within \(0, 1\], got \[0.5, 0.25\]"), ("--widths x", "'x'"),
        *((o, o.split()[1]) for o in (
            "--arch resnet", "--method kd", "--dataset mnist", "--batch-size 1", "--epochs 1.5", "--lr -1", "--lr 0",
            "--lr nan", "--lr inf", "--kd-weight 1.5", "--kd-weight nan", "--kd-warmup -1", "--lr-warmup nan",
            "--exits 0", "--temperature 0", "--temperature inf", "--weight-decay -1", "--sandwich 1", "--epochs 0",
            "--seed -1", "--device abacus", "--device meta", "--device cuda:99")),
        (f"--train-size {'9' * 20}", "--train-size"), ("--nonsense", "--nonsense"), ("--epoch 1", "--epoch"),
        ("stray", "stray"), ("--report nowhere", "nowhere"), ("--export a.pt2", "--eval")])
    def test_a_wrong_option_is_one_clear_line_and_status_2(self, options, reason, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        assert re.search(reason, refused(capfd, *options.split())) and not list(tmp_path.iterdir())


def after_one_step(arch, tmp_path, **changes):
    """Parameters of a tiny network before and after a step on 12 images that are not augmented, at learning rate 0.05,
    and its gradient; in float64, for in float32 rounding moves some outputs across a kink of ReLU6."""
    with float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipkd_ta, "augment", lambda images, generator: images)
        patch.setattr(ipkd_ta, "sandwich_widths", lambda *args, **kwargs: list(DRAWN))
        data, model, reference = ipkd_ta.load_data("shapes", train_size=12), tiny_model(arch), tiny_model(arch)
        cfg = config(arch, train_size=12, schedule="linear", lr_warmup=0.0, kd_warmup=0.0, **changes)
        images, labels = data.splits["train"]
        ipkd_ta.train_step(reference, data.normalise(images), labels, cfg, 0.5, NO_SCALER, None)
        before = [p.detach().clone() for p in model.parameters()]
        ipkd_ta.train(cfg, model, data, tmp_path)
    return before, [*model.parameters()], [p.grad for p in reference.parameters()]


class TestTraining:
    @rows("arch, size", [("msdnet", 64), ("msdnet", 96), ("universal", 64), ("switchable", 96)])
    def test_images_of_another_size_train_and_their_costs_are_those_of_that_size(self, arch, size, tmp_path):
        write_images(tmp_path / "data", n=8)
        assert train_tiny(arch, tmp_path / "run", dataset="folder", data_dir=tmp_path / "data", image_size=size,
                          train_size=16, val_size=0) == 0
        cfg, model, _ = ipkd_ta.load_checkpoint(tmp_path / "run/checkpoint.pt")
        for k, sub in enumerate(read(tmp_path / "run/results.json")["sub_models"], start=1):
            shipped, cost = ipkd_ta.extract(model, k), model.sub_models(224)[k - 1]
            if arch == "msdnet":
                shipped = ipkd_ta.MSDExit(model.blocks[:k], model.heads[k - 1])           # not lazily
            assert (cfg.image_size, sub["macs"]) == (size, macs_of(shipped, torch.zeros(1, 3, size, size)))
            assert cost.macs == macs_of(shipped, torch.zeros(1, 3, 224, 224)) and cost.params == sub["params"]

    @each_network
    def test_init_begins_with_the_weights_of_another_run_and_new_classifiers_for_other_classes(
            self, arch, trained, tmp_path, capfd):
        path, still = trained / arch / "checkpoint.pt", {"lr": 1e-9, "weight_decay": 0.0, "epochs": 1}
        data = {"dataset": "folder", "data_dir": write_images(tmp_path / "data", n=20)}
        for out, options in (("same", {}), ("other", data)):
            assert train_tiny(arch, tmp_path / out, init=path, **{**still, **options}) == 0
        before, same, other = (ipkd_ta.load_checkpoint(p)[1] for p in (
            path, tmp_path / "same/checkpoint.pt", tmp_path / "other/checkpoint.pt"))
        heads = {name for name, p in before.named_parameters() if p.shape[0] == 10}
        for name, p in before.named_parameters():
            assert_close(same.get_parameter(name), p, rtol=0, atol=1e-5)
            there = other.get_parameter(name)
            assert len(there) == 2 if name in heads else torch.allclose(there, p, atol=1e-5)
        wrong = trained / ("msdnet" if arch == "universal" else "universal") / "checkpoint.pt"
        assert "--init" in refused(capfd, init=wrong, out=tmp_path / "wrong", **TINY[arch], **QUICK)
        assert not (tmp_path / "wrong").exists()

    def test_the_demonstration_teaches(self, tmp_path, capfd):
        assert run("--out", tmp_path) == 0
        top1 = [sub["top1"] for sub in read(tmp_path / "results.json")["sub_models"]]
        assert min(top1) > 75 and top1[-1] >= top1[0] and "an epoch takes " in capfd.readouterr().out

    @each_method
    @rows("arch, n", [("msdnet", 1), ("universal", 4), ("switchable", 3)])
    def test_gradients_of_a_step_are_those_of_the_whole_loss_at_once(self, arch, n, method, monkeypatch):
        monkeypatch.setattr(ipkd_ta, "sandwich_widths", lambda *args, **kwargs: list(DRAWN))
        x, y, at_once, model = images_of(8), torch.arange(8), tiny_model(arch), tiny_model(arch)
        passes = [*at_once.training_passes(x, lambda low, high: DRAWN)]
        whole = ipkd_ta_loss([z for logits in reversed(passes) for z in logits], y, method, 0.5)
        whole.backward()
        assert_close(ipkd_ta.train_step(model, x, y, config(arch, method=method), 0.5, NO_SCALER, None), whole)
        for p, expected in zip(model.parameters(), at_once.parameters()):
            assert_close(p.grad, expected.grad, rtol=1e-3, atol=1e-5)
        assert len(passes) == n

    def test_only_one_width_s_activations_are_alive_at_a_time(self):
        model, x, y, alive, peaks = tiny_model("switchable"), images_of(4), torch.arange(4), [], []

        class Saved:                             # a tensor that is kept for the backward pass
            def __init__(self, tensor):
                self.tensor = tensor
                alive.append(None)
                peaks[-1] = max(peaks[-1], len(alive))

            def __del__(self):
                alive.pop()

        for step in (lambda: ipkd_ta_loss([model(x, 0.15)], y).backward(),
                     lambda: ipkd_ta.train_step(model, x, y, config("switchable"), 0.5, NO_SCALER, None)):
            peaks.append(0)
            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
                step()
        assert 0 < peaks[1] < 1.2 * peaks[0]     # of the largest width only, and of the whole step

    @rows("schedule, warmup, factors", [
        ("multistep", 0, [1, 1, 0.1, 0.01]), ("linear", 0, [0.875, 0.625, 0.375, 0.125]),
        ("cosine", 0, [(1 + math.cos(math.pi * p)) / 2 for p in (0.125, 0.375, 0.625, 0.875)]),
        ("linear", 0.5, [0.875 * 0.25, 0.625 * 0.75, 0.375, 0.125])])
    def test_learning_rate_and_kd_weight_follow_the_options_in_mid_step(self, schedule, warmup, factors, tmp_path):
        assert train_tiny("msdnet", tmp_path, epochs=4, train_size=16, lr=0.2, schedule=schedule, lr_warmup=warmup,
                          kd_weight=0.8, kd_warmup=0.5) == 0
        records = read(tmp_path / "metrics.jsonl")
        assert [r["lr"] for r in records] == pytest.approx([0.2 * factor for factor in factors])
        assert [r["kd_weight"] for r in records] == pytest.approx([0.2, 0.6, 0.8, 0.8])

    def test_eval_every_evaluates_each_nth_and_the_last_epoch_and_changes_no_weight(self, trained, tmp_path):
        assert train_tiny("universal", tmp_path, epochs=3, eval_every=2) == 0
        (each, a), (second, b) = ((read(out / "metrics.jsonl"), read(out / "checkpoint.pt")["model"]) for out in (
            trained / "universal", tmp_path))
        assert ["top1" in r for r in each] == [True] * 3 and ["top1" in r for r in second] == [False, True, True]
        assert each[1:] == second[1:]
        exact(a, b)

    @each_network
    @each_method
    def test_every_combination_trains_writes_its_files_and_prints_its_table(self, arch, method, tmp_path, capfd):
        assert train_tiny(arch, tmp_path, method=method) == 0
        assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "config.json", "metrics.jsonl", "results.json"}
        (out, err), found = capfd.readouterr(), read(tmp_path / "results.json")
        subs, options = found["sub_models"], read(tmp_path / "config.json")
        assert [s["macs"] for s in subs] == sorted(s["macs"] for s in subs) and err == "" and options == found["config"]
        assert (options["method"], options["train_size"], options["amp"]) == (method, 40, "off")
        start, end = re.split(rf"epoch 1/1 .*loss \d\.\d+.* {subs[0]['name']} [\d.]+ %, {subs[-1]['name']} .*\n", out)
        assert [line.split() for line in end.splitlines()[1:]] == [
            [s["name"], f"{s['macs'] / 1e6:.2f}", f"{s['params']:,}", *(f"{s[k]:.2f}" for k in ("top1", "top5")),
             f"{s['loss']:.4f}"] for s in subs]
        digest = hashlib.sha256((HERE / "ipkd_ta.py").read_bytes()).hexdigest()
        expected = {"ipkd_ta": ipkd_ta.__version__, "sha256": digest[:12], "torch": torch.__version__}
        assert found["versions"].items() >= expected.items()
        assert f"method {method}" in start and ("kd_weight" in start) == (method != "ce")

    @each_network
    @rows("weight_decay", [1e-4, 0.3, 0.0])
    def test_a_step_is_nesterov_sgd_with_decay_of_full_convolutions_and_classifier_or_of_all_of_msdnet(
            self, arch, weight_decay, tmp_path):
        before, after, gradients = after_one_step(arch, tmp_path, weight_decay=weight_decay)
        decayed = {tuple(m.weight.shape) for m in tiny_model(arch).modules()
                   if isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.groups == 1}
        for new, old, gradient in zip(after, before, gradients):
            decay = weight_decay if arch == "msdnet" or tuple(old.shape) in decayed else 0
            assert_close(new, old - 0.05 * 1.9 * (gradient + decay * old), rtol=1e-8, atol=1e-10)

    @rows("n, sizes", [(40, [16, 16]), (33, [16, 16]), (16, [16]), (7, [7])])
    def test_every_step_sees_a_full_batch_drawn_anew_in_each_epoch(self, n, sizes, tmp_path, monkeypatch):
        data, seen = ipkd_ta.load_data("shapes", train_size=n), []
        data.splits["train"] = data.splits["train"][0], torch.arange(n)
        monkeypatch.setattr(ipkd_ta, "train_step", lambda model, images, labels, *args: (
            seen.append(labels.tolist()) or torch.tensor(float(len(seen)))))
        ipkd_ta.train(config("msdnet", epochs=8, eval_every=8), tiny_model("msdnet"), data, tmp_path)
        assert [len(batch) for batch in seen] == sizes * 8
        epochs = [tuple(sum(seen[i:i + len(sizes)], [])) for i in range(0, len(seen), len(sizes))]
        assert all(len(set(epoch)) == sum(sizes) for epoch in epochs) and len(set(epochs)) == 8
        assert set(sum(epochs, ())) == set(range(n))        # each image comes in at some time
        assert read(tmp_path / "metrics.jsonl")[0]["loss"] == (1.5 if len(sizes) == 2 else 1)

    @rows("n", [2, 3, 6])
    def test_a_step_trains_as_many_widths_as_sandwich_says_both_ends_among_them(self, n):
        model, widths, generator = tiny_model("universal"), [], torch.Generator().manual_seed(0)
        model.register_forward_hook(lambda module, args, out: widths.append(args[1]))
        x, y = images_of(4), torch.arange(4)
        ipkd_ta.train_step(model, x, y, config("universal", sandwich=n), 0.5, NO_SCALER, generator)
        assert len(widths) == n and widths == sorted(widths, reverse=True) and (widths[0], widths[-1]) == (0.15, 0.05)

    @rows("step, spoiled", [(3, "loss"), (4, "weights"), (4, "statistics")])
    def test_a_divergence_is_one_line_and_keeps_the_last_checkpoint(self, step, spoiled, tmp_path, monkeypatch, capfd):
        real, count = ipkd_ta.train_step, iter(range(1, 9))

        def spoil(model, *args):
            loss = real(model, *args)
            if next(count) == step:
                victims = {"loss": iter([loss]), "weights": model.parameters(), "statistics": model.buffers()}
                next(victims[spoiled]).data.fill_(math.nan)
            return loss
        monkeypatch.setattr(ipkd_ta, "train_step", spoil)
        err = refused(capfd, "--out", tmp_path, **TINY["msdnet"], **{**QUICK, "epochs": 3})
        good = read(tmp_path / "checkpoint.pt")
        assert "diverged" in err and "epoch 2" in err and "--lr than 0.1" in err
        assert good["epoch"] == 1 and all(value.isfinite().all() for value in good["model"].values())

    @needs_cuda
    @rows("amp", ["auto", "off", "bf16", "fp16"])
    @rows("arch, more", [*((arch, []) for arch in TINY), ("msdnet", ["--compile"])])
    def test_a_gpu_learns_as_the_cpu_does_with_cuda_graphs_too(self, arch, more, amp, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for device, options, words in (("cpu", {}, []), ("cuda", {"amp": amp}, more)):
            assert train_tiny(arch, tmp_path / device, *words, device=device, epochs=2, lr=0.01, **options) == 0
        on_cpu, on_gpu = ([r["loss"] for r in read(tmp_path / device / "metrics.jsonl")] for device in ("cpu", "cuda"))
        assert on_gpu == pytest.approx(on_cpu, rel=0.02)

    @needs_cuda
    @each_network
    def test_a_training_step_never_waits_for_the_gpu(self, arch, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        data = ipkd_ta.load_data("shapes", train_size=64).to("cuda", torch.channels_last)
        model, cfg, generator = tiny_model(arch).cuda(), config(arch, amp="bf16"), torch.Generator().manual_seed(0)
        (images, labels), scaler = data.splits["train"], torch.amp.GradScaler("cuda", enabled=False)
        for mode in ("default", "error", "default"):       # the first step may allocate
            torch.cuda.set_sync_debug_mode(mode)
            x = data.normalise(ipkd_ta.augment(images, generator))
            ipkd_ta.train_step(model, x, labels, cfg, 0.5, scaler, generator)


class TestEvaluation:
    def test_evaluation_counts_every_image_the_same(self):
        labels, logits = torch.arange(303) % 10, torch.randn(2, 303, 10, generator=torch.Generator().manual_seed(0))
        model, images = nn.Module(), torch.zeros(303, 3, 32, 32, dtype=torch.uint8)
        left = [[*row] for row in logits]
        model.all_logits = lambda x: [torch.stack([row.pop(0) for _ in x]) for row in left]
        found = ipkd_ta.evaluate(model, ipkd_ta.Data({"test": (images, labels)}, list(range(10)), *torch.ones(2, 3)))
        for z, sub in zip(logits, found, strict=True):
            rank = (z > z[range(303), labels, None]).sum(1)
            expected = [(rank < n).sum().item() / 3.03 for n in (1, 5)] + [F.cross_entropy(z, labels).item()]
            assert [sub["top1"], sub["top5"], sub["loss"]] == pytest.approx(expected, rel=1e-5)

    @torch.no_grad()
    def test_budgets_use_validation_thresholds_and_count_all_heads_on_the_way(self):
        data, model = ipkd_ta.load_data("shapes", train_size=40, val_size=100), brief_msdnet(3)
        macs, x = [0], images_of(1)
        result, val, (images, labels) = ipkd_ta.budgeted(model, data), data.splits["val"][0], data.splits["test"]
        for block, head in zip(model.blocks, model.heads):
            macs.append(macs[-1] + macs_of(lambda: head(block(x)[-1])))
            x = block(x)
        cost, confidence = torch.tensor(macs[1:]), torch.stack(model(data.normalise(val))).softmax(2).amax(2)
        assert [sub.early_exit_macs for sub in model.sub_models()] == macs[1:] and len(result) > 10
        for budget in result[::6]:
            share = torch.tensor([budget["q"] ** k for k in (1, 2, 3)])
            assert budget["thresholds"] == pytest.approx(exit_thresholds(confidence, share / share.sum()), rel=1e-5)
            answers, exits = early_exit(model, data.normalise(images), budget["thresholds"])
            assert budget["top1"] == pytest.approx(100 * (answers == labels).double().mean().item())
            assert budget["macs"] == pytest.approx(cost[exits - 1].mean().item())
            assert budget["exits"] == pytest.approx([(exits == k).double().mean().item() for k in (1, 2, 3)])


SUB = {"name": "exit-1", "macs": 10**6, "params": 1000, "top1": 50.0, "top5": 99.0, "loss": 0.5, "early_exit_macs": 1}
RUN = {"arch": "msdnet", "dataset": "cifar10", "method": "ce", "seed": 0, "epochs": 300, "train_size": 50000}


def write_result(root, method, seed, top1, **config):
    """A results.json as of a run on CIFAR-10 with these accuracies; its directory."""
    directory = root / f"{method}-{seed}-{len(list(root.iterdir()))}"
    directory.mkdir()
    subs = [{**SUB, "name": f"exit-{k}", "macs": k * 10**6, "top1": top1} for k, top1 in enumerate(top1, 1)]
    config = {**RUN, "method": method, "seed": seed, "exits": len(top1), **config}
    (directory / "results.json").write_text(json.dumps({"config": config, "sub_models": subs}))
    return directory


def report(capsys, *directories):
    capsys.readouterr()
    assert run("--report", *directories) == 0
    return capsys.readouterr().out


class TestReport:
    def test_methods_stand_side_by_side_with_deviations_and_differences_over_seeds(self, tmp_path, capsys):
        for seed, (ce, ta) in enumerate([(90.0, 91.0), (91.0, 91.5), (92.0, 92.6)]):
            write_result(tmp_path, "ce", seed, [ce, ce + 1])
            write_result(tmp_path, "ipkd-ta", seed, [ta, ta + 2])
        for seed in (2, 7):                      # one has a pair
            write_result(tmp_path, "ipkd", seed, [89.0, 90.0])
        out = report(capsys, tmp_path, tmp_path / "ce-0-0")              # a run named twice counts once
        for text in ("### msdnet on cifar10: 50,000 images, 300 epochs", "| top-1 % | exit-1 | exit-2 | mean |",
                     "| MMACs | 1.00 | 2.00 |  |", "| ce (3) | 91.00 ± 1.00 | 92.00 ± 1.00 | 91.50 ± 1.00 |",
                     "| ipkd (2) | 89.00 ± 0.00 | 90.00 ± 0.00 | 89.50 ± 0.00 |",
                     "| ipkd-ta (3) | 91.70 ± 0.82 | 93.70 ± 0.82 | 92.70 ± 0.82 |",
                     "ipkd-ta - ce, mean of the sub-models: +1.20, 95 % interval +0.54 to +1.86 (",    # t: 4.30
                     "ipkd - ce, mean of the sub-models: -3.00 (", "ipkd-ta - ipkd, mean of the sub-models: +4.10 ("):
            assert text in out and out.count(text) == 1

    @pytest.mark.skipif(not (HERE / ".github/results").is_dir(), reason="needs .github/results beside this file")
    def test_the_figures_of_the_readme_are_those_of_the_runs_in_the_repository(self, capsys):
        readme, measured = ((HERE / name).read_text("utf-8") for name in ("README.md", ".github/MEASUREMENTS.md"))
        named = re.search(r"--report((?: \.github/results/[\w-]+)+)`", readme)[1].split()
        complete = [s for s in report(capsys, *map(HERE.joinpath, named)).split("### ") if re.search("-ta.* - ipkd", s)]
        for section in complete:
            cells = [f"{top1} ({n})" for n, top1 in re.findall(r"(?m)\((\d+)\) \|.* \| (.*) \|$", section)]
            gain = re.sub(", 95 % interval (.*)", r" (\1)", re.search(r"-ta.* - ipkd.*-models: (.*) \(", section)[1])
            assert f"| {' | '.join([*cells, gain.replace('-', '−')])} |" in readme
            assert re.search(r"(?m)(^\|.*\n)+", section)[0] in measured
        assert len(complete) == len(re.findall(",000 × .* [−+]", readme)) > 3

    def test_twins_are_named_on_stderr_and_the_rest_is_reported(self, tmp_path, capsys, monkeypatch):
        first, twin, _ = (write_result(tmp_path, "ce", *run) for run in ((0, [90.0]), (0, [91.0]), (1, [92.0])))
        err = io.StringIO()
        monkeypatch.setattr(sys, "stderr", err)
        assert "| ce (2) | 91.00 ± 1.41 |" in report(capsys, tmp_path)
        assert str(first) in err.getvalue() and str(twin) in err.getvalue() and err.getvalue().count("\n") == 1

    @rows("content", [
        b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", {"config": 3}, {"sub_models": SUB}, {"sub_models": []},
        {"config": {"arch": "msdnet"}}, {"sub_models": [{**SUB, "macs": None}]}, {"config": {**RUN, "seed": "many"}}])
    def test_a_file_that_is_no_result_is_named(self, content, tmp_path, capfd):
        if isinstance(content, dict):
            content = json.dumps({"config": RUN, "sub_models": [SUB], **content}).encode()
        (tmp_path / "results.json").write_bytes(content)
        assert f"'{tmp_path / 'results.json'}'" in refused(capfd, "--report", tmp_path)

    def test_a_plot_has_a_panel_for_each_setting_and_a_line_for_each_method(self, tmp_path, monkeypatch):
        figure, drawn = pytest.importorskip("matplotlib.figure").Figure, []
        monkeypatch.setattr("matplotlib.figure.Figure", lambda **kwargs: drawn.append(figure(**kwargs)) or drawn[-1])
        for seed, (ce, ta) in enumerate([(90.0, 91.0), (92.0, 95.0)]):
            write_result(tmp_path, "ce", seed, [ce, ce + 1])
            write_result(tmp_path, "ipkd-ta", seed, [ta, ta + 2])
            budgets = [{"macs": 5e5 + seed, "top1": ce}, {"macs": 15e5, "top1": ce + 1}]
            (tmp_path / f"ce-{seed}-{2 * seed}/budget.json").write_text(json.dumps({"budgets": budgets}))
        for warmup in (1.0, 0.3):                # a variant of a method: its own marker
            write_result(tmp_path, "ipkd", 0, [80.0], lr=0.2, kd_warmup=warmup)
        assert run("--report", tmp_path, "--plot", tmp_path / "a.png") == 0
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        panels, labels = {"0.2" in axes.get_title(): axes for axes in drawn[0].axes}, drawn[0].legends[0].get_texts()
        assert sorted(text.get_text() for text in labels) == [
            "ce", "ce, early exit", "ipkd", "ipkd, kd_warmup 0.3", "ipkd-ta"]
        assert len(panels[True].containers) == len(panels[False].containers) == 2
        assert len({line.get_marker() for axes in drawn[0].axes for line, *_ in axes.containers}) == 4
        curve, = (line for line in panels[False].lines if line.get_linewidth() == 0.8)
        assert curve.get_xydata().tolist() == [pytest.approx([0.5, 91], abs=1e-5), pytest.approx([1.5, 92])]
        line, _, (bars,) = panels[False].containers[1]
        assert line.get_xydata().tolist() == [[1, 93], [2, 95]]
        assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [  # the deviation of 91 and 95
            pytest.approx([mean - 8**0.5, mean + 8**0.5]) for mean in (93, 95)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories of finished runs of all tiny networks, three epochs of two steps each."""
    root = tmp_path_factory.mktemp("trained")
    for arch in TINY:
        assert train_tiny(arch, root / arch, epochs=3) == 0
    return root


def same_outcome(a, b):
    exact(read(a / "checkpoint.pt")["model"], read(b / "checkpoint.pt")["model"])
    assert read(a / "results.json")["sub_models"] == read(b / "results.json")["sub_models"]
    assert read(a / "metrics.jsonl") == read(b / "metrics.jsonl")


def table_of(capfd):
    """The table of sub-models that was printed, {name: figures}, and all that was printed."""
    out = capfd.readouterr().out
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if re.match(r"(exit|width)-\S+ ", line)}, out


CODE = type("Code", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()      # unpickled, it makes a directory


class TestResume:
    @rows("arch, owner, name, calls", [
        ("msdnet", ipkd_ta, "load_data", 0), ("msdnet", ipkd_ta, "evaluate", 1), ("msdnet", ipkd_ta, "finish", 0),
        ("msdnet", ipkd_ta, "train_step", 1), ("universal", ipkd_ta, "train_step", 2),
        ("switchable", ipkd_ta, "train_step", 3), ("universal", ipkd_ta, "train_step", 5),
        *(("universal", os, "replace", n) for n in (0, 1, 2, 3, 6))])   # metrics and checkpoint of each epoch, results
    @rows("error", [Killed, KeyboardInterrupt])
    def test_a_run_that_dies_at_any_point_is_resumed_to_the_same_bits(
            self, arch, owner, name, calls, error, trained, tmp_path, capfd):
        out, status = tmp_path / "run", None
        with dying(owner, name, calls, error), suppress(Killed):
            status = train_tiny(arch, out, "--resume", epochs=3)
        assert status == (130 if error is KeyboardInterrupt else None)
        assert capfd.readouterr().err == f"stopped; go on: add --resume (no --overwrite) --out {out}\n" * bool(status)
        assert train_tiny(arch, out, "--resume", epochs=3) == 0
        same_outcome(out, trained / arch)

    @rows("owner, name, error, message", [
        *((ipkd_ta, "train_step", error, "--batch-size") for error in (
            MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nError code 12"))),
        (os, "fsync", OSError(28, "No space left on device"), "No space left"),
        (os, "replace", PermissionError(13, "Permission denied"), "Permission denied")])
    def test_too_little_memory_or_disk_is_one_line_and_the_last_checkpoint_stays(
            self, owner, name, error, message, trained, tmp_path, capfd):
        with dying(owner, name, 3, error):       # in the second epoch
            assert message in refused(capfd, "--out", tmp_path, **TINY["universal"], **{**QUICK, "epochs": 3})
        assert read(tmp_path / "checkpoint.pt")["epoch"] == 1 and not list(tmp_path.glob("*tmp*"))
        assert run("--resume", "--out", tmp_path) == 0
        same_outcome(tmp_path, trained / "universal")

    def test_a_fault_of_the_program_keeps_its_traceback(self, tmp_path):
        with dying(ipkd_ta, "train_step", 1, RuntimeError("shapes")), pytest.raises(RuntimeError, match="shapes"):
            train_tiny("msdnet", tmp_path)

    @rows("mode", ["--eval", "--resume"])
    @rows("damage", [lambda good: b"", lambda good: bytes(range(256)) * 10, lambda good: good[:-1000],
        lambda good: good[:9000] + bytes([good[9000] ^ 1]) + good[9001:],
        lambda good: re.sub(rb"(PK\x01\x02.{34})(.)", lambda m: m[1] + bytes([m[2][0] | 0x10]), good, flags=re.DOTALL),
        {"model": {}}, {"model": CODE}, {"mean": (0.5, 0.5, 0.5)}, {"config": []}, {"config": {"channels": 6}},
        {"config": {"arch": "vgg"}}, {"config": {"exits": "many"}}])
    def test_a_damaged_or_foreign_checkpoint_is_named_and_its_code_is_not_run(
            self, damage, mode, trained, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        out = shutil.copytree(trained / "msdnet", tmp_path / "run")
        path, good = out / "checkpoint.pt", read(out / "checkpoint.pt")
        (out / "results.json").unlink()
        if callable(damage):
            path.write_bytes(damage(path.read_bytes()))
        else:
            (part, content), = damage.items()
            torch.save({**good, part: {**good[part], **content} if part == "config" and content else content}, path)
        before = {file: file.read_bytes() for file in out.iterdir()}
        assert str(path) in refused(capfd, *([mode, path] if mode == "--eval" else [mode, "--out", out]))
        assert before == {file: file.read_bytes() for file in out.iterdir()} and not Path("executed").exists()

    def test_resuming_on_other_images_is_refused(self, tmp_path, capfd):
        folder = write_images(tmp_path / "data")
        with dying(ipkd_ta, "train_step", 1), pytest.raises(Killed):
            train_tiny("msdnet", tmp_path / "run", dataset="folder", data_dir=folder, train_size=8, epochs=2)
        Image.new("RGB", (32, 32)).save(folder / "train/dog/0 ä.png")
        assert "the images are not those" in refused(capfd, "--resume", "--out", tmp_path / "run")


STAND_IN = """import os, pathlib, sys, time          # for the training that run_cifar.sh calls
words = sys.argv[2:]
if words[0] == "--report":
    sys.exit(print("report of", words[1]))
print("trains", flush=True)
out = pathlib.Path(words[words.index("--out") + 1])
again = out.exists()
out.mkdir(parents=True, exist_ok=True)
(out / "words").write_text(" ".join(words))
(out / "pid").write_text(str(os.getpid()))
time.sleep(float(os.environ["SLEEP"]))
if "--seed 1" in " ".join(words) and not again:
    sys.exit(3)
(out / "results.json").touch()
"""
needs_script = pytest.mark.skipif(not (HERE / "run_cifar.sh").exists(), reason="needs run_cifar.sh beside this file")


def run_cifar(folder, *words, **variables):
    """A process of run_cifar.sh with a stand-in for training, called from `folder`. Ctrl-C reaches it in any case."""
    (python := folder / "python").write_text(f"#!{sys.executable}\n{STAND_IN}")
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "SEEDS": "0 1", "DATASETS": "my_photos", "METHODS": "ce ipkd-ta",
                 "ARCHS": "msdnet", "JOBS": "2", "OUT": "runs", "SLEEP": "0.2", **variables}
    return subprocess.Popen(["bash", HERE / "run_cifar.sh", *words], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, **variables},
                            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


class Gone(io.StringIO):                         # a stream without a reader
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


class TestCommandLine:
    @rows("redirect", ["| head -n 1", ">&-", "2>&-"])
    def test_a_process_comes_to_its_end_though_nobody_reads_or_a_stream_is_closed(self, redirect, tmp_path):
        words = [sys.executable, HERE / "ipkd_ta.py", *flags({**TINY["msdnet"], **QUICK, "out": tmp_path / "run"})]
        command = f"set -o pipefail; {shlex.join(map(str, words))} {redirect}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "run/results.json").exists()

    @rows("make", [lambda: None, Gone, *(
        lambda e=e: io.TextIOWrapper(io.BytesIO(), encoding=e) for e in ("ascii", "cp1252", "gbk"))])
    @rows("stream", ["stdout", "stderr"])
    def test_nothing_is_lost_because_a_line_cannot_be_printed(self, stream, make, tmp_path, monkeypatch):
        file, out = make(), tmp_path / "Läufe Ω"
        monkeypatch.setattr(sys, stream, file)
        assert train_tiny("msdnet", out) == 0 and len(list(out.iterdir())) == 4 and run("--out", out) == 2
        for seed in (1, 2):
            write_result(out, "ce", seed, [50.0])
        assert run("--report", out) == 0
        if stream == "stdout" and hasattr(file, "buffer"):
            assert "| ce (2) |" in file.buffer.getvalue().decode(file.encoding)

    @each_network
    def test_eval_repeats_the_table_of_the_run_and_reads_only_its_test_images(self, arch, tmp_path, capfd):
        data, out = write_images(tmp_path / "data", n=30), tmp_path / "run"
        assert train_tiny(arch, out, dataset="folder", data_dir=data, val_size=4 * (arch != "msdnet")) == 0
        printed, _ = table_of(capfd)
        shutil.rmtree(data / "train")                      # msdnet would need it for the thresholds of its exits
        before = sorted(tmp_path.rglob("*"))
        assert run("--eval", out / "checkpoint.pt") == 0
        assert table_of(capfd)[0] == printed and len(printed) == 3 and sorted(tmp_path.rglob("*")) == before

    @rows("words, message", [("--eval {}/msdnet/checkpoint.pt --widths 0.1", "--widths"),
        ("--eval {}/universal/checkpoint.pt --widths 0.5", "0.5"), ("--eval {}/none.pt", "none.pt"),
        ("--eval {}/switchable/checkpoint.pt --widths 0.12", "0.12"), ("--eval {}/msdnet", "msdnet"),
        ("--eval {}/msdnet/checkpoint.pt --data-dir d", "--data-dir"),
        ("--eval {}/msdnet/checkpoint.pt --export a --sub-model exit-9", "exit-1, exit-2"),
        ("--eval {}/universal/checkpoint.pt --export a.pt2 --sub-model width-9", "--sub-model width-9"),
        ("--eval {}/msdnet/checkpoint.pt --export {}/msdnet/results.json", "results.json' exists"),
        ("--resume --out {}/msdnet --lr 0.2 --epochs 4", "--epochs 3, not 4; --lr 0.1, not 0.2"),
        ("--resume --out {}/universal --widths 0.5 1", "--widths"), ("--resume --out typo --device cpu", "no run"),
        ("--resume", "need --out"), ("--overwrite", "need --out"), ("--out {}/msdnet", "already holds"),
        *((f"{mode} --out {{}}/msdnet/config.json --seed 1", "config.json") for mode in ("", "--resume")),
        ("--eval {}/msdnet/checkpoint.pt --export a --data-dir d", "no effect"), ("--out " + "a" * 300, "aaa"),
        ("--channels 2147483647", "memory")])
    def test_what_a_run_cannot_do_is_one_clear_line_and_touches_nothing(
            self, words, message, trained, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        before = {path: path.read_bytes() for path in trained.rglob("*.*")}
        assert message in refused(capfd, *words.format(*[trained] * 2).split())
        assert before == {path: path.read_bytes() for path in trained.rglob("*.*")} and not list(tmp_path.glob("*a*"))

    @rows("mode, files", [(mode, files) for mode in ([], ["--overwrite"]) for files in (
            {"config.json": '{"name": "my other project"}'}, {"config.json": "[]"}, {"results.json": "x"},
            {"config.json": "{", "checkpoint.pt": "x"}, {"budget.json": "mine"})])
    def test_no_file_is_replaced_but_of_a_run_of_this_program(self, mode, files, tmp_path, capfd):
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        assert str(tmp_path) in refused(capfd, *mode, "--out", tmp_path, **TINY["msdnet"], **QUICK)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files

    def test_two_runs_that_begin_at_once_in_an_empty_place_get_a_directory_each(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        build, both = ipkd_ta.build_model, threading.Barrier(2)
        monkeypatch.setattr(ipkd_ta, "build_model", lambda *args: both.wait(60) and None or build(*args))
        with ThreadPoolExecutor() as pool:
            statuses = [*pool.map(lambda _: run(**TINY["msdnet"], **QUICK), range(2))]
        assert statuses == [0, 0] and {path.name: len(list(path.iterdir())) for path in Path("runs").iterdir()} == {
            "msdnet-shapes-ipkd-ta-seed0": 4, "msdnet-shapes-ipkd-ta-seed0-2": 4}

    @rows("arch", ["msdnet", "universal"])
    def test_benchmark_times_every_sub_model_of_a_run_beside_its_accuracy_and_training(self, arch, trained, capfd):
        for words in (["--eval", trained / arch / "checkpoint.pt"], flags({**TINY[arch], "image_size": 40})):
            capfd.readouterr()
            assert run("--benchmark", *words, batch_size=4) == 0
            results, (found, out) = read(trained / arch / "results.json")["sub_models"], table_of(capfd)
            assert list(found) == [sub["name"] for sub in results] and "epoch 2/2" in out and "peak memory" in out
            for sub in results if words[0] == "--eval" else ():
                mmacs, params, median, slow, rate, top1 = found[sub["name"]]
                assert (mmacs, params, top1) == (f"{sub['macs'] / 1e6:.2f}", f"{sub['params']:,}", f"{sub['top1']:.2f}")
                assert 0 < float(median) <= float(slow) and float(rate) > 0

    @each_network
    def test_eval_and_export_measure_what_a_run_has_not_and_any_width(self, arch, trained, tmp_path, capfd):
        with dying(ipkd_ta, "train_step", 4), suppress(Killed):
            train_tiny(arch, tmp_path, epochs=3, eval_every=3)
        path, top1 = tmp_path / "checkpoint.pt", read(trained / arch / "metrics.jsonl")[1]["top1"]
        assert run("--eval", path, "--export", tmp_path / "a.pt2") == 0 and table_of(capfd) and run("--eval", path) == 0
        assert [figures[2] for figures in table_of(capfd)[0].values()] == [f"{share:.2f}" for share in top1]
        if arch == "universal":
            assert run("--eval", path, "--widths", 0.05, 0.12) == 0
            found, _ = table_of(capfd)
            assert list(found) == ["width-0.05", "width-0.12"] and found["width-0.05"][2] == f"{top1[0]:.2f}"

    def test_a_run_with_validation_images_writes_its_budgets_and_eval_repeats_them(self, tmp_path, capfd):
        assert train_tiny("msdnet", tmp_path, val_size=30) == 0
        out = capfd.readouterr().out
        assert run("--eval", tmp_path / "checkpoint.pt") == 0
        assert out.split("\nexit-3")[-1] == capfd.readouterr().out.split("\nexit-3")[-1]
        assert len(read(tmp_path / "results.json")["validation"]) == 3 and "thresholds" in out
        assert len(read(tmp_path / "budget.json")["budgets"]) == 20

    def test_overwrite_replaces_a_run_and_resume_leaves_a_finished_one_as_it_is(self, tmp_path, capfd):
        for seed, mode in ((1, []), (2, ["--overwrite"])):
            assert train_tiny("msdnet", tmp_path, *mode, seed=seed) == 0
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert run("--resume", out=tmp_path, amp="auto", train_size=0) == 0 and "finished" in capfd.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert read(tmp_path / "config.json")["seed"] == 2

    @rows("arch, name, which, more", [("msdnet", "exit-2", 2, ["--fold-bn"]), ("universal", "width-0.12", 0.12, [])])
    def test_an_exported_program_gives_the_sub_model_s_logits_for_any_batch_and_knows_what_it_is(
            self, arch, name, which, more, trained, tmp_path):
        path, x, about = trained / arch / "checkpoint.pt", images_of(3), {"about.json": ""}
        assert run("--eval", path, "--export", tmp_path / "a.pt2", "--sub-model", name, *more) == 0
        model = ipkd_ta.load_checkpoint(path)[1]
        model.calibrate(ipkd_ta.calibration_batches(ipkd_ta.load_data("shapes", train_size=40)), [which])
        program = torch.export.load(tmp_path / "a.pt2", extra_files=about)
        assert program.graph_signature.user_inputs == ("images",)
        for n in (1, 3):
            assert_close(program.module()(x[:n]), ipkd_ta.extract(model, which)(x[:n]), rtol=0, atol=1e-4)
        about = json.loads(about["about.json"])
        assert (about["sub_model"], len(about["classes"]), about["image_size"]) == (name, 10, 32)

    @needs_script
    def test_run_cifar_runs_side_by_side_skips_what_is_finished_and_repeats_what_failed(self, tmp_path):
        assert "./run_cifar.sh" in run_cifar(tmp_path, "--help").communicate()[0] and not (tmp_path / "runs").exists()
        (out, err), (out_again, _) = (run_cifar(tmp_path, "--kd-weight", "0.3", "--lr=0.1").communicate() for _ in "12")
        words = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/words")}
        assert len(words) == 4 == len(list(tmp_path.glob("runs/*/results.json")))
        assert [line.split()[-1] for line in out.splitlines()[:2]] == ["begins", "begins"]     # two side by side
        for name, text in words.items():
            arch, method, seed = re.fullmatch(r"(\w+)-my_photos-(.+)-seed(\d)", name).groups()
            assert f"--arch {arch} --method {method} --seed {seed}" in text and "--lr=0.1" in text
            assert ("--kd-weight 0.3" in text) == (method != "ce") and "--dataset folder --data-dir my_photos" in text
            assert (tmp_path / f"runs/{name}.log").read_text().startswith("trains\n")
            assert f"{name}: begins" in out and f"{name}: ends with status {'3' if seed == '1' else '0'}" in out
            assert f"{name}: {'begins' if seed == '1' else 'already finished'}" in out_again
        assert "failed: msdnet-my_photos-ce-seed1" in err and "report of runs" in out and "report of runs" in out_again

    @needs_script
    def test_ctrl_c_ends_all_runs_of_run_cifar(self, tmp_path):
        process = run_cifar(tmp_path, SLEEP="100")
        while len(list(tmp_path.glob("runs/*/pid"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130 and "call it again" in process.stderr.read()
        for path in tmp_path.glob("runs/*/pid"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(path.read_text()), 0)

    @pytest.mark.skipif(not (HERE / "README.md").exists(), reason="needs README.md beside this file")
    def test_the_python_examples_of_the_readme_run(self, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        text = (HERE / "README.md").read_text(encoding="utf-8")
        examples = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        photos, ran, network = write_images(tmp_path / "photos", n=30), [], TINY["msdnet"]
        Image.open(next(photos.rglob("*.png"))).resize((90, 40)).save("photo.jpg")
        assert run("--out", "run", dataset="folder", data_dir=photos, epochs=1, val_size=11, **network) == 0
        files = ["exit-2.pt2"] + ["exit-2.onnx"] * all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime")))
        for file in files:
            assert run("--eval", "run/checkpoint.pt", "--export", file, sub_model="exit-2") == 0
        for example in examples:
            if "onnx" not in example or "exit-2.onnx" in files:
                capfd.readouterr()
                exec(example, {"__name__": "__main__"})
                ran += re.findall("^café|^dog", capfd.readouterr().out)
        assert len(ran) == 1 + len(files) and len({*ran[:len(files)]}) == 1        # all exports agree

TOGETHER = """
import os, signal, sys, torch, ipkd_ta, test_ipkd_ta as tests
dist, out, draw, step, calls = ipkd_ta.dist, sys.argv[1], ipkd_ta.draw_shapes, ipkd_ta.train_step, []
ipkd_ta.draw_shapes = lambda n, seed: draw(50 if seed else n, seed)
dist.init_process_group("gloo")
dist.init_process_group = dist.destroy_process_group = lambda: None          # they stay together
found = {arch: tests.weights_after_some_steps(arch, out) for arch in tests.TINY}
found["evaluation"] = ipkd_ta.evaluate(tests.brief_msdnet(2), ipkd_ta.load_data("shapes", train_size=40))
torch.save(found, f"{out}/found-{dist.get_rank()}.pt")
assert tests.train_tiny("msdnet", out + "/whole", val_size=11) == 0
def mortal(*args):
    calls.append(1)
    if len(calls) == 5 and dist.get_rank() == 1:                             # in the third epoch of 2 steps each
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
ipkd_ta.train_step = mortal
sys.exit(tests.train_tiny("msdnet", out + "/run", epochs=3))
"""


def weights_after_some_steps(arch, out):
    """Parameters after three steps on 7 images, with BatchNorm by fixed statistics, in float64."""
    with float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipkd_ta, "sandwich_widths", lambda *args, **kwargs: list(DRAWN))
        data, model = ipkd_ta.load_data("shapes", train_size=21), tiny_model(arch)
        model.calibrate([images_of(8)], DRAWN if arch == "universal" else None)
        model.train = lambda mode=True: nn.Module.train(model, False)
        ipkd_ta.train(config(arch, train_size=21, batch_size=7, lr=0.001), model, data, Path(out))
        return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The directory of what two processes did together, of which the second one died in the end."""
    root = tmp_path_factory.mktemp("together")
    (root / "together.py").write_text(TOGETHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, root / "together.py", root], cwd=HERE, capture_output=True, text=True, env=env)
    assert (root / "found-1.pt").exists() and (root / "run/checkpoint.pt").exists() and done.returncode, done.stderr
    return root


class TestProcesses:
    @each_network
    def test_two_reach_the_weights_of_one(self, arch, together, tmp_path):
        expected = weights_after_some_steps(arch, tmp_path)
        with float64():
            begun = dict(tiny_model(arch).named_parameters())
        for rank in (0, 1):
            found = torch.load(together / f"found-{rank}.pt")[arch]
            assert_close(found, expected, rtol=1e-9, atol=1e-10)
            assert not any(found[name].equal(p) for name, p in begun.items() if name.endswith("weight"))

    def test_two_share_the_evaluation_and_their_results_are_those_of_their_checkpoint(self, together, capfd):
        expected = ipkd_ta.evaluate(brief_msdnet(2), ipkd_ta.load_data("shapes", train_size=40))
        assert torch.load(together / "found-0.pt")["evaluation"] == [pytest.approx(sub, rel=1e-5) for sub in expected]
        capfd.readouterr()
        assert run("--eval", together / "whole/checkpoint.pt") == 0
        (found, _), results = table_of(capfd), read(together / "whole/results.json")
        for sub in results["sub_models"]:
            assert [float(figure) for figure in found[sub["name"]][2:]] == [
                pytest.approx(sub[name], abs=0.006) for name in ("top1", "top5", "loss")]
        assert results["processes"] == 2

    def test_one_goes_on_where_two_were_when_one_of_them_died(self, together, tmp_path, capfd):
        out = shutil.copytree(together / "run", tmp_path / "run")
        assert not (out / "results.json").exists() and run("--resume", "--out", out) == 0
        assert "resuming after 2 epochs" in capfd.readouterr().out and read(out / "results.json")["processes"] == 1

    @rows("missing, rank, printed", [("", 0, True), ("", 1, False), ("RANK", 1, True), ("MASTER_PORT", 1, True)])
    def test_half_of_torchrun_s_variables_is_ignored_and_a_report_waits_for_no_other_process(
            self, missing, rank, printed, tmp_path, monkeypatch, capsys):
        for name in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - {missing}:
            monkeypatch.setenv(name, str(rank))
        monkeypatch.setattr(ipkd_ta.dist, "init_process_group", lambda *args, **kwargs: pytest.fail("waits for others"))
        write_result(tmp_path, "ce", 0, [90.0])
        assert run("--report", tmp_path) == 0 and ("### msdnet" in capsys.readouterr().out) == printed
