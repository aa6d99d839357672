"""How the image tokens of prompts are drawn, for any number of prompts with the same number of candidates each.

A decoding strategy says in which order positions are filled, and how many a step reads. It works on a ``Drawing``,
which has the tokens, the guided scores and the random numbers, and it stands in ``STRATEGIES``. A place is where a
position comes in that order; in raster order they are the same.

Axes: p prompts, c candidates of a prompt, r = p * c rows in that order, n image tokens, t text tokens, q positions of a
step, k codebook_size.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.sampling import SamplingConfig, guide
from dalle_pytorch.models.text_to_image import TextToImage


class KnownTokens(NamedTuple):
    """Image tokens that stay as they are: the start of an image, or any part of it.

    In raster order what is drawn fits the kept tokens above and to the left of it, and does not know those that come
    later. In a random order it knows them all.
    """

    tokens: Int[Tensor, "p n"]
    """Tokens of an image for each prompt; what is not kept is not read."""
    keep: Bool[Tensor, " n"]
    """Which of them stay."""


class Drawing:
    """Images on their way: what a strategy reads and fills.

    Args:
        decoder: the model, laid out for sampling.
        text_tokens: prompts, 0 = padding; each is read once, whatever the number of its candidates.
        uniforms: a number in [0, 1) for every row and position; position i decides image token i.
        sampling: temperature, truncation and guidance.
        given: tokens that stay as they are.
        null_tokens: what guidance leads away from; None = the empty caption.
        order: raster positions in the order in which they are drawn, on the CPU; None = raster order.

    Raises:
        UserError: shapes that do not fit; names them.
    """

    def __init__(
        self,
        decoder: Decoder,
        text_tokens: Int[Tensor, "p t"],
        uniforms: Float[Tensor, "r n"],
        sampling: SamplingConfig,
        given: KnownTokens | None = None,
        null_tokens: Int[Tensor, "p t"] | None = None,
        order: Int[Tensor, " n"] | None = None,
    ) -> None:
        count, prompts = decoder.dalle.num_image_tokens, len(text_tokens)
        if uniforms.shape[1] != count or not prompts or len(uniforms) % prompts:
            raise UserError(
                f"uniforms of shape {tuple(uniforms.shape)} given, expected (candidates of {prompts} prompts, image "
                f"tokens) = (a multiple of {prompts}, {count})"
            )
        self.decoder, self.uniforms, self.sampling = decoder, uniforms, sampling
        self.candidates, device = len(uniforms) // prompts, text_tokens.device
        self.order = None if order is None else order.to(device)
        self.tokens = torch.zeros(len(uniforms), count, dtype=torch.long, device=device)
        """``[r, n]``; what has not been drawn is 0, or a strategy's guess."""
        self.known = torch.zeros(count, dtype=torch.bool)
        """Which places stay as they are, ``[n]``; on the CPU, which asks at every step."""
        if given is not None:
            if given.tokens.shape != (prompts, count) or given.keep.shape != (count,):
                raise UserError(
                    f"given tokens of shape {tuple(given.tokens.shape)} and a mask of {tuple(given.keep.shape)} do not "
                    f"fit {prompts} prompts of {count} image tokens"
                )
            self.known = given.keep.cpu() if order is None else given.keep.cpu()[order]
            kept = torch.where(given.keep, given.tokens, 0).to(device)
            decoder.dalle.check_image_tokens(kept)
            self.tokens[:] = kept.repeat_interleave(self.candidates, dim=0)
        wanted = (~self.known).nonzero()[:, 0].tolist()
        self.first, self.last = (wanted[0], wanted[-1]) if wanted else (count, count - 1)
        """First and last place to draw."""
        self.scales = sampling.scales(count)
        self.scale_of = torch.tensor(self.scales, device=device)
        self.guided = any(scale != 1 for scale in self.scales[self.first : self.last + 1])
        self.text = text_tokens
        if self.guided:  # the null twins of the prompts are the lower half of the rows
            null = torch.zeros_like(text_tokens) if null_tokens is None else null_tokens
            self.text = torch.cat([text_tokens, null])
        self.total = torch.zeros((), device=device)
        """Sum of all scores: finite where they all were."""

    def at(self, first: int, stop: int) -> slice | Int[Tensor, " q"]:
        """Raster positions of the places ``first`` to ``stop - 1``."""
        return slice(first, stop) if self.order is None else self.order[first:stop]

    def begin(self, *, window: int) -> None:
        """Read the prompts and the given tokens in front of the first place to draw.

        Args:
            window: most positions that ``scores`` will be asked for at once.
        """
        prefix = self.tokens[:: self.candidates, self.at(0, self.first)]
        prefix = torch.cat([prefix, prefix]) if self.guided else prefix
        self.state, ahead = self.decoder.start(self.text, self.candidates, prefix, window=window, order=self.order)
        self.ahead = ahead[:, None]

    def scores(self, first: int, count: int = 1) -> Float[Tensor, "r q k"]:
        """Guided scores of some places, given all tokens before each of them as they are now.

        Args:
            first: place; all tokens before it are final.
            count: places from there on, at most the window.
        """
        if self.guided and all(scale == 1 for scale in self.scales[first : self.last + 1]):
            self.guided, rows = False, len(self.tokens)
            self.ahead = self.ahead[:rows]
            self.state.keep_rows(rows, rows // self.candidates)
        read = self.tokens[:, self.at(max(first - 1, self.first), first + count - 1)]
        read = torch.cat([read, read]) if self.guided else read
        found = [self.ahead] if first == self.first else []
        if read.shape[1]:
            found.append(self.decoder.read(self.state, read, max(first - 1, self.first)))
        logits = torch.cat(found, dim=1) if len(found) > 1 else found[0]
        if self.guided:
            cond, uncond = logits.chunk(2)
            logits = guide(cond, uncond, self.scale_of[first : first + count, None])
        self.total += logits.sum()
        return logits

    def pick(self, scores: Float[Tensor, "r q k"], first: int) -> Int[Tensor, "r q"]:
        """Tokens of places from ``first`` on, drawn by their positions' random numbers; known ones as they are."""
        stop = first + scores.shape[1]
        some, known = self.at(first, stop), self.known[first:stop]
        picked = self.sampling.pick(scores.flatten(0, 1), self.uniforms[:, some].flatten()).view(scores.shape[:2])
        if known.any():
            picked = torch.where(known.to(picked.device), self.tokens[:, some], picked)
        return picked


def one_by_one(drawing: Drawing) -> Iterator[int]:
    """One place after the other (ancestral sampling)."""
    for place in range(drawing.first, drawing.last + 1):
        drawing.tokens[:, drawing.at(place, place + 1)] = drawing.pick(drawing.scores(place), place)
        yield place + 1


def speculative(drawing: Drawing) -> Iterator[int]:
    """Several positions a step, from guesses that are checked: the same tokens as in raster order, up to rounding.

    A token is a function of its scores and its random number. A step draws ``draft_tokens`` positions at once, as if
    the guesses before each were right. They are right up to the first one that differs from the token drawn in its
    place. That token is then known as well, and the tokens drawn after it are the next guesses. All rows advance
    together, so it pays for one image or few.

    Source:
        Jacobi iteration, Song et al. 2021, https://arxiv.org/abs/2002.03629; of image tokens, Teng et al. 2024,
        https://arxiv.org/abs/2410.01699. Theirs accepts a draft by chance; with a random number fixed for each position
        nothing is left to chance, and the distribution is untouched.
    """
    position, guessed, row = drawing.first, drawing.first, drawing.decoder.dalle.grid_size
    while position <= drawing.last:
        count = min(drawing.sampling.draft_tokens, drawing.last + 1 - position)
        for new in range(max(guessed, position), position + count):  # first guess: the token above
            if new >= row and not drawing.known[new]:
                drawing.tokens[:, new] = drawing.tokens[:, new - row]
        guessed = position + count
        drafts = drawing.tokens[:, position : position + count].clone()
        picked = drawing.pick(drawing.scores(position, count), position)
        drawing.tokens[:, position : position + count] = picked
        right = (picked == drafts).all(dim=0)[:-1].long().cumprod(dim=0).sum()
        position += 1 + int(right)
        yield position


class Strategy(NamedTuple):
    """A way to fill the positions of an image."""

    fill: Callable[[Drawing], Iterator[int]]
    """Draws; yields how many image tokens, from the first place on, are final."""
    window: Callable[[SamplingConfig], int] = lambda sampling: 1
    """Most positions that it asks for at once."""
    order: Callable[[SamplingConfig, Bool[Tensor, " n"]], Int[Tensor, " n"]] | None = None
    """The order, from the settings and which positions are known; None = the raster's."""


def random_order(sampling: SamplingConfig, known: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Known positions in front, then the others at random; the same for all images, by ``sampling.order_seed``."""
    draw = torch.rand(len(known), generator=torch.Generator().manual_seed(sampling.order_seed))
    return torch.where(known, -1.0, draw).argsort(stable=True)


STRATEGIES = {
    "raster": Strategy(one_by_one),
    "random": Strategy(one_by_one, order=random_order),
    "speculative": Strategy(speculative, window=lambda sampling: sampling.draft_tokens),
}
"""What ``SamplingConfig.strategy`` may name."""


def find_strategy(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        UserError: there is none; names those that there are.
    """
    if name not in STRATEGIES:
        raise UserError(f"sampling.strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name]


def check_strategy(sampling: SamplingConfig, dalle: TextToImage) -> None:
    """Refuse a strategy that there is not, and an order that a model has not learned.

    Raises:
        UserError: names it.
    """
    if find_strategy(sampling.strategy).order is not None and not dalle.any_order:
        raise UserError(
            f"sampling.strategy={sampling.strategy} draws in another order than the raster's, which this model has not "
            "learned: train one with model.any_order=true and random_order, or use strategy=raster"
        )


def draw_image_tokens(
    decoder: Decoder,
    text_tokens: Int[Tensor, "p t"],
    uniforms: Float[Tensor, "r n"],
    sampling: SamplingConfig,
    given: KnownTokens | None = None,
    null_tokens: Int[Tensor, "p t"] | None = None,
) -> Iterator[tuple[int, Int[Tensor, "r n"]]]:
    """Draw, and after each step give the number of final tokens and the tokens so far (always the same tensor).

    Closing the iterator early frees the cache; the tokens drawn until then stay valid. Arguments are those of
    ``Drawing``.

    Raises:
        UserError: shapes that do not fit, or scores that are not finite; names them.
    """
    check_strategy(sampling, decoder.dalle)
    strategy, count = find_strategy(sampling.strategy), decoder.dalle.num_image_tokens
    order = None
    if strategy.order is not None:
        order = strategy.order(sampling, torch.zeros(count, dtype=torch.bool) if given is None else given.keep.cpu())
    drawing = Drawing(decoder, text_tokens, uniforms, sampling, given, null_tokens, order)
    if drawing.first == count:
        yield count, drawing.tokens
        return
    drawing.begin(window=strategy.window(sampling))
    for done in strategy.fill(drawing):
        if done > drawing.last:
            if not drawing.total.isfinite():  # asked once: on a GPU every question waits for all that was launched
                raise UserError(NOT_FINITE)
            done = count
        yield done, drawing.tokens


NOT_FINITE = (
    "the model's scores are NaN or infinite: its weights are damaged, its training diverged, or it overflows in this "
    "precision (then use precision=fp32)"
)
AnyModel: TypeAlias = TextToImage | Decoder


def generate_image_tokens(
    model: AnyModel,
    text_tokens: Int[Tensor, "p t"],
    uniforms: Float[Tensor, "r n"],
    sampling: SamplingConfig,
    *,
    given_tokens: Int[Tensor, "p given"] | None = None,
) -> Int[Tensor, "r n"]:
    """Sample the image tokens of captions; inputs and model are left as they were.

    Args:
        model: a DALLE or DALLEBart, or the decoder of one where several calls follow.
        text_tokens: captions, 0 = padding.
        uniforms: a number in [0, 1) for every row and position; rows that share a caption lie together.
        sampling: temperature, truncation and guidance.
        given_tokens: the first tokens of each caption's images, kept as they are.

    Raises:
        UserError: shapes that do not fit, or scores that are not finite; names them.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    given = None
    if given_tokens is not None:
        decoder.dalle.check_image_tokens(given_tokens)
        count, some = decoder.dalle.num_image_tokens, given_tokens.shape[1]
        padded = torch.nn.functional.pad(given_tokens, (0, count - some))
        given = KnownTokens(padded, torch.arange(count, device=padded.device) < some)
    *_, (_, tokens) = draw_image_tokens(decoder, text_tokens, uniforms, sampling, given)
    return tokens
