"""
Use a trained run: paint captions, caption images, complete either, look at reconstructions, score.

$ python sample.py                                  both ways on validation items -> out/samples.png
$ python sample.py --prompt "a small red circle above a large blue square" --rerank 32
$ python sample.py --prompts captions.txt           one caption a line
$ python sample.py --image picture.png folder       what do the pictures show?
$ python sample.py --image picture.png --beam 4     the likeliest captions instead of random ones
$ python sample.py --image picture.png --prefix "there is a"                     ... that begin like this
$ python sample.py --image picture.png --prompt "a red circle ..." --keep_rows 4 keep top rows, paint the rest
$ python sample.py --image picture.png --variations paint what the captions say of it
$ python sample.py --reconstruct a.png b.png        what do the image tokens keep?
$ python sample.py --eval --rerank 8                scores on validation data, one JSON object last

--save_dir gets pictures one by one, a contact sheet, samples.json (prompts, seeds, settings, scores), after
--eval scores.json, and with --html all of it on one page, page.html, with the run's curves and grids.

References:
1) SSIM: Wang et al. 2004. FID: Heusel et al. 2017, https://arxiv.org/abs/1706.08500 (pytorch-fid's network).
2) BLEU: Papineni et al. 2002. ROUGE-L: Lin 2004. CIDEr-D: Vedantam et al. 2015,
   https://arxiv.org/abs/1411.5726. All as the MS-COCO caption evaluation computes them.
"""
import base64
import dataclasses
import glob
import html
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import augvae
import data
from augvae import AugVAE, AugVAEConfig, codebook_use
from biart import BiART, BiARTConfig
from data import DataConfig
from tokenizer import Tokenizer
from train import STAGES, Context, Parser, configure, fingerprint, load_augvae, load_checkpoint, build_model


@dataclass
class SampleConfig:
    # The run
    out_dir: str = "out"  # the run to use, as train.py's
    best: bool = False  # use BiART's checkpoint of the lowest validation loss, not the last
    vae: str = ""  # AugVAE to use instead of the run's: a checkpoint of ours or a released one
    save_dir: str = ""  # where to put what is made; empty is out_dir
    html: bool = False  # put the run's curves and grids, the samples and the scores on one page
    # What to do; without any of these, both directions on validation items
    prompt: str = ""  # paint this caption
    prompts: str = ""  # paint the captions in this text file, one a line
    image: tuple[str, ...] = ()  # caption these image files, and all images in these folders
    keep_rows: int = 0  # with --image: keep so many token rows and paint the rest by --prompt or --variations
    variations: bool = False  # with --image: paint what the captions say of it
    prefix: str = ""  # with --image: how the captions begin
    reconstruct: tuple[str, ...] = ()  # show these images, and those in folders, over their reconstructions
    eval: bool = False  # score reconstruction and both directions on validation data
    eval_items: int = 200  # validation items to score
    eval_pairs: int = 64  # so many of them for retrieval, each image against each caption
    bench: bool = False  # measure decoding of a model of 12 x 512 instead, in float32 if --dtype is auto
    json: bool = False  # bench: print one JSON object last
    # How to sample, in both directions
    n: int = 8  # samples to make of each input (at most --beam); without an input, validation items to show
    batch_size: int = 64  # samples made at a time; the results are the same
    temperature: float = 1.0  # below 1 is more careful, 0 takes the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens; 0 from all
    top_p: float = 0.9  # sample from the likeliest tokens that sum to this probability
    guidance: float = 1.0  # classifier-free guidance: above 1 follows the given side more closely
    seed: int = 0  # of an input's first sample; others count up from it, the next input's from 1000 further
    rerank: int = 1  # draw this many candidates an input; the n that explain it best come first; 1: as drawn
    rerank_forward: float = 0.2  # share of log p(candidate | input) in that, beside log p(input | candidate)
    beam: int = 0  # caption by a search with this many beams; 0 samples
    length_penalty: float = 1.0  # of beams, which are ranked by log p / length ** this
    # Where and how to compute
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto is cuda where there is one
    dtype: str = "auto"  # float32, bfloat16 or float16 autocast; auto is what helps on the device
    # Weights for --eval
    fid_weights: str = ""  # file of Inception's, for FID; empty looks in torch hub's cache
    vgg_weights: str = ""  # file of VGG-16's, for LPIPS; empty looks in torch hub's cache
    lpips_weights: str = ""  # file of LPIPS's own; empty looks in torch hub's cache
    download: bool = False  # fetch what --eval misses of these, hash checked; else it leaves the metric out


