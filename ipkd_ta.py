"""IPKD-TA: inplace knowledge distillation with teacher assistant, for flexible neural networks, in one file.

A flexible network holds many sub-models in one set of weights: the exits of an MSDNet, the widths of a slimmable
MobileNet-V1. All are trained at once, and each sub-model teaches the next smaller one, a cascade of teacher assistants:

    A. Ozerov and N. Q. K. Duong, "Inplace knowledge distillation with teacher assistant for improved training of
    flexible deep neural networks", EUSIPCO 2021, arXiv:2105.08369.

    python ipkd_ta.py                                   # a demonstration on drawn shapes, no download
    python ipkd_ta.py --arch msdnet --dataset cifar100  # one of the benchmarks

Measured on two cores of an AMD EPYC, PyTorch 2.14: the demonstration takes 18 s, the first exit reaches 90.3 %, the
last 98.0 %. To reuse the loss or a network, copy its part: it needs only the imports.
"""
import argparse
import copy
import ctypes
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import sys
import tempfile
import textwrap
import time
import unicodedata
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

__version__ = "2.1"
SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]

# ==== The loss: the algorithm in one screen ===================================

def ipkd_ta_loss(logits, target, method="ipkd-ta", kd_weight=0.5, temperature=1.0):
    """Loss of all sub-models of a flexible network, trained together (arXiv:2105.08369, by its abstract).

        L = CE(z_K, y) + sum over k < K of [ (1 - kd_weight) CE(z_k, y)
                                             + kd_weight temperature^2 KL( stop_gradient(p_t(k)) || p_k ) ]

    where p_k = softmax(z_k / temperature), and the method chooses the teacher t(k) of sub-model k:

        "ce"       none: every sub-model learns only from the labels, as if kd_weight were 0
        "ipkd"     K: the largest teaches all others (Yu & Huang, ICCV 2019; Li et al., ICCV 2019)
        "ipkd-ta"  k + 1: each sub-model is the teacher assistant of the next smaller one (Ozerov & Duong, 2021)

    logits: list of K tensors (N, C), smallest sub-model first, computed in float32 or better. target: class indices
    (N,), int64. kd_weight in [0, 1], temperature in [0.001, 1000]. Returns a scalar: summed over sub-models and
    classes, averaged over the batch; no gradient flows into a teacher. ValueError for another method, number or shape.
    """
    if method not in ("ce", "ipkd", "ipkd-ta"):
        raise ValueError(f"method must be 'ce', 'ipkd' or 'ipkd-ta', got {method!r}")
    if not 0 <= kd_weight <= 1 or not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"need 0 <= kd_weight <= 1, 0.001 <= temperature <= 1000, got {kd_weight} and {temperature}")
    shapes = [*{tuple(z.shape) for z in logits}]
    if len(shapes) != 1 or len(shapes[0]) != 2 or 0 in shapes[0] or target.shape != shapes[0][:1]:
        raise ValueError(f"need logits of one shape (N, C) and target (N,), got {shapes} and {tuple(target.shape)}")

    logits = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in logits]
    log_p = [F.log_softmax(z / temperature, dim=1) for z in logits]
    loss = F.cross_entropy(logits[-1], target)
    kd_weight = 0 if method == "ce" else kd_weight
    for k, student in enumerate(logits[:-1]):
        teacher = log_p[-1] if method == "ipkd" else log_p[k + 1]
        ce = F.cross_entropy(student, target)
        kl = F.kl_div(log_p[k], teacher.detach(), reduction="batchmean", log_target=True)
        loss = loss + (1 - kd_weight) * ce + kd_weight * temperature**2 * kl
    return loss


def sandwich_widths(n, low, high, generator=None):
    """Widths to train in one step by the sandwich rule (Yu & Huang, ICCV 2019, section 3.3): `high`, n - 2 drawn
    uniformly from [low, high] by a CPU torch.Generator, and `low`, descending. ValueError for other n, low, high."""
    if not isinstance(n, Integral) or n < 2 or not 0 < low < high < math.inf:
        raise ValueError(f"need an integer n >= 2 and 0 < low < high, got n={n}, low={low}, high={high}")
    drawn = low + (high - low) * torch.rand(int(n) - 2, generator=generator, dtype=torch.float64)
    return [float(high), *sorted(drawn.tolist(), reverse=True), float(low)]


# ==== Slimmable MobileNet-V1: the sub-models are widths =======================

class SlimmableMobileNetV1(nn.Module):
    """MobileNet-V1 (Howard et al., 2017), in its form for 32x32 images, with the width multiplier as an argument of
    `forward`. At width w every layer computes with the first c * w of its c channels, rounded to a multiple of 8. It
    does so by functions on slices of weights: hooks on its layers see nothing. ValueError for a width not offered.

    num_classes: C, the number of logits at every width.
    widths: the sub-models, as width multipliers ascending in (0, 1]. Weights are as wide as the last one needs.
    bn: "universal" (Yu & Huang, ICCV 2019): all widths share gamma and beta; any width in [widths[0], widths[-1]] may
        be asked for, in eval mode after `calibrate`.
        "switchable" (Yu et al., ICLR 2019): a private BatchNorm for each of `widths`, and no other width.
    """

    STEM = 32  # channels of the first layer; BLOCKS are depthwise-separable: (output channels, stride)
    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, num_classes=100, widths=(0.25, 0.5, 0.75, 1.0), bn="universal"):
        super().__init__()
        widths = tuple(round(float(width), 7) for width in widths)  # so that 0.1 + 0.2 is 0.3
        if not widths or list(widths) != sorted(set(widths)) or not 0 < widths[0] <= widths[-1] <= 1:
            raise ValueError(f"widths must ascend within (0, 1], got {list(widths)}")
        if bn not in ("universal", "switchable") or not isinstance(num_classes, Integral) or num_classes < 1:
            raise ValueError(f"need bn 'universal' or 'switchable', num_classes > 0; got {bn!r} and {num_classes!r}")
        self.widths, self.trained, self.bn = widths, widths, bn  # widths may be replaced

        counts = self.channels(widths[-1])
        self.convs = nn.ModuleList([nn.Conv2d(3, counts[0], 3, padding=1, bias=False)])
        for i, (_, stride) in enumerate(self.BLOCKS):
            c_in, c_out = counts[2 * i], counts[2 * i + 2]
            self.convs.append(nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False))  # depthwise
            self.convs.append(nn.Conv2d(c_in, c_out, 1, bias=False))  # pointwise
        self.classifier = nn.Linear(counts[-1], int(num_classes))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # N(0, sqrt(2 / (k k C_out)))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

        if bn == "switchable":  # a list of BatchNorms for each width
            self.norms = nn.ModuleList(nn.ModuleList(map(nn.BatchNorm2d, self.channels(w))) for w in widths)
        else:  # one list for all, and the calibrated statistics of each width beside it
            self.norms = nn.ModuleList(nn.BatchNorm2d(c, track_running_stats=False) for c in counts)
        self.statistics = {}  # universal: width -> [(mean, variance) of each layer]

    def channels(self, width):
        """Of the 27 convolutions: the multiples of 8 nearest to c * width, at least 8 and 90 % of c * width."""
        base = [self.STEM]
        for c_out, _ in self.BLOCKS:
            base += [base[-1], c_out]
        nearest = [(c * width, max(8, int(c * width / 8 + 0.5) * 8)) for c in base]
        return [c if c >= 0.9 * exact else c + 8 for exact, c in nearest]

    def layers(self, width, measured=False):
        """The 27 layers: conv, its sliced weight, gamma, beta, running mean and variance (None if not measured)."""
        width = round(float(width), 7)
        if not self.trained[0] <= width <= self.trained[-1] or self.bn == "switchable" and width not in self.trained:
            raise ValueError(f"width {width} was not trained: {self.bn} BatchNorm with widths {self.trained}")
        if self.bn == "switchable":
            norms = self.norms[self.trained.index(width)]
            statistics = [(norm.running_mean, norm.running_var) for norm in norms]
        else:
            norms, statistics = self.norms, self.statistics.get(width, [(None, None)] * len(self.norms))
        if measured and statistics[0][0] is None:
            raise ValueError(f"width {width} has no BatchNorm statistics yet: call calibrate(batches, [{width}]) first")
        layers, c_in = [], 3
        for conv, c, norm, (mean, var) in zip(self.convs, self.channels(width), norms, statistics):
            weight = conv.weight[:c, :c_in] if conv.groups == 1 else conv.weight[:c]
            layers.append((conv, weight, norm.weight[:c], norm.bias[:c], mean, var))
            c_in = c
        return layers

    def forward(self, x, width=None):
        """x: (N, 3, H, W) -> logits (N, num_classes) of the sub-model of this width (default: the largest)."""
        if self.training and self.bn == "universal":
            self.statistics.clear()  # the weights are about to change
        width = self.trained[-1] if width is None else width
        return self.run(x, self.layers(width, measured=not self.training), self.training)

    def run(self, x, layers, training, momentum=0.1):
        """`forward` by the layers of one width; training updates mean and var in place."""
        for conv, weight, gamma, beta, mean, var in layers:
            x = F.conv2d(x, weight, None, conv.stride, conv.padding, groups=len(weight) if conv.groups > 1 else 1)
            x = F.relu6(F.batch_norm(x, mean, var, gamma, beta, training, momentum), inplace=True)
        x = x.mean(dim=(2, 3))  # (N, channels of the last layer)
        return F.linear(x, self.classifier.weight[:, :x.shape[1]], self.classifier.bias)

    @torch.no_grad()
    def calibrate(self, batches, widths=None):
        """Measure the BatchNorm statistics of `widths` for eval mode after training: means over chunks of 256.
        batches: iterable of normalised, augmented, shuffled images (N, 3, H, W), or tuples that begin so; all kept."""
        images, seen = torch.cat([batch if torch.is_tensor(batch) else batch[0] for batch in batches]), 0
        widths = [round(float(width), 7) for width in (self.widths if widths is None else widths)]
        for width, layers in [(width, self.layers(width)) for width in widths]:
            if self.bn == "universal":
                self.statistics[width] = [(torch.zeros_like(layer[2]), torch.zeros_like(layer[2])) for layer in layers]
        for x in images.tensor_split(math.ceil(len(images) / 256)):
            seen += len(x)
            for width in widths:  # the running statistics become the mean over the images seen
                self.run(x.to(self.classifier.weight), self.layers(width), training=True, momentum=len(x) / seen)

    def get_extra_state(self):  # the calibrated statistics are a part of the state_dict
        return self.statistics

    def set_extra_state(self, state):
        self.statistics = state
        self.to(self.classifier.weight)

    def _apply(self, fn, recurse=True):  # and follow the weights to another device or number format
        super()._apply(fn, recurse)
        self.statistics = {w: [(fn(mean), fn(var)) for mean, var in layers] for w, layers in self.statistics.items()}
        return self

    def names(self):
        return [f"width-{width:g}" for width in self.widths]

    def sub_models(self, image_size=32):
        """Those of `widths`, each with name, macs (multiply-accumulates for one square image) and params (with
        BatchNorm's gamma and beta)."""
        subs = []
        for name, width in zip(self.names(), self.widths):
            macs, params, size = 0, 0, image_size
            for conv, weight, gamma, *_ in self.layers(width):
                size = math.ceil(size / conv.stride[0])
                macs += weight.numel() * size**2
                params += weight.numel() + 2 * len(gamma)
            c = self.classifier.out_features
            subs.append(SimpleNamespace(name=name, macs=macs + len(gamma) * c, params=params + (len(gamma) + 1) * c))
        return subs

    def training_passes(self, x, draw_widths):
        """The forward passes of one training step, largest sub-model first, as lists of logits: of all `widths` if
        switchable, of draw_widths(low, high) if universal."""
        sampled = self.bn == "universal" and len(self.trained) > 1
        for width in draw_widths(self.trained[0], self.trained[-1]) if sampled else reversed(self.trained):
            yield [self(x, width)]

    def all_logits(self, x):
        """x: (N, 3, H, W) -> list of logits (N, num_classes), smallest sub-model first."""
        return [self(x, width) for width in self.widths]

    def extract(self, which):  # see the function `extract`; an int or a float
        width, modules, c_in = self.widths[which - 1] if isinstance(which, int) else which, [], 3
        for conv, weight, *norm in self.layers(width, measured=True):
            with torch.device("meta"):  # no weights are drawn: these are put in
                module = Conv2dNormActivation(c_in, len(weight), conv.kernel_size, conv.stride,
                                              groups=len(weight) if conv.groups > 1 else 1, activation_layer=nn.ReLU6)
            state = zip(module.state_dict(), (weight, *norm, torch.tensor(0)))  # the last: num_batches_tracked
            module.load_state_dict({name: t.detach().clone() for name, t in state}, assign=True)
            modules.append(module)
            c_in = len(weight)
        classifier = copy.deepcopy(self.classifier)
        classifier.weight, classifier.in_features = nn.Parameter(classifier.weight[:, :c_in].detach().clone()), c_in
        whole = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier).eval()
        return whole.to(memory_format=torch.channels_last)


