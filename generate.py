"""Prompts to ranked pictures; see dalle_pytorch/commands/generate.py."""

from dalle_pytorch.commands.generate import main

if __name__ == "__main__":
    main()
