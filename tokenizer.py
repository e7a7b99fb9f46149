"""
Byte-level byte pair encoding (BPE): text -> integers -> the same text.

Text becomes UTF-8 bytes, so 256 ids can write anything. BPE then makes common strings short: again and again,
the pair of neighbours that occurs most often in some training text gets a new id. Encoding applies these
merges in the same order. Merges never cross words, so training looks at each distinct word only once.
With CLIP's merge list, the same class gives exactly CLIP's ids.

>>> tok = Tokenizer.train(["low lower lowest slow"], vocab_size=261)
>>> tok.merges                      # "l"+"o" is now 256, "lo"+"w" is 257, " "+"low" is 258
[(108, 111), (256, 119), (32, 257)]
>>> tok.encode("low lower")
[257, 258, 101, 114]
>>> tok.decode([257, 258, 101, 114])
'low lower'

References:
1) BPE for text, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909
2) GPT-2, bytes, a word includes the space before it: https://github.com/openai/gpt-2, src/encoder.py
3) CLIP, lower case, marks the last byte of a word: https://github.com/openai/CLIP, clip/simple_tokenizer.py
"""
import functools
import gzip
import hashlib
import html
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush

FILE_FORMAT = "byte-level BPE tokenizer"
CLIP_MERGES = 48894  # CLIP uses only the first 49408 - 2*256 - 2 of the 262144 merges of its list
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"  # words of their own
CACHE_WORDS = 2**16  # that encode() remembers, about 10 MB

# -----------------------------------------------------------------------------
# The two loops of BPE: learn merges, and apply them

def pairs(ids):
    """Neighbours: [1, 2, 3] -> (1, 2), (2, 3)."""
    return zip(ids, ids[1:])

def replace_pair(ids, pair, new_id):
    """Replaces every `pair` by `new_id`, from left to right: ([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new_id
        else:
            out.append(i)
    return out

def learn_merges(word_counts, first_id, n_merges):
    """
    How often each word (a tuple of ids) occurs -> at most `n_merges` merges; merge i makes id first_id + i:
    ({(1, 2, 3): 5, (1, 2): 1}, 256, 2) -> [(1, 2), (256, 3)]

    This loop is the whole idea, but hundreds of times slower:

        words, merges = list(word_counts), []
        while len(merges) < n_merges:
            counts = Counter()
            for word, original in zip(words, word_counts):
                for pair in pairs(word):
                    counts[pair] += word_counts[original]
            best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)  # ties: smallest pair
            if counts[best] < 2:
                break
            words = [replace_pair(word, best, first_id + len(merges)) for word in words]
            merges.append(best)
    """
    # Faster: count again only in words with the merged pair. Outdated counts are dropped at the heap's top.
    words, counts = [list(word) for word in word_counts], list(word_counts.values())
    pair_counts = Counter()
    pair_words = defaultdict(set)  # pair -> words that have or had it
    changed = set()  # pairs to be put on the heap

    def count_pairs(w, sign):
        for pair in pairs(words[w]):
            pair_counts[pair] += sign * counts[w]
            pair_words[pair].add(w)
            changed.add(pair)

    for w in range(len(words)):
        count_pairs(w, 1)
    heap, merges = [], []
    while len(merges) < n_merges:
        for pair in changed:
            heappush(heap, (-pair_counts[pair], pair))
        changed.clear()
        while heap and -heap[0][0] != pair_counts[heap[0][1]]:
            heappop(heap)
        if not heap or -heap[0][0] < 2:
            break
        best, new_id = heap[0][1], first_id + len(merges)
        merges.append(best)
        for w in pair_words.pop(best):
            count_pairs(w, -1)
            words[w] = replace_pair(words[w], best, new_id)
            count_pairs(w, 1)
    return merges

def apply_merges(ids, pair_ids):
    """Merges one word, the earliest learned pair first: ([1, 2, 2], {(2, 2): 8, (1, 8): 9}) -> [9]."""
    while True:
        known = [pair for pair in pairs(ids) if pair in pair_ids]
        if not known:
            return ids
        pair = min(known, key=pair_ids.get)  # the earliest merge has the smallest id
        ids = replace_pair(ids, pair, pair_ids[pair])

# -----------------------------------------------------------------------------
# The two kinds of tokenizer

def trained_words(text):
    r"""Cuts text into words: "It's  2 late_\n" -> ["It", "'s", " ", " 2", " late", "_", "\n"]"""
    # Nothing is lost: every character is in one of [^\W\d_], \d, [^\w\s], _ and \s.
    return re.findall(rf"{CONTRACTIONS}| ?[^\W\d_]+| ?\d| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+", text)

def clip_words(text):
    r"""Cleans and cuts text as CLIP does: " IT&#39;s\n 20  ⅷ." -> ["it", "'s", "2", "0", "ⅷ", "."]"""
    text = html.unescape(html.unescape(text))  # CLIP also calls ftfy, we do not
    text = re.sub(r"[^\S\x1c-\x1f]+", " ", text)  # all \s but \x1c-\x1f, which CLIP's regex does not count
    return clip_pattern().findall(text.strip().lower())

@functools.cache
def clip_pattern():
    # CLIP uses \p{L} and \p{N}, Unicode's letters and numbers, which `re` lacks. But \w is both and "_", so a
    # class of the numbers is enough, about 130 ranges.
    categories = "".join(unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    numbers = "".join(f"{chr(run.start())}-{chr(run.end() - 1)}" for run in re.finditer("N+", categories))
    # CLIP ignores case, which matters twice even after lower(): "ſ" is an "s" in contractions, and the mark
    # U+0345, whose capital is a letter, vanishes.
    fixed = rf"(?i:<\|startoftext\|>|<\|endoftext\|>|{CONTRACTIONS})"
    return re.compile(rf"{fixed}|[^\W_{numbers}]+|[{numbers}]|(?:[^\w \u0345]|_)+")

# In CLIP's list, bytes that are visible in Latin-1 stand for themselves and have the first ids. The other 68
# are written as U+0100 and up: a space is "Ġ".
VISIBLE = bytes([*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)])
HIDDEN = bytes(b for b in range(256) if b not in VISIBLE)

def read_clip_merges(content):
    """The content of CLIP's bpe_simple_vocab_16e6.txt.gz -> merges: pairs of ids."""
    symbols = [chr(b) for b in VISIBLE] + [chr(256 + i) for i in range(len(HIDDEN))]
    symbols += [symbol + "</w>" for symbol in symbols]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges = []
    for line in gzip.decompress(content).decode("utf-8").split("\n")[1:CLIP_MERGES + 1]:  # below a header
        left, right = line.split(" ")
        merges.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    if len(merges) < CLIP_MERGES:
        raise ValueError(f"only {len(merges)} merges, CLIP's list has more than {CLIP_MERGES}")
    return merges

