"""A server: ``serve.py weights=runs/mine/dalle/dalle.safetensors clip=runs/mine/clip/clip.safetensors``.

Without ``weights=`` it draws with those that come along, on http://127.0.0.1:8000. ``serve.py import-library PATH``
takes over the library of a playground.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any

from dalle_pytorch.config import entry
from dalle_pytorch.errors import UserError
from dalle_pytorch.serving.config import ServeConfig

NOT_INSTALLED = "serving needs FastAPI and its kin: pip install 'dalle-pytorch-lab[serve]'"


@entry("serve", ServeConfig)
def main(config: ServeConfig) -> None:
    """Serve until a signal ends it; what is drawn then is queued again."""
    try:
        import uvicorn

        from dalle_pytorch.serving.app import make_app
        from dalle_pytorch.serving.doctor import repair
        from dalle_pytorch.serving.keys import ANYONE
        from dalle_pytorch.serving.ledger import Ledger
        from dalle_pytorch.serving.library import Library
        from dalle_pytorch.serving.takeover import take_over
    except ModuleNotFoundError as error:
        raise UserError(NOT_INSTALLED) from error
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    for file in (config.tls_cert, config.tls_key):
        if file is not None and not Path(file).is_file():
            raise UserError(f"there is no file {file} (tls_cert, tls_key)")
    if config.repair:
        if not Path(config.library).is_dir():
            raise UserError(f"library={config.library} is no folder: there is nothing to repair")
        library = Library(Path(config.library))
        print(repair(Ledger(config.database_url()), library))
        return
    if config.import_library is not None:
        library = Library(Path(config.library))
        print(take_over(Path(config.import_library), Ledger(config.database_url()), library, config.owner or ANYONE))
        return
    app = make_app(config)
    scheme = "https" if config.tls_cert else "http"
    print(f"{scheme}://{config.host}:{config.port}  weights {config.weights}, library {config.library}", flush=True)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:  # before it waits for the clients that wait for images
            app.state.hub.stop()
            super().handle_exit(sig, frame)

    settings = uvicorn.Config(
        app, host=config.host, port=config.port, ssl_certfile=config.tls_cert, ssl_keyfile=config.tls_key,
        log_level="warning", server_header=False, timeout_graceful_shutdown=5,
    )  # fmt: skip
    Server(settings).run()


def run() -> None:
    """``import-library PATH``, or a server."""
    if sys.argv[1:2] == ["import-library"]:
        if len(sys.argv) < 3:
            sys.exit("usage: serve.py import-library PATH [library=...] [database=...]")
        # as Hydra wants it between quotes, where a backslash means something before a quote only
        path = re.sub(r"(\\*)'", r"\1\1\\'", sys.argv[2])
        path += "\\" * (len(path) - len(path.rstrip("\\")))
        sys.argv[1:3] = [f"import_library='{path}'"]
    main()


if __name__ == "__main__":
    run()
