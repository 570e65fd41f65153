"""What machines and storage cost: one dated table of list prices, which a file of one's own replaces."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from pydantic import Field

from starflow.config import Config, load_config
from starflow.errors import ConfigError

TABLE = Path(__file__).with_name("prices.yaml")


class Machine(Config):
    """One kind of machine to rent."""

    name: str = Field(min_length=1, description="Short name, by GPU.")
    instance: str = Field(min_length=1, description="The provider's name for it.")
    gpus: int = Field(ge=0, description="GPUs of one machine.")
    cpus: int = Field(ge=1, description="Virtual CPUs of one machine.")
    hourly: float = Field(ge=0, description="Dollars an hour of the whole machine.")
    peak_tflops: float = Field(0.0, ge=0, description="Dense bfloat16 TFLOP/s of one GPU.")

    @property
    def devices(self) -> int:
        """What work is dealt to: GPUs, or CPUs on a machine without."""
        return self.gpus or self.cpus

    @property
    def device_hourly(self) -> float:
        """Dollars an hour of one device."""
        return self.hourly / self.devices


class StoragePrices(Config):
    """An object store's prices in dollars."""

    gigabyte_month: float = Field(ge=0, description="10^9 bytes for a month.")
    put_thousand: float = Field(ge=0, description="A thousand writing requests.")
    get_thousand: float = Field(ge=0, description="A thousand reading requests.")


class Prices(Config):
    """A price table: where and when it held, and where it is from."""

    region: str
    date: date
    source: str
    machines: tuple[Machine, ...] = Field(min_length=1)
    gateway_gigabyte: float = Field(ge=0, description="Dollars for 10^9 bytes through a NAT gateway.")
    storage: StoragePrices

    def machine(self, name: str) -> Machine:
        """The machine of that name or instance type. Raises ConfigError listing the known ones."""
        for machine in self.machines:
            if name in (machine.name, machine.instance):
                return machine
        known = ", ".join(f"{machine.name} ({machine.instance})" for machine in self.machines)
        raise ConfigError(f"machine {name!r} is not in the price table; choose one of {known}, or add it to the table")


def load_prices(file: Path | None = None) -> Prices:
    """The project's table, or the one in `file`. Raises ConfigError naming the key that is wrong."""
    return load_config(Prices, file or TABLE)
