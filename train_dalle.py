"""Train a DALLE."""

from dalle_pytorch.commands.train_dalle import main

if __name__ == "__main__":
    main()
