"""What the flows and the set-up of a Prefect server have to agree on; nothing of Prefect is imported here."""

from __future__ import annotations

from pydantic import Field

from pipelines.sources import list_files
from starflow.config import Config
from starflow.errors import NotFoundError

#: Prefect variable with the deployments' default store.
STORE_VARIABLE = "starflow_store"
#: Secret blocks of the server and the environment variables that flows fill from them.
SECRETS = {
    "starflow-aws-access-key-id": "AWS_ACCESS_KEY_ID",
    "starflow-aws-secret-access-key": "AWS_SECRET_ACCESS_KEY",
    "starflow-captioner-key": "OPENAI_API_KEY",
}


def limit_name(store: str) -> str:
    """The global concurrency limit (of one) that whoever adds snapshots to `store` holds. Prefect forbids slashes."""
    return f"starflow writes {store.rstrip('/').replace('/', '|')}"


class BackfillConfig(Config):
    """Which lists a backfill works through; everything else is a refresh's."""

    lists: str = Field(
        title="URL lists",
        description="Folder (local or s3://) whose files and sub-folders are one list each, or a glob of files.",
        min_length=1,
    )
    first: str = Field(
        "",
        title="First list",
        description="Name of the first one, such as 2026-01 or 2026-01-15; of date=2026-01-15 the date counts. "
        "Empty: from the beginning.",
    )
    last: str = Field(
        "", title="Last list", description="Name of the last one, or how it begins: 2026-01 takes in all of January."
    )

    def partitions(self) -> list[str]:
        """The lists from `first` to `last`, by name. Raises NotFoundError naming what there is when none does."""
        folder = "" if set("*?[") & set(self.lists) else self.lists.rstrip("/") + "/"
        found = {_child(folder, file) for file in list_files(self.lists)}
        chosen = sorted((each for each in found if self._wanted(_name(each))), key=_name)
        if not chosen:
            names = sorted(map(_name, found))
            raise NotFoundError(
                f"no list in {self.lists} lies between first={self.first!r} and last={self.last!r}; "
                f"it holds {len(names)} from {names[0]} to {names[-1]}"
            )
        return chosen

    def _wanted(self, name: str) -> bool:
        return self.first <= name and (not self.last or name[: len(self.last)] <= self.last)


def _child(folder: str, file: str) -> str:
    """The file, or the folder right below `folder` that holds it."""
    inner = file.removeprefix(folder)
    return folder + inner.split("/", 1)[0] if folder and inner != file else file


def _name(partition: str) -> str:
    """What `first` and `last` are compared with: the last component, of ``key=value`` the value."""
    name = partition.rstrip("/").rsplit("/", 1)[-1]
    return name.partition("=")[2] or name
