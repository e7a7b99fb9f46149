"""
AugVAE: the feature-augmented VQ autoencoder of L-Verse, an image to discrete tokens and back.

              encoders, fine to coarse                                       decoders, coarse to fine
    image -> enc0 -> 64x64 -> enc1 -> 32x32 -> enc2 -> 16x16 -> enc3 -> 8x8
                       |                |                |               |
                    codebook         codebook         codebook        codebook   (one codebook for all levels)
                       |                |                |               |
    image <- dec3 <- cat <--- dec2 <-- cat <--- dec1 <- cat <-- dec0 <---+

The encoders are chained on continuous features; each level is quantised on the side. That is AugVAE-ML
("multi-level"): 64^2 + 32^2 + 16^2 + 8^2 = 5440 tokens a 256-pixel image. `single_level(32)` cuts it down to
AugVAE-SL, which keeps enc0, enc1, dec2, dec3 and only the 32x32 grid: the 1024 tokens that BiART models.

References:
1) L-Verse, Kim et al. 2022, https://arxiv.org/abs/2111.11133 (section 3.1), and the released training code.
2) VQ-VAE, van den Oord et al. 2017, https://arxiv.org/abs/1711.00937: straight-through, commitment, EMA.
3) VQGAN, Esser et al. 2021, https://arxiv.org/abs/2012.09841: the residual encoder and decoder.
4) LPIPS, Zhang et al. 2018, https://arxiv.org/abs/1801.03924, and the lpips 0.1 release: the perceptual loss.
"""
import argparse
import contextlib
import functools
import os
import re
import textwrap
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass
class AugVAEConfig:
    """The defaults are the released 256-pixel model (225 M parameters)."""
    image_size: int = 256  # side of the square image, pixels
    levels: tuple[int, ...] = (64, 32, 16, 8)  # side of each token grid, finest first
    hidden: int = 128  # channels at ch_mult 1
    ch_mult: tuple[int, ...] = (1, 2, 4)  # first encoder, last decoder; m entries change the side by 2^(m-1)
    ch_mult_inner: tuple[int, ...] = (2, 4)  # all other encoders and decoders
    n_res_blocks: int = 2  # residual blocks per resolution (a decoder has one more)
    n_groups: int = 32  # of every GroupNorm
    attention: bool = False  # self-attention at each token grid's resolution
    ae_dropout: float = 0.0  # inside the residual blocks
    z_channels: int = 256  # channels between encoders, codebook and decoders
    codebook_size: int = 8192  # codes, shared by all levels
    codebook_dim: int = 256  # length of a code
    commitment: float = 0.25  # weight of mse(sg[z_q], z), summed over levels
    ema_decay: float = 0.99  # of the codebook's statistics, per optimizer step
    ema_eps: float = 1e-5  # Laplace smoothing of the cluster sizes
    vq_start: int = 0  # optimizer steps before quantisation begins, while vectors spread; 0 is at once
    rate: float = 0.0  # of entropy-constrained quantisation, in code variances a nat; 0 is the nearest code
    locality: float = 0.0  # AugVAE-SL: weight of locality_loss, which makes a cell's code its own affair
    dead_below: float = 0.03  # a code used less than this share of the mean is revived from the batch
    single_level: int = 0  # side of the one grid that AugVAE-SL keeps; 0 is AugVAE-ML
    limits = {"ae_dropout": "[0, 1)", "ema_decay": "[0, 1]", "ema_eps": "(0, inf)", "dead_below": "[0, 1)",
              **dict.fromkeys(("commitment", "vq_start", "rate", "locality", "single_level"), "[0, inf)"),
              **dict.fromkeys(("image_size", "hidden", "n_res_blocks", "n_groups", "z_channels",
                               "codebook_size", "codebook_dim"), "[1, inf)")}

    def __post_init__(self):
        self.levels, self.ch_mult = tuple(self.levels), tuple(self.ch_mult)
        self.ch_mult_inner = tuple(self.ch_mult_inner)
        side = self.image_size
        for i, level in enumerate(self.levels):
            mult = self.ch_mult if i == 0 else self.ch_mult_inner
            factor = 2 ** (len(mult) - 1)
            if side != level * factor:
                raise ValueError(f"levels {self.levels}: an encoder with {len(mult)} multipliers "
                                 f"takes a side of {side} to {side / factor:g}, not to {level}")
            side = level
        for mult in self.ch_mult + self.ch_mult_inner:
            if mult < 1 or self.hidden * mult % self.n_groups:
                raise ValueError(f"hidden {self.hidden} x ch_mult {mult} "
                                 f"is not 1, 2, 3, ... times n_groups {self.n_groups}")
        if self.single_level and self.single_level not in self.levels:
            raise ValueError(f"there is no grid of side {self.single_level}: the levels are {self.levels}")

    @property
    def grids(self):
        """Sides of the token grids encode() returns, finest first: all levels (ML) or the kept one (SL)."""
        return (self.single_level,) if self.single_level else self.levels


