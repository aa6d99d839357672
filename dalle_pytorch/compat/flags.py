"""Flags of DALLE-pytorch's commands, and what to type here in place of each: a table for each command.

Source:
    github.com/lucidrains/DALLE-pytorch 1.6.6: generate.py, train_vae.py, train_dalle.py.
"""

from dalle_pytorch.config import Flag

_CARRIED = Flag(remark="leave it out, the checkpoint carries its image tokenizer")
_PREPARED = Flag(
    ("data=folder", "data.path=data/mine"), "pack the images first, prepare_data.py source=folder path={} out=data/mine"
)
_EPOCHS = Flag(("trainer.max_steps=-1",), "then +trainer.max_epochs={}; or give trainer.max_steps= alone")
_LAUNCHED = Flag(remark="leave it out, trainer=ddp or trainer=fsdp share a training among GPUs")
_TOKENIZER = (
    "leave it out; where load() finds no text tokenizer in dalle.pt, name it once: dalle-import-weights dalle_pytorch "
    "dalle.pt tokenizer=FILE --out dalle.safetensors"
)
FILTER_THRES = (
    "DALLE-pytorch's --top_k and filter_thres are the share of tokens to drop; sampling.top_k is the number to keep: "
    "0.9 is sampling.top_k=819 for 8192 codes, 102 for 1024"
)
"""What to say where a share is given as ``sampling.top_k``."""

GENERATE: dict[str, Flag] = {
    "dalle_path": Flag(("weights",)),
    "vqgan_model_path": _CARRIED,
    "vqgan_config_path": _CARRIED,
    "text": Flag(("prompt",)),
    "num_images": Flag(("num_candidates", "num_keep")),
    "batch_size": Flag(("batch_size",)),
    "top_k": Flag(remark=FILTER_THRES),
    "outputs_dir": Flag(("out",)),
    "bpe_path": Flag(remark=_TOKENIZER),
    "hug": Flag(remark=_TOKENIZER),
    "chinese": Flag(remark=_TOKENIZER),
    "taming": _CARRIED,
    "gentxt": Flag(remark="prompts are completed in Python, by DALLE.generate_texts"),
}
"""Of generate.py."""

_TRAINING: dict[str, Flag] = {
    "epochs": _EPOCHS,
    "batch_size": Flag(("data.batch_size",)),
    "learning_rate": Flag(("optim.lr",)),
    "distributed_backend": _LAUNCHED,
    "distr_backend": _LAUNCHED,
    "deepspeed": _LAUNCHED,
    "local_rank": _LAUNCHED,
}

TRAIN_VAE: dict[str, Flag] = {
    **_TRAINING,
    "image_folder": _PREPARED,
    "image_size": Flag(("model.image_size",), "prepare_data.py takes image_size={}, too"),
    "lr_decay_rate": Flag(remark="optim.schedule= names how the rate falls"),
    "starting_temp": Flag(("gumbel_tau.start",)),
    "temp_min": Flag(("gumbel_tau.end",)),
    "anneal_rate": Flag(remark="gumbel_tau.share= is the part of the training in which the temperature falls"),
    "num_images_save": Flag(remark="callbacks.picture_every= says how often images are logged"),
    "num_tokens": Flag(("model.codebook_size",)),
    "num_layers": Flag(("model.num_layers",)),
    "num_resnet_blocks": Flag(("model.num_resnet_blocks",)),
    "smooth_l1_loss": Flag(remark="model.likelihood= names the losses that there are"),
    "emb_dim": Flag(("model.codebook_dim",)),
    "hidden_dim": Flag(("model.hidden_dim",)),
    "kl_loss_weight": Flag(("kl_weight.start", "kl_weight.end")),
    "transparent": Flag(remark="leave it out, images are put on white"),
}
"""Of train_vae.py."""

TRAIN_DALLE: dict[str, Flag] = {
    **_TRAINING,
    "vae_path": Flag(("vae",)),
    "dalle_path": Flag(("init",), "or resume=true with the out= of a run of ours"),
    "vqgan_model_path": Flag(("vae",)),
    "vqgan_config_path": Flag(remark="leave it out, the weights tell the sizes"),
    "taming": Flag(("vae=vqgan_f16_1024",)),
    "image_text_folder": _PREPARED,
    "wds": Flag(
        ("data.path=FOLDER_OR_URL",), "tars of .jpg or .png and .txt; those of img2dataset: source=img2dataset"
    ),
    "truncate_captions": Flag(("text.truncate=true",)),
    "random_resize_crop_lower_ratio": Flag(("data.crop=true", "data.resize=true")),
    "chinese": Flag(("text.tokenizer=hf_dir",), "text.path= names the folder of bert-base-chinese"),
    "hug": Flag(("text.tokenizer=hf",), "text.path= names the tokenizer.json"),
    "bpe_path": Flag(("text.path",)),
    "dalle_output_file_name": Flag(("out",), "a folder, in which dalle.safetensors is written"),
    "fp16": Flag(("trainer.precision=16-mixed",), "bf16-mixed where the GPU has it"),
    "amp": Flag(("trainer.precision=16-mixed",), "bf16-mixed where the GPU has it"),
    "wandb_name": Flag(("logger=wandb", "logger.wandb.project")),
    "wandb_entity": Flag(remark="+logger.wandb.entity={}, with logger=wandb"),
    "stable_softmax": Flag(("model.stable=true",)),
    "flops_profiler": Flag(remark="leave it out, TFLOP/s are logged always; plan=true estimates them before"),
    "save_every_n_steps": Flag(("callbacks.checkpoint_every",)),
    "keep_n_checkpoints": Flag(("callbacks.keep_last",)),
    "ga_steps": Flag(
        remark="data.batch_size is what a step sees, data.micro_batch_size what a process holds at a time"
    ),
    "clip_grad_norm": Flag(("optim.clip",)),
    "lr_decay": Flag(remark="optim.schedule= names how the rate falls"),
    "dim": Flag(("model.dim",)),
    "text_seq_len": Flag(("model.text_len",)),
    "depth": Flag(("model.depth",)),
    "heads": Flag(("model.heads",)),
    "dim_head": Flag(("model.head_dim",)),
    "ff_dropout": Flag(("model.ff_dropout",)),
    "attn_dropout": Flag(("model.attn_dropout",)),
    "reversible": Flag(("model.foreign.reversible=true",), "model.checkpoint_activations=true saves memory, too"),
    "loss_img_weight": Flag(("model.loss_img_weight",)),
    "attn_types": Flag(remark="model.attn_types=[{}]"),
    "shift_tokens": Flag(("model.shift_tokens=true",)),
    "rotary_emb": Flag(("model.positions=rotary",)),
    "shared_attn_ids": Flag(remark="model.shared_attn_ids=[{}]"),
    "shared_ff_ids": Flag(remark="model.shared_ff_ids=[{}]"),
    "share_input_output_emb": Flag(("model.tie_embeddings=true",)),
}
"""Of train_dalle.py."""
