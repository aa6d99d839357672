"""How fast OpenAI's dVAE encodes and decodes: ours in fp32 and bf16, against the package ``dall-e`` and the machine.

    pip install --no-deps --target dall_e_only dall-e==0.1 attrs
    PYTHONPATH=dall_e_only python benchmarks/codec.py         # without the package: ours alone
    PYTHONPATH=dall_e_only python benchmarks/codec.py --sizes 64 128 --batches 1
    python benchmarks/codec.py --server                       # instead: the server's routes beside the bare network

The full network with random weights, in our bf16 with rounded ones; the package knows fp32 only on a CPU. All take
turns in one process, and the fastest run of each counts. Encoding is from pictures to codes, decoding from codes to
pictures, which for the package includes their one-hot vectors. GFLOP/s are of the products that ours computes: in
decoding a sixth less than the package. Ratios matter, not times. Prints Markdown.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from PIL import Image
from sampling import ceilings
from torch import Tensor, nn

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.importers.openai_dvae import convert
from dalle_pytorch.models.openai_dvae import Conv2d, OpenAIDVAE, OpenAIDVAEConfig

PORT = 8766
SEED = {64: "3.56", 128: "1.95", 256: "0.70", 512: "0.19"}
"""What the README of dall-e-encoder-decoder-server says of a CPU."""
Codec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""What encodes and what decodes."""


def make_peer() -> dict[str, nn.Module] | None:
    """The package's encoder and decoder with random weights; None if it is not there."""
    sys.modules.setdefault("requests", types.ModuleType("requests"))  # only its downloads want it
    try:
        from dall_e import Decoder, Encoder
    except ImportError as error:
        print(f"without the package dall-e ({error}): pip install --no-deps --target dall_e_only dall-e==0.1 attrs\n")
        return None
    parts = {"encoder": Encoder().eval(), "decoder": Decoder().eval()}
    for part in parts.values():
        for parameter in part.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.1)
    # fresh weights make nearly the same code everywhere, and the same pixels of any code
    for conv in (parts["encoder"].blocks.input, parts["encoder"].blocks.output.conv):
        conv.w.sub_(conv.w.mean(dim=(1, 2, 3), keepdim=True)).mul_(4)
    parts["decoder"].blocks.input.w.mul_(64)
    return parts


def peer_codec(parts: dict[str, nn.Module]) -> Codec:
    """As the package's notebook uses it."""
    from dall_e import map_pixels, unmap_pixels

    encoder, decoder = parts["encoder"], parts["decoder"]

    def encode(images: Tensor) -> Tensor:
        return encoder(map_pixels(images)).argmax(dim=1).flatten(1)

    def decode(tokens: Tensor) -> Tensor:
        side = int(tokens.shape[1] ** 0.5)
        one_hot = F.one_hot(tokens.view(-1, side, side), decoder.vocab_size).permute(0, 3, 1, 2).float()
        return unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))

    return encode, decode


def make_ours(parts: dict[str, nn.Module] | None) -> OpenAIDVAE:
    """Our network: the package's weights by way of its files, or random ones."""
    if parts is None:
        return OpenAIDVAE(OpenAIDVAEConfig()).eval()
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            torch.save(part, Path(folder) / f"{name}.pkl")
        return checkpoint.assemble(*convert(Path(folder)), Path(folder))


def resized(vae: OpenAIDVAE, size: int) -> OpenAIDVAE:
    """A copy of a network for pictures of another size, which lays out its weights for that."""
    vae = copy.deepcopy(vae)
    vae.image_size, vae.grid_size = size, size // 8
    return vae