# -----------------------------------------------------------------------------
# Blocks

class NormSiLUConv(nn.Module):
    """conv(dropout(silu(norm(x)))), a 3x3 convolution: (B, in_channels, h, w) -> (B, out_channels, h, w)."""

    def __init__(self, in_channels, out_channels, config, dropout=0.0):
        super().__init__()
        self.norm = nn.GroupNorm(config.n_groups, in_channels, eps=1e-6)
        self.dropout = dropout
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x):
        return norm_silu_conv(x, self.norm, self.conv, self.dropout if self.training else 0.0)


class ResBlock(nn.Module):
    """shortcut(x) + layer2(layer1(x)), (B, in_channels, h, w) -> (B, out_channels, h, w)."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.layer1 = NormSiLUConv(in_channels, out_channels, config)
        self.layer2 = NormSiLUConv(out_channels, out_channels, config, config.ae_dropout)
        self.shortcut = (nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels
                         else nn.Identity())

    def forward(self, x):
        return self.shortcut(x) + self.layer2(self.layer1(x))


class Attention(nn.Module):
    """Single-head self-attention over the h*w positions, with a residual connection."""

    def __init__(self, channels, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.n_groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, h*w, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Conv2d):
    """(B, C, h, w) -> (B, C, 2h, 2w): every pixel becomes 2x2 equal ones, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return upsample_conv(x, self.weight, self.bias)  # = conv(interpolate(x, scale_factor=2))


def middle_layers(channels, config):
    """Of an encoder at its end, of a decoder at its start: {name: layer}."""
    layers = OrderedDict(mid_block_1=ResBlock(channels, channels, config))
    if config.attention:
        layers["mid_attn_1"] = Attention(channels, config)
    layers["mid_block_2"] = ResBlock(channels, channels, config)
    return layers


class Encoder(nn.Sequential):
    """(B, in_channels, s, s) -> (B, z_channels, s / 2^(m-1), s / 2^(m-1)) for m multipliers."""

    def __init__(self, in_channels, ch_mult, config):
        c = config.hidden
        layers = OrderedDict(conv_in=nn.Conv2d(in_channels, c, 3, padding=1))
        for i, mult in enumerate(ch_mult):
            last = i == len(ch_mult) - 1
            for j in range(config.n_res_blocks):
                layers[f"down_{i}_block_{j}"] = ResBlock(c, config.hidden * mult, config)
                c = config.hidden * mult
                if config.attention and last:
                    layers[f"down_{i}_attn_{j}"] = Attention(c, config)
            if not last:  # half the side; padded on the right and bottom only, as in VQGAN
                layers[f"down_{i}_pad"] = nn.ZeroPad2d((0, 1, 0, 1))
                layers[f"down_{i}_downsample"] = nn.Conv2d(c, c, 3, stride=2)
        layers.update(middle_layers(c, config))
        layers["conv_out"] = NormSiLUConv(c, config.z_channels, config)
        super().__init__(layers)


class Decoder(nn.Sequential):
    """(B, in_channels, s, s) -> (B, out_channels, s * 2^(m-1), s * 2^(m-1)): the mirror of Encoder."""

    def __init__(self, in_channels, out_channels, ch_mult, config):
        c = config.hidden * ch_mult[-1]
        layers = OrderedDict(conv_in=nn.Conv2d(in_channels, c, 3, padding=1))
        layers.update(middle_layers(c, config))
        for i in reversed(range(len(ch_mult))):
            for j in range(config.n_res_blocks + 1):
                layers[f"up_{i}_block_{j}"] = ResBlock(c, config.hidden * ch_mult[i], config)
                c = config.hidden * ch_mult[i]
                if config.attention and i == len(ch_mult) - 1:
                    layers[f"up_{i}_attn_{j}"] = Attention(c, config)
            if i:
                layers[f"up_{i}_upsample"] = Upsample(c)
        layers["conv_out"] = NormSiLUConv(c, out_channels, config)
        super().__init__(layers)


