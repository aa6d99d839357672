"""Any weights as one checkpoint file of ours, or as a folder for the Hugging Face hub.

The folder holds ``model.safetensors`` (a checkpoint of ours), ``config.json`` (what its header says, to be read by
people and programs) and ``README.md`` (the model card). ``dalle_pytorch.load`` takes the folder, or its id once it is
pushed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.checkpoint import Header, role
from dalle_pytorch.checkpoints.hub import NetworkError
from dalle_pytorch.checkpoints.loading import load, load_with_header
from dalle_pytorch.errors import UserError, first_line
from dalle_pytorch.files import ensure_empty
from dalle_pytorch.models.image_tokenizer import TrainableTokenizer
from dalle_pytorch.models.text_to_image import TextToImage

PRECISIONS = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TASKS = {
    "dalle": "text-to-image",
    "clip": "zero-shot-image-classification",
    "vae": "image-feature-extraction",
    "probe": "image-classification",
}
"""The hub's names of what a model does, by role."""
USES = {
    "dalle": 'generator = dalle_pytorch.Generator(model)\n'
    'candidates, _ = generator.generate("a red apple", num_candidates=8, num_keep=8)',
    "clip": 'generator = dalle_pytorch.Generator(dalle, model)  # ranks what a dalle draws',
    "vae": "tokens = model.encode(images)  # [b, n]\nimages = model.decode(tokens)  # [b, 3, H, W] in [0, 1]",
    "probe": "logits = model(images)  # of each factor's values, by its name",
}  # fmt: skip


@dataclass
class ExportConfig:
    """Settings of ``export``."""

    weights: str = "???"
    """What ``dalle_pytorch.load`` takes: a checkpoint, a foreign file, a name or an id of the hub."""
    vae: str | None = None
    """An image tokenizer to put into a DALLE in place of its own: of the same tokens, with a post-trained decoder."""
    out: str = "???"
    """Folder to make, which must not hold files; or one checkpoint file to write, of a name in .safetensors."""
    name: str | None = None
    """What the card calls the model; null = the name of the folder."""
    license: str | None = None
    """Licence of the weights, in the hub's spelling (mit, apache-2.0, ...); null = the card says that none is known."""
    description: str = ""
    """A paragraph for the card."""
    precision: str = "stored"
    """Of the weights: "fp16" or "bf16" make files half as large as "fp32"; "stored" = as they are."""
    push: str | None = None
    """Id of the hub, owner/name, to upload to; null = upload nothing. Needs HF_TOKEN."""
    private: bool = True
    """Make the repository private, if it is new."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: no such precision, or ``push`` of a file.
        """
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.push is not None and self.is_file:
            raise UserError(
                f"push={self.push} uploads a folder, and out={self.out} is one file: leave .safetensors out"
            )

    @property
    def is_file(self) -> bool:
        """Whether one checkpoint file is written in place of a folder."""
        return self.out.endswith(".safetensors")


def export(config: ExportConfig) -> str:
    """Write the folder or the file, and upload the folder where asked. Optimiser and progress stay behind.

    Returns:
        What was written, and where it is.

    Raises:
        FileExistsError: a file is there already.
        UserError: weights that cannot be read or that the precision cannot hold, or a hub that refuses.
    """
    out = Path(config.out)
    ensure_empty(out)
    model, head = load_with_header(config.weights, dtype=PRECISIONS[config.precision])
    if config.vae is not None:
        put_vae(model, config.vae, PRECISIONS[config.precision])
    head = checkpoint.header(model, head["training"])
    checkpoint.save(model, out if config.is_file else out / checkpoint.HUB_FILE, training=head["training"])
    if config.is_file:
        return f"{head['kind']}: {out}"
    (out / "config.json").write_text(json.dumps(without_tokenizer(head), indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(model, head, config), encoding="utf-8")
    pushed = "" if config.push is None else f", {push(out, config.push, private=config.private)}"
    return f"{head['kind']}: {out}{pushed}"


def put_vae(dalle: nn.Module, weights: str, dtype: torch.dtype | None) -> None:
    """Give a DALLE another image tokenizer, which must differ from its own in the decoder alone.

    Raises:
        UserError: ``dalle`` is none, or the tokenizer would make or read other tokens; names the first difference.
    """
    if not isinstance(dalle, TextToImage):
        raise UserError(f"vae={weights} goes into a DALLE, and these weights are a {type(dalle).__name__}")
    vae = load(weights, kind="vae", dtype=dtype)
    if not isinstance(vae, TrainableTokenizer) or vae.config != dalle.vae.config:
        raise UserError(f"vae={weights} has other settings than the image tokenizer of the DALLE: other tokens")
    decoding, own = checkpoint.decoding_tensors(vae), dalle.vae.state_dict()
    for name, tensor in vae.state_dict(keep_vars=True).items():
        if id(tensor) not in decoding and not torch.equal(tensor.to(own[name].dtype), own[name]):
            raise UserError(f"vae={weights} makes other tokens than the DALLE knows: it differs in {name}")
    dalle.vae = vae


def without_tokenizer(head: Header) -> dict[str, Any]:
    """A header in which a text tokenizer is its kind only: vocabularies are long, and in the weights' file."""
    tokenizer = head["text_tokenizer"]
    return {**head, "text_tokenizer": None if tokenizer is None else tokenizer["kind"]}


def card(model: nn.Module, head: Header, config: ExportConfig) -> str:
    """The model card."""
    name, kind = config.name or Path(config.out).name, head["kind"]
    front = {"library_name": "dalle-pytorch", "pipeline_tag": TASKS[role(head)], "license": config.license or "unknown"}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "---", "", f"# {name}", ""]
    if config.description:
        lines += [config.description, ""]
    count = sum(parameter.numel() for parameter in model.parameters())
    included = ", image tokenizer included" if head["vae"] else ""
    if head.get("text_encoder"):
        encoder: Any = model.text_encoder
        count_of = f"{sum(parameter.numel() for parameter in encoder.parameters()):,}"
        name_of = head["text_encoder"]["config"]["network"].get("model_type")
        included += f"; {count_of} of them are a pretrained text encoder ({name_of}) with a licence of its own"
    lines += [f"A `{kind}` of {count:,} parameters{included}.", ""]
    foreign = head["config"].get("foreign", {})
    settings = {
        **{key: value for key, value in head["config"].items() if key != "foreign"},
        **{f"foreign.{key}": value for key, value in foreign.items()},
        **{f"vae.{key}": value for key, value in (head["vae"] or {}).get("config", {}).items()},
    }
    rows = [("setting", "value"), ("---", "---"), *((f"`{key}`", f"`{value}`") for key, value in settings.items())]
    lines += [f"| {key} | {value} |" for key, value in rows]
    if head["training"]:
        lines += [
            "",
            "Notes of its training: " + ", ".join(f"{key} {value}" for key, value in head["training"].items()),
        ]
    where = config.push or config.out
    lines += ["", "```python", "import dalle_pytorch", "", f'model = dalle_pytorch.load("{where}")', USES[role(head)]]
    return "\n".join([*lines, "```", ""])


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder.

    Returns:
        Its address.

    Raises:
        UserError: the hub refuses or cannot be reached; says why.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo))
    except (HfHubHTTPError, HFValidationError, NetworkError, OSError) as error:
        raise UserError(
            f"push={repo} failed ({first_line(error)}); {folder} is complete: set HF_TOKEN to a token that may write, "
            f"and then: hf upload {repo} {folder}"
        ) from error
