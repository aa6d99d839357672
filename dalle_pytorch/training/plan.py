"""What a DALLE training would cost, worked out without allocating the model: ``train_dalle.py plan=true``.

Parameters are counted on a model without memory (torch's meta device). What a step keeps for its backward pass is found
by running the transformer on tensors without memory, and adding up what autograd saves.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.checkpoint import Header
from dalle_pytorch.checkpoints.loading import read_header
from dalle_pytorch.checkpoints.text_encoder import load_text_encoder
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.attention import Attention
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.models.linear import Linear
from dalle_pytorch.models.loss import ROWS
from dalle_pytorch.models.patterns import pattern_mask
from dalle_pytorch.models.text_encoder import TextEncoder
from dalle_pytorch.models.transformer import FeedForward, Transformer
from dalle_pytorch.text import text_tokenizer_from_state
from dalle_pytorch.training.strategies import is_sharded
from dalle_pytorch.training.text import TextConfig, load_tokenizer

GB = 1e9


@dataclass(kw_only=True)
class HardwareConfig:
    """The machines that a plan is for, and the pictures where no vae= is given."""

    gpus: int = 8
    """GPUs in all."""
    memory_gb: float = 80.0
    """Memory of each."""
    reserve_gb: float = 4.0
    """Of it, for CUDA itself and for fragmentation."""
    tflops: float = 989.0
    """Highest rate of bfloat16 products, 10^12 a second (H100 SXM: 989, A100: 312, V100 in float16: 125)."""
    utilisation: float = 0.4
    """Part of it that a training reaches, in (0, 1]."""
    image_size: int = 256
    """Side of the pictures in pixels."""
    grid_size: int = 32
    """Token rows = columns."""
    codebook_size: int = 8192
    """Image tokens there are."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        for name in ("gpus", "memory_gb", "tflops", "image_size", "grid_size", "codebook_size"):
            if getattr(self, name) <= 0:
                raise UserError(f"hardware.{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"hardware.utilisation must lie in (0, 1], got {self.utilisation}")


class Sizes(ImageTokenizer):
    """An image tokenizer of which nothing but the sizes is known."""

    def __init__(self, image_size: int, grid_size: int, codebook_size: int) -> None:
        super().__init__()
        self.image_size, self.grid_size, self.codebook_size, self.channels = image_size, grid_size, codebook_size, 3

    def encode(self, images: Tensor) -> Tensor:
        """Not to be called."""
        raise NotImplementedError

    def decode(self, image_tokens: Tensor) -> Tensor:
        """Not to be called."""
        raise NotImplementedError


class Memory(NamedTuple):
    """Bytes of one GPU at the largest moment of a step."""

    weights: float
    gradients: float
    optimiser: float
    """Moments, and averaged weights."""
    activations: float
    working: float
    """Weights in 16 bits or gathered from other GPUs, logits and their gradients."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def skeleton(
    config: DALLEConfig, vae: str | Header | None, hardware: HardwareConfig, text_encoder: TextEncoder | None = None
) -> DALLE:
    """The model on the meta device: names, shapes, no memory; its image tokenizer from a file, a header or hardware."""
    head = read_header(vae, kind="vae") if isinstance(vae, str) else vae
    with torch.device("meta"):
        sizes: nn.Module = (
            Sizes(hardware.image_size, hardware.grid_size, hardware.codebook_size)
            if head is None
            else checkpoint.build(head)
        )
        return DALLE(config, vae=sizes, text_encoder=text_encoder)


def parameters(net: DALLE) -> dict[str, int]:
    """Weights by part."""
    parts = {
        "attention": [p for m in net.modules() if isinstance(m, Attention) for p in m.parameters()],
        "feed-forward": [p for m in net.modules() if isinstance(m, FeedForward) for p in m.parameters()],
        "text encoder (frozen)": [] if net.text_encoder is None else list(net.text_encoder.parameters()),
        "embeddings": [p for m in net.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
        + [p for p in [net.bos, *net.text_proj.parameters()] if p is not None],
        "heads": [p for head in heads_of(net) for p in head.parameters()],
        "image tokenizer (frozen)": list(net.vae.parameters()),
    }
    counted: set[int] = set()
    counts = {}
    for name, weights in parts.items():
        new = {id(p): p.numel() for p in weights if id(p) not in counted}
        counted |= new.keys()
        counts[name] = sum(new.values())
    counts["norms"] = sum(p.numel() for p in net.parameters() if id(p) not in counted)
    return counts


def heads_of(net: DALLE) -> list[Linear]:
    """Its output heads."""
    return [head for head in (net.text_head, net.image_head) if head is not None]


def flops(net: DALLE) -> tuple[float, float]:
    """Multiplications and additions of a training step for one picture: of blocks, and of heads.

    Forward and twice as much backward; of attention only the pairs that its pattern shows.
    """
    config, text_length = net.config, net.config.text_length
    length = text_length + net.num_image_tokens - 1
    pairs = {
        pattern: int(
            pattern_mask(
                pattern, text_length, net.grid_size, semantics=config.foreign.attn_semantics, kernel=config.conv_kernel
            )[:length, :length].sum()
        )
        for pattern in net.patterns
    }
    attention = sum(4 * config.heads * config.head_dim * pairs[net.pattern(layer)] for layer in range(config.depth))
    text = 0 if net.text_head is None else net.text_head.weight.numel()
    image = net.image_head.weight.numel()
    # under wrong captions everything but the text head once more; the image head of the contrast for itself, twice
    heads = 2 * (text * (text_length - 1) + (3 if config.contrast_weight else 1) * image * net.num_image_tokens)
    blocks = 3.0 * captions_each(net) * (2 * matrices(net) * length + attention)
    if net.text_encoder is not None:  # only forward, over the text alone
        blocks += captions_each(net) * 2.0 * config.text_len * encoder_matrices(net.text_encoder)
    return blocks, 3.0 * heads


def encoder_matrices(text_encoder: nn.Module) -> int:
    """Weights of a text encoder that products read."""
    tables = {id(m.weight) for m in text_encoder.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in text_encoder.parameters() if p.ndim == 2 and id(p) not in tables)


def captions_each(net: DALLE) -> int:
    """Captions that a picture is looked at under in one step: its own, and with contrast a wrong one."""
    return 2 if net.config.contrast_weight else 1


@functools.lru_cache(maxsize=1)  # the ways of training that a plan compares keep the same
def saved(net: DALLE, batch: int, *, half: bool) -> tuple[int, int]:
    """Bytes that the blocks keep for the backward pass, of all and of the most demanding one; weights apart.

    Found by running one and two blocks of each pattern on tensors without memory.

    Args:
        net: its sizes are taken.
        batch: pictures.
        half: under bfloat16 autocast.
    """
    runs = {pattern: [_kept(net, [pattern] * depth, batch, half) for depth in (1, 2)] for pattern in net.patterns}
    blocks = [runs[net.pattern(layer)][1] - runs[net.pattern(layer)][0] for layer in range(net.config.depth)]
    rest = runs[net.pattern(0)][0] - blocks[0]  # the last norm
    return sum(blocks) + rest, max(blocks)


def _kept(net: DALLE, patterns: list[str], batch: int, half: bool) -> int:
    """Bytes that a few blocks keep, weights and their casts apart."""
    config = dataclasses.replace(
        net.config, depth=len(patterns), attn_types=patterns, checkpoint_activations=False,
        shared_attn_ids=None, shared_ff_ids=None,
    )  # fmt: skip
    real = [net.views()[next(i for i in range(net.config.depth) if net.pattern(i) == name)] for name in patterns]
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # or an address might be taken twice
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = Transformer(config).train()
        shapes = {tuple(p.shape) for p in transformer.parameters() if p.ndim == 2}
        weights = {p.untyped_storage()._cdata for p in transformer.parameters()}

        def keep(value: Tensor) -> Tensor:
            storage, shape = value.untyped_storage(), tuple(value.shape)
            cast = value.dtype == torch.bfloat16 and (shape in shapes or shape[::-1] in shapes)
            if storage._cdata not in weights and not cast:
                storages[storage._cdata] = storage.nbytes()
            alive.append(value)
            return value

        # the model's tables may be on the meta device; only their shapes matter
        like = lambda table: None if table is None else torch.empty(table.shape, dtype=table.dtype)  # noqa: E731
        views = [dataclasses.replace(view, mask=like(view.mask), turns=like(view.turns)) for view in real]
        x = torch.empty(batch, config.text_length - 1 + net.num_image_tokens, config.dim, requires_grad=True)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast:
            transformer(x, views)
    return sum(storages.values())


def matrices(net: DALLE) -> int:
    """Weights of the blocks that products read."""
    return sum(p.numel() for p in net.transformer.parameters() if p.ndim == 2)


def memory(
    net: DALLE,
    batch: int,
    *,
    gpus: int,
    sharded: bool,
    half: bool,
    checkpointing: bool,
    averaged: bool,
    moments: int = 8,
) -> Memory:
    """Bytes of one GPU.

    Args:
        net: the model.
        batch: pictures of one GPU at a time.
        gpus: that share the weights, if ``sharded``.
        sharded: FSDP2: weights, gradients and optimiser cut among the GPUs.
        half: bfloat16 products.
        checkpointing: blocks computed again in the backward pass.
        averaged: with averaged weights.
        moments: bytes of the optimiser for each weight.
    """
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters()) - trained
    share = gpus if sharded else 1
    config, length = net.config, net.config.text_length - 1 + net.num_image_tokens
    batch *= captions_each(net)
    activations, largest = saved(net, batch, half=half)
    copies = 2 * matrices(net) if half else 0
    if checkpointing:  # the input of every block, and one block at a time
        streams = 2 if config.foreign.reversible else 1
        activations = 4 * batch * length * streams * config.dim * config.depth + largest
    if sharded:  # the weights of two blocks, and of what is no block, gathered; in 16 bits, or as they are
        block = sum(p.numel() for p in net.transformer.blocks[0].parameters())
        rest = trained - sum(p.numel() for p in net.transformer.blocks.parameters())
        copies = (2 * block + rest) * (2 if half else 4)
    heads = sum(p.numel() for head in heads_of(net) for p in head.parameters())
    widest = max(head.out_features for head in heads_of(net))
    # the loss: inputs of the heads and their gradients, the heads' gradients, one chunk of logits thrice
    loss = 4 * (2 * batch * length * config.dim + heads + 3 * ROWS * widest)
    return Memory(
        weights=4 * trained / share + 4 * frozen,
        gradients=4 * trained / share,
        optimiser=(moments + 4 * averaged) * trained / share,
        activations=activations,
        working=copies + loss,
    )


def cache_bytes(net: DALLE) -> int:
    """Keys and values of one candidate in sampling, fp32, where every layer kept all image tokens."""
    return 2 * 4 * net.config.depth * net.key_width * net.num_image_tokens


def make_plan(config: Any) -> str:
    """The plan as text.

    Args:
        config: TrainDALLEConfig.

    Raises:
        ValueError: the training does not fit on the GPUs; says what it needs, and what would help.
    """
    hardware, section = config.hardware, config.trainer
    if config.schema != "dalle":
        raise UserError("plan=true counts the DALLE only, not a DALL·E mini")
    if config.init is None:
        encoder, vocab_size = None, vocabulary(config.text)
        if config.text_encoder is not None:
            encoder, tokenizer = load_text_encoder(config.text_encoder)
            vocab_size = tokenizer.vocab_size
        width = 0 if encoder is None else encoder.config.width
        model = dataclasses.replace(config.model, text_vocab_size=vocab_size, text_features=width)
        net = skeleton(model, config.vae, hardware, encoder)
    else:
        head = read_header(config.init)
        stored = head.get("text_encoder")
        net = skeleton(config.model, head["vae"], hardware, None if stored is None else checkpoint.build(stored))
    batch = config.data.batch_size
    if batch % hardware.gpus:
        raise UserError(f"data.batch_size ({batch}) must be a multiple of hardware.gpus ({hardware.gpus})")
    each = config.data.micro_batch_size or batch // hardware.gpus
    half = "bf16" in str(section.get("precision")) or "16" in str(section.get("precision"))
    settings: dict[str, Any] = {"gpus": hardware.gpus, "half": half, "averaged": bool(config.callbacks.ema_decay)}
    settings["moments"] = {"adamw": 8, "muon": 4, "adamw8bit": 2}[config.optim.kind]
    rows = []
    for sharded in (False, True):
        for checkpointing in (False, True):
            name = ("fsdp" if sharded else "ddp") + (" + checkpoint_activations" if checkpointing else "")
            # sharded weights cannot be averaged
            averaged = settings["averaged"] and not sharded
            need = memory(net, each, sharded=sharded, checkpointing=checkpointing, **{**settings, "averaged": averaged})
            rows.append((name, need))
    chosen = (
        "fsdp" if is_sharded(section) else "ddp"
    ) + " + checkpoint_activations" * config.model.checkpoint_activations
    text = "\n".join([*_sizes(net), *_arithmetic(net, config, batch), *_table(rows, hardware, each, chosen)])
    need, room = dict(rows)[chosen].total / GB, hardware.memory_gb - hardware.reserve_gb
    if need > room:
        fitting = [name for name, other in rows if other.total / GB <= room]
        mends = [f"the strategies that fit are {', '.join(fitting)}"] * bool(fitting) + _smaller(
            dict(rows)[chosen], room, each
        )
        raise UserError(
            f"{text}\n\n{chosen} needs {need:.1f} GB on each GPU, which has {room:.1f} GB free; "
            + ("; ".join(mends) or "it takes more hardware.gpus, and trainer=fsdp")
        )
    return text


def _smaller(need: Memory, room: float, each: int) -> list[str]:
    """The same step in smaller parts, if that would fit."""
    parts = 2
    while each % parts == 0:
        if (need.total - need.activations * (1 - 1 / parts)) / GB <= room:
            return [f"data.micro_batch_size={each // parts} fits, the same step in smaller parts"]
        parts *= 2
    return []


def vocabulary(text: TextConfig) -> int:
    """Text ids of a training with these settings; of an own BPE the most that it may have."""
    if text.tokenizer_from is not None:
        return text_tokenizer_from_state(read_header(text.tokenizer_from)["text_tokenizer"]).vocab_size
    if text.tokenizer == "bpe":
        return text.vocab_size
    return load_tokenizer(text).vocab_size


def _sizes(net: DALLE) -> list[str]:
    counts = parameters(net)
    total = sum(counts.values())
    lines = [f"parameters: {total:,} ({total / 1e9:.2f} billion)"]
    lines += [f"  {name:<26}{count:>16,}" for name, count in counts.items() if count]
    patterns = [net.pattern(layer) for layer in range(net.config.depth)]
    mix = ", ".join(f"{patterns.count(name)} {name}" for name in net.patterns)
    lines.append(f"layers: {net.config.depth} ({mix}), {net.config.heads} heads of {net.config.head_dim}")
    lines.append(f"stream: {net.config.text_len} text and {net.num_image_tokens} image tokens")
    return lines


def _arithmetic(net: DALLE, config: Any, batch: int) -> list[str]:
    hardware, tokens = config.hardware, net.config.text_len + net.num_image_tokens
    picture = sum(flops(net))
    rate = hardware.gpus * hardware.tflops * 1e12 * hardware.utilisation / picture  # pictures a second
    steps = config.trainer.get("max_steps", -1)
    lines = [
        f"arithmetic: {picture / tokens / 1e9:.2f} GFLOP a token, {picture * batch / 1e12:,.4g} TFLOP a step of "
        f"{batch:,} pictures",
        f"speed on {hardware.gpus} GPUs of {hardware.tflops:g} TFLOP/s at {hardware.utilisation:.0%}: "
        f"{rate:,.1f} pictures/s, {rate * tokens * 86400 / 1e9:,.2f} billion tokens a day",
    ]
    if steps > 0:
        days = steps * batch / rate / 86400
        lines.append(f"training: {steps:,} steps = {steps * batch / 1e6:,.1f} million pictures, {days:,.1f} days")
    lines.append(f"sampling: at most {cache_bytes(net) / 1e6:,.1f} MB of keys and values for each candidate, in fp32")
    return lines


def _table(rows: list[tuple[str, Memory]], hardware: HardwareConfig, each: int, chosen: str) -> list[str]:
    names = [*Memory._fields, "total"]
    lines = [f"GB on each GPU of {hardware.memory_gb:g}, {each} pictures at a time:"]
    lines.append(f"  {'':<32}" + "".join(f"{name:>13}" for name in names))
    for name, need in rows:
        values = "".join(f"{value / GB:>13.2f}" for value in (*need, need.total))
        fits = "" if need.total / GB <= hardware.memory_gb - hardware.reserve_gb else "  does not fit"
        lines.append(f"{'* ' if name == chosen else '  '}{name:<32}{values}{fits}")
    return lines
