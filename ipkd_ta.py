"""IPKD-TA: inplace knowledge distillation with teacher assistant, for flexible neural networks.

A flexible network holds many sub-models in one set of weights: the exits of an MSDNet, the widths
of a slimmable MobileNet-V1. All are trained at once, and each sub-model teaches the next smaller
one, a cascade of teacher assistants:

    A. Ozerov and N. Q. K. Duong, "Inplace knowledge distillation with teacher assistant for
    improved training of flexible deep neural networks", EUSIPCO 2021, arXiv:2105.08369.

    python ipkd_ta.py                                   # a demonstration on drawn shapes
    python ipkd_ta.py --arch msdnet --dataset cifar100  # one of the benchmarks, downloads 170 MB

Measured on two cores of an AMD EPYC, PyTorch 2.14: the demonstration takes 18 to 23 s, the first
exit reaches 91.3 %, the last 98.1 %.
To reuse the loss or a network, copy its room, from banner to banner, and the imports.
"""
import argparse
import copy
import inspect
import io
import itertools
import json
import math
import os
import sys
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import torch
import torchvision
from PIL import Image
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

__version__ = "3.0"


# ==== The method: the algorithm in one screen ===================================================

METHODS = ("ce", "ipkd", "ipkd-ta")
NO_LABEL = -2**63  # for ignore_index: its default, -100, would skip labels that are wrong


