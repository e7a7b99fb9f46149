"""
AugVAE: the feature-augmented VQ autoencoder of L-Verse. It turns an image into discrete tokens and back.

              encoders, fine to coarse                                       decoders, coarse to fine
    image -> enc0 -> 64x64 -> enc1 -> 32x32 -> enc2 -> 16x16 -> enc3 -> 8x8
                       |                |                |               |
                    codebook         codebook         codebook        codebook   (one codebook for all levels)
                       |                |                |               |
    image <- dec3 <- cat <--- dec2 <-- cat <--- dec1 <- cat <-- dec0 <---+

Encoders continue from unquantised features. This is AugVAE-ML ("multi-level"): 64^2 + 32^2 + 16^2 + 8^2 =
5440 tokens for 256x256 pixels. `single_level(32)` reduces it to AugVAE-SL: enc0, enc1, dec2, dec3 and the
32x32 grid, whose 1024 tokens BiART models.

References:
1) L-Verse, Kim et al. 2022, https://arxiv.org/abs/2111.11133 (section 3.1), and its released code.
2) VQ-VAE, van den Oord et al. 2017, https://arxiv.org/abs/1711.00937: straight-through, commitment, EMA.
3) VQGAN, Esser et al. 2021, https://arxiv.org/abs/2012.09841: encoder and decoder.
4) LPIPS, Zhang et al. 2018, https://arxiv.org/abs/1801.03924: the perceptual loss.
"""
import argparse
import contextlib
import functools
import hashlib
import os
import re
import zipfile
from dataclasses import dataclass, field, fields, replace
from math import inf

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

EMA_DECAY = 0.99  # of the codebook's averages, per step
EMA_EPS = 1e-5  # Laplace smoothing of the cluster sizes
DEAD_BELOW = 0.03  # a code used less than this share of the mean is dead

def derived(default):
    """A setting that other settings or models decide, not the command line."""
    return field(default=default, metadata={"derived": True})

@dataclass
class AugVAEConfig:
    """The defaults are the released model for 256 pixels (225 M parameters)."""
    image_size: int = 256  # side of the square image, pixels
    levels: tuple[int, ...] = (64, 32, 16, 8)  # sides of the token grids, finest first
    hidden: int = 128  # channels at ch_mult 1
    ch_mult: tuple[int, ...] = (1, 2, 4)  # of the first encoder, the last decoder: one a resolution
    ch_mult_inner: tuple[int, ...] = derived((2, 4))  # all other encoders and decoders
    n_res_blocks: int = 2  # residual blocks per resolution (decoders: one more)
    n_groups: int = 32  # of every GroupNorm
    attention: bool = False  # self-attention at each token grid's resolution
    ae_dropout: float = 0.0  # inside the residual blocks
    z_channels: int = 256  # channels between encoders, codebook, decoders
    codebook_size: int = 8192  # codes, shared by all levels
    codebook_dim: int = 256  # length of a code
    commitment: float = 0.25  # weight of mse(z_q.detach(), z), summed over levels
    vq_start: int = 0  # optimizer steps before quantisation begins
    rate: float = 0.0  # favours common codes: distance^2 + rate * variance of codes * -log p(code); 0: off
    single_level: int = derived(0)  # side of AugVAE-SL's grid; 0: AugVAE-ML
    limits = {"image_size": (1, inf), "hidden": (1, inf), "n_res_blocks": (1, inf), "n_groups": (1, inf),
              "ae_dropout": (0, 0.99), "z_channels": (1, inf), "codebook_size": (1, 65536),
              "codebook_dim": (1, inf)}

    def __post_init__(self):
        self.levels, self.ch_mult = tuple(self.levels), tuple(self.ch_mult)
        self.ch_mult_inner = tuple(self.ch_mult_inner)
        side = self.image_size
        for i, level in enumerate(self.levels):
            mult = self.ch_mult if i == 0 else self.ch_mult_inner
            if side != level * 2 ** (len(mult) - 1):
                raise ValueError(f"levels {self.levels}: ch_mult {mult} does not take {side} to {level}")
            side = level
        for m in self.ch_mult + self.ch_mult_inner:
            if m < 1 or self.hidden * m % self.n_groups:
                raise ValueError(f"n_groups {self.n_groups} must divide hidden {self.hidden} * ch_mult {m}")
        if self.single_level and self.single_level not in self.levels:
            raise ValueError(f"no grid of side {self.single_level}: the levels are {self.levels}")

    @property
    def grids(self):
        """Sides of the grids that encode() returns, finest first."""
        return (self.single_level,) if self.single_level else self.levels

