"""Tests of ipkd_ta.py: against closed forms, reference numbers and independent constructions.

    pip install torch torchvision pytest && python -m pytest

No network and no GPU. Tests that need a GPU or matplotlib are skipped where these are missing.
"""
import copy
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import Conv2dNormActivation

import ipkd_ta
from ipkd_ta import (MSDNet, SlimmableMobileNetV1, early_exit, exit_thresholds, ipkd_ta_loss,
                     sandwich_widths)

HERE = Path(__file__).parent
METHODS = ("ce", "ipkd", "ipkd-ta")
TINY = {
    "msdnet": {"arch": "msdnet", "exits": 3, "base": 1, "step": 1, "step_mode": "even",
               "channels": 4, "growth": 2},
    "universal": {"arch": "slimmable", "widths": (0.05, 0.1, 0.15)},
    "switchable": {"arch": "slimmable", "widths": (0.05, 0.1, 0.15), "bn": "switchable"},
}
QUICK = {"epochs": 1, "train_size": 40, "batch_size": 16, "lr": 0.1, "eval_every": 1}  # two steps

exact = partial(assert_close, rtol=0, atol=0)
rows = pytest.mark.parametrize
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
each_network = rows("arch", TINY)
each_method = rows("method", METHODS)


@pytest.fixture(autouse=True, scope="module")
def few_test_shapes_and_no_gpu():
    draw = ipkd_ta.draw_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipkd_ta, "draw_shapes", lambda n, seed: draw(50 if seed else n, seed))
        patch.setattr(torch.cuda, "is_available", lambda: False)  # but where a test needs one
        yield


def tiny(arch, **changes):
    """Options of a run of two steps."""
    return {**TINY[arch], **QUICK, **changes}


def config(arch, **changes):
    return ipkd_ta.make_config(tiny(arch, **changes))


def tiny_model(arch):
    return ipkd_ta.build_model(config(arch), 10)


def run(*args, **options):
    """The exit status of a command: ("--resume", widths=(0.5, 1)) is --resume --widths 0.5 1."""
    words = [*map(str, args)]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return ipkd_ta.main(words)


def train_tiny(arch, out, *args, **changes):
    return run("--out", out, *args, **tiny(arch, **changes))


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
    real = getattr(owner, name)
    left = [None] * calls

    def mortal(*args, **kwargs):
        if not left:
            raise error
        left.pop()
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, mortal)
        yield


def images_of(n, seed=1):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def draw(n, generator):
    """What step_widths takes, as the program makes it."""
    return partial(sandwich_widths, n, generator=generator)


def shaken(model):
    """The model with BatchNorm parameters that are not their initial ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(0.3 * torch.randn(p.shape, generator=generator))
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


ROOMS = {
    "The method": """
ipkd_ta_loss([torch.zeros(2, 3)] * 3, torch.tensor([0, 1]))
sandwich_widths(4, 0.25, 1.0)""",
    "Slimmable": """
m, x = SlimmableMobileNetV1(10), torch.zeros(2, 3, 32, 32)
m(x, m.step_widths(lambda low, high: [high, low])), m(x, torch.tensor([m.channels(0.3)]))
m.calibrate([x], [0.3])
m.eval()(x, 0.3), m.extract(0.3), m.sub_models()""",
    "MSDNet": """
