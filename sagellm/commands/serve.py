"""``sagellm serve``: a cluster, deployed behind an OpenAI-compatible endpoint."""

from pathlib import Path

import click

from sagellm.commands.user_error import UserError

EPILOG = """\b
Examples:
  sagellm serve                                       a toy model on this CPU, to try what serving is like
  sagellm serve --model ./Qwen3-8B                    a folder with config.json, safetensors and tokenizer.json
  sagellm serve --cluster h200x1 --load-format dummy  random weights: the right speed, and no sense
  sagellm serve --cluster mine.yaml --log run.jsonl   the cluster that `sagellm replay` simulates

\b
Then, from anywhere:
  curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "stream": true}'
  sagellm replay --on http://localhost:8000           what its clients see
  sagellm log replay run.jsonl                        the same decisions again, without the devices

\b
Ctrl-C or SIGTERM lets requests under way end (--grace), then stops. A second one stops at once.
Exit code 0: stopped as asked, 2: something to put right.
"""


@click.command(epilog=EPILOG)
@click.option(
    "--cluster",
    metavar="FILE|NAME",
    help="A cluster file, or a name from `sagellm clusters list`.  [default: one instance on the best device here]",
)
@click.option(
    "--model",
    metavar="M",
    help="A model folder, a Hub id, a known model, or a config.json; instead of the cluster file's.",
)
@click.option(
    "--load-format",
    type=click.Choice(["auto", "safetensors", "dummy"]),
    default="auto",
    show_default=True,
    help="Where weights come from; dummy draws them at random from --seed, as auto does for sagellm's own models.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of weights and KV; auto is the model's own.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of dummy weights and routing.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FOLDER", help="Instead of the model folder's.")
@click.option("--chat-template", type=click.Path(path_type=Path), metavar="FILE", help="Jinja; instead of the model's.")
@click.option(
    "--served-model-name", "model_names", multiple=True, metavar="NAME", help="What clients call the model; repeatable."
)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes one that is free."
)
@click.option("--api-key", "api_keys", multiple=True, metavar="KEY", help="Ask clients for one of these; repeatable.")
@click.option(
    "--log", "log_path", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="Write what was decided."
)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="S",
    help="How long requests may go on after Ctrl-C or SIGTERM.",
)
@click.option("--single-process", is_flag=True, help="Instances as threads of this process; for small machines.")
@click.option(
    "--backend",
    metavar="NAME",
    help="Run on this instead of what the cluster's profiles name; none makes tokens up at no cost.",
)
@click.option(
    "--num-threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of one CPU instance.  [default: all cores but one, shared out]",
)
@click.option(
    "--enable-request-id-headers", is_flag=True, help="Accepted for vLLM's sake: X-Request-Id is always sent."
)
@click.option("--trust-request-chat-template", is_flag=True, help="Let clients send chat templates of their own.")
def serve(
    cluster: str | None,
    model: str | None,
    load_format: str,
    dtype: str,
    seed: int,
    tokenizer: Path | None,
    chat_template: Path | None,
    model_names: tuple[str, ...],
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    log_path: Path | None,
    grace_s: float,
    single_process: bool,
    backend: str | None,
    num_threads: int | None,
    enable_request_id_headers: bool,
    trust_request_chat_template: bool,
) -> None:
    """Serve a model with the cluster file that `replay` simulates, behind OpenAI's API.

    The front takes requests and decides where they run; every instance is a process of its own. Without
    a model and a cluster it serves a toy on the CPU, to try things out.
    """
    if any(not key for key in api_keys):
        raise UserError("--api-key is empty; give a key, or leave the option out to let everybody in")

    from sagellm.commands.serve_options import ServeOptions
    from sagellm.commands.serve_requirements import check_installed

    check_installed(backend)
    from sagellm.commands.serve_run import run_serve

    run_serve(
        ServeOptions(
            cluster=cluster,
            model=model,
            load_format=load_format,
            dtype=dtype,
            seed=seed,
            tokenizer=tokenizer,
            chat_template=chat_template,
            model_names=model_names,
            host=host,
            port=port,
            api_keys=api_keys,
            log_path=log_path,
            grace_s=grace_s,
            single_process=single_process,
            backend=backend,
            num_threads=num_threads or 0,
            trust_request_chat_template=trust_request_chat_template,
        )
    )
