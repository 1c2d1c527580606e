"""The methods that learn a representation: settings of each, registered by name in `METHODS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias, get_args

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank_files import from_fields
from fewshot_diti.representation.pdae import DitiNetwork, Mode, PdaeNetwork
from fewshot_diti.representation.simclr import SimclrNetwork
from fewshot_diti.representation.subsets import Subsets
from fewshot_diti.representation.tcvae import TcvaeNetwork

Network: TypeAlias = PdaeNetwork | SimclrNetwork | TcvaeNetwork


class MethodConfig(ABC):
    """Settings of a method.

    Attributes:
        name: in `METHODS`.
        batch_size: images per step where the user says nothing.
        dims: width of the feature.
    """

    name: ClassVar[str]
    batch_size: ClassVar[int] = 32
    dims: int

    @abstractmethod
    def build(self, backbone: Backbone) -> Network:
        """The network before training."""

    def subsets(self, backbone: Backbone) -> Subsets | None:
        """Dimensions by timestep, of a method that ties them."""
        return None


@dataclass(frozen=True, kw_only=True)
class PdaeConfig(MethodConfig):
    """Settings of PDAE.

    Attributes:
        dims: width of the feature.

    Raises:
        ValueError: fewer than 1 dimension.
    """

    name: ClassVar[str] = "pdae"
    dims: int = 512

    def __post_init__(self) -> None:
        _check_dims(self.dims)

    def build(self, backbone: Backbone) -> PdaeNetwork:
        """The network before training."""
        return PdaeNetwork(backbone, self.dims)


@dataclass(frozen=True, kw_only=True)
class DitiConfig(MethodConfig):
    """Settings of DiTi.

    Attributes:
        sizes: dimensions of each subset of timesteps, from small t to large t (`subsets`).
        mode: as of `DitiNetwork`.

    Raises:
        ValueError: an unknown mode.
    """

    name: ClassVar[str] = "diti"
    sizes: tuple[int, ...]
    mode: Mode = "base"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r}; pass one of {get_args(Mode)}.")

    @property
    def dims(self) -> int:  # type: ignore[override]
        """Width of the feature."""
        return sum(self.sizes)

    def build(self, backbone: Backbone) -> DitiNetwork:
        """The network before training."""
        return DitiNetwork(backbone, self.subsets(backbone), self.mode)

    def subsets(self, backbone: Backbone) -> Subsets:
        """Dimensions by timestep; raises as `Subsets`."""
        return Subsets(sizes=self.sizes, num_timesteps=backbone.num_train_timesteps)


@dataclass(frozen=True, kw_only=True)
class SimclrConfig(MethodConfig):
    """Settings of SimCLR.

    Attributes:
        dims: width of the feature.
        temperature: of the softmax over the other images of a batch.

    Raises:
        ValueError: fewer than 1 dimension, or a temperature that is not above 0.
    """

    name: ClassVar[str] = "simclr"
    batch_size: ClassVar[int] = 256
    dims: int = 512
    temperature: float = 0.5

    def __post_init__(self) -> None:
        _check_dims(self.dims)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}; pass a number above 0.")

    def build(self, backbone: Backbone) -> SimclrNetwork:
        """The network before training."""
        return SimclrNetwork(backbone, self.dims, self.temperature)


@dataclass(frozen=True, kw_only=True)
class TcvaeConfig(MethodConfig):
    """Settings of the beta-TCVAE.

    Attributes:
        dims: width of the feature.
        beta: weight of the total correlation; 1 makes it a plain variational autoencoder.

    Raises:
        ValueError: fewer than 1 dimension, or a negative weight.
    """

    name: ClassVar[str] = "tcvae"
    batch_size: ClassVar[int] = 256
    dims: int = 64
    beta: float = 6.0

    def __post_init__(self) -> None:
        _check_dims(self.dims)
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta}; pass 0 or more.")

    def build(self, backbone: Backbone) -> TcvaeNetwork:
        """The network before training."""
        return TcvaeNetwork(backbone, self.dims, self.beta)


METHODS: dict[str, type[MethodConfig]] = {x.name: x for x in (PdaeConfig, DitiConfig, SimclrConfig, TcvaeConfig)}


def to_dict(method: MethodConfig) -> dict[str, Any]:
    """The settings with the method's name, as JSON writes them."""
    return {"method": method.name, **asdict(method)}  # type: ignore[call-overload]


def from_dict(fields: dict[str, Any]) -> MethodConfig:
    """The settings that `to_dict` gave.

    Raises:
        ValueError: no such method, or a setting out of its range.
        TypeError: unknown fields.
    """
    name = fields["method"]
    if name not in METHODS:
        raise ValueError(f"Method {name!r} of representation learning; known are {', '.join(METHODS)}.")
    return from_fields(METHODS[name], {k: v for k, v in fields.items() if k != "method"})


def _check_dims(dims: int) -> None:
    if dims < 1:
        raise ValueError(f"dims={dims}; pass 1 or more.")
