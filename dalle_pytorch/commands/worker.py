"""A worker of its own: ``dalle-worker database=postgresql+psycopg://... library=/shared/library``, one for each GPU.

It takes the settings of serve.py. Server and workers share the ledger and the library's folder.
"""

import logging
import signal
import threading
from pathlib import Path

from dalle_pytorch.commands.serve import NOT_INSTALLED
from dalle_pytorch.config import entry
from dalle_pytorch.errors import UserError
from dalle_pytorch.serving.config import ServeConfig


@entry("serve", ServeConfig)
def main(config: ServeConfig) -> None:
    """Work until SIGTERM or Ctrl-C; what is drawn then is queued again."""
    try:
        from dalle_pytorch.serving.app import local_engine
        from dalle_pytorch.serving.ledger import Ledger
        from dalle_pytorch.serving.library import Library
        from dalle_pytorch.serving.worker import Worker
    except ModuleNotFoundError as error:
        raise UserError(NOT_INSTALLED) from error
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    library = Library(Path(config.library))
    ledger = Ledger(config.database_url(), lease=config.lease)
    worker = Worker(ledger, library, local_engine(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        # in a thread: the signal may come while this one holds the event's lock
        signal.signal(number, lambda *_: threading.Thread(target=worker.stop).start())
    print(f"worker {worker.name}: weights {config.weights}, library {config.library}", flush=True)
    worker.run()
    ledger.close()
    if worker.failure is not None:
        raise UserError(worker.failure)


if __name__ == "__main__":
    main()
