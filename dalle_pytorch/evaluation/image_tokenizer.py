"""An image tokenizer in numbers: what its tokens keep of pictures, how it uses its codes, what JPEG does with as much.

Axes: b pictures, c channels, H W pixels.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.evaluation.codebook import codebook_use
from dalle_pytorch.evaluation.codecs import CODECS, Coded, at_bytes
from dalle_pytorch.evaluation.features import Extractor, lpips_each, lpips_extractor
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Gallery, Section, Table
from dalle_pytorch.evaluation.reconstruction import (
    SCALES,
    WINDOW,
    l1_each,
    ms_ssim_each,
    ms_ssim_scales,
    psnr_each,
    ssim_each,
)
from dalle_pytorch.evaluation.report import Metrics, Protocol, shown
from dalle_pytorch.evaluation.shares import in_parts
from dalle_pytorch.generation.grid import GridRow
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.models.mode import eval_mode

TOGETHER = 32
"""Pictures in one call of the tokenizer; no number depends on it."""
SHOWN = 8
"""Best and worst pictures on the page, each."""


def reconstruct(
    vae: ImageTokenizer, images: Float[Tensor, "b c H W"]
) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b c H W"]]:
    """Tokens of pictures and the pictures of these tokens, in [0, 1], on the CPU."""
    device = next(vae.parameters()).device

    def both(part: Tensor) -> tuple[Tensor, Tensor]:
        tokens = vae.encode(part.to(device))
        return tokens.cpu(), vae.decode(tokens).float().clamp(0, 1).cpu()

    with eval_mode(vae):
        parts = in_parts(both, images.split(TOGETHER))
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([decoded for _, decoded in parts])


def evaluate_image_tokenizer(
    vae: ImageTokenizer,
    images: Float[Tensor, "b c H W"],
    measure: Measure,
    *,
    lpips: Sequence[LPIPS] = (),
    extractors: Sequence[Extractor] = (),
    codecs: Sequence[str] = CODECS,
    reconstructed: tuple[Int[Tensor, "b n"], Float[Tensor, "b c H W"]] | None = None,
) -> Evaluation:
    """All numbers of an image tokenizer, and a grid of its best and worst reconstructions.

    Args:
        vae: the tokenizer.
        images: pictures that it was not trained on, in [0, 1], of its size; two at least.
        measure: the protocol.
        lpips: for lpips_vgg and lpips_alex.
        extractors: for the distance between originals and reconstructions: rfid, rfid_clip, rfid_mobilenet, ...
        codecs: which to set beside it, of "JPEG" and "WEBP"; needs RGB.
        reconstructed: what ``reconstruct`` gave for them; None = done here.

    Raises:
        ValueError: pictures of another size, or too few.
    """
    tokens, decoded = reconstruct(vae, images) if reconstructed is None else reconstructed
    metrics = near(decoded, images, measure)
    for net in lpips:
        each = lpips_each(net, decoded, images)
        metrics[f"lpips_{net.name}"] = measure.mean(each, better="lower", extractor=lpips_extractor(net))
    for extractor in extractors:
        if len(images) > 3:
            metrics |= measure.distances(extractor(images), extractor(decoded), extractor, paired=True)
    use = codebook_use(tokens, vae.codebook_size, vae.image_size)
    for name, value, unit in (
        ("codebook_used", use.used, "codes"),
        ("codebook_dead", use.dead, "codes"),
        ("codebook_perplexity", use.perplexity, "codes"),
        ("bits_per_pixel", use.bits_per_pixel, "bits/pixel"),
        ("entropy_bits_per_pixel", use.entropy_bits_per_pixel, "bits/pixel"),
    ):
        metrics[name] = measure.number(float(value), len(images), unit=unit, better="neither")
    rivals = {}
    for codec in codecs if images.shape[1] == 3 else ():
        rivals[codec] = at_bytes(images, codec, use.bytes_per_picture)
        name, budget = codec.lower(), round(use.bytes_per_picture, 2)
        for key, metric in near(rivals[codec].images, images, measure, {"budget": budget}).items():
            metrics[f"{name}_{key}"] = metric
        sizes = rivals[codec].file_bytes
        metrics[f"{name}_bytes"] = measure.mean(sizes, unit="bytes", better="lower", how={"budget": budget})
    return Evaluation(metrics, sections(images, decoded, use.bytes_per_picture, rivals, metrics))


def near(
    decoded: Float[Tensor, "b c H W"],
    images: Float[Tensor, "b c H W"],
    measure: Measure,
    how: Protocol = MappingProxyType({}),
) -> Metrics:
    """PSNR, L1, SSIM and MS-SSIM, as far as the pictures are large enough."""
    side = min(images.shape[2:])
    found = {
        "psnr": measure.mean(psnr_each(decoded, images), unit="dB", how={**how, "of": "mean over pictures"}),
        "l1": measure.mean(l1_each(decoded, images), better="lower", how=how),
    }
    if side >= WINDOW:
        found["ssim"] = measure.mean(ssim_each(decoded, images), how={**how, "window": f"gauss {WINDOW}"})
    if (scales := ms_ssim_scales(side)) > 1:
        name = "ms_ssim" if scales == len(SCALES) else f"ms_ssim_{scales}_scales"
        found[name] = measure.mean(ms_ssim_each(decoded, images, scales=scales), how={**how, "scales": scales})
    return found


def sections(
    images: Float[Tensor, "b c H W"],
    decoded: Float[Tensor, "b c H W"],
    budget: float,
    rivals: dict[str, Coded],
    metrics: Metrics,
) -> list[Section]:
    """The table of codecs, and the pictures it keeps best and worst."""
    found: list[Section] = []
    kinds = [key for key in metrics if f"jpeg_{key}" in metrics or f"webp_{key}" in metrics]
    if rivals:
        rows: list[tuple[str, ...]] = [("image tokens", shown(budget), *[shown(metrics[key].value) for key in kinds])]
        for codec in rivals:
            of = codec.lower()
            rows.append((codec, *[shown(metrics[f"{of}_{key}"].value) for key in ("bytes", *kinds)]))
        note = (
            "Each picture in the best file of at most as many bytes as its tokens take, over sizes and qualities; "
            "where no file is so small, in the smallest, and the bytes say so. A file's header counts, the decoder not."
        )
        found.append(Table("Beside JPEG and WebP", note, ("", "bytes a picture", *kinds), rows))
    each = psnr_each(decoded, images)
    order = each.argsort(descending=True)
    shown_count = min(SHOWN, len(images) // 2)
    for title, places in (("Best", order[:shown_count]), ("Worst", order.flip(0)[:shown_count])):
        grid = [
            GridRow("original", list(images[places]), []),
            GridRow(
                f"from its image tokens, {budget:.0f} bytes",
                list(decoded[places]),
                [f"{each[i]:.1f} dB" for i in places.tolist()],
            ),
        ]
        grid += [
            GridRow(f"{codec}, {coded.file_bytes.mean():.0f} bytes", list(coded.images[places]), [])
            for codec, coded in rivals.items()
        ]
        found.append(Gallery(f"{title} reconstructions", f"By PSNR, of {len(images)} pictures.", grid))
    return [*found[-2:], *found[:-2]]
