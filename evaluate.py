"""Judge a checkpoint, or compare two judgements; see dalle_pytorch/commands/evaluate.py."""

from dalle_pytorch.commands.evaluate import run

if __name__ == "__main__":
    run()