class TiedConv1x1(nn.Module):
    """A 1x1 convolution with one weight for all levels and a bias for each."""

    def __init__(self, in_channels, out_channels, n_levels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(n_levels, out_channels))

    def forward(self, x, level):
        return F.conv2d(x, self.weight, self.bias[level])


# -----------------------------------------------------------------------------
# Codebook

@dataclass
class Collected:
    """What the forward passes since the last update have given to the codebook."""
    used: torch.Tensor  # (size, 1 + dim) for each code, how many vectors it got, and their sum
    drawn: torch.Tensor  # (n, 1 + dim) a random key and a vector each; the largest keys revive dead codes
    calls: int = 0  # of collect()


class Codebook(nn.Module):
    """
    `size` vectors of `dim` numbers, moved by exponential moving averages instead of gradients.

    forward() quantises and never moves a code. Training calls collect() on every forward pass and update()
    once per optimizer step: all levels and all ranks move the codes together, by one all-reduce, so that the
    codebook stays bit-equal on every rank. (The release updates once per level and never synchronises.)

    State, fp32 and outside autocast: weight (size, dim); cluster_size (size,) and embed_sum (size, dim) are
    moving averages of how many vectors a code gets a step, and their sum: weight = embed_sum / cluster_size.
    Both start at zero: every code is dead until the first batches bring it to life.
    """
    def __init__(self, config):
        super().__init__()
        self.config, self.size, self.dim = config, config.codebook_size, config.codebook_dim
        self.register_buffer("weight", torch.randn(self.size, self.dim))
        self.register_buffer("cluster_size", torch.zeros(self.size))
        self.register_buffer("embed_sum", torch.zeros(self.size, self.dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        # A few codes an update: each few are drawn from what all earlier codes serve badly. Were all codes
        # drawn at once, most would land on the commonest patch and stay there as near-copies.
        self.max_revived = max(1, self.size // 32)
        self.pending = None  # Collected, or None where nothing was

    def forward(self, z):
        """
        z (B, dim, h, w) -> z_q (B, dim, h, w) with straight-through gradients to z,
        codes LongTensor (B, h, w), and mse(sg[z_q], z), a scalar.

        In training's first vq_start updates z_q is z, and the loss 0: the codes follow vectors that spread
        freely. Were those held by the first few codes, most of their directions would die out for good.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.nearest(z.detach().permute(0, 2, 3, 1).reshape(-1, self.dim))
            codes = codes.view(z.shape[0], *z.shape[2:])
            vq_start = self.config.vq_start if self.training else 0
            if vq_start and self.updates < vq_start:  # where it is 0, no wait for the device
                return z, codes, z.new_zeros(())
            z_q = self.lookup(codes)
            return z + (z_q - z).detach(), codes, F.mse_loss(z, z_q)

    def lookup(self, codes):
        """LongTensor (B, h, w), values in [0, size) -> (B, dim, h, w)."""
        return F.embedding(codes, self.weight).permute(0, 3, 1, 2)

    def nearest(self, z, max_scores=2 ** 22):
        """
        (N, dim) -> LongTensor (N,): argmin_k |z - e_k|^2 - rate * var * log p_k, max_scores of them at once.
        p_k is how often code k is used, var the variance of the codes so used. Rate 0 gives the nearest code;
        above, near-ties go to the commoner one (entropy-constrained quantisation, Chou et al. 1989).
        """
        with full_fp32():  # tokens must not depend on the card
            p = self.cluster_size + self.config.ema_eps
            p = p / p.sum()
            var = p @ (self.weight - p @ self.weight).square().sum(1)
            cost = (self.weight.square().sum(1) - self.config.rate * var * p.log()) / 2  # without |z|^2
            rows = max(1, min(len(z), max_scores // self.size))
            scores = z.new_empty(rows, self.size)  # one for all parts: fresh pages cost a tenth more
            codes = [torch.addmm(cost, part, self.weight.t(), alpha=-1, out=scores[:len(part)]).argmin(1)
                     for part in z.split(rows)]
            return torch.cat(codes)

    @torch.no_grad()
    def collect(self, z, codes):
        """Add one forward pass, one level: z (B, dim, h, w) and its codes (B, h, w), to the next update()."""
        z = z.detach().float().permute(0, 2, 3, 1).reshape(-1, self.dim)
        codes = codes.flatten()
        pending = self.pending = self.pending or Collected(
            z.new_zeros(self.size, 1 + self.dim), z.new_zeros(0, 1 + self.dim))
        pending.used.index_add_(0, codes, torch.cat([torch.ones_like(z[:, :1]), z], 1))
        # Candidates for reviving dead codes: a weighted random draw (Efraimidis & Spirakis) in which far-off
        # vectors weigh more, as in k-means++. Uniform numbers are drawn for the whole global batch and sliced
        # by rank, so that two ranks with half a batch each choose what one with the whole batch would.
        rank, world = rank_and_world()
        generator = torch.Generator().manual_seed(int(self.updates) * 64 + pending.calls)
        uniform = torch.rand(world, len(z), generator=generator)[rank].to(z.device)
        error = (z - self.weight[codes]).square().sum(1)
        keys = uniform.clamp_min(1e-20).log() / error.clamp_min(1e-20)
        drawn = torch.cat([pending.drawn, torch.cat([keys[:, None], z], 1)])
        pending.drawn = drawn[drawn[:, 0].topk(min(self.max_revived, len(drawn))).indices]
        pending.calls += 1

    def discard(self):
        """Forget what was collected: a skipped step moves no code."""
        self.pending = None

    @torch.no_grad()
    def update(self):
        """
        Move the codebook once by all that was collected since the last update, on all ranks.
        Returns (share of codes in use, perplexity) of what was collected; perplexity is in [1, size].
        """
        collected = self.reduce(self.pending)
        counts, sums = collected.used[:, 0], collected.used[:, 1:]
        self.discard()
        # Young averages forget faster, so that the codes keep up with an encoder that still moves a lot.
        decay = min(self.config.ema_decay, (1 + int(self.updates)) / (10 + int(self.updates)))
        self.updates += 1
        self.cluster_size.lerp_(counts, 1 - decay)
        self.embed_sum.lerp_(sums, 1 - decay)
        self.revive(collected)
        # weight = embed_sum / cluster_size, smoothed (Laplace), of all codes that ever got a vector
        total, eps = self.cluster_size.sum(), self.config.ema_eps
        smoothed = (self.cluster_size + eps) / (total + self.size * eps) * total
        alive = self.cluster_size > 0
        self.weight[alive] = self.embed_sum[alive] / smoothed[alive, None]
        return codebook_use(counts)

    def reduce(self, own):
        """Collected by this rank -> by all ranks: `used` added, `drawn` one below the other."""
        if not dist.is_initialized():
            return own
        rank, world = rank_and_world()
        drawn = own.drawn.new_zeros(world, *own.drawn.shape)  # each rank fills its own part
        drawn[rank] = own.drawn
        rows = torch.cat([own.used, drawn.flatten(0, 1)])
        dist.all_reduce(rows)  # one call for both
        return Collected(rows[:self.size], rows[self.size:])

    def revive(self, collected):
        """Move codes that are hardly used to the vectors with the largest keys, at most max_revived."""
        threshold = self.config.dead_below * collected.used[:, 0].sum() / self.size
        best = collected.drawn[:, 0].topk(min(self.max_revived, len(collected.drawn))).indices  # (n,)
        dead = (self.cluster_size < threshold).nonzero().squeeze(1)[:len(best)]  # (m,), m <= n
        # A revived code starts light: it soon moves to where it is used, or is given up where it is not.
        self.cluster_size[dead] = 2 * threshold
        self.embed_sum[dead] = 2 * threshold * collected.drawn[best[:len(dead)], 1:]


def codebook_use(counts):
    """
    How often each code was used, (size,) -> (share of codes used at all, perplexity), floats.
    exp(entropy), the perplexity, is the number of equally used codes that would carry as much.
    """
    counts = counts.cpu().double()  # Apple's GPUs have no float64
    p = counts / counts.sum()
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def full_fp32():
    """Within, fp32 matrix products use no TF32, allowed or not: it would change up to 2.4 % of the codes."""
    try:
        restore = functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    except RuntimeError:  # TF32 was allowed by torch 2.9's new name, beside which the old one is not read
        matmul = torch.backends.cuda.matmul
        restore = functools.partial(setattr, matmul, "fp32_precision", matmul.fp32_precision)
    torch.set_float32_matmul_precision("highest")  # under both names
    try:
        yield
    finally:
        restore()


# -----------------------------------------------------------------------------
# The model

class AugVAE(nn.Module):
    """AugVAE-ML, or AugVAE-SL where config.single_level names a grid. See the diagram at the file's top."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        depth = len(c.levels) if not c.single_level else c.levels.index(c.single_level) + 1
        mults = [c.ch_mult] + [c.ch_mult_inner] * (depth - 1)
        self.encoders = nn.ModuleList(
            Encoder(3 if i == 0 else c.z_channels, mult, c) for i, mult in enumerate(mults))
        self.pre_quant = TiedConv1x1(c.z_channels, c.codebook_dim, len(c.grids))
        self.codebook = Codebook(c)
        self.post_quant = TiedConv1x1(c.codebook_dim, c.z_channels, len(c.grids))
        # Only the coarsest decoder of all takes z channels; every other one takes two things side by side.
        widths = [c.z_channels * (1 if i == len(c.levels) - 1 else 2) for i in range(depth)]
        self.decoders = nn.ModuleList(  # coarse to fine, the order they run in
            Decoder(widths[i], 3 if i == 0 else c.z_channels, mults[i], c) for i in reversed(range(depth)))
        self.connectors = nn.ModuleList(  # AugVAE-SL: nothing to concatenate, so a 1x1 widens what there is
            nn.Conv2d(c.z_channels, widths[i], 1) for i in reversed(range(depth))) if c.single_level else None
        self.init_weights()
        self.to(memory_format=torch.channels_last)  # faster layout for convolutions, on CPUs and tensor cores

    def init_weights(self):
        """PyTorch's own for convolutions, but residual branches start at zero: blocks begin as identity."""
        for name, parameter in self.named_parameters():
            if ".layer2.conv." in name or ".proj_out." in name:
                nn.init.zeros_(parameter)
        for tied in (self.pre_quant, self.post_quant):
            bound = tied.weight.shape[1] ** -0.5
            nn.init.uniform_(tied.weight, -bound, bound)
            nn.init.uniform_(tied.bias, -bound, bound)

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> vectors to quantise [(B, codebook_dim, h, w)], finest first."""
        images = images.contiguous(memory_format=torch.channels_last)
        pyramid = []
        for encoder in self.encoders:
            images = encoder(images)
            pyramid.append(images)
        return [self.pre_quant(h, i) for i, h in enumerate(pyramid[-len(self.config.grids):])]

    def reconstruct(self, quantised):
        """Quantised vectors [(B, codebook_dim, h, w)], finest first -> images (B, 3, H, W), about [-1, 1]."""
        levels = [self.post_quant(z_q, i) for i, z_q in enumerate(quantised)]
        h = levels.pop()  # the coarsest; of AugVAE-SL the only one
        for i, decoder in enumerate(self.decoders):
            if self.connectors is not None:
                h = self.connectors[i](h)
            elif i > 0:
                h = torch.cat([levels.pop(), h], dim=1)
            h = decoder(h)
        return h

    def forward(self, images, collect=False):
        """
        Images (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W), not clamped; commitment loss, a scalar
        (summed over levels, weight included, with locality, if asked for); codes as encode() gives them.
        `collect` hands the vectors to the codebook, whose update() then moves it once per optimizer step.
        """
        features = self.features(images)
        quantised, codes, losses = zip(*map(self.codebook, features))
        if collect:
            for z, code in zip(features, codes):
                self.codebook.collect(z, code)
        commitment = sum(self.config.commitment * loss for loss in losses)
        if self.config.locality and self.config.single_level and self.training:
            commitment = commitment + self.config.locality * self.locality_loss(images, features[0])
        return self.reconstruct(quantised), commitment, list(codes)

    def locality_loss(self, images, features):
        """
        How much a cell's features depend on its neighbours, or through GroupNorm on its whole image: the
        distance between features (B, D, s, s) of images whose cells are shuffled, all of a batch, and the
        shuffled features of the images, in variances; a scalar. Codes that stand for what is in their cell
        alone can be put together anew. None of the sources has it.
        """
        side = features.shape[-1]
        order = torch.randperm(len(images) * side * side, device=images.device)
        moved = self.features(shuffle_cells(images, order, side))[0]
        return F.mse_loss(moved, shuffle_cells(features, order, side)) / features.var((0, 2, 3)).mean()

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> [LongTensor (B, h, w)] in [0, codebook_size), finest first."""
        return [self.codebook(z)[1] for z in self.features(images)]

    @torch.no_grad()
    def decode(self, codes):
        """
        Codes as encode() gives them -> images (B, 3, H, W) in [-1, 1].
        Raises ValueError where the grids are not those of the model or a code is out of range.
        """
        sides = tuple(c.shape[-1] for c in codes)
        if sides != self.config.grids:
            raise ValueError(f"codes have grids {sides}, this model's are {self.config.grids}")
        for c in codes:
            if c.min() < 0 or c.max() >= self.config.codebook_size:
                raise ValueError(f"codes from {c.min()} to {c.max()} "
                                 f"are outside [0, {self.config.codebook_size})")
        return self.reconstruct([self.codebook.lookup(c) for c in codes]).clamp(-1, 1)

    def single_level(self, side):
        """
        AugVAE-ML -> AugVAE-SL on the grid of `side` (paper, section 3.1; released code), to be fine-tuned: a
        new model with the encoders down to that grid, the decoders from it upward, and connectors in front of
        them, which at first put zeros where half of the input is missing (the release: random numbers).
        Raises ValueError for a side that is no level, or an AugVAE-SL.
        """
        if self.config.single_level:
            raise ValueError(f"this model is AugVAE-SL already, on grid {self.config.single_level}")
        model = AugVAE(replace(self.config, single_level=side)).to(self.codebook.weight.device)
        level, depth, z = self.config.levels.index(side), len(model.decoders), self.config.z_channels
        model.encoders.load_state_dict(self.encoders[:depth].state_dict())
        model.decoders.load_state_dict(self.decoders[-depth:].state_dict())
        model.codebook.load_state_dict(self.codebook.state_dict())
        for new, old in ((model.pre_quant, self.pre_quant), (model.post_quant, self.post_quant)):
            new.load_state_dict({"weight": old.weight, "bias": old.bias[level:level + 1]})
        for i, connector in enumerate(model.connectors):
            nn.init.zeros_(connector.weight)
            nn.init.zeros_(connector.bias)
            weight = connector.weight.detach()  # a decoder's input is cat(level, coarser decoder)
            nn.init.dirac_(weight[:z] if i == 0 else weight[-z:])
        return model


def shuffle_cells(x, order, side):
    """(B, C, H, W), cut into B * side * side cells, row by row -> cell i is what cell order[i] was."""
    cells = x.unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 1, 3, 5)
    moved = cells.flatten(0, 2)[order].view_as(cells)  # (B, side, side, C, H / side, W / side)
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


# -----------------------------------------------------------------------------
# Perceptual loss

# Name in the torch hub cache, as much of the SHA-256 hash as is known, address
VGG_FILE = "vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth"
LPIPS_FILE = (
    "lpips_vgg-a78928a0.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth")


def find_weights(flag, given, name, sha256, url, download=True):
    """
    Path of published weights: the file that is `given` by --flag, or else torch hub's cached one, which is
    downloaded to there if it may be, its hash checked. None where it is not there and may not be.
    Raises ValueError where the given file is missing, OSError, with ways to go on, where the download fails.
    """
    if given and not os.path.isfile(given):
        raise ValueError(f"there is no file {given} for --{flag}: it is {name}, from {url}")
    path = given or os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if os.path.exists(path):
        return path
    if not download:
        return None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
    except (OSError, RuntimeError) as e:  # no network, no room; another file than was expected
        raise OSError(f"{name} could not be downloaded from {url} ({e}): put it at {path}, "
                      f"or give it by --{flag}, or do without it (--loss l2 needs no LPIPS)") from None
    return path


class LPIPS(nn.Module):
    """
    Learned perceptual distance: images a, b (B, 3, H, W) in [-1, 1], H and W at least 16 -> (B,), from 0 up.

    VGG-16's features after five of its layers, each scaled to length 1 over channels; squared differences,
    weighted by learned weights and averaged over positions; the sum over the five. Same values as net="vgg"
    of the lpips 0.1 release. All weights are frozen, and there is no dropout that could wake up.
    The arguments are files, torchvision's VGG-16 and lpips's own; what is not given, find_weights brings.
    Raises OSError where a file cannot be had, ValueError where it is another.
    """
    taps = (3, 8, 15, 22, 29)  # torchvision's numbers of the layers: the last ReLU of each resolution

    def __init__(self, vgg_weights="", lpips_weights=""):
        super().__init__()
        from torchvision.models import vgg16  # here, because nothing else needs it
        vgg_weights = find_weights("vgg_weights", vgg_weights, *VGG_FILE)
        lpips_weights = find_weights("lpips_weights", lpips_weights, *LPIPS_FILE)
        vgg, lpips = safe_load(vgg_weights), safe_load(lpips_weights)
        with torch.device("meta"):  # shapes alone, no random weights
            self.features = vgg16().features[:self.taps[-1] + 1]
        try:
            weights = {name: vgg[f"features.{name}"] for name in self.features.state_dict()}
            self.features.load_state_dict(weights, assign=True)
        except (KeyError, RuntimeError):
            raise ValueError(f"{vgg_weights} is not torchvision's VGG-16") from None
        for i, tap in enumerate(self.taps):
            name, shape = f"lin{i}.model.1.weight", (1, self.features[tap - 1].out_channels, 1, 1)
            if name not in lpips or lpips[name].shape != shape:
                raise ValueError(f"{lpips_weights} is not LPIPS's for VGG-16: no {name} of shape {shape}")
            self.register_buffer(f"lin{i}", lpips[name].float())
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(3, 1, 1))
        self.requires_grad_(False)

    def unit_features(self, images):
        """(B, 3, H, W) -> five feature maps (B, C, h, w), fp32, of length 1 along C."""
        h = (images - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                yield h.float() / (h.float().norm(dim=1, keepdim=True) + 1e-10)

    def forward(self, a, b):
        return sum(((x - y).square() * getattr(self, f"lin{i}")).sum(1).mean((1, 2))
                   for i, (x, y) in enumerate(zip(self.unit_features(a), self.unit_features(b))))


# -----------------------------------------------------------------------------
# Released weights: files that PyTorch Lightning 1.5 wrote

RELEASED_SETTINGS = {  # of AugVAEConfig, and what the release calls them
    "image_size": "resolution", "levels": "attn_resolutions", "hidden": "hidden_dim", "ch_mult": "ch_mult",
    "n_res_blocks": "num_res_blocks", "attention": "use_attn", "ae_dropout": "dropout",
    "z_channels": "z_channels", "codebook_size": "num_tokens", "codebook_dim": "codebook_dim",
    "commitment": "quant_beta", "ema_decay": "quant_ema_decay", "ema_eps": "quant_ema_eps"}
RELEASED_NAMES = (  # what a tensor is called in the release, and here
    (r"^loss\..*|^(pre|post)_quants\.\d+\.bias", ""),  # LPIPS; and what released_tensors puts together
    (r"^(pre|post)_quants\.\d+\.weight", r"\1_quant.weight"),
    (r"^quantizers\.\d+\.embedding\.(weight|cluster_size)", r"codebook.\1"),
    (r"^quantizers\.\d+\.embedding\.embed_avg", "codebook.embed_sum"),
    (r"\.(down|up)\.(\d+)\.(block|attn)\.(\d+)\.", r".\1_\2_\3_\4."),
    (r"\.(down|up)\.(\d+)\.(downsample|upsample)\.conv\.", r".\1_\2_\3."),
    (r"\.mid\.", ".mid_"),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.(norm|conv)([12])\.", r".layer\2.\1."),
    (r"\.(norm|conv)_out\.", r".conv_out.\1."))


def safe_load(path):
    """
    The dict in a file of torch.save that holds tensors, plain containers and at most an argparse.Namespace
    (which takes torch 2.5). Nothing in it is run.
    Raises ValueError where the file is missing, damaged, or holds anything else.
    """
    safe_globals = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
    try:
        with safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as e:  # a broken file fails in many ways: zip, pickle, end of file, ...
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(e))
        raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__})" if not found else
                         f"{path} asks to run {found[1]}: only tensors, plain values and, from torch 2.5 on, "
                         "an argparse.Namespace are read") from None
    if not hasattr(content, "keys"):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    return content