# ==== MSDNet: the sub-models are exits ========================================

class MSDStem(nn.Module):
    """Image (N, 3, H, W) -> one map per scale, finest first, each but the first from the one before at stride 2."""

    def __init__(self, channels, factors):
        super().__init__()
        counts = [3] + [channels * f for f in factors]
        self.convs = nn.ModuleList(Conv2dNormActivation(c_in, c_out, 3, stride=2 if s else 1)
                                   for s, (c_in, c_out) in enumerate(zip(counts, counts[1:])))

    def forward(self, x):
        return [x := conv(x) for conv in self.convs]


class MSDLayer(nn.Module):
    """Maps -> their coarsest `n_out` scales, each with new channels: half of them from the next finer scale, if any."""

    def __init__(self, channels, growth, factors, n_out):
        super().__init__()
        self.first = len(factors) - n_out
        self.paths = nn.ModuleList()
        for s in range(self.first, len(factors)):
            sources = factors[max(s - 1, 0): s + 1]
            c_out = growth * factors[s] // len(sources)
            self.paths.append(nn.ModuleList())
            for f in sources:  # a bottleneck, and a convolution to the size of scale s
                mid, stride = min(channels, c_out) * f, 1 if f == factors[s] else 2
                self.paths[-1].append(nn.Sequential(
                    Conv2dNormActivation(channels * f, mid, 1), Conv2dNormActivation(mid, c_out, 3, stride)))

    def forward(self, maps):
        out = []
        for s, paths in enumerate(self.paths, start=self.first):
            new = [path(x) for path, x in zip(paths, maps[max(s - 1, 0): s + 1])]
            out.append(torch.cat([maps[s], *new], dim=1))
        return out


