"""
Use a trained run: paint captions, caption images, look at reconstructions, score.

$ python sample.py                                  both ways on validation items -> out/samples.png
$ python sample.py --prompt "a small red circle above a large blue square"
$ python sample.py --image picture.png              what does the picture show?
$ python sample.py --reconstruct a.png b.png        what do the image tokens keep?
$ python sample.py --eval                           scores on validation data, one JSON object last
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import torch

import data
from augvae import AugVAE, AugVAEConfig, codebook_use
from biart import BiART, BiARTConfig
from data import DataConfig
from tokenizer import Tokenizer
from train import Context, Parser, configure, fingerprint, load_augvae, load_checkpoint, restore


@dataclass
class SampleConfig:
    out_dir: str = "out"  # the run to use, as train.py's
    vae: str = ""  # AugVAE to use instead of the run's: a checkpoint of ours or a released one
    prompt: str = ""  # paint this caption
    image: str = ""  # caption this image file
    reconstruct: tuple[str, ...] = ()  # show these image files over their reconstructions
    eval: bool = False  # score reconstruction and both directions on validation data
    eval_items: int = 200  # prompts, and images, to score
    n: int = 8  # samples to make
    temperature: float = 1.0  # below 1 is more careful, 0 takes the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens; 0 from all
    top_p: float = 0.9  # sample from the likeliest tokens that sum to this probability
    guidance: float = 1.0  # classifier-free guidance: above 1 follows the given side more closely
    seed: int = 0  # of the first sample; the others count up from it
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto is cuda where there is one
    dtype: str = "auto"  # float32, bfloat16 or float16 autocast; auto is what helps on the device


class Run:
    """The models of a run in out_dir, and the sampler's settings."""

    def __init__(self, config):
        self.config, self.context = config, Context(config.device, config.dtype, wide=False)
        if config.vae:
            vae = load_augvae(config.vae)
        else:
            vae = restore(AugVAE, AugVAEConfig,
                          load_checkpoint(os.path.join(config.out_dir, "augvae_sl.pt"), "augvae_sl"))
        self.vae = vae.to(self.context.device)
        self.size, self.side = self.vae.config.image_size, self.vae.config.single_level

    def load_biart(self):
        """Load BiART and the tokenizer too. Raises ValueError where they belong to another run."""
        path = os.path.join(self.config.out_dir, "biart.pt")
        checkpoint = load_checkpoint(path, "biart")
        self.settings = checkpoint["settings"]
        self.tokenizer = Tokenizer.load(os.path.join(self.config.out_dir, "tokenizer.json"))
        for name, print_ in (("augvae", fingerprint(self.vae)), ("tokenizer", self.tokenizer.fingerprint())):
            if checkpoint[name] != print_:
                where = self.config.vae if name == "augvae" and self.config.vae else self.config.out_dir
                raise ValueError(f"{path} was trained with another {name} than the one in {where}")
        self.biart = restore(BiART, BiARTConfig, checkpoint).to(self.context.device)
        return self

    def encode(self, images):
        """PIL images -> codes LongTensor (B, n), finest grid first, and what was encoded (B, 3, size, size)."""
        pixels = torch.stack([data.crop_to_tensor(image, self.size) for image in images]).to(self.context.device)
        with self.context.autocast():
            return torch.cat([grid.flatten(1) for grid in self.vae.encode(pixels)], 1), pixels

    def decode(self, codes):
        """Codes (B, n), as encode() gives them -> PIL images."""
        sides = self.vae.config.grids
        grids = [part.unflatten(1, (s, s)) for part, s in zip(codes.split([s * s for s in sides], 1), sides)]
        with self.context.autocast():
            return [data.to_image(x) for x in self.vae.decode(grids)]

    def tokenize(self, captions):
        """Captions -> LongTensor (B, n_text); says so where one is cut."""
        n_text, rows = self.biart.config.n_text, []
        for caption in captions:
            ids, cut = self.tokenizer.encode_padded(caption, n_text)
            rows.append(ids)
            if cut:
                kept = self.tokenizer.decode(ids)
                print(f"warning: the prompt is longer than {n_text - 1} tokens and was cut to {kept!r}", file=sys.stderr)
        return torch.tensor(rows, device=self.context.device)

    def generate(self, ref, to, n=1, seed=0):
        c = self.config
        with self.context.autocast():
            return self.biart.generate(ref, to, n=n, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
                                       guidance=c.guidance, seeds=range(seed, seed + len(ref) * n))

    def paint(self, captions, n=1, seed=0):
        """Captions -> n PIL images each, one caption's after another's."""
        return self.decode(self.generate(self.tokenize(captions), "image", n, seed))

    def caption(self, images, n=1, seed=0):
        """PIL images -> n captions each, one image's after another's."""
        tokens = self.generate(self.encode(images)[0], "text", n, seed)
        return [self.tokenizer.decode(ids).strip() for ids in tokens.tolist()]


def save(picture, *where):
    path = os.path.join(*where)
    picture.save(path)
    print(f"wrote {path}")


def show_reconstructions(run, paths):
    """The image files over what their tokens keep of them."""
    codes, pixels = run.encode([data.load_image(path) for path in paths])
    pictures = [data.to_image(x) for x in pixels] + run.decode(codes)
    save(data.contact_sheet(pictures, columns=len(paths)), run.config.out_dir, "reconstructed.png")


