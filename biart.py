"""
BiART: one GPT that paints an image from a caption and captions an image, over text and AugVAE's image tokens.

    text -> image                                   image -> text
    tokens    t_1 ... t_64  i_1 ... i_1024          tokens    i_1 ... i_1024  t_1 ... t_64
    segment   REF ... REF   GEN ... GEN             segment   REF ... REF     GEN ... GEN
    predicts   -  ... i_1   i_2 ...  -              predicts   -  ... t_1     t_2 ...  -

A token's embedding is token + segment + position. The segment says which side is given (REF) and which side
is generated (GEN). Attention is causal over the whole sequence. Both layouts have the same length, so one
forward pass runs half of a batch each way.

References:
1) L-Verse, Kim et al. 2022, https://arxiv.org/abs/2111.11133 (section 3.2).
2) GPT-2, Radford et al. 2019: the blocks and the initialisation.
3) Classifier-free guidance, Ho & Salimans 2022, https://arxiv.org/abs/2207.12598. Choosing among plausible
   tokens only is from contrastive decoding, Li et al. 2022, https://arxiv.org/abs/2210.15097.
"""
import math
import warnings
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
import torch.nn.functional as F
from torch import nn

from augvae import build_model, derived, read_checkpoint

REF, GEN = 0, 1  # entries of the segment embedding
OTHER = {"text": "image", "image": "text"}

@dataclass
class BiARTConfig:
    """The defaults are the released size, with CLIP's vocabulary and the 32x32 grid of AugVAE-SL."""
    n_layer: int = 24  # transformer blocks
    n_head: int = 16  # attention heads
    n_embd: int = 1024  # channels of the residual stream
    dropout: float = 0.0  # of embeddings and residual branches
    n_text: int = 64  # text tokens in a sequence, with the end token and padding
    positions: str = "modality"  # modality (text: index; image: row + column) or sequence (published)
    null_prob: float = 0.1  # how often training blanks the REF side, for classifier-free guidance
    t2i_weight: float = 1.0  # weight of text -> image in the loss; image -> text has 1
    replace_prob: float = 0.0  # text -> image: share of input image tokens that training replaces at random
    code_hidden: int = 0  # hidden units of an MLP that embeds the codes' vectors; 0 learns every embedding
    text_vocab: int = derived(49408)  # entries of the tokenizer
    end_token: int = derived(49407)  # closes every caption
    pad_token: int = derived(49406)  # fills up behind it
    image_vocab: int = derived(8192)  # entries of the codebook
    image_side: int = derived(32)  # rows, and columns, of image tokens
    code_dim: int = derived(256)  # length of a code vector

    limits = {"n_layer": (1, inf), "n_head": (1, inf), "n_embd": (1, inf), "dropout": (0, 0.99),
              "n_text": (2, inf), "null_prob": (0, 1), "replace_prob": (0, 1)}
    choices = {"positions": ("modality", "sequence")}

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")

    @property
    def n_image(self):
        return self.image_side ** 2

    def length(self, modality):
        return self.n_text if modality == "text" else self.n_image

    def vocab(self, modality):
        return self.text_vocab if modality == "text" else self.image_vocab

# -----------------------------------------------------------------------------
# The transformer

def causal_attention(q, k, v):
    """q, k, v (B, nh, T, hs) -> softmax(q k^T / sqrt(hs)) v, where no position sees a later one."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

class CausalSelfAttention(nn.Module):
    """attention(ln(x)): the layer norm in front is part of it."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # Query, key and value in one. Without bias: the key's would have no effect on attention, so its
        # gradient would be rounding noise, which Adam turns into full steps.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.ln = nn.LayerNorm(config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x, attend):
        B, T, C = x.shape
        qkv = norm_linear(x, self.ln, self.c_attn)  # = self.c_attn(self.ln(x))
        q, k, v = (x.view(B, T, self.n_head, -1).transpose(1, 2) for x in qkv.split(C, 2))  # (B, nh, T, hs)
        y = attend(q, k, v)  # causal_attention, or KVCache.attend while decoding
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