def products(size: int) -> tuple[float, float]:
    """GFLOP of the convolutions that encode and that decode one picture."""
    total = 0.0

    def count(conv: Conv2d, _: object, out: Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * conv.weight[0].numel() / 1e9

    with torch.device("meta"):
        vae = OpenAIDVAE(OpenAIDVAEConfig())
        for module in vae.modules():
            if isinstance(module, Conv2d):
                module.register_forward_hook(count)
        vae.encoder(torch.empty(1, 3, size, size))
        encoding = total
        vae.decoder(torch.zeros(1, size // 8, size // 8, dtype=torch.long))
    return encoding, total - encoding


def in_turns(runs: dict[str, Callable[[], Tensor]], seconds: float) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Seconds of the fastest run of each, after one to warm up, and what that one gave.

    Args:
        runs: what takes turns.
        seconds: about how long in all; two rounds at least.
    """
    given = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    while min(map(len, times.values())) < 2 or sum(map(sum, times.values())) < seconds:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: min(taken) for name, taken in times.items()}, given


def likeness(given: dict[str, Tensor], name: str) -> str:
    """How near a result is to the package's: the part of codes that are the same, or the largest pixel difference."""
    if "dall-e" not in given:
        return "-"
    own, peer = given[name], given["dall-e"]
    return f"{(own - peer).abs().max():.0e}" if own.is_floating_point() else f"{(own == peer).float().mean():.2%}"


def row(codecs: dict[str, Codec], size: int, batch: int, decodes: bool, limits: dict[str, float], span: float) -> str:
    """One line of the table."""
    # patches and noise: other codes at every place
    patches = torch.rand(batch, 3, size // 8, size // 8)
    images = (F.interpolate(patches, scale_factor=8) + torch.rand(batch, 3, size, size)) / 2
    data = torch.randint(0, 8192, (batch, (size // 8) ** 2)) if decodes else images
    seconds, given = in_turns({name: lambda c=codec: c[decodes](data) for name, codec in codecs.items()}, span)
    work, peer = batch * products(size)[decodes], seconds.get("dall-e")
    cells = ["decode" if decodes else "encode", f"{size}", f"{batch}", f"{peer * 1e3:.0f}" if peer else "-"]
    for name in ("fp32", "bf16"):
        speed, ratio = work / seconds[name], f"{peer / seconds[name]:.2f}" if peer else "-"
        share = f"{speed:.0f}, {speed / limits[name]:.0%}"
        cells += [f"{seconds[name] * 1e3:.0f}", ratio, share, likeness(given, name)]
    return f"| {' | '.join(cells)} |"


def upload(url: str, picture: bytes) -> bytes:
    """Send a picture as a form does; the answer."""
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + picture + b"\r\n--x--\r\n"
    with urlopen(Request(url, body, {"Content-Type": "multipart/form-data; boundary=x"}), timeout=120) as answer:
        return answer.read()


def post_json(url: str, body: bytes) -> bytes:
    """Send JSON; the answer."""
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=120) as answer:
        return answer.read()


def images_a_second(seconds: float, run: Callable[..., object], *arguments: object) -> float:
    """How often something runs in a second, after one run to warm up."""
    run(*arguments)
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        run(*arguments)
        count += 1
    return count / (time.perf_counter() - start)


def against_server(vae: OpenAIDVAE, sizes: list[int], seconds: float) -> None:
    """Print how fast a server encodes and decodes, one request after the other, beside the bare network."""
    picture, patches = io.BytesIO(), torch.rand(1, 3, 80, 80)
    pixels = (F.interpolate(patches, scale_factor=8)[0] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(picture, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(vae, Path(folder) / "vae.safetensors")
        command = [sys.executable, "-m", "dalle_pytorch.commands.serve", f"port={PORT}", f"library={folder}/library"]
        server = subprocess.Popen([*command, f"vae={folder}/vae.safetensors"], stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{PORT}"
        try:
            for _ in range(240):
                with contextlib.suppress(OSError):
                    urlopen(f"{url}/readyz", timeout=5)
                    break
                time.sleep(0.5)
            print("| images a second | encode: bare | HTTP | share | seed, its CPU | decode: bare | HTTP | share |")
            print("|---" * 8 + "|")
            rate = functools.partial(images_a_second, seconds)
            for size in sizes:
                own, data = resized(vae, size), picture.getvalue()
                images = torch.rand(1, 3, size, size)
                grid = json.loads(upload(f"{url}/encode/{size}", data))
                tokens, body = torch.tensor(grid).flatten(1), json.dumps(grid).encode()
                bare = [rate(own.encode, images), rate(own.decode, tokens)]
                served = [rate(upload, f"{url}/encode/{size}", data), rate(post_json, f"{url}/decode", body)]
                cells = [f"{size}", *(f"{speed:.2f}" for speed in (bare[0], served[0])), f"{served[0] / bare[0]:.0%}"]
                cells += [SEED.get(size, "-"), f"{bare[1]:.2f}", f"{served[1]:.2f}", f"{served[1] / bare[1]:.0%}"]
                print(f"| {' | '.join(cells)} |", flush=True)
        finally:
            server.terminate()
            server.wait(20)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256, 512], help="sides in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=10, help="for each line; two rounds at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--server", action="store_true", help="the server's routes beside the bare network")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if settings.server:
        against_server(make_ours(None), settings.sizes, settings.seconds)
        return
    limits, parts = ceilings(), make_peer()
    ours = {"fp32": make_ours(parts)}
    ours["bf16"] = copy.deepcopy(ours["fp32"]).bfloat16()
    print(
        f"torch {torch.__version__}, {settings.threads} threads; ceilings: {limits['fp32']:.0f} GFLOP/s in fp32, "
        f"{limits['bf16']:.0f} in bf16\n"
    )
    group = "{0}, ms | x dall-e | GFLOP/s, of ceiling | codes alike, or pixels' difference"
    print(f"| | pixels | batch | dall-e, ms | {group.format('fp32')} | {group.format('bf16')} |")
    print("|---" * 12 + "|")
    for size in settings.sizes:
        sized = {name: resized(vae, size) for name, vae in ours.items()}
        codecs = {"dall-e": peer_codec(parts)} if parts else {}
        codecs |= {name: (vae.encode, vae.decode) for name, vae in sized.items()}
        for batch in settings.batches:
            for decodes in (False, True):
                print(row(codecs, size, batch, decodes, limits, settings.seconds), flush=True)


if __name__ == "__main__":
    main()