def check(config, given):
    """Raises ValueError, a sentence, for settings out of range or that do not go together."""
    ranges = (("n", 1, 1000), ("batch_size", 1, None), ("eval_items", 1, None), ("eval_pairs", 1, None),
              ("rerank", 1, 1000), ("rerank_forward", 0, 1), ("beam", 0, None), ("temperature", 0, None),
              ("top_k", 0, None), ("keep_rows", 0, None))
    for name, low, high in ranges:
        value = getattr(config, name)
        if not low <= value <= (math.inf if high is None else high):
            wanted = f"at least {low}" if high is None else f"in {low} to {high}"
            raise ValueError(f"--{name} {value} is not {wanted}")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"--top_p {config.top_p} is not above 0 and at most 1")
    for name, what in (("prompt", "a caption"), ("prompts", "a file"), ("image", "an image file"),
                       ("prefix", "words")):
        if name in given and not "".join(given[name]).strip():
            raise ValueError(f"--{name} is empty: give it {what}")
    uses = [f"--{name}" for name in ("prompt", "prompts", "image", "reconstruct", "eval")
            if getattr(config, name)]
    if len(uses) > 1 and uses != ["--prompt", "--image"]:
        raise ValueError(f"{' and '.join(uses)} are different uses: choose one")
    if len(uses) == 2 and not config.keep_rows:
        raise ValueError("--prompt with --image completes the image: "
                         "say with --keep_rows how many rows to keep")
    for name in ("keep_rows", "variations", "prefix"):
        if getattr(config, name) and not config.image:
            raise ValueError(f"--{name} needs --image")
    if config.keep_rows and not (config.prompt or config.variations):
        raise ValueError("--keep_rows needs --prompt or --variations, by which the other rows are painted")
    if config.variations and config.prompt:
        raise ValueError("--variations paints what the image's captions say: give it no --prompt")
    if config.prefix and config.prompt:
        raise ValueError("--prefix begins a caption of --image: it does not go with --prompt")
    if config.beam and (config.prompt or config.prompts):
        raise ValueError("--beam searches for captions: it does not paint")
    if config.beam and config.rerank > 1:
        raise ValueError(f"--beam {config.beam} and --rerank {config.rerank} both choose captions: "
                         "leave one out")
    for name in ("temperature", "top_k", "top_p"):
        if config.beam and config.image and not config.variations and name in given:
            raise ValueError(f"--{name} is for sampling, and --beam {config.beam} does not sample: "
                             "leave one out")