m = MSDNet(10, exits=2, base=1)
m(torch.zeros(2, 3, 32, 32)), m.extract(1), m.sub_models()""",
}


def with_gradients(loss, leaves):
    return [loss, *torch.autograd.grad(loss, leaves, retain_graph=True)]


class TestLoss:
    @each_method
    @rows("k", [1, 2, 4])
    @rows("kd_weight, temperature", [
        (0.0, 1.0), (0.3, 1.0), (0.5, 4.0), (1.0, 0.5), (torch.tensor(0.5), 2.0)])
    def test_value_and_gradients_equal_the_closed_form_in_which_teachers_get_none(
            self, method, k, kd_weight, temperature):
        logits, target = random_logits(k)
        value = ipkd_ta_loss(logits, target, method, kd_weight, temperature)
        value.backward()
        p = [z.detach().softmax(1) for z in logits]
        soft = [(z.detach() / temperature).softmax(1) for z in logits]
        total = 0
        for i, z in enumerate(logits):
            weight = 0 if method == "ce" or i == k - 1 else kd_weight
            teacher = soft[k - 1 if method == "ipkd" else min(i + 1, k - 1)]
            ce = -p[i][range(6), target].log().sum()
            kl = (teacher * (teacher / soft[i]).log()).sum()
            total += (1 - weight) * ce + weight * temperature**2 * kl
            gradient = (1 - weight) * (p[i] - F.one_hot(target, 5))
            gradient += weight * temperature * (soft[i] - teacher)
            assert_close(z.grad, gradient / 6, rtol=1e-12, atol=1e-14)
        assert value.item() == pytest.approx(total.item() / 6, rel=1e-12)

    @rows("k, kd_weight, methods", [(7, 0.0, METHODS), (2, 0.7, METHODS[1:]), (1, 0.7, METHODS)])
    def test_methods_with_the_same_teachers_or_without_their_weight_are_identical(
            self, k, kd_weight, methods):
        logits, target = random_logits(k, torch.float32)
        losses = [ipkd_ta_loss(logits, target, name, kd_weight) for name in methods]
        for loss in losses[1:]:
            exact(with_gradients(loss, logits), with_gradients(losses[0], logits))

    @each_method
    def test_loss_and_gradients_are_finite_for_logits_of_any_magnitude(self, method):
        logits, target = random_logits(3, torch.float32)
        loss = ipkd_ta_loss([1e4 * z for z in logits], target, method)
        assert all(tensor.isfinite().all() for tensor in with_gradients(loss, logits))

    @each_method
    def test_a_class_masked_by_minus_infinity_counts_as_if_it_were_not_there(self, method):
        logits, target = random_logits(3)
        without = [z[:, :4] for z in logits]
        masked = [F.pad(z, (0, 1), value=-math.inf) for z in without]
        losses = [ipkd_ta_loss(z, target % 4, method, 0.5, 2.0) for z in (masked, without)]
        results = [with_gradients(loss, logits) for loss in losses]
        assert_close(*results, rtol=1e-12, atol=1e-14)
        assert ipkd_ta_loss(masked, target, method) == math.inf  # its label is masked

    @rows("label", [-100, -1, 5])
    def test_a_label_that_is_no_class_is_an_index_error(self, label):
        logits, target = random_logits(3)
        target[2] = label
        with pytest.raises(IndexError, match=f"{label} is out of bounds"):
            ipkd_ta_loss(logits, target)

    def test_half_precision_logits_are_computed_in_float32_also_under_autocast(self):
        logits, target = random_logits(3, torch.bfloat16)
        with torch.autocast("cpu"):
            loss = ipkd_ta_loss(logits, target)
        exact(loss, ipkd_ta_loss([z.float() for z in logits], target))

    def test_sandwich_has_both_ends_and_uniform_widths_between_them_by_the_seed(self):
        a, b, c = (sandwich_widths(10_002, 0.25, 1.0, torch.Generator().manual_seed(seed))
                   for seed in (0, 0, 1))
        assert a == b != c
        assert a == sorted(a, reverse=True)
        assert (len(a), a[0], a[-1]) == (10_002, 1.0, 0.25)
        assert a[1:-1:1000] == pytest.approx([1 - 0.075 * i for i in range(10)], abs=0.02)

    @rows("room", ROOMS)
    def test_a_copied_room_needs_nothing_but_the_imports(self, room):
        source = (HERE / "ipkd_ta.py").read_text(encoding="utf-8")
        header, *parts = re.split("(?m)^# ==== ", source)
        imports = re.findall("(?m)^(?:import|from) .*", header)
        text, = (part for part in parts if part.startswith(room))
        exec("\n".join([*imports, "#" + text, ROOMS[room]]), {"__name__": "copied"})


CHANNELS = {
    0.01: (8, 8, 8, 8, 8, 16),
    0.25: (8, 16, 32, 64, 128, 256),
    0.3: (16, 24, 40, 80, 152, 304),
    1.0: (32, 64, 128, 256, 512, 1024),
}
both_kinds = rows("bn", ["universal", "switchable"])


def plain_mobilenet(model, width):
    """An ordinary MobileNet-V1 for CIFAR with the first channels of the slimmable model's weights,
    in training mode; its BatchNorm statistics become those of the last batch."""
    a, b, c, d, e, f = CHANNELS[width]
    counts = [a, b, c, c, d, d, e, e, e, e, e, e, f, f]
    norm = partial(nn.BatchNorm2d, momentum=1.0)
    conv = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=nn.ReLU6)
    layers = [conv(3, a)]
    for c_in, c_out, stride in zip(counts, counts[1:], map(int, "1212121111121")):
        layers += [conv(c_in, c_in, 3, stride, groups=c_in), conv(c_in, c_out, 1)]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(f, 10))

    norms = model.norms
    if model.bn == "switchable":
        norms = norms[model.widths.index(width)]
    theirs = []
    for pair in zip(model.convs, norms):
        theirs += nn.ModuleList(pair).parameters()
    theirs += model.classifier.parameters()
    for p, wide in zip(plain.parameters(), theirs, strict=True):
        p.data.copy_(wide[tuple(map(slice, p.shape))])
    return plain


def measure(plain, batches):
    """Its BatchNorm statistics become the mean of those of each batch, weighted by its images."""
    statistics = [buffer for buffer in plain.buffers() if buffer.ndim]
    of_images = []
    for batch in batches:
        plain(batch)
        of_images += [copy.deepcopy(statistics)] * len(batch)
    for buffer, *values in zip(statistics, *of_images):
        buffer.copy_(sum(values) / len(values))


def calibrated(arch, scale=1):
    model = tiny_model(arch)
    model.calibrate([scale * images_of(8)])
    return model.eval()


def answers_of(model):
    return model.eval()(images_of(8, 2), model.widths)


class TestSlimmable:
    @both_kinds
    def test_cost_equals_the_reference_table(self, bn):
        subs = SlimmableMobileNetV1(100, bn=bn).sub_models()
        assert [s.macs for s in subs] == [3_354_112, 12_213_248, 26_577_408, 46_446_592]
        assert [s.params for s in subs] == [238_772, 869_892, 1_893_460, 3_309_476]
        assert [s.name for s in subs] == ["width-0.25", "width-0.5", "width-0.75", "width-1"]

    @torch.no_grad()
    @both_kinds
    @rows("width", CHANNELS)
    def test_logits_are_an_ordinary_mobilenet_s_with_sliced_weights_and_mean_statistics(
            self, bn, width):
        torch.manual_seed(0)
        model = shaken(SlimmableMobileNetV1(10, tuple(CHANNELS), bn))
        x = images_of(120) * torch.linspace(0.1, 4, 120).view(-1, 1, 1, 1)
        plain = plain_mobilenet(model, width)
        assert_close(model(x, width), plain(x), rtol=1e-4, atol=1e-4)
        batches = x.split([50, 69, 1])
        model.calibrate(zip(batches, batches), [width, width])  # images and labels
        measure(plain, batches)
        assert_close(model.eval()(x, width), plain.eval()(x), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_a_list_of_widths_gives_a_list_smallest_first_and_none_means_the_largest(self):
        model = calibrated("universal")
        x = images_of(8)
        exact(model(x, [0.15, 0.05]), [model(x, 0.05), model(x)])

    @rows("order", [torch.contiguous_format, torch.channels_last])
    def test_masks_give_the_logits_and_gradients_of_slices(self, order):
        torch.manual_seed(0)
        model = shaken(SlimmableMobileNetV1(10, (0.1, 0.4))).double().to(memory_format=order)
        x = images_of(6).double().contiguous(memory_format=order)
        widths = sorted(sandwich_widths(10, 0.1, 0.4, torch.Generator()))
        found = []
        for asked in widths, torch.tensor([model.channels(width) for width in widths]):
            logits = model(x, asked)
            loss = ipkd_ta_loss(logits, torch.arange(6))
            found.append([*logits, *with_gradients(loss, [*model.parameters()])])
        assert_close(*found, rtol=1e-8, atol=1e-10)

    @torch.no_grad()
    @both_kinds
    @rows("make", [calibrated, tiny_model])
    def test_a_state_dict_restores_the_statistics_in_any_network(self, bn, make, tmp_path):
        model = calibrated(bn, scale=3)
        other = shaken(make(bn))
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(read(tmp_path / "state.pt"))
        exact(answers_of(other), answers_of(model))

    @torch.no_grad()
    def test_a_state_dict_without_statistics_leaves_none(self):
        model = calibrated("universal")
        state = tiny_model("universal").state_dict()
        for same in state, {name: state[name] for name in state if "statistics" not in name}:
            model.load_state_dict(same)
            with pytest.raises(ValueError, match="has no statistics"):
                answers_of(model)

    @torch.no_grad()
    @rows("buffers", [True, False])
    def test_training_forgets_the_statistics_and_an_average_with_it_has_none(self, buffers):
        average = torch.optim.swa_utils.AveragedModel(calibrated("universal"), use_buffers=buffers)
        for model in calibrated("universal"), calibrated("universal").train():
            average.update_parameters(model)
        for without in average.module, model:
            with pytest.raises(ValueError, match="has no statistics"):
                answers_of(without)
        average.module.calibrate([images_of(8)])
        average.update_parameters(calibrated("universal"))
        answers_of(average.module)

    @torch.no_grad()
    def test_a_calibration_that_fails_leaves_no_statistics(self):
        model = calibrated("universal")
        with pytest.raises(TypeError):
            model.calibrate([images_of(8), None])
        with pytest.raises(ValueError, match="has no statistics"):
            answers_of(model)

    @torch.no_grad()
    @both_kinds
    def test_a_clone_has_statistics_of_its_own_and_calibration_replaces_them(self, bn):
        model = calibrated(bn)
        clone = copy.deepcopy(model)
        before = answers_of(model)
        exact(answers_of(clone), before)
        clone.calibrate([images_of(8) * 5])
        exact(answers_of(model), before)
        clone.calibrate([images_of(8)])
        exact(answers_of(clone), before)

    def test_weights_start_as_published(self):
        torch.manual_seed(0)
        for conv in SlimmableMobileNetV1(10).convs[2::2]:
            assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels)**0.5, rel=0.1)


MACS = [14_967_296, 21_707_264, 28_792_320, 34_801_152, 41_694_720, 46_337_536, 51_891_712]
PARAMS = [433_876, 531_604, 529_280, 627_728, 733_088, 725_248, 853_984]


class TestMSDNet:
    def test_cost_equals_the_reference_table(self):
        model = MSDNet(100)
        subs = model.sub_models()
        assert [s.macs for s in subs] == MACS
        assert [s.params for s in subs] == PARAMS
        assert [s.name for s in subs] == [f"exit-{k}" for k in range(1, 8)]
        assert sum(p.numel() for p in model.parameters()) == 3_067_960

    def test_blocks_that_grow_have_the_right_shapes_and_scale_reductions(self):
        # of 1, 2, 3 layers, one scale fewer after 2 and 4: n = 6 9|12 (15) 7|10 (13) 6 9
        model = MSDNet(7, exits=3, base=1, step=1, step_mode="lin_grow", channels=6, growth=3)
        assert {z.shape for z in model(images_of(2))} == {(2, 7)}
        maps = images_of(2)
        sizes = []  # channels and pixels of each scale
        for block in model.blocks:
            maps = block(maps)
            sizes.append([z.shape[1:3] for z in maps])
        assert sizes == [[(9, 32), (18, 16), (36, 8)], [(14, 16), (28, 8)], [(36, 8)]]

    def test_gradient_equilibrium_gives_each_block_the_mean_of_what_later_exits_send(self):
        plain = brief_msdnet(4).double().train()
        balanced = brief_msdnet(4, gradient_equilibrium=True).double().train()
        x = images_of(4).double()
        losses, same = ([z.square().sum() for z in model(x)] for model in (plain, balanced))
        exact(losses, same)  # the answers stay as they are
        sum(same).backward()
        for k, block in enumerate(plain.blocks):
            _, *mean = with_gradients(sum(losses[k:]) / (4 - k), [*block.parameters()])
            found = [p.grad for p in balanced.blocks[k].parameters()]
            assert_close(found, mean, rtol=1e-9, atol=1e-9)


def loss_of(logits=(torch.zeros(6, 5),) * 2, target=torch.zeros(6).long(), **options):
    return ipkd_ta_loss(list(logits), target, **options)


WRONG = {
    "loss_of([])": "logits",
    "loss_of([torch.zeros(6, 5), torch.zeros(6, 4)])": r"\(6, 4\)",
    "loss_of([torch.zeros(6)])": r"\(6,\)",
    "loss_of([torch.zeros(0, 5)])": r"\(0, 5\)",
    "loss_of(target=torch.zeros(5).long())": r"\(5,\)",
    "loss_of(method='kd')": "'kd'",
    "loss_of(kd_weight=-0.1)": "got -0.1",
    "loss_of(kd_weight=1.5)": "got 1.5",
    "loss_of(kd_weight=math.nan)": "got nan",
    "loss_of(temperature=0.0)": "got 0.0",
    "loss_of(temperature=math.nan)": "got nan",
    "loss_of(temperature=math.inf)": "got inf",
    "sandwich_widths(1, 0.25, 1.0)": "got 1, 0.25, 1.0",
    "sandwich_widths(4, 1.0, 0.25)": "got 4, 1.0, 0.25",
    "sandwich_widths(4, 0.0, 1.0)": "got 4, 0.0, 1.0",
    "sandwich_widths(4, 0.5, 0.5)": "got 4, 0.5, 0.5",
    "sandwich_widths(2.5, 0.25, 1.0)": "got 2.5, 0.25, 1.0",
    "sandwich_widths(4, 0.25, math.inf)": "got 4, 0.25, inf",
    "SlimmableMobileNetV1(10, (0.5, 0.25))": r"\(0.5, 0.25\)",
    "SlimmableMobileNetV1(10, (0.5, 0.5))": "ascend",
    "SlimmableMobileNetV1(10, ())": r"\(\)",
    "SlimmableMobileNetV1(10, (0.0, 1.0))": r"\(0.0, 1.0\)",
    "SlimmableMobileNetV1(10, (0.5, 1.5))": r"\(0.5, 1.5\)",
    "SlimmableMobileNetV1(10, (0.5, math.nan))": "nan",
    "SlimmableMobileNetV1(10, ('half',))": "'half'",
    "SlimmableMobileNetV1(bn='batch')": "'batch'",
    "SlimmableMobileNetV1(0)": "num_classes.* 0",
    "tiny_model('switchable')(images_of(1), 0.12)": "width 0.12 has no BatchNorm",
    "tiny_model('switchable').calibrate(iter(()))": "needs images",
    "tiny_model('universal').calibrate([])": "needs images",
    "tiny_model('universal')(images_of(2), [0.05, 0.04])": "width 0.04 is outside",
    "tiny_model('universal')(images_of(2), math.nan)": "width nan is outside",
    "tiny_model('universal').calibrate([images_of(2)], [1.1])": "width 1.1 is outside",
    "tiny_model('universal').sub_models(widths=[-1.0])": "width -1.0 is outside",
    "ipkd_ta.extract(tiny_model('universal'), 0.2)": "width 0.2 is outside",
    "ipkd_ta.extract(tiny_model('universal'), 0.1)": "width 0.1 has no statistics",
    "ipkd_ta.extract(tiny_model('universal'), 0)": "from 1 to 3, got 0",
    "MSDNet(exits=0)": "exits",
    "MSDNet(growth=1.5)": "growth.* 1.5",
    "MSDNet(step_mode='odd')": "'odd'",
    "ipkd_ta.extract(brief_msdnet(3), 0)": "from 1 to 3, got 0",
    "ipkd_ta.extract(brief_msdnet(3), 4)": "from 1 to 3, got 4",
    "ipkd_ta.extract(brief_msdnet(3), 1.0)": "from 1 to 3, got 1.0",
    "early_exit(brief_msdnet(2).train(), images_of(1), [0, 0])": "training=True",
    "early_exit(brief_msdnet(2), images_of(1), [0])": "2 thresholds",
    "exit_thresholds(torch.rand(3, 10), [1])": "need 3 shares of the sum 1",
    "exit_thresholds(torch.rand(3, 10), [1, 1, 1])": "need 3 shares of the sum 1",
    "exit_thresholds(torch.rand(3, 10), [1.5, -0.5, 0])": "need 3 shares of the sum 1",
    "exit_thresholds(torch.rand(3, 10), [math.nan, 1, 0])": "need 3 shares of the sum 1",
    "ipkd_ta.fold_bn(brief_msdnet(2).train())": "eval mode",
    "ipkd_ta.fold_bn(tiny_model('universal').eval())": "no BatchNorm to fold",
    "ipkd_ta.fold_bn(ipkd_ta.fold_bn(brief_msdnet(2)))": "no BatchNorm to fold",
}


class TestSubModels:
    def test_an_extracted_exit_gives_the_same_logits_by_all_of_its_weights_folded_too(self):
        model = brief_msdnet()
        x = images_of(8)
        answers = model(x)
        for k, expected in enumerate(answers, start=1):
            extracted = ipkd_ta.extract(model, k)
            found = extracted(x)
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
            found.square().sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in extracted.parameters())
            assert_close(ipkd_ta.fold_bn(extracted)(x), expected, rtol=1e-4, atol=1e-4)
            assert "BatchNorm" not in str(extracted)
            assert "BatchNorm" in str(model)
        assert_close(ipkd_ta.fold_bn(model)(x), answers, rtol=1e-4, atol=1e-4)

    def test_lazy_evaluation_saves_macs_where_a_finer_scale_is_left_over(self):
        model = MSDNet(100)
        ratios = [macs_of(ipkd_ta.extract(model, k), images_of(1)) / macs
                  for k, macs in enumerate(MACS, start=1)]
        expected = [0.886, 0.908, 0.965, 0.966, 0.968, 1, 1]
        assert ratios == pytest.approx(expected, abs=5e-4)

    @torch.no_grad()
    @rows("arch, which, width", [
        ("universal", 3, 0.15),
        ("universal", 0.12, 0.12),
        ("universal", 0.05 + 0.1, 0.15),
        ("switchable", np.int64(2), 0.1),
        ("switchable", np.float32(0.15), 0.15)])
    def test_an_extracted_width_gives_the_same_logits_at_the_cost_of_its_own(
            self, arch, which, width):
        model = shaken(tiny_model(arch)).double()
        x = images_of(5).double()
        model.calibrate([images_of(9)], [width])
        extracted = ipkd_ta.extract(model.eval(), which)
        expected = model(x, width)
        assert_close(extracted(x), expected, rtol=1e-12, atol=1e-12)
        cost, = SlimmableMobileNetV1(10, (width,)).sub_models()
        assert sum(p.numel() for p in extracted.parameters()) == cost.params
        assert macs_of(extracted, x[:1]) == cost.macs
        assert_close(ipkd_ta.fold_bn(extracted)(x), expected, rtol=1e-10, atol=1e-10)
        assert "BatchNorm" not in str(extracted)

    @torch.no_grad()
    @rows("shares", [[0, 0, 0, 1], [1, 0, 0, 0], [0.5, 0, 0.25, 0.25]])
    def test_early_exit_equals_the_offline_result_and_computes_no_more_than_it_needs(self, shares):
        model = brief_msdnet(4)
        confidence, answers = torch.stack(model(images_of(64))).softmax(2).max(2)
        thresholds = exit_thresholds(confidence, shares)
        exits = [next(k for k in range(4) if image[k] >= thresholds[k]) for image in confidence.T]
        assert [exits.count(k) / 64 for k in range(4)] == shares
        seen = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
        found, taken = early_exit(model, images_of(64), thresholds)
        exact(found, answers[exits, range(64)])
        assert taken.tolist() == [k + 1 for k in exits]
        left = [sum(e >= k for e in exits) for k in range(4)]
        assert seen == [n for n in left if n]

    def test_images_of_equal_confidence_leave_together(self):
        assert exit_thresholds(torch.full((3, 4), 0.5), [0.25, 0.5, 0.25]) == [0.5, 2.0, 0.0]

    @rows("call, message", WRONG.items())
    def test_a_wrong_argument_is_named(self, call, message):
        with pytest.raises(ValueError, match=message):
            eval(call)


def pictures_of(image):
    """Every picture that augmentation may make of an image (3, 32, 32), as {its bytes: how}, how
    being (dy, dx, flipped)."""
    padded = F.pad(image, (4, 4, 4, 4))
    pictures = {}
    for dy, dx in itertools.product(range(9), range(9)):
        crop = padded[:, dy:dy + 32, dx:dx + 32]
        pictures[crop.numpy().tobytes()] = dy, dx, 0
        pictures[crop.flip(2).numpy().tobytes()] = dy, dx, 1
    return pictures


def write_cifar(root, name):
    """A small CIFAR in its own on-disk format; returns {split: (images, labels)}."""
    cls = getattr(torchvision.datasets, name.upper())
    key = "fine_labels" if name == "cifar100" else "labels"
    folder = root / cls.base_folder
    folder.mkdir()
    splits = {}
    for split in "train", "test":
        files = [file for file, _ in getattr(cls, f"{split}_list")]
        images = torch.randint(256, (len(files), 8, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(10, (len(files), 8))
        for file, x, y in zip(files, images.flatten(2).numpy(), labels.tolist()):
            (folder / file).write_bytes(pickle.dumps({"data": x, key: y}))
        splits[split] = images.flatten(0, 1), labels.flatten()
    meta = {cls.meta["key"]: ["cat", "dog"]}
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(meta))
    return splits


def write_images(root, splits=("train", "test"), n=4):
    generator = np.random.default_rng(0)
    for split, name in itertools.product(splits, ("café", "dog")):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i} ä.png")
    return root


def load(dataset, root):
    return ipkd_ta.load_data(ipkd_ta.make_config({"dataset": dataset, "data_dir": str(root)}))


def seen_by_a_viewer(path):
    return np.array(ipkd_ta.open_image(path)).astype(int)


PIXELS = np.random.default_rng(1).integers(256, size=(32, 32, 4)).astype(np.uint8)
ALPHA = PIXELS[..., 3:] / 255
CLEAR = 255 * (1 - ALPHA) + PIXELS[..., :3] * ALPHA  # on white
FOUR = Image.fromarray(PIXELS[..., 0] % 4).convert("P")
FOUR.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
SHOWN = np.array([[10, 20, 30], [200, 0, 0], [255] * 3, [0, 0, 200]])[np.array(FOUR)]
ORIENTATION = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)
DANGLING = struct.pack("<HHLL", 0x010F, 2, 99, 9999)  # its text lies beyond the block
MORE = {"save_all": True, "append_images": [Image.new("RGBA", (32, 32))]}

class TestData:
    def test_augmented_images_are_shifted_by_at_most_4_pixels_and_flipped_in_half_of_the_cases(
            self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=generator)
        batch = ipkd_ta.augment(images, generator).contiguous()
        seen = [pictures_of(image)[result.numpy().tobytes()]
                for image, result in zip(images, batch)]
        down, right, flipped = zip(*seen)
        assert set(down) == set(right) == set(range(9))
        assert 15 < sum(flipped) < 45

    def test_calibration_batches_are_augmented_normalised_and_the_same_at_every_call(self):
        cfg = config("universal", train_size=30)
        data = ipkd_ta.load_data(cfg)
        first, again = (torch.cat([*ipkd_ta.calibration_batches(cfg, data)]) for _ in range(2))
        exact(first, again)
        pixels = ((first * data.std[:, None, None] + data.mean[:, None, None]) * 255).round()
        known = set().union(*map(pictures_of, data.splits["train"][0]))
        assert {x.byte().contiguous().numpy().tobytes() for x in pixels} < known

    def test_images_held_out_are_others_than_those_trained_on_and_the_same_for_every_seed(self):
        splits = shapes(30, val_size=10).splits
        exact(splits, shapes(30, val_size=10, seed=1).splits)
        images = torch.cat([splits["train"][0], splits["val"][0]])
        assert len(images.unique(dim=0)) == 40

    @rows("name, mean, std", [
        ("cifar10", (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))])
    def test_cifar_is_read_from_its_format(self, name, mean, std, tmp_path, monkeypatch):
        torch.manual_seed(0)
        splits = write_cifar(tmp_path, name)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        data = load(name, tmp_path)
        exact(data.splits, splits)
        exact(torch.stack([data.mean, data.std]), torch.tensor([mean, std]))
        assert data.classes == ["cat", "dog"]

    def test_cifar_that_is_not_there_is_one_line_with_the_file_and_where_to_get_it(
            self, tmp_path, monkeypatch, capfd):
        cls = torchvision.datasets.CIFAR10
        monkeypatch.setattr(cls, "url", "http://127.0.0.1:9/none")  # nothing answers
        err = refused(capfd, dataset="cifar10", data_dir=tmp_path, out=tmp_path / "run")
        assert f"'{tmp_path}'" in err
        assert f"put {cls.filename} of https://www.cs.toronto.edu/~kriz/cifar.html" in err
        assert not (tmp_path / "run").exists()

    @rows("held", ["test", "val"])
    def test_a_folder_gives_its_images_in_the_order_of_the_names(self, held, tmp_path):
        splits = {}
        for split, folder in ("train", "train"), ("test", held):
            files = sorted((write_images(tmp_path, [folder]) / folder).rglob("*.png"))
            pixels = np.stack([Image.open(file) for file in files])
            images = torch.from_numpy(pixels).movedim(3, 1)
            splits[split] = images, torch.tensor([0] * 4 + [1] * 4)
        data = load("folder", tmp_path)
        exact(data.splits, splits)
        assert data.classes == ["café", "dog"]
        x = splits["train"][0] / 255
        assert_close(data.mean, x.mean((0, 2, 3)))
        assert_close(data.std, x.std((0, 2, 3), unbiased=False))

    def test_a_line_counts_the_files_that_are_left_out_by_their_suffix(self, tmp_path, capfd):
        write_images(tmp_path)
        for name in ("notes.txt", "Thumbs.db", "dog/labels.csv"):
            (tmp_path / "train" / name).touch()
        load("folder", tmp_path)
        out = capfd.readouterr().out
        assert f"'{tmp_path / 'train'}': reading 8 images, 3 other files are left out" in out

    @rows("name, picture, options, expected", [
        ("palette.png", FOUR, {"transparency": 2}, SHOWN),
        ("clear.png", Image.fromarray(PIXELS), {}, CLEAR),
        ("animated.gif", FOUR, {"transparency": 2, **MORE}, SHOWN),
        ("ink.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, (255, 0, 0)),
        ("black and white.tiff", Image.new("1", (8, 8), 1), {}, 255)])
    def test_an_unusual_image_is_read_as_a_viewer_shows_it(
            self, name, picture, options, expected, tmp_path, recwarn):
        picture.save(tmp_path / name, **options)
        assert np.abs(seen_by_a_viewer(tmp_path / name) - expected).max() <= 2
        assert not recwarn.list

    @rows("suffix, turn", [
        *(("png", turn) for turn in range(1, 9)), ("jpg", 6), ("tiff", 5)])
    def test_an_image_is_turned_upright(self, suffix, turn, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = turn
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(PIXELS[:20, :, :3]).save(path, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(path))
        exact(seen_by_a_viewer(path), np.array(upright).astype(int))

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @rows("exif, quarters", [
        (b"II*\0" + struct.pack("<LH", 8, 2) + DANGLING + ORIENTATION, -1),
        (b"MM\0*" + struct.pack(">LHHHLL", 8, 9, 0x0112, 4, 1, 6), -1),
        (b"II*\0" + struct.pack("<LH", 8, 9) + b"junk", 0),
        (b"MM", 0)])
    def test_an_orientation_beside_damaged_exif_entries_counts(self, exif, quarters, tmp_path):
        path = tmp_path / "a.jpg"
        image = Image.fromarray(PIXELS[:20, :, :3])
        image.save(path)
        plain = seen_by_a_viewer(path)
        image.save(path, exif=b"Exif\0\0" + exif)
        assert (seen_by_a_viewer(path) == np.rot90(plain, quarters)).all()

    @rows("sides", [(900, 300), (300, 900)])
    def test_of_a_photo_the_centre_is_taken_its_shorter_side_at_the_image_size(self, sides):
        photo = Image.new("L", sides)
        left, top = (side // 2 - 150 for side in sides)
        photo.paste(200, (left, top, left + 300, top + 300))  # the centre
        pixels = ipkd_ta.square(96)(photo)
        assert pixels.shape == (1, 96, 96)
        assert pixels[:, 1:-1, 1:-1].min() >= 199
        assert pixels.min() > 150

    @rows("name, write, reason", [
        ("cut.png", lambda path: path.write_bytes(
            (path.parent / "0 ä.png").read_bytes()[:-999]), "truncated"),
        ("16 bit.png", Image.new("I;16", (8, 8), 30_000).save, "mode I;16 "),
        ("float.tiff", Image.new("F", (8, 8), 0.5).save, "mode F "),
        ("pipe.png", os.mkfifo, "not a file")])
    def test_an_impossible_image_is_named_in_one_line(
            self, name, write, reason, tmp_path, capfd):
        path = write_images(tmp_path / "images", n=1) / "train/café" / name
        write(path)
        out = tmp_path / "out"
        err = refused(capfd, dataset="folder", data_dir=tmp_path / "images", out=out)
        assert f"'{path}'" in err
        assert reason in err
        assert not out.exists()

    @rows("spoil, message", [
        (shutil.rmtree, "must hold train/<class>/.*train"),
        (lambda root: shutil.rmtree(root / "test"), "must hold .*val'"),
        (lambda root: os.rename(root / "test/dog", root / "test/owl"), "dog, owl in only one"),
        (lambda root: [path.write_text("junk") for path in (root / "train/dog").iterdir()],
         "4 of the images .*dog/0.*dog/1.*dog/2.*dog/3"),
        (lambda root: None, "--val-size 1 .*size 8 .* the 8 training images of images")])
    def test_a_wrong_folder_is_one_clear_line(self, spoil, message, tmp_path, capfd):
        root = write_images(tmp_path / "images")
        spoil(root)
        err = refused(capfd, dataset="folder", data_dir=root, out=tmp_path / "out",
                      train_size=8, val_size=1)
        assert re.search(message, err)
        assert not (tmp_path / "out").exists()


class TestOptions:
    @rows("options, reason", [
        *((options, f"{options.split()[-2]}[: ]") for options in (
            "--arch slimmable --exits 3", "--arch slimmable --base 1",
            "--arch slimmable --step 1", "--arch slimmable --step-mode even",
            "--arch slimmable --channels 8", "--arch slimmable --growth 4", "--widths 1",
            "--bn universal", "--image-size 64", "--arch resnet", "--method kd",
            "--dataset mnist", "--batch-size 1", "--epochs 1.5", "--epochs 0", "--exits 0",
            "--lr -1", "--lr nan", "--lr inf", "--kd-weight 1.5", "--kd-weight nan",
            "--kd-warmup -1", "--temperature 0", "--weight-decay -1", "--seed -1",
            "--train-size 99999999999999999999", "--val-size 99999999999999999999",
            "--device abacus", "--device cuda:99", "--report nowhere")),
        ("--arch slimmable --gradient-equilibrium", "--gradient-equilibrium is for msdnet"),
        ("--data-dir photos", "--dataset folder"),
        ("--arch slimmable --compile", "needs a GPU"),
        ("--plot a.svg", "--report DIR"),
        ("--report a --eval b", "not allowed with"),
        ("--arch slimmable --widths 0.5 0.25", "ascend"),
        ("--train-size 20 --val-size 1 --epoch 1", "--epoch"),
        ("--nonsense", "--nonsense"),
        ("stray", "stray"),
        ("--eval nowhere.pt", "nowhere.pt")])
    def test_a_wrong_option_is_one_clear_line_and_status_2(
            self, options, reason, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        assert re.search(reason, refused(capfd, *options.split()))
        assert not list(tmp_path.iterdir())

    def test_small_is_the_network_of_the_demonstration_and_what_is_given_wins(self):
        cfg = ipkd_ta.make_config({"dataset": "cifar10", "small": True, "exits": 3})
        assert (cfg.exits, cfg.channels, cfg.growth, cfg.step_mode) == (3, 8, 4, "lin_grow")

    def test_help_names_the_options(self, capfd):
        with pytest.raises(SystemExit):
            run("--help")
        assert "--lr-warmup" in capfd.readouterr().out

    def test_another_seed_is_another_network(self):
        before = torch.get_rng_state()
        models = [ipkd_ta.build_model(config("msdnet", seed=seed), 10) for seed in (0, 1)]
        assert not torch.equal(*(next(model.parameters()) for model in models))
        exact(torch.get_rng_state(), before)  # the caller's


def training(arch, data, model=None, **changes):
    """A new training of a tiny network: its state and its step."""
    cfg = config(arch, **changes)
    model = model or ipkd_ta.build_model(cfg, 10)
    state = ipkd_ta.State(cfg, model, torch.device("cpu"), None)
    return state, ipkd_ta.make_step(cfg, state, data, None)


def shapes(n, **options):
    return ipkd_ta.load_data(ipkd_ta.make_config({"train_size": n, **options}))


def drawn_widths(model, generator):
    """What a step takes on a GPU: channel counts where widths are drawn."""
    widths = model.step_widths(draw(4, generator))
    if isinstance(widths, list):
        return torch.tensor([model.channels(width) for width in widths])
    return widths


class StandIn(ipkd_ta.RecordedStep):
    """Records on a CPU: keeps the arguments of the recorded call, and a replay runs it again."""

    @contextmanager
    def aside(self):
        yield

    def record(self):
        self.graph = self
        self.recorded = list(self.places)

    def replay(self):
        self.loss = self.step(*self.recorded)


def losses(out):
    return [record["loss"] for record in read(out / "metrics.jsonl")]


class NoCopies(TorchDispatchMode):
    """Fails where a tensor moves from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {t.device for t in (*args, out) if torch.is_tensor(t)}
            assert len(devices) == 1, devices
        return out