def from_lightning(cls, checkpoint, path):
    """What safe_load(path) gave -> AugVAE. Raises ValueError where it is no released AugVAE."""
    try:
        state, settings = checkpoint["state_dict"], checkpoint["hyper_parameters"]
        settings = vars(settings if isinstance(settings, argparse.Namespace) else settings["args"])
        config = AugVAEConfig(**{ours: settings[theirs] for ours, theirs in RELEASED_SETTINGS.items()})
        if "connectors.0.weight" in state:  # AugVAE-SL: of the encoders it has those down to its grid
            depth = sum(f"encoders.{i}.conv_in.weight" in state for i in range(len(config.levels)))
            config = replace(config, single_level=config.levels[depth - 1])
        model = cls(config)
        model.load_state_dict(released_tensors(state, config))
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as e:
        reason = textwrap.shorten(f"{type(e).__name__}: {e}", 300)
        raise ValueError(f"{path} is not a released AugVAE ({reason})") from None
    return model.eval()


def released_tensors(state, config):
    """Released tensors by the release's names -> by ours. Raises ValueError where tied ones are not equal."""
    tensors = {"codebook.updates": torch.tensor(2 ** 20)}  # past the quick decay of the first steps
    for theirs, tensor in state.items():
        name = theirs
        for pattern, ours in RELEASED_NAMES:
            name = re.sub(pattern, ours, name)
        if name and not torch.equal(tensors.setdefault(name, tensor), tensor):
            raise ValueError(f"{theirs} is not equal to that of all levels, {name}")
    # pre_quants are numbered by level, post_quants in the order of the decoders: from the coarsest level up.
    pre = [config.levels.index(grid) for grid in config.grids]
    for side, levels in (("pre", pre), ("post", [0] if config.single_level else pre[::-1])):
        tensors[f"{side}_quant.bias"] = torch.stack([state[f"{side}_quants.{i}.bias"] for i in levels])
    return tensors


