"""Packs a data set of the Hugging Face Hub, or one saved by the package `datasets`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from dalle_pytorch.data.packing import Item, PackConfig, PackReport, Skipped, captions_of, pack
from dalle_pytorch.errors import UserError


def pack_huggingface(
    path: str,
    out: str | Path,
    config: PackConfig,
    *,
    hf_split: str = "train",
    image_column: str = "image",
    caption_column: str = "caption",
) -> PackReport:
    """Pack one split of a data set; it is streamed, not downloaded first.

    A picture is named by its row, as in "row 12", so splits by hash stay when rows are added at the end.

    Args:
        path: a folder written by ``save_to_disk``, or what ``datasets.load_dataset`` takes: a folder of data files or
            the name of a data set on the Hub.
        out: shard folder to write; absent or empty.
        config: size, splits and limits.
        hf_split: the split of the data set to read; a single one written by ``save_to_disk`` has no name.
        image_column: the column of pictures.
        caption_column: the column of captions: a text or a list of texts.

    Returns:
        The index and what was left out: rows without picture or caption, unreadable pictures.

    Raises:
        UserError: the package `datasets` is not installed.
        FileNotFoundError: there is no such data set.
        ValueError: it cannot be opened, has no such split or column, or too little of it is usable.
    """
    dataset = _open(path, hf_split)
    _check_columns(dataset, path, image_column, caption_column)
    columns = {"hf_split": hf_split, "image_column": image_column, "caption_column": caption_column}
    entries = _entries(_undecoded(dataset, image_column, caption_column), image_column, caption_column)
    source = {"format": "huggingface", **columns}
    return pack(entries, Path(out), config, name=Path(path).resolve().name, where=path, source=source)


def _package() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise UserError("source=huggingface needs the package datasets: pip install datasets") from error
    return datasets


def _open(path: str, split: str) -> Any:
    datasets = _package()
    folder = Path(path).expanduser()
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if not (folder / "dataset_dict.json").is_file():
            return datasets.load_dataset(str(folder) if folder.is_dir() else path, split=split, streaming=True)
        splits = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise  # says which
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"datasets cannot open {path} with hf_split={split}: {error}") from error
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; set hf_split to one of: {', '.join(splits)}")
    return splits[split]


def _check_columns(dataset: Any, path: str, image_column: str, caption_column: str) -> None:
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may know them by its rows alone
    for setting, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in columns:
            raise UserError(f"{path} has no column {column!r}; set {setting} to one of: {', '.join(columns)}")


def _undecoded(dataset: Any, image_column: str, caption_column: str) -> Any:
    """Leave the pictures as the bytes they are, and the other columns unread."""
    datasets = _package()
    dataset = dataset.select_columns([image_column, caption_column])
    if dataset.features and isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def _entries(dataset: Any, image_column: str, caption_column: str) -> Iterator[Item | Skipped]:
    for number, row in enumerate(dataset):
        path = f"row {number}"
        captions = captions_of(row[caption_column])
        stored = row[image_column]
        # An undecoded picture is {"bytes": ..., "path": ...}, one of them None; a column may hold plain bytes too.
        data, file = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
        if not captions:
            yield Skipped(path, f"no captions: column {caption_column!r} has no text")
        elif isinstance(data, bytes):
            yield Item(path, captions, data)
        elif isinstance(file, str):
            yield Item(path, captions, partial(_fetch, file))
        else:
            yield Skipped(path, f"no picture: column {image_column!r} has {type(stored).__name__}")


def _fetch(path: str) -> bytes:
    """Read a file of a data set that keeps its pictures apart, here or at an address such as hf://..."""
    import fsspec  # comes with datasets

    opened: Any = fsspec.open(path, "rb")
    with opened as file:
        return file.read()