class MSDTransition(nn.Module):
    """Halve the channels of every scale by 1x1 convolutions."""

    def __init__(self, channels, factors):
        super().__init__()
        self.convs = nn.ModuleList(Conv2dNormActivation(channels * f, channels // 2 * f, 1) for f in factors)

    def forward(self, maps):
        return [conv(x) for conv, x in zip(self.convs, maps)]


class MSDExit(nn.Module):
    """One exit and no other: image (N, 3, H, W) -> logits (N, C)."""

    def __init__(self, blocks, head):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), head

    def forward(self, x):
        return self.head(self.blocks(x)[-1])


class MSDNet(nn.Module):
    """Multi-scale dense network with early exits (Huang et al., ICLR 2018), in its form for 32x32 images.

    Feature maps are lists of tensors, one per scale, finest first: of 32x32, 16x16 and 8x8 pixels, with n, 2n and 4n
    channels. Every layer appends growth * (1, 2, 4) channels; the finest scale is dropped after each third of the
    layers. Exit k classifies the coarsest scale after block k.

    num_classes: C, the number of logits of every exit.
    exits: K, the number of blocks and of classifiers. base: layers in the first block.
    step, step_mode: layers in each later block: `step` ("even") or step * i + 1 in block i + 1 ("lin_grow").
    channels, growth: at the finest scale, channels of the first layer and those that every layer adds.
    gradient_equilibrium: block k receives the mean, not the sum, of the gradients that the exits from k on send (Li et
        al., ICCV 2019).
    """

    FACTORS = (1, 2, 4)  # channels of a scale relative to the finest; also how far its bottlenecks are wider

    def __init__(self, num_classes=100, exits=7, base=4, step=2, step_mode="even", channels=16, growth=6,
                 gradient_equilibrium=False):
        super().__init__()
        sizes = (num_classes, exits, base, step, channels, growth)
        if not all(isinstance(size, Integral) and size > 0 for size in sizes):
            raise ValueError(f"num_classes, exits, base, step, channels, growth must be positive integers, got {sizes}")
        if step_mode not in ("even", "lin_grow"):
            raise ValueError(f"step_mode must be 'even' or 'lin_grow', got {step_mode!r}")

        self.gradient_equilibrium = gradient_equilibrium
        num_classes, exits, base, step, n, growth = map(int, sizes)
        depths = [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, exits)]
        interval = math.ceil(sum(depths) / len(self.FACTORS))  # layers between two scale reductions
        factors, self.blocks, self.heads = self.FACTORS, nn.ModuleList(), nn.ModuleList()
        for k in range(exits):
            block = [MSDStem(n, factors)] if k == 0 else []
            for layer in range(sum(depths[:k]), sum(depths[:k + 1])):
                n_out = len(self.FACTORS) - layer // interval
                block.append(MSDLayer(n, growth, factors, n_out))
                n += growth
                if n_out < len(factors):
                    factors = factors[-n_out:]
                    block.append(MSDTransition(n, factors))
                    n //= 2
            self.blocks.append(nn.Sequential(*block))
            self.heads.append(nn.Sequential(  # at 32x32 pixels 8x8 -> 4x4 -> 2x2 -> 1x1
                Conv2dNormActivation(n * factors[-1], 128, 3, stride=2), Conv2dNormActivation(128, 128, 3, stride=2),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)))

    def forward(self, x):
        """x: (N, 3, H, W) -> list of K logits (N, num_classes), exit 1 first."""
        logits = []
        for following, block, head in zip(reversed(range(len(self.heads))), self.blocks, self.heads):
            x = block(x)  # maps, finest scale first
            read = x[-1]
            if self.gradient_equilibrium and self.training:  # the same numbers, their gradients scaled
                share = 1 / (following + 1)
                read = torch.lerp(read.detach(), read, share)
                x = [torch.lerp(m.detach(), m, 1 - share) for m in x]
            logits.append(head(read))
        return logits

    def calibrate(self, batches, widths=None):
        pass  # BatchNorm statistics are tracked in training

    def names(self):
        return [f"exit-{k}" for k in range(1, len(self.heads) + 1)]

    def sub_models(self, image_size=32):
        """The exits, each with name, params (with BatchNorm's) and macs (multiply-accumulates for one square image) of
        the blocks up to it and its own head. early_exit_macs: with all heads on the way."""
        with FlopCounterMode(display=False) as counter:  # on tensors without numbers
            copy.deepcopy(self).to("meta").eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
        subs, blocks, heads, net, flops = [], 0, 0, type(self).__name__, counter.get_flop_counts()
        for k, name in enumerate(self.names()):
            block, head = (sum(flops[f"{net}.{part}.{k}"].values()) // 2 for part in ("blocks", "heads"))
            blocks, heads = blocks + block, heads + head
            params = sum(p.numel() for p in MSDExit(self.blocks[:k + 1], self.heads[k]).parameters())
            subs.append(SimpleNamespace(name=name, macs=blocks + head, params=params, early_exit_macs=blocks + heads))
        return subs

    def training_passes(self, x, draw_widths):
        yield self(x)  # one forward pass gives the logits of every exit

    def all_logits(self, x):
        return self(x)

    def extract(self, k):  # see the function `extract`
        if not isinstance(k, int):
            raise ValueError(f"an exit of MSDNet must be a whole number, got {k}")
        traced = fx.symbolic_trace(MSDExit(self.blocks[:k], self.heads[k - 1]))
        traced.graph.eliminate_dead_code()  # lazy evaluation
        traced.delete_all_unused_submodules()
        traced.recompile()
        return copy.deepcopy(traced).eval()


# ==== Sub-models in use: extraction, early exit ===============================

def extract(model, which):
    """A sub-model as an nn.Module in eval mode with its own copy of the weights: (N, 3, H, W) -> logits (N, C). An exit
    of MSDNet evaluates lazily (Huang et al., ICLR 2018): it computes no finer scales that nothing reads any more.
    which: k = 1 (smallest) ... K, or a (calibrated) width of a slimmable network as a float. ValueError for others."""
    if not isinstance(which, Integral):
        return model.extract(float(which))
    if not 1 <= which <= len(model.names()):
        raise ValueError(f"k must be a whole number from 1 to {len(model.names())}, got {which}")
    return model.extract(int(which))


def fold_bn(model):
    """Merge each BatchNorm of an extracted sub-model, or of an MSDNet, into the convolution before it, in place.
    Returns the model. ValueError in training mode and where there is none, as in a folded or a slimmable network."""
    pairs = [m._modules for m in model.modules() if [*map(type, m.children())][:2] == [nn.Conv2d, nn.BatchNorm2d]]
    if model.training or not pairs:
        raise ValueError(f"need BatchNorms and eval mode: found {len(pairs)}, training {model.training}")
    for parts in pairs:
        parts["0"], parts["1"] = fuse_conv_bn_eval(parts["0"], parts["1"]), nn.Identity()
    return model


@torch.no_grad()
def early_exit(model, images, thresholds):
    """Classify images by an MSDNet, each at the first exit whose largest softmax output reaches its threshold, at the
    latest at the last exit; only the others enter the next block (Huang et al., ICLR 2018, section 4.2).
    model: MSDNet in eval mode. images: floating-point (N, 3, H, W), normalised. thresholds: K numbers.
    Returns predictions (N,) int64, and exits (N,) int64: the exit that each image took, 1 ... K."""
    thresholds = [float(t) for t in thresholds]
    if model.training or len(thresholds) != len(model.heads) or any(map(math.isnan, thresholds)):
        raise ValueError(f"need eval mode, {len(model.heads)} thresholds; got training {model.training}, {thresholds}")
    predictions, exits = torch.zeros(2, len(images), dtype=torch.int64, device=images.device)
    x, left = images, torch.arange(len(images), device=images.device)  # left: the images of the rows of x
    for k, (block, head, threshold) in enumerate(zip(model.blocks, model.heads, thresholds), start=1):
        x = block(x)
        confidence, prediction = head(x[-1]).softmax(dim=1).max(dim=1)
        done = (confidence >= threshold) | (k == len(thresholds))
        predictions[left[done]], exits[left[done]] = prediction[done], k
        if done.all():
            break
        left, x = left[~done], [m[~done] for m in x]
    return predictions, exits


def exit_thresholds(confidence, shares):
    """Thresholds for early_exit by which given shares of the images leave at each exit (Huang et al., ICLR 2018).
    confidence: (K, N), largest softmax output of each exit on N held-out images; shares: K numbers that sum to 1.
    Returns K floats, 2 where no image leaves, the last one 0. Equal confidences leave together."""
    shares = [float(share) for share in shares]
    if len(shares) != len(confidence) or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be {len(confidence)} numbers from 0 to 1 with the sum 1, got {shares}")
    thresholds, gone = [], torch.zeros(confidence.shape[1], dtype=torch.bool, device=confidence.device)
    for exit_confidence, share in zip(confidence[:-1], shares):
        wanted = min(round(share * len(gone)), int((~gone).sum()))
        surest = exit_confidence.masked_fill(gone, -1).topk(wanted).values
        thresholds.append(surest[-1].item() if wanted else 2.0)
        gone |= exit_confidence >= thresholds[-1]
    return [*thresholds, 0.0]


# ==== Data: every split is a pair of tensors on the training device ===========

CIFAR_STATISTICS = {"cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
                    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}  # mean, std of R, G, B
LITTER = {"thumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "#recycle", "$recycle.bin", "ehthumbs.db"}
SHAPES = {  # number of lobes, direction of the first one in degrees
    "disc": (0, 0), "lying egg": (2, 0), "standing egg": (2, 90), "trefoil": (3, -90), "hanging trefoil": (3, 90),
    "plus": (4, 0), "cross": (4, 45), "star": (5, -90), "hanging star": (5, 90), "flower": (8, 0)}


class InputError(Exception):
    """Something that the user gave is wrong: reported as one line, exit status 2."""


def say(text, stream="stdout"):
    """Print at once. A stream that is absent, closed, of another encoding or without a reader does not end the run."""
    file = getattr(sys, stream)
    try:
        encoding = getattr(file, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), file=file or io.StringIO(), flush=True)
    except (OSError, ValueError):
        setattr(sys, stream, None)


def one_line(error):
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"[:400]


@contextmanager
def blaming(what, *kinds):
    """Turn errors of these kinds into an InputError that says what was given."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what} ({one_line(error)})") from error


@dataclass
class Data:
    """Splits "train", "test" and "val" (held out from training) as images (N, 3, H, W) uint8 and labels (N,) int64;
    mean and std (3,) of pixels scaled to [0, 1]."""
    splits: dict
    classes: list
    mean: torch.Tensor = None
    std: torch.Tensor = None
    memory_format: torch.memory_format = torch.channels_last

    def to(self, device, memory_format):
        splits = {name: (images.to(device), labels.to(device)) for name, (images, labels) in self.splits.items()}
        return Data(splits, self.classes, self.mean.to(device), self.std.to(device), memory_format)

    def normalise(self, images):
        """uint8 (N, 3, H, W) -> float32 of about zero mean and unit variance."""
        x = images.contiguous(memory_format=self.memory_format)
        return (x / 255 - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)


def augment(images, generator):
    """CIFAR augmentation of (N, 3, H, W): zero-pad by an eighth, crop and flip at random, drawn by a CPU generator."""
    n, _, height, width = images.shape
    pad = height // 8
    top, left, flip = (torch.randint(high, (n,), generator=generator).to(images.device, non_blocking=True)
                       for high in (2 * pad + 1, 2 * pad + 1, 2))
    windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # views: (N, 3, top, left, H, W)
    crops = windows[torch.arange(n, device=images.device), :, top, left]
    return torch.where(flip.bool().view(n, 1, 1, 1), crops.flip(3), crops)


def load_data(dataset, data_dir="data", train_size=0, val_size=0, splits=("train", "test"), image_size=32):
    """The Data of --dataset on the CPU. train_size training images are kept (0: all) and val_size others held out, the
    same for every seed; mean and std come with them. InputError when files are missing, unreadable or too few."""
    root = Path(data_dir).expanduser()
    if dataset == "shapes":
        data = Data({"train": draw_shapes((train_size or 1500) + val_size, 0), "test": draw_shapes(1000, 1)}, [*SHAPES])
    else:
        data = load_folder(root, splits, image_size) if dataset == "folder" else load_cifar(dataset, root, splits)
    if "train" not in splits:
        return data
    images, labels = data.splits["train"]
    n, wanted = len(images), (train_size or max(1, len(images) - val_size)) + val_size
    if wanted > n:
        raise InputError(f"{wanted} training images were asked for, --val-size {val_size} included: {dataset} has {n}")
    if wanted < n or val_size:
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        for name, part in ("train", drawn[:wanted - val_size]), ("val", drawn[n - val_size:]):
            if len(part):
                data.splits[name] = images[part], labels[part]
    if dataset in CIFAR_STATISTICS:
        mean, std = torch.tensor(CIFAR_STATISTICS[dataset])
    else:
        of_channels = (torch.std_mean(c.float() / 255, correction=0) for c in data.splits["train"][0].unbind(1))
        std, mean = (torch.stack(figures).clamp_min(1e-3) for figures in zip(*of_channels))
    return replace(data, mean=mean, std=std)


def load_cifar(name, root, splits):
    """CIFAR-10 or CIFAR-100 in its Python form, by torchvision, md5-checked; downloaded on first use."""
    cls = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    archive = root / cls.filename
    try:
        sets = [cls(root, train=split == "train") for split in splits]
    except RuntimeError:  # not unpacked, or damaged: unpack it apart, as others may do too
        sound = torchvision.datasets.utils.check_integrity(archive, cls.tgz_md5)
        state = "is sound" if sound else "is incomplete or damaged" if archive.exists() else "is not there"
        with blaming(f"{name}: '{archive}' {state}, downloading or unpacking failed: put it there from "
                     "https://www.cs.toronto.edu/~kriz/cifar.html", OSError, RuntimeError):
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as own:
                if sound:
                    Path(own, cls.filename).symlink_to(archive.resolve())
                sets = [cls(own, train=split == "train", download=True) for split in splits]
                with suppress(OSError):  # there is one already
                    os.replace(Path(own, cls.base_folder), root / cls.base_folder)
    return Data({split: (torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
                 for split, s in zip(splits, sets)}, sets[0].classes)


def load_folder(root, splits, size):
    """Images of any format and size that Pillow reads, as root/train/<class>/* and root/test/<class>/* (or val)."""
    files, classes = {}, None  # split -> [(path, label)]
    for split in splits:
        folder = root / ("val" if split == "test" and not (root / "test").is_dir() else split)
        if not folder.is_dir():
            raise InputError(f"--data-dir '{root}' has no folder '{split}': expected {root}/{split}/<class>/*")
        found = [(unicodedata.normalize("NFC", path.name), visible(path)) for path in visible(folder) if path.is_dir()]
        names = [name for name, _ in found]
        classes = classes or sorted(names)
        odd = {*names} ^ {*classes} | {name for name, paths in found if not paths or names.count(name) > 1}
        if odd or not names:
            raise InputError(f"'{folder}' must have the other split's classes, once each, with images: look at "
                             f"{', '.join(sorted(odd)) or 'its folders: there is none'}")
        files[split] = [(path, classes.index(name)) for name, paths in sorted(found) for path in paths]
    images = read_images([path for split in splits for path, _ in files[split]], size)
    return Data({split: (part, torch.tensor([label for _, label in files[split]]))
                 for split, part in zip(splits, images.split([len(files[split]) for split in splits]))}, classes)


def visible(folder):  # without what file managers leave
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in LITTER)


def read_images(paths, size):
    """(N, 3, size, size) uint8, read by all cores; InputError names the files that are no images."""
    pixels, bad, said = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), [], time.perf_counter()

    def read(i):
        try:
            pixels[i] = pil_to_tensor(read_image(paths[i], size))
        except Exception as error:  # Pillow's decoders raise many types
            return f"'{paths[i]}' ({one_line(error)})"

    say(f"reading {len(paths):,} images of {paths[0].parents[2]}")
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        for i, fault in enumerate(pool.map(read, range(len(paths))), start=1):
            bad += [fault] if fault else []
            if time.perf_counter() - said > 5:
                said = time.perf_counter()
                say(f"{i:,} images read")
    if bad:
        raise InputError(f"{len(bad)} files are no images, mend or remove them: {'; '.join(bad[:10])}")
    return pixels


def read_image(path, size=32):
    """The (first) image of a file as a viewer shows it on white, its centre as an RGB image of size x size."""
    if not path.is_file():  # a folder, a pipe, a link to nowhere or to itself
        raise ValueError("not a file")
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))  # of a large JPEG only what is needed is decoded
        colour = image.info.get("transparency")  # in these modes Pillow scales the pixels, but not it
        if colour is not None and image.format == "PNG" and image.tile[0][3] in ("L;2", "L;4", "I;16B", "RGB;16B"):
            raise ValueError("which of its colours is transparent cannot be told")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip at 255
            image = to_pil_image((pil_to_tensor(image.convert("I")) / 257).round().to(torch.uint8))
        elif image.mode[0] in "IF":
            raise ValueError(f"the range of pixels of mode {image.mode} is unknown")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.fit(image.convert("RGB"), (size, size))


def draw_shapes(n, seed, contrast=0.5, noise=0.2, depth=0.27):
    """n images (n, 3, 32, 32) uint8 of SHAPES of random size, place, tilt and colour, and their labels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(*size, generator=generator)

    labels = (torch.arange(n) % len(SHAPES))[torch.randperm(n, generator=generator)]
    lobes, direction = torch.tensor(list(SHAPES.values()))[labels].T[:, :, None, None]  # each (n, 1, 1)
    pixel = torch.arange(32) - 15.5
    x, y = pixel[None, :] - uniform(-2, 2, n, 1, 1), pixel[:, None] - uniform(-2, 2, n, 1, 1)  # (n, 32, 32)
    angle = torch.atan2(y, x) - direction.deg2rad() + uniform(-0.2, 0.2, n, 1, 1)
    edge = uniform(7, 11, n, 1, 1) * (1 + depth * torch.cos(lobes * angle))  # its radius there
    inside = torch.sigmoid(2 * (edge - torch.hypot(x, y)))[:, None]  # soft outline
    blotches = F.interpolate(uniform(-0.2, 0.2, n, 3, 5, 5), size=32, mode="bicubic")
    ground = uniform(0, 1 - contrast, n, 3, 1, 1)
    images = ground + contrast * inside + blotches + noise * torch.randn(n, 3, 32, 32, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# ==== Options: the fields of Config (kd_weight is --kd-weight) ================

# a family: class, CPU memory format, do all weights decay, are the sub-models exits, defaults, those on shapes
NETWORKS = {
    "msdnet": SimpleNamespace(
        cls=MSDNet, cpu_format=torch.contiguous_format, decay_all=True, exits=True,
        defaults=dict(kd_weight=0.9, temperature=2.0),
        shapes=dict(epochs=2, batch_size=32, schedule="cosine", kd_weight=0.5, temperature=1.0, exits=4, base=1, step=1,
                    step_mode="lin_grow", channels=8, growth=4)),
    "slimmable": SimpleNamespace(
        cls=SlimmableMobileNetV1, cpu_format=torch.channels_last, decay_all=False, exits=False,
        defaults=dict(epochs=200, schedule="cosine", lr=0.4),
        shapes=dict(epochs=10, batch_size=32, lr=0.1, eval_every=5, sandwich=3, widths=(0.125, 0.25, 0.375, 0.5))),
}
DISTILLED, FILES = {"method": ("ipkd", "ipkd-ta")}, {"dataset": ("cifar10", "cifar100", "folder")}
MSD, SLIM, FOLDER = {"arch": ("msdnet",)}, {"arch": ("slimmable",)}, {"dataset": ("folder",)}


def option(default, help, low=None, high=2**31 - 1, choices=None, only={}):
    """A field of Config. low, high: its range; only: {option: the values with which this one has an effect}."""
    return field(default=default, metadata=dict(help=help, range=(low, high), choices=choices, only=only))


@dataclass
class Config:
    """What a run is. InputError for a value of a wrong type or range."""
    arch: str = option("msdnet", "multi-exit MSDNet or slimmable MobileNet-V1", choices=tuple(NETWORKS))
    dataset: str = option("shapes", "shapes (own defaults), CIFAR, folder", choices=("shapes", *FILES["dataset"]))
    data_dir: str = option("data", "holds CIFAR, or train/<class>/*, test/<class>/* (or val)", only=FILES)
    image_size: int = option(32, "pixels: a folder's images are resized and cropped to a square", 8, 1024, only=FOLDER)
    train_size: int = option(0, "training images, chosen at random; 0: all, or 1500 shapes", 0)
    val_size: int = option(0, "training images held out, for thresholds of early exits and to choose options", 0)
    method: str = option("ipkd-ta", "teacher: none, the largest, the next larger", choices=("ce", *DISTILLED["method"]))
    kd_weight: float = option(0.5, "weight of the teacher against the labels", 0, 1, only=DISTILLED)
    kd_warmup: float = option(1.0, "share of training over which that weight rises from 0", 0, 1, only=DISTILLED)
    temperature: float = option(1.0, "softmax temperature of the distillation", 1e-3, 1e3, only=DISTILLED)
    epochs: int = option(300, "passes over the images", 1)
    batch_size: int = option(64, "images per step, of all processes together", 2)
    lr: float = option(0.1, "highest learning rate of SGD", 1e-9, 1e6)
    lr_warmup: float = option(0.3, "share of training over which the learning rate rises from 0", 0, 1)
    schedule: str = option("multistep", "multistep: x 0.1 at 1/2 and 3/4", choices=("multistep", "cosine", "linear"))
    weight_decay: float = option(1e-4, "of SGD; slimmable: only on full convolutions and the classifier", 0, 1e6)
    init: str = option("", "begin with the weights of this checkpoint.pt of the same network")
    eval_every: int = option(1, "epochs between evaluations; the last epoch is always evaluated", 1)
    seed: int = option(0, "of weights, order, augmentation and widths", 0, 2**63 - 1)
    device: str = option("auto", "auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, ...")
    amp: str = option("auto", "mixed precision; auto: on cuda only", choices=("auto", "off", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the network: faster steps after minutes of compiling", only=MSD)
    exits: int = option(7, "classifiers: the sub-models", 1, only=MSD)
    base: int = option(4, "layers before the first exit", 1, only=MSD)
    step: int = option(2, "layers between one exit and the next", 1, only=MSD)
    step_mode: str = option("even", "lin_grow: STEP * i + 1 in block i + 1", choices=("even", "lin_grow"), only=MSD)
    channels: int = option(16, "channels of the first layer at the finest scale", 1, only=MSD)
    growth: int = option(6, "channels that a layer adds at the finest scale", 1, only=MSD)
    gradient_equilibrium: bool = option(False, "blocks get the mean of the exits' gradients, not the sum", only=MSD)
    widths: tuple = option((0.25, 0.5, 0.75, 1.0), "width multipliers ascending in (0, 1]: the sub-models", only=SLIM)
    bn: str = option("universal", "BatchNorm: shared, or one a width", choices=("universal", "switchable"), only=SLIM)
    sandwich: int = option(4, "widths in a step: ends, others drawn", 2, only={**SLIM, "bn": ("universal",)})

    def __post_init__(self):
        for f in fields(self):
            value, (low, high), choices = getattr(self, f.name), f.metadata["range"], f.metadata["choices"]
            if (f.type, type(value)) in ((float, int), (tuple, list)):  # as JSON and callers write them
                setattr(self, f.name, value := f.type(value))
            wrong = type(value) is not f.type or choices and value not in choices
            if wrong or low is not None and not low <= value <= high:
                expected = choices or f.type.__name__ + (f" from {low} to {high}" if low is not None else "")
                raise InputError(f"{flag(f.name)} must be {expected}, got {value!r}")

    def has_effect(self, f):
        return all(getattr(self, other) in values for other, values in f.metadata["only"].items())

    @property
    def data_name(self):
        return Path(self.data_dir).expanduser().resolve().name if self.dataset == "folder" else self.dataset


def flag(name):
    return "--" + name.replace("_", "-")


def make_config(given, cfg=None):
    """Config of the options given over those of cfg or over the defaults; InputError for one that has no effect."""
    if cfg is None:
        network, on_shapes = NETWORKS[given.get("arch", Config.arch)], given.get("dataset", Config.dataset) == "shapes"
        cfg = Config(**{**network.defaults, **(network.shapes if on_shapes else {})})
    cfg = replace(cfg, **given)
    for f in fields(cfg):
        if f.name in given and not cfg.has_effect(f):
            needs = " and ".join(f"{flag(k)} {' or '.join(values)}" for k, values in f.metadata["only"].items())
            raise InputError(f"{flag(f.name)} has no effect here: it needs {needs}")
    return cfg


def build_model(cfg, num_classes):
    """The network that the options describe; InputError when they do not fit each other."""
    cls = NETWORKS[cfg.arch].cls
    own = [name for name in inspect.signature(cls).parameters if name != "num_classes"]
    with blaming(f"--arch {cfg.arch} with other options", ValueError, OverflowError):
        return cls(num_classes, **{name: getattr(cfg, name) for name in own})


# ==== Training ================================================================

def rank_and_world_size():
    """Number of this process, from 0, and of all that torchrun started to train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def train_step(model, images, labels, cfg, kd_weight, scaler, generator):
    """Add the gradients of the loss on one batch to the parameters'; returns the loss. One pass's activations are alive
    at a time: its logits meet those of the larger sub-models, which carry no gradient, so that each backward adds the
    part of its own sub-models, and the last loss is all of L."""
    dtype, larger = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.amp), []
    draw_widths = partial(sandwich_widths, cfg.sandwich, generator=generator)
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        for logits in model.training_passes(images, draw_widths):
            loss = ipkd_ta_loss(logits + larger, labels, cfg.method, kd_weight, cfg.temperature)
            scaler.scale(loss).backward()
            larger = [z.detach() for z in logits] + larger
    return loss.detach()


def merge_gradients(model, loss, share):
    """Replace the gradients and the loss by their mean over the batch of all processes, in one message."""
    parts = [*(p.grad for p in model.parameters() if p.grad is not None), loss]
    flat = torch.cat([part.flatten() for part in parts]) * share
    dist.all_reduce(flat)
    for part, merged in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(merged.view_as(part))


def train(cfg, model, data, out, checkpoint=None):
    """Train, from a checkpoint if given, and return the accuracies. Each epoch replaces two files in `out`."""
    rank, world_size = rank_and_world_size()
    device, (images, labels), accuracies = data.mean.device, data.splits["train"], None

    # some parameters do not decay; fused is faster, but leaves momentum unset when fp16's scaler skips the first step
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": cfg.weight_decay}]
    for p in model.parameters():
        groups[NETWORKS[cfg.arch].decay_all or p.ndim > 1 and p.shape[1] > 1]["params"].append(p)
    optimizer = torch.optim.SGD(groups, cfg.lr, momentum=0.9, nesterov=True, fused=cfg.amp != "fp16")

    # generators: of the order of images and the widths; of the augmentation
    rngs = order_rng, crop_rng = [torch.Generator().manual_seed(cfg.seed) for _ in range(2)]
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    first_epoch, metrics, mark = 0, [], 0

    # go on from the checkpoint, to the same bits as if the run had never stopped
    if checkpoint:
        for part, name in (model, "model"), (optimizer, "optimizer"), (scaler, "scaler"):
            part.load_state_dict(checkpoint[name])
        for rng, state in zip(rngs, checkpoint["rngs"]):
            rng.set_state(state)
        first_epoch, metrics = checkpoint["epoch"], checkpoint["metrics"]
        say(f"resuming after {first_epoch} epochs")

    # compile the training passes; a CUDA graph's gradients lie in its own memory, so none outlive a step
    if cfg.compile:
        say("compiling, which takes minutes")
        model.compile(mode="reduce-overhead" if device.type == "cuda" else "default")

    # whole batches only: a step on a few images would count like a full one; each epoch leaves out others
    steps = max(1, len(images) // cfg.batch_size)
    for epoch in range(first_epoch, cfg.epochs):
        model.train()
        start, total = time.perf_counter(), torch.zeros((), device=device)
        batches = torch.randperm(len(images), generator=order_rng).to(device).split(cfg.batch_size)
        for step, batch in enumerate(batches[:steps]):
            # learning rate and the teacher's weight follow from the progress, in mid-step
            progress = (epoch + (step + 0.5) / steps) / cfg.epochs
            factor = {"multistep": 0.1 ** ((progress >= 0.5) + (progress >= 0.75)), "linear": 1 - progress,
                      "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[cfg.schedule]
            lr = cfg.lr * factor * min(1, progress / (cfg.lr_warmup or progress))
            kd_weight = cfg.kd_weight * min(1, progress / (cfg.kd_warmup or progress))
            for group in optimizer.param_groups:
                group["lr"] = lr

            # every process draws for the whole batch, and computes its share of it
            x, y = augment(images[batch], crop_rng)[rank::world_size], labels[batch][rank::world_size]
            loss = train_step(model, data.normalise(x), y, cfg, kd_weight, scaler, order_rng)
            if world_size > 1:
                merge_gradients(model, loss, len(y) / len(batch))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += loss

            # how long it will take, by ten steps after five slow ones
            if epoch == first_epoch and step in (4, 14):
                total.item()  # waits for the device
                mark, before = time.perf_counter(), mark
                if step == 14:
                    took = (mark - before) / 600 * steps  # minutes
                    say(f"an epoch takes {took:.1f} minutes, {took * (cfg.epochs - epoch):.1f} in all, + evaluation")

        # the mean loss: only here the device is waited for
        loss, speed = total.item() / steps, steps * len(batch) / (time.perf_counter() - start)
        record = {"epoch": epoch + 1, "lr": lr, "kd_weight": kd_weight, "loss": loss}
        line = f"epoch {epoch + 1}/{cfg.epochs}  lr {lr:.4f}  loss {loss:.4f}  {speed:.0f} images/s"

        # the accuracy of every sub-model; of several processes' BatchNorm statistics, the first one's count
        if (epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs:
            for buffer in model.buffers() if world_size > 1 else ():
                dist.broadcast(buffer, 0)
            model.calibrate(calibration_batches(data))
            accuracies, names = evaluate(model, data), model.names()
            record["top1"] = top1 = [accuracy["top1"] for accuracy in accuracies]
            line += f"  top-1 {names[0]} {top1[0]:.2f} %, {names[-1]} {top1[-1]:.2f} %"

        # what diverged is not kept
        numbers = torch.tensor([loss, *(accuracy["loss"] for accuracy in accuracies or ())])
        if not all(t.isfinite().all() for t in (numbers, *model.parameters(), *model.buffers())):
            raise InputError(f"diverged in epoch {epoch + 1}, mean loss {loss:.4g}: try a lower --lr than {cfg.lr:g}")

        # what it takes to go on
        metrics.append(record)
        content = io.BytesIO()
        torch.save({"config": vars(cfg), "classes": data.classes, "mean": data.mean.cpu(), "std": data.std.cpu(),
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "rngs": [rng.get_state() for rng in rngs], "epoch": epoch + 1, "metrics": metrics}, content)
        write_file(out / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in metrics).encode())
        write_file(out / "checkpoint.pt", content.getvalue())
        say(line)
    return accuracies or evaluate(model, data)


# ==== Evaluation, budgets, benchmark ==========================================

def calibration_batches(data, images=2048, batch_size=256):
    """Training images for `calibrate`, the same at every call, augmented as in training."""
    train, generator = data.splits["train"][0], torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(train), generator=generator)[:images].to(train.device)
    return (data.normalise(augment(train[batch], generator)) for batch in chosen.split(batch_size))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def predict(model, data, split, rank=0, world_size=1, batch_size=250):
    """Logits (K, N, C) of every sub-model, smallest first, and labels (N,), on a split or a process's part of it."""
    model.eval()
    images, labels = (t[rank::world_size] for t in data.splits[split])
    logits = [torch.stack(model.all_logits(data.normalise(x))) for x in images.split(batch_size)]
    return torch.cat(logits, dim=1), labels


def evaluate(model, data, split="test"):
    """Of every sub-model on a split, smallest first: {"top1", "top5" in percent, "loss": mean cross-entropy}."""
    logits, labels = predict(model, data, split, *rank_and_world_size())
    hits = logits.topk(min(5, logits.shape[2])).indices == labels[:, None]  # (K, N, 5)
    losses = -logits.log_softmax(2)[:, torch.arange(len(labels)), labels]  # (K, N)
    totals = torch.stack([hits[:, :, 0].sum(1), hits.any(2).sum(1), losses.sum(1)])
    if dist.is_initialized():
        dist.all_reduce(totals)
    n = len(data.splits[split][1])
    return [{"top1": 100 * one / n, "top5": 100 * five / n, "loss": loss / n} for one, five, loss in totals.T.tolist()]


def budgeted(model, data, image_size=32):
    """Budgeted classification (Huang et al., ICLR 2018, section 4.2): early exit of the test images by thresholds for
    which exit k answers a share of the validation images in proportion to q^k. List of {"q", "macs" (average, with all
    heads passed), "top1" in percent, "thresholds", "exits" (the shares that left there)}."""
    confidence = {}  # of a split: (K, N)
    for split in ("val", "test"):
        logits, labels = (t.cpu() for t in predict(model, data, split))
        confidence[split], answers = logits.softmax(2).max(2)
    correct = (answers == labels).double()
    costs, budgets = torch.tensor([sub.early_exit_macs for sub in model.sub_models(image_size)]), []
    for q in (i / 10 for i in range(1, 21)):
        shares = q ** torch.arange(1, len(costs) + 1, dtype=torch.float64)
        thresholds = exit_thresholds(confidence["val"], shares / shares.sum())
        exits = (confidence["test"] >= torch.tensor(thresholds)[:, None]).int().argmax(dim=0)  # (N,), the first
        budgets.append({"q": q, "macs": costs[exits].double().mean().item(),
                        "top1": 100 * correct.gather(0, exits[None]).mean().item(), "thresholds": thresholds,
                        "exits": (exits.bincount(minlength=len(costs)) / len(exits)).tolist()})
    return budgets


@torch.no_grad()
def clock(model, x, repeats):
    """Milliseconds of each forward pass on x, after some to warm up, in ascending order."""
    marks = []
    for _ in range(repeats + 6):
        model(x).sum().item()  # waits for the device
        marks.append(time.perf_counter())
    return sorted(1000 * (end - start) for start, end in itertools.pairwise(marks[5:]))


def benchmark(args, given, steps=20, classes=10):
    """Print what sub-models cost (timed when extracted and folded), and training, on random images."""
    if "eval" in args:
        cfg, model, content = load_checkpoint(args["eval"])
        cfg, classes = make_config(given, replace(cfg, device="auto", amp="auto")), len(content["classes"])
        if given.keys() & {"arch", *inspect.signature(type(model)).parameters}:
            raise InputError("--benchmark --eval takes the options of the network from the checkpoint")
    else:
        cfg, content = make_config({"dataset": "folder", **given}), {"metrics": [{}]}
        model = build_model(cfg, classes)
    cfg, top1 = replace(cfg, epochs=2, eval_every=2), content["metrics"][-1].get("top1")
    (device, memory_format), size, half = pick_device(cfg), cfg.image_size, torch.full((3,), 0.5)
    images = torch.randint(256, (max(64, steps * cfg.batch_size), 3, size, size), dtype=torch.uint8)
    labels = torch.arange(len(images)) % classes
    data = Data({"train": (images, labels), "test": (images[:64], labels[:64])}, [*range(classes)], half, half)
    data, model = data.to(device, memory_format), model.to(device, memory_format=memory_format)
    x = data.normalise(data.splits["test"][0])
    model.calibrate([x])
    rows = [("sub-model", "MMACs", "params", "ms, 1 image", "90th percentile", "images/s by 64", "top-1 %")]
    for k, sub in enumerate(model.eval().sub_models(size), start=1):
        shipped = fold_bn(extract(model, k))
        one, many = clock(shipped, x[:1], 100), clock(shipped, x, 10)
        rows.append((sub.name, sub.macs / 1e6, sub.params, median(one), one[90],
                     f"{64_000 / median(many):.0f}", top1[k - 1] if top1 else ""))
    say(f"random images of {size}x{size}, device {device}, {torch.get_num_threads()} threads")
    print_table(*rows)
    say("training on random labels, to time it")
    with tempfile.TemporaryDirectory() as out:
        train(cfg, model, data, Path(out))
    import resource  # not on every system
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    say(f"peak memory {(used or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20:.0f} MiB")


# ==== Tables and picture ======================================================

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, of 2 to 10 values


def print_table(*rows):
    """Rows of texts and numbers, the first column aligned to the left, the others to the right."""
    rows = [[c if isinstance(c, str) else f"{c:,}" if isinstance(c, int) else f"{c:.2f}" for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))


def load_runs(directories):
    """{setting: {method: {seed: results}}}, named by options that are not the default, but not by those of speed."""
    settings = {}
    for path in sorted({path.resolve() for d in directories for path in d.rglob("results.json")}):
        with blaming(f"'{path}' is not the results.json of a run", Exception):  # JSON may hold anything
            run = json.loads(path.read_text(encoding="utf-8"))
            cfg, budgets = config_of(run["config"]), path.with_name("budget.json")
            default = make_config({"arch": cfg.arch, "dataset": cfg.dataset})
            run["top1"], run["mmacs"] = zip(*((sub["top1"] / 1, sub["macs"] / 1e6) for sub in run["sub_models"]))
            run["budgets"] = json.loads(budgets.read_text())["budgets"] if budgets.exists() else []
        setting = [f"{cfg.arch} on {run.get('dataset', cfg.dataset)}: {cfg.train_size:,} images, {cfg.epochs} epochs"]
        method = [cfg.method]
        for f in fields(cfg):
            if cfg.has_effect(f) and getattr(cfg, f.name) != getattr(default, f.name) and f.name not in (
                    "data_dir", "train_size", "epochs", "method", "seed", "device", "amp", "compile", "eval_every"):
                (method if f.metadata["only"] == DISTILLED else setting).append(f"{f.name} {getattr(cfg, f.name)}")
        runs = settings.setdefault(", ".join(setting), {}).setdefault(", ".join(method), {})
        first = runs.setdefault(cfg.seed, {**run, "path": path})["path"]
        if first != path:
            say(f"'{path}' is left out: the same setting, method and seed as '{first}'", "stderr")
    if not settings:
        raise InputError(f"--report: no results.json of a run below {', '.join(map(str, directories))}")
    return {setting: dict(sorted(by_method.items())) for setting, by_method in sorted(settings.items())}


def report(args, given):
    """Print Markdown: top-1 accuracies, mean ± standard deviation over the seeds; differences, paired by seed."""
    settings = load_runs(args["report"])
    for setting, by_method in settings.items():
        first, means = next(iter(next(iter(by_method.values())).values())), {}
        rows = [["top-1 %", *(sub["name"] for sub in first["sub_models"]), "mean"],
                ["---", *["---:"] * (len(first["top1"]) + 1)], ["MMACs", *(f"{m:.2f}" for m in first["mmacs"]), ""]]
        for method, runs in by_method.items():
            means[method] = {seed: mean(run["top1"]) for seed, run in runs.items()}
            columns = [*zip(*(run["top1"] for run in runs.values())), list(means[method].values())]
            rows.append([f"{method} ({len(runs)})", *(
                f"{mean(v):.2f}" + (f" ± {stdev(v):.2f}" if len(v) > 1 else "") for v in columns)])
        say("\n".join([f"### {setting}\n", *(f"| {' | '.join(row)} |" for row in rows), ""]))
        for b, a in itertools.combinations(means, 2):  # ipkd - ce, ipkd-ta - ce, ipkd-ta - ipkd
            pairs = [means[a][seed] - means[b][seed] for seed in means[a] if seed in means[b]]
            if pairs:
                n, gain, text = len(pairs), mean(pairs), ""
                if n > 1:
                    half = T95[min(n, 10) - 2] * stdev(pairs) / n**0.5
                    text = f", 95 % interval {gain - half:+.2f} to {gain + half:+.2f}"
                say(f"{a} - {b}, mean of the sub-models: {gain:+.2f}{text} (pairs of one seed: {n})\n")
    if "plot" in args:
        plot(settings, args["plot"])


def plot(settings, path):
    """Top-1 accuracy against MACs: a panel for each setting, a line for each method, thin lines by early exit."""
    from matplotlib.figure import Figure  # ImportError: one line that names the package
    styles = {"ce": ("#000000", ":"), "ipkd": ("#E69F00", "--"), "ipkd-ta": ("#0072B2", "-")}  # Okabe & Ito
    columns = min(3, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * rows + 0.4), layout="constrained", dpi=150, facecolor="white")
    panels, handles, markers = figure.subplots(rows, columns, squeeze=False).flat, {}, {}
    for (setting, by_method), axes in zip(settings.items(), panels):
        for method, runs in by_method.items():
            top1, (color, style) = [*zip(*(run["top1"] for run in runs.values()))], styles[method.split(",")[0]]
            marker = markers.setdefault(method, "os^DvP*X"[len(markers) % 8])
            handles[method] = axes.errorbar(
                next(iter(runs.values()))["mmacs"], [*map(mean, top1)], [*map(stdev, top1)] if len(runs) > 1 else None,
                color=color, fmt=marker + style, markersize=5, capsize=2)
            budgets = [*zip(*(run["budgets"] for run in runs.values() if run["budgets"]))]  # of one q: of every seed
            if budgets:
                points = [[mean(b[key] / unit for b in seeds) for seeds in budgets]
                          for key, unit in (("macs", 1e6), ("top1", 1))]
                handles[f"{method}, early exit"], = axes.plot(*points, color=color, linewidth=0.8)
        axes.set_title("\n".join(textwrap.wrap(setting, 60)), fontsize=9)
        axes.set(xlabel="million MACs for one image", ylabel="top-1 %, bars: std over the runs")
        axes.grid(alpha=0.3)
    for axes in panels:  # those left over
        axes.remove()
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    picture = io.BytesIO()
    with blaming(f"--plot '{path}' has an unknown suffix", ValueError):
        figure.savefig(picture, format=path.suffix[1:])
    write_file(path, picture.getvalue())


# ==== Runs and command line: files, checkpoints, export =======================

PLACE = {"data_dir", "device"}  # where a run happens: may change on the way


def write_file(path, content):
    """Put these bytes in place in one step: there is never half a file. Of several processes the first does."""
    if rank_and_world_size()[0]:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of this process: another may write too
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def config_of(saved):
    """Config of a saved dict, or of the run in a directory; an option that it does not know has its default."""
    where = f" in '{saved}'" if isinstance(saved, Path) else ""
    with blaming(f"no run of this program{where}", OSError, ValueError, LookupError, TypeError):
        saved = json.loads((saved / "config.json").read_text(encoding="utf-8")) if isinstance(saved, Path) else saved
        default = make_config({name: saved[name] for name in ("arch", "dataset", "method")})
        return replace(default, **{f.name: saved[f.name] for f in fields(Config) if f.name in saved})


def load_checkpoint(path):
    """A checkpoint.pt as (Config, model in eval mode, whole content), on the CPU. Code in it is refused, not run."""
    with blaming(f"cannot read checkpoint '{path}'", Exception):  # torch raises many types
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() or any(p.external_attr for p in archive.infolist()):  # torch.load sees neither
                raise ValueError("damaged or changed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        cfg = config_of(checkpoint["config"])
        model = build_model(cfg, len(checkpoint["classes"]))
        model.load_state_dict(checkpoint["model"])
        checkpoint["mean"].view(3), checkpoint["std"].view(3)  # an error if these are something else
    return cfg, model.eval(), checkpoint


def pick_device(cfg):
    """torch.device of --device, tried out, and the memory format for it. Replaces "auto" in the options."""
    with blaming(f"--device {cfg.device} cannot be used here", Exception):
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
        if device.type == "cuda" and dist.is_initialized():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.ones(1, device=device).item()
    cuda, cfg.device = device.type == "cuda", str(device)
    if cuda:  # TF32 in matrix products as in convolutions; no tuning for the shapes of drawn widths
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = NETWORKS[cfg.arch].exits
    if cfg.amp == "auto":
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.amp = "bf16" if native else "fp16" if cuda else "off"
    return device, NETWORKS[cfg.arch].cpu_format if device.type == "cpu" else torch.channels_last


def load_images(cfg, checkpoint=None, splits=("train", "test")):
    """The Data that the options name, on their device; InputError if a checkpoint's run had others."""
    device, memory_format = pick_device(cfg)
    data = load_data(cfg.dataset, cfg.data_dir, cfg.train_size, cfg.val_size, splits, cfg.image_size)
    if checkpoint:
        same = data.mean is None or torch.allclose(data.mean, checkpoint["mean"], rtol=1e-6)
        if not same or data.classes != checkpoint["classes"]:
            raise InputError(f"the images are not those of the run: --data-dir '{cfg.data_dir}' has others, or classes")
        data.mean, data.std = checkpoint["mean"], checkpoint["std"]
    return data.to(device, memory_format)


def claim(cfg, out, overwrite):
    """The directory of a new run: `out`, or the first free name. Only one process can create config.json."""
    files = ("config.json", "metrics.jsonl", "checkpoint.pt", "results.json", "budget.json")
    for n in itertools.count(1):
        place = out or Path(f"runs/{cfg.arch}-{cfg.data_name}-{cfg.method}-seed{cfg.seed}" + f"-{n}" * (n > 1))
        held = [file for file in files if (place / file).exists()]
        if held and overwrite:
            config_of(place)  # InputError if it is not of this program
            for file in held:
                (place / file).unlink()
        elif held and out:
            raise InputError(f"--out '{out}' already holds {', '.join(held)}: choose another, --resume or --overwrite")
        place.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(place / "config.json", "xb") as file:
            file.write(json.dumps(vars(cfg), indent=2).encode())
            return place


def run_training(args, given):
    """Train, print and write all that a run consists of. The name of its directory is left in `args`."""
    out = args.get("out")
    if {"resume", "overwrite"} & args.keys() and not out:
        raise InputError("--resume and --overwrite need --out")
    new = "resume" not in args or (given.keys() - PLACE and not (out / "config.json").exists())
    cfg, checkpoint, (rank, world_size) = make_config(given) if new else config_of(out), None, rank_and_world_size()

    # a run that goes on keeps its options; it has no checkpoint if it ended in its first epoch
    if not new:
        other = [f"{flag(k)} {getattr(cfg, k)}, not {v}" for k, v in sorted(given.items())
                 if k not in PLACE and getattr(cfg, k) != v and (k, v) not in (("amp", "auto"), ("train_size", 0))]
        if other:
            raise InputError(f"--resume: the run in '{out}' has {'; '.join(other)}: its options stay as they are")
        cfg = replace(cfg, **{k: given[k] for k in PLACE & given.keys()})
        checkpoint = load_checkpoint(out / "checkpoint.pt")[2] if (out / "checkpoint.pt").exists() else None
        if checkpoint and checkpoint["epoch"] == cfg.epochs and (out / "results.json").exists():
            return say(f"the run in '{out}' is finished")
    elif out and not rank and (out / "config.json").exists() and "overwrite" not in args:  # before images are read
        raise InputError(f"--out '{out}' already holds a run: choose another, --resume or --overwrite")

    start = time.perf_counter()
    data = load_images(cfg, checkpoint)
    cfg.train_size = len(data.splits["train"][1])
    if min(cfg.batch_size, cfg.train_size) < 2 * world_size:
        raise InputError(f"--batch-size and the training images must be at least {2 * world_size}, 2 for each process")

    # the network, with weights of its own or of another run, whose classifiers serve the same classes
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, len(data.classes))
    if cfg.init and not checkpoint:
        _, other, content = load_checkpoint(Path(cfg.init).expanduser())
        heads = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        own = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in heads}
        with blaming(f"--init '{cfg.init}' is of another network", RuntimeError):
            model.load_state_dict({**other.state_dict(), **(own if content["classes"] != data.classes else {})})
    model.to(data.mean.device, memory_format=data.memory_format)

    # a directory that no other run has
    if new and not rank:
        args["out"] = claim(cfg, out, "overwrite" in args)
    out = args.get("out", Path())

    say(f"{cfg.arch}, {len(model.names())} sub-models, {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{cfg.data_name}: {cfg.train_size:,} training and {len(data.splits['test'][1]):,} test images of "
        f"{len(data.classes)} classes, loaded in {time.perf_counter() - start:.1f} s")
    say(", ".join(f"{f.name} {getattr(cfg, f.name)}" for f in fields(cfg)
                  if cfg.has_effect(f) and getattr(cfg, f.name) != "") + f"\nwriting to {out}")
    accuracies = train(cfg, model, data, out, checkpoint)
    finish(cfg, model, data, accuracies, out, seconds=round(time.perf_counter() - start, 1), processes=world_size)


def finish(cfg, model, data, accuracies, out=None, **more):
    """Print what came out, and write it into `out` if given: results.json, budget.json of exits with validation."""
    subs = [{**vars(sub), **accuracy} for sub, accuracy in zip(model.sub_models(cfg.image_size), accuracies)]
    print_table(("sub-model", "MMACs", "params", "top-1 %", "top-5 %", "loss"), *(
        (s["name"], s["macs"] / 1e6, s["params"], s["top1"], s["top5"], f"{s['loss']:.4f}") for s in subs))
    versions = {"ipkd_ta": __version__, "sha256": SHA256, "torch": torch.__version__}
    results = {"config": vars(cfg), "dataset": cfg.data_name, "sub_models": subs, "versions": versions, **more}
    if out and "val" in data.splits:
        results["validation"] = evaluate(model, data, "val")
    if "val" in data.splits and NETWORKS[cfg.arch].exits:
        budgets = budgeted(model, data, cfg.image_size)
        say(f"\nearly exit, thresholds from {cfg.val_size:,} validation images:")
        print_table(("q", "MMACs", "top-1 %", "thresholds"), *(
            (b["q"], b["macs"] / 1e6, b["top1"], " ".join(f"{t:.3f}" for t in b["thresholds"])) for b in budgets))
        if out:
            write_file(out / "budget.json", json.dumps({"budgets": budgets}, indent=2).encode())
    if out:
        write_file(out / "results.json", json.dumps(results, indent=2).encode())


def run_evaluation(args, given):
    """The table of a checkpoint, of a universal slimmable network at any --widths. Reads only the images it uses."""
    cfg, model, checkpoint = load_checkpoint(args["eval"])
    cfg = make_config(given, replace(cfg, device="auto"))
    budgets = cfg.val_size and NETWORKS[cfg.arch].exits
    measure = not NETWORKS[cfg.arch].exits and ("widths" in given or "top1" not in checkpoint["metrics"][-1])
    data = load_images(cfg, checkpoint, ("train", "test") if measure or budgets else ("test",))
    model.to(data.mean.device, memory_format=data.memory_format)
    if measure:  # a run does it only in epochs with evaluation
        model.widths = cfg.widths
        with blaming("--widths", ValueError):
            model.calibrate(calibration_batches(data))
    say(f"evaluating {len(data.splits['test'][1]):,} test images of {cfg.data_name}")
    finish(cfg, model, data, evaluate(model, data))


class Exported(nn.Sequential):  # its argument has the name that exported programs give it
    def forward(self, images):
        return super().forward(images)


def run_export(args, given):
    """Write a sub-model of a checkpoint as a program of torch.export, or ONNX when the name ends with .onnx."""
    if "eval" not in args:
        raise InputError("--export needs --eval, a checkpoint.pt")
    path, (cfg, model, checkpoint) = args["export"], load_checkpoint(args["eval"])
    if path.exists():
        raise InputError(f"--export: '{path}' exists: choose another name")
    cfg, names = make_config(given, replace(cfg, device="cpu")), model.names()
    name = args.get("sub_model", names[-1])
    with blaming(f"--sub-model {name}: there are {', '.join(names)}", ValueError):
        which = names.index(name) + 1 if name in names else float(name.removeprefix("width-"))
        if not NETWORKS[cfg.arch].exits and (name not in names or "top1" not in checkpoint["metrics"][-1]):
            data = load_images(cfg, checkpoint, ("train",))
            model.calibrate(calibration_batches(data), None if name in names else [which])
        program = Exported(extract(model, which)).eval().to(memory_format=torch.contiguous_format)
    if "fold_bn" in args:
        fold_bn(program)
    about = {"sub_model": name, "classes": checkpoint["classes"], "mean": checkpoint["mean"].tolist(),
             "std": checkpoint["std"].tolist(), "image_size": cfg.image_size,
             "images": "float32 (batch, 3, image_size, image_size): (pixel / 255 - mean) / std"}
    example, batch = torch.randn(2, 3, cfg.image_size, cfg.image_size), {"images": {0: torch.export.Dim("batch")}}
    exported, content = torch.export.export(program, (example,), strict=False, dynamic_shapes=batch), io.BytesIO()
    if path.suffix.lower() == ".onnx":
        exported = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=["images"],
                                     output_names=["logits"], dynamic_shapes={"images": {0: "batch"}})
        exported.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
        content.write(exported.model_proto.SerializeToString())
    else:
        torch.export.save(exported, content, extra_files={"about.json": json.dumps(about)})
    write_file(path, content.getvalue())
    say(f"{name}: {path.stat().st_size:,} bytes in {path}")


OPTIONS = {f.name: f.type for f in fields(Config)}
ACTIONS = {  # the options that are none of Config's: type and help
    "out": (Path, "directory of the run (default: runs/ARCH-...)"),
    "overwrite": (bool, "replace the run in --out"),
    "resume": (bool, "go on with the run in --out, or begin it (with its options)"),
    "eval": (Path, "the table of a checkpoint.pt"),
    "export": (Path, "with --eval: write a sub-model as a program of torch.export, or ONNX (.onnx)"),
    "sub_model": (str, "with --export: exit-3, width-0.5, ... (default: the largest)"),
    "fold_bn": (bool, "with --export: merge BatchNorm into convolutions"),
    "benchmark": (bool, "time every sub-model (of --eval) and training"),
    "report": (list, "print the results below these directories"),
    "plot": (Path, "with --report: draw accuracy against MACs, by matplotlib")}
MODES = {  # what does the work, and the options that it takes; the first that is given counts
    "report": (report, {"plot"}),
    "export": (run_export, {"eval", "sub_model", "fold_bn", "data_dir"}),
    "benchmark": (benchmark, {"eval", *OPTIONS} - {"dataset", "data_dir", "train_size", "val_size", "epochs",
                                                   "eval_every", "init"}),
    "eval": (run_evaluation, {"data_dir", "device", "widths"}),
    "resume": (run_training, {"out", *OPTIONS}),
    "train": (run_training, {"out", "overwrite", *OPTIONS})}


def parse(argv):
    """The mode, what the command line gives, and the part of it that is Config's."""

    def error(message):  # one line instead of the usage
        raise InputError(f"{message} (see --help)")

    parser = argparse.ArgumentParser("ipkd_ta.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     description=__doc__.splitlines()[0])
    parser.error = error
    kinds = {bool: {"action": "store_true"}, tuple: {"nargs": "+", "type": float}, list: {"nargs": "+", "type": Path}}
    for f in fields(Config):
        own = [f"{arch} {network.defaults[f.name]}" for arch, network in NETWORKS.items() if f.name in network.defaults]
        text = f"{f.metadata['help']} (default: {'; '.join([str(f.default) or 'none', *own])})"
        choices = f.metadata["choices"]
        parser.add_argument(flag(f.name), help=text, **kinds.get(f.type, {
            "type": f.type, "choices": choices, "metavar": None if choices else "X"}))
    for name, (kind, text) in ACTIONS.items():
        parser.add_argument(flag(name), help=text, **kinds.get(kind, {"type": kind, "metavar": "NAME"}))
    args = {k: v.expanduser() if isinstance(v, Path) else v for k, v in vars(parser.parse_args(argv)).items()}
    mode = next((mode for mode in MODES if mode in args), "train")
    for name in sorted(args.keys() - MODES[mode][1] - {mode}):
        raise InputError(f"{flag(name)} has no effect {'in training' if mode == 'train' else f'with --{mode}'}")
    return mode, args, {k: OPTIONS[k](v) for k, v in args.items() if k in OPTIONS}


def main(argv=None):
    """Returns the exit status: 0 = finished; 2 = bad input or too little memory; 130 = stopped by Ctrl-C."""
    args = {}
    try:
        mode, args, given = parse(argv)

        # speed on a CPU: keep kernels of all widths and freed memory (M_MMAP_MAX, M_TRIM_THRESHOLD)
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)

        # torchrun's processes all train, the first does all else
        if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            if mode in ("train", "resume"):
                dist.init_process_group()
            elif int(os.environ["RANK"]):
                return 0
            sys.stdout = None if int(os.environ["RANK"]) else sys.stdout
        MODES[mode][0](args, given)
        if dist.is_initialized():
            dist.destroy_process_group()

    # one line for what the user can mend, a traceback for a fault of the program
    except (InputError, OSError, ImportError, MemoryError, RuntimeError) as error:
        words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
        memory = isinstance(error, MemoryError) or any(word in str(error) for word in words)
        if isinstance(error, RuntimeError) and not memory:
            raise
        advice = "not enough memory, lower --batch-size, --image-size or --train-size: " if memory else ""
        say(f"ipkd_ta.py: error: {advice}{one_line(error)}", "stderr")
        return 2
    except KeyboardInterrupt:
        say("stopped" + f"; go on: add --resume (no --overwrite) --out {args.get('out')}" * ("out" in args), "stderr")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
