"""Train a DiscreteVAE."""

from dalle_pytorch.commands.train_vae import main

if __name__ == "__main__":
    main()
