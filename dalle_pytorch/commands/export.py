"""A folder for the Hugging Face hub: ``dalle-export weights=… out=…``; or one file: ``out=dalle.safetensors``."""

import logging

from dalle_pytorch.checkpoints.export import ExportConfig, export
from dalle_pytorch.config import entry

log = logging.getLogger(__name__)


@entry("export", ExportConfig)
def main(config: ExportConfig) -> None:
    """Write the folder or the file, and upload it where asked."""
    log.info("%s", export(config))


if __name__ == "__main__":
    main()