# -----------------------------------------------------------------------------
# Blocks: (B, c_in, h, w) -> (B, c_out, h, w)

class NormSiLUConv(nn.Module):
    """conv(dropout(silu(norm(x)))), a 3x3 convolution."""
    def __init__(self, c_in, c_out, config, dropout=0.0):
        super().__init__()
        self.norm = nn.GroupNorm(config.n_groups, c_in, eps=1e-6)
        self.dropout = dropout
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return norm_silu_conv(x, self.norm, self.conv, self.dropout if self.training else 0.0)

class ResBlock(nn.Module):
    """shortcut(x) + layer2(layer1(x))"""
    def __init__(self, c_in, c_out, config):
        super().__init__()
        self.layer1 = NormSiLUConv(c_in, c_out, config)
        self.layer2 = NormSiLUConv(c_out, c_out, config, config.ae_dropout)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.shortcut(x) + self.layer2(self.layer1(x))

class Attention(nn.Module):
    """Single-head self-attention over h*w positions, with a residual connection."""
    def __init__(self, c, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.n_groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, h*w, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))

class Upsample(nn.Conv2d):
    """(B, C, h, w) -> (B, C, 2h, 2w): conv(interpolate(x, scale_factor=2))."""
    def forward(self, x):
        return upsample_conv(x, self.weight, self.bias)

class Encoder(nn.Sequential):
    """(B, c_in, s, s) -> (B, z_channels, s / 2^(m-1), s / 2^(m-1)) for m multipliers."""
    def __init__(self, c_in, ch_mult, config):
        super().__init__()
        c = config.hidden
        self.add_module("conv_in", nn.Conv2d(c_in, c, 3, padding=1))
        for i, mult in enumerate(ch_mult):
            last = i == len(ch_mult) - 1
            for j in range(config.n_res_blocks):
                self.add_module(f"down_{i}_block_{j}", ResBlock(c, config.hidden * mult, config))
                c = config.hidden * mult
                if config.attention and last:
                    self.add_module(f"down_{i}_attn_{j}", Attention(c, config))
            if not last:  # halves the side; padded right and below, as in VQGAN
                self.add_module(f"down_{i}_pad", nn.ZeroPad2d((0, 1, 0, 1)))
                self.add_module(f"down_{i}_downsample", nn.Conv2d(c, c, 3, stride=2))
        add_middle(self, c, config)
        self.add_module("conv_out", NormSiLUConv(c, config.z_channels, config))

class Decoder(nn.Sequential):
    """(B, c_in, s, s) -> (B, c_out, s * 2^(m-1), s * 2^(m-1)): the mirror of Encoder."""
    def __init__(self, c_in, c_out, ch_mult, config):
        super().__init__()
        c = config.hidden * ch_mult[-1]
        self.add_module("conv_in", nn.Conv2d(c_in, c, 3, padding=1))
        add_middle(self, c, config)
        for i in reversed(range(len(ch_mult))):
            for j in range(config.n_res_blocks + 1):
                self.add_module(f"up_{i}_block_{j}", ResBlock(c, config.hidden * ch_mult[i], config))
                c = config.hidden * ch_mult[i]
                if config.attention and i == len(ch_mult) - 1:
                    self.add_module(f"up_{i}_attn_{j}", Attention(c, config))
            if i > 0:
                self.add_module(f"up_{i}_upsample", Upsample(c, c, 3, padding=1))
        self.add_module("conv_out", NormSiLUConv(c, c_out, config))