class Run:
    """The models of a run in out_dir, and the sampler's settings."""

    def __init__(self, config):
        self.config, self.context = config, Context(config.device, config.dtype, wide=False)
        if config.vae:
            vae = load_augvae(config.vae)
        else:
            vae = build_model(AugVAE, AugVAEConfig,
                          load_checkpoint(os.path.join(config.out_dir, "augvae_sl.pt"), "augvae_sl"))
        self.vae = vae.to(self.context.device)
        self.size, self.side = self.vae.config.image_size, self.vae.config.single_level
        self.save_dir = config.save_dir or config.out_dir
        if config.keep_rows and config.keep_rows >= self.side:
            raise ValueError(f"--keep_rows {config.keep_rows} is not in 1 to {self.side - 1}, "
                             f"of {self.side} rows of tokens")
        os.makedirs(self.save_dir, exist_ok=True)

    def load_biart(self):
        """Load BiART and the tokenizer too. Raises ValueError where they belong to another run."""
        path = os.path.join(self.config.out_dir, "biart_best.pt" if self.config.best else "biart.pt")
        checkpoint = load_checkpoint(path, "biart")
        self.settings = checkpoint["settings"]
        self.tokenizer = Tokenizer.load(os.path.join(self.config.out_dir, "tokenizer.json"))
        for name, print_ in (("augvae", fingerprint(self.vae)), ("tokenizer", self.tokenizer.fingerprint())):
            if checkpoint[name] != print_:
                where = self.config.vae if name == "augvae" and self.config.vae else self.config.out_dir
                raise ValueError(f"{path} was trained with another {name} than the one in {where}")
        self.biart = build_model(BiART, BiARTConfig, checkpoint).to(self.context.device, self.context.dtype)
        return self

    def encode(self, images):
        """PIL images -> codes LongTensor (B, n), finest grid first; what was encoded (B, 3, size, size)."""
        pixels = torch.stack([data.crop_to_tensor(image, self.size) for image in images])
        pixels = pixels.to(self.context.device)
        with self.context.autocast():
            return torch.cat([grid.flatten(1) for grid in self.vae.encode(pixels)], 1), pixels

    def pixels(self, codes):
        """Codes (B, n), as encode() gives them -> images (B, 3, size, size) in [-1, 1]."""
        sides = self.vae.config.grids
        grids = [part.unflatten(1, (s, s)) for part, s in zip(codes.split([s * s for s in sides], 1), sides)]
        with self.context.autocast():
            return self.vae.decode(grids).float()

    def decode(self, codes):
        """Codes (B, n), as encode() gives them -> PIL images."""
        return [data.to_image(x) for x in self.pixels(codes)]

    def tokenize(self, captions):
        """Captions -> LongTensor (B, n_text); says so where one is cut."""
        n_text, rows = self.biart.config.n_text, []
        for caption in captions:
            ids, cut = self.tokenizer.encode_padded(caption, n_text)
            rows.append(ids)
            if cut:
                kept = self.tokenizer.decode(ids)
                print(f"warning: the prompt is longer than {n_text - 1} tokens and was cut to {kept!r}",
                      file=sys.stderr)
        return torch.tensor(rows, device=self.context.device)

    def candidates(self, ref, to, n=1, first=0, prefix=None):
        """
        The heart of all uses. REF sides (B, n_ref) of inputs number `first` and on -> for each a list of n
        (with --rerank, all that were drawn, best first), as dicts: "tokens" (n_gen,), "order" in which they
        were found, "seed" (of sampled ones), and in nats "forward", log p(candidate | input), and "reverse",
        log p(input | candidate).
        """
        c, count = self.config, max(n, self.config.rerank)
        seeds = [[c.seed + 1000 * (first + i) + j for j in range(count)] for i in range(len(ref))]
        with self.context.autocast():
            if c.beam and to == "text":
                tokens, _ = self.biart.beam_search(ref, c.beam, prefix, c.length_penalty, c.guidance)
            else:
                tokens = self.biart.generate(ref, to, count, prefix, c.temperature, c.top_k, c.top_p,
                                             c.guidance, [seed for row in seeds for seed in row])
            tokens = tokens.view(len(ref), -1, tokens.shape[-1])
            forward, reverse = (x.tolist() for x in self.biart.score_candidates(ref, tokens, to))
        found = []
        for i, row in enumerate(seeds):
            found.append([{"tokens": tokens[i, j], "order": j,
                           "seed": None if c.beam and to == "text" else row[j],
                           "forward": forward[i][j], "reverse": reverse[i][j]}
                          for j in range(tokens.shape[1])])
            if c.rerank > 1:
                found[-1].sort(key=self.score, reverse=True)
        return found

    def score(self, candidate):
        """
        What --rerank orders by: how well the candidate explains the input and, by a smaller share, how likely
        it is itself, without which a crippled circle passes for a circle.
        """
        share = self.config.rerank_forward
        return share * candidate["forward"] + (1 - share) * candidate["reverse"]

    def inputs(self, n, count, what):
        """Inputs number 0 ... count - 1, as many at a time as --batch_size lets n samples of each be made."""
        drawn = max(n, self.config.rerank, self.config.beam)
        return progress(range(count), max(1, self.config.batch_size // drawn), what)

    def paint(self, prompts, n=1, images=None):
        """
        Captions -> yields for each, as they get done, n records {"picture": PIL image, "prompt", "seed",
        "scores"}. images: PIL images, one a caption, of which --keep_rows are kept.
        """
        n_kept = self.config.keep_rows * self.side
        for some in self.inputs(n, len(prompts), "painting"):
            captions = [prompts[i] for i in some]
            kept = self.encode([images[i] for i in some])[0][:, :n_kept] if images else None
            found = self.candidates(self.tokenize(captions), "image", n, some[0], kept)
            for prompt, group in zip(captions, found):
                pictures = self.decode(torch.stack([candidate["tokens"] for candidate in group[:n]]))
                yield [{"picture": picture, "prompt": prompt, **told(candidate)}
                       for picture, candidate in zip(pictures, group)]

    def caption(self, images, n=1):
        """PIL images -> yields for each n records {"picture": as encoded, "caption", "seed", "scores"}."""
        ids = self.tokenizer.encode(self.config.prefix.strip())
        if len(ids) >= self.biart.config.n_text:
            raise ValueError(f"--prefix has {len(ids)} tokens, "
                             f"and a whole caption at most {self.biart.config.n_text}")
        for some in self.inputs(n, len(images), "captioning"):
            codes, pixels = self.encode([images[i] for i in some])
            found = self.candidates(codes, "text", n, some[0], codes.new_tensor(ids).expand(len(some), -1))
            for x, group in zip(pixels, found):
                yield [{"picture": data.to_image(x), "caption": self.say(candidate), **told(candidate)}
                       for candidate in group[:n]]

    def say(self, candidate):
        return self.tokenizer.decode(candidate["tokens"].tolist()).strip()


def told(candidate):
    """What samples.json tells of a candidate."""
    return {"seed": candidate["seed"],
            "scores": {way: round(candidate[way], 3) for way in ("forward", "reverse")}}


def progress(items, size, what):
    """Yield chunks of items; every few seconds, print how many are done and how long the others will take."""
    began = shown = time.time()
    for start in range(0, len(items), size):
        yield items[start:start + size]
        done = start + size
        if done < len(items) and time.time() - shown > 5:
            shown = time.time()
            left = (shown - began) / done * (len(items) - done)
            print(f"{what}: {done} of {len(items)}, {left:.0f} s left", flush=True)


# -----------------------------------------------------------------------------
# Uses: what is read, what is made of it, what is written

def read_prompts(path):
    """The lines of a text file, blank ones left out."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            prompts = [line.strip() for line in f if line.strip()]
    except FileNotFoundError:
        raise ValueError(f"there is no file of prompts {path}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not a text file that can be read ({e})") from None
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def read_images(run, paths):
    """
    Image files, and folders of them in the order of their names -> [path], [PIL image, cropped to what the
    model takes]. A folder's unreadable images are passed over with a warning. Raises ValueError for a file
    that is no image, and for a folder that holds none.
    """
    found = []
    for path in paths:
        folder, before = os.path.isdir(path), len(found)
        files = [os.path.join(path, name) for name in sorted(os.listdir(path))] if folder else [path]
        for file in files:
            if folder and os.path.splitext(file)[1].lower() not in Image.registered_extensions():
                continue
            try:
                found.append((file, data.to_image(data.crop_to_tensor(data.load_image(file), run.size))))
            except ValueError as e:
                if not folder:
                    raise
                print(f"warning: {e}", file=sys.stderr)
        if len(found) == before:
            raise ValueError(f"there is no image in the folder {path}")
    return [list(part) for part in zip(*found)]


def keep(run, name, groups, columns):
    """
    Write what is made, lists of records that belong together, as it comes: every picture by itself as
    {name}_{i}.png, all on {name}.png (past 64 rows, on {name}_sheet_2.png, ...) with words below, and all
    that is known in samples.json.
    """
    entries, shown = [], []
    where = os.path.join(run.save_dir, name)

    def finish_sheet():
        page = (len(entries) - 1) // (64 * columns) + 1
        path = f"{where}_sheet_{page}.png" if page > 1 else f"{where}.png"
        data.contact_sheet([r["picture"] for r in shown], [note(run, r) for r in shown], columns).save(path)
        with open(os.path.join(run.save_dir, "samples.json"), "w", encoding="utf-8") as f:
            json.dump({"settings": dataclasses.asdict(run.config), "samples": entries}, f, indent=1,
                      ensure_ascii=False)
        print(f"wrote {path}")
        shown.clear()

    for record in (record for group in groups for record in group):
        path = f"{where}_{len(entries)}.png"
        record["picture"].save(path)
        entries.append({"file": os.path.basename(path),
                        **{k: v for k, v in record.items() if k != "picture"}})
        shown.append(record)
        print(f"{record.get('image', path)}: {note(run, record)}")
        if len(shown) == 64 * columns:
            finish_sheet()
    if shown:
        finish_sheet()


def note(run, record):
    """What stands under a picture: words, and with --rerank the score that put it in its place."""
    words = (f"paint: {record['prompt']}" if "prompt" in record else
             f"it says: {record['caption']}" if "caption" in record else record["image"])
    ranked = run.config.rerank > 1 and "scores" in record
    return f"{words} [{run.score(record['scores']):.1f}]" if ranked else words


def columns_for(together):
    """How wide a sheet is on which so many pictures belong together."""
    return together if 2 <= together <= 16 else 8


def show_reconstructions(run, paths, images):
    """The images over what their tokens keep of them."""
    def groups():
        for some in progress(range(len(images)), 8, "reconstruction"):
            codes, pixels = run.encode([images[i] for i in some])
            yield [{"picture": data.to_image(x), "image": paths[i]} for i, x in zip(some, pixels)]
            yield [{"picture": x, "image": f"{paths[i]}, its tokens"}
                   for i, x in zip(some, run.decode(codes))]

    keep(run, "reconstructed", groups(), min(8, len(images)))


def show_paintings(run, prompts):
    """n images of each prompt."""
    keep(run, "painted", run.paint(prompts, run.config.n), columns_for(run.config.n))


def show_captions(run, paths, images):
    """n captions of each image."""
    n = min(run.config.n, run.config.beam or run.config.n)
    said = ([{"image": path, **record} for record in group]
            for path, group in zip(paths, run.caption(images, n)))
    keep(run, "captioned", said, columns_for(n))


def show_repaintings(run, paths, images):
    """Each image, then n more that begin with its first rows: painted by --prompt, or by its captions."""
    n = run.config.n
    painted = run.paint([run.config.prompt] * len(images), n, images)
    if run.config.variations:
        n = min(n, run.config.beam or n)
        prompts = [record["caption"] for group in run.caption(images, n) for record in group]
        one_by_one = run.paint(prompts, 1, [image for image in images for _ in range(n)])
        painted = ([record for _ in range(n) for record in next(one_by_one)] for _ in images)
    groups = ([{"picture": image, "image": path}, *group]
              for path, image, group in zip(paths, images, painted))
    keep(run, "repainted", groups, columns_for(n + 1))


def show_both_ways(run, dataset):
    """Validation items: what is painted over its caption, and each image over what is said of it."""
    items, columns = range(len(dataset)), min(8, len(dataset))
    references = [dataset.captions(i) for i in items]
    painted = [group[0] for group in run.paint([captions[0] for captions in references])]
    said = [{"references": captions, **group[0]}
            for captions, group in zip(references, run.caption([dataset.image(i) for i in items]))]
    keep(run, "samples", [way[i:i + columns] for i in items[::columns] for way in (painted, said)], columns)


# -----------------------------------------------------------------------------
# Metrics of pictures

def psnr(x, y):
    """Images (B, 3, H, W) in [0, 1], twice -> dB (B,), at most 100."""
    return -10 * (x - y).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def l1(x, y):
    """Images (B, 3, H, W) in [0, 1], twice -> mean absolute difference (B,)."""
    return (x - y).abs().mean((1, 2, 3))


def ssim(x, y, sample_covariance=False):
    """
    Images (B, C, H, W) in [0, 1], twice, 11 pixels or more -> structural similarity (B,) in Gaussian windows
    of 11 x 11, sigma 1.5, as in Wang et al. 2004. sample_covariance divides by N - 1, scikit-image's default.
    """
    window = torch.exp(-torch.arange(-5, 6, device=x.device).double().square() / (2 * 1.5 ** 2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2
    B = len(x)
    x, y = (z.double().flatten(0, 1)[:, None] for z in (x, y))  # (B * C, 1, H, W)
    mx, my, xx, yy, xy = (F.conv2d(z, window) for z in (x, y, x * x, y * y, x * y))
    norm = 121 / 120 if sample_covariance else 1
    vx, vy, vxy = norm * (xx - mx * mx), norm * (yy - my * my), norm * (xy - mx * my)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.view(B, -1).mean(1)


# Name in torch hub's cache, how its SHA-256 hash begins, address
FID_FILE = ("pt_inception-2015-12-05-6726825d.pth", "6726825d",
            ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth"))


class OtherPool(nn.Module):
    """A block of torchvision's Inception, the last branch of which pools otherwise."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x):
        pooled = self.block.branch_pool(self.pool(x))
        return torch.cat([self.block(x)[:, :-pooled.shape[1]], pooled], dim=1)


class FIDInception(nn.Module):
    """
    FID's network: PIL images of one size -> features (B, 2048). It is torchvision's Inception v3 but for its
    pooling branches: averages leave out padding, the last block takes a maximum. `path` holds its weights.
    """

    def __init__(self, path):
        super().__init__()
        from torchvision.models import inception_v3  # here, because nothing else needs it
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        try:
            net.load_state_dict(augvae.safe_load(path))
        except (RuntimeError, TypeError):  # other names, shapes or things
            raise ValueError(f"{path} does not hold FID's Inception, {FID_FILE[0]}") from None
        for name, block in list(net.named_children()):
            if hasattr(block, "branch_pool"):
                average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
                setattr(net, name, OtherPool(block, nn.MaxPool2d(3, 1, 1) if name == "Mixed_7c" else average))
        net.fc = nn.Identity()
        self.net = net.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures):
        x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        x = x.to(next(self.parameters()).device).float() / 255
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1).cpu()


