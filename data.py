"""
Captioned pictures: where they come from, how they reach a model, and how they are drawn again.

A data set is anything with `len()`, `image(i) -> PIL image in RGB` and `captions(i) -> list of str`:

    scenes   built in: two coloured shapes and how they lie, drawn on the fly, deterministic, no download
    coco     a folder of images and a JSON of captions in the MS-COCO layout

A view turns what is read into tensors: Pixels for AugVAE, Tokens (encoded once, kept in memory) for BiART.
`batches()` feeds either, endlessly; which sample comes when is a pure function of seed, step and rank.

The built-in scenes come with an oracle. `read_scene` reads the attributes back from pixels and `parse_caption` from words,
so that text-to-image and image-to-text are both scored by whether the content is right.
"""
import json
import os
import random
import re
import textwrap
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps


@dataclass
class DataConfig:
    data: str = "scenes"  # what to train on: scenes (built in) or coco
    train_dir: str = ""  # coco: folder of training images
    train_captions: str = ""  # coco: captions JSON of the training images
    val_dir: str = ""  # coco: folder of validation images
    val_captions: str = ""  # coco: captions JSON of the validation images
    n_scenes: int = 12288  # scenes: how many different ones to train on
    crop_scale: float = 0.75  # training crops keep at least this share of the centre square's area; 1 = centre crop
    crop_of: str = "square"  # what crop_scale is a share of: centre square, or picture: all of it (the release)
    workers: int = 0  # loader processes per rank; 0 reads in the training process


# -----------------------------------------------------------------------------
# Built-in scenes: two things, each with a size, a colour and a shape, and the relation of the first to the second

SIZES = {"small": 7, "large": 11}  # radius, pixels
COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (41, 98, 216),
           "yellow": (245, 203, 32), "purple": (142, 68, 173), "black": (45, 52, 54)}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first thing lies
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WORDS = {"small": ("small", "little"), "large": ("large", "big"), "left of": ("left of", "to the left of"),
         "right of": ("right of", "to the right of"), "above": ("above", "over"), "below": ("below", "under")}
# Never drawn for training or validation, though every attribute of each is, in all other company: split `heldout` holds
# scenes with at least one of these. Split `val` holds things seen in training, in combinations that were not.
HELD_OUT = {("small", "red", "triangle"), ("large", "green", "cross"), ("small", "blue", "square"),
            ("large", "yellow", "circle"), ("small", "purple", "cross"), ("large", "black", "triangle")}
PHRASES = ("a {a} {rel} a {b}", "there is a {a} {rel} a {b}", "the {a} is {rel} the {b}", "we see a {a} {rel} a {b}",
           "a {a} {rel} a {b}", "the {a} is {rel} the {b}")
SCENE_SIDE = 64  # pixels
BACKGROUND = (250, 248, 242)
OFFSETS = (-4, 4)  # pixels that a thing lies off its place, each way: four places, on a lattice of eight


def outline(shape, x, y, r):
    """Corners of a shape of radius r around (x, y); None for a circle, which has none."""
    if shape == "square":
        s = 0.86 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.86 * r), (x - r, y + 0.86 * r)]
    if shape == "cross":
        a = 0.3 * r
        quarter = [(a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r)]
        return [(x + p, y + q) for p, q in quarter] + [(x - p, y - q) for p, q in quarter]


def draw_things(things, centres, scale=4):
    """[(size, colour, shape)], [(x, y)] in pixels -> PIL image of 64x64, antialiased by drawing `scale` times larger."""
    image = Image.new("RGB", (SCENE_SIDE * scale,) * 2, BACKGROUND)
    draw = ImageDraw.Draw(image)
    for (size, colour, shape), (x, y) in zip(things, centres):
        x, y, r = x * scale, y * scale, SIZES[size] * scale
        corners = outline(shape, x, y, r)
        if corners:
            draw.polygon(corners, fill=COLOURS[colour])
        else:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    return image.reduce(scale)


