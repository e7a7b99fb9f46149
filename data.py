"""
Captioned pictures: how they are read, in which order, and how they become tensors.

    data set     image(i), captions(i): one of the layouts below
    view         item(i, rng) -> tensors: Pixels for AugVAE; Tokens, encoded once and kept on disk, for BiART
    batches()    endless; which sample comes when depends on seed and position alone

Layouts (--data):

    scenes    built in: one or two coloured shapes, drawn when needed
    folder    any tree of images, without captions; imagenet is the same
    pairs     images, each with a text file of the same name: one caption a line
    coco      a folder of images, and a JSON of captions: MS-COCO's or the Karpathy split
    tsv       lines `caption TAB path`, as in Conceptual Captions
    tar       WebDataset shards: key.jpg, key.txt (one caption a line), the next key, ...
"""
import contextlib
import glob
import hashlib
import io
import json
import os
import random
import re
import sys
import tarfile
import textwrap
import time
import zlib
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

class Unreadable(ValueError):
    """An image or a caption file cannot be read. The message is a sentence that names it."""

class Dataset:
    """captions(i) -> list of str. image(i, min_side=0) -> PIL image in RGB, perhaps scaled down, but with no
    side below min_side. Both may raise Unreadable. fingerprint() -> hash of all but the pixels."""
    captioned = True  # False: captions(i) is always empty
    shard_starts = None  # of tar shards: the first sample of each
    left_out = {}  # what was not taken -> how many

    def __len__(self):
        return self.n

    def files(self, i):
        """Paths of the files that hold sample i alone."""
        return []

    def stamp(self):
        """A hash of the sizes and times of all files()."""
        paths = [path for i in range(len(self)) for path in self.files(i)]
        stats = [os.stat(path) for path in paths if os.path.exists(path)]
        return fingerprint([(stat.st_size, stat.st_mtime_ns) for stat in stats])

def fingerprint(*parts):
    """Arrays, plain values -> a short hash."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return h.hexdigest()[:16]

# -----------------------------------------------------------------------------
# Layouts on disk, and how a file is read

def read_folder(folder):
    paths = list_files(folder)
    images = {path: [] for path in paths if is_image(path)}
    return ImageFiles(folder, folder, images, left_out={"files that are no images": len(paths) - len(images)})

class ImageFiles(Dataset):
    """Images below a folder, {path: captions}. Errors name `source`. ValueError if it holds no `what`."""
    def __init__(self, source, folder, captions, what="image", left_out=()):
        self.folder, self.n, self.captioned = folder, len(captions), any(captions.values())
        self.paths, self.texts, self.left_out = list(captions), list(captions.values()), dict(left_out)
        if not self.paths:
            raise ValueError(f"{source} holds no {what}")
        some = [os.path.join(folder, path) for path in self.paths[::self.n // 100 + 1]]
        if not any(os.path.lexists(path) for path in some):
            raise ValueError(f"there is no {some[0]}, nor another image of {source}")

    def fingerprint(self):
        return fingerprint(self.paths, self.texts)

    def files(self, i):
        return [os.path.join(self.folder, self.paths[i])]

    def image(self, i, min_side=0):
        return load_image(self.files(i)[0], min_side)

    def captions(self, i):
        return self.texts[i]

def list_files(folder):
    """Sorted paths, from a folder, of all files below it but hidden ones. Follows links, no folder twice."""
    def refuse(error):
        raise OSError(f"folder {error.filename} cannot be read ({error.strerror})")

    paths, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(parent) in visited:
            folders.clear()  # os.walk() skips these
        else:
            visited.add(os.path.realpath(parent))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            paths += [os.path.relpath(os.path.join(parent, name), folder)
                      for name in files if not is_hidden(name)]
    return sorted(paths)

def is_hidden(path):
    """Whether a path has a part like ".DS_Store", or macOS's folder __MACOSX of companion files."""
    return any(part == "__MACOSX" or part.startswith(".") and part.strip(".") for part in path.split("/"))

