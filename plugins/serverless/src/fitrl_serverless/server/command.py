"""`fitrl serve`: run the server, and make, list and revoke its keys."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fitrl.errors import InvalidArgumentError, MissingDependencyError
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.keys import add_key, list_keys, revoke_key
from fitrl_serverless.server.settings import Limits, Settings

if TYPE_CHECKING:
    import uvicorn

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_DEFAULT_OWNER = "me"
_STATE = Path(".fitrl-serve")


def make_parser() -> argparse.ArgumentParser:
    """The options of `fitrl serve`."""
    parser = argparse.ArgumentParser(
        prog="fitrl serve",
        description="Train models for others over HTTP. `fitrl serve key --help` is about keys.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--state", type=Path, default=_STATE, help="folder of the database and all runs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need TLS")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for TLS")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="its key")
    parser.add_argument(
        "--plain-http", action="store_true", help="listen without TLS beyond loopback: a proxy before it has TLS"
    )
    parser.add_argument(
        "--base-model",
        action="append",
        default=[],
        metavar="NAME[=WHAT]",
        help="a model that requests may name, and the hub id or folder that is loaded for it; may be repeated; "
        "nothing given: tiny",
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of the worker, started by torchrun")
    parser.add_argument("--strategy", help="of the worker; None: fitrl_local, or fitrl_ddp with several ranks")
    parser.add_argument("--accelerator", default="auto", help="of the worker, as lightning.Trainer takes it")
    parser.add_argument("--precision", help="of the worker, as lightning.Trainer takes it")
    parser.add_argument("--gradient-clip-val", type=float, help="of the worker, as lightning.Trainer takes it")
    parser.add_argument("--sampler-device", default="cpu", help="where chats are answered: cpu, cuda, cuda:1")
    parser.add_argument("--samplers", type=int, default=4, help="trained models that are kept loaded for chats")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds that a running job has once the server ends")
    defaults = Limits()
    for limit in dataclasses.fields(Limits):
        default = getattr(defaults, limit.name)
        option = f"--max-{limit.name.replace('_', '-')}"
        parser.add_argument(
            option, dest=f"max_{limit.name}", type=type(default), default=default, metavar="N", help=_LIMITS[limit.name]
        )
    return parser


_LIMITS = {
    "body_bytes": "bytes of a body, unpacked",
    "body_s": "seconds that a body may take to arrive",
    "header_s": "seconds that the head of a request may take to arrive",
    "groups": "groups in one request",
    "trajectories": "trajectories in one request",
    "jobs": "jobs of one owner, waiting or running",
    "models": "models of one owner",
    "chats": "chats answered at once",
    "completions": "completions of one chat request",
    "completion_tokens": "tokens of one completion",
    "attempts": "times that a job may take its worker down",
    "job_s": "seconds that a job may run",
    "connections": "connections open at once",
}


def make_key_parser() -> argparse.ArgumentParser:
    """The options of `fitrl serve key`."""
    parser = argparse.ArgumentParser(prog="fitrl serve key", description="Make, list and revoke keys.")
    state = argparse.ArgumentParser(add_help=False)
    state.add_argument("--state", type=Path, default=_STATE, help="folder of the server")
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", parents=[state], help="make a key and print it, once; the server keeps a digest")
    add.add_argument("owner", help="who it is for; keys of one owner reach the same models")
    actions.add_parser("list", parents=[state], help="list keys: id, owner, since when; not the keys themselves")
    revoke = actions.add_parser("revoke", parents=[state], help="take a key out of use")
    revoke.add_argument("id", help="as `list` prints it; also the middle of the key")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if arguments and arguments[0] == "key":
        return _keys(make_key_parser().parse_args(arguments[1:]))
    return _serve(make_parser().parse_args(arguments))


def _keys(options: argparse.Namespace) -> int:
    database = _open(options.state)
    try:
        if options.action == "add":
            print(add_key(database, options.owner))
        elif options.action == "revoke":
            revoke_key(database, options.id)
        else:
            for entry in list_keys(database):
                since = datetime.fromtimestamp(entry.created).astimezone().isoformat(timespec="seconds")
                print(f"{entry.id}  {entry.owner}  since {since}{'' if entry.revoked is None else '  revoked'}")
    finally:
        database.close()
    return 0


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the options say.

    Raises:
        InvalidArgumentError: a value that cannot be used.
    """
    names = [entry.partition("=") for entry in options.base_model] or [("tiny", "", "")]
    trainer: dict[str, Any] = {"accelerator": options.accelerator}
    for name in ("precision", "gradient_clip_val"):
        if getattr(options, name) is not None:
            trainer[name] = getattr(options, name)
    return Settings(
        state=options.state.expanduser().resolve(),
        base_models={name: what or name for name, _, what in names},
        ranks=options.nproc_per_node,
        strategy=options.strategy,
        trainer=trainer,
        samplers=options.samplers,
        sampler_device=options.sampler_device,
        limits=Limits(**{limit.name: getattr(options, f"max_{limit.name}") for limit in dataclasses.fields(Limits)}),
    )


def _serve(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    has_tls = options.ssl_certfile is not None
    if options.host not in _LOOPBACK and not has_tls and not options.plain_http:
        raise InvalidArgumentError(
            f"keys and prompts would cross the network in the clear on {options.host}: pass --ssl-certfile and "
            "--ssl-keyfile, or --plain-http if a proxy before this server has TLS"
        )
    try:
        import uvicorn

        from fitrl_serverless.server.app import make_app
        from fitrl_serverless.server.connections import AnnouncingServer, bounded
        from fitrl_serverless.server.service import Service
    except ImportError as error:
        raise MissingDependencyError(f"{error}: pip install 'fitrl-serverless[server]'") from error
    from filelock import FileLock, Timeout

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    database = _open(options.state)
    lock = FileLock(settings.state / "server.lock", timeout=0)
    try:
        lock.acquire()
        _require_key(database)
        app = make_app(Service.make(settings, database), grace_s=options.grace)
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            http=bounded(settings.limits.header_s),
            ws="none",
            log_config=None,
            access_log=False,  # `intake` logs requests
            server_header=False,
            limit_concurrency=settings.limits.connections,
            timeout_graceful_shutdown=30,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
        server = AnnouncingServer(config)
        _leave_once_ended(server)
        server.run()
    except Timeout as error:
        raise InvalidArgumentError(
            f"another server runs on {settings.state}: stop it, or pass another --state"
        ) from error
    finally:
        lock.release()
        database.close()
    return 0


def _leave_once_ended(server: uvicorn.Server) -> None:
    """Bear the signal that ended the server in good order: uvicorn raises it once more."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not server.should_exit:  # it is still starting
            raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _open(state: Path) -> Database:
    """The database of a state folder, which nobody else on this machine may read."""
    os.umask(0o077)
    folder = state.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return Database(folder / "serve.sqlite")


def _require_key(database: Database) -> None:
    """See that there is a key; a person at a terminal gets the first one by itself."""
    if any(entry.revoked is None for entry in list_keys(database)):
        return
    if not sys.stdout.isatty():
        raise InvalidArgumentError("there is no key yet: `fitrl serve key add OWNER` makes one and prints it")
    print(f"fitrl: the first key, shown this once:\nexport FITRL_SERVERLESS_KEY={add_key(database, _DEFAULT_OWNER)}")
