"""One file of the weights in a checkpoint: ``python -m dalle_pytorch.commands.consolidate checkpoint=… out=…``.

For the folders that trainer=fsdp writes; the ``.ckpt`` files of other runs are taken as well.
"""

import logging
from dataclasses import dataclass

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.config import entry

log = logging.getLogger(__name__)


@dataclass
class ConsolidateConfig:
    """Settings of ``consolidate``."""

    checkpoint: str = "???"
    """Folder of a sharded checkpoint, for instance runs/dalle/mine/checkpoints/step_00001000.ckpt."""
    out: str = "???"
    """File to write, for instance dalle.safetensors; must not exist."""


@entry("consolidate", ConsolidateConfig)
def main(config: ConsolidateConfig) -> None:
    """Put the parts together; optimiser and progress stay behind."""
    head = checkpoint.read_header(config.checkpoint)
    checkpoint.save(checkpoint.load(config.checkpoint), config.out, training=head["training"])
    log.info("%s after %s steps: %s", head["kind"], head["training"].get("step"), config.out)


if __name__ == "__main__":
    main()
