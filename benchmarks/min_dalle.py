"""DALL·E mini beside min-dalle 0.4.11: seconds a call, image tokens, peak memory; random weights of the real sizes.

    python benchmarks/min_dalle.py --peer peer/bin/python     # peer.py says how to make such an interpreter

Both programs read the same files, written to a temporary folder in min-dalle's format (fp16), and draw the same prompt
with the same seed; a call is from the text to pictures in memory, detokenizer included. Each measurement is a process
of its own, since min-dalle changes global settings and memory is counted by process, and has one call more than
``--calls``, the first, which warms up and does not count; the two take turns, and the fastest call of each counts. The
VQGAN that makes the pictures computes in bf16 in the rows of bf16 and int8, else in fp32. Ratios matter, not times.
Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

PROMPT = "a red apple on a table"
MODES = ["fp32", "bf16", "int8"]
DETOKENIZERS = {"fp32": torch.float32, "fp16": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
"""Arithmetic of the VQGAN in each of our rows."""


def stub_network() -> None:
    """min-dalle asks the hub for a file at every start; there need not be a network here."""
    requests = types.ModuleType("requests")
    requests.get = lambda url: None
    sys.modules["requests"] = requests


def write_weights(folder: Path) -> None:
    """Files of DALL·E mini's sizes, from min-dalle's own modules; runs in a process of the peer."""
    stub_network()
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder, VQGanDetokenizer

    torch.manual_seed(0)
    sizes = {"embed_count": 1024, "attention_head_count": 16, "glu_embed_count": 2730, "layer_count": 12}
    encoder = DalleBartEncoder(text_vocab_count=50264, text_token_count=64, device="cpu", **sizes)
    decoder = DalleBartDecoder(image_vocab_count=16384, device="cpu", **sizes)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        state = {
            key: tensor.half()
            for key, tensor in module.state_dict().items()
            if not key.endswith(("pre_self_attn_layer_norm.weight", "pre_encoder_attn_layer_norm.weight"))
            and not key.endswith(("glu.ln0.weight", "glu.ln1.weight", "final_ln.weight"))
        }
        (folder / "dalle_bart_mini").mkdir(exist_ok=True)
        torch.save(state, folder / "dalle_bart_mini" / f"{name}.pt")
    (folder / "vqgan").mkdir(exist_ok=True)
    torch.save(VQGanDetokenizer().state_dict(), folder / "vqgan" / "detoker.pt")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, *("\u0120" + letter for letter in letters), "\u0120"]
    words += [f"<{index}>" for index in range(50264 - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "dalle_bart_mini" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "dalle_bart_mini" / "merges.txt").write_text("#version: 0.2\n\u0120 a\n\n", encoding="utf-8")


def measure(program: str, folder: Path, grid_size: int, calls: int, threads: int) -> dict[str, object]:
    """Seconds of each call but the first, tokens and peak memory of one program; runs in a process of its own."""
    drawn: list[torch.Tensor] = []
    start = time.perf_counter()
    if program == "min-dalle":
        stub_network()
        from min_dalle import MinDalle

        model = MinDalle(str(folder), is_mega=False, is_verbose=False, device="cpu")
        decode = model.detokenizer.forward
        model.detokenizer.forward = lambda seamless, tokens: drawn.append(tokens.clone()) or decode(seamless, tokens)
    else:
        from dalle_pytorch.compat.min_dalle import MinDalle

        precision, _, compiled = program.partition("+")
        dtype = DETOKENIZERS[precision]
        model = MinDalle(
            folder, dtype, "cpu", False, is_verbose=False, precision=precision, compiled=bool(compiled),
            bos_id=16383, norm_eps=1e-5,
        )  # fmt: skip
        decode = model._decode
        model._decode = lambda dalle, tokens, grid: drawn.append(tokens.clone()) or decode(dalle, tokens, grid)
    loaded = time.perf_counter() - start
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        model.generate_images(PROMPT, 7, grid_size=grid_size)
        seconds.append(time.perf_counter() - start)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    return {"loaded": loaded, "seconds": seconds[1:], "tokens": drawn[-1].tolist(), "peak": peak}


def child(interpreter: str, *arguments: object) -> dict[str, object]:
    """Another process of this script; the peer's finds its own packages only, not this file under their name."""
    command = [interpreter, "-P", __file__, *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or interpreter == sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1]) if result.stdout.strip() else {}


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter with min-dalle==0.4.11")
    parser.add_argument("--grids", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--calls", type=int, default=1, help="that count, in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_weights(Path(arguments.write))
        return
    if arguments.measure:
        program, folder, grid, calls = arguments.measure
        print(json.dumps(measure(program, Path(folder), int(grid), int(calls), arguments.threads)))
        return
    if arguments.peer is None:
        parser.error("--peer is missing: an interpreter with min-dalle==0.4.11 (peer.py says how to make one)")
    with tempfile.TemporaryDirectory() as folder:
        child(arguments.peer, "--write", folder)
        print(
            "| pictures | program | VQGAN | seconds | times faster | same tokens | peak memory, GB | seconds to load |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for grid in arguments.grids:
            programs = ["min-dalle", *arguments.modes]
            runs: dict[str, list[dict[str, object]]] = {program: [] for program in programs}
            for _ in range(arguments.turns):
                for program in programs:
                    interpreter = arguments.peer if program == "min-dalle" else sys.executable
                    settings = ("--threads", arguments.threads, "--measure", program, folder, grid, arguments.calls)
                    runs[program].append(child(interpreter, *settings))
            report(grid, runs)


def report(grid: int, runs: dict[str, list[dict[str, object]]]) -> None:
    """Rows of one number of pictures."""
    seconds = {program: min(min(run["seconds"]) for run in found) for program, found in runs.items()}
    for program, found in runs.items():
        tokens, expected = (torch.tensor(part["tokens"]) for part in (found[0], runs["min-dalle"][0]))
        same = f"{(tokens == expected).float().mean():.1%}"
        ours = program != "min-dalle"
        name = f"ours, {program}" if ours else program
        vqgan = str(DETOKENIZERS[program.partition("+")[0]] if ours else torch.float32).removeprefix("torch.")
        print(
            f"| {grid**2} | {name} | {vqgan} | {seconds[program]:.1f} | "
            f"{seconds['min-dalle'] / seconds[program]:.2f} | {same} | "
            f"{min(run['peak'] for run in found):.2f} | {min(run['loaded'] for run in found):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
