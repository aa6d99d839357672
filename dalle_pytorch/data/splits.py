"""The splits of a folder of shards, opened."""

from pathlib import Path

from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.tokens import open_shards
from dalle_pytorch.data.urls import is_stream
from dalle_pytorch.errors import UserError


def open_splits(config: DataConfig) -> tuple[ShardDataset, ShardDataset]:
    """The training and the validation split.

    Raises:
        FileNotFoundError: no such folder; says where it was looked for and how to make one.
        ValueError: no such split, broken shards, or a stream.
    """
    if is_stream(config.path):
        raise UserError(f"data.path={config.path} is a stream, which has no end: a folder of shards is needed here")
    train = open_split(config.path, config.train_split, "data.path")
    if config.val_path is None:
        return train, open_split(config.path, config.val_split, "data.path")
    return train, open_split(config.val_path, config.val_split, "data.val_path")


def open_split(path: str, split: str, name: str) -> ShardDataset:
    """A split of a folder; ``name`` is the setting that it comes from, for errors.

    Raises:
        FileNotFoundError: no such folder; says where it was looked for and how to make one.
        ValueError: no such split, or broken shards.
    """
    return open_shards(find_folder(path, name), split)


def find_folder(path: str, name: str) -> Path:
    """The folder of shards that setting ``name`` gives.

    Raises:
        FileNotFoundError: no such folder; says where it was looked for and how to make one.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}={path}: there is no folder {folder.absolute()}. The emoji come with a checkout, in "
            "data/emoji; prepare_data.py writes others (source=emoji, source=rainbow, source=folder path=...)"
        )
    return folder
