"""What ``sagellm serve`` does: check everything, start the instances, answer, and leave in good order."""

import asyncio
import contextlib
import signal
import socket
import sys
from contextlib import ExitStack
from typing import IO

import click
from aiohttp import web

from sagellm.commands.serve_cluster import ServedCluster, choose_served_cluster
from sagellm.commands.serve_options import ServeOptions
from sagellm.commands.serve_requirements import NO_BACKEND
from sagellm.commands.user_error import UserError, user_errors
from sagellm.core.config import Role
from sagellm.core.identity import InstanceId
from sagellm.core.log import LogHeader
from sagellm.server.app import create_app, make_runner
from sagellm.server.app_settings import AppSettings
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.instance_host import InstanceHost, StartError
from sagellm.server.live.live_log import LiveLog
from sagellm.server.live.long_lived_objects import keep_for_good
from sagellm.server.prometheus.serving_metrics import ServingMetrics

_BACKLOG = 2048


def run_serve(options: ServeOptions) -> None:
    """Serve until told to stop.

    Raises:
        UserError: something that the user gave is wrong, or does not work here.
    """
    served = choose_served_cluster(options)
    settings = _app_settings(options, served)
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(options.host, options.port))
        log_file = None if options.log_path is None else stack.enter_context(_open_log(options))
        asyncio.run(_serve(options, served, settings, listening, log_file))


def _app_settings(options: ServeOptions, served: ServedCluster) -> AppSettings:
    model = served.model
    if options.tokenizer is not None and not options.tokenizer.is_dir():
        raise UserError(f"--tokenizer: {options.tokenizer} is no folder; give one that has a tokenizer.json")
    try:
        chat_template = None if options.chat_template is None else options.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template: {options.chat_template} cannot be read ({error})") from error
    return AppSettings(
        model_names=options.model_names or (model.name,),
        max_model_len=_max_model_len(served),
        vocab_size=model.config.shape.vocab_size,
        model_root=str(model.folder or model.name),
        tokenizer_folder=options.tokenizer or model.tokenizer_folder,
        eos_token_ids=model.config.eos_token_ids,
        chat_template=chat_template,
        trust_request_chat_template=options.trust_request_chat_template,
        api_keys=options.api_keys,
    )


def _max_model_len(served: ServedCluster) -> int:
    """Of the model or the cluster file, and no more than fits where prompts are computed and where they go on."""
    slots: dict[Role, int] = {}
    for each in served.deployment.instances:
        config = each.settings.instance
        slots[config.role] = max(slots.get(config.role, 0), config.num_token_slots)
    mixed = slots.get(Role.MIXED, 0)
    fitting = min(max(slots.get(Role.PREFILL, 0), mixed), slots.get(Role.DECODE, mixed))
    return min(served.deployment.control_plane.max_model_len or fitting, fitting)


def _listen(host: str, port: int) -> socket.socket:
    """The socket to serve at, before anything expensive is begun. No client is answered yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        place = f"{host}, port {port}: {error.strerror or error}"
        raise UserError(f"cannot listen at {place}; choose another with --host, --port") from error
    return listening


def _open_log(options: ServeOptions) -> IO[bytes]:
    assert options.log_path is not None
    try:
        return options.log_path.open("wb")
    except OSError as error:
        raise UserError(f"--log: cannot write {options.log_path}: {error.strerror}") from error


async def _serve(
    options: ServeOptions,
    served: ServedCluster,
    settings: AppSettings,
    listening: socket.socket,
    log_file: IO[bytes] | None,
) -> None:
    metrics = ServingMetrics(settings.model_name, settings.max_model_len)
    engine = LiveEngine(
        served.deployment,
        _host(options, served),
        observers=(metrics,),
        log=None if log_file is None else LiveLog(log_file, _log_header(options, served)),
        seed=options.seed,
    )
    with user_errors(ValueError):
        runner = make_runner(create_app(engine, settings, metrics))
    stop = _stop_signal()
    if not await _start(engine, served, stop):
        return
    keep_for_good()
    await runner.setup()
    listening.listen(_BACKLOG)
    await web.SockSite(runner, listening, backlog=_BACKLOG).start()
    _say_ready(options, served, settings, listening.getsockname()[1])
    await stop.wait()
    await _leave(engine, options.grace_s, stop)
    await runner.cleanup()


async def _start(engine: LiveEngine, served: ServedCluster, stop: asyncio.Event) -> bool:
    """Start the instances, showing how far it is; False where the user did not want to wait."""
    num_instances = len(served.deployment.instances)
    click.echo(f"Starting {num_instances} x {served.model.name} ({_devices(served)}) ...", err=True)
    num_started = 0

    def on_started(instance_id: InstanceId) -> None:
        nonlocal num_started
        num_started += 1
        click.echo(f"  {instance_id} is ready ({num_started} of {num_instances})", err=True)

    starting = asyncio.ensure_future(engine.start(on_started))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return False
    stopping.cancel()
    try:
        starting.result()
    except StartError as error:
        # Drivers and libraries say more than a line; the first is the sentence.
        raise UserError(str(error).strip().partition("\n")[0]) from error
    return True


async def _leave(engine: LiveEngine, grace_s: float, stop: asyncio.Event) -> None:
    """Answer no more, let what runs end, and stop at once where a second signal says so."""
    click.echo(f"Stopping: {engine.num_unfinished} requests have {grace_s:g} s to end.", err=True)
    stop.clear()
    draining = asyncio.ensure_future(engine.drain(grace_s))
    again = asyncio.ensure_future(stop.wait())
    await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not draining.done():
        draining.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining
        await engine.drain(0)


def _stop_signal() -> asyncio.Event:
    """Set by Ctrl-C and SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _host(options: ServeOptions, served: ServedCluster) -> InstanceHost:
    settings = [each.settings for each in served.deployment.instances]
    driver_options = DriverOptions(keeps_log=options.log_path is not None)
    if options.single_process:
        from backends.model_runner.factory import make_executor
        from sagellm.server.live.threaded_instances import ThreadedInstances

        return ThreadedInstances(settings, make_executor, driver_options)
    from sagellm.server.live.supervisor import InstanceProcesses

    return InstanceProcesses(settings, driver_options)


def _log_header(options: ServeOptions, served: ServedCluster) -> LogHeader:
    deployment = served.deployment
    configs = tuple(each.settings.instance for each in deployment.instances)
    return LogHeader(deployment.cluster, "live", options.seed, deployment.control_plane, configs)


def _devices(served: ServedCluster) -> str:
    return ", ".join(dict.fromkeys(each.device for each in served.deployment.instances))


def _say_ready(options: ServeOptions, served: ServedCluster, settings: AppSettings, port: int) -> None:
    host = "localhost" if options.host in ("0.0.0.0", "::", "127.0.0.1") else options.host
    url = f"http://{host}:{port}"
    if options.backend == NO_BACKEND:
        click.echo("Nothing is computed: every answer is the alphabet, over and over.")
    elif served.is_toy:
        click.echo("No model was given: this is a toy with random weights, which talks nonsense, quickly.")
    if settings.tokenizer_folder is None:
        click.echo("There is no tokenizer.json: every byte of the text is a token.")
    key = " -H 'Authorization: Bearer KEY'" if options.api_keys else ""
    click.echo(f"Serving {settings.model_name} at {url} (page: {url}/). Try:")
    click.echo(
        f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{settings.model_name}", "prompt": "Hello", "max_tokens": 32}}\''
    )
    sys.stdout.flush()
