"""The DiscreteVAE of lucidrains/DALLE-pytorch 1.6.6, alone in its ``vae.pt`` or inside a ``dalle.pt``.

Its layers are ours under other numbers. What a training of it would go on with is not in the files: loss, temperature
and weight of the KL are the defaults of its class, unless a script stored more.

Source: dalle_pytorch.py and train_vae.py of 1.6.6.
"""

from collections.abc import Mapping
from typing import Any

from dalle_pytorch.checkpoints.checkpoint import State
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.discrete_vae import DiscreteVAEConfig

VAE_SIGNATURE = frozenset({"codebook.weight", "encoder.0.0.weight"})

VAE_HPARAMS: dict[str, Any] = {
    "image_size": 256,
    "num_tokens": 512,
    "codebook_dim": 512,
    "num_layers": 3,
    "num_resnet_blocks": 0,
    "hidden_dim": 64,
    "channels": 3,
    "smooth_l1_loss": False,
    "temperature": 0.9,
    "straight_through": False,
    "reinmax": False,
    "kl_div_loss_weight": 0.0,
    "normalization": ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)),  # alpha, the fourth channel, stays as it is
}
"""Arguments of its DiscreteVAE and their defaults."""


def vae_from_state(weights: State, hparams: Mapping[str, Any]) -> tuple[DiscreteVAEConfig, State]:
    """Config and weights of its DiscreteVAE.

    Raises:
        ValueError: an unknown setting, or a weight left over; names it.
    """
    h = filled(hparams, VAE_HPARAMS, "DiscreteVAE")
    mean, std = h["normalization"] or ((0.0,), (1.0,))
    config = DiscreteVAEConfig(
        image_size=h["image_size"],
        num_layers=h["num_layers"],
        codebook_size=h["num_tokens"],
        codebook_dim=h["codebook_dim"],
        hidden_dim=h["hidden_dim"],
        num_resnet_blocks=h["num_resnet_blocks"],
        channels=h["channels"],
        likelihood="smooth_l1" if h["smooth_l1_loss"] else "mse",
        straight_through=h["straight_through"],
        reinmax=h["reinmax"],
        mean=[float(value) for value in mean[: h["channels"]]],
        std=[float(value) for value in std[: h["channels"]]],
        gumbel_tau=h["temperature"],
        kl_weight=float(h["kl_div_loss_weight"]),
    )
    return config, rename(weights, vae_table(config.num_layers, config.num_resnet_blocks))


def vae_table(layers: int, blocks: int) -> Table:
    """What becomes of the weights of its DiscreteVAE: layers lie in pairs there, one after the other here."""
    table: dict[str, str] = {r"codebook\.weight": "codebook.weight"}
    kind = r"(weight|bias)"

    def add(part: str, source: str, target: int) -> None:
        table[rf"{part}\.{source}\.{kind}"] = rf"{part}.{target}.\1"

    def add_block(part: str, source: int, target: int) -> None:
        table[rf"{part}\.{source}\.net\.([02])\.{kind}"] = rf"{part}.{target}.net.\1.\2"
        table[rf"{part}\.{source}\.net\.4\.{kind}"] = rf"{part}.{target}.last.\1"

    before = 1 + blocks if blocks else 0  # a convolution and the blocks stand before the decoder's upsampling
    if blocks:
        add("decoder", "0", 0)
    for block in range(blocks):
        add_block("encoder", layers + block, 2 * layers + block)
        add_block("decoder", 1 + block, 1 + block)
    for layer in range(layers):
        add("encoder", rf"{layer}\.0", 2 * layer)
        add("decoder", rf"{before + layer}\.0", before + 2 * layer)
    add("encoder", f"{layers + blocks}", 2 * layers + blocks)
    add("decoder", f"{before + layers}", before + 2 * layers)
    return table


def filled(hparams: Mapping[str, Any], defaults: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Its arguments with its defaults.

    Raises:
        ValueError: an argument that 1.6.6 does not take.
    """
    if unknown := sorted(hparams.keys() - defaults.keys()):
        raise UserError(f"hparams has {', '.join(unknown)}, which {kind} of DALLE-pytorch 1.6.6 does not take")
    return {**defaults, **hparams}
