"""Train a CLIP."""

from dalle_pytorch.commands.train_clip import main

if __name__ == "__main__":
    main()