# -----------------------------------------------------------------------------
# Same result, less memory or time

def norm_silu_conv(x, norm, conv, dropout=0.0):
    """
    conv(dropout(silu(norm(x)))), (B, C, h, w) -> (B, out_channels, h, w), for a 3x3 convolution.

    Keeps x alone for the backward pass, where what lies between is computed again in a few percent of the
    convolution's time. Autograd would keep three more maps of the size of x.
    """
    dropout_mask = F.dropout(torch.ones_like(x), dropout) if dropout else None
    return NormSiLUConvFunction.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, dropout_mask,
                                      norm.num_groups, norm.eps)


class NormSiLUConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias, dropout_mask, n_groups, eps):
        ctx.save_for_backward(x, gamma, beta, weight, dropout_mask)
        ctx.sizes, ctx.eps = (*x.shape[:2], x.shape[2] * x.shape[3], n_groups), eps
        h = torch.native_group_norm(for_norm(x), gamma, beta, *ctx.sizes, eps)[0]
        h = F.silu(h, inplace=True)
        h = h if dropout_mask is None else h * dropout_mask
        return F.conv2d(for_conv(h, x.dtype), weight, bias, padding=1)

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, weight, dropout_mask = ctx.saved_tensors
        amp_dtype = grad.dtype  # the backward pass runs outside autocast
        dropped = (lambda h: h) if dropout_mask is None else dropout_mask.mul
        norm_in = for_norm(x)
        norm_out, mean, rstd = torch.native_group_norm(norm_in, gamma, beta, *ctx.sizes, ctx.eps)
        grad_h, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, for_conv(dropped(F.silu(norm_out)), amp_dtype), weight.to(amp_dtype), [len(weight)],
            [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3)
        grad_h = torch.ops.aten.silu_backward(for_norm(dropped(grad_h)).to(norm_out.dtype), norm_out)
        grad_x, grad_gamma, grad_beta = torch.ops.aten.native_group_norm_backward(
            grad_h, norm_in, mean, rstd, gamma, *ctx.sizes, [True] * 3)
        return for_conv(grad_x, x.dtype), grad_gamma, grad_beta, grad_weight, grad_bias, None, None, None