class Reads(TorchDispatchMode):
    """Finds the storages that are read, but were not made, while it is on."""

    def __init__(self):
        super().__init__()
        self.found, self.made = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found |= storages_of(args) - self.made
        self.made |= storages_of(out) - self.found
        return out


def storages_of(tree):
    tensors = filter(torch.is_tensor, tree_leaves(tree))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class TestStep:
    @rows("arch, options", [*((arch, {}) for arch in TINY), ("universal", {"widths": (0.1,)})])
    def test_all_that_a_step_reads_stays_in_its_place(self, arch, options):
        data = shapes(32)
        state, step = training(arch, data, **options)
        model = state.model
        inputs = *data.splits["train"], drawn_widths(model, torch.Generator()), 0.1, 0.5
        with Reads() as reads:
            reads.kept = [*model.buffers()]  # so that no other tensor takes their places
            step(*inputs)
        model.calibrate([data.normalise(inputs[0])])
        model.train()
        places = [inputs, data.mean, data.std, *model.parameters(), *model.buffers()]
        places += state.optimizer.state.values()
        assert len(reads.found) > 20
        assert reads.found <= storages_of(places)

    @each_network
    def test_a_replayed_step_has_the_inputs_of_its_call(self, arch, monkeypatch):
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        data = shapes(64)
        images, labels = data.splits["train"]
        eager_state, eager = training(arch, data)
        state, step = training(arch, data)
        recorded = StandIn(step, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for i in range(10):
            batch = torch.randperm(64, generator=generator)[:8]
            widths = drawn_widths(state.model, generator)
            inputs = images[batch], labels[batch], widths, (i + 1) / 512, i / 64
            exact(recorded(*inputs), eager(*inputs))
        assert recorded.graph
        exact(state.model.state_dict(), eager_state.model.state_dict())

    @each_network
    def test_forward_pass_and_loss_need_no_number_from_a_gpu(self, arch):
        mode = FakeTensorMode()
        try:
            with mode, torch.device("cuda"):
                model = tiny_model(arch)
        except RuntimeError:
            pytest.skip("needs a driver, or a PyTorch that fakes a GPU without one")
        with mode, torch.device("cuda"):
            half = torch.full((3,), 0.5)
            images = torch.empty(8, 3, 32, 32, dtype=torch.uint8)
            labels = torch.zeros(8, dtype=torch.int64)
            kd_weight = torch.zeros(())
        data = ipkd_ta.Data({}, [*range(10)], half, half)
        widths = model.step_widths(draw(4, torch.Generator()))
        with mode:
            if torch.is_tensor(widths):
                widths = torch.empty(widths.shape, dtype=widths.dtype, device="cuda")
            with NoCopies():
                logits = model(data.normalise(images), widths)
                loss = ipkd_ta_loss(logits, labels, "ipkd-ta", kd_weight, 2.0)
            assert loss.device.type == "cuda"
            with pytest.raises(Exception, match="local_scalar"):
                loss.item()

    def test_training_goes_on_where_memory_has_another_order(self, tmp_path):
        data = shapes(16)
        inputs = *data.splits["train"], None, 0.1, 0.5
        state, step = training("msdnet", data)
        step(*inputs)
        state.save(tmp_path / "a.pt")
        found = []
        for order in torch.contiguous_format, torch.channels_last:  # of a CPU, of a GPU
            state, step = training("msdnet", data)
            state.model.to(memory_format=order)
            state.load(read(tmp_path / "a.pt"))
            step(*inputs)
            found.append([*state.model.parameters()])
        assert_close(*found, rtol=1e-3, atol=1e-4)

    @needs_cuda
    @each_network
    def test_on_a_gpu_recorded_steps_equal_eager_ones_and_evaluation_does_not_disturb_them(
            self, arch):
        device = torch.device("cuda")
        data = ipkd_ta.load_data(config(arch, train_size=64), device)
        data.normalise = lambda images: images.double() / 255 - 0.5
        images, labels = data.splits["train"]
        losses = []
        for recorded in False, True:
            model = tiny_model(arch).double().to(device, memory_format=torch.channels_last)
            _, step = training(arch, data, model)
            if recorded:
                step = ipkd_ta.RecordedStep(step, device)
            generator = torch.Generator().manual_seed(0)
            for i in range(8):
                batch = slice(i, i + 16)
                widths = model.step_widths(draw(4, generator))
                loss = step(images[batch], labels[batch], widths, (i + 1) / 2**13, i / 16)
                losses.append(loss.item())
                model.calibrate([data.normalise(images)])
                ipkd_ta.evaluate(model, data)
                model.train()
        assert losses[8:] == pytest.approx(losses[:8], abs=1e-6)

    @needs_cuda
    @rows("amp", ["auto", "off", "bf16", "fp16"])
    @each_network
    def test_a_gpu_learns_as_the_cpu_does_and_goes_on_when_it_was_killed(
            self, arch, amp, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for device, options in (("cpu", {}), ("cuda", {"amp": amp})):
            options.update(device=device, epochs=6, lr=0.02, train_size=320)
            with dying(ipkd_ta, "evaluate", 3), suppress(Killed):
                train_tiny(arch, tmp_path / device, **options)
            assert train_tiny(arch, tmp_path / device, "--resume", **options) == 0
        rel = 0.1 if arch == "msdnet" else 0.02
        assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=rel)


def timeless(path):
    """The records of the epochs without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in ("seconds", "images/s")}
            for record in read(path)]


class TestTraining:
    def test_the_demonstration_teaches(self, tmp_path, capfd):
        assert run("--out", tmp_path) == 0
        top1 = [sub["top1"] for sub in read(tmp_path / "results.json")["sub_models"]]
        assert min(top1) > 75
        assert "minutes left" in capfd.readouterr().out

    @rows("schedule, warmup, factors", [
        ("multistep", 0, [1, 1, 0.1, 0.01]),
        ("cosine", 0, [(1 + math.cos(math.pi * p)) / 2 for p in (0.125, 0.375, 0.625, 0.875)]),
        ("linear", 0.5, [0.875 * 0.25, 0.625 * 0.75, 0.375, 0.125])])
    def test_learning_rate_kd_weight_and_evaluation_follow_the_options(
            self, schedule, warmup, factors, tmp_path):
        assert train_tiny("msdnet", tmp_path, epochs=4, train_size=16, lr=0.2, kd_weight=0.8,
                          schedule=schedule, lr_warmup=warmup, kd_warmup=0.5, eval_every=3) == 0
        records = read(tmp_path / "metrics.jsonl")
        assert [r["lr"] for r in records] == pytest.approx([0.2 * factor for factor in factors])
        assert [r["kd_weight"] for r in records] == pytest.approx([0.2, 0.6, 0.8, 0.8])
        assert ["top1" in r for r in records] == [False, False, True, True]

    @each_network
    @each_method
    def test_every_combination_trains_writes_its_files_and_prints_its_table(
            self, arch, method, tmp_path, capfd):
        assert train_tiny(arch, tmp_path, method=method) == 0
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"checkpoint.pt", "config.json", "metrics.jsonl", "results.json"}
        out, err = capfd.readouterr()
        found = read(tmp_path / "results.json")
        options = read(tmp_path / "config.json")
        assert err == "" and options == found["config"]
        assert (options["method"], options["amp"]) == (method, "auto")
        assert (found["classes"], found["train_images"], found["test_images"]) == (10, 40, 50)
        assert (found["device"], found["versions"]["torch"]) == ("cpu", torch.__version__)
        table = [line.split()[::3] for line in out.splitlines()[-3:]]
        assert table == [[s["name"], f"{s['top1']:.2f}"] for s in found["sub_models"]]

    @each_network
    def test_a_step_is_nesterov_sgd_with_decay_of_full_convolutions_and_classifier_or_of_all(
            self, arch):
        data = shapes(12)
        images, labels = data.splits["train"]
        # in float32 rounding moves some outputs across a kink of ReLU6
        data.normalise = lambda x: x.double() / 255 - 0.5
        reference = tiny_model(arch).double()
        state, step = training(arch, data, copy.deepcopy(reference), weight_decay=0.3)
        widths = reference.step_widths(draw(4, torch.Generator()))
        step(images, labels, widths, 0.05, 0.5)
        ipkd_ta_loss(reference(data.normalise(images), widths), labels, kd_weight=0.5).backward()
        decayed = {tuple(m.weight.shape) for m in reference.modules()
                   if isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.groups == 1}
        for new, p in zip(state.model.parameters(), reference.parameters()):
            decay = 0.3 if arch == "msdnet" or tuple(p.shape) in decayed else 0
            gradient = p.grad + decay * p
            assert_close(new, p - 0.05 * 1.9 * gradient, rtol=1e-8, atol=1e-10)

    @rows("n, batch, trained", [(33, 16, 32), (16, 16, 16), (7, 7, 7)])
    def test_every_step_has_a_full_batch_drawn_anew_in_each_epoch_and_the_widths_of_sandwich(
            self, n, batch, trained):
        data = shapes(n)
        data.splits["train"] = data.splits["train"][0], torch.arange(n)
        state, _ = training("universal", data)
        cfg = config("universal", epochs=8, sandwich=5)
        epochs = []

        def step(images, labels, widths, *rest):
            assert (len(labels), len(widths)) == (batch, 5) and widths == sorted(widths)
            assert (widths[0], widths[-1]) == (0.05, 0.15)
            epochs[-1] += labels.tolist()
            return 1.0

        for _ in range(8):
            epochs.append([])
            record = ipkd_ta.train_epoch(cfg, state, data, step)
            state.history.append(record)
        assert record["loss"] == 1
        assert all(len(epoch) == len(set(epoch)) == trained for epoch in epochs)
        assert len(set(map(tuple, epochs))) == 8 and set(sum(epochs, [])) == set(range(n))

    @rows("no_flip", [False, True])
    def test_no_flip_leaves_left_and_right_in_training_images(self, no_flip):
        data = shapes(16)
        data.splits["train"][0][:] = torch.arange(32)  # brighter to the right
        rises = []

        def step(images, *rest):
            rises.append((images[:, 0, 16, 20] > images[:, 0, 16, 12]).all())
            return 1.0

        state = training("msdnet", data)[0]
        ipkd_ta.train_epoch(config("msdnet", no_flip=no_flip), state, data, step)
        assert all(rises) == no_flip

    def test_a_run_names_its_directory_and_has_results_of_the_images_held_out(
            self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run(**tiny("universal", val_size=10, seed=3, amp="bf16")) == 0
        found = read(tmp_path / "runs/slimmable-shapes-ipkd-ta-seed3/results.json")
        assert len(found["validation"]) == 3 and found["precision"] == "bfloat16"

    def test_a_divergence_is_one_line_and_keeps_the_last_checkpoint(
            self, tmp_path, monkeypatch, capfd):
        real = ipkd_ta.train_epoch

        def spoiled(cfg, state, *rest):
            record = real(cfg, state, *rest)
            if record["epoch"] == 2:
                next(state.model.buffers()).fill_(math.nan)
            return record

        monkeypatch.setattr(ipkd_ta, "train_epoch", spoiled)
        err = refused(capfd, "--out", tmp_path, **tiny("msdnet", epochs=3))
        assert "diverged in epoch 2" in err and "--lr than 0.1" in err
        assert len(read(tmp_path / "checkpoint.pt")["history"]) == 1

    def test_evaluation_needs_no_larger_batches_than_training_allows(self):
        assert ipkd_ta.load_data(config("msdnet", batch_size=4)).eval_batch == 16
        batches = ipkd_ta.calibration_batches(config("universal"), shapes(150))
        assert [len(x) for x in batches] == [75, 75]


class TestEvaluation:
    def test_evaluation_counts_every_image_the_same(self):
        labels = torch.arange(250) % 10
        logits = torch.randn(2, 250, 10, generator=torch.Generator().manual_seed(0))
        images = torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        model = nn.Module()
        model.widths = None

        def forward(x, widths):
            assert len(x) <= 64
            return [*logits[:, x[:, 0, 0, 0].round().long()]]

        model.forward = forward
        scale = torch.zeros(3), torch.ones(3) / 255  # so that pixels stay what they are
        data = ipkd_ta.Data({"test": (images, labels)}, [*range(10)], *scale, eval_batch=64)
        for z, sub in zip(logits, ipkd_ta.evaluate(model, data), strict=True):
            rank = (z > z[range(250), labels, None]).sum(1)
            expected = [(rank < n).sum().item() / 2.5 for n in (1, 5)]
            expected.append(F.cross_entropy(z, labels).item())
            assert [sub["top1"], sub["top5"], sub["loss"]] == pytest.approx(expected, rel=1e-5)

    @torch.no_grad()
    def test_budgets_use_validation_thresholds_and_count_all_heads_on_the_way(self):
        data = shapes(40, val_size=100)
        model = brief_msdnet(3)
        result = ipkd_ta.budgeted(model, data)
        images, labels = data.splits["test"]
        leaving = [0, 0, 0], [2, 0, 0], [2, 2, 0]  # at exit 1, 2, 3
        cost = torch.tensor([macs_of(early_exit, model, images_of(1), at) for at in leaving])
        logits = torch.stack(model(data.normalise(data.splits["val"][0])))
        confidence = logits.softmax(2).amax(2)
        assert len(result) == 20
        for budget in result:
            share = torch.tensor([budget["q"] ** k for k in (1, 2, 3)])
            thresholds = exit_thresholds(confidence, share / share.sum())
            assert budget["thresholds"] == pytest.approx(thresholds, rel=1e-5)
            answers, exits = early_exit(model, data.normalise(images), budget["thresholds"])
            top1 = 100 * (answers == labels).double().mean().item()
            assert budget["top1"] == pytest.approx(top1)
            left = [(exits == k).double().mean().item() for k in (1, 2, 3)]
            assert budget["exits"] == pytest.approx(left)
            assert budget["macs"] == pytest.approx(cost[exits - 1].mean().item())


SUB = {"name": "exit-1", "macs": 10**6, "params": 1000, "top1": 50.0, "top5": 99.0, "loss": 0.5}
RUN = {"arch": "msdnet", "dataset": "cifar10", "method": "ce", "seed": 0, "epochs": 300,
       "train_size": 50000}


def write_result(root, method, seed, top1, more={}, **changes):
    """A results.json as of a run on CIFAR-10 with these accuracies; its directory."""
    directory = root / f"{method}-{seed}-{len(list(root.iterdir()))}"
    directory.mkdir()
    subs = []
    for k, percent in enumerate(top1, start=1):
        subs.append({**SUB, "name": f"exit-{k}", "macs": k * 10**6, "top1": percent})
    saved = {**RUN, "method": method, "seed": seed, "exits": len(top1), **changes}
    content = {"config": saved, "sub_models": subs, **more}
    (directory / "results.json").write_text(json.dumps(content))
    return directory


def report(capsys, *directories):
    capsys.readouterr()
    assert run("--report", *directories) == 0
    return capsys.readouterr()


class TestReport:
    def test_methods_stand_side_by_side_with_deviations_and_differences_over_seeds(
            self, tmp_path, capsys):
        for seed, (ce, ta) in enumerate([(90.0, 91.0), (91.0, 91.5), (92.0, 92.6)]):
            write_result(tmp_path, "ce", seed, [ce, ce + 1])
            write_result(tmp_path, "ipkd-ta", seed, [ta, ta + 2])
        for seed in (2, 7):  # one has a pair
            write_result(tmp_path, "ipkd", seed, [89.0, 90.0])
        out, _ = report(capsys, tmp_path, tmp_path / "ce-0-0")  # a run named twice counts once
        for text in (
                "### msdnet on cifar10: 50,000 images, 300 epochs",
                "| top-1 % | exit-1 | exit-2 | mean |",
                "| MMACs | 1.00 | 2.00 |  |",
                "| ce (3) | 91.00 ± 1.00 | 92.00 ± 1.00 | 91.50 ± 1.00 |",
                "| ipkd (2) | 89.00 ± 0.00 | 90.00 ± 0.00 | 89.50 ± 0.00 |",
                "| ipkd-ta (3) | 91.70 ± 0.82 | 93.70 ± 0.82 | 92.70 ± 0.82 |",
                "ipkd-ta - ce, mean of the sub-models: +1.20, 95 % interval +0.54 to +1.86 (",
                "ipkd - ce, mean of the sub-models: -3.00 (",
                "ipkd-ta - ipkd, mean of the sub-models: +4.10 ("):
            assert out.count(text) == 1, text

    def test_runs_of_another_data_set_of_the_same_name_are_a_table_of_their_own(
            self, tmp_path, capsys):
        sizes = {"dataset": "photos", "classes": 2, "train_images": 16, "test_images": 8}
        for seed, change in enumerate([{}, {"classes": 3}, {"train_images": 17},
                                       {"test_images": 9}]):
            write_result(tmp_path, "ce", seed, [50.0], {**sizes, **change})
        assert report(capsys, tmp_path).out.count("| ce (1) |") == 4

    def test_settings_are_named_by_what_differs_from_the_defaults(self, tmp_path, capsys):
        small = dict(exits=4, base=1, step=1, step_mode="lin_grow", channels=8, growth=4)
        write_result(tmp_path, "ipkd", 0, [50.0] * 4, **small, lr=0.2, kd_weight=0.3)
        out = report(capsys, tmp_path).out
        assert ", 300 epochs, small, lr 0.2\n" in out
        assert "| ipkd, kd_weight 0.3" in out

    def test_linked_directories_are_reported_and_what_is_left_out_is_named(self, tmp_path, capsys):
        here = tmp_path / "here"
        (here / "unfinished").mkdir(parents=True)
        (here / "unfinished/config.json").touch()
        (here / "up").symlink_to(tmp_path, target_is_directory=True)  # and so to here
        write_result(tmp_path, "ce", 0, [90.0])
        write_result(here, "ce", 1, [92.0])
        twin = write_result(here, "ce", 1, [91.0])
        out, err = report(capsys, here)
        assert "| ce (2) | 91.00 ± 1.41 |" in out
        assert str(twin) in err and "unfinished' is not finished" in err and err.count("\n") == 2

    @rows("content", [
        b"", b"\xff\xfe", b"[]", {"config": {}}, {"sub_models": []}, {"classes": 10},
        {"sub_models": [{**SUB, "macs": None}]}, {"train_images": "40"}])
    def test_a_file_that_is_no_result_is_named(self, content, tmp_path, capfd):
        if isinstance(content, dict):
            content = json.dumps({"config": RUN, "sub_models": [SUB], **content}).encode()
        (tmp_path / "results.json").write_bytes(content)
        assert f"'{tmp_path / 'results.json'}'" in refused(capfd, "--report", tmp_path)

    @pytest.mark.skipif(not (HERE / ".github/results").is_dir(), reason="needs .github/results")
    def test_the_figures_of_the_readme_are_those_of_the_runs_in_the_repository(self, capsys):
        readme = (HERE / "README.md").read_text("utf-8")
        measured = (HERE / ".github/MEASUREMENTS.md").read_text("utf-8")
        complete = []
        for named in re.findall(r"--report((?: \.github/results/[\w-]+)+)`", readme):
            sections = report(capsys, *map(HERE.joinpath, named.split())).out.split("### ")
            complete += [s for s in sections if re.search("-ta.* - ipkd", s)]
        for section in complete:
            means = re.findall(r"(?m)\((\d+)\) \|.* \| (.*) \|$", section)
            cells = [f"{top1} ({n})" for n, top1 in means]
            gain = re.search(r"-ta.* - ipkd.*-models: (.*) \(", section)[1]
            gain = re.sub(", 95 % interval (.*)", r" (\1)", gain).replace("-", "−")
            assert f"| {' | '.join([*cells, gain])} |" in readme
            assert re.search(r"(?m)(^\|.*\n)+", section)[0] in measured
        assert len(complete) == len(re.findall(",000 × .* [−+]", readme)) > 3

    def test_a_plot_has_a_panel_for_each_setting_and_a_line_for_each_method(
            self, tmp_path, monkeypatch, capfd):
        figure = pytest.importorskip("matplotlib.figure").Figure
        drawn = []
        save = figure.savefig
        monkeypatch.setattr(figure, "savefig", lambda *args: [drawn.append(args[0]), save(*args)])
        for seed in (0, 1):
            write_result(tmp_path, "ce", seed, [90.0 + seed, 91.0])
            write_result(tmp_path, "ipkd-ta", seed, [91.0, 92.0])
        write_result(tmp_path, "ipkd", 0, [80.0], lr=0.2)
        assert run("--report", tmp_path, "--plot", tmp_path / "a.png") == 0
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        assert "'xyz'" in refused(capfd, "--report", tmp_path, "--plot", tmp_path / "a.xyz")
        assert sorted(len(axes.containers) for axes in drawn[0].axes) == [1, 2]

    def test_a_plot_without_matplotlib_says_what_is_missing(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        write_result(tmp_path, "ce", 0, [90.0])
        err = refused(capfd, "--report", tmp_path, "--plot", tmp_path / "a.png")
        assert "--plot needs matplotlib" in err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories of finished runs of all tiny networks, three epochs of two steps each."""
    root = tmp_path_factory.mktemp("trained")
    for arch in TINY:
        assert train_tiny(arch, root / arch, epochs=3) == 0
    return root


FULL = OSError(28, "No space left on device")
CODE = type("Code", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


class TestResume:
    @rows("arch, owner, name, calls", [
        ("msdnet", ipkd_ta, "load_data", 0),
        ("msdnet", ipkd_ta, "evaluate", 1),
        ("switchable", ipkd_ta, "ipkd_ta_loss", 3),
        *(("universal", os, "replace", n) for n in (0, 1, 3, 6))])
    @rows("error", [Killed, KeyboardInterrupt])
    def test_a_run_that_dies_at_any_point_is_resumed_to_the_same_bits(
            self, arch, owner, name, calls, error, trained, tmp_path, capfd):
        out = tmp_path / "run"
        status = None
        with dying(owner, name, calls, error), suppress(Killed):
            status = train_tiny(arch, out, "--resume", epochs=3)
        assert status == (130 if error is KeyboardInterrupt else None)
        assert ("--resume" in capfd.readouterr().err) == (status == 130)
        assert train_tiny(arch, out, "--resume", epochs=3) == 0
        whole = trained / arch
        exact(read(out / "checkpoint.pt")["model"], read(whole / "checkpoint.pt")["model"])
        results = [read(path / "results.json")["sub_models"] for path in (out, whole)]
        assert results[0] == results[1]
        assert timeless(out / "metrics.jsonl") == timeless(whole / "metrics.jsonl")

    @rows("error", [FULL, torch.OutOfMemoryError("CUDA out of memory")])
    def test_a_full_disk_or_gpu_keeps_the_last_checkpoint(self, error, tmp_path, capfd):
        with dying(os, "replace", 3, error):  # in the second epoch
            err = refused(capfd, "--out", tmp_path, **tiny("universal", epochs=3))
        assert error.args[-1] in err and not list(tmp_path.glob("*tmp*"))
        assert len(read(tmp_path / "checkpoint.pt")["history"]) == 1

    def test_a_run_that_could_not_begin_leaves_its_place_free(self, tmp_path, capfd):
        with dying(json, "dump", 0, FULL):
            assert "No space left" in refused(capfd, "--out", tmp_path, **tiny("msdnet"))
        assert train_tiny("msdnet", tmp_path) == 0

    def test_a_fault_of_the_program_keeps_its_traceback(self, tmp_path):
        fault = dying(ipkd_ta, "ipkd_ta_loss", 1, RuntimeError("shapes"))
        with fault, pytest.raises(RuntimeError, match="shapes"):
            train_tiny("msdnet", tmp_path)

    @rows("mode", ["--eval", "--resume"])
    @rows("damage", [
        lambda good: good[:-1000],
        lambda good: good[:9000] + bytes([good[9000] ^ 1]) + good[9001:],
        {"model": {}}, {"model": CODE}, {"mean": (0.5, 0.5, 0.5)}, {"config": {}}])
    def test_a_damaged_or_foreign_checkpoint_is_named_and_its_code_is_not_run(
            self, damage, mode, trained, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        out = shutil.copytree(trained / "msdnet", tmp_path / "run")
        path = out / "checkpoint.pt"
        (out / "results.json").unlink()
        if callable(damage):
            path.write_bytes(damage(path.read_bytes()))
        else:
            torch.save({**read(path), **damage}, path)
        before = contents(out)
        words = [mode, path] if mode == "--eval" else [mode, "--out", out]
        assert str(path) in refused(capfd, *words)
        assert contents(out) == before
        assert not Path("executed").exists()

    def test_the_checkpoint_of_another_run_is_refused(self, trained, tmp_path, capfd):
        out = shutil.copytree(trained / "msdnet", tmp_path / "run")
        (out / "results.json").unlink()
        shutil.copy(trained / "universal/checkpoint.pt", out)
        assert "of another run" in refused(capfd, "--resume", "--out", out)

    def test_a_resumed_run_keeps_its_options_and_says_so(self, tmp_path, capfd):
        with dying(ipkd_ta, "ipkd_ta_loss", 3), suppress(Killed):
            train_tiny("universal", tmp_path, epochs=2)
        assert run("--resume", "--out", tmp_path, lr=0.3, device="cpu", bn="universal") == 0
        assert "keeps its own options: --lr 0.1\n" in capfd.readouterr().out
        assert read(tmp_path / "results.json")["config"]["lr"] == 0.1

    def test_a_finished_run_stays_as_it_is(self, trained, capfd):
        out = trained / "msdnet"
        before = contents(out)
        assert run("--resume", "--out", out) == 0
        assert "finished" in capfd.readouterr().out
        assert "has a run" in refused(capfd, "--out", out)
        assert run("--resume", "--out", out, arch="msdnet", dataset="shapes", method="ce") == 0
        assert ": --method ipkd-ta, --train-size 40, --epochs 3, " in capfd.readouterr().out
        assert contents(out) == before

    @rows("kept", ["results.json", "checkpoint.pt"])
    def test_one_file_of_a_run_keeps_its_place_and_is_enough_to_go_on(
            self, kept, trained, tmp_path, capfd):
        shutil.copy(trained / "msdnet" / kept, tmp_path)
        before = contents(tmp_path)
        assert "has a run" in refused(capfd, "--out", tmp_path)
        assert contents(tmp_path) == before
        assert run("--resume", "--out", tmp_path) == 0
        found, whole = (read(out / "results.json") for out in (tmp_path, trained / "msdnet"))
        assert found["sub_models"] == whole["sub_models"]

    def test_a_directory_that_another_run_took_meanwhile_and_a_file_are_refused(
            self, tmp_path, monkeypatch, capfd):
        load = ipkd_ta.load_data
        rival = tmp_path / "config.json"
        monkeypatch.setattr(
            ipkd_ta, "load_data", lambda cfg, device: [rival.touch(), load(cfg)][1])
        assert "taken by another run" in refused(capfd, "--out", tmp_path)
        assert rival.read_bytes() == b""
        assert "is a file" in refused(capfd, "--out", rival)

    @rows("content", [
        '{"name": "my other project"}', "[]", "{", '{"arch": "vgg"}', "[" * 100_000])
    def test_a_config_that_is_not_of_this_program_is_refused(self, content, tmp_path, capfd):
        (tmp_path / "config.json").write_text(content)
        for words in (["--resume"], []):
            assert str(tmp_path) in refused(capfd, *words, "--out", tmp_path)
        assert [path.read_text() for path in tmp_path.iterdir()] == [content]

    def test_resuming_on_other_images_is_refused(self, tmp_path, capfd):
        folder = write_images(tmp_path / "data")
        with dying(ipkd_ta, "ipkd_ta_loss", 1), suppress(Killed):
            train_tiny("msdnet", tmp_path / "run", dataset="folder", data_dir=folder,
                       train_size=4, batch_size=4, epochs=2)
        for path in folder.glob("train/*/*.png"):
            Image.new("RGB", (32, 32)).save(path)
        err = refused(capfd, "--resume", "--out", tmp_path / "run")
        assert "does not have the images of the run" in err

    @each_network
    def test_eval_prints_the_table_of_the_run(self, arch, tmp_path, capfd):
        assert train_tiny(arch, tmp_path) == 0
        table = capfd.readouterr().out.splitlines()[-3:]
        assert run("--eval", tmp_path / "checkpoint.pt") == 0
        assert capfd.readouterr().out.splitlines()[-3:] == table

    def test_eval_measures_any_width_of_the_range_and_no_other(self, trained, tmp_path, capfd):
        content = read(trained / "universal/checkpoint.pt")
        content["config"]["compile"] = True  # on a GPU
        path = tmp_path / "checkpoint.pt"
        torch.save(content, path)
        assert run("--eval", path, "--widths", 0.05, 0.12) == 0
        lines = [line.split() for line in capfd.readouterr().out.splitlines()[-2:]]
        assert [name for name, *_ in lines] == ["width-0.05", "width-0.12"]
        first = read(trained / "universal/results.json")["sub_models"][0]
        assert lines[0][3] == f"{first['top1']:.2f}"
        assert "0.5" in refused(capfd, "--eval", path, "--widths", 0.5)


STAND_IN = """import os, pathlib, sys, time  # for the training that run_cifar.sh calls
words = sys.argv[2:]
if words[0] == "--report":
    sys.exit(print("report of", words[1]))
out = pathlib.Path(words[words.index("--out") + 1])
if (out / "results.json").exists():
    sys.exit(print("'it' keeps its own options: --epochs 7"))
print("trains", flush=True)
again = out.exists()
out.mkdir(parents=True, exist_ok=True)
(out / "words").write_text(" ".join(words))
(out / f"{os.getpid()}.pid").touch()
time.sleep(float(os.environ["SLEEP"]))
if os.environ["FAIL"] in " ".join(words) and not again:
    sys.exit("its last words")
(out / "results.json").touch()
"""


def run_cifar(folder, *words, **variables):
    """A process of run_cifar.sh with a stand-in for training, called from `folder`."""
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n{STAND_IN}")
    python.chmod(0o755)
    variables = {
        "PYTHON": str(python), "SEEDS": "0 1", "DATASETS": "my_photos", "METHODS": "ce ipkd-ta",
        "ARCHS": "msdnet", "JOBS": "2", "OUT": "runs", "SLEEP": "0.2", "FAIL": "--seed 1",
        **variables}
    return subprocess.Popen(
        ["bash", HERE / "run_cifar.sh", *words], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **variables},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


@pytest.mark.skipif(not (HERE / "run_cifar.sh").exists(), reason="needs run_cifar.sh")
class TestRunCifar:
    def test_it_names_its_variables(self, tmp_path):
        text = run_cifar(tmp_path, "--help").communicate()[0]
        names = "ARCHS DATASETS METHODS SEEDS EPOCHS MSDNET SLIMMABLE OUT JOBS PYTHON"
        assert all(name in text for name in names.split()) and not (tmp_path / "runs").exists()

    def test_it_runs_side_by_side_and_names_what_failed(self, tmp_path):
        out, err = run_cifar(tmp_path, "--kd-weight", "0.3", "--lr=0.1").communicate()
        assert [line.split()[-1] for line in out.splitlines()[:2]] == ["begins", "begins"]
        for method, seed in itertools.product(("ce", "ipkd-ta"), (0, 1)):
            name = f"msdnet-my_photos-{method}-seed{seed}"
            text = (tmp_path / "runs" / name / "words").read_text()
            assert f"--dataset folder --data-dir my_photos --arch msdnet --method {method}" in text
            assert f"--seed {seed} --out runs/{name} --resume" in text
            assert "--eval-every 10 --kd-weight 0.3 --lr=0.1" in text
            assert (tmp_path / f"runs/{name}.log").read_text().startswith("trains\n")
            assert f"{name}: ends with status {seed}" in out
        assert "failed: msdnet-my_photos-ce-seed1" in err and "its last words" in out
        assert "report of runs" in out

    def test_called_again_it_skips_what_is_finished_and_repeats_what_failed(self, tmp_path):
        run_cifar(tmp_path, METHODS="ce").wait()
        out = run_cifar(tmp_path, METHODS="ce", EPOCHS="8").communicate()[0]
        assert "ce-seed0: already finished, it has other options: --epochs 7" in out
        assert "ce-seed1: begins" in out and "ce-seed1: ends with status 0" in out

    def test_it_stops_when_the_first_three_runs_have_failed(self, tmp_path):
        process = run_cifar(tmp_path, JOBS="1", FAIL="--seed", SEEDS="0 1 2")
        out, err = process.communicate()
        assert process.returncode == 1 and "first three runs have failed" in err
        assert out.count("begins") == 3

    def test_ctrl_c_ends_all_its_runs(self, tmp_path):
        process = run_cifar(tmp_path, SLEEP="100")
        while len(list(tmp_path.glob("runs/*/*.pid"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130 and "call it again" in process.stderr.read()
        for path in tmp_path.glob("runs/*/*.pid"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(path.stem), 0)


@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="needs README.md")
def test_the_python_examples_of_the_readme_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    photos = write_images(tmp_path / "photos", n=30)
    Image.open(next(photos.rglob("*.png"))).resize((90, 40)).save("photo.jpg")
    assert train_tiny("msdnet", "run", dataset="folder", data_dir=photos, val_size=11) == 0
    capfd.readouterr()
    for example in re.findall(r"(?ms)^```python\n(.*?)^```", text):
        exec(example, {"__name__": "__main__"})
    assert len(re.findall("(?m)^café|^dog", capfd.readouterr().out)) == 2