def paraphrases(first, second, relation, rng):
    """
    (size, colour, shape) twice and a relation -> six captions. Four go from left to right or from top to bottom, as most
    people do, and two the other way: were it three and three, which thing is named first would tell nothing of where it
    lies, and the two could be told apart only after what the relation means is known.
    """
    def say(word):
        return rng.choice(WORDS.get(word, (word,)))

    def phrase(template, a, b, rel):
        return template.format(a=" ".join(map(say, a)), b=" ".join(map(say, b)), rel=say(rel))

    ways = [(first, second, relation), (second, first, OPPOSITE[relation])]
    forward, backward = ways if relation in ("left of", "above") else ways[::-1]
    return [phrase(template, *(forward if i < 4 else backward)) for i, template in enumerate(PHRASES)]


def split_of(first, second, relation):
    """`heldout` where one of the things is; else one combination in ten of two things and relation is `val`."""
    if {first, second} & HELD_OUT:
        return "heldout"
    key = repr(sorted(facts(first, second, relation)))
    return "val" if zlib.crc32(key.encode()) % 10 == 0 else "train"


class Scenes:
    """Scene i of split `train`, `val` or `heldout` is a pure function of (split, i); the splits share no combination."""

    def __init__(self, split, n):
        self.split, self.n = split, n

    def __len__(self):
        return self.n

    def scene(self, i):
        """-> (first thing, second thing, relation, centres, captions)"""
        rng = random.Random(f"scene {self.split} {i}")
        while True:
            first, second = ((rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(2))
            relation = rng.choice(list(RELATIONS))
            if split_of(first, second, relation) == self.split:
                break
        centres = [(SCENE_SIDE // 2 + sign * SCENE_SIDE // 4 * dx + rng.choice(OFFSETS),
                    SCENE_SIDE // 2 + sign * SCENE_SIDE // 4 * dy + rng.choice(OFFSETS))
                   for sign, (dx, dy) in ((1, RELATIONS[relation]), (-1, RELATIONS[relation]))]
        return first, second, relation, centres, paraphrases(first, second, relation, rng)

    def image(self, i):
        first, second, _, centres, _ = self.scene(i)
        return draw_things((first, second), centres)

    def captions(self, i):
        return self.scene(i)[-1]


def facts(first, second, relation):
    """The content of a scene, the same whichever thing is named first."""
    return frozenset({(first, second, relation), (second, first, OPPOSITE[relation])})


def parse_caption(caption):
    """A caption in the built-in grammar -> its facts(); None for anything else."""
    text = " " + " ".join(caption.lower().split()) + " "
    for plain, words in WORDS.items():
        for word in sorted(words, key=len, reverse=True):
            text = text.replace(f" {word} ", f" {plain} ")
    thing = rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    relation = f"({'|'.join(RELATIONS)})"
    match = re.fullmatch(rf" (?:there is |we see )?(?:a|the) {thing} (?:is )?{relation} (?:a|the) {thing} ", text)
    return facts(match.groups()[0:3], match.groups()[4:7], match.groups()[3]) if match else None


def components(mask):
    """A boolean array (h, w) -> boolean arrays of its 4-connected components, largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label around it until nothing changes
        padded = np.pad(labels, 1)
        spread = np.max([padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2],
                         padded[1:-1, 2:]], axis=0) * mask
        if (spread == labels).all():
            break
        labels = spread
    ids, sizes = np.unique(labels[labels > 0], return_counts=True)
    return [labels == i for i in ids[np.argsort(-sizes)]]


def template(size, shape):
    """How a thing of this size and shape covers a 25 x 25 field around its centre: shares in [0, 1]."""
    image = draw_things([(size, "black", shape)], [(SCENE_SIDE // 2, SCENE_SIDE // 2)])
    dark = np.asarray(image.convert("L"), np.float32)
    return ((dark.max() - dark) / (dark.max() - dark.min()))[20:45, 20:45]


TEMPLATES = {}  # (size, shape) -> template(), filled at first use


def read_scene(image):
    """
    The oracle: a 64x64 picture (PIL, or array (64, 64, 3) of 0..255) -> its facts(), or None where there are not just
    two things. Colour is the nearest of the six in a thing's inside; size and shape are the template that fits best;
    the relation is the longer way from one centre to the other.
    """
    if not TEMPLATES:
        TEMPLATES.update({(size, shape): template(size, shape) for size in SIZES for shape in SHAPES})
    pixels = np.asarray(image, np.float32)
    palette = np.array(list(COLOURS.values()), np.float32)
    distance = np.linalg.norm(pixels - np.float32(BACKGROUND), axis=2)
    found = []
    for mask in components(distance > 60):
        if mask.sum() < 20:
            break
        colour = np.median(pixels[mask & (distance >= np.median(distance[mask]))], axis=0)
        nearest = int(np.linalg.norm(palette - colour, axis=1).argmin())
        # How far each pixel is on the way from the background to the thing's colour, against each template
        cover = np.clip(distance / np.linalg.norm(colour - np.float32(BACKGROUND)), 0, 1) * mask
        ys, xs = np.nonzero(mask)
        x, y = (xs.min() + xs.max()) // 2, (ys.min() + ys.max()) // 2
        field = np.pad(cover, 15)
        errors = {key: min(np.square(field[y + dy + 3:y + dy + 28, x + dx + 3:x + dx + 28] - t).sum()
                           for dy in (-1, 0, 1, 2) for dx in (-1, 0, 1)) for key, t in TEMPLATES.items()}
        size, shape = min(errors, key=errors.get)
        found.append(((size, list(COLOURS)[nearest], shape), (x, y)))
    if len(found) != 2:
        return None
    (first, (x1, y1)), (second, (x2, y2)) = found
    dx, dy = int(x1) - int(x2), int(y1) - int(y2)
    step = ((dx > 0) - (dx < 0), 0) if abs(dx) > abs(dy) else (0, (dy > 0) - (dy < 0))
    relation = next((name for name, way in RELATIONS.items() if way == step), None)
    return facts(first, second, relation) if relation else None


# -----------------------------------------------------------------------------
# Pictures from disk

def load_image(path):
    """
    Any file that Pillow reads -> PIL image in RGB, upright by its EXIF tag, transparency laid over white, 16-bit grey
    scaled to 8. Raises ValueError that names the file where it is not a readable image.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scale
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no image {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} is not an image that can be read ({e})") from None


class CocoCaptions:
    """
    The MS-COCO captions layout: a folder of images, and a JSON with `images` (id, file_name) and `annotations`
    (image_id, caption). Images without a caption are left out.
    Raises ValueError where the folder or file is missing, broken, empty, or names images that are not there.
    """

    def __init__(self, folder, captions):
        if not os.path.isdir(folder):
            raise ValueError(f"there is no image folder {folder!r}")
        try:
            with open(captions, encoding="utf-8") as f:
                record = json.load(f)
            texts = {}
            for note in record["annotations"]:
                texts.setdefault(note["image_id"], []).append(str(note["caption"]))
            self.items = [(os.path.join(folder, image["file_name"]), texts[image["id"]])
                          for image in record["images"] if image["id"] in texts]
        except FileNotFoundError:
            raise ValueError(f"there is no captions file {captions!r}") from None
        except OSError as e:
            raise ValueError(f"captions file {captions!r} cannot be read ({e.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{captions} is not a COCO captions JSON with `images` and `annotations` "
                             f"({type(e).__name__}: {e})") from None
        if not self.items:
            raise ValueError(f"{captions} holds no captioned image")
        absent = [path for path, _ in self.items if not os.path.isfile(path)]
        if absent:
            raise ValueError(f"{captions} names {len(absent)} of {len(self.items)} images that are not in {folder}, "
                             f"{os.path.basename(absent[0])} for one")

    def __len__(self):
        return len(self.items)

    def image(self, i):
        return load_image(self.items[i][0])

    def captions(self, i):
        return self.items[i][1]


class Part:
    """Some items of a data set, as a data set."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def image(self, i):
        return self.dataset.image(self.indices[i])

    def captions(self, i):
        return self.dataset.captions(self.indices[i])


def spread(dataset, count):
    """`count` items (or all, if fewer) spread at random over a data set, the same every time: what validation reads."""
    return Part(dataset, np.random.RandomState(0).permutation(len(dataset))[:count].tolist())


def open_data(config, split):
    """DataConfig and `train`, `val` (or, for scenes, `heldout`) -> a data set."""
    if config.data == "scenes":
        return Scenes(split, config.n_scenes if split == "train" else 1024)
    if config.data == "coco":
        folder, captions = getattr(config, f"{split}_dir"), getattr(config, f"{split}_captions")
        if not folder or not captions:
            raise ValueError(f"--data coco needs --{split}_dir IMAGES and --{split}_captions JSON")
        return CocoCaptions(folder, captions)
    raise ValueError(f"--data {config.data!r} is none of: scenes, coco")


# -----------------------------------------------------------------------------
# Views: what a model takes

def crop_to_tensor(image, size, scale=1.0, rng=None, of="square"):
    """
    PIL image -> float tensor (3, size, size) in [-1, 1]: the centre square, or, given an rng, a random square of
    `scale` to 1 times its area. With of="picture", times the picture's area: ten tries at a square that has room,
    and else the centre square (as torchvision's RandomResizedCrop).
    """
    w, h = image.size
    side = min(w, h)
    x, y = (w - side) / 2, (h - side) / 2
    if rng and scale < 1:
        area = {"square": side * side, "picture": w * h}[of]
        drawn = (max(1, round((area * rng.uniform(scale, 1)) ** 0.5)) for _ in range(10))
        fits = next((d for d in drawn if d <= side), None)
        if fits:
            side = fits
            x, y = rng.randint(0, w - side), rng.randint(0, h - side)
    if (w, h) != (size, size) or side != size:
        image = image.resize((size, size), Image.BILINEAR, box=(x, y, x + side, y + side), reducing_gap=2.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


class Pixels:
    """Images alone, for AugVAE: item(i, rng) -> (tensor (3, size, size) in [-1, 1],)."""

    def __init__(self, dataset, size, crop_scale, crop_of="square"):
        if crop_of not in ("square", "picture"):
            raise ValueError(f"--crop_of {crop_of!r} is none of: square, picture")
        self.dataset, self.size, self.crop_scale, self.crop_of = dataset, size, crop_scale, crop_of

    def __len__(self):
        return len(self.dataset)

    def item(self, i, rng):
        return (crop_to_tensor(self.dataset.image(i), self.size, self.crop_scale, rng, self.crop_of),)


class Tokens:
    """
    A whole data set as tokens, for BiART: codes (N, n_image) and texts (n_captions, n_text), int32, where the captions
    of image i are texts[first[i]:first[i + 1]].
    item(i, rng) -> (text ids (n_text,), one caption drawn by rng; image codes (n_image,); null, a bool tensor).
    `null` is true with probability null_prob: this sample's reference side is to be blanked, for guidance.
    """

    def __init__(self, codes, texts, first, null_prob=0.0):
        self.codes, self.texts, self.first, self.null_prob = codes, texts, first, null_prob

    def __len__(self):
        return len(self.codes)

    def item(self, i, rng):
        text = self.texts[rng.randrange(self.first[i], self.first[i + 1])]
        return text.long(), self.codes[i].long(), torch.tensor(rng.random() < self.null_prob)


def encode_images(dataset, encode, size, rank=0, world=1, batch_size=64):
    """
    Every picture's codes, once: int32 (N, n_image). encode: images (B, 3, size, size) -> codes (B, n_image).
    Ranks share the work: each fills its own stretch and leaves zeros elsewhere, to be added up by the caller.
    """
    n = len(dataset)
    start, stop = n * rank // world, n * (rank + 1) // world
    codes, began, shown = None, time.time(), time.time()
    for i in range(start, stop, batch_size):
        images = [crop_to_tensor(dataset.image(j), size) for j in range(i, min(i + batch_size, stop))]
        found = encode(torch.stack(images)).int().cpu()
        if codes is None:
            codes = torch.zeros(n, found.shape[1], dtype=torch.int32)
        codes[i:i + len(images)] = found
        if rank == 0 and time.time() - shown > 5:
            shown, done = time.time(), i + len(images) - start
            left = (shown - began) / done * (stop - start - done)
            print(f"encoding images: {done:,} of {stop - start:,}, {left:.0f} s left", flush=True)
    return codes


def encode_captions(dataset, tokenizer, n_text):
    """All captions -> (texts int32 (n_captions, n_text), first (N + 1) as in Tokens, how many had to be cut)."""
    rows, first, cut = [], [0], 0
    for i in range(len(dataset)):
        for caption in dataset.captions(i):
            ids, was_cut = tokenizer.encode_padded(caption, n_text)
            rows.append(ids)
            cut += was_cut
        first.append(len(rows))
    return torch.tensor(rows, dtype=torch.int32), first, cut


# -----------------------------------------------------------------------------
# Order

class Order:
    """
    Batches of (index, place), endlessly, from place `start` on: epoch after epoch, each a fresh permutation of the data,
    cut into global batches of world * batch_size of which every rank takes its own stretch. `place` numbers the samples
    drawn since the beginning of training. A pure function of (seed, start, rank, world), so a run resumes at the very
    next sample, on any number of ranks.
    """

    def __init__(self, n, batch_size, seed=0, start=0, rank=0, world=1):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self):
        epoch, permutation, begin = -1, None, self.start + self.rank * self.batch_size
        while True:
            batch = []
            for place in range(begin, begin + self.batch_size):
                if place // self.n != epoch:
                    epoch = place // self.n
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    permutation = torch.randperm(self.n, generator=generator)
                batch.append((int(permutation[place % self.n]), place))
            yield batch
            begin += self.world * self.batch_size


class Placed(torch.utils.data.Dataset):
    """Calls a view's item() with a random generator that depends on the seed and the sample's place alone."""

    def __init__(self, view, seed):
        self.view, self.seed = view, seed

    def __getitem__(self, key):
        i, place = key
        return self.view.item(i, random.Random(f"{self.seed} {place}"))


def batches(view, batch_size, seed=0, start=0, rank=0, world=1, workers=0):
    """An endless iterator over batches of a view, each a list of stacked tensors; see Order for what comes when."""
    order = Order(len(view), batch_size, seed, start, rank, world)
    return iter(torch.utils.data.DataLoader(Placed(view, seed), batch_sampler=order, num_workers=workers,
                                            pin_memory=torch.cuda.is_available()))


# -----------------------------------------------------------------------------
# Drawing

def to_image(x):
    """Tensor (3, H, W) in [-1, 1] -> PIL image."""
    return Image.fromarray(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def font(size):
    """Pillow's own font; before Pillow 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size=size)
    except TypeError:
        return ImageFont.load_default()


def contact_sheet(images, captions=None, columns=8, side=128):
    """PIL images, and a text under each or None -> one PIL image, `columns` wide, every picture `side` pixels."""
    rows = [textwrap.wrap(c, width=max(8, side // 6)) for c in captions] if captions else [[] for _ in images]
    text = 15 * max(len(r) for r in rows) + (4 if captions else 0)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (side + 6) + 6, -(-len(images) // columns) * (side + text + 6) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, rows)):
        x, y = 6 + i % columns * (side + 6), 6 + i // columns * (side + text + 6)
        sheet.paste(image.resize((side, side), Image.NEAREST if image.width < side else Image.LANCZOS), (x, y))
        for j, line in enumerate(lines):
            draw.text((x, y + side + 2 + 15 * j), line, fill="black", font=font(12))
    return sheet
