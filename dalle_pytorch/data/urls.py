"""Remote shards by their addresses."""

from webdataset.gopen import gopen_schemes
from webdataset.shardlists import expand_urls

from dalle_pytorch.errors import UserError

SCHEMES = frozenset(gopen_schemes) - {"__default__"} | {"file"}


def is_stream(path: str) -> bool:
    """Whether a data.path means remote shards rather than a folder."""
    return "://" in path or path.startswith("pipe:")


def expand(path: str) -> list[str]:
    """The shards of a pattern: ``{000..123}`` counts up, ``::`` joins several.

    Raises:
        ValueError: braces that do not match, or a scheme that cannot be read; names it.
    """
    try:
        urls = expand_urls(path)
    except ValueError as error:
        raise UserError(f"data.path={path}: {error}") from error
    for url in urls:
        if url.partition(":")[0].lower() not in SCHEMES:
            raise UserError(
                f"data.path: {url} is of no scheme that can be read ({', '.join(sorted(SCHEMES))}); for others give a "
                "command that prints a shard, as in 'pipe:aws s3 cp s3://bucket/x-{000..123}.tar -'"
            )
    return urls
