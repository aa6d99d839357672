"""A small text encoder for small weights: the first layers and the commonest word pieces of a BERT with WordPiece.

    python weights/emoji/next/shrink_encoder.py FOLDER OUT [--layers 4] [--pieces 14000]

FOLDER is a folder of transformers, e.g. of sentence-transformers/all-MiniLM-L6-v2; OUT becomes another one, which
``train_dalle.py text_encoder=OUT`` reads. BERT's word pieces are sorted by frequency; single characters stay whatever
their place, so any English text can still be read, rare words in more pieces than before.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForTextEncoding, AutoTokenizer


def kept_pieces(vocabulary: dict[str, int], count: int) -> list[str]:
    """Marks, ASCII characters, and the commonest ASCII pieces, in the order of their ids."""
    kept = []
    for piece in sorted(vocabulary, key=vocabulary.__getitem__):
        text = piece.removeprefix("##")
        mark = piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        if mark or (text.isascii() and not text.startswith("[unused") and (len(text) == 1 or len(kept) < count)):
            kept.append(piece)
    return kept


def main() -> None:
    """Read, cut, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pieces", type=int, default=14_000)
    args = parser.parse_args()

    net = AutoModelForTextEncoding.from_pretrained(args.folder, local_files_only=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.folder, local_files_only=True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    before = state["model"]["vocab"]
    pieces = kept_pieces(before, args.pieces)
    now = {piece: i for i, piece in enumerate(pieces)}
    state["model"]["vocab"] = now
    for token in state["added_tokens"]:
        token["id"] = now[token["content"]]
    for mark, entry in state["post_processor"]["special_tokens"].items():
        entry["ids"] = [now[mark]]
    state["truncation"] = state["padding"] = None

    net.encoder.layer = net.encoder.layer[: args.layers]
    rows = net.get_input_embeddings().weight[[before[piece] for piece in pieces]]
    net.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows.detach().clone(), padding_idx=now["[PAD]"]))
    net.config.update({"vocab_size": len(pieces), "num_hidden_layers": args.layers})
    net.pooler = None
    net.save_pretrained(args.out)
    (args.out / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False))
    (args.out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    print(f"{args.out}: {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, {len(pieces):,} pieces")


if __name__ == "__main__":
    main()