# CUDA's group norm wants fp32 maps beside fp32 weights and, before torch 2.14, NCHW: its forward pass refuses
# channels_last, its backward pass silently reads it as NCHW. Convolutions are fastest in channels_last. So on
# CUDA a map is copied on its way from one to the other. Under autocast the change of dtype takes these copies
# anyway; in fp32 they move 16 bytes a number in the forward pass and 32 in the backward pass.
def for_norm(x):
    """(B, C, h, w) as group norm takes it: on CUDA in fp32 and NCHW; a CPU takes it as it is."""
    return x.to(torch.float32, memory_format=torch.contiguous_format).contiguous() if x.is_cuda else x


def for_conv(x, dtype):
    """(B, C, h, w) for a convolution in this dtype: on CUDA channels_last; on a CPU it is so already."""
    return x.to(dtype, memory_format=torch.channels_last) if x.is_cuda else x.to(dtype)


def upsample_conv(x, weight, bias):
    """
    conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1), at 4/9 of the arithmetic.

    Nearest x2 repeats every pixel as a 2x2 box, so the 3x3 kernel and the box merge into one 4x4 kernel
    that a stride-2 transposed convolution applies at the low resolution: 16 products a pixel instead of 36.
    """
    k = weight.flip(2, 3).transpose(0, 1)  # (in, out, 3, 3), the layout of transposed convolutions
    k = F.pad(k, (0, 1)) + F.pad(k, (1, 0))  # * box along x: (in, out, 3, 4)
    k = F.pad(k, (0, 0, 0, 1)) + F.pad(k, (0, 0, 1, 0))  # * box along y: (in, out, 4, 4)
    return F.conv_transpose2d(x, k, bias, stride=2, padding=1)