def add_middle(module, c, config):
    """The last blocks of an encoder, or the first of a decoder."""
    module.add_module("mid_block_1", ResBlock(c, c, config))
    if config.attention:
        module.add_module("mid_attn_1", Attention(c, config))
    module.add_module("mid_block_2", ResBlock(c, c, config))

class TiedConv1x1(nn.Module):
    """A 1x1 convolution with one weight for all levels and a bias for each."""
    def __init__(self, c_in, c_out, n_levels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, 1, 1))
        self.bias = nn.Parameter(torch.empty(n_levels, c_out))

    def forward(self, x, level):
        return F.conv2d(x, self.weight, self.bias[level])

# -----------------------------------------------------------------------------
# Codebook

class Codebook(nn.Module):
    """`size` codes of `dim` numbers: weight (size, dim). A code is the moving average of the vectors that
    chose it, embed_sum (size, dim) / cluster_size (size,). Both begin with 0: all codes are dead. Training
    calls collect() in each forward pass, and once per step update(), which moves the codes by what all ranks
    collected, so that their codebooks stay bit-equal, and revives a few dead ones."""
    def __init__(self, config):
        super().__init__()
        self.config, self.size, self.dim = config, config.codebook_size, config.codebook_dim
        self.register_buffer("weight", torch.randn(self.size, self.dim))
        self.register_buffer("cluster_size", torch.zeros(self.size))
        self.register_buffer("embed_sum", torch.zeros(self.size, self.dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_load_state_dict_post_hook(lambda book, _: book.set_updates(int(book.updates)))
        self.set_updates(0)
        # If all codes were revived at once, most would become copies of the commonest patch
        self.max_revived = max(1, self.size // 32)
        self.discard()

    def set_updates(self, n):
        """How often update() was called, as Python knows it: to look at `updates` would wait for the GPU."""
        self.n_updates, self.quantises = n, n >= self.config.vq_start

    def forward(self, z):
        """z (B, dim, h, w) -> z_q of that shape, with straight-through gradients to z; codes LongTensor
        (B, h, w); mse(sg[z_q], z), a scalar. For the first `vq_start` updates z_q is z and the loss 0, or the
        encoder would collapse onto the few directions in which the young codes differ."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.nearest(z.detach().permute(0, 2, 3, 1).reshape(-1, self.dim))
            codes = codes.view(len(z), *z.shape[2:])
            if self.training and not self.quantises:
                return z, codes, z.new_zeros(())
            z_q = self.lookup(codes)
            return z + (z_q - z).detach(), codes, F.mse_loss(z, z_q)

    def lookup(self, codes):
        """LongTensor (B, h, w), values in [0, size) -> (B, dim, h, w)."""
        return F.embedding(codes, self.weight).permute(0, 3, 1, 2)

    def nearest(self, z, max_scores=2 ** 22):
        """z (N, dim) -> LongTensor (N,): argmin_k |z - e_k|^2. With config.rate, common codes cost less."""
        with full_fp32():
            cost = self.weight.square().sum(1)  # |z - e|^2 - |z|^2 = |e|^2 - 2 z e
            if self.config.rate:  # + rate * var * -log p_k: entropy-constrained, Chou et al. 1989
                p = self.cluster_size + EMA_EPS
                p = p / p.sum()  # how often each code is used
                var = p @ (self.weight - p @ self.weight).square().sum(1)
                cost = cost - self.config.rate * var * p.log()
            parts = z.split(max(1, max_scores // self.size))
            return torch.cat([torch.addmm(cost / 2, z, self.weight.t(), alpha=-1).argmin(1) for z in parts])

    @torch.no_grad()
    def collect(self, z, codes):
        """Keeps one level of a forward pass for update(): z (B, dim, h, w), codes (B, h, w)."""
        z = z.detach().float().permute(0, 2, 3, 1).reshape(-1, self.dim)
        codes = codes.flatten()
        if self.totals is None:
            self.totals, self.candidates = z.new_zeros(self.size, 1 + self.dim), z.new_zeros(0, 1 + self.dim)
        self.totals.index_add_(0, codes, torch.cat([torch.ones_like(z[:, :1]), z], 1))
        # Dead codes move to random vectors, drawn with weight |z - e|^2 (Efraimidis & Spirakis), as in
        # k-means++. The random numbers are those of the global batch, however many ranks share it.
        rank, world = 0, 1
        if dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(self.n_updates * 64 + self.n_collected)
        uniform = torch.rand(world, len(z), generator=generator)[rank].to(z.device, non_blocking=True)
        error = (z - self.weight[codes]).square().sum(1)
        keys = uniform.clamp_min(1e-20).log() / error.clamp_min(1e-20)
        candidates = torch.cat([self.candidates, torch.cat([keys[:, None], z], 1)])
        self.candidates = candidates[candidates[:, 0].topk(min(self.max_revived, len(candidates))).indices]
        self.n_collected += 1

    def discard(self):
        """Forgets what was collected: a skipped step moves no code."""
        self.totals = None  # (size, 1 + dim): number and sum of the vectors that chose each code
        self.candidates = None  # (n, 1 + dim): keys and vectors; the largest keys revive dead codes
        self.n_collected = 0

    @torch.no_grad()
    def update(self):
        """Moves the codes by what all ranks collected; returns its codebook_use(). Never waits for a GPU."""
        totals, candidates = self.totals, self.candidates
        self.discard()
        if dist.is_initialized():  # one call adds up the totals and gathers the candidates
            by_rank = candidates.new_zeros(dist.get_world_size(), *candidates.shape)
            by_rank[dist.get_rank()] = candidates
            rows = torch.cat([totals, by_rank.flatten(0, 1)])
            dist.all_reduce(rows)
            totals, candidates = rows[:self.size], rows[self.size:]
        counts, sums = totals[:, 0], totals[:, 1:]
        # Young averages forget faster: the encoder still changes a lot
        decay = min(EMA_DECAY, (1 + self.n_updates) / (10 + self.n_updates))
        self.updates += 1
        self.set_updates(self.n_updates + 1)
        self.cluster_size.lerp_(counts, 1 - decay)
        self.embed_sum.lerp_(sums, 1 - decay)
        # A revived code gets little weight, so that it soon moves to where it is used, or dies again
        light = 2 * DEAD_BELOW * counts.sum() / self.size
        best = candidates[:, 0].topk(min(self.max_revived, len(candidates))).indices
        dead = self.cluster_size < light / 2
        slots = dead.byte().argsort(descending=True, stable=True)[:len(best)]  # dead ones come first
        dead, vectors = dead[slots], candidates[best[:len(slots)], 1:]
        self.cluster_size[slots] = torch.where(dead, light, self.cluster_size[slots])
        self.embed_sum[slots] = torch.where(dead[:, None], light * vectors, self.embed_sum[slots])
        # weight = embed_sum / cluster_size, smoothed, of all codes that ever got a vector
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + EMA_EPS) / (total + self.size * EMA_EPS) * total
        alive = self.cluster_size[:, None] > 0
        self.weight.copy_(torch.where(alive, self.embed_sum / smoothed[:, None], self.weight))
        return codebook_use(counts)

def codebook_use(counts):
    """Uses of each code (size,) -> tensor (share of codes in use, perplexity exp(entropy))."""
    p = counts / counts.sum()
    return torch.stack([(counts > 0).float().mean(), torch.special.entr(p).sum().exp()])

# -----------------------------------------------------------------------------
# The model

class AugVAE(nn.Module):
    """AugVAE-ML, or AugVAE-SL if config.single_level names a grid."""
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        z, depth = c.z_channels, len(c.levels)
        if c.single_level:
            depth = c.levels.index(c.single_level) + 1
        mults = [c.ch_mult] + [c.ch_mult_inner] * (depth - 1)
        # A decoder gets its own level and the coarser decoder's output. The coarsest gets only its level
        widths = [z if i == len(c.levels) - 1 else 2 * z for i in range(depth)]
        self.encoders = nn.ModuleList(Encoder(3 if i == 0 else z, mults[i], c) for i in range(depth))
        self.pre_quant = TiedConv1x1(z, c.codebook_dim, len(c.grids))
        self.codebook = Codebook(c)
        self.post_quant = TiedConv1x1(c.codebook_dim, z, len(c.grids))
        self.decoders = nn.ModuleList(  # coarse to fine
            Decoder(widths[i], 3 if i == 0 else z, mults[i], c) for i in reversed(range(depth)))
        if c.single_level:  # 1x1 convolutions widen a decoder's only input
            self.connectors = nn.ModuleList(nn.Conv2d(z, widths[i], 1) for i in reversed(range(depth)))
        for name, parameter in self.named_parameters():  # residual blocks begin as identity
            if ".layer2.conv." in name or ".proj_out." in name:
                nn.init.zeros_(parameter)
        for tied in (self.pre_quant, self.post_quant):  # as PyTorch's convolutions
            bound = tied.weight.shape[1] ** -0.5
            nn.init.uniform_(tied.weight, -bound, bound)
            nn.init.uniform_(tied.bias, -bound, bound)
        self.to(memory_format=torch.channels_last)  # is faster

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> vectors to quantise [(B, codebook_dim, h, w)], finest first."""
        h = images.contiguous(memory_format=torch.channels_last)
        pyramid = []
        for encoder in self.encoders:
            h = encoder(h)
            pyramid.append(h)
        if self.config.single_level:
            pyramid = [h]
        return [self.pre_quant(h, i) for i, h in enumerate(pyramid)]

    def reconstruct(self, quantised):
        """Quantised vectors, finest level first -> images (B, 3, H, W), about [-1, 1]."""
        levels = [self.post_quant(z_q, i) for i, z_q in enumerate(quantised)]
        h = levels.pop()  # the coarsest; AugVAE-SL has only this one
        for i, decoder in enumerate(self.decoders):
            if self.config.single_level:
                h = self.connectors[i](h)
            elif i > 0:
                h = torch.cat([levels.pop(), h], dim=1)
            h = decoder(h)
        return h

    def forward(self, images, collect=False):
        """Images (B, 3, H, W) in [-1, 1] -> reconstruction, not clamped; weighted commitment loss, a scalar;
        codes, as from encode(). `collect`: for codebook.update()."""
        quantised, codes, commitment = [], [], 0
        for z in self.features(images):
            z_q, code, loss = self.codebook(z)
            quantised.append(z_q)
            codes.append(code)
            commitment = commitment + self.config.commitment * loss
            if collect:
                self.codebook.collect(z, code)
        return self.reconstruct(quantised), commitment, codes

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> [LongTensor (B, h, w)] in [0, codebook_size), finest first."""
        return [self.codebook(z)[1] for z in self.features(images)]

    @torch.no_grad()
    def decode(self, codes):
        """Codes as from encode() -> images (B, 3, H, W) in [-1, 1]. ValueError for other grids or codes."""
        sides, n = tuple(c.shape[-1] for c in codes), self.config.codebook_size
        if sides != self.config.grids:
            raise ValueError(f"codes have grids {sides}, not {self.config.grids}")
        for c in codes:
            if c.min() < 0 or c.max() >= n:
                raise ValueError(f"codes from {c.min()} to {c.max()} are outside [0, {n})")
        return self.reconstruct([self.codebook.lookup(c) for c in codes]).clamp(-1, 1)

    def single_level(self, side):
        """AugVAE-ML -> a new AugVAE-SL of the grid of `side`, to be fine-tuned. At first its connectors pass
        zeros for the missing input. ValueError for an unknown side or an AugVAE-SL."""
        if self.config.single_level:
            raise ValueError(f"already AugVAE-SL, of side {self.config.single_level}")
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

    @classmethod
    def load(cls, path):
        """The AugVAE of a checkpoint, ours or released, in eval mode on the CPU. ValueError if none."""
        checkpoint = read_checkpoint(path, "augvae_sl", "augvae_ml", "released")
        if "state_dict" in checkpoint:
            checkpoint = from_lightning(checkpoint, path)
        return build_model(cls, AugVAEConfig, checkpoint, path)

# -----------------------------------------------------------------------------
# Perceptual loss

# Published weights: name in torch hub's cache, start of its SHA-256, address
VGG_FILE = "vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth"
LPIPS_FILE = (
    "lpips_vgg-a78928a0.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth")

def find_weights(name, sha256, url, download=True):
    """Path of published weights in torch hub's cache, downloaded if allowed. OSError if missing."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not os.path.exists(path):
            if not download:
                raise OSError("it may not be downloaded")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
    except (OSError, RuntimeError) as e:  # no network, disk full, another file
        raise OSError(f"no {path} ({e}): put {url} there by hand") from None
    return path

class LPIPS(nn.Module):
    """Images a, b (B, 3, H, W) in [-1, 1], H, W >= 16 -> learned perceptual distance (B,), from 0 up, as
    net="vgg" of lpips 0.1. OSError if the weights cannot be had, ValueError if a file holds others."""
    taps = (3, 8, 15, 22, 29)  # torchvision's layers: the last ReLU of each resolution

    def __init__(self, download=True):
        super().__init__()
        from torchvision.models import vgg16  # nothing else needs it
        paths = find_weights(*VGG_FILE, download), find_weights(*LPIPS_FILE, download)
        vgg, lpips = safe_load(paths[0]), safe_load(paths[1])
        with torch.device("meta"):  # only shapes, no random weights
            self.features = vgg16().features[:self.taps[-1] + 1]
        try:
            weights = {name: vgg[f"features.{name}"] for name in self.features.state_dict()}
            self.features.load_state_dict(weights, assign=True)
            for i, tap in enumerate(self.taps):
                head = lpips[f"lin{i}.model.1.weight"].float()
                self.register_buffer(f"lin{i}", head.view(1, self.features[tap - 1].out_channels, 1, 1))
        except (KeyError, RuntimeError) as e:
            raise ValueError(f"{paths[0]} or {paths[1]} does not hold LPIPS's weights ({e})") from None
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(3, 1, 1))
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def unit_features(self, images):
        """(B, 3, H, W) -> five maps (B, C, h, w), fp32, of length 1 along C."""
        h = (images - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                yield h.float() / (h.float().norm(dim=1, keepdim=True) + 1e-10)

    def forward(self, a, b):
        distance = 0
        for i, (x, y) in enumerate(zip(self.unit_features(a), self.unit_features(b))):
            distance = distance + ((x - y).square() * getattr(self, f"lin{i}")).sum(1).mean((1, 2))
        return distance

# -----------------------------------------------------------------------------
# Checkpoints: ours, and those of the release

def safe_load(path):
    """The dict in a file of torch.save. Runs no code of it. ValueError if it is damaged or asks to."""
    safe_globals = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
    try:
        with safe_globals([argparse.Namespace]):  # in released checkpoints
            return dict(torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except Exception as e:  # a damaged file fails in many ways
        asks = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(e))
        why = f"asks to run {asks[1]}; torch 2.5 reads argparse.Namespace" if asks else type(e).__name__
        raise ValueError(f"{path} is not a whole checkpoint ({why})") from None

def read_checkpoint(path, *stages):
    """The dict that train.py saved for one of `stages`. ValueError if it is missing, damaged or another's."""
    if not os.path.exists(path):
        raise ValueError(f"no checkpoint {path}: `train.py --stage {stages[0]}` makes it")
    try:
        checkpoint = safe_load(path)
    except ValueError as e:
        best = os.path.splitext(path)[0] + "_best.pt"
        way_out = f": copy {best}, the best so far, to this name" if os.path.exists(best) else ""
        raise ValueError(f"{e}{way_out}") from None
    stage = "released" if "state_dict" in checkpoint else checkpoint.get("stage", "another project")
    if stage not in stages:
        raise ValueError(f"{path} is a checkpoint of {stage}, not of {' or '.join(stages)}")
    return checkpoint

def build_model(cls, config_cls, checkpoint, path):
    """The model of a checkpoint, in eval mode on the CPU. ValueError if they do not fit."""
    known = [f.name for f in fields(config_cls)]
    old = ", ".join(name for name in checkpoint.get("config", {}) if name not in known)
    if old:
        raise ValueError(f"{path} is from an older version of this project (settings {old}): train it anew")
    try:
        model = cls(config_cls(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.eval()
    except Exception as e:  # other names or shapes
        why = " ".join(str(e).split())[:300]
        raise ValueError(f"{path} does not hold the weights of this {cls.__name__} ({why})") from None

def fingerprint(model):
    """16 hex digits that identify all weights."""
    h = hashlib.sha256()
    for tensor in model.state_dict().values():
        h.update(tensor.cpu().numpy().tobytes())
    return h.hexdigest()[:16]

RELEASED_SETTINGS = {  # our setting -> the release's
    "image_size": "resolution", "levels": "attn_resolutions", "hidden": "hidden_dim", "ch_mult": "ch_mult",
    "n_res_blocks": "num_res_blocks", "attention": "use_attn", "ae_dropout": "dropout",
    "z_channels": "z_channels", "codebook_size": "num_tokens", "codebook_dim": "codebook_dim",
    "commitment": "quant_beta"}
RELEASED_NAMES = (  # the release's name of a tensor -> ours
    (r"^loss\..*|^(pre|post)_quants\.\d+\.bias", ""),  # LPIPS; biases are stacked below
    (r"^(pre|post)_quants\.\d+\.weight", r"\1_quant.weight"),
    (r"^quantizers\.\d+\.embedding\.(weight|cluster_size)", r"codebook.\1"),
    (r"^quantizers\.\d+\.embedding\.embed_avg", "codebook.embed_sum"),
    (r"\.(down|up)\.(\d+)\.(block|attn)\.(\d+)\.", r".\1_\2_\3_\4."),
    (r"\.(down|up)\.(\d+)\.(downsample|upsample)\.conv\.", r".\1_\2_\3."),
    (r"\.mid\.", ".mid_"),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.(norm|conv)([12])\.", r".layer\2.\1."),
    (r"\.(norm|conv)_out\.", r".conv_out.\1."))

def from_lightning(checkpoint, path):
    """A released checkpoint, of Lightning 1.5 -> one of ours. ValueError if none."""
    try:
        state, args = checkpoint["state_dict"], checkpoint["hyper_parameters"]
        args = args if isinstance(args, argparse.Namespace) else args["args"]
        config = {ours: getattr(args, theirs) for ours, theirs in RELEASED_SETTINGS.items()}
        pre = list(range(len(config["levels"])))
        post = pre[::-1]  # post_quants are numbered as decoders, coarsest first
        if "connectors.0.weight" in state:  # AugVAE-SL: the last encoder makes its grid
            last = max(i for i in pre if f"encoders.{i}.conv_in.weight" in state)
            config["single_level"] = config["levels"][last]
            pre, post = [last], [0]
        tensors = {"codebook.updates": torch.tensor(2 ** 20)}  # many, so that update() uses EMA_DECAY
        for theirs, tensor in state.items():
            name = theirs
            for pattern, ours in RELEASED_NAMES:
                name = re.sub(pattern, ours, name)
            if name and not torch.equal(tensors.setdefault(name, tensor), tensor):
                raise ValueError(f"{theirs} is not equal to {name} of other levels")
        tensors["pre_quant.bias"] = torch.stack([state[f"pre_quants.{i}.bias"] for i in pre])
        tensors["post_quant.bias"] = torch.stack([state[f"post_quants.{i}.bias"] for i in post])
        return {"config": config, "model": tensors}
    except Exception as e:
        raise ValueError(f"{path} is not a released AugVAE ({type(e).__name__}: {e})") from None

# -----------------------------------------------------------------------------
# Same result, less memory or time

def norm_silu_conv(x, norm, conv, dropout=0.0):
    """conv(dropout(silu(norm(x)))). Without dropout, it keeps only x; backward computes the rest again."""
    if dropout:
        return conv(for_conv(F.dropout(F.silu(norm(for_norm(x))), dropout)))
    return NormSiLUConvFunction.apply(x, norm.weight, norm.bias, conv.weight, conv.bias,
                                      norm.num_groups, norm.eps)

class NormSiLUConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias, n_groups, eps):
        ctx.save_for_backward(x, gamma, beta, weight)
        ctx.sizes, ctx.eps = (*x.shape[:2], x.shape[2] * x.shape[3], n_groups), eps
        h, _, _ = group_norm(x, gamma, beta, ctx.sizes, eps)
        return F.conv2d(for_conv(F.silu(h, inplace=True)), weight, bias, padding=1)

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, weight = ctx.saved_tensors
        norm_out, mean, rstd = group_norm(x, gamma, beta, ctx.sizes, ctx.eps)
        h, dtype = for_conv(F.silu(norm_out)), grad.dtype  # backward runs outside autocast
        grad_h, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, h.to(dtype), weight.to(dtype), [len(weight)],
            [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3)
        grad_h = torch.ops.aten.silu_backward(for_norm(grad_h.to(x.dtype)), norm_out)
        grad_x, grad_gamma, grad_beta = torch.ops.aten.native_group_norm_backward(
            grad_h, for_norm(x), mean, rstd, gamma.to(x.dtype), *ctx.sizes, [True] * 3)
        return for_conv(grad_x), grad_gamma, grad_beta, grad_weight, grad_bias, None, None

def group_norm(x, gamma, beta, sizes, eps):
    """In x's own type, autocast's on CUDA; the kernel adds up in fp32. -> result, mean, 1 / std"""
    return torch.native_group_norm(for_norm(x), gamma.to(x.dtype), beta.to(x.dtype), *sizes, eps)

# CUDA's convolutions are fastest in channels_last. Before torch 2.14, its group norm wants NCHW: the forward
# pass refuses channels_last, and the backward pass silently misreads it.
def for_norm(x):
    return x.contiguous() if x.is_cuda and not norm_takes_channels_last(x.device, x.dtype) else x

def for_conv(x):
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x

@functools.cache
def norm_takes_channels_last(device, dtype):
    """Try it, forward and backward."""
    x = torch.linspace(-1, 2, 128, device=device).sin().to(dtype).view(2, 4, 4, 4)
    results = []
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            y, mean, rstd = torch.native_group_norm(x, None, None, 2, 4, 16, 2, 1e-6)
            grad_x, _, _ = torch.ops.aten.native_group_norm_backward(
                x.cos(), x, mean, rstd, None, 2, 4, 16, 2, [True, False, False])
            results.append(torch.cat([y, grad_x]).float())
        return torch.allclose(*results, rtol=0.05, atol=0.05)
    except RuntimeError:
        return False

def upsample_conv(x, weight, bias):
    """conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1), with 4/9 of the multiplications: the
    3x3 kernel and the 2x2 box of repeated pixels make the 4x4 kernel of a transposed convolution."""
    k = weight.flip(2, 3).transpose(0, 1)  # (in, out, 3, 3)
    k = F.pad(k, (0, 1)) + F.pad(k, (1, 0))  # convolved with a box along x: (in, out, 3, 4)
    k = F.pad(k, (0, 0, 0, 1)) + F.pad(k, (0, 0, 1, 0))  # and along y: (in, out, 4, 4)
    return F.conv_transpose2d(x, k, bias, stride=2, padding=1)

@contextlib.contextmanager
def full_fp32():
    """No TF32 inside, even where it is allowed: it would change up to 2.4 % of the codes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
