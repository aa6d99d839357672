"""min-dalle's command: ``image_from_text --text "a red apple" --no-mega``; prints the image in letters as well."""

import logging

from dalle_pytorch.compat.image_from_text import draw, encoded, in_letters, parser, target
from dalle_pytorch.errors import one_line_errors
from dalle_pytorch.files import atomic, write_new


def main() -> None:
    """Draw and save; errors in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = parser().parse_args()
    with one_line_errors():
        path = target(flags.image_path, overwrite=flags.overwrite)
        image = draw(flags)
        path.parent.mkdir(parents=True, exist_ok=True)
        if flags.overwrite:
            with atomic(path) as temporary:
                temporary.write_bytes(encoded(image, path.suffix))
        else:
            write_new(path, encoded(image, path.suffix))
        print(in_letters(image))
        print(path)


if __name__ == "__main__":
    main()