def ipkd_ta_loss(logits, target, method="ipkd-ta", kd_weight=0.5, temperature=1.0):
    """Loss of all sub-models of a flexible network; the cascade is that of arXiv:2105.08369.

        L = CE(z_K, y) + sum over k < K of [ (1 - kd_weight) CE(z_k, y)
                               + kd_weight temperature^2 KL( stop_gradient(p_t(k)) || p_k ) ]

    where p_k = softmax(z_k / temperature), and the method chooses the teacher t(k) of sub-model k:

        "ce"       none: every sub-model learns from the labels only, as if kd_weight were 0
        "ipkd"     K: the largest teaches all others (Yu & Huang, ICCV 2019; Li et al., ICCV 2019)
        "ipkd-ta"  k + 1: each sub-model is the teacher assistant of the next smaller one

    logits: list of K tensors (N, C), smallest sub-model first; -inf in all of them masks a class.
    target: class indices (N,), int64. kd_weight: from 0 to 1; or a tensor of shape (), whose range
    is not checked, so that nothing waits for a GPU. temperature: from 0.001 to 1000.
    Returns a scalar, summed over sub-models and classes and averaged over the batch, computed in
    float32 or better. Teachers are detached: no gradient reaches them by their students.
    ValueError for another shape, method, kd_weight or temperature. IndexError for a target that is
    no class (on a GPU a failed assertion, later).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not torch.is_tensor(kd_weight) and not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight must be from 0 to 1, got {kd_weight}")
    if not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"temperature must be from 0.001 to 1000, got {temperature}")
    logits = list(logits)
    shapes = [tuple(z.shape) for z in logits]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"logits must be a list of tensors of one shape (N, C), got {shapes}")
    if target.shape != shapes[0][:1]:
        raise ValueError(f"target must have shape ({shapes[0][0]},), got {tuple(target.shape)}")

    # one tensor (K, N, C); half precision would lose small probabilities
    logits = torch.stack(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels_only = [F.cross_entropy(z, target, ignore_index=NO_LABEL) for z in logits]

    # the largest sub-model learns from the labels only
    loss = labels_only[-1]
    if method == "ce":
        return sum(labels_only[:-1], start=loss)

    # the logarithm of a masked class is kept finite, because 0 times infinity is nan
    log_p = F.log_softmax(logits / temperature, dim=2).clamp_min(-1e30).unbind()

    # the others also learn from their teacher
    for k in range(len(log_p) - 1):
        teacher = log_p[-1] if method == "ipkd" else log_p[k + 1]
        kl = F.kl_div(log_p[k], teacher.detach(), reduction="batchmean", log_target=True)
        loss = loss + (1 - kd_weight) * labels_only[k] + kd_weight * temperature**2 * kl
    return loss


def sandwich_widths(n, low, high, generator=None):
    """Widths to train in one step by the sandwich rule (Yu & Huang, ICCV 2019).

    Returns a descending list: `high`, n - 2 widths drawn uniformly from [low, high] by a
    torch.Generator of the CPU, and `low`. ValueError unless n >= 2 and 0 < low < high.
    """
    if not isinstance(n, Integral) or n < 2 or not 0 < low < high < math.inf:
        raise ValueError(f"need an integer n >= 2 and 0 < low < high, got {n}, {low}, {high}")
    drawn = low + (high - low) * torch.rand(int(n) - 2, generator=generator, dtype=torch.float64)
    return [float(high), *sorted(drawn.tolist(), reverse=True), float(low)]


# ==== Slimmable MobileNet-V1: the sub-models are widths =========================================

class SlimmableMobileNetV1(nn.Module):
    """MobileNet-V1 (Howard et al., 2017), for 32x32 images, with the width as an argument.

    At width w every layer computes with the first c * w of its c channels, rounded to a multiple
    of 8. Functions on slices of the weights do so: do not rely on hooks of the layers.

    num_classes: C, the number of logits at every width.
    widths: the sub-models, as width multipliers ascending in (0, 1]. The weights are as wide as
        the last one needs.
    bn: "universal" (Yu & Huang, ICCV 2019): all widths share gamma and beta. In eval mode any
        width from widths[0] to widths[-1] may be asked for, after `calibrate`.
        "switchable" (Yu et al., ICLR 2019): a BatchNorm for each of `widths`, and no other width.
    ValueError for other arguments, and later for a width that is not offered.
    """

    # Channels of the first layer, then depthwise-separable blocks: (output channels, stride).
    STEM = 32
    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1),
              (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, num_classes=100, widths=(0.25, 0.5, 0.75, 1.0), bn="universal"):
        super().__init__()
        widths = tuple(round(float(width), 7) for width in widths)  # so that 0.1 + 0.2 is 0.3
        ascending = all(a < b for a, b in itertools.pairwise((0, *widths)))
        if not widths or not ascending or not widths[-1] <= 1:
            raise ValueError(f"widths must ascend within (0, 1], got {widths}")
        if bn not in ("universal", "switchable"):
            raise ValueError(f"bn must be 'universal' or 'switchable', got {bn!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.widths = widths
        self.bn = bn

        # 27 convolutions as wide as the largest width needs, and the classifier
        channels = self.channels(widths[-1])
        self.convs = nn.ModuleList([nn.Conv2d(3, channels[0], 3, padding=1, bias=False)])
        for i, (_, stride) in enumerate(self.BLOCKS):
            c_in, c_out = channels[2 * i], channels[2 * i + 2]
            self.convs.append(nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False))
            self.convs.append(nn.Conv2d(c_in, c_out, 1, bias=False))
        self.classifier = nn.Linear(channels[-1], int(num_classes))

        # initialised as in Yu's code, slimmable_networks: N(0, sqrt(2 / (k k C_out)))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

        # switchable: BatchNorms for each width. universal: one for all widths
        if bn == "switchable":
            norms = [nn.ModuleList(map(nn.BatchNorm2d, self.channels(w))) for w in widths]
        else:
            norms = [nn.BatchNorm2d(c, track_running_stats=False) for c in channels]
        self.norms = nn.ModuleList(norms)
        self.forget()

    def channels(self, width):
        """Output channels of the 27 convolutions: the multiple of 8 nearest to c * width, but at
        least 8 and at least 90 % of c * width."""
        base = [self.STEM]
        for c_out, _ in self.BLOCKS:
            base += [base[-1], c_out]
        channels = []
        for c in base:
            nearest = max(8, int(c * width / 8 + 0.5) * 8)
            channels.append(nearest if nearest >= 0.9 * c * width else nearest + 8)
        return channels

    def key(self, width):
        """Name of the buffer of this width's statistics; a name must not have a dot."""
        return str(round(float(width) * 10**7))

    def fill(self, width, value):
        """Give a width a new buffer (2, channels of all layers): its means and its variances."""
        both = self.classifier.weight.new_full((2, sum(self.channels(width))), value)
        self.statistics.register_buffer(self.key(width), both)

    def forget(self):
        """Universal: drop what was calibrated. Each of `widths` keeps a buffer, so that a state
        dict always has its name. Variances far below 0 mark it as not measured, and so they do in
        an average with measured ones."""
        self.statistics = nn.Module()
        if self.bn == "universal":
            for width in self.widths:
                self.fill(width, -1e4)

    def layers(self, width, measured=False):
        """What the 27 layers compute with at this width, as views of the network's tensors.

        A list of (conv, weight, gamma, beta, mean, variance). Universal: the last two are None, or
        if `measured` those that were calibrated; ValueError where there are none.
        """
        width = round(float(width), 7)
        low, high = self.widths[0], self.widths[-1]
        if not low <= width <= high:
            raise ValueError(f"width {width} is outside of the trained range, {low} to {high}")
        channels = self.channels(width)

        # a switchable BatchNorm has its own statistics; a universal one has None, or what was
        # calibrated
        norms = self.norms
        if self.bn == "switchable":
            if width not in self.widths:
                raise ValueError(f"width {width} has no BatchNorm of its own: {self.widths} have")
            norms = self.norms[self.widths.index(width)]
        means = [norm.running_mean for norm in norms]
        variances = [norm.running_var for norm in norms]
        if measured and self.bn == "universal":
            both = getattr(self.statistics, self.key(width), None)
            if both is None or both[1].min() < 0:
                raise ValueError(f"width {width} has no statistics: "
                                 f"call calibrate(batches, [{width}])")
            means, variances = (row.split(channels) for row in both)

        layers = []
        c_in = 3
        for conv, norm, c, mean, variance in zip(self.convs, norms, channels, means, variances):
            weight = conv.weight[:c, :c_in]  # (depthwise weights have one input channel)
            layers.append((conv, weight, norm.weight[:c], norm.bias[:c], mean, variance))
            c_in = c
        return layers

    def forward(self, x, width=None):
        """x: (N, 3, H, W). Returns logits (N, num_classes) of the sub-model of this width (default:
        the largest). For a list of widths: a list of logits, smallest width first.

        In training it also takes a tensor of channel counts: see `run_masked`.
        """
        if torch.is_tensor(width):
            return self.run_masked(x, width)
        if isinstance(width, (list, tuple)):
            return [self(x, w) for w in sorted(width)]
        width = self.widths[-1] if width is None else width
        layers = self.layers(width, measured=not self.training)
        return self.run(x, layers, self.training)

    def run(self, x, layers, training, momentum=0.1):
        """Logits of one width, given its `layers`. In training BatchNorm uses the batch, and
        updates mean and variance where they are not None."""
        for conv, weight, gamma, beta, mean, variance in layers:
            groups = len(weight) if conv.groups > 1 else 1
            x = F.conv2d(x, weight, None, conv.stride, conv.padding, groups=groups)
            x = F.batch_norm(x, mean, variance, gamma, beta, training, momentum)
            x = F.relu6(x, inplace=True)
        x = x.mean(dim=(2, 3))  # (N, channels of the last layer)
        return F.linear(x, self.classifier.weight[:, :x.shape[1]], self.classifier.bias)

    def run_masked(self, x, channels):
        """Logits at n widths in one pass, for training: a list of (N, num_classes).

        No shape depends on the widths, because slices of new sizes would make cuDNN plan its
        kernels at every step. channels: (n, 27), of every layer at each width. Activations are
        (N, n * C, H, W) with all C channels of a layer for every width. Gamma and beta are 0
        beyond the width's own, so those channels are 0 after BatchNorm and ReLU6, and no gradient
        comes back from them.
        """
        n = len(channels)
        channels = channels.to(x.device, non_blocking=True)
        for layer, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            c = conv.out_channels
            own = torch.arange(c, device=x.device) < channels[:, layer, None]  # (n, C)
            gamma = (norm.weight * own).flatten()
            beta = (norm.bias * own).flatten()

            # the first layer is computed once; movedim keeps x in channels-last order
            if layer == 0:
                x = conv(x).movedim(1, 3).repeat(1, 1, 1, n).movedim(3, 1)
            elif conv.groups > 1:
                weight = conv.weight.repeat(n, 1, 1, 1)
                x = F.conv2d(x, weight, None, conv.stride, conv.padding, groups=n * c)
            else:
                x = x.movedim(1, 3).unflatten(3, (n, -1))  # (N, H, W, n, C)
                x = F.linear(x, conv.weight.flatten(1)).flatten(3).movedim(3, 1)
            x = F.relu6(F.batch_norm(x, None, None, gamma, beta, training=True), inplace=True)
        x = x.mean(dim=(2, 3)).unflatten(1, (n, -1))  # (N, n, C)
        return list(self.classifier(x).unbind(1))

    def step_widths(self, draw):
        """The widths of one training step, as `forward` takes them, smallest first. Switchable:
        all. Universal: those of draw(low, high); on a GPU their channels, a tensor (n, 27)."""
        if self.bn == "switchable" or len(self.widths) == 1:
            return self.widths
        widths = sorted(draw(self.widths[0], self.widths[-1]))
        if self.classifier.weight.is_cuda:
            return torch.tensor([self.channels(width) for width in widths])
        return widths

    def parameter_groups(self):
        """For the optimizer: no weight decay on BatchNorm, biases and depthwise weights, as in
        slimmable_networks."""
        decay = [p for p in self.parameters() if p.ndim > 1 and p.shape[1] > 1]
        no_decay = [p for p in self.parameters() if p.ndim == 1 or p.shape[1] == 1]
        return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay}]

    def train(self, mode=True):
        """As for any module. Universal: training forgets what was calibrated, because the weights
        will change."""
        if mode:
            self.forget()
        return super().train(mode)

    @torch.no_grad()
    def calibrate(self, batches, widths=None):
        """Measure the BatchNorm statistics of `widths`, for eval mode after training.

        batches: iterable of images (N, 3, H, W), or of tuples that begin with them, shuffled,
        normalised and augmented as in training, best of 64 images or more. A batch counts by its
        number of images. ValueError where there is none.
        """
        asked = self.widths if widths is None else widths
        widths = {round(float(width), 7) for width in asked}
        for width in widths:
            self.layers(width)  # ValueError before anything changes

        # the mean over the images seen; a failure leaves a universal network without statistics,
        # and a switchable one with those of the batches so far
        seen = 0
        try:
            if self.bn == "universal":
                for width in widths:
                    self.fill(width, 0.0)
            layers_of_widths = [self.layers(width, measured=True) for width in widths]
            for batch in batches:
                x = batch if torch.is_tensor(batch) else batch[0]
                x = x.to(self.classifier.weight)
                seen += len(x)
                for layers in layers_of_widths:
                    self.run(x, layers, training=True, momentum=len(x) / seen)
            if seen == 0:
                raise ValueError("calibrate needs images, there was no batch")
        except BaseException:
            self.forget()
            raise

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """As for any module; first a buffer is made for each width that the state dict has."""
        self.statistics = nn.Module()
        for name, both in state_dict.items():
            if name.startswith(f"{prefix}statistics."):
                buffer = self.classifier.weight.new_empty(both.shape)
                self.statistics.register_buffer(name.rpartition(".")[2], buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sub_models(self, image_size=32, widths=None):
        """Those of `widths`, each with its name, macs (multiply-accumulates for one square image)
        and params (with BatchNorm's gamma and beta)."""
        classes = self.classifier.out_features
        subs = []
        for width in sorted(widths or self.widths):
            macs = params = 0
            size = image_size
            for conv, weight, gamma, *_ in self.layers(width):
                size = math.ceil(size / conv.stride[0])
                macs += weight.numel() * size**2
                params += weight.numel() + 2 * len(gamma)
            macs += len(gamma) * classes
            params += (len(gamma) + 1) * classes
            subs.append(SimpleNamespace(name=f"width-{width:g}", macs=macs, params=params))
        return subs

    def extract(self, which):
        """See the function `extract`. which: k = 1 ... K as an int, or a width as a float."""
        width = which
        if isinstance(which, Integral):
            if not 1 <= which <= len(self.widths):
                raise ValueError(f"k must be from 1 to {len(self.widths)}, got {which}")
            width = self.widths[which - 1]

        # 27 blocks of their own, whose tensors are copies
        names = ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
        blocks = []
        c_in = 3
        for conv, *tensors in self.layers(width, measured=True):
            c_out = len(tensors[0])
            groups = c_out if conv.groups > 1 else 1
            block = Conv2dNormActivation(c_in, c_out, conv.kernel_size, conv.stride, groups=groups,
                                         activation_layer=nn.ReLU6).to(tensors[0])
            block.load_state_dict(dict(zip(names, tensors)), strict=False)
            blocks.append(block)
            c_in = c_out

        classifier = nn.Linear(c_in, self.classifier.out_features).to(self.classifier.weight)
        classifier.load_state_dict({"weight": self.classifier.weight[:, :c_in],
                                    "bias": self.classifier.bias})
        whole = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
        return whole.to(memory_format=torch.channels_last).eval()


# ==== MSDNet: the sub-models are exits ==========================================================

class MSDStem(nn.Module):
    """Image (N, 3, H, W) -> a map for each scale, finest first, each from the one before it.

    channels: of the finest scale of all. A scale with factor f (of 1, 2, 4) has f times as many,
    here and below.
    """

    def __init__(self, channels, factors):
        super().__init__()
        self.convs = nn.ModuleList()
        c_in = 3
        for scale, factor in enumerate(factors):
            stride = 1 if scale == 0 else 2
            self.convs.append(Conv2dNormActivation(c_in, channels * factor, 3, stride))
            c_in = channels * factor

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return maps


class MSDLayer(nn.Module):
    """Maps -> their coarsest `n_out` scales, each with new channels appended.

    Half of a scale's new channels come from the next finer scale, if there is one.
    """

    def __init__(self, channels, growth, factors, n_out):
        super().__init__()
        self.first = len(factors) - n_out  # the finest scale that leaves this layer
        self.paths = nn.ModuleList()
        for scale in range(self.first, len(factors)):
            sources = factors[max(scale - 1, 0): scale + 1]
            c_out = growth * factors[scale] // len(sources)
            paths = nn.ModuleList()
            for factor in sources:  # a bottleneck, and a convolution to the size of this scale
                c_mid = min(channels, c_out) * factor
                stride = 1 if factor == factors[scale] else 2
                paths.append(nn.Sequential(
                    Conv2dNormActivation(channels * factor, c_mid, 1),
                    Conv2dNormActivation(c_mid, c_out, 3, stride)))
            self.paths.append(paths)

    def forward(self, maps):
        out = []
        for scale, paths in enumerate(self.paths, start=self.first):
            sources = maps[max(scale - 1, 0): scale + 1]
            new = [path(x) for path, x in zip(paths, sources)]
            out.append(torch.cat([maps[scale], *new], dim=1))
        return out


class MSDTransition(nn.Module):
    """Halve the channels of every scale by 1x1 convolutions."""

    def __init__(self, channels, factors):
        super().__init__()
        self.convs = nn.ModuleList()
        for factor in factors:
            self.convs.append(Conv2dNormActivation(channels * factor, channels // 2 * factor, 1))

    def forward(self, maps):
        return [conv(x) for conv, x in zip(self.convs, maps)]


class MSDExit(nn.Module):
    """One exit and no other: image (N, 3, H, W) -> logits (N, C)."""

    def __init__(self, blocks, head):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = head

    def forward(self, x):
        return self.head(self.blocks(x)[-1])


class MSDNet(nn.Module):
    """Multi-scale dense network with early exits (Huang et al., ICLR 2018), for 32x32 images.

    Feature maps are lists of tensors, one for each scale, finest first: of 32x32, 16x16 and 8x8
    pixels, with n, 2n and 4n channels. Every layer appends growth * (1, 2, 4) channels. After the
    first and the second third of the layers the finest scale is dropped, and the channels of the
    others are halved. Exit k classifies the coarsest scale after block k.

    num_classes: C, the number of logits of every exit.
    exits: K, the number of blocks and of classifiers.
    base: layers in the first block.
    step, step_mode: layers in each later block: `step` ("even"), or step * i + 1 in block i + 1
        ("lin_grow").
    channels, growth: at the finest scale, the channels of the first layer and those that every
        layer appends.
    gradient_equilibrium: block k receives the mean, not the sum, of the gradients that the exits
        from k on send back (Li et al., ICCV 2019).
    ValueError for other arguments.
    """

    # Channels of a scale relative to the finest one, and how much wider its bottlenecks are.
    FACTORS = (1, 2, 4)
    widths = None  # every family has this; exits have no width

    def __init__(self, num_classes=100, exits=7, base=4, step=2, step_mode="even", channels=16,
                 growth=6, gradient_equilibrium=False):
        super().__init__()
        sizes = (num_classes, exits, base, step, channels, growth)
        if not all(isinstance(size, Integral) and size > 0 for size in sizes):
            raise ValueError(f"num_classes, exits, base, step, channels, growth must be positive "
                             f"integers, got {sizes}")
        if step_mode not in ("even", "lin_grow"):
            raise ValueError(f"step_mode must be 'even' or 'lin_grow', got {step_mode!r}")
        num_classes, exits, base, step, channels, growth = map(int, sizes)
        self.gradient_equilibrium = gradient_equilibrium

        # how many layers each block has, and after how many the finest scale is dropped
        depths = [base]
        for i in range(1, exits):
            depths.append(step if step_mode == "even" else step * i + 1)
        interval = math.ceil(sum(depths) / len(self.FACTORS))

        self.blocks = nn.ModuleList()
        self.heads = nn.ModuleList()
        factors = self.FACTORS
        layer = 0
        for k, depth in enumerate(depths):
            block = [MSDStem(channels, factors)] if k == 0 else []
            for _ in range(depth):
                n_out = len(self.FACTORS) - layer // interval
                block.append(MSDLayer(channels, growth, factors, n_out))
                channels += growth
                layer += 1
                if n_out < len(factors):
                    factors = factors[-n_out:]
                    block.append(MSDTransition(channels, factors))
                    channels //= 2
            self.blocks.append(nn.Sequential(*block))
            self.heads.append(nn.Sequential(  # at 32x32 pixels 8x8 -> 4x4 -> 2x2 -> 1x1
                Conv2dNormActivation(channels * factors[-1], 128, 3, stride=2),
                Conv2dNormActivation(128, 128, 3, stride=2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(128, num_classes)))

    def forward(self, x, widths=None):
        """x: (N, 3, H, W) -> list of K logits (N, num_classes), exit 1 first. It has no widths."""
        logits = []
        for k, (block, head) in enumerate(zip(self.blocks, self.heads)):
            x = block(x)  # maps, finest scale first
            read = x[-1]
            if self.gradient_equilibrium and self.training:
                # the head sends its share of the mean, all later blocks the rest; the numbers stay
                share = 1 / (len(self.heads) - k)
                read = torch.lerp(read.detach(), read, share)
                x = [torch.lerp(m.detach(), m, 1 - share) for m in x]
            logits.append(head(read))
        return logits

    def step_widths(self, draw):
        """None: one forward pass gives the logits of all exits."""
        return None

    def parameter_groups(self):
        """For the optimizer: weight decay on all."""
        return [{"params": list(self.parameters())}]

    def calibrate(self, batches, widths=None):
        """Nothing to do: BatchNorm statistics are tracked in training. (For slimmable networks.)"""

    def sub_models(self, image_size=32, widths=None):
        """The exits, each with its name, params (with BatchNorm's) and macs (multiply-accumulates
        for one square image) of the blocks up to it and its own head. `extract` also leaves out
        what the exit does not read: at exit 1 of the default network 11 % of its macs.

        early_exit_macs: with all heads on the way, as `early_exit` computes them.
        """
        with FlopCounterMode(display=False) as counter:  # on meta tensors: shapes only
            image = torch.empty(1, 3, image_size, image_size, device="meta")
            copy.deepcopy(self).to("meta").eval()(image)
        flops = counter.get_flop_counts()

        subs = []
        blocks = heads = 0
        name = type(self).__name__
        for k in range(len(self.heads)):
            head = sum(flops[f"{name}.heads.{k}"].values()) // 2
            blocks += sum(flops[f"{name}.blocks.{k}"].values()) // 2
            heads += head
            alone = MSDExit(self.blocks[:k + 1], self.heads[k])
            params = sum(p.numel() for p in alone.parameters())
            subs.append(SimpleNamespace(name=f"exit-{k + 1}", macs=blocks + head, params=params,
                                        early_exit_macs=blocks + heads))
        return subs

    def extract(self, which):
        """See the function `extract`. which: exit 1 ... K as an int."""
        if not isinstance(which, Integral) or not 1 <= which <= len(self.heads):
            raise ValueError(f"an exit is an integer from 1 to {len(self.heads)}, got {which}")
        traced = fx.symbolic_trace(MSDExit(self.blocks[:which], self.heads[which - 1]))
        traced.graph.eliminate_dead_code()  # lazy evaluation: what the logits do not need goes
        traced.delete_all_unused_submodules()
        traced.recompile()
        return copy.deepcopy(traced).eval()


# ==== Sub-models in use: extraction, folding, early exit ========================================

def extract(model, which):
    """A sub-model as an nn.Module of its own, in eval mode: (N, 3, H, W) -> logits (N, C).

    which: k = 1 (smallest) ... K, or a calibrated width of a slimmable network as a float.
    An exit of MSDNet evaluates lazily (Huang et al., ICLR 2018): finer scales that nothing reads
    any more are not computed. ValueError for another k or width.
    """
    return model.extract(which)


def fold_bn(model):
    """Merge each BatchNorm of an extracted sub-model, or of an MSDNet, into the convolution before
    it, in place. Returns the model. ValueError in training mode and where there is no BatchNorm.
    """
    if model.training:
        raise ValueError("fold_bn needs eval mode: training changes the statistics")

    # a Conv2dNormActivation, or what fx makes of it, has its parts under the names 0, 1 and 2
    folded = 0
    for module in model.modules():
        parts = dict(module.named_children())
        conv, norm = parts.get("0"), parts.get("1")
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, "0", fuse_conv_bn_eval(conv, norm))
            setattr(module, "1", nn.Identity())
            folded += 1
    if not folded:
        raise ValueError("there is no BatchNorm to fold: extract a sub-model, and fold it once")
    return model


@torch.no_grad()
def early_exit(model, images, thresholds):
    """Classify each image at the first exit whose largest softmax output reaches its threshold,
    at the latest at the last exit (Huang et al., ICLR 2018).

    model: MSDNet in eval mode. images: (N, 3, H, W), normalised. thresholds: K numbers.
    Returns predictions (N,) and the exits 1 ... K that the images took (N,), both int64. Only
    images that did not leave enter the next block. ValueError in training mode and for other K.
    """
    if model.training or len(thresholds) != len(model.heads):
        raise ValueError(f"early_exit needs eval mode and {len(model.heads)} thresholds, "
                         f"got training={model.training} and {thresholds}")
    predictions = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    exits = torch.zeros_like(predictions)
    left = torch.arange(len(images), device=images.device)  # which images the rows of x are
    x = images
    stages = zip(model.blocks, model.heads, [*thresholds[:-1], 0.0])
    for k, (block, head, threshold) in enumerate(stages, start=1):
        x = block(x)
        confidence, prediction = head(x[-1]).softmax(dim=1).max(dim=1)
        done = confidence >= threshold
        predictions[left[done]] = prediction[done]
        exits[left[done]] = k
        if done.all():
            break
        left = left[~done]
        x = [m[~done] for m in x]
    return predictions, exits


def exit_thresholds(confidence, shares):
    """Thresholds by which given shares of the images leave at each exit (Huang et al., ICLR 2018).

    confidence: (K, N), largest softmax output of each exit on N held-out images. shares: K numbers
    from 0 to 1 with the sum 1. Returns K floats: 2 where no image leaves, and 0 at the last exit.
    Equal confidences leave together. ValueError for other shares.
    """
    shares = [float(share) for share in shares]
    valid = all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) < 1e-6
    if not valid or len(shares) != len(confidence):
        raise ValueError(f"need {len(confidence)} shares of the sum 1, got {shares}")
    thresholds = []
    gone = torch.zeros_like(confidence[0], dtype=torch.bool)
    for of_exit, share in zip(confidence[:-1], shares):
        wanted = min(round(share * len(gone)), int((~gone).sum()))
        surest = of_exit.masked_fill(gone, -1).topk(wanted).values
        thresholds.append(surest[-1].item() if wanted else 2.0)
        gone |= of_exit >= thresholds[-1]
    return [*thresholds, 0.0]


# ==== Data: every split is a pair of tensors on the training device =============================

CIFAR_STATISTICS = {  # mean and standard deviation of red, green and blue
    "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
SHAPES = {  # number of lobes, and the direction of the first one in degrees
    "disc": (0, 0), "lying egg": (2, 0), "standing egg": (2, 90), "trefoil": (3, -90),
    "hanging trefoil": (3, 90), "plus": (4, 0), "cross": (4, 45), "star": (5, -90),
    "hanging star": (5, 90), "flower": (8, 0),
}
IMAGE_SUFFIXES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif")
UPRIGHT = {  # what undoes an orientation of the EXIF standard, by Pillow's names
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}


class InputError(Exception):
    """Something that the user gave is wrong: reported as one line, exit status 2."""


@dataclass
class Data:
    """All images of a training.

    splits: {"train", "test", and "val" if held out: (images (N, 3, H, W) uint8, labels (N,) int64)}
    mean, std: (3,), of pixels scaled to [0, 1].
    memory_format: of normalised images.
    eval_batch: images that evaluation takes at a time.
    """
    splits: dict
    classes: list
    mean: torch.Tensor
    std: torch.Tensor
    memory_format: torch.memory_format = torch.channels_last
    eval_batch: int = 256

    def normalise(self, images):
        """uint8 (N, 3, H, W) -> float32 of about zero mean and unit variance."""
        x = images.contiguous(memory_format=self.memory_format)
        return (x / 255 - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)


def augment(images, generator, flip=True):
    """CIFAR augmentation of (N, 3, H, W) uint8: zero-pad by an eighth, crop and flip at random.

    generator: of the CPU, so that every device trains on the same images. Without flips it draws
    the same numbers.
    """
    n, _, height, width = images.shape
    pad = height // 8

    def draw(high):
        return torch.randint(high, (n,), generator=generator).to(images.device, non_blocking=True)

    top = draw(2 * pad + 1)
    left = draw(2 * pad + 1)
    flipped = draw(2).bool().view(n, 1, 1, 1)
    padded = F.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # views: (N, 3, top, left, H, W)
    crops = windows[torch.arange(n, device=images.device), :, top, left]  # one of each image
    return torch.where(flipped, crops.flip(3), crops) if flip else crops


def draw_shapes(n, seed):
    """Images (n, 3, 32, 32) uint8 of SHAPES of random size, place, tilt and colour, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(*size, generator=generator)

    labels = torch.arange(n) % len(SHAPES)
    labels = labels[torch.randperm(n, generator=generator)]
    of_shapes = torch.tensor(list(SHAPES.values()))  # (10, 2)
    lobes, direction = of_shapes[labels].T.view(2, n, 1, 1)

    # the outline: its radius at the angle of each pixel, (n, 32, 32)
    pixel = torch.arange(32) - 15.5
    x = pixel[None, :] - uniform(-2, 2, n, 1, 1)
    y = pixel[:, None] - uniform(-2, 2, n, 1, 1)
    angle = torch.atan2(y, x) - direction.deg2rad() + uniform(-0.2, 0.2, n, 1, 1)
    radius = uniform(7, 11, n, 1, 1) * (1 + 0.27 * torch.cos(lobes * angle))
    inside = torch.sigmoid(2 * (radius - torch.hypot(x, y)))[:, None]

    # its colours, on a ground with blotches and noise
    blotches = F.interpolate(uniform(-0.2, 0.2, n, 3, 5, 5), size=32, mode="bicubic")
    images = uniform(0, 0.5, n, 3, 1, 1) + 0.5 * inside + blotches
    images += 0.2 * torch.randn(n, 3, 32, 32, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def load_cifar(name, root):
    """Splits and classes of CIFAR-10 or CIFAR-100 by torchvision, checked by md5; downloaded on
    first use. InputError where that fails."""
    cls = getattr(torchvision.datasets, name.upper())
    splits = {}
    for split in ("train", "test"):
        try:
            dataset = cls(root, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"no {name} in --data-dir '{root}', and downloading failed ({error}): put "
                f"{cls.filename} of https://www.cs.toronto.edu/~kriz/cifar.html there") from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        splits[split] = images, torch.tensor(dataset.targets)
    return splits, dataset.classes


def exif_orientation(exif):
    """Entry 0x0112 of an EXIF block, from 1 to 8, however damaged its other entries are; 0 if
    there is none. (Pillow stops at the first damaged one.)"""
    exif = exif.removeprefix(b"Exif\0\0")  # a TIFF header, and a directory of 12 bytes an entry
    order = "little" if exif.startswith(b"II") else "big"

    def number(start, size):
        return int.from_bytes(exif[start:start + size], order)

    directory = number(4, 4)
    for i in range(number(directory, 2)):
        entry = directory + 2 + 12 * i
        if number(entry, 2) == 0x0112:
            size = 4 if number(entry + 2, 2) == 4 else 2  # type 4 is a long, 3 the usual short
            return number(entry + 8, size)
    return 0


def open_image(path):
    """The (first) image of a file as a viewer shows it, upright and on white, as a PIL image in
    RGB. ValueError for what is no file (a pipe would never end) and for the modes I and F, whose
    values Pillow would clip; and whatever Pillow raises."""
    if not os.path.isfile(path):
        raise ValueError("not a file")
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode} has more than 8 bits, which Pillow would clip")
        image.load()
        orientation = exif_orientation(image.info.get("exif", b""))
        if orientation in UPRIGHT:
            image = image.transpose(Image.Transpose[UPRIGHT[orientation]])
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def square(size):
    """A transform of a PIL image to (3, size, size) uint8: its shorter side is brought to `size`,
    and of the longer one the centre is kept."""
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])


def read_images(dataset, size):
    """Images (N, 3, size, size) uint8 of a DatasetFolder, and what is wrong with those files that
    cannot be read."""
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)

    def read(i):
        try:
            images[i] = dataset[i][0]
        except Exception as error:  # Pillow's decoders raise many types
            return f"'{dataset.samples[i][0]}' ({error})"

    # by threads: decoding an image lets the others run
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        faults = [fault for fault in pool.map(read, range(len(dataset))) if fault]
    return images, faults


def load_folder(root, size):
    """Splits and classes of root/train/<class>/* and root/test/<class>/* (or val). InputError
    where a folder or a class is missing, or files cannot be read."""
    test_folder = "test" if (root / "test").is_dir() else "val"
    datasets = []
    for folder in root / "train", root / test_folder:
        try:
            dataset = torchvision.datasets.DatasetFolder(
                folder, open_image, IMAGE_SUFFIXES, transform=square(size))
        except OSError as error:
            raise InputError(f"--data-dir '{root}' must hold train/<class>/* and test/<class>/* "
                             f"(or val): {error}") from error
        files = sum(len(names) for _, _, names in os.walk(folder, followlinks=True))
        print(f"'{folder}': reading {len(dataset):,} images, {files - len(dataset):,} other files "
              f"are left out by their suffix", flush=True)
        datasets.append(dataset)

    # the same labels in both
    train, test = datasets
    differ = sorted(set(train.classes) ^ set(test.classes))
    if differ:
        raise InputError(f"'{root}' must have the same classes in train and {test_folder}: "
                         f"{', '.join(differ)} in only one of them")

    # all files that cannot be read are named at once
    splits = {}
    faults = []
    for split, dataset in ("train", train), ("test", test):
        images, unreadable = read_images(dataset, size)
        splits[split] = images, torch.tensor(dataset.targets)
        faults += unreadable
    if faults:
        raise InputError(f"{len(faults)} of the images cannot be read, mend or remove them: "
                         f"{'; '.join(faults[:10])}")
    return splits, train.classes


def hold_out(splits, train_size, val_size, name):
    """Keep train_size images (0: all that are left) in splits["train"] and hold val_size others
    out as splits["val"], drawn at random, the same for every seed. InputError if they are too few.
    """
    images, labels = splits["train"]
    n = len(images)
    kept = train_size or n - val_size
    if not 2 <= kept <= n - val_size:
        raise InputError(f"--val-size {val_size} and --train-size {train_size} (0: all others, "
                         f"else at least 2) do not fit the {n:,} training images of {name}")
    if kept < n:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        splits["train"] = images[order[:kept]], labels[order[:kept]]
        if val_size:
            held = order[n - val_size:]
            splits["val"] = images[held], labels[held]


# ==== Options: the fields of Config, and the data and network that they name ====================

# The families of networks. What the program and `extract` use of a network: widths, step_widths,
# forward(x, w) -> list of logits, where w is widths or what step_widths gives, parameter_groups,
# calibrate, sub_models, extract, and a constructor (num_classes, options by their names).
#   exits: its sub-models are exits, for early_exit, and have early_exit_macs.
#   cpu_compiles: --compile works on a CPU.
#   cpu_format: the order of memory that is fastest on a CPU.
#   defaults, small, shapes: options that differ from those of Config: always; with --small and on
#       shapes; on shapes. Later ones win.
NETWORKS = {
    "msdnet": SimpleNamespace(
        cls=MSDNet, exits=True, cpu_compiles=True, cpu_format=torch.contiguous_format,
        defaults=dict(kd_weight=0.9, temperature=2.0),
        small=dict(exits=4, base=1, step=1, step_mode="lin_grow", channels=8, growth=4),
        shapes=dict(epochs=2, batch_size=32, schedule="cosine", kd_weight=0.5, temperature=1.0)),
    "slimmable": SimpleNamespace(
        cls=SlimmableMobileNetV1, exits=False, cpu_compiles=False, cpu_format=torch.channels_last,
        defaults=dict(epochs=200, schedule="cosine", lr=0.4),
        small=dict(widths=(0.125, 0.25, 0.375, 0.5)),
        shapes=dict(epochs=10, batch_size=32, lr=0.1, eval_every=5, sandwich=3)),
}


def flag(name):
    """The option of the command line that sets this field of Config."""
    return "--" + name.replace("_", "-")


def option(default, help, kind="setting", low=None, high=2**31 - 1, choices=None):
    """A field of Config with its range or choices.

    kind: "msdnet", "slimmable" or "folder": refused for other networks or data. "distillation":
        without effect on ce. "setting": listed by reports. "run": not listed.
    """
    about = dict(help=help, kind=kind, low=low, high=high, choices=choices)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    """What a run is. InputError for a value out of range."""
    arch: str = option("msdnet", "network", "run", choices=tuple(NETWORKS))
    dataset: str = option("shapes", "images; shapes are drawn, and have their own defaults", "run",
                          choices=("shapes", "cifar10", "cifar100", "folder"))
    method: str = option("ipkd-ta", "teacher: none, the largest, the next larger", "run",
                         choices=METHODS)
    data_dir: str = option("data", "CIFAR, or train/<class>/* and test/<class>/* (or val)", "run")
    image_size: int = option(32, "pixels to which images of a folder are brought", "folder", 8)
    train_size: int = option(0, "training images, at random; 0: all, or 1500 shapes", "run", 0)
    val_size: int = option(0, "training images held out, for early exits and choices", low=0)
    no_flip: bool = option(False, "do not mirror training images (digits, text)")
    kd_weight: float = option(0.5, "of the teacher; the labels have the rest", "distillation", 0, 1)
    kd_warmup: float = option(1.0, "share of training in which it rises", "distillation", 0, 1)
    temperature: float = option(1.0, "of the softmax in distillation", "distillation", 1e-3, 1e3)
    epochs: int = option(300, "passes over the images", "run", 1)
    batch_size: int = option(64, "images of a step", low=2)
    lr: float = option(0.1, "learning rate, before schedule and warm-up", low=0, high=10**6)
    lr_warmup: float = option(0.3, "share of training in which lr rises from 0", low=0, high=1)
    schedule: str = option("multistep", "of the learning rate; multistep: x 0.1 at 1/2 and 3/4",
                           choices=("multistep", "cosine", "linear"))
    weight_decay: float = option(1e-4, "slimmable: not of BatchNorm and depthwise weights",
                                 low=0, high=10**6)
    eval_every: int = option(1, "epochs from one evaluation to the next", "run", 1)
    seed: int = option(0, "of weights, order, augmentation and widths", "run", 0, 2**63 - 1)
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", "run")
    amp: str = option("auto", "mixed precision; auto: on a GPU", "run",
                      choices=("auto", "off", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the network, which takes minutes", "run")
    no_cuda_graph: bool = option(False, "launch every kernel of a step by itself", "run")
    small: bool = option(False, "the small network of the demonstration", "run")
    exits: int = option(7, "classifiers: the sub-models", "msdnet", 1)
    base: int = option(4, "layers before the first exit", "msdnet", 1)
    step: int = option(2, "layers between one exit and the next", "msdnet", 1)
    step_mode: str = option("even", "lin_grow: STEP * i + 1 layers in block i + 1", "msdnet",
                            choices=("even", "lin_grow"))
    channels: int = option(16, "of the first layer at the finest scale", "msdnet", 1)
    growth: int = option(6, "channels that a layer adds at the finest scale", "msdnet", 1)
    gradient_equilibrium: bool = option(False, "mean of the exits' gradients, not sum", "msdnet")
    widths: tuple = option((0.25, 0.5, 0.75, 1.0), "multipliers in (0, 1], ascending", "slimmable")
    bn: str = option("universal", "BatchNorm: shared, or one for each width", "slimmable",
                     choices=("universal", "switchable"))
    sandwich: int = option(4, "widths of a step, two of them the ends", "slimmable", 2)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
            if choices and value not in choices:
                raise InputError(f"{flag(f.name)} must be one of {choices}, got {value!r}")
            if low is not None and not low <= value <= high:
                raise InputError(f"{flag(f.name)} must be from {low} to {high:,}, got {value}")

    @property
    def data_name(self):
        """The data set's name in tables: of a folder its own."""
        if self.dataset == "folder":
            return Path(self.data_dir).expanduser().resolve().name
        return self.dataset


def refuse_other_family(arch, dataset, given):
    """InputError for an option of another network or kind of data than these."""
    for f in fields(Config):
        kind = f.metadata["kind"]
        if f.name in given and kind in (*NETWORKS, "folder") and kind not in (arch, dataset):
            raise InputError(f"{flag(f.name)} is for {kind}, this is {arch} on {dataset}")
    if "data_dir" in given and dataset == "shapes":
        raise InputError("--data-dir has no shapes, these are drawn: add --dataset folder")


def make_config(given):
    """Config of the options given, over the defaults of their network and data set."""
    arch = given.get("arch", Config.arch)
    dataset = given.get("dataset", Config.dataset)
    refuse_other_family(arch, dataset, given)
    network = NETWORKS[arch]
    options = dict(network.defaults)
    if given.get("small") or dataset == "shapes":
        options.update(network.small)
    if dataset == "shapes":
        options.update(network.shapes)
    options.update(given)
    return Config(**options)


def load_data(cfg, device=torch.device("cpu")):
    """The Data that the options name, on the device. InputError when files are missing, unreadable
    or too few."""
    root = Path(cfg.data_dir).expanduser()
    if cfg.dataset == "shapes":
        n = (cfg.train_size or 1500) + cfg.val_size
        classes = list(SHAPES)
        splits = {"train": draw_shapes(n, seed=0), "test": draw_shapes(1000, seed=1)}
    elif cfg.dataset == "folder":
        splits, classes = load_folder(root, cfg.image_size)
    else:
        splits, classes = load_cifar(cfg.dataset, root)
    hold_out(splits, cfg.train_size, cfg.val_size, cfg.data_name)

    if cfg.dataset in CIFAR_STATISTICS:
        mean, std = torch.tensor(CIFAR_STATISTICS[cfg.dataset])
    else:
        # one channel at a time and in place: floats take four times as much memory
        channels = splits["train"][0].unbind(1)
        pairs = [torch.std_mean(channel.float().div_(255), correction=0) for channel in channels]
        std, mean = torch.tensor(pairs).T
    std = std.clamp_min(1e-3)  # of a constant channel it is 0

    # evaluation keeps no activations: it has memory for four times the batch of training
    eval_batch = min(256, 4 * cfg.batch_size)

    # on the device, in the order of memory that is fastest there
    memory_format = torch.channels_last
    if device.type == "cpu":
        memory_format = NETWORKS[cfg.arch].cpu_format
    splits = {name: (images.to(device), labels.to(device))
              for name, (images, labels) in splits.items()}
    return Data(splits, classes, mean.to(device), std.to(device), memory_format, eval_batch)


def build_model(cfg, num_classes):
    """The network that the options describe, the same for one seed; InputError when they do not
    fit each other."""
    cls = NETWORKS[cfg.arch].cls  # whose arguments have the names of options
    own = [name for name in inspect.signature(cls).parameters if name != "num_classes"]
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.manual_seed(cfg.seed)
            return cls(num_classes, **{name: getattr(cfg, name) for name in own})
    except ValueError as error:
        raise InputError(f"--arch {cfg.arch}: {error}") from error


@contextmanager
def reading(path):
    """InputError, which names the file, when reading it fails for any reason."""
    try:
        yield
    except Exception as error:  # a foreign file may raise anything
        raise InputError(f"cannot read '{path}': {error!r}") from error


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def config_of(saved):
    """Config of a saved dict; an option that it does not have has its default. A foreign dict
    raises errors of many types: see `reading`."""
    default = make_config({name: saved[name] for name in ("arch", "dataset", "method")})
    known = {f.name: f.type(saved[f.name]) for f in fields(Config) if f.name in saved}
    return replace(default, **known)


# ==== Evaluation: every sub-model on a split, budgets ===========================================

def calibration_batches(cfg, data):
    """Up to 2,048 training images for `calibrate`, the same at every call, augmented as in
    training."""
    train = data.splits["train"][0]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(train), generator=generator)[:2048].to(train.device)

    # batches of nearly equal size, of at least 64 images if there are so many: few images have poor
    # statistics
    count = len(chosen) // max(64, cfg.batch_size)
    for batch in chosen.tensor_split(max(1, count)):
        yield data.normalise(augment(train[batch], generator, not cfg.no_flip))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def predict(model, data, split, widths=None):
    """Logits (K, N, C) of every sub-model, smallest first, in float32, and labels (N,) of a split.
    Leaves the model in eval mode."""
    model.eval()
    images, labels = data.splits[split]

    logits = []
    for x in images.split(data.eval_batch):
        logits.append(torch.stack(model(data.normalise(x), widths or model.widths)))
    return torch.cat(logits, dim=1).float(), labels


def evaluate(model, data, split="test", widths=None):
    """Of every sub-model on a split, smallest first: a dict of top1 and top5 in percent, and loss,
    the mean cross-entropy. widths: of a slimmable network, instead of its own ones."""
    logits, labels = predict(model, data, split, widths)
    results = []
    for z in logits:
        hits = z.topk(min(5, z.shape[1])).indices == labels[:, None]  # (N, 5)
        top1 = hits[:, 0].double().mean().item()
        top5 = hits.any(1).double().mean().item()
        loss = F.cross_entropy(z, labels).item()
        results.append({"top1": 100 * top1, "top5": 100 * top5, "loss": loss})
    return results


def budgeted(model, data, image_size=32):
    """Budgeted batch classification (Huang et al., ICLR 2018) of the test images.

    Thresholds are those by which exit k answers a share of the validation images in proportion
    to q^k. Returns a list of {"q", "macs" (average, with all heads passed), "top1" in percent,
    "thresholds", "exits" (the shares that left there)}.
    """
    # thresholds come from the images held out, accuracies from those of the test
    held_out, _ = predict(model, data, "val")
    held_out = held_out.cpu().softmax(2).amax(2)  # (K, N) confidences
    logits, labels = predict(model, data, "test")
    confidence, answers = logits.cpu().softmax(2).max(2)
    correct = (answers == labels.cpu()).double()  # (K, N)
    costs = torch.tensor([sub.early_exit_macs for sub in model.sub_models(image_size)])

    # small q: most images leave early
    budgets = []
    for tenths in range(1, 21):
        q = tenths / 10
        shares = q ** torch.arange(1, len(costs) + 1, dtype=torch.float64)
        thresholds = exit_thresholds(held_out, shares / shares.sum())
        sure = confidence >= torch.tensor(thresholds)[:, None]
        exits = sure.int().argmax(dim=0)  # (N,), the first one that is sure
        budgets.append({
            "q": q,
            "macs": costs[exits].double().mean().item(),
            "top1": 100 * correct.gather(0, exits[None]).mean().item(),
            "thresholds": thresholds,
            "exits": (exits.bincount(minlength=len(costs)) / len(exits)).tolist(),
        })
    return budgets


# ==== Training ==================================================================================

def lr_factor(schedule, progress):
    """What the schedule makes of the learning rate after this share (0 to 1) of the training."""
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    drops = (progress >= 0.5) + (progress >= 0.75)  # multistep
    return 0.1**drops


def ramp(progress, share):
    """Rises from 0 to 1 over the first `share` of the training."""
    return min(1.0, progress / share) if share else 1.0


def write_file(path, content):
    """Replace a file by these bytes in one step: there is never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class State:
    """All that changes in training, which is all that a checkpoint must hold."""

    def __init__(self, cfg, model, device, amp):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameter_groups(), cfg.lr, momentum=0.9,
                                         nesterov=True, fused=True, weight_decay=cfg.weight_decay)

        # zeros: the same first step as without buffers, and a CUDA graph needs them beforehand
        for p in model.parameters():
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

        # of fp16: the loss is scaled up, so that small gradients do not vanish
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.order_rng = torch.Generator().manual_seed(cfg.seed)  # order of images, and widths
        self.crop_rng = torch.Generator().manual_seed(cfg.seed)  # augmentation
        self.history = []  # a dict for every finished epoch

    def save(self, path, **about):
        """Write a checkpoint that holds this and `about`."""
        content = {
            **about,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order_rng": self.order_rng.get_state(),
            "crop_rng": self.crop_rng.get_state(),
            "history": self.history,
        }
        whole = io.BytesIO()  # to a full disk torch.save would raise no OSError
        torch.save(content, whole)
        write_file(path, whole.getvalue())

    def load(self, content):
        """Go on from a checkpoint, on a CPU to the same bits as a run that never stopped."""
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.order_rng.set_state(content["order_rng"])
        self.crop_rng.set_state(content["crop_rng"])
        self.history = content["history"]

        # fused SGD assumes that a momentum lies in memory as its parameter does; the device that
        # saved it may have used another order
        for p, saved in self.optimizer.state.items():
            saved["momentum_buffer"] = torch.empty_like(p).copy_(saved["momentum_buffer"])


def make_step(cfg, state, data, amp):
    """Returns the function that trains one step. amp: the dtype of autocast, or None."""

    def step(images, labels, widths, lr, kd_weight):
        """One step of all sub-models together; returns the loss.

        images: uint8 (N, 3, H, W). widths: of model.step_widths. lr, kd_weight: numbers or tensors.
        """
        for group in state.optimizer.param_groups:
            group["lr"] = lr

        # the method: all sub-models of this step in one loss
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits = state.model(data.normalise(images), widths)  # smallest sub-model first
            loss = ipkd_ta_loss(logits, labels, cfg.method, kd_weight, cfg.temperature)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        return loss.detach()

    return step


class RecordedStep:
    """A training step on a GPU, recorded once as a CUDA graph and replayed.

    A step is 700 to 2,800 small kernels: launching them one by one takes longer than their work.
    Its inputs have fixed places, into which each call copies. Evaluation and checkpoints between
    steps do not disturb it: parameters, momentum and tracked statistics stay where they are.
    """

    EAGER_STEPS = 4  # real steps before the recording, in which libraries choose their kernels

    def __init__(self, step, device):
        self.step = step
        self.device = device
        self.stream = torch.cuda.Stream(device)  # only one, because each has memory of its own
        self.graph = None
        self.calls = 0

    def __call__(self, *inputs):
        """inputs: of the step. Tensors and floats may change from call to call, nothing else may.
        Returns the loss, whose place the next call uses again."""
        self.calls += 1
        with self.aside():
            if self.calls == 1:
                self.places = [self.place_for(value) for value in inputs]
            for place, value in zip(self.places, inputs):
                if torch.is_tensor(value):
                    place.copy_(value, non_blocking=True)
                elif torch.is_tensor(place):
                    place.fill_(value)

            # some eager steps, then the recording, which computes nothing, then replays
            if self.calls <= self.EAGER_STEPS:
                self.loss = self.step(*self.places)
            else:
                if self.graph is None:
                    self.record()
                self.graph.replay()
        return self.loss

    def place_for(self, value):
        if torch.is_tensor(value):
            return torch.empty_like(value, device=self.device)
        if isinstance(value, float):
            return torch.zeros((), device=self.device)
        return value

    @contextmanager
    def aside(self):
        """On the stream of this step, after all that was begun before, and before all that comes
        later, as PyTorch's notes on CUDA graphs want it."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)

    def record(self):
        # the graph owns what the step allocates here, the loss included
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.loss = self.step(*self.places)


@contextmanager
def tuned_for_training(device):
    """On a GPU, while training: cuDNN chooses kernels by trying them, and matrix products use TF32
    as convolutions do. Evaluation has other shapes, for which trials do not pay."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def train_epoch(cfg, state, data, step):
    """One pass over the images. Returns the record of the epoch. No step waits for the device."""
    images, labels = data.splits["train"]
    state.model.train()
    start = time.perf_counter()
    total = torch.zeros((), device=images.device)
    draw_widths = partial(sandwich_widths, cfg.sandwich, generator=state.order_rng)

    # whole batches only: a step on a few images would count like a full one
    epoch = len(state.history)
    steps = max(1, len(images) // cfg.batch_size)
    order = torch.randperm(len(images), generator=state.order_rng).to(images.device)
    for i, batch in enumerate(order.split(cfg.batch_size)[:steps]):

        # learning rate and the teacher's weight, as in the middle of this step
        progress = (epoch + (i + 0.5) / steps) / cfg.epochs
        lr = cfg.lr * lr_factor(cfg.schedule, progress) * ramp(progress, cfg.lr_warmup)
        kd_weight = cfg.kd_weight * ramp(progress, cfg.kd_warmup)

        # random crops and widths are drawn outside of the step, which may be a recorded one
        x = augment(images[batch], state.crop_rng, not cfg.no_flip)
        widths = state.model.step_widths(draw_widths)
        total += step(x, labels[batch], widths, lr, kd_weight)

    # this waits for the device
    loss = total.item() / steps
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "kd_weight": kd_weight,
        "loss": loss,
        "seconds": round(seconds, 3),
        "images/s": round(steps * min(cfg.batch_size, len(images)) / seconds, 1),
    }


def print_epoch(cfg, record, minutes_left):
    """One line for one epoch."""
    line = (f"epoch {record['epoch']}/{cfg.epochs}  lr {record['lr']:.4f}  "
            f"loss {record['loss']:.4f}  {record['images/s']:.0f} images/s  "
            f"{minutes_left:.1f} minutes left")
    if "top1" in record:
        line += "  test top-1 " + " ".join(f"{percent:.2f}" for percent in record["top1"])
    print(line, flush=True)


def train(cfg, state, data, amp, out):
    """Train to the last epoch, and return the accuracies after it (see `evaluate`).

    amp: the dtype of autocast, or None. After each epoch metrics.jsonl and checkpoint.pt in `out`
    are written anew. InputError when it diverges.
    """
    model = state.model
    device = data.mean.device

    # how a step runs on this device (fp16 skips steps; nobody has tried to record that)
    if cfg.compile:
        model.compile()
    step = make_step(cfg, state, data, amp)
    if device.type == "cuda" and not cfg.no_cuda_graph and amp != torch.float16:
        step = RecordedStep(step, device)

    # epoch by epoch, from the first that is not yet done
    accuracies = None
    first = len(state.history)
    start = time.perf_counter()
    for epoch in range(first + 1, cfg.epochs + 1):
        with tuned_for_training(device):
            record = train_epoch(cfg, state, data, step)

        # what diverged is not kept
        finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
        if not finite or not math.isfinite(record["loss"]):
            raise InputError(f"diverged in epoch {epoch}: begin again in another --out, with a "
                             f"lower --lr than {cfg.lr:g}")

        # the accuracy of every sub-model; slimmable networks need BatchNorm statistics first
        if epoch % cfg.eval_every == 0 or epoch == cfg.epochs:
            model.calibrate(calibration_batches(cfg, data))
            accuracies = evaluate(model, data)
            record["top1"] = [accuracy["top1"] for accuracy in accuracies]

        # what it takes to go on from here
        state.history.append(record)
        lines = "".join(json.dumps(line) + "\n" for line in state.history)
        write_file(out / "metrics.jsonl", lines.encode())
        state.save(out / "checkpoint.pt", config=asdict(cfg), classes=data.classes,
                   mean=data.mean.cpu(), std=data.std.cpu())

        # the time left, by the pace so far
        pace = (time.perf_counter() - start) / (epoch - first)
        print_epoch(cfg, record, minutes_left=pace * (cfg.epochs - epoch) / 60)
    return accuracies or evaluate(model, data)  # (none: resumed after the last epoch)


# ==== Report: tables and picture ================================================================

# Student's t for 95 %, of 2 to 10 values; more of them take the last one, which is a little wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def other_options(cfg):
    """The options that are not the defaults, as texts: of the setting, and of the method. Where
    all options of --small are set, the word small stands for them."""
    setting = []
    method = []
    given = {"arch": cfg.arch, "dataset": cfg.dataset}
    small = NETWORKS[cfg.arch].small.items()
    if cfg.dataset != "shapes" and all(getattr(cfg, name) == value for name, value in small):
        given["small"] = True
        setting.append("small")
    default = make_config(given)
    for f in fields(cfg):
        kind = f.metadata["kind"]
        value = getattr(cfg, f.name)
        if value == getattr(default, f.name):
            continue
        if kind in ("setting", "folder", cfg.arch):
            setting.append(f"{f.name} {value}")
        if kind == "distillation" and cfg.method != "ce":
            method.append(f"{f.name} {value}")
    return setting, method


def read_run(path):
    """What a report needs of a results.json: a namespace whose top1 is in percent and mmacs in
    millions, smallest sub-model first. A foreign file raises errors of many types: see `reading`.
    """
    run = read_json(path)
    cfg = config_of(run["config"])
    names = [str(sub["name"]) for sub in run["sub_models"]]
    top1 = [float(sub["top1"]) for sub in run["sub_models"]]
    mmacs = [sub["macs"] / 1e6 for sub in run["sub_models"]]

    # data sets of one name are told apart by their sizes, which results before version 3 lack
    images = run.get("train_images", cfg.train_size)
    title = f"{cfg.arch} on {run.get('dataset', cfg.dataset)}: {images:,} images, "
    if "classes" in run:
        title += f"{run['classes']} classes, {run['test_images']:,} test images, "
    title += "1 epoch" if cfg.epochs == 1 else f"{cfg.epochs} epochs"

    setting, method = other_options(cfg)
    return SimpleNamespace(path=path, setting=", ".join([title, *setting]),
                           method=", ".join([cfg.method, *method]), seed=cfg.seed,
                           names=names, top1=top1, mean=fmean(top1), mmacs=mmacs)


def leave_out(what):
    print(f"left out: {what}", file=sys.stderr)


def find_results(directories):
    """Paths of all results.json below the directories, linked ones included, each once."""
    paths = []
    seen = set()  # a link may lead back
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"--report: '{directory}' is no directory")
        for folder, below, files in os.walk(directory, onerror=leave_out, followlinks=True):
            real = Path(folder).resolve()
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            if "results.json" in files:
                paths.append(real / "results.json")
            elif "config.json" in files:
                leave_out(f"the run in '{folder}' is not finished")
    return sorted(paths)


def load_runs(directories):
    """{setting: {method: [runs of different seeds]}} of all results below the directories."""
    runs = []
    for path in find_results(directories):
        with reading(path):
            runs.append(read_run(path))

    settings = {}
    for run in sorted(runs, key=lambda run: (run.setting, run.method)):
        same = settings.setdefault(run.setting, {}).setdefault(run.method, [])
        twins = [other for other in same if other.seed == run.seed]
        if twins:
            leave_out(f"'{run.path}' has the setting, method and seed of '{twins[0].path}'")
        else:
            same.append(run)
    if not settings:
        raise InputError(f"--report: no results.json below {', '.join(map(str, directories))}")
    return settings


def spread(values):
    """Mean ± standard deviation, if there are several."""
    text = f"{fmean(values):.2f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.2f}"
    return text


def paired_difference(runs, others):
    """The mean difference of two methods, paired by seed, with its 95 % interval; None if no seed
    is in both."""
    other_means = {run.seed: run.mean for run in others}
    pairs = [run.mean - other_means[run.seed] for run in runs if run.seed in other_means]
    if not pairs:
        return None
    mean = fmean(pairs)
    text = f"{mean:+.2f}"
    if len(pairs) > 1:
        t = T95[min(len(pairs), 10) - 2]
        half = t * stdev(pairs) / math.sqrt(len(pairs))
        text += f", 95 % interval {mean - half:+.2f} to {mean + half:+.2f}"
    return f"{text} (pairs of one seed: {len(pairs)})"


def plot(settings, path):
    """Top-1 accuracy against MACs: a panel for each setting, a line for each method. InputError
    without matplotlib, or for a suffix that it does not write."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"--plot needs matplotlib ({error}): pip install it") from error
    figure = Figure((4.5 * len(settings), 4), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    methods = sorted({method for by_method in settings.values() for method in by_method})
    for (setting, by_method), axes in zip(settings.items(), panels):

        # a line for each method, the same in all panels, with bars where it has several seeds
        for method, runs in by_method.items():
            i = methods.index(method)
            columns = list(zip(*(run.top1 for run in runs)))
            bars = [stdev(column) for column in columns] if len(runs) > 1 else None
            axes.errorbar(
                runs[0].mmacs, [fmean(column) for column in columns], bars, marker="o",
                color=f"C{i}", linestyle=(":", "--", "-")[i % 3], markersize=4, capsize=2,
                label=method)

        # what the panel is about
        axes.set_title(textwrap.fill(setting, 60), fontsize=9)
        axes.set_xlabel("million MACs for one image")
        axes.set_ylabel("test top-1 %, bars: standard deviation")
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path)
    except ValueError as error:  # of the suffix
        raise InputError(f"--plot: {error}") from error


def report(directories, picture):
    """Print Markdown: top-1 accuracies, and the differences of the methods, paired by seed."""
    settings = load_runs(directories)
    for setting, by_method in settings.items():
        first = next(iter(by_method.values()))[0]

        # the accuracy of every sub-model, and their mean
        print(f"### {setting}\n")
        print("| top-1 % |", " | ".join(first.names), "| mean |")
        print("| --- |" + " ---: |" * (len(first.names) + 1))
        print("| MMACs |", " | ".join(f"{mmacs:.2f}" for mmacs in first.mmacs), "|  |")
        for method, runs in by_method.items():
            columns = list(zip(*(run.top1 for run in runs)))
            columns.append([run.mean for run in runs])
            print(f"| {method} ({len(runs)}) |", " | ".join(map(spread, columns)), "|")
        print()

        # ipkd - ce, ipkd-ta - ce, ipkd-ta - ipkd
        for one, other in itertools.combinations(by_method, 2):
            difference = paired_difference(by_method[other], by_method[one])
            if difference:
                print(f"{other} - {one}, mean of the sub-models: {difference}\n")
    if picture:
        plot(settings, picture)


# ==== Runs and command line =====================================================================

def load_checkpoint(path):
    """A checkpoint.pt as (Config, network in eval mode, content), on the CPU. InputError if it is
    damaged, or would run code."""
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not compare checksums
                raise ValueError("it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        cfg = config_of(content["config"])
        model = build_model(cfg, len(content["classes"]))
        model.eval().load_state_dict(content["model"])
        content["mean"].view(3), content["std"].view(3)  # fails unless they are three numbers
        return cfg, model, content


def pick_device(cfg):
    """The device, and the dtype of autocast or None: what "auto" means on this machine."""
    name, amp = cfg.device, cfg.amp
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"

    # tried out, so that a wrong name is reported before images are read
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {error}") from error
    if cfg.compile and device.type == "cpu" and not NETWORKS[cfg.arch].cpu_compiles:
        raise InputError(f"--compile of {cfg.arch} needs a GPU: on a CPU its shapes always change")

    # half the memory traffic where the GPU has bf16; float32 elsewhere
    if amp == "auto":
        on_gpu = device.type == "cuda"
        bf16 = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
        amp = "bf16" if bf16 else "off"
    return device, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def check_images(cfg, data, content):
    """InputError if these are not the images of the run whose checkpoint has this content."""
    same = torch.allclose(data.mean.cpu(), content["mean"])
    if not same or data.classes != content["classes"]:
        raise InputError(f"--data-dir '{cfg.data_dir}' does not have the images of the run")


def keep_options(cfg, given, where, free=("data_dir", "device")):
    """cfg with those of the `free` options that are given. Others have no effect: a line names
    those that differ. InputError for an option of another network."""
    refuse_other_family(cfg.arch, cfg.dataset, given)
    changed = replace(cfg, **given)

    # a command that names network, data and method, as run_cifar.sh does, asks for a whole run:
    # what it leaves out means the default
    asked = changed
    if {"arch", "dataset", "method"} <= given.keys():
        asked = make_config(given)
    other = []
    for f in fields(cfg):
        own = getattr(cfg, f.name)
        if f.name not in free and own != getattr(asked, f.name):
            other.append(f"{flag(f.name)} {own}")
    if other:
        print(f"'{where}' keeps its own options: {', '.join(other)}")
    return replace(cfg, **{name: getattr(changed, name) for name in free})


def claim(cfg, out):
    """Take the directory for a new run, by the file that only one process can create. InputError
    when another run was faster."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        file = open(out / "config.json", "x", encoding="utf-8")
    except FileExistsError as error:
        raise InputError(f"'{out}' was just taken by another run: choose another --out, or go on "
                         f"by --resume") from error

    # a full disk: a run that could not begin does not block its place
    try:
        with file:
            json.dump(asdict(cfg), file, indent=2)
    except BaseException:
        (out / "config.json").unlink()
        raise


def print_results(subs, accuracies):
    """Print costs and accuracies of all sub-models; returns them as a list of dicts."""
    print(f"{'sub-model':12}   MMACs      params  test top-1 %  top-5 %    loss")
    rows = []
    for sub, accuracy in zip(subs, accuracies):
        row = {**vars(sub), **accuracy}
        print(f"{row['name']:12} {row['macs'] / 1e6:7.2f} {row['params']:11,} "
              f"{row['top1']:13.2f} {row['top5']:8.2f} {row['loss']:7.4f}")
        rows.append(row)
    return rows


def finish(cfg, model, data, accuracies, out, about):
    """Print and write what came out: results.json, and budget.json of exits with validation."""
    rows = print_results(model.sub_models(cfg.image_size), accuracies)
    results = {**about, "sub_models": rows}

    # on the images held out: accuracies, and early exit by thresholds from them
    if "val" in data.splits:
        results["validation"] = evaluate(model, data, "val")
        if NETWORKS[cfg.arch].exits:
            budgets = budgeted(model, data, cfg.image_size)
            write_file(out / "budget.json", json.dumps({"budgets": budgets}, indent=2).encode())

    # last of all: a run that has this file is finished
    write_file(out / "results.json", json.dumps(results, indent=2).encode())


def options_of_run(out):
    """The options of the run in this directory, by whichever of its files was kept; None if there
    is no run."""
    for path in out / "config.json", out / "results.json":
        if path.exists():
            with reading(path):
                saved = read_json(path)  # results.json has them under "config"
                return config_of(saved.get("config", saved))
    if (out / "checkpoint.pt").exists():
        return load_checkpoint(out / "checkpoint.pt")[0]
    return None


def find_run(given, out, resume):
    """Options and directory of the run, and whether it has begun; if so, the options are those that
    it began with. InputError when another run has the directory."""
    if out is None:
        cfg = make_config(given)
        out = Path(f"runs/{cfg.arch}-{cfg.data_name}-{cfg.method}-seed{cfg.seed}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out '{out}' is a file, not a directory")
    own = options_of_run(out)
    if own is None:
        if resume:
            print(f"'{out}' has no run yet, so it begins")
        return make_config(given), out, False
    if not resume:
        raise InputError(f"'{out}' has a run: choose another --out, or go on by --resume")
    return keep_options(own, given, out), out, True


def run_training(given, out, resume):
    """One run in a directory of its own, from its beginning or from its last finished epoch."""
    cfg, out, begun = find_run(given, out, resume)
    if begun and (out / "results.json").exists():
        print(f"the run in '{out}' is finished: other options need another --out")
        return

    # the data, all of it on the device, and the network
    device, amp = pick_device(cfg)
    data = load_data(cfg, device)
    model = build_model(cfg, len(data.classes)).to(device, memory_format=data.memory_format)
    state = State(cfg, model, device, amp)

    # a new run takes its directory only now, when all that it needs is there; one that has begun
    # goes on from its checkpoint
    if not begun:
        claim(cfg, out)
    elif (out / "checkpoint.pt").exists():
        saved, _, content = load_checkpoint(out / "checkpoint.pt")
        if replace(saved, data_dir=cfg.data_dir, device=cfg.device) != cfg:
            raise InputError(f"'{out}' has the checkpoint.pt of another run, or its config.json")
        check_images(cfg, data, content)
        with reading(out / "checkpoint.pt"):
            state.load(content)

    # say what is trained
    images, tested = (len(data.splits[split][1]) for split in ("train", "test"))
    precision = str(amp or torch.float32).removeprefix("torch.")
    print(f"{cfg.arch}: {sum(p.numel() for p in model.parameters()):,} parameters\n"
          f"{cfg.data_name}: {images:,} training and {tested:,} test images "
          f"of {len(data.classes)} classes\non {device} in {precision}, into {out}, "
          f"{len(state.history)} of {cfg.epochs} epochs are done", flush=True)
    if images < cfg.batch_size:
        print(f"warning: --batch-size {cfg.batch_size} is more than all {images} training images",
              file=sys.stderr)
    if len(data.classes) < 2:
        print("warning: with one class there is nothing to learn", file=sys.stderr)

    # train, and write down what came out and how
    accuracies = train(cfg, state, data, amp, out)
    finish(cfg, model, data, accuracies, out, {
        "config": asdict(cfg),
        "dataset": cfg.data_name,
        "classes": len(data.classes),
        "train_images": images,
        "test_images": tested,
        "device": str(device),
        "precision": precision,
        "versions": {"ipkd_ta": __version__, "torch": torch.__version__},
    })


def run_evaluation(path, given):
    """The table of a checkpoint, of a universal slimmable network at any --widths."""
    # the options are the run's, but on a device of this machine, and nothing is compiled
    cfg, model, content = load_checkpoint(path)
    cfg = replace(cfg, device="auto", compile=False)
    cfg = keep_options(cfg, given, path, free=("data_dir", "device", "widths"))
    try:
        subs = model.sub_models(cfg.image_size, cfg.widths)
    except ValueError as error:
        raise InputError(f"--widths: {error}") from error

    # its images: those to test on, and training images to calibrate by
    device, _ = pick_device(cfg)
    data = load_data(cfg, device)
    check_images(cfg, data, content)
    model.to(device, memory_format=data.memory_format)

    # the same statistics as at the end of training, or those of other widths
    model.calibrate(calibration_batches(cfg, data), cfg.widths)
    accuracies = evaluate(model, data, widths=cfg.widths)
    print_results(subs, accuracies)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as one line."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse(argv):
    """The command line as (what to do, the options of Config that were given)."""
    # an option for each field, and what else the program does
    parser = Parser("ipkd_ta.py", allow_abbrev=False, description="Train flexible networks by "
                    "IPKD-TA. Shapes have defaults of their own, see config.json of a run.")
    for f in fields(Config):
        how = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            how = {"action": "store_true"}
        if f.type is tuple:
            how = {"type": float, "nargs": "+"}
        defaults = [str(f.default)]
        for arch, network in NETWORKS.items():
            if f.name in network.defaults:
                defaults.append(f"{arch} {network.defaults[f.name]}")
        text = f"{f.metadata['help']} (default: {'; '.join(defaults)})"
        parser.add_argument(flag(f.name), help=text, default=argparse.SUPPRESS, **how)
    parser.add_argument("--out", type=Path, help="directory of the run (default: runs/ARCH-...)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", action="store_true", help="go on with the run in --out")
    modes.add_argument("--eval", type=Path, help="print the table of this checkpoint.pt")
    modes.add_argument("--report", type=Path, nargs="+", help="print the results below these")
    parser.add_argument("--plot", type=Path, help="with --report: draw accuracy against MACs")
    args = parser.parse_args(argv)

    # those of Config have no default here: only what was given is in args
    given = {f.name: f.type(getattr(args, f.name)) for f in fields(Config)
             if hasattr(args, f.name)}
    return args, given


def main(argv=None):
    """Returns the exit status: 0 = finished, 2 = bad input, 130 = stopped by Ctrl-C."""
    try:
        args, given = parse(argv)

        # a report, a table of one checkpoint, or a training
        if args.plot and not args.report:
            raise InputError("--plot draws the results of --report DIR, which is missing")
        if args.report:
            report(args.report, args.plot)
        elif args.eval:
            run_evaluation(args.eval, given)
        else:
            run_training(given, args.out, args.resume)
    except (InputError, OSError, torch.OutOfMemoryError) as error:  # what the user can mend
        print("ipkd_ta.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command with --resume goes on with a training", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # drawn widths need many kernels: oneDNN keeps 1,024 of them unless told otherwise
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    sys.exit(main())
