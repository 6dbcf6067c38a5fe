"""IPKD-TA: inplace knowledge distillation with teacher assistant, for training flexible neural networks.

A flexible network holds many sub-models in one set of weights: the exits of MSDNet, the widths of a slimmable
MobileNet-V1. It is trained so that every sub-model teaches the next smaller one, the "teacher assistant" cascade of

    A. Ozerov and N. Q. K. Duong, "Inplace knowledge distillation with teacher assistant for improved training of
    flexible deep neural networks", EUSIPCO 2021, arXiv:2105.08369.

    python ipkd_ta.py                                      # a demonstration on drawn shapes, no download
    python ipkd_ta.py --arch msdnet --dataset cifar100     # one of the benchmarks

Measured (two cores of an AMD EPYC, PyTorch 2.14): the demonstration ends after 41 s with 87.0 % at the first exit and
92.2 % at the last. README.md has the rest.

One file, in reading order: the loss, slimmable MobileNet-V1, MSDNet, sub-models in use; files and processes, data,
training, evaluation and report, benchmark; options, runs, export, command line. The loss and the two networks need
nothing from the rest but the imports: copy them.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import signal
import statistics
import sys
import textwrap
import time
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.ops import Conv2dNormActivation

__version__ = "1.1"

# ====================================================================================================================
# The loss: the algorithm in one screen
# ====================================================================================================================


def ipkd_ta_loss(logits, target, method="ipkd-ta", kd_weight=0.5, temperature=1.0):
    """Loss of all sub-models of a flexible network, trained together (arXiv:2105.08369).

        L = CE(z_K, y) + sum over k < K of [ (1 - kd_weight) CE(z_k, y)
                                             + kd_weight temperature^2 KL( stop_gradient(p_t(k)) || p_k ) ]

    where p_k = softmax(z_k / temperature), and the method chooses the teacher t(k) of sub-model k:

        "ce"       none: every sub-model learns from the labels alone, as if kd_weight were 0
        "ipkd"     K: the largest teaches all others (Yu & Huang, ICCV 2019; Li et al., ICCV 2019)
        "ipkd-ta"  k + 1: each sub-model is the teacher assistant of the next smaller one (Ozerov & Duong, 2021)
        "ipkd-mean"  all larger ones: p_t(k) is the mean of p_{k+1} ... p_K (of this project, for comparison)

    Args:
        logits: list of K tensors (N, C), smallest sub-model first. Half precision is computed in float32.
        target: class indices (N,), int64.
        method, kd_weight in [0, 1], temperature in (0, 1e6]: see above.
    Returns:
        Scalar: summed over sub-models and classes, averaged over the batch. No gradient flows into a teacher.
    Raises:
        TypeError, ValueError: logits or a target of a wrong type, shape or device, or an argument outside its range.
    """
    if method not in ("ce", "ipkd", "ipkd-ta", "ipkd-mean"):
        raise ValueError(f"method must be 'ce', 'ipkd', 'ipkd-ta' or 'ipkd-mean', got {method!r}")
    if not 0 <= kd_weight <= 1 or not 0 < temperature <= 1e6:
        raise ValueError(f"need 0 <= kd_weight <= 1 and 0 < temperature <= 1e6, got {kd_weight} and {temperature}")
    if not all(torch.is_tensor(z) and z.is_floating_point() for z in logits):
        raise TypeError(f"logits must be floating-point tensors, got {[getattr(z, 'dtype', type(z)) for z in logits]}")
    shapes = [tuple(z.shape) for z in logits]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"logits must be a non-empty list of tensors of one shape (N, C), got shapes {shapes}")
    if getattr(target, "dtype", None) != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {getattr(target, 'dtype', type(target))}")
    if target.shape != shapes[0][:1] or {z.device for z in logits} != {target.device}:
        raise ValueError(f"target must be of shape {shapes[0][:1]} and on one device with all logits, got "
                         f"{tuple(target.shape)} on {target.device}, logits on {[str(z.device) for z in logits]}")
    if target.device.type == "cpu" and not 0 <= target.min() <= target.max() < shapes[0][1]:   # a GPU is not waited for
        raise ValueError(f"target must be at least 0 and below {shapes[0][1]}, got {target.min()} to {target.max()}")

    logits = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in logits]
    log_p = [F.log_softmax(z / temperature, dim=1) for z in logits]
    loss = F.cross_entropy(logits[-1], target)
    for k, student in enumerate(logits[:-1]):
        ce = F.cross_entropy(student, target)
        if method == "ce":
            loss = loss + ce
            continue
        larger = [teacher.detach() for teacher in log_p[k + 1:]]
        if method == "ipkd-mean":
            teacher = torch.stack(larger).logsumexp(dim=0) - math.log(len(larger))
        else:
            teacher = larger[-1] if method == "ipkd" else larger[0]
        kl = F.kl_div(log_p[k], teacher, reduction="batchmean", log_target=True)
        loss = loss + (1 - kd_weight) * ce + kd_weight * temperature**2 * kl
    return loss


def sandwich_widths(n, low, high, generator=None):
    """Widths to train in one step: the sandwich rule (Yu & Huang, ICCV 2019, section 3.3).

    Args:
        n: number of widths, at least 2: the largest, the smallest, and n - 2 drawn uniformly from [low, high].
        low, high: width multipliers, 0 < low < high < infinity.
        generator: CPU torch.Generator of the draw (default: PyTorch's global one).
    Returns:
        List of n floats, descending, so that every teacher's logits exist before its students need them.
    Raises:
        ValueError: n that is no integer or below 2, or an empty range.
    """
    if not isinstance(n, int) or n < 2 or not 0 < low < high < math.inf:
        raise ValueError(f"need an integer n >= 2 and 0 < low < high, got n={n}, low={low}, high={high}")
    drawn = low + (high - low) * torch.rand(n - 2, generator=generator, dtype=torch.float64)
    return [high, *sorted(drawn.tolist(), reverse=True), low]


# ====================================================================================================================
# Slimmable MobileNet-V1: the sub-models are widths
# ====================================================================================================================


class SlimmableMobileNetV1(nn.Module):
    """MobileNet-V1 (Howard et al., 2017) for 32x32 images, with the width multiplier as an argument of `forward`.

    At width w every layer computes with the first c * w of its c channels, rounded to a multiple of 8.

    Args:
        num_classes: C, the number of logits at every width.
        widths: the sub-models, as width multipliers ascending in (0, 1]. Weights are as wide as the last one needs.
        bn: "universal" (Yu & Huang, ICCV 2019): all widths share gamma and beta; any width in [widths[0], widths[-1]]
            may be asked for, in eval mode after `calibrate` has measured its BatchNorm statistics.
            "switchable" (Yu et al., ICLR 2019): a private BatchNorm for each of `widths`, and no other width.
    Raises:
        ValueError: widths that do not ascend in (0, 1], an unknown bn, no class, or a width that the model does not
            offer.
        TypeError: images that are not floating-point (N, 3, H, W).
    """

    STEM = 32
    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1),
              (512, 1), (1024, 2), (1024, 1))    # depthwise-separable: (output channels, stride)

    def __init__(self, num_classes=100, widths=(0.25, 0.5, 0.75, 1.0), bn="universal"):
        super().__init__()
        widths = tuple(float(w) for w in widths)
        if not widths or list(widths) != sorted(set(widths)) or not 0 < widths[0] <= widths[-1] <= 1:
            raise ValueError(f"widths must ascend within (0, 1], got {list(widths)}")
        if bn not in ("universal", "switchable"):
            raise ValueError(f"bn must be 'universal' or 'switchable', got {bn!r}")
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}")
        self.widths, self.low, self.high, self.bn = widths, widths[0], widths[-1], bn

        counts, strides = self.channels(self.high), [1] + [s for _, stride in self.BLOCKS for s in (stride, 1)]
        self.convs = nn.ModuleList([nn.Conv2d(3, counts[0], 3, padding=1, bias=False)])
        for i in range(1, len(counts), 2):
            c_in, c_out = counts[i], counts[i + 1]
            self.convs.append(nn.Conv2d(c_in, c_in, 3, strides[i], padding=1, groups=c_in, bias=False))    # depthwise
            self.convs.append(nn.Conv2d(c_in, c_out, 1, bias=False))                                       # pointwise
        self.classifier = nn.Linear(counts[-1], num_classes)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")   # N(0, sqrt(2 / (k k C_out)))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

        # One BatchNorm per layer and width holds the running statistics: of every width when switchable, with its
        # own gamma and beta; of the widths calibrated so far when universal, where `affine` has gamma and beta.
        self.norms = nn.ModuleDict()
        if bn == "switchable":
            for width in widths:
                self._add_norms(width)
        else:
            self.affine = nn.ModuleList(nn.BatchNorm2d(c, track_running_stats=False) for c in counts)

    def forward(self, x, width=None):
        """x: (N, 3, H, W) -> logits (N, num_classes) of the sub-model of this width (default: the largest)."""
        width = self.high if width is None else width
        if self.training and self.bn == "universal":
            self.norms.clear()                   # the weights are about to change: calibrated statistics get wrong
        tracked = self.bn == "switchable" or not self.training
        return self._run(x, self._layers(width, tracked), training=self.training)

    def _run(self, x, layers, training, momentum=0.1):
        if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim != 4 or x.shape[1] != 3:
            raise TypeError(f"x must be a floating-point tensor (N, 3, H, W), got {getattr(x, 'dtype', type(x))} "
                            f"{tuple(getattr(x, 'shape', ()))}")
        for conv, weight, mean, var, gamma, beta in layers:
            x = F.conv2d(x, weight, None, conv.stride, conv.padding, groups=len(weight) if conv.groups > 1 else 1)
            x = F.relu6(F.batch_norm(x, mean, var, gamma, beta, training, momentum))
        x = x.mean(dim=(2, 3))                                                       # (N, channels of the last layer)
        return F.linear(x, self.classifier.weight[:, :x.shape[1]], self.classifier.bias)

    def _layers(self, width, tracked):
        """For each layer: conv, its weight at `width`, running mean and variance (None unless tracked), gamma, beta."""
        width = float(width)
        if not self.low <= width <= self.high:
            raise ValueError(f"width {width} is outside the trained range [{self.low}, {self.high}]")
        counts, key = self.channels(width), self._key(width)
        if self.bn == "switchable" and not self.calibrated(width):
            raise ValueError(f"width {width} was not trained, and a switchable model offers no others")
        if tracked and not self.calibrated(width):
            raise ValueError(f"width {width} has no BatchNorm statistics yet: call calibrate(batches, [{width}]) first")
        norms = self.norms[key] if tracked else self.affine
        affine = self.affine if self.bn == "universal" else norms
        layers, c_in = [], 3
        for conv, c, norm, shared in zip(self.convs, counts, norms, affine):
            weight = conv.weight[:c, :c_in] if conv.groups == 1 else conv.weight[:c]
            layers.append((conv, weight, norm.running_mean, norm.running_var, shared.weight[:c], shared.bias[:c]))
            c_in = c
        return layers

    def channels(self, width):
        """Output channels of the 27 convolutions: the multiple of 8 nearest to c * width, at least 8 and never below
        90 % of c * width."""
        base = [self.STEM]
        for c_out, _ in self.BLOCKS:
            base += [base[-1], c_out]
        nearest = [(c * width, max(8, int(c * width / 8 + 0.5) * 8)) for c in base]
        return [c if c >= 0.9 * exact else c + 8 for exact, c in nearest]

    @torch.no_grad()
    def calibrate(self, batches, widths=None):
        """Measure the BatchNorm statistics that eval mode needs: the mean over all images of the mean and (unbiased)
        variance of the batch that each is in. Batches of fewer than 32 images are joined. A universal model forgets its
        statistics at the next forward pass in training mode, a switchable one goes on from them.

        Args:
            batches: iterable of normalised training images (N, 3, H, W), augmented as in training; or of tuples that
                begin with them, as a DataLoader gives.
            widths: which to measure (default: `widths`); of a universal model any in [widths[0], widths[-1]].
        """
        widths = self.widths if widths is None else [float(width) for width in widths]
        for width in widths:
            self._layers(width, tracked=self.bn == "switchable")      # refuses a wrong width before anything is stored
        n = 0
        for x in self._joined(batches, least=32):
            x, n = x.to(self.classifier.weight.device), n + len(x)
            for width in widths:
                if n == len(x):
                    self._reset_norms(width)
                self._run(x, self._layers(width, tracked=True), training=True, momentum=len(x) / n)
        if not n:
            raise ValueError("calibrate needs at least one batch of images")

    @staticmethod
    def _joined(batches, least):
        """Images of each batch, or of each tuple that begins with them; batches that are too small are joined until they
        hold at least `least` images, what is left at the end to the batch before."""
        held, small = [], []
        for batch in batches:
            small.append(batch if torch.is_tensor(batch) else batch[0])
            if sum(map(len, small)) >= least:
                if held:
                    yield torch.cat(held)
                held, small = small, []
        if held or small:
            yield torch.cat(held + small)

    def _reset_norms(self, width):
        if self.bn == "universal":
            self._add_norms(width)
        for norm in self.norms[self._key(width)]:
            norm.reset_running_stats()

    def calibrated(self, width):
        """Whether the BatchNorm statistics of this width are known."""
        return self._key(width) in self.norms

    def _add_norms(self, width):
        norms = (nn.BatchNorm2d(c, affine=self.bn == "switchable") for c in self.channels(width))
        self.norms[self._key(width)] = nn.ModuleList(norms).to(self.classifier.weight)

    @staticmethod
    def _key(width):
        return str(float(width)).replace(".", "_")      # module names may not contain a dot

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.bn == "universal":                      # the calibrated widths become those of the saved state
            self.norms.clear()
            for key in {name[len(prefix):].split(".")[1] for name in state_dict if name.startswith(prefix + "norms.")}:
                self._add_norms(float(key.replace("_", ".")))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sub_models(self):
        """The sub-models of `widths`, ascending, with name, macs and params: multiply-accumulates of convolutions
        and classifier for one 3x32x32 image, and parameters including BatchNorm's gamma and beta."""
        model, image = copy.deepcopy(self).to("meta"), torch.empty(1, 3, 32, 32, device="meta")    # shapes alone
        subs = []
        for width in self.widths:
            layers = model._layers(width, tracked=self.bn == "switchable")
            with FlopCounterMode(display=False) as flops:
                model._run(image, layers, training=True)
            params = sum(weight.numel() + 2 * len(gamma) for _, weight, _, _, gamma, _ in layers)
            params += (len(layers[-1][1]) + 1) * self.classifier.out_features
            subs.append(SimpleNamespace(name=f"width-{width:g}", macs=flops.get_total_flops() // 2, params=params))
        return subs

    def training_passes(self, draw_widths):
        """The forward passes of one training step, largest first, each as ([name], x -> [logits]): of all `widths` when
        switchable, of those that draw_widths(low, high) gives, in descending order, when universal."""
        sampled = self.bn == "universal" and self.low < self.high
        widths = draw_widths(self.low, self.high) if sampled else reversed(self.widths)
        return [([f"width-{width:g}"], lambda x, width=width: [self(x, width)]) for width in widths]

    def extract(self, which):
        """A sub-model as a module of its own, in eval mode: (N, 3, H, W) -> logits (N, num_classes). It holds copies of
        its weights, nothing else. which: k = 1 ... K of `widths`, or a width as a float (if universal: calibrated)."""
        if isinstance(which, int) and not 1 <= which <= len(self.widths):
            raise ValueError(f"k must be a whole number from 1 to {len(self.widths)}, got {which}")
        modules, random_state = [], torch.get_rng_state()
        for conv, *tensors in self._layers(self.widths[which - 1] if isinstance(which, int) else which, tracked=True):
            c_out, c_in, kernel, _ = tensors[0].shape
            groups = c_out if conv.groups > 1 else 1
            module = Conv2dNormActivation(c_in * groups, c_out, kernel, conv.stride, groups=groups,
                                          activation_layer=nn.ReLU6).to(tensors[0])
            own = (module[0].weight, module[1].running_mean, module[1].running_var, module[1].weight, module[1].bias)
            for parameter, value in zip(own, tensors):
                parameter.data.copy_(value.detach())
            modules.append(module)
        classifier = nn.Linear(c_out, self.classifier.out_features).to(self.classifier.weight)
        torch.set_rng_state(random_state)                # the modules drew weights in vain
        classifier.weight.data.copy_(self.classifier.weight.detach()[:, :c_out])
        classifier.bias.data.copy_(self.classifier.bias.detach())
        whole = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier).eval()
        return whole.to(memory_format=torch.channels_last)


# ====================================================================================================================
# MSDNet: the sub-models are exits
# ====================================================================================================================


class MSDNet(nn.Module):
    """Multi-scale dense network with early exits (Huang et al., ICLR 2018) for 32x32 images.

    Feature maps are lists of tensors, one per scale, finest first: 32x32, 16x16 and 8x8 pixels with n, 2n and 4n
    channels. Every layer appends growth * (1, 2, 4) channels; the finest scale is dropped after each third of the
    layers. Exit k classifies the coarsest scale after block k.

    Args:
        num_classes: C, the number of logits of every exit.
        exits: K, the number of blocks and of classifiers.
        base: layers in the first block.
        step, step_mode: layers in each later block: `step` ("even") or step * i + 1 in block i + 1 ("lin_grow").
        channels: n, the channels of the first layer at the finest scale.
        growth: channels that a layer adds at the finest scale.
        gradient_equilibrium: scale gradients so that block k receives the mean over the exits from k on of what each of
            them sends, not the sum (Li et al., ICCV 2019): its size does not grow with their number.
    Raises:
        ValueError: an argument that is not a positive integer, or an unknown step_mode.
        TypeError: images that are not floating-point (N, 3, 32, 32).
    """

    FACTORS = (1, 2, 4)      # channels of a scale relative to the finest; also how far its bottlenecks are wider

    class Stem(nn.Module):
        """Image (N, 3, 32, 32) -> one map per scale, each but the first from the one before at stride 2."""

        def __init__(self, channels, factors):
            super().__init__()
            counts = [3] + [channels * f for f in factors]
            self.convs = nn.ModuleList(Conv2dNormActivation(c_in, c_out, 3, stride=2 if s else 1)
                                       for s, (c_in, c_out) in enumerate(zip(counts, counts[1:])))

        def forward(self, x):
            maps = []
            for conv in self.convs:
                x = conv(x)
                maps.append(x)
            return maps

    class Layer(nn.Module):
        """Maps -> their coarsest `n_out` scales, each with growth * factor new channels appended: computed from the
        scale itself and from the next finer one if there is one, half each."""

        def __init__(self, channels, growth, factors, n_out):
            super().__init__()
            self.first = len(factors) - n_out
            self.paths = nn.ModuleList()
            for s in range(self.first, len(factors)):
                sources = factors[max(s - 1, 0): s + 1]
                c_out = growth * factors[s] // len(sources)
                self.paths.append(nn.ModuleList(
                    self.path(channels * f, c_out, f, stride=1 if f == factors[s] else 2) for f in sources))

        @staticmethod
        def path(c_in, c_out, bottleneck, stride):
            mid = min(c_in, bottleneck * c_out)
            return nn.Sequential(Conv2dNormActivation(c_in, mid, 1), Conv2dNormActivation(mid, c_out, 3, stride))

        def forward(self, maps):
            out = []
            for s, paths in enumerate(self.paths, start=self.first):
                new = paths and [path(x) for path, x in zip(paths, maps[max(s - 1, 0): s + 1])]
                out.append(new and torch.cat([maps[s], *new], dim=1))           # None in an extracted exit: not read
            return out

    class Transition(nn.Module):
        """Halve the channels of every scale by 1x1 convolutions."""

        def __init__(self, channels, factors):
            super().__init__()
            self.convs = nn.ModuleList(Conv2dNormActivation(channels * f, channels // 2 * f, 1) for f in factors)

        def forward(self, maps):
            return [conv and conv(x) for conv, x in zip(self.convs, maps)]

    class Exit(nn.Module):
        """One exit alone: image (N, 3, 32, 32) -> logits (N, C)."""

        def __init__(self, parts, head):
            super().__init__()
            self.parts, self.head = nn.Sequential(*parts), head

        def forward(self, x):
            return self.head(self.parts(x)[-1])

    def __init__(self, num_classes=100, exits=7, base=4, step=2, step_mode="even", channels=16, growth=6,
                 gradient_equilibrium=False):
        super().__init__()
        sizes = {"num_classes": num_classes, "exits": exits, "base": base, "step": step, "channels": channels,
                 "growth": growth}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if step_mode not in ("even", "lin_grow"):
            raise ValueError(f"step_mode must be 'even' or 'lin_grow', got {step_mode!r}")

        self.gradient_equilibrium = gradient_equilibrium
        depths = [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, exits)]
        interval = math.ceil(sum(depths) / len(self.FACTORS))      # layers between two scale reductions
        factors, n, layers_before = self.FACTORS, channels, 0
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleList()
        for k, depth in enumerate(depths):
            block = [self.Stem(n, factors)] if k == 0 else []
            for layer in range(layers_before, layers_before + depth):
                n_out = len(self.FACTORS) - layer // interval
                block.append(self.Layer(n, growth, factors, n_out))
                n += growth
                if n_out < len(factors):
                    factors = factors[-n_out:]
                    block.append(self.Transition(n, factors))
                    n //= 2
            layers_before += depth
            self.blocks.append(nn.Sequential(*block))
            self.heads.append(nn.Sequential(                       # 8x8 -> 4x4 -> 2x2 -> 1x1 pixels
                Conv2dNormActivation(n * factors[-1], 128, 3, stride=2), Conv2dNormActivation(128, 128, 3, stride=2),
                nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, num_classes)))

    @staticmethod
    def check_images(x):
        """TypeError unless x is a floating-point tensor (N, 3, 32, 32)."""
        if not torch.is_tensor(x) or not x.is_floating_point() or x.shape[1:] != (3, 32, 32):
            raise TypeError(f"x must be a floating-point tensor (N, 3, 32, 32), got {getattr(x, 'dtype', type(x))} "
                            f"{tuple(getattr(x, 'shape', ()))}")

    def forward(self, x):
        """x: (N, 3, 32, 32) -> list of K logits (N, num_classes), exit 1 first."""
        self.check_images(x)
        logits = []
        for following, block, head in zip(reversed(range(len(self.heads))), self.blocks, self.heads):
            x = block(x)                                           # maps, finest scale first
            read = x[-1]
            if self.gradient_equilibrium and self.training:
                read = self.scale_gradient(read, 1 / (following + 1))
                x = [self.scale_gradient(m, following / (following + 1)) for m in x]
            logits.append(head(read))
        return logits

    @staticmethod
    def scale_gradient(x, factor):
        """x of any shape, unchanged; the gradient that comes back through it is multiplied by factor, 0 to 1."""
        return torch.lerp(x.detach(), x, factor)

    def extract(self, k):
        """Exit k = 1 ... K as a module of its own, in eval mode: (N, 3, 32, 32) -> logits (N, num_classes). It holds
        copies of what it needs and nothing else, and evaluates lazily (Huang et al., ICLR 2018): the finer scales that
        nothing reads any more before the exit are not computed."""
        if not isinstance(k, int) or not 1 <= k <= len(self.heads):
            raise ValueError(f"k must be a whole number from 1 to {len(self.heads)}, got {k!r}")
        parts, needed = [], {-1}                     # scales that are read later: -1 is the coarsest, -2 the next finer
        for part in reversed([part for block in self.blocks[:k] for part in block]):
            part = copy.deepcopy(part)
            if isinstance(part, self.Layer):
                part.paths = self.keep(part.paths, needed)
                needed = needed | {s - 1 for s in needed}
            elif isinstance(part, self.Transition):
                part.convs = self.keep(part.convs, needed)
            parts.insert(0, part)
        return self.Exit(parts, copy.deepcopy(self.heads[k - 1])).eval()

    @staticmethod
    def keep(modules, needed):
        """The modules of the scales that are needed, None in the place of the others."""
        return nn.ModuleList(m if s - len(modules) in needed else None for s, m in enumerate(modules))

    def sub_models(self):
        """The exits, exit 1 first, each with its name, macs and params: what it takes to get the answer of that exit
        and no other (the blocks up to it and its own head), as multiply-accumulates of convolutions and linear layers
        for one 3x32x32 image, and parameters including BatchNorm's gamma and beta."""
        subs, blocks_macs, blocks_params = [], 0, 0
        for k, (block, head, macs) in enumerate(zip(self.blocks, self.heads, self._macs()), start=1):
            blocks_macs += macs[0]
            blocks_params += sum(p.numel() for p in block.parameters())
            subs.append(SimpleNamespace(name=f"exit-{k}", macs=blocks_macs + macs[1],
                                        params=blocks_params + sum(p.numel() for p in head.parameters())))
        return subs

    def early_exit_macs(self):
        """MACs until the answer of each exit when all heads on the way are asked, exit 1 first: list of K."""
        return list(itertools.accumulate(block + head for block, head in self._macs()))

    def _macs(self):
        """MACs of each block and of its head."""
        model, x, macs = copy.deepcopy(self).to("meta").eval(), torch.empty(1, 3, 32, 32, device="meta"), []
        for block, head in zip(model.blocks, model.heads):                                     # shapes alone
            with FlopCounterMode(display=False) as block_flops:
                x = block(x)
            with FlopCounterMode(display=False) as head_flops:
                head(x[-1])
            macs.append((block_flops.get_total_flops() // 2, head_flops.get_total_flops() // 2))
        return macs

    def training_passes(self, draw_widths):
        """The forward passes of one training step, each as (names, x -> list of logits): one pass gives every exit."""
        return [([f"exit-{k}" for k in range(1, len(self.heads) + 1)], self)]

    def calibrate(self, batches):
        """Nothing to do: the BatchNorm statistics are tracked in training."""


# ====================================================================================================================
# Sub-models in use: extraction, early exit
# ====================================================================================================================


def extract(model, which):
    """A sub-model as a plain nn.Module with its own copy of the weights, in eval mode: (N, 3, 32, 32) -> logits (N, C),
    the same as inside the model, by no work that they do not need.

    Args:
        model: MSDNet or SlimmableMobileNetV1.
        which: k = 1 (smallest) ... K as an int; of a slimmable network also a width as a float. A universal one must
            have been calibrated at that width.
    Raises:
        TypeError: a model that is no flexible network.
        ValueError: a sub-model that there is not.
    """
    if not hasattr(model, "extract"):
        raise TypeError(f"extract needs an MSDNet or a SlimmableMobileNetV1, got {type(model).__name__}")
    if not isinstance(which, (int, float)):
        raise ValueError(f"k must be a whole number, or a width, got {which!r}")
    return model.extract(which)


def fold_bn(model):
    """Merge every BatchNorm of an extracted sub-model, or of a whole MSDNet, into the convolution before it, in place;
    returns the model, whose logits stay the same up to rounding. ValueError for a slimmable network, whose BatchNorms
    cannot be merged for all widths at once, for a model of other layers, and in training mode, where BatchNorm is no
    fixed map."""
    layers = [module for module in model.modules() if isinstance(module, Conv2dNormActivation)]
    if model.training or not layers:
        raise ValueError(f"fold_bn needs an extracted sub-model in eval mode, got {type(model).__name__} in "
                         f"{'training' if model.training else 'eval'} mode")
    for module in layers:
        if isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
    return model


@torch.no_grad()
def early_exit(model, images, thresholds):
    """Classify images by an MSDNet, each by the first exit that is sure enough: only the others enter the next block
    (Huang et al., ICLR 2018, section 4.2).

    Args:
        model: MSDNet in eval mode.
        images: floating-point (N, 3, 32, 32), normalised.
        thresholds: K numbers; an image leaves at the first exit whose largest softmax output is at least its threshold,
            and at the last in any case.
    Returns:
        predictions (N,) int64, and exits (N,) int64: the exit that each image took, 1 ... K.
    Raises:
        TypeError: another model, or images that are not such a tensor.
        ValueError: a model in training mode, not K thresholds, or a NaN among them.
    """
    if not isinstance(model, MSDNet):
        raise TypeError(f"early_exit needs an MSDNet, got {type(model).__name__}")
    if model.training or len(thresholds) != len(model.heads) or any(math.isnan(t) for t in thresholds):
        raise ValueError(f"need a model in eval mode and {len(model.heads)} thresholds, got "
                         f"{'training' if model.training else 'eval'} mode and thresholds {list(thresholds)}")
    model.check_images(images)
    predictions, exits = torch.zeros(2, len(images), dtype=torch.int64, device=images.device)
    x, left = images, torch.arange(len(images), device=images.device)            # left: whom the rows of x belong to
    for k, (block, head, threshold) in enumerate(zip(model.blocks, model.heads, thresholds), start=1):
        x = block(x)
        confidence, prediction = head(x[-1]).softmax(dim=1).max(dim=1)
        done = (confidence >= threshold) | (k == len(thresholds))
        predictions[left[done]], exits[left[done]] = prediction[done], k
        if done.all():
            break
        if done.any():
            left, x = left[~done], [m[~done] for m in x]
    return predictions, exits


def exit_thresholds(confidence, shares):
    """Thresholds for early_exit by which given shares of the images leave at each exit (Huang et al., ICLR 2018,
    section 4.2).

    Args:
        confidence: (K, N), largest softmax output of each exit on N held-out images.
        shares: K numbers that sum to 1.
    Returns:
        List of K floats, 2 where nobody leaves, the last one 0. Equal confidences leave together, more than asked for.
    Raises:
        ValueError: shares that are not K numbers from 0 to 1 with the sum 1.
    """
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


# ====================================================================================================================
# Files, devices, processes
# ====================================================================================================================


class InputError(Exception):
    """Something that the user gave is wrong: reported as one line, exit status 2."""


def one_line(error):
    """Message of an exception without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def replace_file(path, content, keep=None):
    """Get these bytes onto the disk and put them in place in one step: never half a file, whenever the process is
    killed. keep: a path for what was there before. Only the first of several processes writes. InputError when the disk
    is full."""
    if process_rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write '{path}' ({one_line(error)[:200]})") from error


def write_json(path, content):
    """Write JSON in one step."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def append_line(path, line):
    """Add a line to a file, in one step."""
    before = path.read_bytes() if path.exists() else b""
    replace_file(path, before + (line + "\n").encode())


@contextlib.contextmanager
def locked(out):
    """Keep the directory for this process; InputError when another one has it. Nothing where the system cannot, and
    for all but the first of several processes that train together."""
    try:
        import fcntl
    except ImportError:
        fcntl = None
    if not fcntl or process_rank():
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out '{out}' is in use by another process: wait for it, or choose another") from error
        except OSError:                              # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def pick_device(name):
    """torch.device of --device, made sure of."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and process_count() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.ones(1, device=device, dtype=torch.float64).item()      # in which evaluation adds up
    except Exception as error:              # unknown, absent, or unable to compute: torch raises many types
        raise InputError(f"--device {name} cannot be used here ({one_line(error)[:200]})") from error
    if device.type == "cuda":               # TF32 for matrix products as for convolutions, the fastest convolution
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device


def pick_amp(name, device):
    """What --amp means on this device: "off", "bf16" or "fp16"."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def join_processes():
    """Join the other processes that torchrun started: by NCCL for CUDA tensors, by gloo for those on the CPU. Alone,
    nothing happens. InputError when they cannot be found."""
    if int(os.environ.get("WORLD_SIZE", 1)) > process_count():
        try:
            dist.init_process_group()
        except (ValueError, RuntimeError) as error:
            raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the other processes cannot be joined "
                             f"({one_line(error)[:100]}): start them by torchrun") from error


def process_count():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank():
    """Number of this process among them, from 0, the one that writes."""
    return dist.get_rank() if process_count() > 1 else 0


def collectively(operation, *args):
    """Do an operation of torch.distributed with the other processes, if any; exit when one of them is gone."""
    if process_count() > 1:
        try:
            operation(*args)
        except RuntimeError as error:
            print(f"ipkd_ta.py: error: another process is gone ({one_line(error)[:100]}); mend what it told of, if it "
                  "did; a run that had begun goes on with --resume", file=sys.stderr)
            raise SystemExit(1) from error


def keep_freed_memory(keep=True):
    """Have glibc keep freed memory instead of giving it back to the system: every step needs the same amounts again.
    keep=False: give back what is free, and go on as glibc does unasked."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0 if keep else 65536)                   # M_MMAP_MAX: separate mappings for large blocks
            libc.mallopt(-1, 2**31 - 1 if keep else 64 * 2**20)      # M_TRIM_THRESHOLD: free heap to keep
            if not keep:
                libc.mallopt(-3, 32 * 2**20)                         # M_MMAP_THRESHOLD: where glibc's own tuning ends
                libc.malloc_trim(0)
        except (OSError, AttributeError):   # another C library
            pass


class Progress:
    """One live line on stderr with the share done and the time left; nothing when stderr is not a terminal. begun: the
    share that was done before."""

    def __init__(self, begun):
        self.begun, self.shown = begun, time.perf_counter()
        self.start = self.shown
        self.live = sys.stderr.isatty()

    def __call__(self, share):
        now = time.perf_counter()
        if self.live and now - self.shown > 0.2:
            self.shown, left = now, (now - self.start) * (1 - share) / (share - self.begun)
            left = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
            print(f"\r\x1b[K{share:6.1%} done, {left} left", end="", file=sys.stderr, flush=True)

    def clear(self):
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ====================================================================================================================
# Data: every split is one uint8 tensor on the training device
# ====================================================================================================================

DATASETS = ("shapes", "cifar10", "cifar100", "folder")
CIFAR_STATISTICS = {"cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
                    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}      # mean, std of R, G, B


@dataclass
class Data:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of the training and the test split, and of the validation split
    held out from the training images; mean and standard deviation (3,) of each channel, of pixels scaled to [0, 1]."""
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    mean: torch.Tensor = None
    std: torch.Tensor = None
    val_images: torch.Tensor = None
    val_labels: torch.Tensor = None
    memory_format: torch.memory_format = torch.channels_last

    def to(self, device, memory_format=torch.channels_last):
        """On this device, to be normalised into this memory format."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors, memory_format=memory_format)

    def normalise(self, images):
        """uint8 (N, 3, H, W) -> float32 of about zero mean and unit variance."""
        x = images.contiguous(memory_format=self.memory_format)
        return (x / 255 - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)


def augment(images, generator):
    """CIFAR augmentation of a batch (N, 3, H, W): zero-pad by 4 pixels, crop at random, flip half of the images.

    generator: CPU torch.Generator, so that the draws are the same on every device.
    """
    n, _, height, width = images.shape
    draw = lambda high: torch.randint(high, (n,), generator=generator).to(images.device, non_blocking=True)
    windows = F.pad(images, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)      # views (N, 3, 9, 9, H, W)
    crops = windows[torch.arange(n, device=images.device), :, draw(9), draw(9)]
    return torch.where(draw(2).bool().view(n, 1, 1, 1), crops.flip(3), crops)


def load_data(dataset, data_dir, train_size=None, val_size=0):
    """The Data of one of DATASETS, with its mean and std.

    train_size: keep that many training images; val_size: hold out that many others of them as validation images. Both
    are drawn once and for all, the same for every seed.
    Raises InputError when the files are missing, unreadable or too few.
    """
    if dataset == "shapes":
        data = load_shapes((train_size or SHAPES_TRAIN) + val_size)
    elif dataset == "folder":
        data = load_folder(Path(data_dir))
    else:
        data = load_cifar(dataset, data_dir)
    available = len(data.train_images)
    wanted = (train_size or max(1, available - val_size)) + val_size
    if wanted > available:
        raise InputError(f"{wanted} training images were asked for{', --val-size included' if val_size else ''}, and "
                         f"{dataset} has {available}")
    if wanted < available or val_size:
        drawn = torch.randperm(available, generator=torch.Generator().manual_seed(0))
        train, val = drawn[:wanted - val_size], drawn[available - val_size:]
        data = replace(data, train_images=data.train_images[train], train_labels=data.train_labels[train],
                       val_images=data.train_images[val], val_labels=data.train_labels[val])
    mean, std = CIFAR_STATISTICS.get(dataset) or measure_statistics(data.train_images)
    return replace(data, mean=torch.tensor(mean), std=torch.tensor(std))


def measure_statistics(images):
    """Mean and standard deviation of each channel of uint8 (N, 3, H, W), as two tuples on the scale of [0, 1]."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).sqrt().clamp_min(1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def load_cifar(name, data_dir):
    """CIFAR-10 or CIFAR-100 in its Python form, by torchvision: downloaded to data_dir on first use, md5-checked."""
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        try:
            splits = [cls(data_dir, train=train) for train in (True, False)]
        except RuntimeError:                        # not there or damaged
            splits = [cls(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name} is not in '{data_dir}' and could not be downloaded ({one_line(error)}): put "
                         f"{cls.filename} there, from https://www.cs.toronto.edu/~kriz/cifar.html") from error
    (train_images, train_labels), (test_images, test_labels) = (
        (torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in splits)
    return Data(train_images, train_labels, test_images, test_labels, splits[0].classes)


def load_folder(root):
    """Images of any format and size that Pillow reads, as root/train/<class>/* and root/test/<class>/* (or val),
    converted to RGB and resized to 32x32. Names that begin with a dot do not count."""
    listed = []
    for split in (root / "train", root / ("test" if (root / "test").is_dir() else "val")):
        if not split.is_dir():
            raise InputError(f"--data-dir '{root}' has no folder '{split.name}': expected {root}/train/<class>/* and "
                             f"{root}/test/<class>/* (or val)")
        folders = [path for path in visible(split) if path.is_dir()]
        listed.append(([folder.name for folder in folders],
                       [(path, label) for label, folder in enumerate(folders) for path in visible(folder)]))
    (classes, train_files), (test_classes, test_files) = listed
    if classes != test_classes or not classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise InputError(f"'{root}' must have the same class folders in both splits: only one has {odd or 'no class'}")
    return Data(*read_images(train_files), *read_images(test_files), classes)


def visible(directory):
    """Sorted paths of what a directory holds, but for names that begin with a dot; InputError when that is nothing."""
    paths = sorted(path for path in directory.iterdir() if path.name[0] != ".")
    if not paths:
        raise InputError(f"'{directory}' is empty: expected <class>/* with images")
    return paths


def read_images(files):
    """The images of these (path, label), as (N, 3, 32, 32) uint8, and the labels (N,)."""
    pixels = torch.empty(len(files), 3, 32, 32, dtype=torch.uint8)
    for i, (path, _) in enumerate(files):
        try:
            pixels[i] = transforms.functional.pil_to_tensor(read_image(path))
        except Exception as error:                  # Pillow's decoders raise many types
            raise InputError(f"cannot decode image '{path}' ({one_line(error)}): mend or remove it") from error
    return pixels, torch.tensor([label for _, label in files])


def read_image(path):
    """The (first) image of a file as Pillow's RGB image of 32x32 pixels."""
    if not path.is_file():                          # a folder, a pipe, a link to nowhere or to itself
        raise ValueError("not a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torchvision.datasets.folder.Image.open(path) as image:
            if image.mode == "I;16":                # Pillow would clip at 255
                image = image.point(lambda value: value * (1 / 257))
            elif image.mode[0] in "IF":
                raise ValueError(f"the range of pixels of mode {image.mode} is unknown")
            image = image.convert("RGB")
    return image.resize((32, 32))


SHAPES_TRAIN, SHAPES_TEST, SHAPES_CONTRAST, SHAPES_NOISE = 1500, 1000, 0.5, 0.1
SHAPES = {      # points, radius of the notches between them (the points are at 1), direction of the first point
    "triangle": (3, 0.5, -90), "inverted triangle": (3, 0.5, 90), "square": (4, 0.7071, 45), "diamond": (4, 0.7071, 0),
    "hexagon": (6, 0.866, 0), "disc": (64, 1, 0), "plus": (4, 0.35, 0), "cross": (4, 0.35, 45),
    "5-star": (5, 0.45, -90), "8-star": (8, 0.5, 0)}


def draw_shapes(n, generator):
    """n images (n, 3, 32, 32) uint8 of the ten SHAPES in equal numbers, and their labels (n,): a shape of random size,
    place, tilt and colour on a darker ground, both blotched, under noise."""
    uniform = lambda low, high, *size: low + (high - low) * torch.rand(*size, generator=generator)
    labels = (torch.arange(n) % len(SHAPES))[torch.randperm(n, generator=generator)]
    points, notch, direction = torch.tensor(list(SHAPES.values()))[labels].T[:, :, None, None]      # each (n, 1, 1)
    pixel = torch.arange(32) - 15.5
    x, y = pixel[None, :] - uniform(-2, 2, n, 1, 1), pixel[:, None] - uniform(-2, 2, n, 1, 1)       # (n, 32, 32)
    sector = math.pi / points                                  # angle from a point to the next notch
    angle = torch.atan2(y, x) - direction.deg2rad() + uniform(-0.2, 0.2, n, 1, 1)
    angle = sector - (angle.remainder(2 * sector) - sector).abs()           # folded: 0 at a point, `sector` at a notch
    straight = notch * sector.sin()                            # the edge is a straight line from a point to a notch
    edge = straight / (straight * angle.cos() + (1 - notch * sector.cos()) * angle.sin())
    inside = torch.sigmoid(2 * (uniform(8, 13, n, 1, 1) * edge - torch.hypot(x, y)))[:, None]       # soft outline
    blotches = F.interpolate(uniform(-0.2, 0.2, n, 3, 5, 5), size=32, mode="bicubic")
    ground = uniform(0, 1 - SHAPES_CONTRAST, n, 3, 1, 1)
    noise = SHAPES_NOISE * torch.randn(n, 3, 32, 32, generator=generator)
    images = ground + SHAPES_CONTRAST * inside + blotches + noise
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def load_shapes(train_size):
    """`train_size` training and SHAPES_TEST test images by draw_shapes, the same at every call."""
    (train_images, train_labels), (test_images, test_labels) = (
        draw_shapes(n, torch.Generator().manual_seed(seed)) for seed, n in enumerate((train_size, SHAPES_TEST)))
    return Data(train_images, train_labels, test_images, test_labels, list(SHAPES))


# ====================================================================================================================
# Training
# ====================================================================================================================

METHODS = ("ce", "ipkd", "ipkd-ta", "ipkd-mean")
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Family:
    """A network class and how it is trained unless told otherwise."""
    network: type
    cpu_format: torch.memory_format      # a fast one on a CPU; a GPU's is channels-last
    decay_all: bool      # weight decay on every parameter, or only on weights of full convolutions and linear layers
    options: dict        # defaults of its own
    shapes: dict         # what differs on the built-in shapes: small networks, briefly trained


FAMILIES = {
    "msdnet": Family(
        MSDNet, torch.contiguous_format, True, dict(epochs=300, schedule="multistep", kd_weight=0.5, lr_warmup=0.05),
        dict(epochs=3, batch_size=32, schedule="cosine", exits=4, base=1, step=1, step_mode="lin_grow", channels=8,
             growth=4)),
    "slimmable": Family(
        SlimmableMobileNetV1, torch.channels_last, False,
        dict(epochs=200, schedule="cosine", kd_weight=0.5, lr_warmup=0.3),
        dict(epochs=5, batch_size=16, lr=0.03, widths=(0.125, 0.25, 0.375, 0.5))),
}


def model_options(network):
    """The keyword arguments of a network class that are options of the command line, and their defaults."""
    parameters = inspect.signature(network).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "num_classes"}


def build_model(cfg, num_classes):
    """The network that the options describe; InputError when they do not fit each other."""
    network = FAMILIES[cfg.arch].network
    try:
        return network(num_classes, **{name: getattr(cfg, name) for name in model_options(network)})
    except (ValueError, RuntimeError, OverflowError) as error:         # wrong, or too large for any memory
        raise InputError(f"--arch {cfg.arch}: {one_line(error)[:200]}") from error


def memory_format(arch, device):
    """How images and weights of this architecture lie in the memory of this device."""
    return FAMILIES[arch].cpu_format if device.type == "cpu" else torch.channels_last


def lr_factor(schedule, progress):
    """Learning rate relative to its start, after this share of the training: progress in [0, 1)."""
    if schedule == "multistep":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress


def ramp(progress, share):
    """From 0 to 1 over this share of the training, then 1."""
    return min(1, progress / share) if share else 1


def parameter_groups(model, cfg):
    """The parameters for SGD, with weight decay and without: BatchNorm's, biases and depthwise weights, where the family
    decays not all (as in slimmable_networks)."""
    decay_all, groups = FAMILIES[cfg.arch].decay_all, ([], [])
    for p in model.parameters():
        groups[decay_all or p.ndim > 1 and p.shape[1] > 1].append(p)
    return [{"params": params, "weight_decay": decay}
            for params, decay in zip(groups, (0.0, cfg.weight_decay)) if params]


def train_step(model, images, labels, cfg, kd_weight, scaler, generator):
    """Gradients of the loss for one batch, added to the parameters'; returns the loss, and the cross-entropy of each
    sub-model by name, which tells where a loss that is not finite came from.

    Only one pass's activations are alive at a time: the newest logits meet those of the larger sub-models, which carry
    no gradient any more, so each backward adds what its own sub-models contribute to L, and the last loss is all of L.
    """
    known, parts = [], {}
    for names, forward in model.training_passes(lambda low, high: sandwich_widths(cfg.sandwich, low, high, generator)):
        with torch.autocast(images.device.type, AMP_TYPES.get(cfg.amp), enabled=cfg.amp in AMP_TYPES):
            logits = forward(images)
        loss = ipkd_ta_loss(logits + known, labels, cfg.method, kd_weight, cfg.temperature)
        scaler.scale(loss).backward()
        logits = [z.detach() for z in logits]
        parts.update({name: F.cross_entropy(z.float(), labels) for name, z in zip(names, logits)})
        known = logits + known
    return loss.detach(), parts


def merge_gradients(model, loss, share):
    """Replace the gradients and the loss by their sum over all processes, each times the process's share of the batch.
    One message a step: DistributedDataParallel would send one for each pass, and wants all weights in the last one."""
    parts = [*(p.grad for p in model.parameters() if p.grad is not None), loss]
    flat = torch.cat([part.flatten() for part in parts]) * share
    collectively(dist.all_reduce, flat)
    for part, merged in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(merged.view_as(part))


class Trainer:
    """SGD on a model and the training images of `data`, and how far it has come: in epochs, and steps of this one."""

    def __init__(self, model, data, cfg):
        device = data.train_images.device
        self.model, self.data, self.cfg = model, data, cfg
        self.draws = torch.Generator().manual_seed(cfg.seed)                   # order of the images, widths
        self.crops = torch.Generator().manual_seed(cfg.seed)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
        self.optimizer = torch.optim.SGD(      # fused, its momentum stays unset when the scaler skips the first step
            parameter_groups(model, cfg), lr=cfg.lr, momentum=0.9, nesterov=True, fused=cfg.amp != "fp16")
        self.epoch = self.steps = self.lr = self.kd_weight = 0
        self.order = self.loss_sum = None
        self.unchecked = []             # steps since the last check: their number, learning rate, loss and its parts

    def state(self):
        """All of it but the model, for `load`: a trainer that loaded it goes on with the same bits."""
        return {"epoch": self.epoch, "steps": self.steps, "lr": self.lr, "kd_weight": self.kd_weight,
                "order": self.order, "loss_sum": self.loss_sum, "draws": self.draws.get_state(),
                "crops": self.crops.get_state(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load(self, state):
        """Go on from what `state` gave."""
        device = self.data.train_images.device
        for name in ("epoch", "steps", "lr", "kd_weight"):
            setattr(self, name, state[name])
        self.order, self.loss_sum = (x if x is None else x.to(device) for x in (state["order"], state["loss_sum"]))
        self.draws.set_state(state["draws"])
        self.crops.set_state(state["crops"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def step(self, batch, progress):
        """One step on the images of these indices, after this share of the training; returns the loss, not waiting
        for the device."""
        cfg, data = self.cfg, self.data
        self.lr = cfg.lr * lr_factor(cfg.schedule, progress) * ramp(progress, cfg.lr_warmup)
        self.kd_weight = cfg.kd_weight * ramp(progress, cfg.kd_warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr                           # of progress alone: no scheduler object
        images, labels = augment(data.train_images[batch], self.crops), data.train_labels[batch]
        processes = process_count()
        share = 1 / processes
        if len(batch) >= processes:              # every process draws for the whole batch, and computes its part of it
            images, labels = images[process_rank()::processes], labels[process_rank()::processes]
            share = len(labels) / len(batch)
        loss, parts = train_step(self.model, data.normalise(images), labels, cfg, self.kd_weight, self.scaler,
                                 self.draws)
        if processes > 1:
            merge_gradients(self.model, loss, share)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.unchecked.append((self.steps + 1, self.lr, loss, parts))
        return loss

    def check(self):
        """Wait for the device; InputError when a loss of this epoch was not finite."""
        if not math.isfinite(self.loss_sum.item()):
            step, lr, _, parts = next((s for s in self.unchecked if not s[2].isfinite()), self.unchecked[-1])
            bad = [name for name, part in parts.items() if not part.isfinite()]      # none: in another process
            of = f" of {', '.join(bad)}" if bad else ""
            raise diverged(f"in step {step} of epoch {self.epoch + 1}, at learning rate {lr:.4g}, the loss{of} is not "
                           "finite", self.cfg)
        self.unchecked.clear()


def diverged(what, cfg):
    """The InputError of a training that came to nothing."""
    return InputError(f"diverged: {what}; try a lower --lr than {cfg.lr}")


def train(trainer, tick):
    """Train from where the trainer is to the end; after each epoch yield its record (epoch, lr and kd_weight of the
    last step, mean loss) and its images per second. tick(share): called after every step with the share of the
    training done."""
    model, cfg, n = trainer.model, trainer.cfg, len(trainer.data.train_images)
    device = trainer.data.train_images.device
    while trainer.epoch < cfg.epochs:
        model.train()
        if trainer.steps == 0:
            trainer.order = torch.randperm(n, generator=trainer.draws).to(device)
            trainer.loss_sum = torch.zeros((), device=device)
        # Whole batches only: a step on a few images would count like a full one, with BatchNorm statistics of a few.
        # Other images are left out in each epoch.
        batches = trainer.order[:max(n // cfg.batch_size, 1) * cfg.batch_size].split(cfg.batch_size)
        start, images = time.perf_counter(), 0
        for batch in batches[trainer.steps:]:
            progress = (trainer.epoch + (trainer.steps + 0.5) / len(batches)) / cfg.epochs      # in mid-step
            trainer.loss_sum += trainer.step(batch, progress) * len(batch)
            trainer.steps, images = trainer.steps + 1, images + len(batch)
            if device.type == "cpu":
                trainer.check()                        # there is nothing to wait for
            tick(progress)
        trainer.check()                                # waits for the device: the clock stops after the last step
        speed = images / (time.perf_counter() - start)
        trainer.epoch, trainer.steps, loss = trainer.epoch + 1, 0, trainer.loss_sum.item() / sum(map(len, batches))
        yield {"epoch": trainer.epoch, "lr": trainer.lr, "kd_weight": trainer.kd_weight, "loss": loss}, speed


def compile_model(model, device):
    """Have torch.compile make the model's training passes, at its first step, on a GPU as CUDA graphs; tells and leaves
    the model as it is where that cannot work."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:              # no C++ compiler, no Triton: torch raises many types
        print(f"--compile does not work here, going on without ({one_line(error)[:200]})", file=sys.stderr)
        return
    # A CUDA graph's gradients lie in its own memory: they hold for one step, and none may be accumulated over several.
    model.compile(mode="reduce-overhead" if device.type == "cuda" else "default")


# ====================================================================================================================
# Evaluation and report
# ====================================================================================================================


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def evaluate(model, data, split="test", batch_size=250):
    """Accuracy of every sub-model on the "test" or "val" images, smallest first, without mixed precision: list of
    {"top1", "top5" in percent, "loss": mean cross-entropy}."""
    totals = 0
    for logits, labels in all_logits(model, data, split, batch_size, process_rank(), process_count()):
        hits = logits.topk(min(5, logits.shape[2])).indices == labels[:, None]             # (K, N, 5)
        loss = -logits.log_softmax(2)[:, torch.arange(len(labels)), labels]                # (K, N)
        totals += torch.stack([hits[:, :, 0].sum(1), hits.any(2).sum(1), loss.sum(1)]).double()
    collectively(dist.all_reduce, totals)
    means = (totals / len(getattr(data, f"{split}_images"))).T.tolist()
    return [{"top1": 100 * top1, "top5": 100 * top5, "loss": loss} for top1, top5, loss in means]


def all_logits(model, data, split, batch_size=250, first=0, stride=1):
    """For each batch of the "test" or "val" images, or of a part of them: logits (K, N, C) of every sub-model, smallest
    first, and labels."""
    predict = model.eval()
    if isinstance(model, SlimmableMobileNetV1):          # each width as it would be shipped: faster
        subs = [fold_bn(extract(model, k)) for k in range(1, len(model.widths) + 1)]
        predict = lambda x: [sub(x) for sub in subs]
    images, labels = (getattr(data, f"{split}_{what}")[first::stride] for what in ("images", "labels"))
    for batch, batch_labels in zip(images.split(batch_size), labels.split(batch_size)):
        yield torch.stack(predict(data.normalise(batch))), batch_labels


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def budgeted(model, data):
    """Budgeted batch classification by an MSDNet (Huang et al., ICLR 2018, section 4.2): the test accuracy of
    early_exit for a sweep of budgets, its thresholds found on the validation images.

    Returns:
        {"budgets": list of {"q", "macs", "top1", "thresholds", "exits"}: exit k is meant for a share of the images
        proportional to q^k and takes the share exits[k - 1]; "anytime": list of {"name", "macs", "top1"}, all images by
        one exit}. macs: average for one image, all heads up to the exit taken counted; top1 in percent.
    """
    answers = {}
    for split in ("val", "test"):
        batches = [(*logits.softmax(2).max(2), labels) for logits, labels in all_logits(model, data, split)]
        answers[split] = (torch.cat([confidence for confidence, _, _ in batches], dim=1),                 # (K, N)
                          torch.cat([answer == labels for _, answer, labels in batches], dim=1).double())
    confidence, correct = answers["test"]
    costs, budgets = model.early_exit_macs(), []
    macs = torch.tensor(costs, dtype=torch.float64, device=confidence.device)
    for q in (i / 10 for i in range(1, 21)):
        shares = q ** torch.arange(1, len(costs) + 1, dtype=torch.float64)
        thresholds = exit_thresholds(answers["val"][0], shares / shares.sum())
        sure = confidence >= torch.tensor(thresholds, device=confidence.device)[:, None]
        exits = sure.int().argmax(dim=0)                                              # (N,), the first that is sure
        budgets.append({"q": q, "macs": macs[exits].mean().item(),
                        "top1": 100 * correct.gather(0, exits[None]).mean().item(), "thresholds": thresholds,
                        "exits": (exits.bincount(minlength=len(costs)) / len(exits)).tolist()})
    anytime = [{"name": f"exit-{k}", "macs": cost, "top1": 100 * share} for k, (cost, share) in
               enumerate(zip(costs, correct.mean(dim=1).tolist()), start=1)]
    return {"budgets": budgets, "anytime": anytime}


def calibration_batches(data, images=2048, batch_size=256):
    """Training images for `calibrate`, the same at every call, augmented as in training: the statistics are to be those
    that the weights were trained with."""
    n, generator = len(data.train_images), torch.Generator().manual_seed(0)
    chosen = torch.randperm(n, generator=generator)[:images].to(data.train_images.device)
    return [data.normalise(augment(data.train_images[batch], generator)) for batch in chosen.split(batch_size)]


def results_table(sub_models):
    """The sub-models of a results.json as aligned text."""
    rows = [("sub-model", "MMACs", "params", "top-1 %", "top-5 %", "loss")]
    rows += [(s["name"], f"{s['macs'] / 1e6:.2f}", f"{s['params']:,}", f"{s['top1']:.2f}", f"{s['top5']:.2f}",
              f"{s['loss']:.4f}") for s in sub_models]
    return aligned(rows)


def budget_table(result):
    """What `budgeted` returns as aligned text, cheapest first."""
    rows = [("early exit", "MMACs", "top-1 %", "mean exit")]
    rows += [(f"q = {b['q']:.1f}", f"{b['macs'] / 1e6:.2f}", f"{b['top1']:.2f}",
              f"{sum(k * share for k, share in enumerate(b['exits'], start=1)):.2f}") for b in result["budgets"]]
    rows += [(f"all by {a['name']}", f"{a['macs'] / 1e6:.2f}", f"{a['top1']:.2f}", a["name"][5:])
             for a in result["anytime"]]
    return aligned(rows[:1] + sorted(rows[1:], key=lambda row: float(row[1])))


def aligned(rows):
    """Rows of text cells as lines: the first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
                     for row in rows)


def comparable_runs(directories):
    """Training runs of all results.json below the directories, by setting: {sorted (option, value)s that runs must have
    in common to be compared: {method: {seed: run}}}."""
    settings = {}
    for path in sorted({path.resolve() for d in directories for path in Path(d).rglob("results.json")}):
        run = read_results(path)
        if "evaluated" in run:       # by --eval: no run of its own
            continue
        cfg = run["config"]          # runs may differ in these; whatever else differs makes another setting
        per_run = {"method", "seed", "out", "data_dir", "device", "compile", "checkpoint_every", "eval_every"}
        setting = {k: str(v) for k, v in cfg.items() if k not in per_run}
        setting["dataset"] = run.get("dataset", cfg["dataset"])
        setting["sub-models"] = ", ".join(sub["name"] for sub in run["sub_models"])
        by_method = settings.setdefault(tuple(sorted(setting.items())), {method: {} for method in METHODS})
        twin = by_method[cfg["method"]].setdefault(cfg["seed"], {**run, "path": path})["path"]
        if twin != path:
            raise InputError(f"'{twin}' and '{path}' are runs of the same setting and seed: report on one of them")
    if not settings:
        raise InputError(f"--report: no results.json of a run below {', '.join(map(str, directories))}")
    return {setting: {method: by_seed for method, by_seed in by_method.items() if by_seed}
            for setting, by_method in sorted(settings.items())}


def top1(run, k=None):
    """Test accuracy of sub-model k = 1 ... K in percent, or the mean of all."""
    values = [sub["top1"] for sub in run["sub_models"]]
    return values[k - 1] if k else statistics.mean(values)


def report(settings):
    """`comparable_runs` as Markdown: for each setting a table of the top-1 accuracies, a row for each sub-model and a
    column for each method, as mean ± sample standard deviation over the seeds; then one of the differences between
    "ipkd-ta" and each other method, over the seeds that both have, as mean ± standard error."""
    lines = []
    for setting, by_method in settings.items():
        runs = [run for by_seed in by_method.values() for run in by_seed.values()]
        heading, about = described(setting, settings)
        subs = runs[0]["sub_models"]
        lines += [f"### {heading}", "", f"{about}; top-1 in %", ""]
        rows = [["sub-model", "MMACs", "params", *(counted(m, len(found), "run") for m, found in by_method.items())]]
        for k, sub in enumerate(subs, start=1):
            cells = [mean_and_spread([top1(run, k) for run in found.values()]) for found in by_method.values()]
            rows.append([sub["name"], f"{sub['macs'] / 1e6:.2f}", f"{sub['params']:,}", *cells])
        lines += markdown(rows)

        own = by_method.get("ipkd-ta", {})
        pairs = {m: [(own[seed], found[seed]) for seed in own if seed in found] for m, found in by_method.items()}
        pairs = {m: both for m, both in pairs.items() if both and m != "ipkd-ta"}
        if pairs:
            lines += ["Differences between runs of the same seed, mean ± standard error:", ""]
            rows = [["sub-model", *(counted(f"ipkd-ta − {m}", len(both), "pair") for m, both in pairs.items())]]
            for k, name in [*enumerate((sub["name"] for sub in subs), start=1), (None, "mean of all")]:
                rows.append([name, *(mean_and_spread([top1(a, k) - top1(b, k) for a, b in both], len(both), "+")
                                     for both in pairs.values())])
            lines += markdown(rows)
    return "\n".join(lines)


def described(setting, settings):
    """Heading of one of the settings, and its extent and options, as far as it differs in these from others of the same
    heading."""
    cfg = dict(setting)
    related = [other for other in map(dict, settings) if all(other[k] == cfg[k] for k in ("arch", "dataset"))]
    special = [f"{k} {v}" for k, v in setting if any(other.get(k) != v for other in related)
               and k not in ("epochs", "train_size", "sub-models")]
    extent = f"{cfg['epochs']} epochs of {int(cfg['train_size']):,} images"
    return f"{cfg['arch']} on {cfg['dataset']}", ", ".join([extent, *special])


def counted(what, n, unit):
    """For example "ipkd (3 runs)"."""
    return f"{what} ({n} {unit}{'' if n == 1 else 's'})"


def mean_and_spread(values, n=1, sign=""):
    """Mean ± sample standard deviation / sqrt(n) as text; the mean alone of a single value."""
    spread = f" ± {statistics.stdev(values) / n**0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def markdown(rows):
    """Lines of a Markdown table, with an empty one after it; all columns but the first to the right."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(rows[0]), "|---" + "|---:" * (len(rows[0]) - 1) + "|", *map(line, rows[1:]), ""]


def plot(settings, path):
    """Draw `comparable_runs` into a picture (format by its name: .svg, .png, ...): top-1 accuracy against MACs, a panel
    for each setting, a line for each method, the sample standard deviation over the seeds as bars. InputError without
    matplotlib, and when the format is unknown to it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    styles = {"ce": ("#000000", "o", ":"), "ipkd": ("#E69F00", "s", "--"), "ipkd-ta": ("#0072B2", "^", "-"),
              "ipkd-mean": ("#CC79A7", "D", "-.")}       # colours of Okabe & Ito: the colour-blind tell them apart
    figure = Figure(figsize=(4.5 * len(settings), 3.6), layout="constrained", dpi=200, facecolor="white")
    for axes, (setting, by_method) in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings.items()):
        for i, (method, found) in enumerate(by_method.items()):
            runs = list(found.values())
            subs = runs[0]["sub_models"]
            accuracies = [[top1(run, k) for run in runs] for k in range(1, len(subs) + 1)]
            color, marker, line = styles[method]
            shift = 1 + 0.012 * (i - (len(by_method) - 1) / 2)               # so that bars do not hide each other
            axes.errorbar([sub["macs"] / 1e6 * shift for sub in subs], [statistics.mean(a) for a in accuracies],
                          [statistics.stdev(a) if len(a) > 1 else 0 for a in accuracies], color=color, marker=marker,
                          linestyle=line, markersize=5, capsize=2, label=counted(method, len(runs), "run"))
        heading, about = described(setting, settings)
        axes.set(title=f"{heading}\n{textwrap.fill(about, 50)}",
                 xlabel="cost of the sub-model (million MACs per image)", ylabel="top-1 accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=path.suffix[1:])
    except ValueError as error:                  # a format that is unknown
        raise InputError(f"--plot '{path}': {one_line(error)}") from error
    replace_file(path, picture.getbuffer())


def read_results(path):
    """Content of a results.json; InputError when the file is none."""
    try:
        run, number = json.loads(path.read_text()), (int, float)
        config = {"arch": str, "dataset": str, "method": str, "seed": number, "epochs": number, "train_size": number}
        sub_model = {"name": str, "macs": number, "params": number, "top1": number}
        for part, kinds in ((run["config"], config), *((sub, sub_model) for sub in run["sub_models"])):
            for key, kind in kinds.items():
                if not isinstance(part[key], kind):
                    raise ValueError(f"its {key} is {part[key]!r}")
        if run["config"]["method"] not in METHODS or not run["sub_models"]:
            raise ValueError("it has an unknown method or no sub-models")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"'{path}' is not the results.json of a run ({reason})") from error
    return run


# ====================================================================================================================
# Benchmark: this file's training step against the usual way to write one
# ====================================================================================================================


class UsualImages(torch.utils.data.Dataset):
    """Training images of `data`, each cropped, flipped and normalised on its own by torchvision."""

    def __init__(self, data):
        self.pixels, self.labels = data.train_images.permute(0, 2, 3, 1).cpu().numpy(), data.train_labels.tolist()
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(data.mean.tolist(), data.std.tolist())])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.pixels[i]), self.labels[i]


def usual_steps(model, data, cfg, draws):
    """The baseline: training steps without end, eager, in float32 (on CUDA TF32) and NCHW memory, on the batches of a
    DataLoader, each fetching its loss, which is yielded. draws: CPU generator of the widths."""
    device, scaler = data.train_images.device, torch.amp.GradScaler(enabled=False)
    cfg = SimpleNamespace(**{**vars(cfg), "amp": "off"})
    optimizer = torch.optim.SGD(parameter_groups(model, cfg), lr=cfg.lr, momentum=0.9, nesterov=True)
    while True:
        for images, labels in torch.utils.data.DataLoader(UsualImages(data), cfg.batch_size, shuffle=True):
            loss, _ = train_step(model, images.to(device), labels.to(device), cfg, cfg.kd_weight, scaler, draws)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


def benchmark(cfg, rounds=5, repetitions=2):
    """Print the speed of both training steps on random images. They take turns in this process: in each round both
    train the same sub-models, one step to warm up and `repetitions` by the clock."""
    device, cfg.kd_warmup = pick_device(cfg.device), 0
    cfg.amp = pick_amp(cfg.amp, device)
    torch.manual_seed(cfg.seed)
    images = torch.randint(256, (8 * cfg.batch_size, 3, 32, 32), dtype=torch.uint8)
    half = torch.full((3,), 0.5)
    data = Data(images, torch.arange(len(images)) % 10, None, None, list(range(10)), mean=half, std=half)
    data = data.to(device, memory_format(cfg.arch, device))
    batch = torch.arange(cfg.batch_size, device=device)
    draws = torch.Generator()
    baseline = usual_steps(build_model(cfg, 10).to(device), data, cfg, draws)
    trainer = Trainer(build_model(cfg, 10).to(device, memory_format=data.memory_format), data, cfg)
    contestants = (("baseline", lambda: next(baseline), draws),
                   ("this file", lambda: trainer.step(batch, progress=0.5), trainer.draws))
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None

    def timed(step):
        wait()
        start = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - start

    if cfg.compile:
        compile_model(trainer.model, device)
        seconds = sum(timed(lambda: trainer.step(batch, progress=0.5)) for _ in range(2))
        print(f"compiling, with two steps: {seconds:.0f} s", flush=True)
    seconds, memory, flops, rates = {}, {}, [], {}
    for r in range(rounds):
        for name, step, generator in contestants:
            keep_freed_memory(name == "this file")
            reset_peak_memory(device)
            for i in range(1 + repetitions):
                generator.manual_seed(r)
                if i:
                    seconds.setdefault(name, []).append(timed(step))
                elif name == "baseline":
                    with FlopCounterMode(display=False) as counter:
                        step()
                    flops += [counter.get_total_flops()] * repetitions
                else:
                    step()
            memory[name] = max(memory.get(name, 0), peak_memory(device))
        for kind, rate in matrix_product_rates(device, timed).items():
            rates.setdefault(kind, []).append(rate)

    print(speed_table(cfg.batch_size, seconds, memory, flops, rates))


def speed_table(batch_size, seconds, memory, flops, rates):
    """What the benchmark found, as aligned text. Of each training step, baseline first: seconds (list), peak bytes; of
    each number format: GFLOP/s of matrix products (list). flops: those of each timed step."""
    rates = {kind: statistics.median(values) for kind, values in rates.items()}
    rows = [["training step", "images/s", "min-max", "ms", "peak MiB", "GFLOP/s", *(f"of {kind}" for kind in rates)]]
    for name, times in seconds.items():
        speed, rate = [batch_size / t for t in times], statistics.median(f / t for f, t in zip(flops, times)) / 1e9
        rows.append([name, f"{statistics.median(speed):.1f}", f"{min(speed):.1f}-{max(speed):.1f}",
                     f"{1e3 * statistics.median(times):.0f}", f"{memory[name] / 2**20:.0f}", f"{rate:.1f}",
                     *(f"{rate / top:.1%}" for top in rates.values())])
    products = ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in rates.items())
    baseline, own = (statistics.median(times) for times in seconds.values())
    return f"{aligned(rows)}\nmatrix products: {products}\nratio of medians: {baseline / own:.2f}"


def matrix_product_rates(device, timed):
    """GFLOP/s of square matrix products, per number format. timed(function): seconds that it takes."""
    formats = {"float32": (torch.float32, "highest")}
    if device.type == "cuda":
        formats.update({"tf32": (torch.float32, "high"), "bf16": (torch.bfloat16, "highest")})
    n, rates, before = 8192 if device.type == "cuda" else 2048, {}, torch.get_float32_matmul_precision()
    for kind, (dtype, precision) in formats.items():
        torch.set_float32_matmul_precision(precision)
        a = torch.rand(n, n, device=device, dtype=dtype)
        rates[kind] = 2 * n**3 / min(timed(lambda: a @ a) for _ in range(3)) / 1e9
    torch.set_float32_matmul_precision(before)
    return rates


def reset_peak_memory(device):
    """Begin a new measurement of peak_memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes: of the tensors on a GPU, else of this process in main memory (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ====================================================================================================================
# Options
# ====================================================================================================================


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises InputError instead of printing its usage and leaving."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def number(kind, low, high=math.inf, above=False):
    """Type of an option: an int or float in [low, high], or in (low, high] if `above`."""
    wanted = f"{'a whole number' if kind is int else 'a number'} {'above' if above else 'at least'} {low}"
    wanted += f" and at most {high}" if high < math.inf else ""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got '{text}'")
        return value

    return parse


def build_parser():
    """The parser, which fills in no defaults so that what was given can be told apart, and the defaults."""
    parser = Parser(prog="ipkd_ta.py", allow_abbrev=False, argument_default=argparse.SUPPRESS, description=(
        "Train a flexible network by inplace knowledge distillation with teacher assistant, and report the cost and "
        "accuracy of each of its sub-models."))
    defaults = {}

    def add(group, flag, default, text, shown=None, **kwargs):
        name = flag[2:].replace("-", "_")
        defaults[name] = default
        plain = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        on_shapes = sorted({plain(family.shapes[name]) for family in FAMILIES.values() if name in family.shapes})
        shown = (shown or plain(default)) + (f"; on shapes {' or '.join(on_shapes)}" if on_shapes else "")
        if "type" in kwargs and "metavar" not in kwargs:
            kwargs["metavar"] = "N" if kwargs["type"] is count else "X"
        group.add_argument(flag, help=f"{text} (default: {shown})", **kwargs)

    count, share = number(int, 1, 2**31 - 1), number(float, 0, 1)
    by_family = lambda name: ", ".join(f"{arch} {family.options[name]}" for arch, family in FAMILIES.items())

    g = parser.add_argument_group("what to train")
    add(g, "--arch", "msdnet", "multi-exit MSDNet or slimmable MobileNet-V1", choices=tuple(FAMILIES))
    add(g, "--dataset", "shapes", "images: shapes are built in, cifar10 and cifar100 are downloaded on first use",
        choices=DATASETS)
    add(g, "--data-dir", "data", "where CIFAR is kept; for folder, holds train/<class>/* and test/<class>/* (or val)",
        metavar="DIR")
    add(g, "--train-size", None, "so many training images, chosen at random", f"all; on shapes {SHAPES_TRAIN}",
        type=count)
    add(g, "--val-size", 0, "hold out so many other training images, for thresholds of early exits and for choosing "
        "options", type=number(int, 0, 2**31 - 1), metavar="N")

    g = parser.add_argument_group("distillation")
    add(g, "--method", "ipkd-ta", "teacher of a sub-model: none, the largest, the next larger, or the mean of "
        "all larger ones", choices=METHODS)
    add(g, "--kd-weight", None, "weight of the teacher against the labels, 0 to 1", by_family("kd_weight"), type=share)
    add(g, "--kd-warmup", 1.0, "share of training over which that weight rises from 0, 0 to 1", type=share)
    add(g, "--temperature", 1.0, "softmax temperature of the distillation", type=number(float, 0.001, 1000))

    g = parser.add_argument_group("training")
    add(g, "--epochs", None, "passes over the training images", by_family("epochs"), type=count)
    add(g, "--batch-size", 64, "images per step, of all processes together", type=count)
    add(g, "--lr", 0.1, "highest learning rate of SGD", type=number(float, 0, above=True))
    add(g, "--lr-warmup", None, "share of training over which the learning rate rises from 0, 0 to 1",
        by_family("lr_warmup"), type=share)
    add(g, "--schedule", None, "multistep: x 0.1 at 50 %% and 75 %% of training; cosine, linear: down to 0",
        by_family("schedule"), choices=("multistep", "cosine", "linear"))
    add(g, "--weight-decay", 1e-4, "of SGD; slimmable: only on full convolutions and the classifier",
        type=number(float, 0))
    add(g, "--eval-every", 1, "epochs between evaluations; the last epoch is always evaluated", type=count)
    add(g, "--seed", 0, "of the weights, the order and augmentation of the images, and the widths",
        type=number(int, 0, 2**63 - 1), metavar="N")

    g = parser.add_argument_group("machine")
    add(g, "--device", "auto", "auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, ...", metavar="NAME")
    add(g, "--amp", "auto", "mixed precision; auto: on cuda bf16 where native, else fp16, and off elsewhere",
        choices=("auto", "off", "bf16", "fp16"))
    add(g, "--compile", False, "torch.compile an msdnet: faster steps after minutes of compiling", "off",
        action="store_true")

    g, own = parser.add_argument_group("--arch msdnet"), model_options(MSDNet)
    add(g, "--exits", own["exits"], "classifiers: the sub-models", type=count)
    add(g, "--base", own["base"], "layers before the first exit", type=count)
    add(g, "--step", own["step"], "layers between one exit and the next", type=count)
    add(g, "--step-mode", own["step_mode"], "lin_grow: STEP * i + 1 layers in block i + 1 instead",
        choices=("even", "lin_grow"))
    add(g, "--channels", own["channels"], "channels of the first layer at the finest scale", type=count)
    add(g, "--growth", own["growth"], "channels that a layer adds at the finest scale", type=count)
    add(g, "--gradient-equilibrium", own["gradient_equilibrium"], "blocks receive the mean of the gradients that later "
        "exits send, not the sum", "off", action="store_true")

    g, own = parser.add_argument_group("--arch slimmable"), model_options(SlimmableMobileNetV1)
    add(g, "--widths", own["widths"], "width multipliers ascending in (0, 1]: the sub-models; with --eval, which to do",
        type=number(float, 0, 1, above=True), nargs="+")
    add(g, "--sandwich", 4, "widths trained in each step where BatchNorm is universal: largest, smallest, others drawn",
        type=number(int, 2, 2**31 - 1), metavar="N")
    add(g, "--bn", own["bn"], "one BatchNorm for all widths, calibrated after training, or one for each of --widths",
        choices=("universal", "switchable"))

    g = parser.add_argument_group("files and other modes")
    add(g, "--out", None, "directory of config.json, metrics.jsonl, checkpoint.pt and results.json; with --eval of "
        "results.json (and budget.json) alone", "runs/ARCH-DATASET-METHOD-seedN; with --eval none", metavar="DIR")
    add(g, "--overwrite", False, "replace the run that --out holds", "refuse", action="store_true")
    add(g, "--checkpoint-every", 0, "seconds between checkpoints inside an epoch; 0: at its end alone",
        type=number(float, 0))
    g.add_argument("--export", metavar="FILE", help="with --eval: write a sub-model as a program of torch.export, or "
                   "as ONNX if FILE ends with .onnx")
    g.add_argument("--sub-model", metavar="NAME", help="with --export: which one, for example exit-3 or width-0.5 "
                   "(default: the largest)")
    g.add_argument("--fold-bn", action="store_true", help="with --export: merge BatchNorm into the convolutions")
    g.add_argument("--plot", metavar="FILE", help="with --report: draw accuracy against MACs, by matplotlib, as .svg, "
                   ".png or what else it knows")
    modes = g.add_mutually_exclusive_group()
    modes.add_argument("--eval", metavar="CHECKPOINT", help="evaluate a checkpoint.pt instead of training")
    modes.add_argument("--resume", action="store_true",
                       help="go on with the run in --out, by its options, or begin it where there is none")
    modes.add_argument("--benchmark", action="store_true", help="time training steps on random images against those of "
                       "usual code; takes the options of the network, the method and the machine")
    modes.add_argument("--report", nargs="+", metavar="DIR",
                       help="print all results.json below the directories as Markdown tables")
    return parser, defaults


def parse(argv):
    """Options given on the command line, as a dict, checked one by one, and all defaults."""
    parser, defaults = build_parser()
    return vars(parser.parse_args(argv)), defaults


def flag(name):
    """Option of the command line that sets this name."""
    return "--" + name.replace("_", "-")


def settle(given, defaults):
    """The configuration of a training run: what was given, completed by defaults and checked as a whole."""
    cfg = SimpleNamespace(**{**defaults, **given})
    family = FAMILIES[cfg.arch]
    for arch in set(FAMILIES) - {cfg.arch}:
        for name in [*model_options(FAMILIES[arch].network), *(["sandwich"] if arch == "slimmable" else [])]:
            if name in given:
                raise InputError(f"{flag(name)} is an option of --arch {arch}: it has no meaning for --arch {cfg.arch}")
            delattr(cfg, name)
    if cfg.compile and cfg.arch == "slimmable":
        raise InputError("--compile is for --arch msdnet: a slimmable network would need a graph for every drawn width")
    vars(cfg).update({**family.options, **(family.shapes if cfg.dataset == "shapes" else {}), **given})
    return cfg


# ====================================================================================================================
# Runs: training, resuming, evaluating a checkpoint
# ====================================================================================================================

RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt",
             "results.json", "budget.json")
PLACE_OPTIONS = {"out", "overwrite", "device", "data_dir", "checkpoint_every"}     # where a run happens, not what it is


def run_training(cfg, checkpoint=None, others=RUN_FILES):
    """Train, print and write everything that a run consists of, into its directory: from a checkpoint on, the directory
    being locked, or from the start, where the directory holds none of the files `others` or --overwrite is given."""
    device = pick_device(cfg.device)
    cfg.device, cfg.amp = str(device), pick_amp(cfg.amp, device)
    cfg.out = cfg.out or free_name(f"runs/{cfg.arch}-{cfg.dataset}-{cfg.method}-seed{cfg.seed}")
    out, overwrite = Path(cfg.out), vars(cfg).pop("overwrite")
    if not checkpoint:
        refuse_to_overwrite(out, others, overwrite)
    with torch.device("meta"):
        build_model(cfg, num_classes=10)             # wrong options are told before any work
    start = time.perf_counter()
    if process_rank():
        collectively(dist.barrier)               # until the first process has downloaded
    data = load_data(cfg.dataset, cfg.data_dir, cfg.train_size, cfg.val_size)
    if process_rank() == 0:
        collectively(dist.barrier)
    data = data.to(device, memory_format(cfg.arch, device))
    seconds, cfg.train_size = time.perf_counter() - start, len(data.train_images)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, len(data.classes)).to(device, memory_format=data.memory_format)
    costs = [vars(sub) for sub in model.sub_models()]
    trainer = Trainer(model, data, cfg)
    print(f"{cfg.arch}, {len(costs)} sub-models, {sum(p.numel() for p in model.parameters()):,} parameters; method "
          f"{cfg.method}; {cfg.device}, amp {cfg.amp}\n{described_recipe(cfg)}\n"
          f"{dataset_name(cfg)}: {len(data.train_images):,} training and "
          f"{len(data.test_images):,} test images of {len(data.classes)} classes, loaded in {seconds:.1f} s\n"
          f"writing to {out}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if checkpoint else locked(out):
        if checkpoint:
            go_back(trainer, checkpoint, out)
        else:
            refuse_to_overwrite(out, others, overwrite)      # another process may have come first
            for name in RUN_FILES if process_rank() == 0 else ():
                (out / name).unlink(missing_ok=True)
            write_json(out / "config.json", vars(cfg))
        check_agreement(trainer)
        if cfg.compile:
            compile_model(model, device)
        train_and_write(trainer, costs, out)


def described_recipe(cfg):
    """One line: what decides how well the networks learn."""
    distillation = "labels only" if cfg.method == "ce" else (
        f"kd-weight {cfg.kd_weight:g} after {cfg.kd_warmup:.0%} of training, temperature {cfg.temperature:g}")
    return (f"{distillation}; {cfg.epochs} epochs of batches of {cfg.batch_size}, lr {cfg.lr:g} after a warm-up over "
            f"{cfg.lr_warmup:.0%}, {cfg.schedule}; weight decay {cfg.weight_decay:g}")


def dataset_name(cfg):
    """Name of the data set in tables and results; of a folder, its own."""
    return Path(cfg.data_dir).resolve().name if cfg.dataset == "folder" else cfg.dataset


def go_back(trainer, checkpoint, out):
    """Bring the trainer, and metrics.jsonl in `out`, to where they were at the checkpoint."""
    data, metrics = trainer.data, out / "metrics.jsonl"
    if checkpoint["classes"] != data.classes or not torch.equal(checkpoint["mean"], data.mean.cpu()):
        raise InputError(f"--resume: the images are not those that the run in '{out}' was trained on")
    try:
        trainer.model.load_state_dict(checkpoint["model"])
        trainer.load(checkpoint["trainer"])
    except Exception as error:                   # of another version of this file: torch raises many types
        reason = one_line(error)[:200]
        raise InputError(f"--resume: the checkpoint in '{out}' does not fit ({reason})") from error
    lines = metrics.read_bytes().splitlines(keepends=True)[:trainer.epoch] if metrics.exists() else []
    replace_file(metrics, b"".join(lines))                                       # without what came later
    print(f"resuming after {trainer.epoch} epochs and {trainer.steps} steps", flush=True)


def check_agreement(trainer):
    """InputError unless all processes begin with the same options, images and weights at the same step."""
    if process_count() == 1:
        return
    options = {k: v for k, v in vars(trainer.cfg).items() if k not in PLACE_OPTIONS}
    begun = hashlib.sha256(json.dumps([options, trainer.epoch, trainer.steps], sort_keys=True).encode())
    for tensor in (*vars(trainer.data).values(), *trainer.model.state_dict().values()):
        if torch.is_tensor(tensor):
            begun.update(tensor.cpu().contiguous().numpy())
    own = torch.tensor(list(begun.digest()), device=trainer.data.train_images.device)
    first = own.clone()
    collectively(dist.broadcast, first, 0)
    if not first.equal(own):
        raise InputError(f"process {process_rank()} begins otherwise than process 0: all must have the same options, "
                         "see the same images and, with --resume, the same --out")


def train_and_write(trainer, costs, out):
    """Train to the end, keeping the files in `out` up to date. SIGINT and SIGTERM end it after a step, or an
    evaluation, and a checkpoint."""
    model, data, cfg = trainer.model, trainer.data, trainer.cfg
    start, saved, signals = time.perf_counter(), time.perf_counter(), []
    steps_per_epoch = max(len(data.train_images) // cfg.batch_size, 1)
    progress = Progress((trainer.epoch + trainer.steps / steps_per_epoch) / cfg.epochs)
    smallest, largest, sub_models = costs[0]["name"], costs[-1]["name"], None

    def save():
        nonlocal saved
        save_checkpoint(trainer, out)
        saved = time.perf_counter()

    def tick(share):
        if process_rank():
            return                                       # the first one saves and ends; then the others cannot go on
        progress(share)
        if signals or cfg.checkpoint_every and time.perf_counter() - saved > cfg.checkpoint_every:
            save()
        end_if_told()

    def end_if_told():
        if signals and process_rank() == 0:
            progress.clear()
            print(f"stopped by {signal.Signals(signals[0]).name}; go on with --resume --out {out}", file=sys.stderr)
            raise SystemExit(128 + signals[0])

    def evaluated():
        for buffer in model.buffers():           # BatchNorm statistics: those of the first process count
            collectively(dist.broadcast, buffer, 0)
        model.calibrate(calibration_batches(data))
        return [{**cost, **accuracy} for cost, accuracy in zip(costs, evaluate(model, data))]

    stop = lambda number, frame: signals.append(number)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for record, speed in train(trainer, tick):
            epoch = record["epoch"]
            told = (f"epoch {epoch:{len(str(cfg.epochs))}}/{cfg.epochs}  lr {record['lr']:.4f}  "
                    f"loss {record['loss']:.4f}  {speed:.0f} images/s")
            if epoch % cfg.eval_every == 0 or epoch == cfg.epochs:
                sub_models = evaluated()
                for sub in sub_models:
                    if not math.isfinite(sub["loss"]):
                        raise diverged(f"the test loss of {sub['name']} after epoch {epoch} is {sub['loss']}", cfg)
                record["top1"] = [sub["top1"] for sub in sub_models]
                told += f"  top-1 {smallest} {record['top1'][0]:.2f} %, {largest} {record['top1'][-1]:.2f} %"
            append_line(out / "metrics.jsonl", json.dumps(record))
            save()
            progress.clear()
            print(told, flush=True)
            end_if_told()
        sub_models = sub_models or evaluated()           # resumed after the last epoch
        finish(model, data, cfg, sub_models, out, seconds=round(time.perf_counter() - start, 1),
               processes=process_count())
        end_if_told()
    finally:
        progress.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def save_checkpoint(trainer, out):
    """Write checkpoint.pt, and keep the one that was there as checkpoint.previous.pt; InputError when training
    diverged."""
    trainer.check()
    data, weights = trainer.data, trainer.model.state_dict()
    if not all(value.isfinite().all() for value in weights.values()):      # by a step whose loss, before it, was finite
        raise diverged(f"after {trainer.epoch} epochs and {trainer.steps} steps weights are not finite", trainer.cfg)
    content = {"config": vars(trainer.cfg), "classes": data.classes, "mean": data.mean.cpu(), "std": data.std.cpu(),
               "epoch": trainer.epoch, "model": weights, "trainer": trainer.state()}
    file = io.BytesIO()
    torch.save(content, file)
    replace_file(out / "checkpoint.pt", file.getbuffer(), keep=out / "checkpoint.previous.pt")


def finish(model, data, cfg, sub_models, out=None, **more):
    """Print what came out, and write it into the directory `out` if given: results.json, and budget.json of an MSDNet
    with validation images."""
    print(results_table(sub_models))
    if cfg.val_size:
        more["validation"] = evaluate(model, data, "val")
        if isinstance(model, MSDNet) and process_rank() == 0:
            result = budgeted(model, data)
            print(f"\nthresholds from {cfg.val_size:,} validation images:\n{budget_table(result)}")
            if out:
                write_json(out / "budget.json", result)
    if out:
        versions = {"ipkd_ta": __version__, "sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
                    "python": sys.version.split()[0], **{m.__name__: m.__version__ for m in (torch, torchvision)}}
        write_json(out / "results.json", {"config": vars(cfg), "dataset": dataset_name(cfg), "sub_models": sub_models,
                                          "versions": versions, **more})


def run_resumed(given, defaults):
    """Go on with the run in --out by its own options, or begin it where there is none yet."""
    if "out" not in given:
        raise InputError("--resume needs --out, the directory of the run")
    out, given = Path(given["out"]), {k: v for k, v in given.items() if k != "resume"}
    with locked(out) if out.is_dir() else contextlib.nullcontext():
        files = [path for path in (out / "checkpoint.pt", out / "checkpoint.previous.pt") if path.exists()]
        if files:
            return go_on(out, files, given, defaults)
    if set(given) <= PLACE_OPTIONS:
        raise InputError(f"--resume: --out '{out}' holds no run: name its directory, or the options of one to begin")
    run_training(settle(given, defaults), others=RUN_FILES[2:])


def go_on(out, files, given, defaults):
    """Go on with the run in `out`, by the first of these checkpoints that is sound."""
    try:
        checkpoint, damaged = load_checkpoint(files[0]), False
    except InputError as error:
        checkpoint, damaged = load_checkpoint(files[-1]), True
        print(f"{error}: going on from '{files[-1]}'", file=sys.stderr)
    given = {k: v for k, v in given.items() if (k, v) != ("amp", "auto")}       # what it meant is in the checkpoint
    if "trainer" not in checkpoint:
        raise InputError(f"--resume: '{files[0]}' holds no state of the training")
    config = {**checkpoint["config"], "out": str(out)}
    plain = lambda value: list(value) if isinstance(value, tuple) else value        # widths by default are a tuple
    other = [f"{flag(k)} {config.get(k)}, not {v}" for k, v in sorted(given.items())
             if k not in PLACE_OPTIONS and plain(config.get(k)) != plain(v)]
    if other:
        raise InputError(f"--resume: the run in '{out}' has {'; '.join(other)}: its options stay as they are, for the "
                         "schedules depend on them")
    if (out / "results.json").exists() and checkpoint["epoch"] == config["epochs"]:
        print(f"the run in '{out}' is finished")
        return
    if damaged and process_rank() == 0:
        os.replace(files[0], out / "checkpoint.damaged.pt")      # it must not take the place of the one before
    run_training(settle({**config, **given}, defaults), checkpoint)


def run_evaluation(given):
    """Evaluate a checkpoint as its run did; slimmable networks with universal BatchNorm at any --widths."""
    if set(given) & {"sub_model", "fold_bn"}:
        raise InputError("--sub-model and --fold-bn need --export, the file to write")
    for name in sorted(set(given) - {"eval", "data_dir", "device", "widths", "out", "overwrite"}):
        raise InputError(f"{flag(name)} has no meaning with --eval, which takes the options of the checkpoint's run")
    checkpoint = load_checkpoint(given["eval"])
    cfg, model = restore(checkpoint, given["eval"])
    if "widths" in given and cfg.arch != "slimmable":
        raise InputError(f"--widths is an option of --arch slimmable, and '{given['eval']}' holds {cfg.arch}")
    device = pick_device(given.get("device", "auto"))
    cfg.data_dir, cfg.device = given.get("data_dir", cfg.data_dir), str(device)
    out = Path(given["out"]) if "out" in given else None
    if out:
        refuse_to_overwrite(out, ["config.json"], overwrite=False)               # a run: its results are not these
        refuse_to_overwrite(out, ["results.json", "budget.json"], given.get("overwrite", False))

    data = load_same_data(cfg, checkpoint).to(device, memory_format(cfg.arch, device))
    model.to(device, memory_format=data.memory_format)
    try:
        if "widths" in given:
            cfg.widths = model.widths = tuple(sorted(set(given["widths"])))
        model.calibrate(calibration_batches(data))
        sub_models = [{**vars(sub), **accuracy} for sub, accuracy in zip(model.sub_models(), evaluate(model, data))]
    except ValueError as error:                          # widths that it does not offer
        raise InputError(f"'{given['eval']}': {one_line(error)}") from error
    if out:
        out.mkdir(parents=True, exist_ok=True)
    finish(model, data, cfg, sub_models, out, evaluated=given["eval"])


def load_same_data(cfg, checkpoint):
    """The Data of a checkpoint's run, normalised as there; InputError when --data-dir holds other classes."""
    data = load_data(cfg.dataset, cfg.data_dir, cfg.train_size, cfg.val_size)
    if data.classes != checkpoint["classes"]:
        raise InputError(f"the classes of '{cfg.data_dir}' are not those that the checkpoint was trained on")
    return replace(data, mean=checkpoint["mean"], std=checkpoint["std"])


def restore(checkpoint, path):
    """The options of a checkpoint's run and its model, on the CPU, in eval mode; InputError when they do not fit. path:
    where the checkpoint is from, for the message."""
    cfg = SimpleNamespace(**{**build_parser()[1], **checkpoint["config"]})
    try:
        model = build_model(cfg, len(checkpoint["classes"]))
        model.load_state_dict(checkpoint["model"])
    except Exception as error:                   # of another version of this file: torch raises many types
        raise InputError(f"'{path}': {one_line(error)[:200]}") from error
    return cfg, model.eval()


def load_checkpoint(path):
    """Content of a checkpoint.pt, on the CPU; code in it is refused, not run. InputError when the file is none, or is
    damaged."""
    try:
        sound = io.BytesIO()       # with what passed its checksum alone: torch.load does not look, nor at other damage
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(sound, "w") as copied:
            for part in archive.infolist():
                copied.writestr(part.filename, archive.read(part))
        sound.seek(0)
        checkpoint = torch.load(sound, map_location="cpu", weights_only=True)
        missing = {"config", "classes", "mean", "std", "epoch", "model"} - set(checkpoint)
        if missing:
            raise ValueError(f"not of this program: it lacks {', '.join(sorted(missing))}")
        config, mean, std = (checkpoint[name] for name in ("config", "mean", "std"))
        known = config["arch"] in FAMILIES and config["dataset"] in DATASETS
        if not known or mean.shape != (3,) or std.shape != (3,) or not isinstance(checkpoint["model"], dict):
            raise ValueError("its content is not that of a run")
    except Exception as error:              # not there, damaged, or not a checkpoint: torch raises many types
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise InputError(f"cannot read checkpoint '{path}' ({reason})") from error
    return checkpoint


def refuse_to_overwrite(out, files, overwrite):
    """InputError when one of the files is in the directory `out`, or `out` is no directory; the first process tells."""
    if process_rank():
        return
    present = [name for name in files if (out / name).exists()]
    if present and not overwrite:
        raise InputError(f"--out '{out}' already holds {', '.join(present)}: choose another directory"
                         f"{', or --overwrite' if 'results.json' in files else ''}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out '{out}' is not a directory: choose another name")


def free_name(path):
    """The path, or the first of path-2, path-3, ... that does not exist."""
    n = 1
    while os.path.exists(path if n == 1 else f"{path}-{n}"):
        n += 1
    return path if n == 1 else f"{path}-{n}"


# ====================================================================================================================
# Export: a sub-model as a program of its own
# ====================================================================================================================


def run_export(given):
    """Write one sub-model of a checkpoint as a program that needs this file no more: of torch.export, or ONNX when the
    name ends with .onnx."""
    for name in sorted(set(given) - {"eval", "export", "sub_model", "fold_bn", "data_dir", "overwrite"}):
        raise InputError(f"{flag(name)} has no meaning with --export, which takes the options of the checkpoint's run")
    path = Path(given["export"])
    if path.is_dir():
        raise InputError(f"--export: '{path}' is a directory: name a file")
    if path.exists() and not given.get("overwrite"):
        raise InputError(f"--export: '{path}' exists: choose another name, or --overwrite")
    if path.exists() and os.path.exists(given["eval"]) and path.samefile(given["eval"]):
        raise InputError(f"--export: '{path}' is the checkpoint itself: choose another name")
    checkpoint = load_checkpoint(given["eval"])
    cfg, model = restore(checkpoint, given["eval"])
    cfg.data_dir = given.get("data_dir", cfg.data_dir)
    universal = cfg.arch == "slimmable" and cfg.bn == "universal"
    names = [sub.name for sub in model.sub_models()]
    listed = dict(zip(names, model.widths if cfg.arch == "slimmable" else range(1, len(names) + 1)))
    name = given.get("sub_model", names[-1])
    try:
        which = listed[name] if name in listed else float(name.removeprefix("width-"))
        if universal and model.low <= which <= model.high and not model.calibrated(which):      # never asked for
            model.calibrate(calibration_batches(load_same_data(cfg, checkpoint)), [which])
        program = extract(model, which)
    except ValueError as error:
        between = " and any width between" if universal else ""
        raise InputError(f"--sub-model {name}: '{given['eval']}' offers {', '.join(names)}{between}") from error
    if given.get("fold_bn"):
        fold_bn(program)
    about = {"sub-model": name, "classes": checkpoint["classes"],
             "input": "float32 (N, 3, 32, 32): (pixel / 255 - mean) / std", "mean": checkpoint["mean"].tolist(),
             "std": checkpoint["std"].tolist()}
    write_program(program, path, about)
    params = sum(p.numel() for p in program.parameters())
    print(f"{name}: {params:,} parameters, {path.stat().st_size:,} bytes in {path}; input {about['input']}, "
          f"mean {' '.join(f'{m:.4f}' for m in about['mean'])}, std {' '.join(f'{s:.4f}' for s in about['std'])}")


def write_program(model, path, about):
    """Export a model for images (N, 3, 32, 32) of any N, with what there is to know about it, when the program is seen
    to give the same logits."""
    images, batch, content, run = torch.randn(5, 3, 32, 32), torch.export.Dim("batch"), io.BytesIO(), None
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    if path.suffix.lower() == ".onnx":
        try:
            program = torch.onnx.export(program, dynamo=True, verbose=False)
        except ImportError as error:
            raise InputError(f"--export: '{path.name}' needs the packages onnx and onnxscript ({one_line(error)}): "
                             "install them, or take another ending for a program of torch.export") from error
        program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
        content.write(program.model_proto.SerializeToString())
        try:
            program.initialize_inference_session()       # by onnxruntime
            run = lambda x: program(x)[0]
        except ImportError:
            print("onnxruntime is not installed: the file was not run")
    else:
        program.example_inputs = None
        for node in program.graph.nodes:
            node.meta = {k: v for k, v in node.meta.items() if k == "val"}    # no source lines: a third of it
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No complete tensor found")     # means channels-last weights; on the CPU
            torch.export.save(program, content, extra_files={"about.json": json.dumps(about)})
        run = torch.export.load(io.BytesIO(content.getvalue())).module()
    if run:
        with torch.no_grad():
            expected = model(images)
            found = torch.cat([run(images[:1]), run(images[1:])])
        difference = ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
        if not difference < 1e-4:
            raise InputError(f"--export: the program gives logits that differ by {difference:.1e} of the largest: "
                             f"'{path}' is not written")
    replace_file(path, content.getbuffer())


# ====================================================================================================================
# Command line
# ====================================================================================================================


def run_command(given, defaults):
    """Do what the given options ask for."""
    if "report" in given:
        for name in sorted(set(given) - {"report", "plot"}):
            raise InputError(f"{flag(name)} has no meaning with --report")
        settings = comparable_runs(given["report"])
        print(report(settings))
        if "plot" in given:
            plot(settings, Path(given["plot"]))
    elif given.pop("benchmark", False):
        for name in sorted(set(given) & {"dataset", "data_dir", "train_size", "val_size", "epochs", "schedule", "out",
                                         "overwrite", "checkpoint_every", "eval_every", "export", "sub_model",
                                         "fold_bn", "plot", "kd_warmup"}):
            raise InputError(f"{flag(name)} has no meaning with --benchmark, which trains on random images")
        benchmark(settle({"dataset": "cifar10", **given}, defaults))
    elif "eval" in given:
        (run_export if "export" in given else run_evaluation)(given)
    elif "plot" in given:
        raise InputError("--plot needs --report, the directories of the runs")
    elif set(given) & {"export", "sub_model", "fold_bn"}:
        raise InputError("--export, --sub-model and --fold-bn need --eval, the checkpoint.pt that holds the sub-model")
    elif "resume" in given:
        run_resumed(given, defaults)
    else:
        run_training(settle(given, defaults))


def main(argv=None):
    """Run the command line; the exit status: 0 = finished, 1 = another process is gone, 2 = bad options or input,
    128 + n = stopped by signal n."""
    rank = int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0      # set by torchrun
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")) if rank else contextlib.nullcontext():
            given, defaults = parse(argv)
            if not set(given) & {"report", "benchmark", "eval"}:
                join_processes()
            elif rank:
                return 0                         # the first process does that alone
            keep_freed_memory()
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")   # all drawn widths' kernels, not 1,024
            run_command(given, defaults)
            if process_count() > 1:
                dist.destroy_process_group()
    except (InputError, OSError) as error:       # OSError: a file or directory that cannot be reached or written
        print(f"ipkd_ta.py: error{f' in process {rank}' if rank else ''}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