def show_paintings(run, prompt):
    """n images of one prompt, each by itself and all on a sheet."""
    images = run.paint([prompt], run.config.n, run.config.seed)
    for i, image in enumerate(images):
        save(image, run.config.out_dir, f"painted_{i}.png")
    save(data.contact_sheet(images, [prompt] * len(images)), run.config.out_dir, "painted.png")


def show_both_ways(run, dataset):
    """A contact sheet of validation items: what was painted over its caption, each image over what was said of it."""
    items = range(len(dataset))
    prompts, images = [dataset.captions(i)[0] for i in items], [dataset.image(i) for i in items]
    painted = run.paint(prompts, seed=run.config.seed)
    said = run.caption(images, seed=run.config.seed)
    for prompt in prompts:
        print(f"painted: {prompt}")
    for caption in said:
        print(f"said:    {caption}")
    sheet = data.contact_sheet(painted + images, [f"paint: {p}" for p in prompts] + [f"it says: {s}" for s in said],
                               columns=len(items))
    save(sheet, run.config.out_dir, "samples.png")


def score(run, val, heldout):
    """
    -> {"psnr", "codebook_use", "perplexity"} of reconstruction; then, for the built-in scenes, the shares of prompts
    painted and of images captioned with all attributes and the relation right: "t2i_exact", "i2t_exact" on validation
    scenes and "..._heldout" on attribute combinations that training never saw; for other data, bits per token.
    psnr is the mean over images, in dB, of images in [0, 1].
    """
    some = data.spread(val, run.config.eval_items)
    scores = reconstruction_scores(run, some)
    if heldout is None:
        return {**scores, **likelihood_scores(run, some)}
    for suffix, dataset in (("", val), ("_heldout", heldout)):
        right = {"t2i": 0, "i2t": 0}
        for items in progress(range(run.config.eval_items), 50, f"scenes{suffix}"):
            truth = [data.facts(*dataset.scene(i)[:3]) for i in items]
            # which of a scene's paraphrases is asked for changes from scene to scene
            prompts = [captions[i % len(captions)] for i in items for captions in [dataset.captions(i)]]
            painted = run.paint(prompts, seed=run.config.seed + items[0])
            said = run.caption([dataset.image(i) for i in items], seed=run.config.seed + items[0])
            right["t2i"] += sum(data.read_scene(image) == fact for image, fact in zip(painted, truth))
            right["i2t"] += sum(data.parse_caption(caption) == fact for caption, fact in zip(said, truth))
        scores.update({f"{way}_exact{suffix}": n / run.config.eval_items for way, n in right.items()})
    return scores


def reconstruction_scores(run, val):
    psnr, counts = [], torch.zeros(run.vae.config.codebook_size)
    for items in progress(range(len(val)), 50, "reconstruction"):
        codes, pixels = run.encode([val.image(i) for i in items])
        again = run.vae.decode([codes.view(-1, run.side, run.side)])
        mse = ((again - pixels) / 2).square().mean((1, 2, 3))
        psnr += (-10 * mse.log10()).tolist()
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
    use, perplexity = codebook_use(counts)
    return {"psnr": sum(psnr) / len(psnr), "codebook_use": use, "perplexity": perplexity}


def likelihood_scores(run, val):
    """Bits per token of each direction, on one caption an image."""
    totals = {"image": [0.0, 0], "text": [0.0, 0]}
    for items in progress(range(len(val)), 50, "likelihood"):
        text = run.tokenize([val.captions(i)[0] for i in items])
        image, _ = run.encode([val.image(i) for i in items])
        for to, total in totals.items():
            with run.context.autocast():
                log_p, count = run.biart.log_likelihood(text, image, to)
            total[0] -= log_p.sum().item() / math.log(2)
            total[1] += count.sum().item()
    return {"t2i_bits": totals["image"][0] / totals["image"][1], "i2t_bits": totals["text"][0] / totals["text"][1]}


def progress(items, size, what):
    """Yield chunks of items; print how far it is, and how long it will take, between them."""
    began = time.time()
    for start in range(0, len(items), size):
        yield items[start:start + size]
        done = min(start + size, len(items))
        left = (time.time() - began) / done * (len(items) - done)
        print(f"{what}: {done} of {len(items)}, {left:.0f} s left", flush=True)


def main(argv):
    given = Parser((SampleConfig, DataConfig), {}, description=__doc__).settings(argv)
    config = configure(given, "", SampleConfig)[0]
    for name in ("prompt", "image"):
        if name in given and not given[name].strip():
            raise ValueError(f"--{name} is empty: give it {'a caption' if name == 'prompt' else 'an image file'}")
    if config.reconstruct:
        os.makedirs(config.out_dir, exist_ok=True)  # with --vae there need be no run
        return show_reconstructions(Run(config), config.reconstruct)
    picture = data.load_image(config.image) if config.image else None
    run = Run(config).load_biart()
    if config.prompt:
        return show_paintings(run, config.prompt)
    if picture:
        return print("\n".join(run.caption([picture], config.n, config.seed)))
    data_config = configure({**run.settings, **given}, "biart", DataConfig)[0]
    val = data.open_data(data_config, "val")
    if not val.captioned:
        raise ValueError(f"--data {data_config.data} has no captions to paint: name captioned data")
    if not config.eval:
        return show_both_ways(run, data.spread(val, config.n))
    heldout = data.open_data(data_config, "heldout") if data_config.data == "scenes" else None
    return print(json.dumps({k: round(v, 4) for k, v in score(run, val, heldout).items()}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
