"""Write image shards from emoji, a folder or the rainbow benchmark."""

from dalle_pytorch.commands.prepare_data import main

if __name__ == "__main__":
    main()
