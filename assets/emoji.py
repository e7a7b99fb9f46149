"""The recipe of a data set: 10,944 captioned emoji of 64 x 64 pixels, in three styles. Needs npm and Pillow.
$ python assets/emoji.py emoji      makes emoji/images/STYLE/CODE.png, and lists of lines `caption TAB path`:
    emoji/train.tsv      to train on
    emoji/heldout.tsv    pictures whose concept is in train.tsv in the two other styles only
    emoji/val.tsv        concepts that are in train.tsv in no style (one in twenty)
    emoji/concepts.tsv   `path TAB concept TAB style TAB list` of all; skin tones are one concept
Styles: noto (Noto Color Emoji, Apache-2.0), flat (Twemoji, Twitter and other contributors, CC-BY-4.0), 3d
(Fluent Emoji, Microsoft, MIT). Names and keywords: Unicode CLDR (Unicode licence), by emojibase.
"""
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zlib

from PIL import Image

STYLES = {  # package, its version, where a picture lies in it
    "noto": ("emoji-datasource-google", "16.0.0", "img/google/64/{}.png"),
    "flat": ("emoji-datasource-twitter", "16.0.0", "img/twitter/64/{}.png"),
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "assets/{}.webp")}

def read_package(folder, name, version):
    """Download a package of npm -> {path: content} of its names or pictures."""
    file = os.path.join(folder, f"{name.strip('@').replace('/', '-')}-{version}.tgz")
    if not os.path.exists(file):
        if not shutil.which("npm"):
            sys.exit("emoji.py: it needs npm to download the pictures: install Node.js")
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
    with tarfile.open(file) as tar:
        return {member.name.partition("/")[2]: tar.extractfile(member).read() for member in tar
                if member.name.endswith(("en/data.json", ".png", ".webp")) and "sheets" not in member.name}

def which_list(concept, style):
    key = zlib.crc32(concept["hexcode"].encode())
    left_out = key % 6 == 1 and key // 6 % 3 == list(STYLES).index(style)
    return "val" if key % 20 == 0 else "heldout" if left_out else "train"

def main(out="emoji"):
    os.makedirs(f"{out}/packages", exist_ok=True)
    concepts = json.loads(read_package(f"{out}/packages", "emojibase-data", "17.0.0")["en/data.json"])
    lists = {"train": [], "val": [], "heldout": [], "concepts": []}
    for style, (package, version, pattern) in STYLES.items():
        os.makedirs(f"{out}/images/{style}", exist_ok=True)
        files = read_package(f"{out}/packages", package, version)
        for concept in (concept for concept in concepts if "group" in concept):  # no parts, as skin tones
            for emoji in (concept, *concept.get("skins", ())):
                code = emoji["hexcode"].lower()
                names = [pattern.format(name) for name in (code, code.replace("-fe0f", ""), f"{code}-fe0f")]
                found = [files[name] for name in names if name in files]
                if not found:
                    continue  # this style lacks it
                picture = Image.open(io.BytesIO(found[0])).convert("RGBA").resize((64, 64), Image.LANCZOS)
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                path, split = f"images/{style}/{code}.png", which_list(concept, style)
                picture.convert("RGB").save(f"{out}/{path}")
                keywords = ", ".join([*concept.get("tags", ())[:4], style])
                for caption in (f"{emoji['label']}, {style}", f"{style} {emoji['label']}", keywords):
                    lists[split].append(f"{caption}\t{path}\n")
                lists["concepts"].append(f"{path}\t{concept['label']}\t{style}\t{split}\n")
    for name, lines in lists.items():
        pathlib.Path(f"{out}/{name}.tsv").write_text("".join(lines), encoding="utf-8")
        print(f"{name}.tsv: {len(lines):,} lines")

main(*sys.argv[1:2])
