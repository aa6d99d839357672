"""min-dalle's command: ``image_from_text --text "a red apple" --no-mega``; prints the image in letters as well."""

import logging
import sys

from PIL import Image

from dalle_pytorch.compat.image_from_text import draw, in_letters, parser, target
from dalle_pytorch.errors import UserError


def main() -> None:
    """Draw and save; errors in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = parser().parse_args()
    try:
        path = target(flags.image_path, overwrite=flags.overwrite)
        image = draw(flags)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb" if flags.overwrite else "xb") as file:
            image.save(file, format=Image.registered_extensions()[path.suffix.lower()])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(in_letters(image))
    print(path)


if __name__ == "__main__":
    main()
