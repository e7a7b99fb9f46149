"""
BiART: one GPT that paints an image from a caption and captions an image, over text tokens and AugVAE's image tokens.

    text -> image    t_1 ... t_64   i_1 ... i_1024      segment: REF x 64,   GEN x 1024
    image -> text    i_1 ... i_1024 t_1 ... t_64        segment: REF x 1024, GEN x 64

What a token embeds to is token + segment + position: the segment (REF, what is given; GEN, what is generated) is how the
model knows which way it runs. Attention is causal over the whole sequence in both layouts; the first GEN token is
predicted at the last REF position. Both layouts have one length, so half a batch each way goes through in one forward.

References:
1) L-Verse, Kim et al. 2022, https://arxiv.org/abs/2111.11133 (section 3.2); the authors' recipe is minGPT plus a two-entry
   segment embedding.
2) GPT-2, Radford et al. 2019, for the blocks and the initialisation.
3) Classifier-free guidance, Ho & Salimans 2022, https://arxiv.org/abs/2207.12598.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

REF, GEN = 0, 1
OTHER = {"text": "image", "image": "text"}


def derived(default):
    """A setting that follows from the tokenizer or from AugVAE, and so is not asked for on the command line."""
    return field(default=default, metadata={"derived": True})


@dataclass
class BiARTConfig:
    """The defaults are the released size, over CLIP's vocabulary and the 32x32 grid of AugVAE-SL."""
    n_layer: int = 24  # transformer blocks
    n_head: int = 16  # attention heads
    n_embd: int = 1024  # channels of the residual stream
    dropout: float = 0.0  # of embeddings, attention and residual branches
    n_text: int = 64  # text tokens in a sequence, end and padding included
    positions: str = "modality"  # modality (text: index; image: row + column) or sequence (published: absolute)
    null_prob: float = 0.1  # how often training blanks the whole REF side, for classifier-free guidance
    ref_loss: float = 0.0  # weight of the cross-entropy over REF tokens; 0 trains on GEN tokens alone
    text_vocab: int = derived(49408)
    end_token: int = derived(49407)  # closes every caption
    pad_token: int = derived(49406)  # fills up behind it
    image_vocab: int = derived(8192)
    image_side: int = derived(32)  # rows, and columns, of image tokens

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.positions not in ("modality", "sequence"):
            raise ValueError(f"positions {self.positions!r} is none of: modality, sequence")

    @property
    def n_image(self):
        return self.image_side ** 2

    def length(self, modality):
        return {"text": self.n_text, "image": self.n_image}[modality]

    def vocab(self, modality):
        return {"text": self.text_vocab, "image": self.image_vocab}[modality]


# -----------------------------------------------------------------------------
# The transformer