class Tokenizer:
    """Text -> ids in [0, len(tokenizer)), and back. The special ids `end` and `pad` stand for no text."""
    def __init__(self, kind, merges):
        self.kind, self.merges = kind, [tuple(pair) for pair in merges]
        clip = kind == "clip"
        self.words = clip_words if clip else trained_words
        byte_order = VISIBLE + HIDDEN if clip else bytes(range(256))
        self.byte_ids = bytes(byte_order.index(b) for b in range(256))  # byte -> id, for bytes.translate
        self.vocab = [bytes([b]) for b in byte_order]  # id -> bytes
        if clip:  # ids 256 to 511: the same bytes, where they end a word
            self.vocab += [token + b" " for token in self.vocab]
        self.pair_ids = {pair: i for i, pair in enumerate(self.merges, len(self.vocab))}
        for left, right in self.merges:  # fails if a merge is no pair of earlier ids
            self.vocab.append(self.vocab[left] + self.vocab[right])
        self.end, self.pad = len(self.vocab), len(self.vocab) + 1
        self.vocab += [b"", b""]
        self.cache = {}  # word -> ids
        if clip:  # its last two ids are start and end; we pad with start
            self.end, self.pad = self.pad, self.end
            self.cache = {"<|startoftext|>": [self.pad], "<|endoftext|>": [self.end]}

    def __len__(self):
        return len(self.vocab)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns at most vocab_size ids: 256 bytes, merges, end and pad. ValueError if it is below 258."""
        if vocab_size < 258:
            raise ValueError(f"vocab_size is {vocab_size} but must be at least 258")
        if isinstance(texts, str):
            raise TypeError("texts is one string but must be an iterable of strings")
        counts = Counter(word for text in texts for word in trained_words(text))
        word_counts = {tuple(word.encode("utf-8")): count for word, count in counts.items()}
        return cls("trained", learn_merges(word_counts, first_id=256, n_merges=vocab_size - 258))

    def encode(self, text: str) -> list[int]:
        """Text to ids, without end or pad. ValueError for a lone surrogate, which is no character."""
        ids = []
        for word in self.words(text):
            word_ids = self.cache.get(word)
            if word_ids is None:
                word_ids = list(word.encode("utf-8").translate(self.byte_ids))
                if self.kind == "clip":
                    word_ids[-1] += 256
                word_ids = apply_merges(word_ids, self.pair_ids)
                if len(self.cache) < CACHE_WORDS:
                    self.cache[word] = word_ids
            ids += word_ids
        return ids

    def encode_padded(self, text: str, length: int) -> tuple[list[int], bool]:
        """`length` ids (text, end, pads), and whether text was cut. ValueError if length is below 1."""
        if length < 1:
            raise ValueError(f"length is {length} but must be at least 1")
        ids = [i for i in self.encode(text) if i not in (self.end, self.pad)]  # CLIP's text may spell them
        padded = ids[:length - 1] + [self.end] + [self.pad] * (length - 1 - len(ids))
        return padded, len(ids) >= length

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Invalid UTF-8, which a model may write, is U+FFFD. ValueError for unknown ids."""
        tokens = []
        for i in ids:
            if not 0 <= i < len(self.vocab):
                raise ValueError(f"token id {i} is not in the range 0 to {len(self.vocab) - 1}")
            tokens.append(self.vocab[i])
        text = b"".join(tokens).decode("utf-8", errors="replace")
        return text.strip() if self.kind == "clip" else text  # CLIP's ids give a space after each word

    def fingerprint(self) -> str:
        """16 hex digits that identify the vocabulary; checkpoints store them."""
        return hashlib.sha256(json.dumps([self.kind, self.merges]).encode()).hexdigest()[:16]

    def save(self, path):
        """Writes a JSON file, under another name until it is complete."""
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            json.dump({"format": FILE_FORMAT, "kind": self.kind, "merges": self.merges}, f)
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Reads a saved tokenizer or CLIP's gzipped merge list. ValueError if it cannot."""
        try:
            with open(path, "rb") as f:
                content = f.read()
            if content.startswith(b"\x1f\x8b"):  # gzip
                return cls("clip", read_clip_merges(content))
            record = json.loads(content)
            if record["format"] != FILE_FORMAT or record["kind"] not in ("trained", "clip"):
                raise ValueError("JSON of something else")
            if any(i < 0 for pair in record["merges"] for i in pair):
                raise ValueError("negative ids in merges")
            return cls(record["kind"], record["merges"])
        except Exception as e:  # a damaged file fails in many ways: gzip, JSON, ids, ...
            raise ValueError(f"cannot read {path} as a tokenizer file ({type(e).__name__}: {e})") from e