def frechet_distance(x, y):
    """
    FID of features (N, D) and (M, D): |mean_x - mean_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x C_y)^(1/2)), with C
    the covariance. As C = R'R, from a QR decomposition of the centred features, C_x C_y has the eigenvalues
    of (R_x R_y') (R_x R_y')', so the last trace is the sum of R_x R_y' 's singular values: no root of a
    matrix, and exact where N < D, too.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"FID is between two sets of at least 2 images, not {len(x)} and {len(y)}")
    (mx, rx), (my, ry) = ((z.mean(0), torch.linalg.qr((z - z.mean(0)) / (len(z) - 1) ** 0.5).R)
                          for z in (x.double(), y.double()))
    root = torch.linalg.svdvals(rx @ ry.T).sum()
    return ((mx - my).square().sum() + rx.square().sum() + ry.square().sum() - 2 * root).item()


# -----------------------------------------------------------------------------
# Metrics of captions

ABBREVIATION = r"(?:mr|mrs|ms|dr|st|vs|etc|ave|no)\.|(?:[^\W\d_]\.){2,}"
ENDING = r"'(?:s|m|d|re|ve|ll)\b"
WORD = re.compile(rf"{ABBREVIATION}|{ENDING}|\d+(?:[.,:]\d+)+|[#@]?\w+(?:[-/.']+\w+)*|[^\w\s]")
PUNCTUATION = set(".,:;?!-'\"`()[]{}…–—“”‘")


def caption_words(caption):
    """
    A caption as words by the MS-COCO convention, the Penn Treebank's in lower case, without punctuation:
    "A dog's t-shirt isn't here!" -> ["a", "dog", "'s", "t-shirt", "is", "n't", "here"]
    (COCO's tool means to drop brackets but lets them through as "-lrb-"; here they are dropped.)
    """
    text = caption.lower().replace("’", "'")
    text = re.sub(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))", r"\1 ", text)
    text = re.sub(rf"(?<=\w)(n't\b|{ENDING})", r" \1", text)
    return [word for word in WORD.findall(text) if word not in PUNCTUATION]


def ngrams(words):
    """All runs of one to four words, counted."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def bleu(said, references):
    """
    Corpus BLEU-1 ... BLEU-4. said: a list of captions, each a list of words; references: for each a list of
    such captions. A caption's reference length is that of the reference nearest in length.
    """
    right, possible, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for words, others in zip(said, references):
        most = Counter()
        for other in others:
            most |= ngrams(other)
        for gram, count in (ngrams(words) & most).items():
            right[len(gram) - 1] += count
        for n in range(4):
            possible[n] += max(0, len(words) - n)
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    brevity = math.exp(min(0, 1 - (reference_length + 1e-9) / (length + 1e-15)))
    logs = [math.log((r + 1e-15) / (p + 1e-9)) for r, p in zip(right, possible)]
    return [brevity * math.exp(sum(logs[:n]) / n) for n in range(1, 5)]


def rouge_l(said, references):
    """Mean over captions of the longest common subsequence's F-measure (beta 1.2); lists as for bleu()."""
    def common(a, b):
        best = [0] * (len(b) + 1)  # row by row: the longest of a[:i] and b[:j]
        for word in a:
            diagonal = 0
            for j, other in enumerate(b):
                longest = diagonal + 1 if word == other else max(best[j], best[j + 1])
                diagonal, best[j + 1] = best[j + 1], longest
        return best[-1]

    total = 0.0
    for words, others in zip(said, references):
        words, others = words or [""], [other or [""] for other in others]
        lengths = [common(words, other) for other in others]
        precision = max(lengths) / len(words)
        recall = max(n / len(other) for n, other in zip(lengths, others))
        if precision and recall:
            total += (1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision)
    return total / len(said)


def cider_d(said, references):
    """
    CIDEr-D, 0 to 10; lists of words as for bleu(). Document frequencies are those of these references, so the
    score is of the set as a whole, and 0 for a single image.
    """
    documents = Counter(gram for others in references for gram in set().union(*map(ngrams, others)))

    def weigh(words):  # tf-idf of every n-gram, a dict for each n
        vectors = [{} for _ in range(4)]
        for gram, count in ngrams(words).items():
            vectors[len(gram) - 1][gram] = count * (math.log(len(said)) - math.log(max(1, documents[gram])))
        return vectors, [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]

    total = 0.0
    for words, others in zip(said, references):
        ours, our_norms = weigh(words)
        for other in others:
            theirs, their_norms = weigh(other)
            # the reference package counts bigrams, so an empty caption is as long as one word
            penalty = math.exp(-(max(0, len(words) - 1) - max(0, len(other) - 1)) ** 2 / (2 * 6.0 ** 2))
            for mine, yours, a, b in zip(ours, theirs, our_norms, their_norms):
                product = sum(min(v, yours[gram]) * yours[gram] for gram, v in mine.items() if gram in yours)
                total += 10 / 4 * penalty * product / (a * b or 1) / len(others)
    return total / len(said)


def caption_scores(said, references):
    """Captions, and for each a list of right ones -> {"bleu1", ... "bleu4", "rouge_l", "cider_d"}."""
    said = [caption_words(c) for c in said]
    references = [[caption_words(c) for c in others] for others in references]
    return {**{f"bleu{n}": value for n, value in enumerate(bleu(said, references), 1)},
            "rouge_l": rouge_l(said, references), "cider_d": cider_d(said, references)}


# -----------------------------------------------------------------------------
# Scores of a run

def metric_weights(run, flag, file):
    """Path of weights: named by --flag, cached or, with --download, fetched; else None, and says so."""
    path = augvae.find_weights(flag, getattr(run.config, flag), *file, run.config.download)
    if not path:
        print(f"{file[0]} is not in torch hub's cache: give it by --{flag}, or --download; "
              "what needs it is left out")
    return path


def find_inception(run):
    """FIDInception, or None where its weights are not at hand."""
    path = metric_weights(run, "fid_weights", FID_FILE)
    return path and FIDInception(path).to(run.context.device)


def find_lpips(run):
    """LPIPS, a module of two batches in [-1, 1] -> (B,), or None where its weights are not at hand."""
    paths = [metric_weights(run, flag, file) for flag, file in (("vgg_weights", augvae.VGG_FILE),
                                                              ("lpips_weights", augvae.LPIPS_FILE))]
    return augvae.LPIPS(*paths).to(run.context.device) if all(paths) else None


def score(run, val, heldout):
    """
    -> the scores of all of these, by name; those of `heldout`, the built-in scenes' split of things never
    seen (or None), with "_heldout" behind their names. See the functions below.
    """
    inception = find_inception(run)
    scores = {**reconstruction_scores(run, val, inception), **likelihood_scores(run, val)}
    for suffix, dataset in (("", val), ("_heldout", heldout)):
        if dataset:
            found = generation_scores(run, dataset, heldout is not None, inception)
            scores.update({name + suffix: value for name, value in found.items()})
    return scores


def prompts_of(dataset):
    """One caption an item; which one changes from item to item."""
    return [captions[i % len(captions)]
            for i, captions in enumerate(map(dataset.captions, range(len(dataset))))]


def reconstruction_scores(run, val, inception=None):
    """
    -> {"psnr" (dB), "ssim", "l1" (of 0 to 1)}, "lpips" and "rfid" where there are weights, means over images;
    "codebook_use", the share of codes in use, and their "perplexity".
    """
    metrics, lpips = {"psnr": psnr, "ssim": ssim, "l1": l1}, find_lpips(run)
    if lpips:
        metrics["lpips"] = lambda x, y: lpips(2 * x - 1, 2 * y - 1)
    values, features = {name: [] for name in metrics}, ([], [])
    counts = torch.zeros(run.vae.config.codebook_size)
    for items in progress(range(len(val)), 50, "reconstruction"):
        codes, pixels = run.encode([val.image(i) for i in items])
        again = run.pixels(codes)
        for name, metric in metrics.items():
            values[name] += metric((pixels + 1) / 2, (again + 1) / 2).tolist()
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        if inception:
            for some, x in zip(features, (pixels, again)):
                some.append(inception([data.to_image(image) for image in x]))
    scores = {name: sum(some) / len(some) for name, some in values.items()}
    if inception:
        scores["rfid"] = frechet_distance(*map(torch.cat, features))
    return {**scores, **dict(zip(("codebook_use", "perplexity"), codebook_use(counts)))}


def likelihood_scores(run, val):
    """
    -> {"t2i_bits", "i2t_bits"}, bits per generated token on one caption an image; and, on the first
    --eval_pairs of them, "..._recall1" and "..._recall5", how often the right one of all images is among the
    one or five that explain the text best, by log p(text | image) (t2i), and the right text among those that
    explain the image best (i2t).
    """
    prompts, sides = prompts_of(val), {"text": [], "image": []}
    for items in progress(range(len(val)), 50, "encoding"):
        sides["text"].append(run.tokenize([prompts[i] for i in items]))
        sides["image"].append(run.encode([val.image(i) for i in items])[0])
    sides = {modality: torch.cat(parts) for modality, parts in sides.items()}
    scores, n = {}, min(run.config.eval_pairs, len(val))
    for way, query, answer in (("t2i", "text", "image"), ("i2t", "image", "text")):
        with run.context.autocast():
            log_p, count = run.biart.log_likelihood(**sides, to=answer)
            scores[f"{way}_bits"] = -log_p.sum().item() / math.log(2) / count.sum().item()
            ranks = []
            for items in progress(range(n), 16, f"{way} retrieval"):
                for i in items:
                    pairs = {query: sides[query][i].expand(n, -1), answer: sides[answer][:n]}
                    explained, _ = run.biart.log_likelihood(**pairs, to=query)
                    ranks.append((explained > explained[i]).sum().item())
        scores.update({f"{way}_recall{k}": share(rank < k for rank in ranks) for k in (1, 5)})
    return scores


def share(truths):
    """The share of some booleans that is true."""
    truths = list(truths)
    return sum(truths) / len(truths)


def generation_scores(run, dataset, oracle, inception=None):
    """
    One picture painted of one caption an item, one caption given to its image ->
    "t2i_exact", "i2t_exact": with an oracle, the shares that have all attributes and the relation right;
    "bleu1" ... "bleu4", "rouge_l", "cider_d" of the captions, against all that the item has;
    "fid" of the paintings, where there are weights.
    With --rerank all of these again, "..._rerank", of the best candidate; without the suffix, of the first.
    """
    choose = {"": lambda group: min(group, key=lambda candidate: candidate["order"])}
    if run.config.rerank > 1:
        choose["_rerank"] = lambda group: group[0]
    prompts, references = prompts_of(dataset), [dataset.captions(i) for i in range(len(dataset))]
    painted, said, originals = {way: [] for way in choose}, {way: [] for way in choose}, []
    for items in run.inputs(1, len(dataset), "painting and captioning"):
        codes, pixels = run.encode([dataset.image(i) for i in items])
        images = run.candidates(run.tokenize([prompts[i] for i in items]), "image", first=items[0])
        texts = run.candidates(codes, "text", first=items[0])
        originals += [data.to_image(x) for x in pixels]
        for way, pick in choose.items():
            painted[way] += run.decode(torch.stack([pick(group)["tokens"] for group in images]))
            said[way] += [run.say(pick(group)) for group in texts]
    scores = {}
    for way in choose:
        found = caption_scores(said[way], references)
        if oracle:
            truth = [data.parse_caption(captions[0]) for captions in references]
            found["t2i_exact"] = share(data.read_scene(image) == fact
                                       for image, fact in zip(painted[way], truth))
            found["i2t_exact"] = share(data.parse_caption(text) == fact
                                       for text, fact in zip(said[way], truth))
        if inception:
            features = (torch.cat([inception(images[i:i + 50]) for i in range(0, len(images), 50)])
                        for images in (originals, painted[way]))
            found["fid"] = frechet_distance(*features)
        scores.update({name + way: value for name, value in found.items()})
    return scores


# -----------------------------------------------------------------------------
# A page of it all

PAGE = """<!doctype html><meta charset="utf-8"><title>{name}</title><style>
body {{font: 14px sans-serif; margin: 2em auto; max-width: 1000px; color: #222}} \
td {{padding: 1px 12px 1px 0}}
img {{max-width: 100%}} figure {{margin: 0 0 1em}} .grid {{display: flex; flex-wrap: wrap; gap: 12px}}
.grid figure {{width: 150px; font-size: 12px}} .grid img {{width: 150px; image-rendering: pixelated}}
</style><h1>{name}</h1>
{body}
"""


def write_page(run):
    """page.html: scores, samples, curves and grids from save_dir and out_dir, in one file without scripts."""
    def figure(path, *lines):
        with open(path, "rb") as f:
            picture = base64.b64encode(f.read()).decode()
        text = "<br>".join(map(html.escape, lines))
        return (f'<figure><img src="data:image/png;base64,{picture}" alt="">'
                f'<figcaption>{text}</figcaption></figure>')

    def table(rows):
        cells = (f"<tr><td>{html.escape(str(name))}<td>{html.escape(str(value))}"
                 for name, value in rows.items())
        return f"<table>{''.join(cells)}</table>"

    def about(entry):
        yield note(run, entry)
        if entry.get("seed") is not None:
            yield f"seed {entry['seed']}"
        for way, value in entry.get("scores", {}).items():
            yield f"{way} log p {value}"
        for caption in entry.get("references", []):
            yield f"given: {caption}"

    parts = []
    for name in ("scores", "samples"):
        path = os.path.join(run.save_dir, f"{name}.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                made = json.load(f)
            body = table(made["scores"]) if name == "scores" else '<div class="grid">' + "".join(
                figure(os.path.join(run.save_dir, entry["file"]), *about(entry))
                for entry in made["samples"]) + "</div>"
            parts += [f"<h2>{name}</h2>", body]
            parts.append(f"<details><summary>settings</summary>{table(made['settings'])}</details>")
    for stage in STAGES:
        stem = os.path.join(run.config.out_dir, stage)
        grids = sorted(glob.glob(f"{glob.escape(stem)}_[0-9]*.png"), key=lambda path: (len(path), path))
        some = [grids[i] for i in sorted({i * (len(grids) - 1) // 3 for i in range(4)})] if grids else []
        curve = [path for path in [f"{stem}_loss.png"] if os.path.exists(path)]
        if some or curve:
            parts += [f"<h2>{stage}</h2>", *(figure(path, os.path.basename(path)) for path in curve + some)]
    path = os.path.join(run.save_dir, "page.html")
    with open(path, "w", encoding="utf-8") as f:
        title = html.escape(os.path.basename(os.path.abspath(run.config.out_dir)))
        f.write(PAGE.format(name=title, body="\n".join(parts)))
    print(f"wrote {path}")


# -----------------------------------------------------------------------------
# Measurements

@torch.no_grad()
def bench(config, rounds=3):
    """
    Speed of decoding, text -> image tokens, 12 layers of 512, medians: tokens/s from context 64 to 320 at
    batch 1 and 8; a whole image of 1024 tokens; how much longer a token takes at its end; cost of guidance.
    """
    context = Context(config.device, "float32" if config.dtype == "auto" else config.dtype, wide=False)
    torch.manual_seed(0)
    before = context.peak_gb()
    short, whole = (BiART(BiARTConfig(n_layer=12, n_head=8, n_embd=512, image_side=side)).eval()
                    .to(context.device, context.dtype) for side in (16, 32))
    text = torch.randint(0, short.config.end_token, (8, 64), device=context.device)

    def seconds(model, batch, left=None, **settings):
        """Of painting all tokens, or the last `left`."""
        codes = text.new_zeros(batch, model.config.n_image)
        prefix = codes[:, :-left] if left else None
        times = [context.timeit(lambda: model.generate(text[:batch], "image", prefix=prefix, **settings))
                 for _ in range(rounds + 1)]
        return statistics.median(times[1:])

    weights = sum(p.numel() for p in short.blocks.parameters()) + short.token["image"].weight.numel()
    memory = torch.ones(2 ** 28 if context.device.type == "cuda" else 2 ** 26, device=context.device)
    bandwidth = memory.nbytes / min(context.timeit(memory.sum) for _ in range(5))  # bytes/s of reading
    measured = {"tokens_per_s": {}, "share_of_floor": {}}
    for batch in (1, 8):
        taken = seconds(short, batch)
        # keys and values of 64 to 320 tokens
        cache = 2 * short.config.n_layer * short.config.n_embd * batch * (64 + 320) / 2
        floor = (weights + cache) * context.dtype.itemsize * 256 / bandwidth
        measured["tokens_per_s"][str(batch)] = batch * 256 / taken
        measured["share_of_floor"][str(batch)] = floor / taken
        print(f"batch {batch}: {batch * 256 / taken:.1f} tokens/s from context 64 to 320, "
              f"{floor / taken:.0%} of what reading weights and cache at {bandwidth / 1e9:.0f} GB/s allows",
              flush=True)
        if batch == 1:
            measured["guidance_cost"] = seconds(short, 1, guidance=2.0) / taken
            measured["image_s"] = seconds(whole, 1)
            measured["growth"] = (seconds(whole, 1, 96) - seconds(whole, 1, 32)) / 64 / (taken / 256)
            print("guidance costs {guidance_cost:.2f} times as much; "
                  "a whole image of 1024 tokens takes {image_s:.1f} s; "
                  "a token at its end takes {growth:.2f} times as long".format(**measured), flush=True)
    return {**measured, "median_s": 256 / measured["tokens_per_s"]["1"],
            "peak_gb": context.peak_gb() - before, "device": context.device_name(),
            "dtype": str(context.dtype)[6:], "size": [12, 512, 64, 320]}


# -----------------------------------------------------------------------------

def main(argv):
    given = Parser((SampleConfig, DataConfig), {}, description=__doc__).settings(argv)
    config = configure(given, "", SampleConfig)[0]
    check(config, given)
    if config.bench:
        measured = bench(config)
        if config.json:
            print(json.dumps(measured))
        return
    prompts = read_prompts(config.prompts) if config.prompts else [config.prompt]
    run, scores = Run(config), None
    if config.reconstruct:
        show_reconstructions(run, *read_images(run, config.reconstruct))
    elif config.image:
        show = show_repaintings if config.prompt or config.variations else show_captions
        show(run.load_biart(), *read_images(run, config.image))
    elif config.prompt or config.prompts:
        show_paintings(run.load_biart(), prompts)
    else:
        run.load_biart()
        data_config = configure({**run.settings, **given}, "biart", DataConfig)[0]
        val = data.open_data(data_config, "val")
        if not val.captioned:
            raise ValueError(f"--data {data_config.data} has no captions to paint: name captioned data")
        if config.eval:
            heldout = data.open_data(data_config, "heldout") if data_config.data == "scenes" else None
            some = [data.validation_subset(part, config.eval_items) if part else None for part in (val, heldout)]
            scores = {name: round(value, 4) for name, value in score(run, *some).items()}
            with open(os.path.join(run.save_dir, "scores.json"), "w", encoding="utf-8") as f:
                json.dump({"settings": dataclasses.asdict(config), "scores": scores}, f, indent=1)
        else:
            show_both_ways(run, data.validation_subset(val, config.n))
    if config.html:
        write_page(run)
    if scores:
        print(json.dumps(scores))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