class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        # Query, key and value in one. Without bias: the key's has no effect, so its gradient is rounding noise, which Adam
        # would blow up to full steps, others on two GPUs than on one.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        if cache is not None:  # (2, B, nh, T_max, hs): keys and values of all positions so far
            cache[0, :, :, start:start + T] = k
            cache[1, :, :, start:start + T] = v
            k, v = cache[:, :, :, :start + T]
        # A prompt enters at position 0 and is causal in itself; a single new token sees all that is cached.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(),
                                 nn.Linear(4 * config.n_embd, config.n_embd), nn.Dropout(config.dropout))

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class LinearCrossEntropy(torch.autograd.Function):
    """
    h (N, C), weight (V, C), targets (N,), share (N,), with_gradient -> sum of share * cross-entropy, a scalar to
    differentiate, and the cross-entropies themselves (N,), nats, to read. The scores (N, V) exist a chunk of rows at a
    time only: the gradient is worked out while a chunk is there, so that the backward pass has nothing to do again.
    """
    chunk = 2 ** 24  # scores held at once

    @staticmethod
    def forward(ctx, h, weight, targets, share, with_gradient):
        rows = max(1, LinearCrossEntropy.chunk // len(weight))
        nll, grad_h = torch.empty(len(h), device=h.device), torch.empty_like(h) if with_gradient else None
        grad_weight = torch.zeros_like(weight) if with_gradient else None
        scale = share.max()  # comes in at the end: float16 would lose such small gradients on the way
        for part in torch.arange(len(h)).split(rows):
            part = slice(int(part[0]), int(part[-1]) + 1)
            scores = F.linear(h[part], weight)  # (rows, V), in autocast's type
            low, scores = scores.dtype, scores.float()
            top = scores.logsumexp(1, keepdim=True)
            wanted = targets[part, None]
            nll[part] = (top - scores.gather(1, wanted))[:, 0]
            if with_gradient:  # of the scores: share * (softmax - one-hot)
                grad = scores.sub_(top).exp_().scatter_add_(1, wanted, -torch.ones_like(top))
                grad = grad.mul_((share[part] / scale)[:, None]).to(low)
                grad_h[part] = grad @ weight
                grad_weight += grad.t() @ h[part]
        ctx.save_for_backward(grad_h, grad_weight, scale)
        ctx.mark_non_differentiable(nll)
        return (nll * share).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_h, grad_weight, scale = ctx.saved_tensors
        return grad_h * (grad * scale), grad_weight * (grad * scale), None, None, None


# -----------------------------------------------------------------------------
# The model

class BiART(nn.Module):
    """
    Text is LongTensor (B, n_text), padded behind its end token; images are LongTensor (B, n_image), row by row.
    A direction is named by what it generates: to="image" or to="text".
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.ModuleDict({m: nn.Embedding(c.vocab(m), c.n_embd) for m in OTHER})
        self.null = nn.ParameterDict({m: nn.Parameter(torch.empty(c.n_embd)) for m in OTHER})
        self.segment = nn.Embedding(2, c.n_embd)
        if c.positions == "modality":
            self.text_position = nn.Embedding(c.n_text, c.n_embd)
            self.row_position = nn.Embedding(c.image_side, c.n_embd)
            self.column_position = nn.Embedding(c.image_side, c.n_embd)
        else:
            self.position = nn.Embedding(c.n_text + c.n_image, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        # One head a modality: image positions are scored over the image codes only, text positions over the text only.
        self.head = nn.ModuleDict({m: nn.Linear(c.n_embd, c.vocab(m), bias=False) for m in OTHER})
        self.init_weights()

    def init_weights(self):
        """
        GPT-2's: normal(0, 0.02), projections into the residual stream scaled down by sqrt(2 n_layer). The 0.02 suits the
        released width of 1024; narrower models start proportionally larger, or attention takes long to wake up.
        """
        std = 0.02 * (1024 / self.config.n_embd) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" in name:
                nn.init.ones_(p)
            else:
                residual = name.endswith(("c_proj.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)

    def place(self, modality, segment):
        """Segment + position embeddings of one side of the sequence: (n, C)."""
        c = self.config
        if c.positions == "sequence":
            start = 0 if segment == REF else c.length(OTHER[modality])
            position = self.position.weight[start:start + c.length(modality)]
        elif modality == "text":
            position = self.text_position.weight
        else:
            position = (self.row_position.weight[:, None] + self.column_position.weight[None]).flatten(0, 1)
        return position + self.segment.weight[segment]

    def embed(self, tokens, modality, segment, null=None):
        """tokens (B, n), from the start of their side -> (B, n, C); where null (B,) is true, the tokens are blanked."""
        x = self.token[modality](tokens)
        if null is not None:
            x = torch.where(null[:, None, None], self.null[modality].to(x.dtype), x)
        return x + self.place(modality, segment)[:tokens.shape[1]]

    def sequence(self, text, image, to, null=None):
        """The embedded layout of one direction: (B, n_text + n_image, C). null (B,) blanks REF sides."""
        sides = {"text": text, "image": image}
        ref = OTHER[to]
        return torch.cat([self.embed(sides[ref], ref, REF, null), self.embed(sides[to], to, GEN)], dim=1)

    def trunk(self, x, cache=None, start=0):
        """(B, T, C) -> (B, T, C), before the final norm. cache: see new_cache; start: position of the first of x."""
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        return x

    def logits(self, h, modality):
        """Hidden states (..., C) -> scores of the next token (..., vocab of the modality it belongs to)."""
        return self.head[modality](self.ln_f(h))

    def scored(self, tokens, modality):
        """Which tokens count: all but the padding. A text is scored up to and including its end token."""
        return tokens != self.config.pad_token if modality == "text" else torch.ones_like(tokens, dtype=torch.bool)

    def cross_entropy(self, h, targets, modality):
        """
        Hidden states (B, n, C), each one place before its target (B, n) -> the mean over samples of the mean over a
        sample's scored tokens, a scalar; and each sample's sum over its scored tokens (B,), to read. Nats.
        """
        scored = self.scored(targets, modality)
        share = scored / scored.sum(1, keepdim=True) / len(targets)
        mean, nll = LinearCrossEntropy.apply(self.ln_f(h).flatten(0, 1), self.head[modality].weight, targets.flatten(),
                                             share.flatten(), torch.is_grad_enabled())
        return mean, (nll.view_as(targets) * scored).sum(1)

    def forward(self, text, image, null=None):
        """
        One training step's loss: samples 0, 2, 4 ... run text -> image, samples 1, 3, 5 ... image -> text, in one pass.

        text (B, n_text), image (B, n_image), null bool (B,) or None -> loss, a scalar in nats a token, the mean of the
        two directions, and {"t2i": ..., "i2t": ...}. Each direction is the mean over its samples of the sample's mean
        over its scored tokens, which does not depend on how a batch is spread over ranks. B must be even.
        """
        if len(text) % 2:
            raise ValueError(f"batch size {len(text)} is odd: half of a batch runs in each direction")
        halves = []
        for to, pick in (("image", slice(0, None, 2)), ("text", slice(1, None, 2))):
            halves.append((to, {"text": text[pick], "image": image[pick]}, None if null is None else null[pick]))
        h = self.trunk(torch.cat([self.sequence(to=to, null=blank, **sides) for to, sides, blank in halves]))
        losses = []
        for half, (to, sides, _) in zip(h.chunk(2), halves):
            ref = OTHER[to]
            n_ref = self.config.length(ref)
            loss, _ = self.cross_entropy(half[:, n_ref - 1:-1], sides[to], to)
            if self.config.ref_loss:
                loss = loss + self.config.ref_loss * self.cross_entropy(half[:, :n_ref - 1], sides[ref][:, 1:], ref)[0]
            losses.append(loss)
        return sum(losses) / 2, {"t2i": losses[0].detach(), "i2t": losses[1].detach()}

    @torch.no_grad()
    def log_likelihood(self, text, image, to, chunk=2 ** 26):
        """
        log p(GEN side | REF side), nats: (B,), and the number of tokens it is the sum over: (B,). Any B: rows go through
        a few at a time, so that about `chunk` numbers are held at once, scores and activations of one block together.
        """
        c, targets = self.config, {"text": text, "image": image}[to]
        few = max(1, chunk // (c.length(to) * c.vocab(to) + 8 * c.n_embd * (c.n_text + c.n_image)))
        total = []
        for t, i, wanted in zip(text.split(few), image.split(few), targets.split(few)):
            h = self.trunk(self.sequence(t, i, to))
            total.append(self.cross_entropy(h[:, c.length(OTHER[to]) - 1:-1], wanted, to)[1])
        return -torch.cat(total), self.scored(targets, to).sum(1)

    def judge(self, ref, candidates, to):
        """
        What both directions say of candidates (B, n, n_gen) for ref (B, n_ref): forward log p(candidate | ref) and
        reverse log p(ref | candidate), nats, (B, n) each. The latter re-ranks candidates without a second model.
        """
        B, n, _ = candidates.shape
        sides = {OTHER[to]: ref.repeat_interleave(n, 0), to: candidates.flatten(0, 1)}
        return tuple(self.log_likelihood(sides["text"], sides["image"], way)[0].view(B, n) for way in (to, OTHER[to]))

    # -------------------------------------------------------------------------
    # Generation: begin() reads the prompt, advance() adds a token, generate() and beam_search() choose it

    def new_cache(self, batch):
        """Room for the keys and values of a whole sequence: (n_layer, 2, batch, n_head, T, head size)."""
        c, weight = self.config, self.head["text"].weight
        return weight.new_zeros(c.n_layer, 2, batch, c.n_head, c.n_text + c.n_image, c.n_embd // c.n_head)

    def begin(self, ref, to, n, prefix, guidance):
        """
        ref (B, n_ref) and the first GEN tokens, prefix (B, m) -> scores of the next one (B * n, V), and the cache. The
        prompt goes through once for each row of ref; its cache is then copied to that row's n candidates. With guidance,
        a second half of the cache is of a blanked REF side.
        """
        null = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
        if guidance != 1:
            ref, prefix, null = ref.repeat(2, 1), prefix.repeat(2, 1), torch.cat([null, ~null])
        x = torch.cat([self.embed(ref, OTHER[to], REF, null), self.embed(prefix, to, GEN)], dim=1)
        cache = self.new_cache(len(x))
        h = self.trunk(x, cache)[:, -1].repeat_interleave(n, 0)
        return self.next_scores(h, to, guidance), cache.repeat_interleave(n, 2)

    def advance(self, x, at, to, cache, guidance):
        """The embedding x (rows, C) of a token that stands at position `at` -> scores of the next one (rows, V)."""
        h = self.trunk(x[:, None] if guidance == 1 else x[:, None].repeat(2, 1, 1), cache, at)
        return self.next_scores(h[:, 0], to, guidance)

    def next_scores(self, h, to, guidance):
        logits = self.logits(h, to).float()
        if guidance != 1:
            logits, blank = logits.chunk(2)
            logits = blank + guidance * (logits - blank)
        if to == "text":
            logits[:, self.config.pad_token] = -torch.inf
        return logits

    @torch.no_grad()
    def generate(self, ref, to, n=1, prefix=None, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, seeds=None):
        """
        Sample the GEN side from the REF side, with a key-value cache.

        ref: text (B, n_text) for to="image", image codes (B, n_image) for to="text".
        n: candidates for each row of ref, which share its prompt: rows 0..n-1 of the result belong to ref 0, and so on.
        prefix: (B, m), the first GEN tokens, to be continued: rows of an image, words of a caption.
        temperature: 0 is greedy. top_k: keep the k likeliest, 0 all. top_p in (0, 1]: keep the likeliest that sum to p.
        guidance: logits = null + guidance * (conditional - null), where null is the same model on a blanked REF side.
        seeds: B * n integers; the same seed gives the same sample whatever else is in the batch. None: 0, 1, 2, ...

        -> LongTensor (B * n, n_image), or (B * n, n_text), which is padded behind its end token.
        """
        c = self.config
        rows, start, total = len(ref) * n, c.length(OTHER[to]), c.length(to)
        prefix = ref[:, :0] if prefix is None else prefix
        given = prefix.shape[1]
        out = torch.full((rows, total), c.pad_token if to == "text" else 0, device=ref.device)
        out[:, :given] = prefix.repeat_interleave(n, 0)
        seeds = range(rows) if seeds is None else seeds
        uniform = torch.stack([torch.rand(total, generator=torch.Generator().manual_seed(int(s))) for s in seeds])
        uniform = uniform.to(ref.device)
        place = self.place(to, GEN)
        done = torch.zeros(rows, dtype=torch.bool, device=ref.device)
        logits, cache = self.begin(ref, to, n, prefix, guidance)
        for i in range(given, total):
            token = sample(logits, uniform[:, i], temperature, top_k, top_p)
            if to == "text":
                token = torch.where(done, c.pad_token, token)
                done |= token == c.end_token
            out[:, i] = token
            if i + 1 == total or (to == "text" and done.all()):
                break
            logits = self.advance(self.token[to](token) + place[i], start + i, to, cache, guidance)
        return out

    @torch.no_grad()
    def beam_search(self, image, width, prefix=None, length_penalty=1.0, guidance=1.0):
        """
        The likeliest captions of image codes (B, n_image) -> LongTensor (B, width, n_text), best first, and their scores
        (B, width): log p / length ** length_penalty, where length counts the tokens found, the end token with them.

        Every step keeps the `width` best of all continuations of all beams, ended ones among them. Width 1 is greedy.
        prefix (B, m): the first tokens of the caption. The beams of an image share its cached prompt.
        """
        c, B = self.config, len(image)
        prefix = image[:, :0] if prefix is None else prefix
        given = prefix.shape[1]
        out = image.new_full((B, width, c.n_text), c.pad_token)
        out[:, :, :given] = prefix[:, None]
        log_p = image.new_zeros((B, width), dtype=torch.float)
        log_p[:, 1:] = -torch.inf  # all beams begin alike: one is enough
        length, done = torch.zeros_like(log_p), torch.zeros_like(log_p, dtype=torch.bool)
        stay = log_p.new_full((c.text_vocab,), -torch.inf)  # how an ended beam goes on: padding, for certain
        stay[c.pad_token] = 0
        place = self.place("text", GEN)
        logits, cache = self.begin(image, "text", width, prefix, guidance)
        for i in range(given, c.n_text):
            step = torch.where(done[..., None], stay, logits.log_softmax(-1).view(B, width, -1))
            total = log_p[..., None] + step  # (B, width, V)
            length = length + ~done
            scores, best = (total / length[..., None] ** length_penalty).flatten(1).topk(width)
            parent, token = best // c.text_vocab, best % c.text_vocab
            log_p, length, done = total.flatten(1).gather(1, best), length.gather(1, parent), done.gather(1, parent)
            out = out.gather(1, parent[..., None].expand_as(out))
            out[:, :, i] = token
            done = done | (token == c.end_token)
            if i + 1 == c.n_text or done.all():
                return out, scores
            rows = (torch.arange(B, device=image.device)[:, None] * width + parent).flatten()
            rows = rows if guidance == 1 else torch.cat([rows, rows + len(rows)])
            found = slice(c.n_image + given, c.n_image + i)  # of the cache only this differs between an image's beams
            cache[..., found, :] = cache[:, :, rows, :, found]
            x = self.token["text"](token.flatten()) + place[i]
            logits = self.advance(x, c.n_image + i, "text", cache, guidance)


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    logits (B, V), uniform (B,) in [0, 1) -> LongTensor (B,), by inverting the cumulative distribution: one random number
    a token, so that a sample depends on its own seed alone.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(-1)
    if top_p < 1:  # drop what lies wholly behind the first top_p of the mass; the likeliest always stays
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    cumulative = p.cumsum(-1)
    rank = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return order.gather(1, rank.clamp_max((p > 0).sum(-1, keepdim=True) - 1))[:, 0]
