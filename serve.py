"""A server of images; see dalle_pytorch/commands/serve.py."""

from dalle_pytorch.commands.serve import run

if __name__ == "__main__":
    run()
