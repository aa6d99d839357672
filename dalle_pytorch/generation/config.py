"""Settings of generate.py."""

from dataclasses import dataclass, field
from pathlib import Path

from dalle_pytorch.errors import UserError, at_least_one, finite
from dalle_pytorch.files import is_unicode, read_text, split_lines
from dalle_pytorch.generation.sampling import SamplingConfig


@dataclass(kw_only=True)
class GenerateConfig:
    """What to draw, with which models, and where to put it."""

    prompt: str | None = None
    """One prompt, or several with | between them."""
    prompts_file: str | None = None
    """Text file with a prompt a line, in place of ``prompt``; /dev/stdin and other pipes are read too."""
    weights: str = "emoji"
    """What draws: a checkpoint of a DALLE, which carries its image and text tokenizers, or another program's weights: a
    file, a folder, the name of a release or an id of the Hugging Face hub (docs/weights.md). The default are the
    weights that come along, ranked by their clip and sampled as their card says."""
    dalle: str | None = None
    """The old name of ``weights``."""
    clip: str | None = None
    """The CLIP that ranks, found in the same ways, or a class of yours as package.module.Class (README, "Drawing");
    several with | between them vote; null = the candidates keep their order."""
    num_candidates: int = 64
    """Pictures drawn for each prompt (the paper: 512)."""
    num_keep: int = 8
    """Pictures kept for each prompt."""
    min_distance: float = 0.0
    """Keep no two pictures nearer than this (root mean square of pixels in [0, 1]), if there are others; 0 = off."""
    indices: list[int] | None = None
    """Draw these candidates only, in place of the first num_candidates: an index of ranking.json draws that picture
    again."""
    seed: int | None = 0
    """The same seed gives the same images; null or -1 = a random one, which is printed and noted in ranking.json."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Temperature, truncation and guidance."""
    negative_prompt: str = ""
    """What guidance leads away from; nothing = the empty caption."""
    image: str | None = None
    """Picture to complete, with keep_rows or keep_mask."""
    keep_rows: int = 0
    """Token rows of ``image`` that stay, from the top."""
    keep_mask: str | None = None
    """Black-and-white picture: where it is white, ``image`` stays (a token stays if all of it is white)."""
    progressive: bool = False
    """Also write an animation of each prompt's pictures as they appear."""
    preview_rows: int = 1
    """Token rows between two frames of the animation."""
    batch_size: int | None = None
    """Candidates sampled together: memory and speed, not the result; null = what memory_gb holds."""
    memory_gb: float | None = None
    """Memory for the keys and values of candidates, in 10^9 bytes, for each process; null = 4 on a CPU, most of what is
    free on a GPU."""
    precision: str | None = None
    """Arithmetic of the DALLE: fp32, bf16, fp16 or int8 (CPU). Faster, and other images; null = bf16 on a GPU that has
    it, else fp32."""
    compile: bool = False
    """Translate a step with torch.compile: half a minute the first time; pays with precision=int8. On a CPU it needs a
    C++ compiler, and keys and values have another type: other images."""
    truncate: bool = False
    """Cut prompts longer than the model's context instead of refusing them."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ..."""
    out: str | None = None
    """Folder to make; it must not hold files yet. Null = a new one, runs/generate/<time>."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: counts that do not fit; names them.
        """
        finite(self)
        for name in ("prompt", "negative_prompt"):
            if not is_unicode(getattr(self, name) or ""):
                raise UserError(f"{name}={getattr(self, name)!a} holds bytes that are no UTF-8: type it in UTF-8")
        if self.dalle not in (None, self.weights):
            raise UserError(f"weights={self.weights} and dalle={self.dalle} mean the same: give one")
        if not 1 <= self.num_keep <= self.num_candidates:
            raise UserError(f"num_keep ({self.num_keep}) must lie in 1 to num_candidates ({self.num_candidates})")
        if not 0 <= self.min_distance <= 1:
            raise UserError(f"min_distance must lie in [0, 1] (0 = off), got {self.min_distance}")
        at_least_one(self, "preview_rows")
        if self.indices is not None and (
            len(set(self.indices)) < len(self.indices) or min(self.indices, default=-1) < 0
        ):
            raise UserError(f"indices must be different numbers from 0 on, got {self.indices}")
        if (self.image is None) == bool(self.keep_rows or self.keep_mask) or (self.keep_rows and self.keep_mask):
            raise UserError("completion needs image=FILE and one of keep_rows=ROWS and keep_mask=FILE")

    def clips(self) -> list[str]:
        """Names of what ranks."""
        return [path.strip() for path in (self.clip or "").split("|") if path.strip()]

    def wants_random_seed(self) -> bool:
        """Whether the seed is still to be drawn."""
        return self.seed is None or self.seed == -1

    def drawn(self) -> list[int]:
        """Numbers of the candidates of each prompt."""
        return list(range(self.num_candidates)) if self.indices is None else list(self.indices)

    def prompts(self) -> list[str]:
        """The prompts, from the setting or the file.

        Raises:
            UserError: none given, or both ways at once.
            FileNotFoundError: no such file.
            UserError: the file is no text.
        """
        if (self.prompt is None) == (self.prompts_file is None):
            raise UserError('give the prompts one way: prompt="a red apple|a blue car" or prompts_file=FILE')
        if self.prompts_file is not None:
            prompts = read_prompts(self.prompts_file)
        else:
            prompts = without_blanks(str(self.prompt).split("|"))
        if not prompts:
            raise UserError("there is no prompt in what was given: every line is empty")
        return prompts


def read_prompts(prompts_file: str) -> list[str]:
    """The prompts of a file or a pipe, one a line.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file is no text.
    """
    return without_blanks(split_lines(read_text(Path(prompts_file), f"prompts_file={prompts_file}")))


def without_blanks(lines: list[str]) -> list[str]:
    """Lines without space around them, but for the empty ones."""
    return [line.strip() for line in lines if line.strip()]