# What Pillow decodes by itself. The others start another program, or are no pictures
Image.init()
FORMATS = [name for name in Image.ID if name not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")]
IMAGE_EXTENSIONS = {extension[1:] for extension, name in Image.EXTENSION.items() if name in FORMATS}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # some programs write long metadata

def is_image(path):
    return os.path.splitext(path)[1][1:].lower() in IMAGE_EXTENSIONS

class Pairs(ImageFiles):
    def __init__(self, folder):
        paths = list_files(folder)
        stems = {path: os.path.splitext(path)[0] for path in paths}
        texts = {stems[path]: path for path in paths if path.lower().endswith(".txt")}
        images = [path for path in paths if is_image(path)]
        pairs = {path: [] for path in images if stems[path] in texts}
        used = {stems[path] for path in pairs}
        super().__init__(folder, folder, pairs, "image with a text file of its name", {
            "images without a caption": len(images) - len(pairs),
            "captions without an image": len(texts) - len(used),
            "other files": len(paths) - len(images) - len(texts)})
        self.captioned = True
        self.text_paths = [texts[stems[path]] for path in pairs]

    def files(self, i):
        return [os.path.join(self.folder, path) for path in (self.paths[i], self.text_paths[i])]

    def captions(self, i):
        path = self.files(i)[1]
        return decode_captions(read_bytes(path), path)

def read_coco(folder, captions, split):
    """The images of a folder that have captions in a JSON."""
    text, found = read_text(captions), {}
    try:
        record = json.loads(text)
        if "annotations" in record:
            by_image = {}
            for annotation in record["annotations"]:
                by_image.setdefault(annotation["image_id"], []).append(annotation["caption"])
            for image in record["images"]:
                texts = found.setdefault(str(image["file_name"]), [])  # a file may be there twice
                texts += by_image.get(image["id"], [])
        else:
            for image in record["images"]:
                if image["split"].replace("restval", "train") == split:
                    path = os.path.join(image.get("filepath", ""), image["filename"])
                    found.setdefault(path, []).extend(sentence["raw"] for sentence in image["sentences"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{captions} is neither MS-COCO's JSON nor a Karpathy split ({e!r})") from None
    return captioned_files(captions, folder, found)

def read_tsv(path):
    """Paths start at the file's folder. An image may have several lines."""
    captions = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        caption, tab, rest = line.partition("\t")
        image = rest.split("\t")[0].strip()
        if image:
            captions.setdefault(image, []).append(caption)
        elif line.strip():
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not caption, tab, path")
    return captioned_files(path, os.path.dirname(path), captions)

def captioned_files(source, folder, texts):
    """{path: what should be captions} -> ImageFiles of those that have one."""
    captions = {path: clean_captions(some) for path, some in texts.items()}
    captions = {path: some for path, some in captions.items() if some}
    n_texts = sum(len(texts[path]) for path in captions)
    return ImageFiles(source, folder, captions, "captioned image", {
        "images without a caption": len(texts) - len(captions),
        "captions without words": n_texts - sum(len(some) for some in captions.values())})

def load_image(file, min_side=0, name=None, formats=FORMATS):
    """A path, or an open file and its name -> to_rgb() of it, or Unreadable. With min_side, a JPEG is decoded
    at 1/2, 1/4 or 1/8 of its size, no side below min_side. formats: those to accept, as Pillow names them."""
    name = name or file
    content = file if hasattr(file, "read") else io.BytesIO(read_bytes(file))
    try:
        with Image.open(content, formats=formats) as image:
            if min_side:
                image.draft("RGB", (min_side, min_side))
            image.load()
            return to_rgb(image)
    except Exception as e:  # Pillow raises almost anything on broken files
        why = str(e) or type(e).__name__
        if isinstance(e, UnidentifiedImageError):
            why = "unknown format"
        raise Unreadable(f"{name} is not an image that can be read ({why})") from None

def to_rgb(image):
    """PIL image -> RGB: upright by its EXIF tag, transparency over white, 16-bit grey as 8 bits. ValueError
    for other deep images: which number is white?"""
    deep = image.mode == "F" or image.mode.startswith("I")
    if deep:
        tags = getattr(image, "tag_v2", {})  # TIFF: bits, and whether 0 is black
        known = image.mode.startswith("I;16") or image.format in ("PNG", "PPM") and image.mode == "I"
        if not known or tags.get(258, (16,)) != (16,) or tags.get(262, 1) != 1:
            raise ValueError(f"grey of mode {image.mode}, {tags.get(258, '?')} bits, has no certain white")
    with contextlib.suppress(Exception):  # EXIF data may be broken, too
        image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")  # the transparent colour, for one
    if deep:
        grey = np.asarray(image)
        grey = np.where(grey == clear, 65535, grey) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if isinstance(clear, tuple) and max(clear) > 255:  # Pillow gives 8 of 16 bits, but not here
        image.info["transparency"] = tuple(x // 256 for x in clear)
    if "A" in image.getbands() or clear is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")

def decode_captions(content, name):
    """A caption file's bytes, one caption a line -> captions. Unreadable if there is none, or no UTF-8."""
    captions = clean_captions(decode_text(content, name).replace("\r", "\n").split("\n"))
    if not captions:
        raise Unreadable(f"caption file {name} is empty")
    return captions

def clean_captions(texts):
    """-> the texts without control characters, white space folded. Drops empty texts and other objects."""
    captions = []
    for text in texts:
        if isinstance(text, str):
            text = text.encode("utf-8", "replace").decode()  # JSON can hold half a character
            text = re.sub("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]", "", text)
            captions.append(" ".join(text.split()))
    return [caption for caption in captions if caption]

def decode_text(content, name):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise Unreadable(f"{name} is not UTF-8 (byte {e.start})") from None

def read_text(path):
    return decode_text(read_bytes(path), path)

def read_bytes(path, start=0, size=-1):
    if os.path.exists(path) and not os.path.isfile(path):  # to open a FIFO would wait
        raise Unreadable(f"{path} is not a file")
    try:
        with open(path, "rb") as f:
            f.seek(start)
            return f.read(size)
    except OSError as e:
        raise Unreadable(f"there is no file {path} that can be read ({e.strerror})") from None

@contextlib.contextmanager
def atomic_write(path, part=None):
    """Open a file that gets its name when all of it is on disk. OSError if that fails."""
    part = part or f"{path}.part"
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save() raises RuntimeError on a full disk
        raise OSError(f"{path} could not be written ({e}) and is as it was") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)

class Tar(Dataset):
    """WebDataset shards. If any sample has a text, those without are left out."""
    def __init__(self, paths, index_dir="", log=""):
        indices = {}
        for [path] in progress(random.Random().sample(paths, len(paths)), 1, "indexing tar shards"):
            indices[path] = index_shard(path, index_dir, log)  # random order: ranks share the work
        samples = np.concatenate([indices[path] for path in paths])
        shard = np.repeat(np.arange(len(paths)), [len(indices[path]) for path in paths])
        has_text = samples[:, 3] > 0
        self.captioned = bool(has_text.any())
        usable = has_text == self.captioned
        self.samples, self.n = samples[usable], int(usable.sum())
        used, self.shard_starts = np.unique(shard[usable], return_index=True)
        self.paths = [paths[i] for i in used]
        if not self.paths:
            raise ValueError(f"{len(paths)} tar shards, {paths[0]} for one, hold no image")

    def fingerprint(self):
        return fingerprint([os.path.basename(path) for path in self.paths], self.shard_starts, self.samples)

    def read(self, i, column):
        """-> the bytes that two columns of the index point at, and their name."""
        path = self.paths[np.searchsorted(self.shard_starts, i, "right") - 1]
        start, size = self.samples[i, column:column + 2].tolist()
        return read_bytes(path, start, size), f"{path}, byte {start:,},"

    def image(self, i, min_side=0):
        content, name = self.read(i, 0)
        return load_image(io.BytesIO(content), min_side, name)

    def captions(self, i):
        return decode_captions(*self.read(i, 2)) if self.captioned else []

def expand_shards(pattern):
    """A folder, a file, or a pattern like {00..99}.tar -> paths of shards. ValueError if none."""
    found, span = [], re.search(r"{(\d+)\.\.(\d+)}", pattern)
    if os.path.isdir(pattern):
        found = [os.path.join(pattern, name) for name in sorted(os.listdir(pattern))
                 if name.endswith(".tar") and not is_hidden(name)]
    elif os.path.exists(pattern):
        found = [pattern]
    elif span:
        for i in range(int(span[1]), int(span[2]) + 1):
            number = str(i).zfill(len(span[1]))
            found += expand_shards(pattern[:span.start()] + number + pattern[span.end():])
    else:
        found = sorted(glob.glob(pattern))
    if not found:
        raise ValueError(f"there is no tar shard {pattern}")
    return found

def index_shard(path, index_dir="", log=""):
    """-> (n, 4), in bytes: start and size of each image, and of its text (0, 0: none). The index is kept
    beside the shard or, if that fails, in index_dir. A damaged shard gives its complete samples. The log
    names it, and members left out. Then no index is kept, so that the next run reports them again."""
    stat = os.stat(path)
    name = f"{os.path.basename(path)}.{stat.st_size:x}.{stat.st_mtime_ns:x}.npy"  # new for a new shard
    kept = [os.path.join(os.path.dirname(path), name)]
    if index_dir:
        kept.append(os.path.join(index_dir, f"{fingerprint(os.path.abspath(path))}_{name}"))
    for file in kept:
        if os.path.exists(file):
            return np.load(file)
    samples, left_out = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                why = add_member(samples, member, stat.st_size)
                if why:
                    left_out.setdefault(why, []).append(member.name)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # a whole tar ends with zeros
                raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")
    except (tarfile.ReadError, OSError) as e:
        write_fault(log, f"tar shard {path} cannot be read to its end ({e}); is it compressed?")
        kept = []
    for why, names in left_out.items():
        write_fault(log, f"tar shard {path}: left out {len(names):,} members, {names[0]} for one: {why}")
        kept = []
    found = [sample["image"] + sample.get("txt", (0, 0)) for sample in samples.values() if "image" in sample]
    index = np.array(found, np.int64).reshape(-1, 4)
    for file in kept:
        with contextlib.suppress(OSError), atomic_write(file, f"{file}.{os.getpid()}.part") as f:
            np.save(f, index)
            break
    return index

def add_member(samples, member, size):
    """Add where an image or a text lies, in a tar of `size` bytes. Returns why it is left out, or None."""
    folder, name = os.path.split(member.name)
    key, _, extension = name.partition(".")  # the files of a sample share the key
    kind = "image" if extension.lower() in IMAGE_EXTENSIONS else extension.lower()
    if is_hidden(member.name) or not (is_image(name) or name.lower().endswith(".txt")):
        return None
    if kind not in ("image", "txt"):
        return "a name has one dot, behind its key"
    if not member.isreg() or member.issparse():
        return "it is not a plain file"
    sample = samples.setdefault((folder, key), {})
    if kind in sample:
        return f"its key has another {kind}"
    if member.offset_data + member.size <= size:  # all of it is there
        sample[kind] = member.offset_data, member.size
    return None

# -----------------------------------------------------------------------------
# Settings, and the data set that they name

@dataclass
class DataConfig:
    data: str = "scenes"  # scenes (built in), imagenet, folder, pairs, coco, tsv or tar
    train_dir: str = ""  # folder; tsv: the file; tar: shards, as x{00..99}.tar or a folder
    train_captions: str = ""  # coco: captions JSON of the training images
    val_dir: str = ""  # validation data, as train_dir
    val_captions: str = ""  # coco: captions JSON of the validation images
    n_scenes: int = 12288  # scenes: how many different ones to train on
    crop_scale: float = 0.75  # smallest crop to train AugVAE on, share of the centre square; 1: the centre
    workers: int = -1  # loader processes per rank; 0: none; -1: none on a CPU, 2 to 4 on a GPU

    limits = {"n_scenes": (1, inf), "crop_scale": (1e-3, 1), "workers": (-1, inf)}
    choices = {"data": ("scenes", "imagenet", "folder", "pairs", "coco", "tsv", "tar")}

def open_data(config, split, log="", index_dir=""):
    """Split train, val or (scenes) heldout -> data set. log, index_dir: see index_shard()."""
    where, captions = getattr(config, f"{split}_dir", ""), getattr(config, f"{split}_captions", "")
    if config.data == "scenes":
        if where:
            raise ValueError(f"--data scenes reads no --{split}_dir {where}: set --data to its layout")
        return Scenes(split, config.n_scenes if split == "train" else 1024)
    if not where:
        raise ValueError(f"--data {config.data} needs --{split}_dir")
    if config.data == "coco" and not captions:
        raise ValueError(f"--data coco needs --{split}_captions")
    readers = {"imagenet": read_folder, "folder": read_folder, "pairs": Pairs, "tsv": read_tsv,
               "coco": lambda where: read_coco(where, captions, split),
               "tar": lambda where: Tar(expand_shards(where), index_dir, log)}
    dataset = readers[config.data](where)
    left_out = [f"{n:,} {what}" for what, n in dataset.left_out.items() if n]
    if left_out:
        print0(f"left out of {where}: {', '.join(left_out)}")
    return dataset

class Subset(Dataset):
    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices
        self.n, self.captioned = len(indices), dataset.captioned

    def fingerprint(self):
        return fingerprint(self.dataset.fingerprint(), self.indices)

    def files(self, i):
        return self.dataset.files(self.indices[i])

    def image(self, i, min_side=0):
        return self.dataset.image(self.indices[i], min_side)

    def captions(self, i):
        return self.dataset.captions(self.indices[i])

# -----------------------------------------------------------------------------
# Pictures and tensors

def crop_to_tensor(image, size, scale=1.0, rng=None):
    """PIL image -> (3, size, size) in [-1, 1]: its centre square, or with rng a random one."""
    w, h = image.size
    side = min(w, h)
    x, y = (w - side) // 2, (h - side) // 2
    if rng and scale < 1:
        side = max(1, round((side * side * rng.uniform(scale, 1)) ** 0.5))
        x, y = rng.randint(0, w - side), rng.randint(0, h - side)
    square = np.array(image.crop((x, y, x + side, y + side)))
    pixels = torch.from_numpy(square).permute(2, 0, 1)  # (3, side, side), uint8
    if side != size:  # as Pillow, up to rounding, in half the time
        pixels = F.interpolate(pixels[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return pixels.float().div_(127.5).sub_(1)

class Pixels:
    """The view of images alone, for AugVAE: item(i, rng) -> (tensor (3, size, size) in [-1, 1],)."""
    def __init__(self, dataset, size, crop_scale):
        self.dataset, self.size, self.crop_scale = dataset, size, crop_scale
        self.shard_starts = dataset.shard_starts

    def __len__(self):
        return len(self.dataset)

    def item(self, i, rng):
        image = self.dataset.image(i, ceil(self.size / self.crop_scale ** 0.5))  # no crop is enlarged
        return (crop_to_tensor(image, self.size, self.crop_scale, rng),)

def to_image(x):
    """Tensor (3, H, W) in [-1, 1] -> PIL image."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

def contact_sheet(images, captions=None, columns=8, side=128):
    """PIL images, a text for each or None -> one image, `columns` pictures wide, `side` pixels each."""
    texts = [textwrap.wrap(caption, max(8, side // 7)) for caption in captions or [""] * len(images)]
    columns = min(columns, len(images))
    width, height = side + 6, side + 6 + 15 * max(len(lines) for lines in texts) + (4 if captions else 0)
    sheet = Image.new("RGB", (columns * width + 6, ceil(len(images) / columns) * height + 6), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (image, lines) in enumerate(zip(images, texts)):
        x, y = 6 + i % columns * width, 6 + i // columns * height
        resample = Image.NEAREST if image.width < side else Image.LANCZOS
        sheet.paste(image.resize((side, side), resample), (x, y))
        for j, line in enumerate(lines):
            draw.text((x, y + side + 2 + 15 * j), line, fill="black", font=font)
    return sheet

# -----------------------------------------------------------------------------
# The order of samples, and the one loader that reads them

SHUFFLE_BUFFER = 4096  # how far, in samples, shuffling moves those of tar shards

def batches(view, batch_size, *, seed=0, start=0, rank=0, world=1, workers=0, log=""):
    """One rank's batches of a view, endless: lists of stacked tensors."""
    order = sample_order(len(view), batch_size, seed, start, rank, world, view.shard_starts)
    return read_batches(view.item, order, len(view), replace=True, seed=seed, log=log, workers=workers)

def sample_order(n, batch_size, seed=0, start=0, rank=0, world=1, shard_starts=None):
    """Yield one rank's batches of (index, position), endlessly. Positions count the samples of all ranks, so
    any number of ranks can resume at `start`. Each epoch is a new permutation. A batch may span two."""
    epoch, first = -1, start + rank * batch_size
    while True:
        batch = []
        for position in range(first, first + batch_size):
            if position // n != epoch:
                epoch = position // n
                order = epoch_order(epoch, n, batch_size, seed, world, shard_starts)
            batch.append((int(order[position % n]), position))
        yield batch
        first += world * batch_size

def epoch_order(epoch, n, batch_size, seed, world, shard_starts):
    """A permutation of n samples. A tar shard is read from front to back, by one rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if shard_starts is None:
        return torch.randperm(n, generator=generator)
    shards = np.split(np.arange(n), shard_starts[1:])
    in_order = np.concatenate([shards[s] for s in torch.randperm(len(shards), generator=generator)])
    delays = torch.rand(n, generator=generator, dtype=torch.float64) * SHUFFLE_BUFFER
    ranks = np.arange(epoch * n, (epoch + 1) * n) // batch_size % world  # which rank reads a position
    order = np.empty_like(in_order)
    # A sample moves by less than SHUFFLE_BUFFER. Rank 0's positions get the first part, and so on
    order[np.argsort(ranks, kind="stable")] = in_order[(torch.arange(n) + delays).argsort().numpy()]
    return order

class BatchReader(torch.utils.data.Dataset):
    """In a loader process: [(index, position)] -> samples, number of reads, faults."""
    def __init__(self, read, n, replace, seed):
        self.read, self.n, self.replace, self.seed = read, n, replace, seed

    def __getitem__(self, keys):
        samples, faults = [], []
        for i, position in keys:
            rng = random.Random(f"{self.seed} {position}")
            for _ in range(100 if self.replace else 1):
                try:
                    samples.append(self.read(i, rng))
                    break
                except Unreadable as e:
                    faults.append(str(e))
                    i = rng.randrange(self.n)
        n_reads = len(samples) + len(faults)
        if self.replace:
            samples = torch.utils.data.default_collate(samples) if len(samples) == len(keys) else None
        return samples, n_reads, faults

def read_batches(read, keys, n, *, replace=False, seed=0, log="", workers=0):
    """For each batch of (index, position), yield a list of read(index, rng), without what is Unreadable. With
    `replace`, for training, random others take its place, and samples are stacked. rng depends on seed and
    position. The log names each fault once. OSError if more than `few` reads, and half of all, fail."""
    loader = torch.utils.data.DataLoader(
        BatchReader(read, n, replace, seed), batch_size=None, sampler=keys, collate_fn=tuple,
        num_workers=workers, pin_memory=torch.cuda.is_available(), generator=torch.Generator())  # its own
    few = 500 if replace else min(n, 1000) / 2  # up to so many failures are no error
    logged, reads, failures = set(), 0, 0
    for samples, n_reads, faults in loader:
        reads, failures = reads + n_reads, failures + len(faults)
        for fault in sorted(set(faults) - logged):
            write_fault(log, fault)
        logged.update(faults)
        if samples is None or failures > few and 2 * failures > reads:
            raise OSError(f"{failures} of {reads} samples could not be read: see {log or 'above'}")
        yield samples

CHUNK = 64  # samples that are read, and encoded, together
BLOCK = 16 * CHUNK  # samples in a file of the token cache

def read_chunks(read, indices, n, what, log="", workers=0):
    """Read some of n samples, with progress(): yield (indices, what could be read)."""
    keys = ([(i, i) for i in indices[start:start + CHUNK]] for start in range(0, len(indices), CHUNK))
    return zip(progress(indices, CHUNK, what), read_batches(read, keys, n, log=log, workers=workers))

def progress(items, size, what):
    """Yield a sequence in chunks of `size`. Every 5 seconds, rank 0 prints how far it is."""
    began = shown = time.monotonic()
    for start in range(0, len(items), size):
        yield items[start:start + size]
        done, now = start + size, time.monotonic()
        if done < len(items) and now - shown > 5:
            shown, left = now, (now - began) / done * (len(items) - done)
            print0(f"{what}: {done:,} of {len(items):,}, {left:,.0f} s left")

def print0(text):
    """Print on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)

def write_fault(log, fault):
    if not log:
        return print(fault, file=sys.stderr)
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as f:
        f.write(fault + "\n")

def validation_subset(dataset, count, log=""):
    """`count` random samples that can be read (all, if fewer): the same each time."""
    def read(i, rng):
        dataset.captions(i)  # may raise Unreadable
        dataset.image(i, 64)
        return i

    kept, order = [], np.random.RandomState(0).permutation(len(dataset)).tolist()
    for found in read_batches(read, [[(i, i)] for i in order], len(order), log=log):
        kept += found
        if len(kept) == count:
            break
    return Subset(dataset, kept)

def all_captions(dataset, log=""):
    captions, n = [], len(dataset)
    for _, found in read_chunks(lambda i, rng: dataset.captions(i), range(n), n, "reading captions", log):
        for texts in found:
            captions += texts
    return captions

# -----------------------------------------------------------------------------
# The token cache: a folder with a data set that is encoded once. key.json says what the tokens depend on.
# 00000.npy, 00001.npy, ... are blocks: a row for each sample that can be read, with `codes` (n_image,),
# `n_texts`, and `texts` (the largest n_texts, n_text). After a kill, only the missing blocks are encoded.

class Tokens:
    """The view of a token cache, for BiART: item(i, rng) -> ids (n_text,) of a random caption, codes
    (n_image,), and a bool: whether to blank the reference side (probability null_prob)."""
    shard_starts = None

    def __init__(self, folder, null_prob=0.0):
        self.folder, self.null_prob = folder, null_prob
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.npy")))
        self.blocks = [np.load(path, mmap_mode="r") for path in paths]  # processes share one copy
        self.ends = np.cumsum([len(rows) for rows in self.blocks])

    def __reduce__(self):  # a loader process maps the files, too
        return Tokens, (self.folder, self.null_prob)

    def __len__(self):
        return int(self.ends[-1])

    def item(self, i, rng):
        block = np.searchsorted(self.ends, i, "right")
        row = self.blocks[block][i - self.ends[block]]  # negative: from the block's end
        text = row["texts"][rng.randrange(row["n_texts"])]
        null = torch.tensor(rng.random() < self.null_prob)
        return torch.from_numpy(text.astype(np.int64)), torch.from_numpy(row["codes"].astype(np.int64)), null

@dataclass
class TokenSource:
    """What cache_tokens() encodes."""
    dataset: Dataset
    tokenizer: object
    n_text: int  # ids of a text; longer ones are cut
    size: int  # pixels of a side; an image gives its centre square
    made_from: dict  # fingerprints of what makes the codes
    log: str = ""  # names what cannot be read
    workers: int = 0  # loader processes

    def __post_init__(self):
        if len(self.tokenizer) > 65536:
            raise ValueError(f"a token cache holds ids up to 65535, not {len(self.tokenizer):,} tokens")

    def key(self):
        return {**self.made_from, "tokenizer": self.tokenizer.fingerprint(),
                "data": self.dataset.fingerprint(), "files": self.dataset.stamp(),
                "sizes": f"{self.size} px, {self.n_text} ids a text"}

    def read(self, i, rng):
        """-> ids (n_texts, n_text), how many texts were cut, pixels (3, size, size) in [-1, 1]."""
        texts = [self.tokenizer.encode_padded(caption, self.n_text) for caption in self.dataset.captions(i)]
        ids, cut = zip(*texts)
        pixels = crop_to_tensor(self.dataset.image(i, self.size), self.size)
        return np.array(ids, np.uint16), sum(cut), pixels

def cache_tokens(source, encode, folder, *, anew=False, rank=0, world=1, all_reduce=lambda x: x):
    """Encode a TokenSource into a folder, for Tokens(). The ranks share the missing blocks. encode: images
    (B, 3, size, size) -> codes (B, n_image). all_reduce: a CPU tensor -> its sum over ranks. Starts
    over if the data or a model has changed, or if `anew`. OSError if most samples fail."""
    key, key_file = source.key(), os.path.join(folder, "key.json")
    found = json.loads(read_text(key_file)) if os.path.exists(key_file) and not anew else {}
    differ = [name for name, value in key.items() if found.get(name) != value]
    if found and differ:
        print0(f"the tokens in {folder} are made again: {' and '.join(differ)} changed")
    if differ and rank == 0:
        os.makedirs(folder, exist_ok=True)
        for path in glob.glob(os.path.join(glob.escape(folder), "*.npy")):
            os.remove(path)
        with atomic_write(key_file) as f:
            f.write(json.dumps(key).encode())

    n, indices = len(source.dataset), []
    paths = [os.path.join(folder, f"{block:05d}.npy") for block in range(ceil(n / BLOCK))]
    # Rank 0 alone looks: on a network file system, ranks may see different files
    missing = torch.tensor([rank == 0 and not os.path.exists(path) for path in paths], dtype=torch.int32)
    for block in all_reduce(missing).nonzero().flatten().tolist()[rank::world]:
        indices += range(block * BLOCK, min(n, (block + 1) * BLOCK))
    n_cut, n_texts = all_reduce(encode_blocks(source, encode, paths, indices)).tolist()
    if n_cut:
        print0(f"warning: --n_text {source.n_text} cuts {n_cut:,} of {n_texts:,} captions")

def encode_blocks(source, encode, paths, indices):
    """Encode whole blocks of samples into their files -> tensor (captions cut, captions)."""
    n, counts, samples = len(source.dataset), torch.zeros(2, dtype=torch.int64), []
    for chunk, found in read_chunks(source.read, indices, n, "encoding", source.log, source.workers):
        if found:
            texts, n_cut, pixels = zip(*found)
            counts += torch.tensor([sum(n_cut), sum(len(ids) for ids in texts)])
            codes = encode(torch.stack(pixels)).cpu().numpy()  # (B, n_image)
            if codes.max() > 65535:
                raise ValueError(f"a token cache holds codes up to 65535, not {codes.max()}")
            samples += zip(texts, codes)
        end = chunk[-1] + 1
        if end % BLOCK > 0 and end < n:  # the block has more chunks
            continue
        rows = np.zeros(0)
        if samples:
            ids, codes = samples[0]
            texts = max(len(ids) for ids, _ in samples), source.n_text
            columns = [("codes", "u2", codes.shape), ("n_texts", "i8"), ("texts", "u2", texts)]
            rows = np.zeros(len(samples), columns)
        for row, (ids, codes) in zip(rows, samples):
            row["codes"], row["n_texts"], row["texts"][:len(ids)] = codes, len(ids), ids
        with atomic_write(paths[chunk[-1] // BLOCK]) as f:
            np.save(f, rows)
        samples = []
    return counts

# -----------------------------------------------------------------------------
# Built-in scenes: one or two things, each with a size, a colour and a shape, and their relation

SIZES = {"small": 4, "large": 8}  # radius, pixels
COLOURS = {"red": (214, 48, 49), "orange": (240, 128, 30), "yellow": (245, 203, 32), "lime": (160, 215, 50),
           "green": (30, 140, 80), "teal": (20, 150, 150), "cyan": (110, 210, 240), "blue": (41, 98, 216),
           "purple": (142, 68, 173), "pink": (235, 100, 165), "brown": (125, 75, 40), "black": (45, 52, 54)}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star", "hourglass", "arrow")
OUTLINES = {  # corners of the right half, from top to bottom, in radii; the left half mirrors it
    "square": [(1, -1), (1, 1)],
    "triangle": [(0, -1), (1, 1)],
    "cross": [(0.5, -1), (0.5, -0.5), (1, -0.5), (1, 0.5), (0.5, 0.5), (0.5, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1)],
    "star": [(0, -1), (0.36, -0.42), (1, -0.36), (0.55, 0.2), (0.7, 1), (0, 0.62)],
    "hourglass": [(1, -1), (0, 0), (1, 1)],
    "arrow": [(0, -1), (1, 0), (0.5, 0), (0.5, 1)]}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)  # where the first thing is from the second
WORDS = {"small": ("small", "little"), "large": ("large", "big"), "left of": ("left of", "to the left of"),
         "right of": ("right of", "to the right of"), "above": ("above", "over"), "below": ("below", "under")}
# How each caption begins, and its article. The first N_FULL name all attributes. N_BACKWARD name the right or
# lower thing first: only one, or models would have to learn the relation words first.
PHRASES = (("", "a"), ("there is ", "a"), ("", "the"), ("we see ", "a"), ("", "a"), ("", ""))
N_FULL, N_BACKWARD = 4, 1
SCENE_SIDE = 40  # pixels
BACKGROUND = (250, 248, 242)
LATTICE = 4  # pixels. Centres are multiples of it, so that things share patches, as photographs do

class Scenes(Dataset):
    """Scene i depends on the split (train, val or heldout) and i alone. The splits share no scene."""
    def __init__(self, split, n):
        self.split, self.n = split, n

    def scene(self, i):
        """-> (things, relation or None, centres, captions). A quarter of the scenes have one thing."""
        rng, split = random.Random(f"scene {self.split} {i}"), None
        while split != self.split:
            n_things = 1 if rng.random() < 0.25 else 2
            things = [(rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES))
                      for _ in range(n_things)]
            relation = rng.choice(RELATIONS) if n_things == 2 else None
            key = repr(sorted(facts(things, relation)))
            split = "val" if zlib.crc32(key.encode()) % 10 == 0 else "train"  # one combination in ten
            if any(held_out(thing) for thing in things):
                split = "heldout"
        return things, relation, place_things(relation, rng), paraphrases(things, relation, rng)

    def fingerprint(self):
        return fingerprint("scenes", self.split, self.n)

    def image(self, i, min_side=0):
        things, _, centres, _ = self.scene(i)
        return draw_things(things, centres)

    def captions(self, i):
        return self.scene(i)[-1]

def held_out(thing):
    """Whether training never shows such a thing (one in eight). It shows every pair of attributes, though."""
    size, colour, shape = list(SIZES).index(thing[0]), list(COLOURS).index(thing[1]), SHAPES.index(thing[2])
    return (colour + 3 * shape + 4 * size) % 8 == 0

def place_things(relation, rng):
    """-> centres [(x, y)], pixels on the lattice, of one thing or of two in this relation."""
    if not relation:
        return [(LATTICE * rng.randint(2, 8), LATTICE * rng.randint(2, 8))]
    centres = []
    for step in rng.choice(((2, 7), (2, 8), (3, 8))):  # of the left or upper thing, of the other
        along, across = LATTICE * step, LATTICE * rng.randint(4, 6)
        centres.append((across, along) if relation in ("above", "below") else (along, across))
    return centres if relation in ("left of", "above") else centres[::-1]

def draw_things(things, centres, scale=4):
    """[(size, colour, shape)], [(x, y)] in pixels -> 40x40 PIL image, drawn larger to have smooth edges."""
    image = Image.new("RGB", (SCENE_SIDE * scale, SCENE_SIDE * scale), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for (size, colour, shape), (x, y) in zip(things, centres):
        x, y, r = x * scale, y * scale, SIZES[size] * scale
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=COLOURS[colour])
        else:
            corners = OUTLINES[shape] + [(-dx, dy) for dx, dy in reversed(OUTLINES[shape])]
            # Pillow also draws the right and lower edges, so they move in by a pixel
            corners = [(x + dx * r - (dx > 0), y + dy * r - (dy > 0)) for dx, dy in corners]
            draw.polygon(corners, fill=COLOURS[colour])
    return image.reduce(scale)

def paraphrases(things, relation, rng):
    """-> a caption for each of PHRASES"""
    captions, backward = [], rng.sample(range(len(PHRASES)), N_BACKWARD)
    for i, (beginning, article) in enumerate(PHRASES):
        in_order, link, first_is_left = things, relation, relation in ("left of", "above")
        if relation and first_is_left == (i in backward):  # name the other thing first
            in_order, link = things[::-1], OPPOSITE[relation]
        parts = [name_thing(thing, article, i < N_FULL, rng) for thing in in_order]
        if relation:
            parts.insert(1, ("is " if article == "the" else "") + rng.choice(WORDS[link]))
        captions.append(beginning + " ".join(parts))
    return captions

def name_thing(thing, article, full, rng):
    """-> "a small red circle" or, unless `full`, a part: "a red circle", "something small"."""
    kept = 7 if full else rng.randrange(1, 8)  # what is named, as bits: 1 size, 2 colour, 4 shape
    words = [rng.choice(WORDS.get(word, (word,))) for word, bit in zip(thing, (1, 2, 4)) if kept & bit]
    if not kept & 4:  # the shape is left out
        return "something " + " and ".join(words)
    if article == "a" and (words[0][0] in "aeiou" or words[0] == "hourglass"):
        article = "an"
    return " ".join([article, *words]).strip()

# -----------------------------------------------------------------------------
# The oracle: what a picture shows, and what a caption says

def facts(things, relation):
    """-> frozenset of (size, colour, shape, relation, size, colour, shape): two things in both orders."""
    if not relation:
        return frozenset({(*things[0], "alone", None, None, None)})
    first, second = things
    return frozenset({(*first, relation, *second), (*second, OPPOSITE[relation], *first)})

def matches(said, seen):
    """Whether the facts() that a caption says hold in those seen. With None for either: no."""
    for statement in said or ():
        for truth in seen or ():
            if all(word in (None, fact) for word, fact in zip(statement, truth)):
                return True
    return False

def parse_caption(caption):
    """A caption -> its facts(), with None for what it leaves out; None if its words are others."""
    text = f" {' '.join(caption.lower().split())} "
    for plain, words in [*WORDS.items(), ("a", ("an",))]:
        for word in sorted(words, key=len, reverse=True):
            text = text.replace(f" {word} ", f" {plain} ")
    size, colour, shape = "|".join(SIZES), "|".join(COLOURS), "|".join(SHAPES)
    thing = (rf"(?:(?:(?:a|the) )?(?:({size}) )?(?:({colour}) )?({shape})|something"
             rf"(?: ({size}))?(?: (?:and )?({colour}))?) ")
    match = re.fullmatch(rf" (?:there is |we see )?{thing}(?:(?:is )?({'|'.join(RELATIONS)}) {thing})?", text)
    if not match:
        return None
    found, relation = match.groups(), match[6]
    things = [(a or d, b or e, c) for a, b, c, d, e in (found[:5], found[6:])]
    return facts(things, relation) if any(things[0]) or relation else None

def read_scene(image):
    """PIL image, scaled to 40x40 -> its facts(); None unless it shows one or two things."""
    pixels = np.asarray(image.resize((SCENE_SIDE, SCENE_SIDE), Image.BOX), np.float32)
    distance = np.linalg.norm(pixels - np.float32(BACKGROUND), axis=2)
    found = [read_thing(pixels, distance, mask) for mask in components(distance > 60) if mask.sum() >= 12]
    if len(found) == 1:
        return facts([found[0][0]], None)
    if len(found) != 2:
        return None
    (first, (x1, y1)), (second, (x2, y2)) = found
    if (x1, y1) == (x2, y2):
        return None
    if abs(x1 - x2) > abs(y1 - y2):
        relation = "left of" if x1 < x2 else "right of"
    else:
        relation = "above" if y1 < y2 else "below"
    return facts([first, second], relation)

def components(mask):
    """A mask (h, w) -> the masks of its 4-connected components, the largest first."""
    labels, before = np.arange(1, mask.size + 1).reshape(mask.shape) * mask, None
    while not np.array_equal(labels, before):  # each pixel takes the largest label next to it
        before, around = labels, np.pad(labels, 1)
        neighbours = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
        labels = np.maximum.reduce([labels, *neighbours]) * mask
    ids, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == i for i in ids[np.argsort(-sizes)]]

def read_thing(pixels, distance, mask):
    """Pixels, their distance from the background, a mask -> (size, colour, shape), centre (x, y)."""
    colour = np.median(pixels[mask & (distance >= np.median(distance[mask]))], axis=0)  # away from soft edges
    nearest = np.linalg.norm(np.float32(list(COLOURS.values())) - colour, axis=1).argmin()
    cover = np.clip(distance / np.linalg.norm(colour - np.float32(BACKGROUND)), 0, 1) * mask
    ys, xs = np.nonzero(mask)
    x, y = int(xs.min() + xs.max()) // 2, int(ys.min() + ys.max()) // 2
    around = np.pad(cover, 12)[y + 2:y + 24, x + 2:x + 23]  # room to move by -1 to 2 rows, -1 to 1 columns
    windows = np.lib.stride_tricks.sliding_window_view(around, (19, 19))[:, :, None]  # (4, 3, 1, 19, 19)
    errors = np.square(windows - list(TEMPLATES.values())).sum((3, 4))  # (4, 3, templates)
    size, shape = list(TEMPLATES)[errors.min((0, 1)).argmin()]
    return (size, list(COLOURS)[nearest], shape), (x, y)

def template(size, shape):
    """The share of each pixel that a thing covers, 19 x 19 around its centre."""
    image = draw_things([(size, "black", shape)], [(SCENE_SIDE // 2, SCENE_SIDE // 2)])
    dark = np.asarray(image.convert("L"), np.float32)
    return ((dark.max() - dark) / (dark.max() - dark.min()))[11:30, 11:30]

TEMPLATES = {(size, shape): template(size, shape) for size in SIZES for shape in SHAPES}

def one_caption_each(references):
    """One caption of each sample: number i of sample i, counted round and round."""
    return [captions[i % len(captions)] for i, captions in enumerate(references)]

def exact_rates(prompts, pictures, references, captions):
    """-> shares of pictures ("t2i") and captions ("i2t") that are true; {} if references are of no scenes."""
    scenes = [parse_caption(of_scene[0]) for of_scene in references]  # the first caption names all
    if not all(scenes):
        return {}
    shown = [matches(parse_caption(text), read_scene(picture)) for text, picture in zip(prompts, pictures)]
    said = [matches(parse_caption(text), scene) for text, scene in zip(captions, scenes)]
    return {"t2i": sum(shown) / len(scenes), "i2t": sum(said) / len(scenes)}
