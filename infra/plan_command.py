"""`starflow plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starflow.console import print_json

if TYPE_CHECKING:
    from infra.plan import Plan


def plan(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value, over the file's.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the settings.")] = None,
    prices: Annotated[Path | None, typer.Option(help="Price table of your own, as starflow/prices.yaml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Hours, dollars, storage and requests of a data set and a model. Starts nothing.

    Without settings: 700 million pictures and the 3.8 B parameter text-to-image model.
    """
    from infra.plan import PlanConfig, make_plan
    from starflow.config import load_config
    from starflow.prices import load_prices

    made = make_plan(load_config(PlanConfig, config, overrides or ()), load_prices(prices))
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        _show(made)


def _show(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console()
    out.print(
        f"{plan.config.images:,} pictures, {plan.config.preset} ({plan.parameters / 1e9:.2f} B parameters), "
        f"{plan.images_seen:,} samples seen ({plan.epochs:.2f} epochs); prices of {plan.prices}"
    )
    table = Table("stage", "machines", "a device does", "hours", "machine-hours", "dollars")
    for stage in plan.stages:
        rate = f"{stage.rate.value:,.3g} {stage.rate.unit}/s"
        hours = (f"{stage.hours:,.1f}", f"{stage.machine_hours:,.0f}")
        table.add_row(stage.name, f"{stage.machines} {stage.machine}", rate, *hours, f"{stage.dollars:,.0f}")
    out.print(table)
    stored = ", ".join(f"{name} {size / 1e12:,.2f} TB" for name, size in plan.storage_bytes.items())
    out.print(f"storage: {stored}; {plan.storage_dollars:,.0f} dollars for {plan.config.months:g} month(s)")
    puts, gets = (sum(getattr(stage, kind) for stage in plan.stages) for kind in ("puts", "gets"))
    out.print(f"requests: {puts:,} that write, at most {gets:,} that read; {plan.request_dollars:,.0f} dollars")
    out.print(f"NAT gateway for what is fetched: {plan.gateway_dollars:,.0f} dollars")
    out.print(f"[bold]together: {plan.dollars:,.0f} dollars, {plan.hours:,.0f} hours one after the other[/]")
    for stage in plan.stages:
        if stage.rate.known == "measured":
            out.print(
                f"[green]measured[/]: {stage.name} at {stage.rate.value:,.3g} {stage.rate.unit}/s a device "
                f"({stage.rate.source})"
            )
    for each in plan.assumed:
        out.print(f"[yellow]assumed[/]: {each}")
