"""How several processes share a training: checks of ``trainer.strategy``, and compressed gradients."""

from typing import Any

from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dalle_pytorch.errors import UserError

SHARDED = f"{__name__}.ShardedStrategy"


def is_sharded(trainer: dict[str, Any]) -> bool:
    """Whether a trainer section spreads the weights over processes."""
    strategy = trainer.get("strategy")
    return isinstance(strategy, dict) and strategy.get("_target_") == SHARDED


def check_strategy(trainer: dict[str, Any], model: Any, optim: str) -> None:
    """Refuse what cannot run, before anything is built.

    Args:
        trainer: its section.
        model: config of the network.
        optim: kind of the optimiser.

    Raises:
        ValueError: FSDP1, DeepSpeed, or what does not go with sharded weights; says what to set instead.
    """
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str) and strategy.startswith(("fsdp", "deepspeed")):
        raise UserError(f"trainer.strategy={strategy} is not supported: set trainer=fsdp (FSDP2)")
    if not is_sharded(trainer):
        return
    if optim == "adamw8bit":
        raise UserError("optim=adamw8bit does not go with trainer=fsdp: bitsandbytes cannot read sharded weights")
    for name in ("shared_attn_ids", "shared_ff_ids"):
        if getattr(model, name, None) is not None:
            raise UserError(f"model.{name} does not go with trainer=fsdp: blocks that share weights cannot be cut")


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; the model is cut in `LitBase.configure_model`. Checkpoints are folders.

    Source:
        https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self) -> None:
        """Lightning's "auto" would cut tensors within a machine, and spread weights over machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class PowerSGDStrategy(DDPStrategy):
    """DDP whose gradient matrices are averaged as products of two narrow ones, the error carried on to the next step.

    Args:
        rank: columns of the narrow matrices; the paper takes 896 for 12 billion parameters (section 2.5), a rate of
            86 %, shared by the 8 GPUs of a machine. Smaller matrices, and vectors, are averaged as they are.
        start_step: steps averaged as they are at first, at least 2.
        **settings: of DDPStrategy.

    Source:
        Vogels et al. 2019, https://arxiv.org/abs/1905.13727; torch's implementation. Deviations from the paper:
        embeddings are compressed as well; the carried errors are not in checkpoints, and a resumed run begins with
        ``start_step`` uncompressed steps again.
    """

    def __init__(self, rank: int = 128, start_step: int = 1000, **settings: Any) -> None:
        if rank < 1 or start_step < 2:
            raise UserError(f"PowerSGD needs rank >= 1 and start_step >= 2, got {rank} and {start_step}")
        self.rank, self.start_step = rank, start_step
        self.state: PowerSGDState | None = None
        super().__init__(**settings)

    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on GPUs only; torch's works with gloo too.
        assert isinstance(self.model, DistributedDataParallel)
        self.state = PowerSGDState(None, matrix_approximation_rank=self.rank, start_powerSGD_iter=self.start_step)
        self.model.register_comm_hook(self.state, powerSGD_hook)

    def forget(self) -> None:
        """Drop the carried errors and narrow matrices: a gradient that is not finite has reached them."""
        if self.state is not None:
            for memory in (self.state.error_dict, self.state.p_memory_dict, self.state.q_memory_dict):
                memory.clear()
