"""Settings of state-space layers: the widths of state and heads, the convolution, how long a state lasts."""

from pydantic import Field, model_validator

from jaxtron.config import Config
from jaxtron.kernels.gated_delta.config import DeltaImplementation
from jaxtron.kernels.ssd.config import Implementation

Range = tuple[float, float]


def _check_range(name: str, bounds: Range) -> None:
    """`ValueError` unless these are two numbers above 0, the smaller first."""
    low, high = bounds
    if not 0 < low <= high:
        raise ValueError(f"{name} {low:g} {high:g} must be two numbers above 0, the smaller first")


class MambaConfig(Config):
    """State-space layers: `M`, Mamba-2 (2405.21060), and `m`, Mamba (2312.00752)."""

    state_size: int = Field(default=128, ge=1)
    """Numbers that a channel remembers (Mamba's d_state)."""
    num_heads: int | None = Field(default=None, ge=1)
    """Heads of M, each with one rate of decay (none: expand x hidden_size / head_dim)."""
    head_dim: int = Field(default=64, ge=1)
    """Channels of a head of M."""
    num_groups: int = Field(default=8, ge=1)
    """Groups of M's heads that share what is written and read of the state (B and C), as key/value heads are shared."""
    expand: float = Field(default=2.0, gt=0)
    """Channels of a layer over hidden_size, where num_heads is none."""
    conv_width: int = Field(default=4, ge=2)
    """Positions that the causal convolution before the state sees."""
    norm_groups: int | None = Field(default=None, ge=1)
    """Groups of channels that M's gated norm before the last product normalizes each by itself (none: num_groups)."""
    dt_rank: int | None = Field(default=None, ge=1)
    """Numbers that m makes the steps of all channels of (none: hidden_size / 16, rounded up)."""
    inner_norms: bool = False
    """RMSNorms in m on B, on C and on what steps are made of (Jamba)."""
    dt_range: Range = (0.001, 0.1)
    """First steps of heads, or of m's channels, are between these, log-uniform: about how fast a state forgets."""
    dt_floor: float = Field(default=1e-4, gt=0)
    """No first step is below this."""
    dt_limit: tuple[float, float | None] = (0.0, None)
    """Steps are cut to these bounds (none: to no upper one)."""
    decay_range: Range = (1.0, 16.0)
    """First rates of decay of M, uniform; those of m are 1, 2, 3, ... for the numbers of a channel."""
    implementation: Implementation = "auto"
    """Kernel of the scan; m has xla and reference."""

    @model_validator(mode="after")
    def _check(self) -> "MambaConfig":
        _check_range("model.mamba.dt_range", self.dt_range)
        _check_range("model.mamba.decay_range", self.decay_range)
        (low, high), (first, last) = self.dt_limit, self.dt_range
        limits = f"model.mamba.dt_limit {low:g} {'none' if high is None else f'{high:g}'}"
        if low < 0 or (high is not None and high <= low):
            raise ValueError(f"{limits} must be a number of 0 or more, and a larger one or none")
        steps = f"model.mamba.dt_range {first:g} {last:g}"
        if self.dt_floor > last:
            raise ValueError(f"model.mamba.dt_floor {self.dt_floor:g} is above all of {steps}; change one of them")
        if low > last or (high is not None and high < max(first, self.dt_floor)):
            raise ValueError(f"{limits} has none of the first steps in {steps}: no step would learn; change one")
        return self


class DeltaConfig(Config):
    """Gated delta nets, `G` (2412.06464), under the names of Qwen3-Next and Megatron."""

    linear_num_key_heads: int = Field(default=16, ge=1)
    """Heads of queries and keys."""
    linear_num_value_heads: int = Field(default=32, ge=1)
    """Heads of values, each with a state; neighbours share a query and key."""
    linear_key_head_dim: int = Field(default=128, ge=1)
    """Dimensions of a query and of a key."""
    linear_value_head_dim: int = Field(default=128, ge=1)
    """Dimensions of a value."""
    linear_conv_kernel_dim: int = Field(default=4, ge=2)
    """Positions that the causal convolution of queries, keys and values sees."""
    decay_range: Range = (1.0, 16.0)
    """First rates of decay, uniform."""
    implementation: DeltaImplementation = "auto"
    """Kernel of the recurrence."""

    @model_validator(mode="after")
    def _check(self) -> "DeltaConfig":
        _check_range("model.delta.decay_range", self.decay_range)
        return self