class MLP(nn.Module):
    """mlp(ln(x)): the layer norm in front is part of it."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.ln = nn.LayerNorm(config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = norm_linear(x, self.ln, self.c_fc)  # = self.c_fc(self.ln(x))
        x = linear_after(F.gelu, x, self.c_proj)  # = self.c_proj(F.gelu(x))
        return F.dropout(x, self.dropout, self.training)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, attend=causal_attention):
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(x, attend)
        x = x + self.mlp(x)
        return x

class CodeEmbedding(nn.Module):
    """Embeds the image codes: weight (V, C) = own_share * own + MLP(code vectors). Codes that look alike get
    similar embeddings from the MLP. `own` is one free vector a code. Adam moves all parameters equally fast,
    so own_share is small: the MLP learns first."""
    own_share = 0.2

    def __init__(self, config):
        super().__init__()
        c = config
        self.register_buffer("vectors", torch.randn(c.image_vocab, c.code_dim))  # see set_code_vectors()
        self.c_fc = nn.Linear(c.code_dim, c.code_hidden)
        self.c_proj = nn.Linear(c.code_hidden, c.n_embd)
        self.own = nn.Parameter(torch.empty(c.image_vocab, c.n_embd))
        self.cached = None

    @property
    def weight(self):
        """(V, C). While decoding, it is computed once: call eval() after changing weights."""
        if self.cached is not None and not torch.is_grad_enabled():
            return self.cached
        with torch.autocast(self.own.device.type, enabled=False):
            weight = self.own_share * self.own + self.c_proj(F.gelu(self.c_fc(self.vectors)))
        if not self.training and not torch.is_grad_enabled():
            self.cached = weight
        return weight

    def train(self, mode=True):
        self.cached = None
        return super().train(mode)

    def forward(self, tokens):
        return F.embedding(tokens, self.weight)

# -----------------------------------------------------------------------------
# The model

class BiART(nn.Module):
    """Text: LongTensor (B, n_text), padded behind its end token. Images: LongTensor (B, n_image), row by row.
    A direction is named by what it generates: to="image" or to="text"."""
    use_cuda_graphs = True  # when decoding on CUDA

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.ModuleDict({m: nn.Embedding(c.vocab(m), c.n_embd) for m in ("text", "image")})
        if c.code_hidden:
            self.token["image"] = CodeEmbedding(c)
        self.null = nn.ParameterDict({m: nn.Parameter(torch.empty(c.n_embd)) for m in ("text", "image")})
        self.segment = nn.Embedding(2, c.n_embd)
        if c.positions == "modality":
            self.text_position = nn.Embedding(c.n_text, c.n_embd)
            self.row_position = nn.Embedding(c.image_side, c.n_embd)
            self.column_position = nn.Embedding(c.image_side, c.n_embd)
        else:
            self.position = nn.Embedding(c.n_text + c.n_image, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        self.init_weights()

    @classmethod
    def load(cls, path):
        """A checkpoint of train.py -> the model, in eval mode on the CPU. May raise ValueError."""
        return build_model(cls, BiARTConfig, read_checkpoint(path, "biart"), path)

    def init_weights(self):
        """GPT-2's: normal(0, 0.02), divided by sqrt(2 n_layer) for projections into the residual stream. The
        0.02 suits 1024 channels. Narrower models start larger, or attention takes long to wake up."""
        std = 0.02 * (1024 / self.config.n_embd) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("ln.weight", "ln_f.weight")):
                nn.init.ones_(p)
            elif name == "token.image.own":
                nn.init.zeros_(p)
            elif name == "token.image.c_fc.weight":
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name == "token.image.c_proj.weight":  # this gives the embeddings the same std, too
                nn.init.normal_(p, std=1.5 * std * p.shape[1] ** -0.5)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(p, std=std)

    @torch.no_grad()
    def set_code_vectors(self, vectors):
        """For code_hidden: AugVAE's code vectors (image_vocab, code_dim), here with mean 0 and variance 1."""
        if self.config.code_hidden:
            self.token["image"].vectors.copy_((vectors - vectors.mean(0)) / vectors.std())

    def position_embedding(self, modality, segment):
        """Segment + position embeddings of one side of the sequence: (n, C)."""
        c = self.config
        if c.positions == "sequence":
            start = 0 if segment == REF else c.length(OTHER[modality])
            position = self.position.weight[start:start + c.length(modality)]
        elif modality == "text":
            position = self.text_position.weight
        else:  # (side, 1, C) + (1, side, C)
            position = (self.row_position.weight[:, None] + self.column_position.weight[None]).flatten(0, 1)
        return position + self.segment.weight[segment]

    def embed_side(self, tokens, modality, segment, null=None):
        """The first n tokens of a side, (B, n) -> (B, n, C). Where null (B,) is set, the side is blank."""
        x = self.token[modality](tokens)
        if null is not None:
            x = torch.where(null[:, None, None], self.null[modality].to(x.dtype), x)
        return x + self.position_embedding(modality, segment)[:tokens.shape[1]]

    def embed(self, text, image, to, null=None):
        """The layout of one direction: (B, n_text + n_image, C)."""
        if to == "image" and self.training and self.config.replace_prob:
            image = self.replace_some(image)
        sides, ref = {"text": text, "image": image}, OTHER[to]
        ref_side, gen_side = self.embed_side(sides[ref], ref, REF, null), self.embed_side(sides[to], to, GEN)
        return torch.cat([ref_side, gen_side], dim=1)

    def replace_some(self, image):
        """Replace some image tokens by others of the batch, so that the model has to read the caption."""
        others = image.flatten()[torch.randperm(image.numel(), device=image.device)].view_as(image)
        replaced = torch.rand(image.shape, device=image.device) < self.config.replace_prob
        return torch.where(replaced, others, image)

    def transformer(self, x, cache=None):
        """(B, T, C) -> (B, T, C), before the final layer norm. A KVCache holds what came before x."""
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, partial(cache.attend, layer) if cache else causal_attention)
        if cache:
            cache.position += x.shape[1]
        return x

    def logits(self, h, modality):
        """Hidden states (..., C) -> logits of the next token (..., V), over the vocabulary of its modality
        alone. As in GPT-2, the weights are those of the embedding."""
        return F.linear(self.ln_f(h), self.token[modality].weight)

    def is_scored(self, tokens, modality):
        """(B, n) -> bool (B, n): all tokens except padding count in losses."""
        if modality == "text":
            return tokens != self.config.pad_token
        return torch.ones_like(tokens, dtype=torch.bool)

    def cross_entropy(self, h, targets, modality):
        """Hidden states of a whole layout (B, T, C), its GEN side as targets (B, n) -> the loss: the mean
        over samples of the mean over their tokens; and the nll of each token, (B, n), 0 for padding. In nats.
        """
        h = self.ln_f(h[:, -targets.shape[1] - 1:-1]).flatten(0, 1)  # of the position before each target
        scored = self.is_scored(targets, modality)
        token_weights = scored / scored.sum(1, keepdim=True) / len(targets)
        # nll = F.cross_entropy(logits, targets, reduction="none"); loss = (token_weights * nll).sum()
        loss, nll = LinearCrossEntropy.apply(h, self.token[modality].weight, targets.flatten(),
                                             token_weights.flatten())
        return loss, nll.view_as(targets) * scored

    def forward(self, text, image, null=None):
        """Training's loss: samples 0, 2, 4 ... run text -> image, 1, 3, 5 ... image -> text, in one pass.

        text (B, n_text), image (B, n_image), null bool (B,): blank the REF side? -> the loss in nats a token:
        the mean of both directions, weighted t2i_weight to 1; and {"t2i", "i2t"}, each direction alone.
        Every sample counts the same, however a batch is spread over ranks. ValueError if B is odd."""
        if len(text) % 2:
            raise ValueError(f"batch size {len(text)} is odd: half of a batch runs in each direction")
        if null is None:
            null = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        painting = self.embed(text[0::2], image[0::2], "image", null[0::2])
        captioning = self.embed(text[1::2], image[1::2], "text", null[1::2])
        h_painting, h_captioning = self.transformer(torch.cat([painting, captioning])).chunk(2)
        t2i, _ = self.cross_entropy(h_painting, image[0::2], "image")
        i2t, _ = self.cross_entropy(h_captioning, text[1::2], "text")
        w = self.config.t2i_weight
        return (w * t2i + i2t) / (w + 1), {"t2i": t2i.detach(), "i2t": i2t.detach()}

    # -------------------------------------------------------------------------
    # Generation: prefill reads the prompt, then pick a token, embed it, step

    @torch.no_grad()
    def generate(self, ref, to, n=1, prefix=None, sampling=None, seeds=None, on_token=None):
        """Sample the GEN side from the REF side.

        ref: text (B, n_text) for to="image", image codes (B, n_image) for to="text"
        n: samples of each row of ref; result rows 0 ... n - 1 belong to row 0
        prefix: (B, m), the first GEN tokens, to be continued: rows of an image, words of a caption
        sampling: a Sampling
        seeds: B * n integers, by default 0, 1, 2, ...; a sample depends on its own seed alone
        on_token: called after each token with the tokens and how many columns are known; it may raise

        -> tokens, LongTensor (B * n, n_image), or (B * n, n_text) padded behind the end token; and the log p
        of what follows the prefix, without guidance and at temperature 1, in nats: (B * n,)"""
        c, length, sampling = self.config, self.config.length(to), sampling or Sampling()
        prefix = ref[:, :0] if prefix is None else prefix
        n_prefix = prefix.shape[1]
        noise = uniform_noise(range(len(ref) * n) if seeds is None else seeds, length).to(ref.device)
        tokens = F.pad(prefix, (0, length - n_prefix)).repeat_interleave(n, 0)
        log_p = torch.zeros(len(tokens), device=ref.device)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=ref.device)  # captions alone end early
        position = self.position_embedding(to, GEN)

        h, cache = self.prefill(ref, to, prefix, sampling.guidance, n)
        step = partial(self.decode_step, cache=cache)
        if ref.is_cuda and self.use_cuda_graphs:
            step = GraphedStep(step)
        for i in range(n_prefix, length):
            if i > n_prefix:
                x = self.token[to](tokens[:, i - 1]) + position[i - 1]
                h = step(x.repeat(len(h) // len(x), 1))  # with guidance, twice: h has the blank half, too
            logits, all_log_p = self.next_logits(h, to, sampling.guidance)
            token = sample_token(logits, noise[:, i], sampling)
            log_p += all_log_p.gather(1, token[:, None])[:, 0].masked_fill(ended, 0)
            tokens[:, i] = token.masked_fill(ended, c.pad_token)
            if on_token:
                on_token(tokens, i + 1)
            if to == "text":
                ended |= token == c.end_token
                if ended.all():
                    tokens[:, i + 1:] = c.pad_token
                    break
        return tokens, log_p

    def prefill(self, ref, to, prefix, guidance, n):
        """Read the prompts, ref (B, n_ref) and prefix (B, m), once for n samples each -> the hidden states
        that predict the next token, (B * n, C), and the KVCache. With guidance, the same prompts with a blank
        REF side are the second half of the batch: (2 * B * n, C)."""
        null = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
        if guidance != 1:
            ref, prefix, null = ref.repeat(2, 1), prefix.repeat(2, 1), torch.cat([null, ~null])
        x = torch.cat([self.embed_side(ref, OTHER[to], REF, null), self.embed_side(prefix, to, GEN)], 1)
        cache = KVCache(self.config.n_text + self.config.n_image, x.device)
        h = self.transformer(x, cache)[:, -1]
        rows = torch.arange(len(h), device=x.device).repeat_interleave(n)
        cache.select(rows)
        return h[rows], cache

    def decode_step(self, x, cache):
        """The embedding of one more token (B, C) -> the hidden state that predicts the next one (B, C)."""
        return self.transformer(x[:, None], cache)[:, 0]

    def next_logits(self, h, to, guidance):
        """Hidden states (B, C), with guidance (2 B, C) -> logits to choose the next token by, and the log p
        of every token without guidance, (B, V) each.

        With guidance, logits = conditional + (guidance - 1) * (1 - max p) * (conditional - null). Without the
        factor 1 - max p, guidance would raise the small odds of "a thing begins here" at every token, and all
        samples would put it in the same place. Tokens that are not plausible (see PLAUSIBLE) get -inf."""
        logits = self.logits(h, to).float()
        if guidance == 1:
            log_p = logits.log_softmax(-1)
        else:
            logits, null_logits = logits.chunk(2)
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            p_max = p.amax(-1, keepdim=True)
            logits = logits + (guidance - 1) * (1 - p_max) * (logits - null_logits)
            logits = logits.masked_fill(p < PLAUSIBLE * p_max, -inf)
        if to == "text":
            logits[:, self.config.pad_token] = -inf
        return logits, log_p

    @torch.no_grad()
    def beam_search(self, image, width, prefix=None, length_penalty=1.0, guidance=1.0):
        """The likeliest captions of image codes (B, n_image) -> LongTensor (B, width, n_text), best first,
        and their scores (B, width): log p / length ** length_penalty, of new tokens up to the end token.
        prefix (B, m), m < n_text: the first tokens of the caption."""
        c, B = self.config, len(image)
        prefix = image[:, :0] if prefix is None else prefix
        position = self.position_embedding("text", GEN)
        tokens = image.new_full((B, width, c.n_text), c.pad_token)
        tokens[:, :, :prefix.shape[1]] = prefix[:, None]
        log_p = torch.zeros(B, width, device=image.device)
        log_p[:, 1:] = -inf  # all beams begin alike: one is enough
        length, ended = torch.zeros_like(log_p), torch.zeros_like(log_p, dtype=torch.bool)
        only_padding = log_p.new_full((c.text_vocab,), -inf)
        only_padding[c.pad_token] = 0
        h, cache = self.prefill(image, "text", prefix, guidance, width)
        for i in range(prefix.shape[1], c.n_text):
            if i > prefix.shape[1]:
                x = self.token["text"](tokens[:, :, i - 1].flatten()) + position[i - 1]
                h = self.decode_step(x.repeat(len(h) // len(x), 1), cache)
            next_log_p = self.next_logits(h, "text", guidance)[0].log_softmax(-1).view(B, width, -1)
            next_log_p[ended] = only_padding
            total = log_p[..., None] + next_log_p  # (B, width, V)
            length = length + ~ended
            scores, best = (total / length[..., None] ** length_penalty).flatten(1).topk(width)
            beam, token = best // c.text_vocab, best % c.text_vocab  # (B, width)
            log_p = total.flatten(1).gather(1, best)
            length, ended = length.gather(1, beam), ended.gather(1, beam) | (token == c.end_token)
            tokens = tokens.gather(1, beam[..., None].expand_as(tokens))
            tokens[:, :, i] = token
            if ended.all():
                break
            rows = (beam + width * torch.arange(B, device=beam.device)[:, None]).flatten()
            cache.select(rows if guidance == 1 else torch.cat([rows, rows + B * width]))
        return tokens, scores

    # -------------------------------------------------------------------------
    # Scores: the same model judges what it generated, in both directions

    @torch.no_grad()
    def log_likelihood(self, text, image, to, start=0):
        """text (N, n_text), image (N, n_image) -> log p(GEN side | REF side) in nats, summed over the GEN
        tokens from `start` on: (N,); and how many tokens that are: (N,)."""
        targets = text if to == "text" else image
        row_size = 8 * self.config.n_embd * (self.config.n_text + self.config.n_image)  # numbers in an MLP
        rows = max(1, (2 ** 22 if targets.device.type == "cpu" else 2 ** 26) // row_size)  # to save memory
        nll = []
        for i in range(0, len(targets), rows):
            h = self.transformer(self.embed(text[i:i + rows], image[i:i + rows], to))
            nll.append(self.cross_entropy(h, targets[i:i + rows], to)[1])
        return -torch.cat(nll)[:, start:].sum(1), self.is_scored(targets, to)[:, start:].sum(1)

# -----------------------------------------------------------------------------
# Decoding

# With guidance, tokens with p below this share of the largest p are never chosen. With 0.03, some pictures of
# kinds never seen in training stayed empty.
PLAUSIBLE = 0.003

@dataclass
class Sampling:
    """How tokens are chosen."""
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that sum to this, above 0
    guidance: float = 1.0  # classifier-free guidance, see BiART.next_logits; 1: none

def uniform_noise(seeds, n):
    """-> random numbers in [0, 1), (len(seeds), n). Each row depends on its own seed alone."""
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(int(s))) for s in seeds])

def sample_token(logits, uniform, sampling):
    """logits (B, V), uniform (B,) in [0, 1) -> LongTensor (B,), by inverting the cumulative distribution: one
    random number a token."""
    if sampling.temperature < 1e-6:  # to divide by it would overflow
        return logits.argmax(-1)
    ranked = sampling.top_k > 0 or sampling.top_p < 1
    if ranked:  # the likeliest first
        logits, order = logits.topk(min(sampling.top_k or logits.shape[1], logits.shape[1]))
    p = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:  # the likeliest token always stays
        p = p.masked_fill(p.cumsum(-1) - p >= sampling.top_p, 0)
    cumulative = p.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]  # below the total: float32's uniform <= 1 - 2^-24
    token = torch.searchsorted(cumulative, target, right=True)  # the first whose cumulative mass is above
    if ranked:
        token = order.gather(1, token)
    return token[:, 0]

class KVCache:
    """Keys and values of all blocks while decoding: one tensor a block, (2, B, nh, length, hs)."""
    def __init__(self, length, device):
        self.length, self.kv = length, []
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the next token

    def attend(self, layer, q, k, v):
        """Keep k and v of one block, and attend: q, k, v (B, nh, T, hs) -> (B, nh, T, hs). First comes the
        prompt, with causal_attention; then single tokens (T = 1), which see all before them."""
        if layer == len(self.kv):
            self.kv.append(k.new_zeros(2, *k.shape[:2], self.length, k.shape[3]))
            self.kv[layer][0, :, :, :k.shape[2]] = k
            self.kv[layer][1, :, :, :k.shape[2]] = v
            return causal_attention(q, k, v)
        kv = self.kv[layer].index_copy_(3, self.position, torch.stack([k, v]))
        if kv.device.type == "cpu":  # the keys so far
            end = int(self.position) + 1
            return F.scaled_dot_product_attention(q, kv[0, :, :, :end], kv[1, :, :, :end])
        # A CUDA graph has fixed shapes and cannot look at a number: all keys, and a mask over those to come
        mask = torch.arange(self.length, device=kv.device)[None] <= self.position  # (1, length)
        return F.scaled_dot_product_attention(q, kv[0], kv[1], mask)

    def select(self, rows):
        """Row i becomes what row rows[i] was. This repeats prompts for their samples, and reorders beams."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv.index_select(1, rows)

class GraphedStep:
    """step(x) on CUDA as a graph: one launch instead of one a kernel. The first call warms up, the second is
    recorded. If the device refuses, all calls run kernel by kernel."""
    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, None

    def __call__(self, x):
        self.calls += 1
        if self.calls == 1:
            self.x = x  # the graph reads this memory
        if self.calls == 2:
            self.graph = self.record()
        if not self.graph:
            return self.step(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.h

    def record(self):
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
                self.h = self.step(self.x)  # records, and computes nothing
        except RuntimeError as e:
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            warnings.warn(f"no CUDA graphs here, decoding runs kernel by kernel ({e})", stacklevel=2)
            return None
        return graph

# -----------------------------------------------------------------------------
# Same result, less memory or time

is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)  # since torch 2.3

def norm_linear(x, ln, layer):
    """layer(ln(x)) for a layer norm and a linear layer; the backward pass keeps x alone."""
    def norm(x, weight, bias):
        return F.layer_norm(x, ln.normalized_shape, weight, bias, ln.eps)

    return linear_after(norm, x, layer, ln.weight, ln.bias)

def linear_after(f, x, layer, *params):
    """layer(f(x, *params)) for a linear layer; the backward pass keeps x alone."""
    if torch.is_grad_enabled() and not is_compiling():  # torch.compile finds by itself what to recompute
        return LinearAfter.apply(f, x, layer.weight, layer.bias, *params)
    return F.linear(f(x, *params), layer.weight, layer.bias)

class LinearAfter(torch.autograd.Function):
    """F.linear(f(x, *params), weight, bias). For the backward pass it keeps x, and computes f(x) again: for a
    layer norm or GELU that takes little time, and f(x) would take as much memory as x."""
    @staticmethod
    def forward(ctx, f, x, weight, bias, *params):
        ctx.f, ctx.has_bias = f, bias is not None
        ctx.save_for_backward(x, weight, *params)
        return F.linear(f(x, *params), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, *params = ctx.saved_tensors
        leaves = [t.detach().requires_grad_() for t in (x, *params)]
        with torch.enable_grad():
            y = ctx.f(*leaves)
        amp_dtype = grad.dtype  # autocast's dtype; backward runs outside autocast
        grad_rows, y_rows = grad.flatten(0, -2), y.detach().flatten(0, -2).to(amp_dtype)  # (N, out), (N, in)
        grad_y = (grad @ weight.to(amp_dtype)).to(y.dtype)
        grad_x, *grad_params = torch.autograd.grad(y, leaves, grad_y)
        grad_bias = grad_rows.sum(0) if ctx.has_bias else None
        return None, grad_x, grad_rows.t() @ y_rows, grad_bias, *grad_params

MAX_LOGITS = 2 ** 22  # that LinearCrossEntropy holds at once

class LinearCrossEntropy(torch.autograd.Function):
    """nll = F.cross_entropy(h @ weight.T, targets, reduction="none"), for h (N, C), weight (V, C), targets
    (N,). -> (token_weights * nll).sum(), a scalar to differentiate, and nll (N,), to read.

    The logits (N, V) would be the largest tensor of a step. Here they exist for a few rows at a time, and
    their gradient is computed while they do."""
    @staticmethod
    def forward(ctx, h, weight, targets, token_weights):
        with_gradient = ctx.needs_input_grad[0]
        nll = torch.empty(len(h), device=h.device)
        grad_h, grad_weight = torch.empty_like(h) if with_gradient else None, None
        scale = token_weights.max()  # multiplied in at the end: float16 would lose such small gradients
        rows = max(1, MAX_LOGITS * (16 if h.is_cuda else 1) // len(weight))
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            logits = F.linear(h[part], weight)  # (rows, V), in autocast's dtype
            amp_dtype, logits = logits.dtype, logits.float()
            log_total = logits.logsumexp(1, keepdim=True)
            target = targets[part, None]
            nll[part] = (log_total - logits.gather(1, target))[:, 0]
            if with_gradient:  # of the logits: token_weights * (softmax - one-hot)
                grad = logits.sub_(log_total).exp_().scatter_add_(1, target, -torch.ones_like(log_total))
                grad = grad.mul_((token_weights[part] / scale)[:, None]).to(amp_dtype)
                grad_h[part] = grad @ weight
                product = grad.t() @ h[part]
                grad_weight = product.to(weight.dtype) if start == 0 else grad_weight.add_(product)
        ctx.save_for_backward(grad_h, grad_weight, scale)
        ctx.mark_non_differentiable(nll)
        return (nll * token_weights).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_h, grad_weight, scale = ctx.saved_tensors
        return grad_h.mul_(grad * scale), grad_weight.mul_(grad * scale), None, None
